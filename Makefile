# Everything here needs only make and a Python of 3.11 or later: `make test PYTHON=python3.12` chooses another.
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
BUILD := .build/$(VERSION)
BIN := $(BUILD)/venv/bin
# The folders too: a module that is removed leaves nothing newer behind.
SOURCES := pyproject.toml README.md LICENSE prefork workers \
    $(wildcard prefork/*.py prefork/*/*.py workers/*.py workers/*/*.py)
PIP := -m pip install --quiet --disable-pip-version-check
# What is under test is the installed wheel: nothing may bring the checkout onto the path.
unexport PYTHONPATH
unexport PYTHONHOME
TOO_OLD := prefork needs Python 3.11 or later; see PYTHON in the Makefile
NEW_ENOUGH = $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("$(TOO_OLD)")'

.PHONY: help serve test test-all test-next lint t pytest docs
.PHONY: repeat stress soak sweep bench bench-workers bench-web clean
.DELETE_ON_ERROR:

help:
	@echo 'make serve     install into .venv and run examples/primes.py'
	@echo 'make test      lint, build sdist and wheel, install the wheel, test it'
	@echo 'make test-all  the same on every Python of 3.11 to 3.15 of this machine'
	@echo 'make test-next the same on 3.14 and 3.15 in a chroot of Debian sid, as root; NEXT="3.15" ARGS="-k stop -x"'
	@echo 'make lint      ruff and mypy'
	@echo 'make t         T=tests/x/test_y.py K=name: some tests against the checkout, in seconds, without a wheel'
	@echo 'make pytest    the tests alone; ARGS="-k stop -x" goes to pytest'
	@echo 'make docs      the documentation, as web pages in .build/docs'
	@echo 'make repeat    T=tests/test_x.py N=50: one file N times, until it fails'
	@echo 'make stress    the same while every core is kept busy'
	@echo 'make soak      the long tests'
	@echo 'make sweep     every system call of the master fails, in every way; ARGS="--call wait4 --phase serve", --help'
	@echo 'make bench     the measurements, as one table; ARGS="--quick"'
	@echo 'make bench-workers  one program on each class of workers, as one table'
	@echo 'make bench-web  HTTP servers for Python beside the classes wsgi and asgi, as one table'
	@echo 'make clean     remove what make made'

# -- running it

.venv/installed: pyproject.toml
	@$(NEW_ENOUGH)
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) --editable .
	@touch $@

serve: .venv/installed
	@printf '%s\n' 'Starting examples/primes.py, a pool on all cores. Talk to it from another terminal:' \
	    "    $(PYTHON) -c 'import socket; c = socket.create_connection((\"127.0.0.1\", 9999)); "\
	"c.sendall(b\"100000\\n\"); print(c.makefile().readline())'" \
	    'Ctrl-C stops it. TERM drains and stops, HUP reloads, TTIN and TTOU resize (its log says the pid).'
	@exec .venv/bin/python examples/primes.py $(ARGS)

# -- testing it

$(BUILD)/tools: pyproject.toml
	@$(NEW_ENOUGH)
	rm -rf $(BUILD)/venv
	$(PYTHON) -m venv $(BUILD)/venv
	$(BIN)/python $(PIP) '.[test]'
	@touch $@

# `build` makes the sdist, and the wheel from the unpacked sdist.
$(BUILD)/wheel: $(BUILD)/tools $(SOURCES)
	rm -rf $(BUILD)/dist
	$(BIN)/python -m build --no-isolation --outdir $(BUILD)/dist > $(BUILD)/build.log 2>&1 || \
	    { cat $(BUILD)/build.log; exit 1; }
	$(BIN)/python $(PIP) --no-deps --force-reinstall $(BUILD)/dist/*.whl
	@touch $@

# Tests mostly wait for processes and deadlines: two at a time take little more than half of the time of one after
# another, which is JOBS=0.
JOBS ?= 2
test: lint $(BUILD)/wheel
	$(BIN)/pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: $(BUILD)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --python-executable $(BIN)/python

# Against the checkout: what only a wheel can show (tests/project/test_package.py) knows it by this variable.
t: $(BUILD)/tools
	env PYTHONPATH='$(CURDIR)' PREFORK_TEST_CHECKOUT=1 $(BIN)/pytest -p no:cacheprovider $(T) $(if $(K),-k '$(K)') $(ARGS)

# The `pytest` command, never `python -m pytest`, which would put this folder on sys.path: tests/project/test_package.py
# asserts it.
pytest: $(BUILD)/wheel
	$(BIN)/pytest $(ARGS)

soak: $(BUILD)/wheel
	$(BIN)/pytest -m soak $(ARGS)

# 15 minutes, and strace. Started beside the package under test, not in its folder: see `pytest`.
sweep: $(BUILD)/wheel
	cd tests && ../$(BIN)/python -m sweep $(ARGS)

T ?= tests
N ?= 50
repeat: $(BUILD)/wheel
	@i=0; while [ $$i -lt $(N) ]; do i=$$((i + 1)); echo "$$i of $(N)"; $(BIN)/pytest -x $(T) $(ARGS) || exit 1; done

stress: $(BUILD)/wheel
	@busy=; trap 'kill $$busy' EXIT; trap 'exit 1' HUP INT TERM; \
	for core in $$($(PYTHON) -c 'import os; print(*range(os.cpu_count()))'); do \
	    sh -c 'while :; do :; done' & busy="$$busy $$!"; done; \
	$(MAKE) --no-print-directory repeat T='$(T)' N=$(N) ARGS='$(ARGS)'

# A pyenv shim may stand on the path for a version that is not active: what counts is that it runs, and is that version.
test-all:
	@tested=; failed=; \
	for version in 3.11 3.12 3.13 3.14 3.15; do \
	    for python in python$$version "$${PYENV_ROOT:-$$(pyenv root 2>/dev/null)}"/versions/$$version.*/bin/python; do \
	        is=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); \
	        [ "$$is" = $$version ] || continue; \
	        echo "== Python $$version: $$python"; \
	        tested="$$tested $$version"; \
	        $(MAKE) --no-print-directory test PYTHON="$$python" || failed="$$failed $$version"; \
	        break; \
	    done; \
	done; \
	echo "tested with:$${tested:- no Python of 3.11 to 3.15}; failed:$${failed:- none}"; \
	[ -n "$$tested" ] && [ -z "$$failed" ]

# Pythons that no stable distribution has yet. NEXT, ARGS and JOBS reach the script as variables of the environment.
test-next:
	@.ci/next

# -- documenting it

# Sphinx stays out of the environment of the tests. Every warning is an error, a link that leads nowhere among them.
$(BUILD)/docs-tools: pyproject.toml
	rm -rf $(BUILD)/docs-venv
	$(PYTHON) -m venv $(BUILD)/docs-venv
	$(BUILD)/docs-venv/bin/python $(PIP) --editable '.[docs,wsgi,asgi]'
	@touch $@

docs: $(BUILD)/docs-tools
	rm -rf .build/docs
	$(BUILD)/docs-venv/bin/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env --jobs auto docs .build/docs
	@echo 'open .build/docs/index.html'

# -- measuring it

bench: $(BUILD)/wheel
	$(BIN)/python benchmarks/run.py $(ARGS)

bench-workers: $(BUILD)/wheel
	$(BIN)/python benchmarks/workers.py $(ARGS)

# Other people's servers, in an environment of their own: uWSGI is compiled, and nothing else needs any of them.
bench-web: $(BUILD)/wheel
	test -x $(BUILD)/rivals/bin/python || $(PYTHON) -m venv $(BUILD)/rivals
	$(BUILD)/rivals/bin/python $(PIP) --force-reinstall --no-deps $(BUILD)/dist/*.whl
	$(BUILD)/rivals/bin/python $(PIP) 'prefork[wsgi,asgi,uvloop]' granian gunicorn uwsgi uvicorn-worker
	$(BUILD)/rivals/bin/python benchmarks/web.py $(ARGS)

# The chroot of `make test-next` first. Its mounts are in a namespace of their own, but others may have been made by
# hand, and --one-file-system follows a bind mount from the same disk: so the list of mounts is read.
clean:
	@! grep -sF ' $(CURDIR)/.build/' /proc/self/mountinfo || \
	    { echo 'clean: the above is mounted in .build; unmount it first' >&2; exit 1; }
	@! [ -e .build/sid.lock ] || flock --nonblock .build/sid.lock true || \
	    { echo 'clean: `make test-next` runs in .build/sid; let it end first' >&2; exit 1; }
	@for root in .build/sid .build/sid.new; do ! [ -e $$root ] || rm -rf --one-file-system $$root || exit 1; done
	rm -rf .build .venv dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
