# Every target sets up what it needs on a fresh machine: a virtual environment with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs
BIN := $(VENV)/bin
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)
KERNEL_TESTS := tests/test_nf4.py tests/test_nf4_linear.py tests/test_lora_linear.py tests/test_prefix_attention.py \
	tests/test_dora_linear.py tests/test_lora_embedding.py tests/test_bottleneck_adapter.py \
	tests/test_linear_logprob.py tests/test_lora_projections.py tests/test_gated_mlp.py tests/interpret

.PHONY: demo test lint torch interpret aot bench gpu lock clean

demo: $(VENV)/.ready  ## train the embedded model by every method, side by side
	$(BIN)/peft-ops compare --out $(OUT)/compare

test: lint torch interpret aot  ## the four jobs of CI

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

torch: $(VENV)/.ready  ## the plain-PyTorch path: ops, layers, methods, checkpoints, command line, benchmarks once
	$(PYTEST) tests --ignore tests/interpret --ignore tests/aot -m "not gpu"
	$(BIN)/python -m pytest benchmarks --benchmark-disable

interpret: $(VENV)/.ready  ## the Triton kernels on CPU tensors, held against the reference
	TRITON_INTERPRET=1 PEFT_OPS_BACKEND=peft_ops.kernels $(PYTEST) $(KERNEL_TESTS) -m "not gpu"

aot: $(VENV)/.ready  ## every kernel and configuration compiled for every chip
	$(PYTEST) tests/aot

bench: $(VENV)/.ready  ## the benchmark suite on this machine, with its peers, into benchmarks/results/<device> and README
	mkdir -p $(OUT)
	$(BIN)/python -m pytest benchmarks --benchmark-json=$(OUT)/benchmark.json
	$(BIN)/python -m benchmarks.report $(OUT)/benchmark.json
	$(BIN)/python -m benchmarks.figures

gpu:  ## everything that needs a GPU, with the Python, torch and triton that are there; no network, no set-up
	$(PYTHON) -m benchmarks.gpu --out $(OUT)/gpu

lock: $(VENV)/.ready  ## write constraints.txt from the environment as it is
	( sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable --exclude setuptools \
		| grep -v '^-e' | sed 's/+[a-z0-9]*$$//' ) > constraints.new
	mv constraints.new constraints.txt

$(VENV)/.ready: pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
