"""The command line `qlora-native`: one file a command; `__main__` puts them together.

A command is a typed function of the command's name. It raises what its library calls raise:
`errors` turns that into one line and an exit code, and `config` lets a YAML file give any of its
options.
"""
