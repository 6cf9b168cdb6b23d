PYTHON ?= python3
BIN := .venv/bin
# Small models gain nothing from more threads, and two suites on one machine lose.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart test check slow bench verl clean

quickstart: .venv/installed  ## set everything up, train GRPO and HAPO side by side, write runs/quickstart/report.html
	$(BIN)/tokencredit compare examples/quickstart.yaml --credit grpo hapo --seeds 2 --out runs/quickstart

test: .venv/developing  ## the everyday suite
	$(BIN)/python -m pytest -n auto -q

slow: .venv/developing  ## the tests that take longer
	$(BIN)/python -m pytest -n auto -q -m slow

check: .venv/developing  ## format, lint, types, imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/developing  ## the benchmarks of speed and memory; each prints ratios measured side by side
	for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) '.[trl]'
	touch $@

.venv/developing: .venv/installed
	$(INSTALL) '.[trl,dev]'
	touch $@

verl: .venv-verl/installed  ## the verl adapter on real Ray and TransferQueue, in an environment of its own
	.venv-verl/bin/python -m pytest -q -c tests/verl/pytest.ini tests/verl

.venv-verl/installed: pyproject.toml constraints-verl.txt
	test -x .venv-verl/bin/python || $(PYTHON) -m venv .venv-verl
	.venv-verl/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement constraints-verl.txt
	.venv-verl/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

clean:
	rm -rf .venv .venv-verl build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
