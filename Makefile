# Every command of the project; CI runs these same ones. `make help` lists them.

PYTHON ?= python3.11
VENV := .venv
STOCK := .venv-stock
STUDIO := .venv-labelstudio
RUN := $(VENV)/bin
UV := $(RUN)/uv
UV_VERSION := 0.13.8

.DEFAULT_GOAL := help

.PHONY: help
help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | sort | expand -t 16

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "make needs Python 3.11: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(UV) pip install --quiet --python $(VENV) --require-hashes -r requirements.lock
	$(UV) pip install --quiet --python $(VENV) --no-deps --editable .
	touch $@

# What a TorchServe of somebody else holds: none of our code, no safetensors.
$(STOCK)/.installed: $(VENV)/.installed docker/requirements.lock
	$(UV) venv --quiet --clear --python $(RUN)/python $(STOCK)
	$(UV) pip install --quiet --python $(STOCK) --require-hashes -r docker/requirements.lock
	touch $@

# A real Label Studio for the tests; it would not go along with the libraries of the others.
$(STUDIO)/.installed: $(VENV)/.installed tests/labelstudio.lock
	$(UV) venv --quiet --clear --python $(RUN)/python $(STUDIO)
	$(UV) pip install --quiet --python $(STUDIO) --require-hashes -r tests/labelstudio.lock
	touch $@

.PHONY: install
install: $(VENV)/.installed ## The environment in .venv

.PHONY: demo
demo: $(VENV)/.installed ## Build `shapes`, serve it, ask it, until Ctrl-C; ONCE=1 ends at once, PORT=… for another than 8080
	$(RUN)/python -m tools.demo $(if $(ONCE),--once) $(if $(PORT),--port $(PORT))

.PHONY: lint
lint: $(VENV)/.installed ## Style and types
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

# Servers and trainings share the cores with the tests that wait for them: threads that wait should sleep.
test-unit test-e2e coverage: export OMP_WAIT_POLICY := passive
# Hundreds of processes import torch and its like: without bytecode each of them compiles it anew.
test-unit test-e2e coverage fuzz chaos soak: export PYTHONDONTWRITEBYTECODE :=
.PHONY: test
test: lint $(STOCK)/.installed $(STUDIO)/.installed ## Lint, types and every test, real servers included
	$(MAKE) --jobs=2 --keep-going test-unit test-e2e

.PHONY: test-unit
test-unit: $(STOCK)/.installed ## The tests that need no server of a whole session
	$(RUN)/python -m pytest -m "not container and not long" --ignore=tests/e2e --numprocesses=2 --dist=loadfile $(PYTEST)

# In a process of their own: the libraries of clients and browsers do not meet those of all the engines.
.PHONY: test-e2e
test-e2e: $(STOCK)/.installed $(STUDIO)/.installed ## The tests of real servers, clients and browsers
	$(RUN)/python -m pytest -m "not container and not long" tests/e2e $(PYTEST)

.PHONY: coverage
coverage: $(STOCK)/.installed $(STUDIO)/.installed ## The tests once more, slower, with the lines that none of them runs
	$(RUN)/coverage erase
	$(RUN)/python -m pytest -m "not container and not long" --cov --cov-report=term $(PYTEST)

.PHONY: compose
compose: model-store/shapes.mar ## Gateway, TorchServe, S3, Prometheus, Grafana and Label Studio on this machine
	docker compose -f docker/compose/compose.yaml up --build --detach --wait
	@echo 'where to sign in: docker compose -f docker/compose/compose.yaml run --rm secrets show'

IMAGE_ARGUMENTS = $(if $(BASE_IMAGE),--base-image $(BASE_IMAGE)) $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))

model-store/shapes.mar: $(VENV)/.installed $(shell find archives/shapes handlers model_defs -type f -not -name '*.pyc')
	$(RUN)/marina archive build archives/shapes

.PHONY: image
image: $(VENV)/.installed ## The serving container; BASE_IMAGE=… TORCH_INDEX=…
	$(RUN)/python -m tools.container image $(IMAGE_ARGUMENTS)

.PHONY: image-smoke
image-smoke: model-store/shapes.mar ## Build the container, run it locked down, ask it for a prediction
	$(RUN)/python -m tools.container smoke --store model-store $(IMAGE_ARGUMENTS)

.PHONY: test-container
test-container: $(VENV)/.installed ## The tests that need a container engine, or start one
	$(RUN)/python -m pytest -m container tests

fuzz chaos soak: export PYTHONPATH := tests
.PHONY: fuzz
fuzz: $(VENV)/.installed ## Bytes that break a reader, then broken requests at a server; SECONDS=300 REQUESTS=20000
	$(RUN)/python -m survive.fuzz --seconds $(or $(SECONDS),300) --findings fuzz-findings
	$(RUN)/python -m survive.storm --requests $(or $(REQUESTS),20000) --keep fuzz-findings

.PHONY: chaos
chaos: $(VENV)/.installed ## A worker, then TorchServe, killed every 20 s under load; MINUTES=3 of each of three parts
	$(RUN)/python -m survive.chaos --minutes $(or $(MINUTES),3)

.PHONY: soak
soak: $(VENV)/.installed ## Full load: memory, descriptors, p99 of each minute; MINUTES=20, needs wrk
	$(RUN)/python -m survive.soak --minutes $(or $(MINUTES),20)

.PHONY: test-long
test-long: $(STUDIO)/.installed ## The tests that train for many minutes
	$(RUN)/python -m pytest -m long tests $(PYTEST)

.PHONY: lock
lock: $(VENV)/.installed ## Pin the newest versions that pyproject.toml allows
	$(UV) pip compile --upgrade --quiet --python-version 3.11 --all-extras --generate-hashes --no-header --no-annotate \
	  --no-emit-index-url pyproject.toml -o requirements.lock
	echo label-studio==1.23.0 | $(UV) pip compile --upgrade --quiet --python-version 3.11 --generate-hashes --no-header \
	  --no-annotate --no-emit-index-url - -o tests/labelstudio.lock

# A pool of its own: tritonclient registers the same messages, and two copies of a name end the import.
.PHONY: proto
proto: $(VENV)/.installed ## Generate the gRPC stubs in tools/proto
	$(RUN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. tools/proto/*.proto
	sed -i 's/_descriptor_pool\.Default()/_descriptor_pool.DescriptorPool()/' tools/proto/*_pb2.py

.PHONY: clean
clean: ## Remove what make made
	rm -rf $(VENV) $(STOCK) $(STUDIO) .mypy_cache .ruff_cache .pytest_cache .coverage demo-output
