# On a fresh Debian 12 machine as root, `make demo` and `make test` need only make, git and python3.
# What they have to download comes from the machine's own apt and pip configuration.

PYTHON ?= /usr/bin/python3
VENV = .venv
# Further arguments for pytest, as in: make test-unit ARGS='-k manifest -n 2'
ARGS =

# The tests' sys.path must not name this directory (the source tree would hide the installed wheel):
# the pytest program, never `python -m pytest`.
PYTEST = $(VENV)/bin/pytest $(ARGS)
# A tier that has no tests (status 5) is no failure of the tier.
PYTEST_MAYBE = sh -c '$(VENV)/bin/pytest "$$@" || [ $$? -eq 5 ]' pytest $(ARGS)

# Directories are in the list so that a removed file counts as a change.
WHEEL_SOURCES = $(shell find stager -name __pycache__ -prune -o -print) \
	pyproject.toml $(wildcard README.md LICENSE)

.PHONY: help setup tools lint test test-unit test-hook test-root test-environments test-slurm \
	test-pbs test-push test-slurm-24.11 \
	bench bench-bystander bench-extract bench-mounts bench-pack bench-push bench-quick bench-record bench-starts \
	performance \
	comparison demo cluster cluster-down build clean FORCE
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@echo 'make setup         what is missing on this machine, .venv with the tools and the built wheel'
	@echo 'make demo          the tour: pack, stage, run'
	@echo 'make test          lint and every tier of tests'
	@echo 'make lint          ruff, mypy, import-linter, shellcheck'
	@echo 'make test-unit     Python and a temporary directory; test-{hook,root,environments,push,slurm,pbs}'
	@echo 'make bench         starts of jobs by every strategy, 22 minutes; bench-quick: one; bench-record: all of'
	@echo '                   what docs/performance shows, eleven hours; then make performance'
	@echo 'make bench-bystander  what somebody else waits for while a job starts'
	@echo 'make performance   docs/performance.md and its plots, from the recorded runs'
	@echo 'make bench-pack    pack against its compressor, its memory, and a slow file system'
	@echo 'make bench-starts  what a start costs; staging against reading and writing'
	@echo 'make bench-push    push to eight nodes over slow links, flat and as a tree'
	@echo 'make bench-extract extraction against the plain tools; ENV=/path for one of yours'
	@echo 'make bench-mounts  imports from mounted images against a local directory; as root for all'
	@echo 'make cluster       a Slurm cluster on this machine; make cluster-down ends it'
	@echo 'make build         sdist and wheel in dist/'
	@echo 'make clean         removes everything made here'

setup: .build/wheel.stamp
tools: .build/tools.stamp

# A moved or copied checkout, or another PYTHON, needs a new .venv.
ifneq ($(shell cat $(VENV)/made-for 2>/dev/null),$(CURDIR) $(PYTHON))
.build/tools.stamp: FORCE
endif
FORCE:

.build/tools.stamp: tests/setup.sh pyproject.toml
	PYTHON='$(PYTHON)' tests/setup.sh tools
	@touch $@

.build/wheel.stamp: .build/tools.stamp $(WHEEL_SOURCES)
	PYTHON='$(PYTHON)' tests/setup.sh wheel
	@touch $@

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --strict stager
	$(VENV)/bin/lint-imports --no-cache
	@files=$$({ git ls-files --cached --others --exclude-standard '*.sh'; \
		git grep -nI --untracked -E '^#!.*[/ ](sh|dash|bash)( |$$)' | sed -n 's/:1:#!.*//p'; } | sort -u); \
	echo shellcheck -x $$files; \
	shellcheck -x $$files

test: lint test-unit test-hook test-root test-environments test-push test-slurm test-pbs

test-unit: setup
	$(PYTEST) -m unit

test-hook: setup
	$(PYTEST_MAYBE) -m hook

test-root: setup
	$(PYTEST) -m root

test-environments: setup
	$(PYTEST) -m environments

test-push: setup
	$(PYTEST) -m push

# Jobs mostly wait: two clusters at the same time, or with CLUSTERS=0 one, as a debugger needs it.
CLUSTERS = 2
SLURM = -m slurm -n $(CLUSTERS) --dist loadfile
test-slurm: setup
	tests/cluster/cluster setup
	$(PYTEST_MAYBE) $(SLURM)

test-pbs: setup
	tests/cluster/cluster setup
	$(PYTEST) -m pbs

# The same on Debian 13's Slurm, from a root directory that is made once.
test-slurm-24.11: setup
	tests/cluster/cluster setup
	ROOTFS="$$(tests/cluster/rootfs trixie)" && export ROOTFS && $(PYTEST) $(SLURM)

# ENV=/path/to/venv measures one of yours; OPTIONS='--parts 1 --runs 7'; a slow file system needs root.
bench-pack: setup
	$(VENV)/bin/python tests/benchmarks/pack.py $(OPTIONS) $(ENV)

# What a start costs, and staging against reading and writing; MIB is the size of the images,
# OPTIONS='--runs 9'.
bench-starts: setup
	$(VENV)/bin/python tests/benchmarks/starts.py --mib $(or $(MIB),512) $(OPTIONS)

# Flat and by way of the nodes, over links that are limited: nodes, MiB, rate.
bench-push: setup
	$(VENV)/bin/python tests/benchmarks/push.py 8 64 200mbit

# Job starts by every strategy: numpy on two nodes; then more nodes, settings and torch.
START = $(VENV)/bin/python tests/benchmarks/job_starts.py
FEW = --strategies 'direct|recipe|squashfs in place|ours|ours, checked|ours, warm'
bench-quick: setup
	$(START) --nodes 2 $(FEW)

bench: setup
	$(START) --nodes 1,2,4,8 --once 'cp -r|rsync'
	$(START) --nodes 1 --settings flash,weak-nfs --skip 'cp -r|rsync'
	$(START) --workload torch --nodes 1 --settings cold-lustre,flash --skip 'cp -r|rsync'
	$(START) --workload numpy-conda --nodes 8 $(FEW)

# What docs/performance shows, measured anew: some eleven hours on a machine that does nothing else.
DATA = docs/performance
MOST = --skip 'cp -r|rsync|ours, tar.zst'
SITE = --strategies 'direct|recipe|squashfs in place|ours|ours, checked|ours, site|ours, warm'
EVERY = --settings cold-lustre,flash,weak-nfs
bench-record: setup
	rm -f $(DATA)/*.jsonl $(DATA)/*.txt
	$(START) --nodes 1,2,4,8 --once 'cp -r' --json $(DATA)/starts-numpy.jsonl
	$(START) --nodes 1,2,4,8 --settings flash,weak-nfs --skip 'cp -r' --json $(DATA)/starts-numpy.jsonl
	$(START) --workload numpy-conda --nodes 1,2,4,8 $(EVERY) $(MOST) \
		--json $(DATA)/starts-numpy-conda.jsonl
	$(START) --workload torch --nodes 1 $(EVERY) --skip 'cp -r|rsync' --json $(DATA)/starts-torch.jsonl
	$(START) --workload torch --nodes 2,4,8 $(MOST) --json $(DATA)/starts-torch.jsonl
	$(START) --workload torch --nodes 2,4,8 --settings flash $(FEW) --json $(DATA)/starts-torch.jsonl
	$(START) --workload torch --nodes 2,4,8 --settings weak-nfs $(FEW) --json $(DATA)/starts-torch.jsonl
	$(START) --workload torch-conda --nodes 1,2 $(EVERY) $(FEW) --json $(DATA)/starts-torch-conda.jsonl
	$(START) --workload torch-conda --nodes 4,8 $(SITE) --json $(DATA)/starts-torch-conda.jsonl
	$(START) --workload torch-conda --nodes 4,8 --settings flash $(FEW) \
		--json $(DATA)/starts-torch-conda.jsonl
	$(START) --workload torch-conda --nodes 8 --settings weak-nfs $(FEW) \
		--json $(DATA)/starts-torch-conda.jsonl
	$(START) --workload torch-large --nodes 1,8 $(SITE) --json $(DATA)/starts-torch-large.jsonl
	# More nodes than this would write what this machine's disk and memory have no room for.
	$(START) --workload torch-cuda --nodes 1 --settings cold-lustre,flash $(SITE) \
		--json $(DATA)/starts-torch-cuda.jsonl
	$(START) --workload all --nodes 1 $(EVERY) $(FEW) --json $(DATA)/starts-all.jsonl
	$(START) --workload all --nodes 2,4,8 $(SITE) --json $(DATA)/starts-all.jsonl
	$(START) --workload all --nodes 2,4,8 --settings flash,weak-nfs $(FEW) --json $(DATA)/starts-all.jsonl
	# Two ranks on two processors: nothing is dilated.
	for workload in numpy torch torch-conda torch-large all; do \
		$(START) --workload $$workload --nodes 1 --ranks 2 $(SITE) --json $(DATA)/two-ranks.jsonl \
			|| exit; \
	done
	$(VENV)/bin/python tests/benchmarks/pack.py --runs 7 >$(DATA)/pack.txt
	$(VENV)/bin/python tests/benchmarks/starts.py --runs 9 >$(DATA)/staging.txt
	$(VENV)/bin/python tests/benchmarks/extract.py --at /dev/shm --at /var/tmp >$(DATA)/extract.txt
	$(VENV)/bin/python tests/benchmarks/mounts.py >$(DATA)/mounts.txt
	$(VENV)/bin/python tests/benchmarks/bystander.py >$(DATA)/bystander.txt

# What another node's `stat` waits for while a job starts; OPTIONS='--setting cold-lustre'.
bench-bystander: setup
	$(VENV)/bin/python tests/benchmarks/bystander.py $(OPTIONS)

# Writes the tables of docs/performance.md and docs/performance/, and plots, from the recorded runs.
performance: setup
	$(VENV)/bin/pip install -q --group bench
	$(VENV)/bin/python tests/benchmarks/report.py

# ENV=/path/to/venv measures one of yours; OPTIONS='--runs 3 --json FILE' and others: see the files.
bench-extract: setup
	$(VENV)/bin/python tests/benchmarks/extract.py $(OPTIONS) $(ENV)

bench-mounts: setup
	$(VENV)/bin/python tests/benchmarks/mounts.py $(OPTIONS) $(ENV)

# Writes docs/comparison.md from what comes out.
comparison: setup
	WRITE_COMPARISON=1 $(PYTEST) tests/peers

demo: setup
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" examples/demo.sh

cluster: setup
	tests/cluster/cluster up

cluster-down:
	tests/cluster/cluster down

build: tools
	rm -rf dist
	$(VENV)/bin/pyproject-build --no-isolation --outdir dist .

clean:
	rm -rf $(VENV) .build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
