"""Shows the CUDA backend on a machine with a GPU: one command, no network, ten minutes at most.

    python -m bench.gpu_acceptance                       # all; report in build/gpu_acceptance
    python -m bench.gpu_acceptance --stage train         # one of them, into the same report
    python -m bench.gpu_acceptance --bitsandbytes WHEEL  # with the peer, for this run alone
    python -m bench.gpu_acceptance --emulate             # the same script on the emulator

It needs torch with CUDA, nvcc, cmake, pybind11 and pytest. Each stage is a process of its own with
a time limit, and leaves its result as JSON: one that fails loses nothing of the others, and one
that has passed is not run again unless it is asked for by name. So far it has run on the emulator
alone.
"""
