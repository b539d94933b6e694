# The two commands of the README: `make demo` and `make test`. Each sets up its own .venv.
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python -m

.PHONY: demo test check format mutants bench bench-compare trainers floors docs front dist dist-test test-cuda clean

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

trainers: .venv/trainers-ready  ## the recipes of docs/trainers.md in the trainers themselves
	OMP_NUM_THREADS=1 $(RUN) pytest -m trainers -rs tests/trainers

floors: ## the fast suite on the lowest releases that pyproject.toml allows (uv derives them), in an environment of its own
	test -x build/floors/bin/python || $(PYTHON) -m venv build/floors
	build/floors/bin/pip install --quiet uv
	build/floors/bin/uv pip install --quiet --python build/floors --resolution lowest-direct -e ".[dev]"
	OMP_NUM_THREADS=1 build/floors/bin/python -m pytest -m "not slow" -n 2 --dist loadscope

mutants: .venv/ready  ## break the library one line at a time and show that a test dies each time
	$(RUN) tests.mutants

bench: .venv/bench-ready  ## every benchmark beside its peers -> benchmarks/results/, docs/benchmarks.md
	$(RUN) benchmarks

bench-compare: .venv/bench-ready  ## what became slower than the committed result of this machine
	$(RUN) benchmarks --compare

docs: .venv/docs-ready  ## the site, with the gallery run, without a warning -> site/index.html
	OMP_NUM_THREADS=1 $(RUN) sphinx -W --keep-going -b html docs site
	OMP_NUM_THREADS=1 $(RUN) pytest -m docs tests/test_site.py

front: .venv/docs-ready  ## the README's pictures and numbers, from what is committed
	OMP_NUM_THREADS=1 $(RUN) docs.figure_2
	$(RUN) benchmarks.before_after
	$(RUN) benchmarks.front

dist: .venv/docs-ready  ## wheel and source archive -> dist/
	rm -rf dist
	$(RUN) build
	$(RUN) twine check --strict dist/*

dist-test: dist  ## both in an empty environment: with torch alone the wheel runs the README's lines, the archive runs its tests
	rm -rf build/dist-test && mkdir -p build/dist-test/source
	tar xzf dist/*.tar.gz -C build/dist-test/source --strip-components 1
	$(PYTHON) -m venv build/dist-test/venv
	build/dist-test/venv/bin/pip install --quiet uv
	build/dist-test/venv/bin/uv pip install --quiet --python build/dist-test/venv dist/*.whl
	cd build/dist-test && venv/bin/python -c 'import re; \
	exec(re.search("`{3}python\n(.*?)`{3}", open("source/README.md").read(), re.DOTALL)[1]); print(repr(value))'
	build/dist-test/venv/bin/uv pip install --quiet --python build/dist-test/venv "build/dist-test/source[dev]"
	cd build/dist-test/source && OMP_NUM_THREADS=1 ../venv/bin/python -m pytest -m "not slow" -n 2 --dist loadscope $(TESTS)

test-cuda: .venv/ready  ## the tests that need a CUDA device
	$(RUN) pytest -m cuda

.venv/docs-ready: .venv/ready
	$(BIN)/pip install --quiet -e ".[dev,docs]"
	touch $@

# ldct-benchmark and CompressAI pin releases that nothing else here can live with; what the recipes use of them runs without.
.venv/trainers-ready: .venv/ready
	$(BIN)/pip install --quiet -e ".[dev,trainers]"
	$(BIN)/pip install --quiet --no-deps ldct-benchmark compressai pytorch-msssim torch-geometric
	touch $@

.venv/bench-ready: .venv/ready
	$(BIN)/pip install --quiet -e ".[dev,bench]"
	touch $@

.venv/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf .venv runs site dist docs/api docs/api.md docs/auto_gallery .pytest_cache .mypy_cache .ruff_cache build *.egg-info
