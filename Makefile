# `make quickstart` and `make test` only need Python 3.11 or newer.
# For another Python use `make test PYTHON=python3.12`; it gets its own virtual environment.
PYTHON ?= python3
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
PEERS := $(VENV)-peers
GPIO := $(VENV)-gpio
COMPILER := $(VENV)-compiler
WORKDIR ?= runs/quickstart
DATA ?= ../shared/data

# Keep XLA's large temporary arrays in mapped huge pages (Linux, glibc). Steps on a CPU
# then take up to a quarter less processor time.
MALLOC := glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0
MALLOC := $(MALLOC):glibc.malloc.trim_threshold=8589934592:glibc.malloc.top_pad=268435456

.PHONY: quickstart notebooks study compiler bench-attention test test-core test-faults
.PHONY: test-peers docs lint format clean

quickstart: $(VENV)/installed
	GLIBC_TUNABLES=$(MALLOC) \
		$(BIN)/python -m xsmae.main --config=configs/quickstart.py --workdir=$(WORKDIR)

# Run the notebooks and store their outputs: about twenty minutes on two cores.
notebooks: $(VENV)/installed-test
	GLIBC_TUNABLES=$(MALLOC) $(BIN)/python -m tests.support.execute_notebooks

# Run the rest of the study in docs/study.md; DATA has the zips and splits.
study: $(VENV)/installed
	GLIBC_TUNABLES=$(MALLOC) $(BIN)/python -m studies.head_to_head --data=$(DATA)
	$(BIN)/python -m studies.report

# The compilers for `xsmae plan`: XLA for NVIDIA GPUs and TPUs in jax's own version,
# without runtime libraries. Linux only. Then run .venv-compiler/bin/xsmae plan ...
compiler: $(COMPILER)/installed

# The memory of attention on an H200, compiled on any Linux machine:
# benchmarks/RESULTS.md. Half a minute on two idle cores, after the installation.
bench-attention: $(COMPILER)/installed
	$(COMPILER)/bin/python -m benchmarks.attention --compile_for=h200

test: lint
	$(BIN)/python -m pytest -n logical --dist worksteal --durations=10 \
		--cov=xsmae --cov-report=term --cov-fail-under=90

# The tests that depend most on the versions of jax and flax, compiled as for users.
test-core: $(VENV)/installed-test
	XLA_FLAGS= $(BIN)/python -m pytest -n logical --dist worksteal \
		tests/test_models.py tests/test_methods.py \
		tests/test_parity.py tests/test_losses.py tests/test_attention.py \
		tests/test_train_state.py tests/test_views.py tests/test_pipeline.py \
		tests/test_sources.py tests/test_images.py tests/test_fmow.py \
		tests/test_tfds.py tests/test_synthetic.py

# The part of docs/reliability.md that `make test` leaves out: 40 kills in short runs,
# hosts that hang, 1,000 cases for each fuzzed reader.
test-faults: $(VENV)/installed-test
	$(BIN)/python -m pytest -m "slow or fuzz" -n logical --maxschedchunk=1 \
		--durations=10 --hypothesis-profile=faults

# Compare our networks and exports with Hugging Face transformers and timm, on PyTorch.
# Check the files of scenes with the validators of their formats.
test-peers: $(PEERS)/installed $(GPIO)/installed
	XLA_FLAGS= HF_HUB_OFFLINE=1 GPIO=$(CURDIR)/$(GPIO)/bin/gpio \
		$(PEERS)/bin/python -m pytest --durations=5 tests/peers

# The site, offline; a warning is an error.
docs: $(VENV)/installed-docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --nitpicky \
		--builder html docs build/docs
	@echo $(CURDIR)/build/docs/index.html

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python $(PEERS)/bin/python $(GPIO)/bin/python $(COMPILER)/bin/python:
	export PATH && python=$$(sh .ci/find_python $(PYTHON)) && $$python -m venv $(@D:/bin=)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[test,geo,search]'
	touch $@ $(VENV)/installed

$(VENV)/installed-docs: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[docs]'
	touch $@ $(VENV)/installed

# timm also requires torchvision, but its wheels only fit torch's builds for CUDA.
# tests/peers/test_timm.py explains why it is not needed.
$(PEERS)/installed: $(PEERS)/bin/python pyproject.toml constraints.txt \
		constraints-peers.txt
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --constraint constraints-peers.txt \
		--editable '.[test,geo]' torch transformers jsonschema pystac-core rio-cogeo
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints-peers.txt --no-deps timm
	touch $@

# gpio needs an older duckdb and python-dateutil than xsmae is tested with. Its DuckDB
# finds the extension `spatial` in the home folder, here that of the environment.
$(GPIO)/installed: $(GPIO)/bin/python requirements-gpio.txt
	$(GPIO)/bin/python -m pip install --quiet --disable-pip-version-check \
		--no-deps --requirement requirements-gpio.txt
	HOME=$(CURDIR)/$(GPIO) $(GPIO)/bin/python -c \
		"import duckdb_extensions; duckdb_extensions.import_extension('spatial')"
	touch $@

$(COMPILER)/installed: $(COMPILER)/bin/python pyproject.toml constraints.txt
	$(COMPILER)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[compiler]'
	touch $@

clean:
	rm -rf .venv .venv-* runs .pytest_cache .ruff_cache .hypothesis .coverage
