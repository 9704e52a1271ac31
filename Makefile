# One virtual environment, made on first use; every target sets up what it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs

.PHONY: install quickstart test test-long lint typecheck docs clean

install: $(STAMP)

# torch is pinned by the constraints file; for the build without gigabytes of CUDA, CONTRIBUTING.md
$(STAMP): pyproject.toml setup.py .ci/constraints.txt startup/lm_eval_lora_ensemble.pth startup/lm_eval_lora_ensemble.start
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable '.[dev]'
	touch $@

quickstart: install
	$(BIN)/lora-ensemble quickstart --output quickstart

# two workers with one thread each: most of the time goes into starting lm-eval, which is single-threaded
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-long: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m 'long or not long'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The folders tasks/ and train/ are sub-packages only once installed, so mypy and import-linter read an installed copy.
typecheck: install
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/typecheck .
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p lm_eval_lora_ensemble
	cd build/typecheck && PYTHONPATH=. ../../$(BIN)/lint-imports --no-logo --no-cache ../../pyproject.toml

# into site/, without a network once the extra is installed; the extra is 117 MB, so `dev` leaves it out
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache quickstart
