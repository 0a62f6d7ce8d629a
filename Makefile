# `make help` lists the targets.
PYTHON := .venv/bin/python
.DEFAULT_GOAL := help
.PHONY: help setup demo test e2e-kubernetes image chart lint format bench fuzz fuzz-http lock

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Make .venv: pinned and hashed CPU packages and this project in development mode
	@tools/setup

demo: setup ## Serve the demo model on this machine; ONCE=1: one completion, a short load test, stop; HTTP_PORT, GRPC_PORT
	@$(PYTHON) -m examples.demo $(if $(ONCE),--once) $(if $(HTTP_PORT),--http-port $(HTTP_PORT)) $(if $(GRPC_PORT),--grpc-port $(GRPC_PORT))

test: setup ## Run all tests that need neither a GPU nor a Kubernetes API server; ARGS for pytest
	@$(PYTHON) -m pytest $(ARGS)

e2e-kubernetes: setup ## Run all tests of chart, image file and client; a Kubernetes API server is built once into ~/.cache; ARGS for pytest
	@tools/kubernetes-tools
	@EXPERTMESH_REQUIRE_TESTBED=1 $(PYTHON) -m pytest -m "not image" tests/helm tests/kubernetes tests/image $(ARGS)

image: setup ## Build the CPU image and test it, as root; BASE=NAME@sha256:DIGEST, otherwise on a stand-in made with debootstrap
	@tools/image cpu $(if $(BASE),--base $(BASE) --engine buildah,--stand-in)
	@$(PYTHON) -m pytest -m image $(ARGS)

chart: setup ## Write what of the Helm chart is generated: schema, defaults, README, dashboards, golden files
	@$(PYTHON) -m tools.chart

lint: setup ## Check format, style, types, the protocol and who imports whom
	@tools/lint

format: setup ## Format the code and repair what ruff can
	@$(PYTHON) -m ruff check --quiet --fix-only .
	@$(PYTHON) -m ruff format .

bench: setup ## Run all benchmarks, print a table and write benchmarks/results/<date>.md; ARGS, e.g. "dispatch --json FILE"
	@$(PYTHON) -m benchmarks $(or $(ARGS),all)

fuzz: setup ## Fuzz what comes from outside, each target for SECONDS (600); TARGET: one of them alone; JSON: a file for the outcomes
	@PYTHONPATH=tests $(PYTHON) -m fuzz $(or $(TARGET),all) --seconds $(or $(SECONDS),600) $(if $(JSON),--json $(JSON))

fuzz-http: setup ## Fuzz the HTTP API with schemathesis for SECONDS (120) and compare with plain vLLM; JSON; ARGS, e.g. "--cluster NAME"
	@PYTHONPATH=tests $(PYTHON) -m fuzz.http --seconds $(or $(SECONDS),120) $(if $(JSON),--json $(JSON)) $(ARGS)

lock: ## Write the lock files again, versions unchanged; UPGRADE=1: newest versions; needs uv on the PATH
	@python3 requirements/lock.py $(if $(UPGRADE),--upgrade)
