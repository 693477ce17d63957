# `make quickstart` and `make test` need a Python 3.11 or newer and nothing else.
# Another Python: `make test PYTHON=python3.12`; it gets a virtual environment of its own.
PYTHON ?= python3
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
WORKDIR ?= runs/quickstart

# XLA's large temporary arrays in huge pages that stay mapped (Linux, glibc): steps on a
# CPU take about a quarter less processor time.
MALLOC := glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0
MALLOC := $(MALLOC):glibc.malloc.trim_threshold=8589934592:glibc.malloc.top_pad=268435456

.PHONY: quickstart test test-core lint format clean

quickstart: $(VENV)/installed
	GLIBC_TUNABLES=$(MALLOC) \
		$(BIN)/python -m xsmae.main --config=configs/quickstart.py --workdir=$(WORKDIR)

test: lint
	$(BIN)/python -m pytest --durations=10 --cov=xsmae --cov-report=term --cov-fail-under=90

# What depends most on the versions of jax and flax.
test-core: $(VENV)/installed-test
	$(BIN)/python -m pytest tests/test_models.py tests/test_losses.py \
		tests/test_train_state.py tests/test_multiscale.py tests/test_pipeline.py \
		tests/test_sources.py tests/test_images.py tests/test_fmow.py \
		tests/test_tfds.py tests/test_synthetic.py

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	python=$$(sh .ci/find_python $(PYTHON)) && $$python -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[test]'
	touch $@ $(VENV)/installed

clean:
	rm -rf .venv .venv-* runs .pytest_cache .ruff_cache .hypothesis .coverage
