# Two commands: `make book` and `make test`. Both first make .venv from requirements.lock.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2

.PHONY: book test lint bench lock clean
.DELETE_ON_ERROR:

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 13) else "hcl needs Python 3.11, 3.12 or 3.13; this is %d.%d. Name another: make PYTHON=python3.12 …" % sys.version_info[:2])'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

book: .venv/installed  ## execute every notebook in its quick form, then render the site into _build/html
	$(BIN)/hcl book --workers $(WORKERS)

test: .venv/installed  ## the whole suite, and the linters
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.peers/installed: benchmarks/peers.txt .venv/installed
	$(BIN)/python -m pip install --quiet --no-deps --target .peers --upgrade --requirement $<
	touch $@

bench: .peers/installed  ## what a training step, its parts and a loss cost, beside other libraries; forty minutes
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/graphs.py
	$(BIN)/python benchmarks/sentences.py
	PYTHONPATH=.peers $(BIN)/python benchmarks/train.py
	PYTHONPATH=.peers $(BIN)/python benchmarks/loss.py

lock:  ## resolve every version anew, with hashes and without addresses
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet uv
	.venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate --extra dev pyproject.toml --output-file requirements.lock --upgrade
	rm -r .venv-lock

clean:
	rm -rf _build
