# make demo   installs, trains a small agent on a real environment, writes and names report.html
# make test   runs the fast tests
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
EXTRAS := dev,avalanche

.PHONY: demo test clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $(STAMP)

demo: $(STAMP)
	rm -rf results/demo
	$(BIN)/neoteny train sac --env gym/Pendulum-v1 --preset small --steps 6000 --seeds 2 --name demo
	$(BIN)/neoteny report results/demo

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2

clean:
	rm -rf .venv results/demo
