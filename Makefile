PYTHON ?= python3
SEED ?= 0
WORKERS ?= 2
BIN := .venv/bin

.PHONY: install quick demo demo-real study study-smoke lint test test-slow test-peers bench

install: .venv/installed

# The constraints are the exact versions that we tested; torch comes first, so that nothing asks for
# a newer one.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch .venv/installed

# The first minute: a reward that climbs while you watch. Writes quick.png, results.md and
# results.json to OUT.
quick: OUT ?= runs/quick
quick: install
	$(BIN)/python -m minigrpo.quick --output_dir $(OUT) --seed $(SEED)

# From nothing to a trained model and its pictures in OUT: phantom films, SFT, GRPO for both tasks,
# evaluation. If stopped, run it again to continue; FRESH=1 removes what is there and starts over.
FRESH_FLAG := $(if $(filter-out 0,$(FRESH)),--fresh)
demo demo-real: OUT ?= runs/demo
demo: install
	$(BIN)/python -m minigrpo.demo --output_dir $(OUT) --seed $(SEED) $(FRESH_FLAG)

# The phantom-trained model on your films: DATA is a folder with train.jsonl and test.jsonl.
demo-real: install
	$(BIN)/python -m minigrpo.demo --output_dir $(OUT)-real --seed $(SEED) --data "$(DATA)" \
		--model $(OUT)/sft/final $(FRESH_FLAG)

# The study of docs/study.md: an hour and a half; if stopped, run it again to continue. From
# cache it renders in seconds.
study: install
	$(BIN)/python -m minigrpo.study

study-smoke: install
	$(BIN)/python -m minigrpo.study --smoke --output_dir runs/study-smoke \
		--json runs/study-smoke/study.json --page ""

# WORKERS processes of one thread each take whole files in turn, in the order of tests/conftest.py:
# faster than one process with as many threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile \
	--no-loadscope-reorder

lint: install
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

test: install
	$(PYTEST) -m "not slow"

test-slow: install
	$(PYTEST)

# Compares our loss with TRL's own code and CIDEr-D with pycocoevalcap's. They go into the same
# .venv; the constraints keep torch and transformers at their versions.
test-peers: install
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,peers]'
	$(BIN)/python -m pytest -q -rP -m peers

# Compares with transformers and TRL, into benchmarks/results and the tables of docs/performance.md.
# On a busy machine: OMP_NUM_THREADS=1.
bench: install
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,peers]'
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.logprob
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.lora
	$(BIN)/python -m benchmarks.node
	$(BIN)/python -m benchmarks.plan
	$(BIN)/python -m benchmarks.table
