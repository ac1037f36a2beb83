# make demo: convert Gemma 3 270M and continue a prompt, dense and with FlashHead
# make test: the whole test suite
# make test-mlx-lm: mlx-lm's own tests, stock and patched
# make lint: ruff and mypy
# make test-oldest: quick tests with the oldest versions that pyproject.toml allows
# make test-newest: the same with the newest
PYTHON ?= python3
BIN := .venv/bin

# MLX: plain on macOS; on Linux its CUDA back-end where there is an NVIDIA GPU.
ifeq ($(shell uname -s),Darwin)
MLX :=
else ifneq ($(shell nvidia-smi -L 2>/dev/null | grep -c GPU),0)
MLX := ,cuda
else
MLX := ,cpu
# A fast BLAS for MLX on a CPU, where the system has one.
OPENBLAS := $(shell PATH=$$PATH:/sbin:/usr/sbin ldconfig -p 2>/dev/null | sed -n 's/.* => \(.*libopenblas\.so\.0\)$$/\1/p' | head -n 1)
RUN := $(if $(OPENBLAS),LD_PRELOAD=$(OPENBLAS))
endif

.PHONY: demo test test-mlx-lm lint test-oldest test-newest blas clean

demo: .venv/demo blas
	$(RUN) $(BIN)/mlx_flashhead.demo

test: .venv/test blas
	$(RUN) $(BIN)/python -m pytest

test-mlx-lm: .venv/test blas
	PYTHONPATH=tests $(RUN) $(BIN)/python -m mlx_lm_suite

lint: .venv/lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Of what stands between the package and the versions it allows.
BOUNDS := head files samplers candidates decoding patch generate convert gguf metal_kernels
RESOLUTION_oldest := lowest-direct
RESOLUTION_newest := highest

test-oldest test-newest: test-%: blas
	rm -rf .venv-$*
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install -q --disable-pip-version-check uv
	.venv-$*/bin/uv pip install -q --python .venv-$*/bin/python --resolution $(RESOLUTION_$*) -e '.[test$(MLX)]'
	.venv-$*/bin/uv pip list -q --python .venv-$*/bin/python
	$(RUN) .venv-$*/bin/python -m pytest $(BOUNDS:%=tests/test_%.py)

.venv/%: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Python 3.11 or later is needed, this is %d.%d: use make PYTHON=python3.12" % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[$*$(MLX)]'
	touch $@

blas:
ifeq ($(MLX)$(OPENBLAS),,cpu)
	@echo "Note: without OpenBLAS this is many times slower; on Debian and Ubuntu: sudo apt-get install libopenblas0-pthread"
endif

clean:
	rm -rf .venv .venv-oldest .venv-newest build dist *.egg-info
