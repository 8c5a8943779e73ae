# Every target sets up what it needs on a fresh machine: a virtual environment with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs
BIN := $(VENV)/bin
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)
KERNEL_TESTS := tests/test_nf4.py tests/test_nf4_linear.py tests/test_lora_linear.py tests/test_prefix_attention.py \
	tests/test_dora_linear.py tests/test_lora_embedding.py tests/test_bottleneck_adapter.py \
	tests/test_linear_logprob.py tests/interpret \
	$(addprefix tests/test_lora_projections.py::test_,forward_and_gradients more_blocks_than_one \
	groups_of_columns_have_masks_of_their_own strided_x_and_output_gradients no_rows) \
	$(addprefix tests/test_gated_mlp.py::test_,gated_and_its_gradients gated_takes_any_strides_and_keeps_infinities_and_nan \
	forward_and_gradients more_blocks_than_one no_rows)
NATIVE_TESTS := tests/test_nf4.py tests/test_nf4_linear.py tests/test_lora_linear.py tests/test_dora_linear.py \
	tests/test_lora_projections.py tests/test_bottleneck_adapter.py tests/test_gated_mlp.py
# gradcheck is in float64, which the reference computes whatever is asked for
FLOAT32 := -k "not gradcheck"
NATIVE_SOURCES := $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h kernels/cpu/*.inc)
SANITIZE := -fsanitize=address,undefined -fno-omit-frame-pointer

.PHONY: demo test lint torch native sanitize interpret aot bench gpu lock clean

demo: $(VENV)/.ready  ## train the embedded model by every method, side by side
	$(BIN)/peft-ops compare --out $(OUT)/compare

test: lint torch native interpret aot  ## the five jobs of CI

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

torch: $(VENV)/.ready  ## the plain-PyTorch path: ops, layers, methods, checkpoints, command line, benchmarks once
	$(PYTEST) tests --ignore tests/interpret --ignore tests/aot -m "not gpu"
	$(BIN)/python -m pytest benchmarks --benchmark-disable

native: $(VENV)/.ready  ## ops on the plain reference, and on the instruction sets that are not this machine's best
	PEFT_OPS_BACKEND=peft_ops.reference $(PYTEST) -q $(NATIVE_TESTS) -m "not gpu" $(FLOAT32)
	for isa in $$($(BIN)/python -c "from peft_ops.kernels.cpu import native; print(*{'avx2', 'portable'} & {*native.runs()})"); do \
		PEFT_OPS_CPU_ISA=$$isa $(PYTEST) -q $(NATIVE_TESTS) -m "not gpu" $(FLOAT32) || exit 1; done

sanitize: $(VENV)/.ready  ## the native library's tests under AddressSanitizer and UndefinedBehaviorSanitizer
	CFLAGS="$(SANITIZE)" CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" $(BIN)/python setup.py -q build_ext \
		--build-lib $(OUT)/sanitize --build-temp $(OUT)/sanitize/temp
	PEFT_OPS_CPU_LIBRARY=$$(ls $(OUT)/sanitize/peft_ops/kernels/cpu/_native*) ASAN_OPTIONS=detect_leaks=0 \
		UBSAN_OPTIONS=halt_on_error=1 LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
		OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q tests/test_native.py tests/test_native_ops.py \
		tests/test_native_attention.py tests/test_nf4_linear.py

interpret: $(VENV)/.ready  ## the Triton kernels on CPU tensors, held against the reference
	TRITON_INTERPRET=1 PEFT_OPS_BACKEND=peft_ops.kernels $(PYTEST) $(KERNEL_TESTS) -m "not gpu" $(FLOAT32)

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

$(VENV)/.ready: pyproject.toml setup.py constraints.txt $(NATIVE_SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info kernels/cpu/*.so
