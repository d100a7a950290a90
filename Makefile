# make demo   installs, trains a small agent on a real environment, writes and names report.html
# make test   installs what the tests need, runs the fast ones
PYTHON ?= python3
BIN := .venv/bin
# Of 17 000 modules few are imported: those are compiled then.
PIP := $(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable

.PHONY: demo test clean

$(BIN)/pip:
	$(PYTHON) -m venv .venv

.venv/.core: pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP) .
	touch $@

.venv/.tests: pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP) '.[dev,avalanche,offline]'
	touch .venv/.core $@

demo: .venv/.core
	rm -rf results/demo
	$(BIN)/neoteny train sac --env gym/Pendulum-v1 --preset small --steps 6000 --seeds 2 --name demo
	$(BIN)/neoteny report results/demo

test: .venv/.tests
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

clean:
	rm -rf .venv results/demo
