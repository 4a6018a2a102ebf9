# make demo   train a speech LLM on real models and open its report (7 to 13 minutes on 2 cores, install included)
# make test   all tests
# make lint   style, format and types
# PYTHON=python3.12 make ... chooses the interpreter of the environment.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One process per core, one thread each: more threads than cores make everything slower.
WORKERS ?= 2

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/speech-llm run recipes/quickstart.yaml

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Installed again only when pyproject.toml changes.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed, and $(PYTHON) is %d.%d; choose another: make $(MAKECMDGOALS) PYTHON=python3.12" % sys.version_info[:2])'
	@test -x $(BIN)/python || { echo "Making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing (once; a minute or two)"
	@$(BIN)/python .ci/install.py $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
