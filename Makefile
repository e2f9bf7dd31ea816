# Plain pip and python commands under short names; the README shows them too.
#
#   make demo      install what running needs into .venv and tell a tale
#   make test      install the test extra and run the suite
#   make check     ruff and mypy
#   make bench     two minutes of benchmarks against mlx-lm; the report goes to build/benchmarks
#   make format    let ruff rewrite the code
#   make clean     remove .venv and everything built
#
# Another interpreter:          make test PYTHON=python3.12
# Another MLX backend on Linux: make demo BACKEND=cuda12   (cpu, cuda12, cuda13)

VENV := .venv
BIN := $(VENV)/bin

ifeq ($(shell uname -s),Darwin)
BACKEND ?=
else
BACKEND ?= cpu
endif

RECENT := import sys; sys.exit(sys.version_info < (3, 10))
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c '$(RECENT)' 2>/dev/null && echo $$p && break; done)
endif

OUT ?= build/benchmarks

comma := ,
space := $(subst ,, )
extras = [$(subst $(space),$(comma),$(strip $(BACKEND) $1))]
installed = $(VENV)/installed-$(1)$(BACKEND)

.PHONY: demo test check bench format clean

demo: $(call installed,)
	$(BIN)/python -m mlx_openelm.generate --prompt "Once upon a time"

test: $(call installed,test-)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(call installed,dev-)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(call installed,bench-)
	$(BIN)/python -m mlx_openelm.benchmarks -o $(OUT)

format: $(call installed,dev-)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp per set of extras: pip runs again only when what it builds from has changed.
$(call installed,): EXTRAS = $(call extras,)
$(call installed,test-): EXTRAS = $(call extras,test)
$(call installed,bench-): EXTRAS = $(call extras,bench peers)
$(call installed,dev-): EXTRAS = $(call extras,dev)

$(call installed,) $(call installed,test-) $(call installed,dev-) $(call installed,bench-): pyproject.toml setup.py $(wildcard mlx_openelm/cpu/*) | $(BIN)/pip
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.$(EXTRAS)'
	@touch $@

$(BIN)/pip:
	@$(or $(PYTHON),false) -c '$(RECENT)' || { \
		echo "mlx-openelm needs Python 3.10 or newer, and $(or $(PYTHON),python3) is not that." >&2; \
		echo "Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
