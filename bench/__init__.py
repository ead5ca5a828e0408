"""Benchmarks of qlora_native beside its peers and beside what the machine can do at most."""
