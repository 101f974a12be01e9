# make lab        JupyterLab on the notebooks (the first run sets everything up)
# make app        the playground as a web page, for a class
# make web        the page that draws in the browser alone, with nothing installed there: built, and served to this machine
# make check      style, types and the fast tests: after every edit, a minute and a half
# make test       everything, with every cell of every notebook run in short: ten to fifteen minutes
# make test-all   the same at full length, for a release or a change to a notebook: an hour
# make notebooks  run every notebook again and save its outputs in place
# make book       the site: notebooks as saved, results, model cards, reference, in build/book/html
# make hosts      rewrite the set-up cells and the links to Colab and Binder, from the address in pyproject.toml
# make assignments  the students' versions of the exercises, in build/coursework/release (see the README)
# make bench      the benchmarks, printed side by side
# make help       these lines
#
# PYTHON=...      the Python (3.11 or later) that makes the virtual environment
# VENV=...        where it goes (.venv)
# LAB_ARGS=...    more arguments for JupyterLab, for example LAB_ARGS="--ip=0.0.0.0" inside a container
# APP_ARGS=...    more arguments for Voilà, for example APP_ARGS="--Voila.ip=0.0.0.0" to let a class in
# VISITORS=...    how many may have the page open at once (as many as have room in the memory)
# COURSE=...      the course folder of nbgrader, with versions, submissions and grades (build/coursework)
# TEST_ARGS=...   more arguments for pytest, for example TEST_ARGS="-x --durations=20"
# WEB_PORT=...    where the page in the browser is served (8000)
# EDITS=...       the folder of edit files that the page offers and adds to (runs/app)
# Without an NVIDIA GPU on Linux, the CPU build of torch saves gigabytes:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make lab

SHELL := bash
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
LAB_ARGS ?=
APP_ARGS ?=
COURSE ?= build/coursework
EDITS ?= runs/app
VISITORS ?=
WEB_PORT ?= 8000
TEST_ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Tests and lectures start a hundred Pythons; without bytecode on the disk each would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help lab app web style check test test-all notebooks book hosts assignments bench clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

lab: $(VENV)/.coneslab
	@echo "Open the address below in a browser (Ctrl-C stops the server)."
	$(BIN)/jupyter lab --notebook-dir=notebooks --LabApp.default_url=/lab/tree/00_tour.ipynb \
		$(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS)

# Only this machine can reach the page unless APP_ARGS says otherwise, and only by an address or one of its names
# (notebooks/app/serve.py; --Page.hosts=NAME adds one). Visitors see no code and can run none: Voilà
# leaves out the sources, starts the kernels itself, and passes on only widget messages; what widgets may ask for is
# limited in Python (widgets.Limits). The coursework's JupyterLab extensions cannot load in the page and are kept out. A
# visitor's kernel takes 0.7 GB, and 1.2 GB once it has searched; it ends with the page, or after half an hour without a
# message. One thread each, or thirty would wait for each other.
app: $(VENV)/.coneslab-app
	@mkdir -p '$(EDITS)'
	CONESLAB_EDITS="$$(realpath '$(EDITS)')" OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python \
		notebooks/app/serve.py notebooks/app/playground.ipynb --Voila.ip=127.0.0.1 --VoilaConfiguration.strip_sources=True \
		--VoilaConfiguration.extension_denylist=@jupyter-notebook/lab-extension \
		--VoilaConfiguration.extension_denylist=@jupyter/nbgrader \
		--MappingKernelManager.cull_interval=60 --MappingKernelManager.cull_idle_timeout=1800 \
		--MappingKernelManager.cull_connected=True $(if $(VISITORS),--Kernels.limit=$(VISITORS)) $(APP_ARGS)

# The page works on any host of static files, so the plainest one serves it here.
web: $(VENV)/.coneslab-book
	$(BIN)/coneslab export-web build/playground --kept build/web --force --quiet
	@echo "Open http://127.0.0.1:$(WEB_PORT)/ in a browser (Ctrl-C stops the server)."
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory build/playground $(WEB_PORT)

style: $(VENV)/.coneslab-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy

# Two workers with one thread each: torch threads that share a core wait for each other, and tests of seconds take
# minutes. A file's tests stay together, for their shared fixtures. Files are begun in the order in which they are named,
# lectures first: each is one test of a minute, and begun last one of them would keep one worker waiting for the other.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

check: style
	$(PYTEST) -m 'not slow and not full' $(TEST_ARGS) tests

test: style
	$(BIN)/python tests/short_notebooks.py build/short
	$(PYTEST) -m 'not full' --nbmake --nbmake-timeout=300 --durations=10 $(TEST_ARGS) build/short tests

test-all: style
	$(PYTEST) --nbmake --nbmake-timeout=1800 -o faulthandler_timeout=1800 --durations=10 $(TEST_ARGS) notebooks tests

notebooks: $(VENV)/.coneslab-test
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.timeout=900 --ExecutePreprocessor.record_timing=False notebooks/*.ipynb
	$(BIN)/python docs/saved.py notebooks/*.ipynb

book: $(VENV)/.coneslab-book
	$(BIN)/python docs/build.py build/book
	@echo "Open build/book/html/index.html in a browser; it needs no server and no network."

hosts: $(VENV)/.coneslab-test
	$(BIN)/python docs/hosts.py

# nbgrader writes beside what it reads, so it gets a copy: no course files end up in the checkout. It also calls alembic
# by name.
assignments: $(VENV)/.coneslab-coursework
	@mkdir -p '$(COURSE)/source'
	@course="$$(cd '$(COURSE)' && pwd)" && cd coursework && for shipped in *.py source/*; do \
		kept="$$course/$$shipped"; \
		if [ ! -e "$$kept" ]; then cp -R "$$shipped" "$$kept" || exit 1; \
		elif ! diff -qr "$$shipped" "$$kept" > /dev/null; then \
			echo "kept, with what was changed in it (delete it for the shipped one): $$kept"; fi; done
	@export PATH="$$(realpath '$(BIN)'):$$PATH" && cd '$(COURSE)' && for assignment in source/*/; do \
		nbgrader generate_assignment --force "$$(basename "$$assignment")" || exit 1; done
	@echo "Hand out the notebooks in $(COURSE)/release."

bench: $(VENV)/.coneslab-test
	@for benchmark in tests/benchmarks/*.py; do $(BIN)/python $$benchmark || exit 1; done

clean:
	rm -rf $(VENV) build/book

# The stamps let a second `make` start at once; they are out of date once the files that define the environment change.
$(VENV)/.coneslab: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[lab]'
	@touch $@

$(VENV)/.coneslab-app: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[lab,app]'
	@touch $(VENV)/.coneslab $@

$(VENV)/.coneslab-test: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	@touch $(VENV)/.coneslab $(VENV)/.coneslab-app $(VENV)/.coneslab-book $(VENV)/.coneslab-coursework $@

$(VENV)/.coneslab-book: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[lab,book,web]'
	@touch $(VENV)/.coneslab $@

$(VENV)/.coneslab-coursework: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[lab,coursework]'
	@touch $(VENV)/.coneslab $@

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "coneslab needs Python 3.11 or later: install it, or name it with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
