# The two commands of the README: `make demo` and `make test`. Each sets up its own .venv.
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python -m

.PHONY: demo test check format mutants bench bench-compare clean

demo: .venv/ready  ## phantoms -> low dose -> U-Net -> MSE-WGAN and TOD-Net -> runs/demo/report.html
	$(RUN) examples.tod_net_ct run demo --output runs/demo

test: .venv/ready  ## the fast suite: laws, doctests, the code blocks of README and docs
	OMP_NUM_THREADS=1 $(RUN) pytest -m "not slow" -n 2 --dist loadscope

check: .venv/ready  ## what contributors run before they push
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy
	OMP_NUM_THREADS=1 $(RUN) pytest -m "not slow" -n 2 --dist loadscope

format: .venv/ready
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

mutants: .venv/ready  ## break the library one line at a time and show that a test dies each time
	$(RUN) tests.mutants

bench: .venv/bench-ready  ## every benchmark beside its peers -> benchmarks/results/, docs/benchmarks.md
	$(RUN) benchmarks

bench-compare: .venv/bench-ready  ## what became slower than the committed result of this machine
	$(RUN) benchmarks --compare

.venv/bench-ready: .venv/ready
	$(BIN)/pip install --quiet -e ".[dev,bench]"
	touch $@

.venv/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache build *.egg-info
