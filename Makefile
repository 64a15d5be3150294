# Plain commands. `make serve` and `make test` need python3, make and gcc, and set up the rest in .venv by themselves.

PYTHON ?= python3
PORT ?= 3000
ARGS ?=
CONSTRAINTS := docker/constraints/cpu.txt
DISTRIBUTIONS := gateway model-server backends/cpu demo-model
DEV_DISTRIBUTIONS := $(DISTRIBUTIONS) backends/cuda contract-tests
SOURCES := gateway/src model-server/src backends/cpu/src backends/cuda/src backends/llamacpp/src contract-tests/src demo-model/src examples/toy-backend examples/toy-device examples/ray
LLAMACPP := docker/constraints/llamacpp.txt
# Of llama.cpp only what the backend uses, for any x86-64 processor since 2013; on others the flags mean nothing.
LLAMACPP_BUILD := CMAKE_ARGS="-DCMAKE_PROJECT_llama.cpp_INCLUDE=$(CURDIR)/docker/llamacpp.cmake -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF"
TESTS := $(wildcard */tests backends/*/tests) tests bench $(wildcard demo-model/*.py)
PIP := .venv/bin/python -m pip
MANIFESTS := $(CONSTRAINTS) pyproject.toml $(addsuffix /pyproject.toml,$(DEV_DISTRIBUTIONS) backends/llamacpp)

.DEFAULT_GOAL := help
.PHONY: help serve test chaos test-ray test-gpu lint format contract bench proto clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv/pip: $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet "pip>=25.1,<27"
	@touch $@

.venv/serve: .venv/pip $(MANIFESTS)
	@echo "Installing the gateway, the CPU engine and the demo model into .venv (some minutes the first time)"
	$(PIP) install --quiet --constraint $(CONSTRAINTS) $(addprefix --editable ./,$(DISTRIBUTIONS))
	@touch $@

.venv/dev: .venv/serve
	@echo "Installing the development tools into .venv"
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --group dev $(addprefix --editable ./,$(DEV_DISTRIBUTIONS))
	$(PIP) install --quiet --no-deps --editable ./backends/llamacpp
	@touch $@

.venv/llamacpp: .venv/dev $(LLAMACPP)
	@if command -v c++ >/dev/null; then \
		echo "Compiling llama.cpp into .venv (some minutes the first time; pip keeps what it compiled)"; \
		$(LLAMACPP_BUILD) $(PIP) install --quiet --constraint $(CONSTRAINTS) --constraint $(LLAMACPP) --editable ./backends/llamacpp && touch $@; \
	else \
		echo "There is no C++ compiler (c++), so the tests that run llama.cpp are skipped. Install one: apt-get install g++"; \
	fi

serve: .venv/serve ## Start the gateway on the CPU with the demo model; make serve PORT=3000 ARGS="--model-id DIR"
	@exec .venv/bin/tgi-gateway --port $(PORT) $(ARGS)

test: .venv/dev .venv/llamacpp ## Run all tests that need no accelerator; make test ARGS="-k words"
	.venv/bin/python -m pytest $(ARGS)

test-gpu: .venv/dev ## Run the tests that need a GPU, and the contract of the CUDA backend; wants a torch with CUDA
	.venv/bin/python -m pytest -m gpu model-server/tests backends/cuda/tests $(ARGS)
	.venv/bin/tgi-contract cuda

lint: .venv/dev ## Check style, types and the arrows between the packages
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy $(SOURCES)
	set -e; for tests in $(TESTS); do .venv/bin/mypy $$tests; done # apart, because each has a conftest.py
	.venv/bin/lint-imports

format: .venv/dev ## Format the code and mend what can be mended by a tool
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

chaos: .venv/dev ## Kill, freeze and overload servers for half an hour, and see that nothing is lost
	CHAOS=20 .venv/bin/python -m pytest tests/chaos $(ARGS)

test-ray: .venv/dev ## Run examples/ray on real Ray, which is installed into .venv; some minutes
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable ./examples/ray
	RAY=1 .venv/bin/python -m pytest tests/test_ray.py $(ARGS)

contract: .venv/dev ## Run the contract against the CPU backend
	.venv/bin/tgi-contract cpu

bench: .venv/dev ## Measure the gateway, the engine host and the prefix cache on this machine
	.venv/bin/python bench/gateway.py
	.venv/bin/python bench/host.py
	.venv/bin/python bench/prefix.py

proto: .venv/pip ## Regenerate the messages of the wire
	# An old generator on purpose: its code runs on every protobuf of our range.
	$(PIP) install --quiet --target .cache/proto grpcio-tools==1.70.0 "setuptools<81"
	PYTHONPATH=.cache/proto .venv/bin/python -m grpc_tools.protoc -I gateway/src --python_out=gateway/src --pyi_out=gateway/src gateway/src/tgi_gateway/wire/engine.proto

clean: ## Remove what the other targets made
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
