# Plain pip and python commands under short names; the README shows them too.
#
#   make demo        install what running needs into .venv and print a tale
#   make test        install the test extra and run the suite
#   make check       ruff and mypy
#   make check-mac   what Linux can show of a Mac, the suite under a GPU's policy included
#   make bench       two minutes of benchmarks against mlx-lm; the report goes to build/benchmarks
#   make format      let ruff rewrite the code
#   make clean       remove .venv and everything built
#
# Another interpreter:          make test PYTHON=python3.12
# Another MLX backend on Linux: make demo BACKEND=cuda12   (cpu, cuda12, cuda13)
#
# GNU make 3.81, as macOS brings it, has to run this: tests/mac/test_makefile.py.

VENV := .venv
BIN := $(VENV)/bin
SYSTEM := $(shell uname -s)

ifneq ($(SYSTEM),Darwin)
BACKEND ?= cpu
endif

# The first that can be used: Apple's python3 is too old, and others may be for Intel.
PYTHONS := python3 python3.14 python3.13 python3.12 python3.11 python3.10
ifndef PYTHON
PYTHON := $(shell for p in $(PYTHONS); do \
	$$p scripts/supported.py > /dev/null 2>&1 && echo $$p && break; done)
endif

OUT ?= build/benchmarks

# Python ignores the .pth file of an editable install where macOS has hidden it; so the package is
# also named here, for subprocesses in other folders too.
RUN := PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(BIN)/python

comma := ,
space := $(subst ,, )
list = $(subst $(space),$(comma),$(strip $1))
extras = $(if $(strip $(BACKEND) $1),[$(call list,$(BACKEND) $1)])
installed = $(VENV)/installed-$(1)$(BACKEND)

.PHONY: demo test check check-mac bench format clean

demo: $(call installed,)
	$(RUN) -m mlx_openelm.generate --prompt "Once upon a time"

test: $(call installed,test-)
	$(RUN) -m pytest $(PYTEST_ARGS)

check: $(call installed,dev-)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-mac: $(call installed,dev-)
	$(BIN)/mypy --platform darwin
	$(RUN) -m pytest tests/mac
	MLX_OPENELM_POLICY=gpu PYTHONPATH="$(CURDIR)/tests/mac/stand_in:$(CURDIR)" $(BIN)/python -m pytest $(PYTEST_ARGS)

bench: $(call installed,bench-)
	$(RUN) -m mlx_openelm.benchmarks -o $(OUT)

format: $(call installed,dev-)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f mlx_openelm/backends/cpu/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp per set of extras: pip runs again only when what it builds from has changed.
$(call installed,): EXTRAS = $(call extras,)
$(call installed,test-): EXTRAS = $(call extras,test)
$(call installed,bench-): EXTRAS = $(call extras,bench peers)
$(call installed,dev-): EXTRAS = $(call extras,dev)

$(call installed,) $(call installed,test-) $(call installed,dev-) $(call installed,bench-): pyproject.toml setup.py $(wildcard mlx_openelm/backends/cpu/src/*) | $(BIN)/pip
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.$(EXTRAS)'
ifeq ($(SYSTEM),Darwin)
	@chflags -R nohidden $(VENV)
endif
	@touch $@

$(BIN)/pip:
	@$(or $(PYTHON),python3) scripts/supported.py || { \
		echo "Or name another: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
