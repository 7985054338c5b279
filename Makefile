# make demo   one small model, trained on this machine: no Slurm, no container, about 5 minutes
# make test   everything that can be tested here; the Slurm and Apptainer part needs `make hpc-up` (root, Debian) first

PYTHON ?= python3
VENV ?= .venv
INSTALLED = $(VENV)/.installed

.PHONY: demo test test-slurm test-computing lint golden planner-report sites-report bench-cpu bench-gpu measure-memory hpc-up hpc-down test-source-stack test-matrix test-image-cuda clean

demo: $(INSTALLED)
	$(VENV)/bin/ftlaunch submit presets/tiny.yaml --new --follow

test: lint  # two halves beside each other: one computes, the other mostly waits for Slurm and is printed when it is over
	$(MAKE) --no-print-directory --jobs=2 --keep-going --output-sync=target test-computing test-slurm

test-slurm: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m slurm

test-computing: $(INSTALLED)
	+nice $(VENV)/bin/python -m pytest -m "not slurm"

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

golden: $(INSTALLED)  ## write the golden files anew; read the diff before committing it
	$(VENV)/bin/python -m tests.make_golden
	$(VENV)/bin/python -m tests.make_golden_sites
	-FTLAUNCH_WRITE_GOLDEN=1 $(VENV)/bin/python -m pytest -q tests/test_render.py
	$(VENV)/bin/python -m tests.test_show
	$(VENV)/bin/python -m tests.test_preset_broken
	$(VENV)/bin/python -m tests.test_site_discover
	$(VENV)/bin/ftlaunch schema > presets/preset.schema.json

planner-report: $(INSTALLED)  ## docs/planner.md: predicted against measured and published
	$(VENV)/bin/python -m benchmarks.planner_report

sites-report: $(INSTALLED)  ## docs/sites.md: what each shipped site is, from its file
	$(VENV)/bin/python -m benchmarks.sites_report

bench-cpu: $(INSTALLED)  ## docs/benchmarks/cpu.md and checkpoints.md, on this machine's CPU: 20 minutes to an hour
	$(VENV)/bin/python -m benchmarks.checkpoint_stall --page
	$(VENV)/bin/python -m benchmarks.cpu_page

bench-gpu: $(INSTALLED)  ## docs/benchmarks: all GPU tables, on one H200
	$(VENV)/bin/python -m benchmarks.gpu_tables

measure-memory: $(INSTALLED)  ## peaks of a training step at full size under fake tensors: about an hour on one core
	$(VENV)/bin/python -m benchmarks.memory_fake

hpc-up:
	tests/hpc/up

hpc-down:
	tests/hpc/down

test-source-stack:  ## the training tests on the source's pins: torch 2.3.0, transformers 4.41.1 (5 GB, about 5 minutes to install)
	$(PYTHON) -m venv $(VENV)-source
	$(VENV)-source/bin/pip install -q -r tests/train/source-stack.txt
	PYTHONPATH=. $(VENV)-source/bin/python -m pytest -W default tests/train -m source_stack

test-matrix: $(INSTALLED)  ## every engine on 1, 2 and 4 ranks resumed on every other: docs/benchmarks/elastic-matrix.md, about 10 CPU minutes
	PYTHONPATH=. $(VENV)/bin/python -m pytest -m matrix tests/train/test_train_elastic_matrix.py

test-image-cuda: $(INSTALLED)  ## build torch2.3-cu121 for real (3.2 GB, about 12 minutes); needs `make hpc-up`
	$(VENV)/bin/python -m pytest -m image_cuda

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make: $(PYTHON) is older than 3.11; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[train,report,tracking,dev]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-source build dist
