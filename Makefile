# make serve · make test · make distill RECIPE=digits · make prove · make setup. Each sets up what it needs.
PYTHON ?= python3
VENV := .venv
SERVE_VENV := .venv-serve
LOCK_VENV := .venv-lock
PIP_FLAGS ?= --quiet --disable-pip-version-check
# On a machine without a GPU, point pip at a CPU build of torch to save gigabytes.
TORCH ?= torch==2.13.0
HOST ?= 127.0.0.1
PORT ?= 8000
RECIPE ?= digits
OUT ?= runs/$(RECIPE)

.PHONY: help setup serve test pytest lint lint-style lint-types deploy-check docs pictures chaos prove distill lock sbom clean

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## make setup      a .venv with everything: training, engines, server, tests
setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install $(PIP_FLAGS) "$(TORCH)"
	$(VENV)/bin/pip install $(PIP_FLAGS) -e '.[distill,onnxruntime,int8,signing,dev]'
	@touch $@

$(SERVE_VENV)/.ready: pyproject.toml
	@echo "Setting up $(SERVE_VENV) (no torch; once, about a minute) …"
	$(PYTHON) -m venv $(SERVE_VENV)
	$(SERVE_VENV)/bin/pip install $(PIP_FLAGS) -e .
	@touch $@

## make serve      serve the embedded model and its playground  [PORT=8000 HOST=127.0.0.1]
serve: $(SERVE_VENV)/.ready
	$(SERVE_VENV)/bin/python -m server serve --host $(HOST) --port $(PORT)

## make test       what CI runs: linters, types, import rules, every test but the longest
# Types are checked beside the tests, on what these leave of the cores. deploy-check's findings are tests, too
# (tests/deploy/test_deploy.py). What takes longest is marked long and left to make prove.
test: lint-style
	$(MAKE) --no-print-directory -j 2 lint-types pytest

# One worker more than cores: a test that waits for a process leaves its core to the others (on 2 cores 232 s instead
# of 266 s for those of the server; all of make test 17:42 so, 18:39 with two more).
pytest: setup
	$(VENV)/bin/python -m pytest -n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --dist loadfile --max-worker-restart 0

lint: lint-types lint-style

lint-types: setup
	$(VENV)/bin/mypy

lint-style: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

## make deploy-check   Dockerfiles, compose files and manifests: linted, rendered, validated, held against the code
deploy-check: setup
	$(VENV)/bin/python -m tests.deploy

## make docs       docs/configuration.md anew, from the settings
docs: setup
	$(VENV)/bin/python -m server settings > docs/configuration.md

$(LOCK_VENV)/.ready:
	$(PYTHON) -m venv $(LOCK_VENV)
	$(LOCK_VENV)/bin/pip install $(PIP_FLAGS) uv==0.13.9 cyclonedx-bom==7.5.0
	@touch $@

LOCK = $(LOCK_VENV)/bin/uv pip compile --quiet pyproject.toml --generate-hashes --no-annotate --python-version 3.12 \
	--python-platform x86_64-manylinux_2_28 --custom-compile-command "make lock"

## make lock       resolve the images' requirements anew, with hashes, into docker/requirements
lock: $(LOCK_VENV)/.ready
	$(LOCK) --upgrade --extra signing -o docker/requirements/cpu.txt
	$(LOCK) --upgrade --extra signing --extra torch -o docker/requirements/gpu.txt
	$(LOCK) --upgrade --extra distill -o docker/requirements/distil.txt

## make sbom       a CycloneDX bill of materials of each image's requirements, into build/sbom
sbom: $(LOCK_VENV)/.ready
	mkdir -p build/sbom
	for image in cpu gpu distil; do $(LOCK_VENV)/bin/cyclonedx-py requirements docker/requirements/$$image.txt \
		--output-reproducible --of JSON -o build/sbom/$$image.cdx.json; done

## make distill    train, evaluate and export a recipe  [RECIPE=digits OUT=runs/digits]
distill: setup
	$(VENV)/bin/python -m distill_jobs run $(RECIPE) --out $(OUT) --resume
	$(VENV)/bin/python -m distill_jobs evaluate $(OUT)
	$(VENV)/bin/python -m distill_jobs export $(OUT) $(OUT)/bundle

## make pictures   a model's pictures for the README, drawn by the server, and its card filled in  [BUNDLE=… RUN=…]
BUNDLE ?= server/bundles/emoji
pictures: setup
	$(VENV)/bin/python -m tests.benchmarks.pictures --bundle $(BUNDLE)
	$(if $(RUN),$(VENV)/bin/python -m distill_jobs card $(RUN))

## make chaos      jobs over HTTP while APIs, workers and Redis are killed; then bugs planted to be found
chaos: setup
	$(VENV)/bin/python -m tests.chaos small
	$(VENV)/bin/python -m tests.chaos plants

## make prove      the long proofs: the longest tests; fuzzing; cancels; overload, fairness; killed training jobs; SD 1.5 at true size; docs/benchmarks.md
prove: setup
	$(VENV)/bin/python -m pytest -m long
	$(VENV)/bin/python -m tests.fuzz
	$(VENV)/bin/python -m tests.chaos cancels
	$(VENV)/bin/python -m tests.load all
	$(VENV)/bin/python -m tests.chaos.job_kills
	$(VENV)/bin/python -m tests.true_size
	$(VENV)/bin/python -m tests.benchmarks

clean:
	rm -rf $(VENV) $(SERVE_VENV) $(LOCK_VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
