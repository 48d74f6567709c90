# Needs GNU make and Python >= 3.11; everything else goes into .venv. `make` lists the targets.
PYTHON  ?= python3
WORKERS ?= 2

# for `make demo`
UTTERANCES := "set an alarm for 7 am tomorrow and remind me to call mom" \
              "how long is my commute to work if I leave at 8" \
              "play some jazz from the 60s" \
              "will it rain in Seattle this weekend"

# for `make bench`: sizes that benchmarks/agreement.py makes, "shipped", or folders; and what runs them
BENCH        ?= 15m 110m 1.2b shipped
BENCH_PYTHON ?= $(BIN)/python

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow bench check format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

# torch comes first and with its version: a bare `torch` would take the newest build, on Linux gigabytes of CUDA,
# even where a CPU build of the pinned version is at hand.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "layerskip needs Python 3.11 or newer; choose one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## parse a few utterances with the model of the package, plainly and with its first layers drafting
	@set -e; for utterance in $(UTTERANCES); do \
	    (set -x; $(BIN)/layerskip generate "$$utterance" --draft early-exit --dtype float32 --compare); \
	done
	$(BIN)/layerskip verify --dtype float32
	$(BIN)/layerskip inspect

test: $(STAMP) ## run the tests, without the slow ones
	$(BIN)/pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP) ## run every test, the slow ones too
	$(BIN)/pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "slow or not slow"

bench: $(STAMP) ## measure beside other engines (hours, on a quiet machine); BENCH="15m 110m" chooses the models
	$(BENCH_PYTHON) -m benchmarks.side_by_side $(BENCH)
	$(BENCH_PYTHON) -m benchmarks.rounds $(BENCH)
	$(BENCH_PYTHON) -m benchmarks.memory $(BENCH)
	$(BENCH_PYTHON) -m benchmarks.growth

check: $(STAMP) ## formatting, lint, types, import rules; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict src
	$(BIN)/lint-imports --no-logo

format: $(STAMP) ## rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and builds; .venv stays
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
