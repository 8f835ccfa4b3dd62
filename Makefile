# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
#
# A front to the scripts in tests/. `make` alone says what there is.

PYTHON ?= python3
SCENARIO ?= evacuate
HOST ?= hv1
COUNT ?= 100
# More arguments for a check, like ARGS="tests/unit/plugins/modules -k cordon".
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint sanity units report collection venv needs lab lab-ssh lab-status lab-down molecule test-kmod test-kmod-debug test-kmod-kernels test-pyverbs soak bench bench-planner bench-kmod bench-engines bench-deadline clean

help: ## Say what there is
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: collection ## Show an evacuation from start to end, in the lab
	@$(PYTHON) tests/needs.py lab
	@$(PYTHON) tests/demo.py $(ARGS)

test: ## Run all checks; the last line counts them
	@$(PYTHON) tests/run.py $(ARGS)

lint: ## Check style, with all linters
	@$(PYTHON) tests/checks.py lint

sanity: ## Run ansible-test sanity
	@$(PYTHON) tests/checks.py sanity $(ARGS)

units: ## Run the unit tests
	@$(PYTHON) tests/checks.py units $(ARGS)

report: ## Test the report's page in a browser
	@$(PYTHON) tests/checks.py report $(ARGS)

collection: ## Build the collection and install it in build/collections
	@$(PYTHON) tests/tree.py install

venv: ## Make the development environment, and say where it is
	@$(PYTHON) tests/devenv.py

needs: ## Install the Debian packages that are missing
	@$(PYTHON) tests/needs.py

lab: ## Start the lab: three hypervisors, emulated
	@$(PYTHON) tests/needs.py lab
	@$(PYTHON) tests/lab/lab.py up

lab-ssh: ## Log in to a host of the lab: make lab-ssh HOST=hv1
	@$(PYTHON) tests/lab/lab.py ssh $(HOST)

lab-status: ## Say what runs in the lab
	@$(PYTHON) tests/lab/lab.py status

lab-down: ## Stop the lab
	@$(PYTHON) tests/lab/lab.py down

molecule: collection ## Run a scenario in the lab: make molecule SCENARIO=evacuate
	@$(PYTHON) tests/needs.py lab
	@$(PYTHON) tests/lab/lab.py up
	@# What Molecule remembers of a run that was interrupted would let it leave out its first steps.
	@rm -rf build/molecule/$(SCENARIO)
	@venv=$$($(PYTHON) tests/devenv.py) && cd build/collections/ansible_collections/hecaton/fleet/extensions && \
	  PATH="$$venv/bin:$$PATH" ANSIBLE_COLLECTIONS_PATH="$(CURDIR)/build/collections" HECATON_CHECKOUT="$(CURDIR)" \
	  MOLECULE_EPHEMERAL_DIRECTORY="$(CURDIR)/build/molecule/$(SCENARIO)" \
	  molecule --base-config molecule/config.yml test --scenario-name $(SCENARIO)

test-kmod: ## Test the kernel module on two hosts of the lab per transport, side by side (ARGS=--long: all of it; -n0: in turn)
	@$(PYTHON) tests/needs.py lab
	@venv=$$($(PYTHON) tests/devenv.py) && PYTHONDONTWRITEBYTECODE=1 "$$venv/bin/python" -m pytest -p no:cacheprovider -v --durations=20 -n2 tests/kmod $(ARGS)

test-kmod-debug: ## The same on a kernel with KASAN, lockdep, kmemleak and more, which is built first
	@$(PYTHON) tests/needs.py lab
	@venv=$$($(PYTHON) tests/devenv.py) && PYTHONDONTWRITEBYTECODE=1 "$$venv/bin/python" -m pytest -p no:cacheprovider -v --durations=20 tests/kmod --debug-kernel $(ARGS)

test-kmod-kernels: ## Compile the kernel module for the oldest kernel, the lab's, and the newest of Debian's backports
	@$(PYTHON) tests/needs.py lab
	@$(PYTHON) tests/kmod/kernels.py

test-pyverbs: collection ## Run rdma-core's tests of pyverbs against the role's siw and rxe devices
	@$(PYTHON) tests/needs.py lab
	@$(PYTHON) tests/rdma/pyverbs.py $(ARGS)

soak: collection ## Evacuate a host and bring its VMs back, again and again: make soak COUNT=100
	@$(PYTHON) tests/needs.py lab
	@$(PYTHON) tests/soak.py --count $(COUNT) $(ARGS)

bench: bench-planner bench-kmod bench-engines bench-deadline ## Measure the planner, and module, engines and deadlines in the lab

bench-planner: ## Measure the planner (time, and packing against the optimum)
	@venv=$$($(PYTHON) tests/devenv.py) && "$$venv/bin/python" tests/bench/planner.py $(ARGS)

bench-kmod: ## Measure the kernel module on two hosts of the lab
	@$(PYTHON) tests/needs.py lab
	@$(PYTHON) tests/bench/kmod.py $(ARGS)

bench-engines: collection ## Measure the engines in turn on the same VM, in the lab
	@$(PYTHON) tests/needs.py lab
	@$(PYTHON) tests/bench/engines.py $(ARGS)

bench-deadline: collection ## Empty a host under three deadlines in the lab, and see when it was free
	@$(PYTHON) tests/needs.py lab
	@$(PYTHON) tests/bench/deadline.py $(ARGS)

clean: ## Remove what was built in this checkout; the cache stays
	@rm -rf build
