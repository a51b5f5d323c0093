# make demo | make test | make env | make bench: each works from nothing on a fresh machine.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# One BLAS thread a test process: pytest-xdist already uses every core.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: env demo test lint bench clean

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt nnunet-peer.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,nnunet-peer]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r nnunet-peer.txt
	$(BIN)/python -c "import torch; v = torch.__version__; assert v.split('+')[0] == '2.13.0', f'torch is {v}, constraints.txt asks for 2.13.0'; print('environment ready: torch', v)"
	touch $@

demo: env
	$(BIN)/segraft demo --out demo

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(TEST_ENV) $(BIN)/python -m pytest -n auto

# In pieces: make bench BENCH='--networks unet-512 --groups "r4$$"'; all options: make bench BENCH=--help
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.run $(BENCH)

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	touch $@

clean:
	rm -rf $(VENV) demo
