# `make demo` and `make test` work on a fresh machine: each makes .venv if there is none. PY=python3.12 make test picks an interpreter.
PY ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM ?= false
export OMP_NUM_THREADS ?= 1

.PHONY: demo demo-real test test-oldest lint sizes slow-tests drill mutants bench gpu clean

# the whole recipe on an embedded tiny model: minutes on two cores, no network
demo: .venv/ready
	$(BIN)/python -m launch.demo

# the same on a real chat model and real data, some hours on two cores: make demo-real MODEL=dir CONVERSATIONS=gsm8k_train.jsonl PAIRS=pairs.jsonl
MODEL ?= HuggingFaceTB/SmolLM2-135M-Instruct
CONVERSATIONS ?= openai/gsm8k:main
PAIRS ?= allenai/llama-3.1-tulu-3-8b-preference-mixture
demo-real: .venv/ready
	$(BIN)/python -m launch.demo --output_dir output/demo-real --model_name_or_path $(MODEL) --conversations $(CONVERSATIONS) --pairs $(PAIRS)

test: .venv/ready lint
	$(BIN)/python -m pytest

# the oldest stack that pyproject.toml allows, without the optional packages and then with them; a CUDA build of torch, which needs no GPU
test-oldest: .venv-oldest/ready
	PYTHONPATH= .venv-oldest/bin/python -m pytest
	PYTHONPATH=.venv-oldest/optional .venv-oldest/bin/python -m pytest

# one linter, one formatter, one type checker
lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy losses verifiers engine rollout launch

# how large everything is
sizes: .venv/ready
	$(BIN)/python -m tests.sizes

# the tests that take minutes: real data, whole epochs, torchrun
slow-tests: .venv/ready
	$(BIN)/python -m pytest -m drill

# faults planted in real runs, and what held, as a table; ten minutes on two cores
drill: .venv/ready
	$(BIN)/python -m benchmarks.faultdrill

# known mistakes, planted one at a time in a copy of the tree: each must be caught by its tests
mutants: .venv/ready
	$(BIN)/python -m tests.mutants

bench: .venv/bench
	$(BIN)/python -m benchmarks.loss
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.against_trl dpo
	$(BIN)/python -m benchmarks.against_trl grpo

# on a CUDA machine, with the interpreter that has torch, transformers, triton and pytest: nothing is installed
gpu:
	$(PY) -m benchmarks.gpu

.venv/ready: pyproject.toml
	$(PY) -m venv .venv
	$(BIN)/pip install --quiet 'torch>=2.11,<2.14'
	$(BIN)/pip install --quiet -e '.[test,report]'
	touch $@

.venv-oldest/ready: pyproject.toml
	$(PY) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet torch==2.11.0 triton==3.6.0 transformers==5.17.0 'safetensors==0.8.*' 'numpy<2.4' tqdm pytest hypothesis langdetect nltk peft
	.venv-oldest/bin/pip install --quiet --no-deps --target .venv-oldest/optional datasets pyarrow bitsandbytes dill multiprocess xxhash pandas python-dateutil six
	touch $@

.venv/bench: .venv/ready
	$(BIN)/pip install --quiet -e '.[bench]'
	touch $@

clean:
	rm -rf .venv .venv-oldest output
