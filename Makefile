PYTHON ?= python3
BIN := .venv/bin
# Small models gain nothing from more threads, and two suites on one machine lose.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart test check slow bench gpu verl matrix clean

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

gpu: .venv/developing  ## everything that a GPU should say: tables and tests, in 450 s; `benchmarks/gpu.py --help`
	$(BIN)/python benchmarks/gpu.py --out gpu-results

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

# Every seam of a host by itself, then, with verl, the adapter on its real data store. One failure hides no other.
CONTRACT = -m pytest -q -c tests/contracts/pytest.ini tests/contracts
STORE = -m pytest -q -c tests/verl/pytest.ini tests/verl
TRL_OLDEST = 1.5.0
VERL_OLDEST = 0.9.0

matrix: .venv/developing .venv-trl-oldest/installed .venv-verl-oldest/installed  ## the contracts of every seam with the oldest and the newest TRL and verl
	@code=0; \
	echo "== newest TRL"; $(BIN)/python $(CONTRACT)/test_trl_contract.py || code=1; \
	echo "== TRL $(TRL_OLDEST)"; .venv-trl-oldest/bin/python $(CONTRACT)/test_trl_contract.py || code=1; \
	echo "== newest verl"; .venv-verl/bin/python $(CONTRACT)/test_verl_contract.py && .venv-verl/bin/python $(STORE) || code=1; \
	echo "== verl $(VERL_OLDEST)"; export PYTHONPATH=$(CURDIR)/.venv-verl-oldest/packages; \
	.venv-verl/bin/python $(CONTRACT)/test_verl_contract.py && .venv-verl/bin/python $(STORE) || code=1; \
	exit $$code

.venv-trl-oldest/installed: pyproject.toml constraints.txt
	test -x .venv-trl-oldest/bin/python || $(PYTHON) -m venv .venv-trl-oldest
	sed 's/^trl==.*/trl==$(TRL_OLDEST)/' constraints.txt > .venv-trl-oldest/constraints.txt
	# requests: TRL imports it and declares it from 1.10 on
	.venv-trl-oldest/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint .venv-trl-oldest/constraints.txt --editable '.[trl]' requests pytest beartype
	touch $@

# The packages of .venv-verl with another verl in front: two gigabytes less than an environment of its own.
.venv-verl-oldest/installed: .venv-verl/installed
	rm -rf .venv-verl-oldest
	.venv-verl/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--target .venv-verl-oldest/packages verl==$(VERL_OLDEST)
	touch $@

clean:
	rm -rf .venv .venv-verl .venv-trl-oldest .venv-verl-oldest build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
