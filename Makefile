# `make demo` and `make test` do everything on a machine that has Python 3.11 or newer and nothing else.
#
# The packages of an environment lie outside the checkout, in a directory named by its lock file, so that a second
# checkout is set up in seconds. `.venv/service` and its like are thin environments on top of them that hold this
# checkout. The service and its clients have no torch; the agent frameworks are apart because they need a newer openai
# than SGLang does; the engine (SGLang) is 11 GB and takes minutes, once.

PYTHON ?= python3
CACHE ?= $(or $(AGENTSTATE_CACHE_DIR),$(HOME)/.cache/agentstate)
SERVICE := .venv/service/bin/python
ENGINE := .venv/engine/bin/python
ADAPTERS := .venv/adapters/bin/python
ADK := .venv/adk/bin/python
SERVICE_SET_UP := .venv/service/complete
ENGINE_SET_UP := .venv/engine/complete
ADAPTERS_SET_UP := .venv/adapters/complete
ADK_SET_UP := .venv/adk/complete
RUN := AGENTSTATE_ENGINE_PYTHON=$(CURDIR)/$(ENGINE) AGENTSTATE_CACHE_DIR=$(CACHE) OMP_WAIT_POLICY=passive
PYTEST := -m pytest --durations=5
# A process a core, each with databases and engines of its own.
PARALLEL := -n auto

.PHONY: help demo docs test test-service test-adapters test-engine test-acceptance test-late test-gpu canary lint setup clean

help:
	@echo "make demo          an agent is suspended, its engine killed, and it goes on from disk (ARGS='--json FILE')"
	@echo "                   ARGS='--nodes 2': its node dies with its drive, and it goes on at another"
	@echo "make docs          the documentation as a site: site/index.html"
	@echo "make test          everything this machine can run"
	@echo "make test-service  what needs no SGLang"
	@echo "make test-adapters what needs the agent frameworks"
	@echo "make test-engine   the plug-in in SGLang's process"
	@echo "make test-acceptance  whole engines: every promise, end to end"
	@echo "make test-late     the tests on the late device, at length (POLICIES=late,random:1,...; see docs/testing.md)"
	@echo "make test-gpu      what needs a GPU (PYTHON=one that has torch for CUDA; no SGLang is needed)"
	@echo "make canary        does the newest SGLang go with AgentState? (ARGS='--restore 0.5.22': does this one?)"
	@echo "make setup-lmcache LMCache beside SGLang, for agentstate bench ttft --peers lmcache; nothing else needs it"
	@echo "make lint          ruff and mypy"

demo: $(SERVICE_SET_UP) $(ENGINE_SET_UP)
	@$(RUN) $(SERVICE) -m agentstate.cli demo $(ARGS)

docs: $(SERVICE_SET_UP)
	@$(SERVICE) .ci/site_pages.py site

test: lint test-service test-adapters test-engine test-acceptance

test-service: $(SERVICE_SET_UP)
	$(SERVICE) $(PYTEST) $(PARALLEL) tests/unit tests/integration tests/migration tests/faults

test-adapters: $(ADAPTERS_SET_UP) $(ADK_SET_UP)
	$(ADAPTERS) -m mypy
	$(ADAPTERS) $(PYTEST) $(PARALLEL) tests/adapters
	$(ADK) -m mypy agentstate/adapters/google_adk.py
	$(ADK) $(PYTEST) $(PARALLEL) tests/adapters

test-engine: $(ENGINE_SET_UP) model
	$(RUN) $(ENGINE) $(PYTEST) $(PARALLEL) --disable-warnings tests/engine tests/gpu tests/late

test-acceptance: setup model
	$(RUN) $(ADAPTERS) $(PYTEST) $(PARALLEL) --dist loadfile tests/acceptance tests/clients

# Every policy, many seeds, and for every wait each of the tests that are named for it.
POLICIES ?= late,eager,$(shell seq -s, -f random:%.0f 1 20)
test-late: $(ENGINE_SET_UP)
	$(RUN) $(ENGINE) $(PYTEST) $(PARALLEL) --disable-warnings tests/gpu tests/late --late-policies $(POLICIES) --late-thorough

test-gpu:
	$(PYTHON) $(PYTEST) tests/gpu

# Takes the wheel of SGLang alone. See CONTRIBUTING.md.
canary: $(ENGINE_SET_UP) $(ADAPTERS_SET_UP)
	@AGENTSTATE_CACHE_DIR=$(CACHE) $(PYTHON) .ci/canary.py $(ARGS)

lint: $(SERVICE_SET_UP)
	$(SERVICE) -m ruff check .
	$(SERVICE) -m ruff format --check .
	$(SERVICE) -m mypy

setup: $(SERVICE_SET_UP) $(ADAPTERS_SET_UP) $(ADK_SET_UP) $(ENGINE_SET_UP)

.PHONY: setup-lmcache
setup-lmcache: .venv/lmcache/complete

# Its environment is made of the engine's and what LMCache needs beside it.
.venv/lmcache/complete: $(ENGINE_SET_UP)

.PHONY: model
model: $(ENGINE_SET_UP)
	@$(RUN) $(ENGINE) -m engine_patch.cpu.smollm2 $(CACHE)/smollm2-135m-instruct

.venv/%/complete: locks/%.txt pyproject.toml $(wildcard agentstate/pages/native/*.[ch])
	@$(PYTHON) .ci/environment.py $* $(CACHE)

clean:
	rm -rf .venv build dist site *.egg-info
