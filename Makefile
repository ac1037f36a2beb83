# make demo: convert Gemma 3 270M and continue a prompt, dense and with FlashHead
# make test: the tests, minutes on two cores
# make test-all: also what takes long, or changes seldom
# make test-mlx-lm: mlx-lm's own tests, stock and patched
# make lint: ruff and mypy
# make test-oldest: tests with the oldest versions that pyproject.toml allows
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

# In two processes, each with a thread of its own for BLAS.
pytest = $(RUN) OPENBLAS_NUM_THREADS=1 $(1)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10

.PHONY: demo test test-all test-full test-mlx-lm lint test-oldest test-newest blas clean

demo: .venv/demo blas
	$(RUN) $(BIN)/mlx_flashhead.demo

test: .venv/test blas
	$(call pytest,.venv)

# Step by step.
test-all: test-full test-mlx-lm

test-full: .venv/test blas
	$(call pytest,.venv) -m ""

test-mlx-lm: .venv/test blas
	PYTHONPATH=tests $(RUN) $(BIN)/python -m mlx_lm_suite

lint: .venv/lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Of what stands between the package and the versions it allows.
BOUNDS := head files samplers candidates decoding exact embeddings rollback attach_loaded decoder patch generate convert gguf metal_kernels
BOUNDS_newest := vlm
EXTRA_oldest := test-oldest
EXTRA_newest := test
UV := .venv-uv/bin/uv
RESOLUTION_oldest := lowest-direct
RESOLUTION_newest := highest
# The first of 3.11, which this machine has or uv gets; else, said aloud, $(PYTHON).
PYTHON_oldest := >=3.11,<3.11.3
PYTHON_newest := $(PYTHON)

test-oldest test-newest: test-%: $(UV) blas
	$(UV) venv -q --seed --clear --python '$(PYTHON_$*)' .venv-$* || { \
	  echo "Note: no Python $(PYTHON_$*) here, and uv gets none: testing with $(PYTHON)"; \
	  $(UV) venv -q --seed --clear --python '$(PYTHON)' .venv-$*; }
	$(UV) pip install -q --python .venv-$* --resolution $(RESOLUTION_$*) -e '.[$(EXTRA_$*)$(MLX)]'
	.venv-$*/bin/python --version
	$(UV) pip list -q --python .venv-$*
	$(call pytest,.venv-$*) $(patsubst %,tests/test_%.py,$(BOUNDS) $(BOUNDS_$*))

$(UV):
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/python -m pip install -q --disable-pip-version-check uv

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
	rm -rf .venv .venv-* build dist *.egg-info
