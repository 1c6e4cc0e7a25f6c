# make run                 builds the environment and runs the main job on the checkpoint that ships
# make run ARGS="..."      the same with settings, e.g. ARGS="checkpoint=image checkpoint.path=/models/Lance_3B"
# make test                builds the environment and runs the tests
# make venv                only builds the environment, in .venv

VENV ?= .venv
ARGS ?=
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: run test venv

run: venv
	$(VENV)/bin/python -m flows.full_run $(ARGS)

test: venv
	$(VENV)/bin/python -m pytest $(ARGS)

venv: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(if $(PYTHON),,$(error Python 3.11 or newer is needed; give its path as PYTHON=...))
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install torch==2.13.0
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[test]'
	touch $(VENV)/installed
