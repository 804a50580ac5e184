# make demo    a server from disk, a client from the server, the same answers      MODEL=directory-or-hub-name
# make test    everything that CI checks, in an environment of its own             TESTS="tests/unit -k manifest"
# make test-all  the same, with the slow tests
# make bench   the weight phase by every way, as ratios
# make npu-sim a simulated NPU under the genuine torch-npu; source tools/npu_sim.sh then
# make demo-npu  the demo on two simulated NPUs, over HCCL                         MODEL=directory, quantised too
# make soak    server and client under random faults, every byte compared          SOAK_SECONDS=600
# make clean   removes everything that was built or installed, both environments and the downloaded models included
#
# The other benchmarks take .venv/bin/python -m benchmarks.NAME, and --help says what they measure:
#   many_clients   eight clients at once, against raw sockets
#   verification   what the digests, a token and TLS cost
#   neighbours     what requests feel of clients that fetch from the same instance
#   inverses       serving what post-processing has rearranged
#   fingerprint    recognising a checkpoint of 100 GB
# All of them write their figures with --json FILE, draw them with --plot FILE.svg, and draw them again with --from FILE.

PYTHON ?= python3
VENV ?= .venv
NPU_VENV ?= .venv-npu
MODEL ?=
TRANSPORT ?=
TESTS ?= tests/unit tests/e2e
NPU_TESTS ?= tests/unit/netloader/transport/test_conformance.py tests/npu
CHOICE ?= not slow
SOAK_SECONDS ?= 600
BIN = $(VENV)/bin
ifdef CPU_FEATURES
export CPU_FEATURES
export PYTHONPATH := $(CURDIR)/tests/processor$(addprefix :,$(PYTHONPATH))
endif
INSTALLED = $(VENV)/.installed
NPU_INSTALLED = $(NPU_VENV)/.installed
NPU_SOURCES = $(shell find csrc/cann_sim -path csrc/cann_sim/build -prune -o -type f -name '*.[chp]*' -print)
ON_NPU = NPU_VENV=$(NPU_VENV) bash -c 'source tools/npu_sim.sh && exec "$$@"' npu-sim

.PHONY: setup npu-sim demo demo-npu check-npu bench soak test test-all lint types docs wheel check-tests format clean

setup: $(INSTALLED)

$(INSTALLED): requirements.txt requirements-cpu.txt requirements-dev.txt pyproject.toml setup.py tools/setup_environment.sh
	PYTHON=$(PYTHON) tools/setup_environment.sh $(VENV)
	touch $@

npu-sim: $(NPU_INSTALLED)

$(NPU_VENV)/.packages: $(INSTALLED) requirements-npu-sim.txt tools/setup_npu_sim.sh tools/layer_environment.sh
	tools/setup_npu_sim.sh $(VENV) $(NPU_VENV)
	touch $@

$(NPU_INSTALLED): $(NPU_VENV)/.packages $(NPU_SOURCES)
	$(MAKE) -C csrc/cann_sim all operators PYTHON=$(abspath $(NPU_VENV))/bin/python
	touch $@

demo: $(INSTALLED)
	@$(BIN)/python -m tools.demo --model "$(MODEL)" --transport "$(TRANSPORT)"

demo-npu: $(NPU_INSTALLED)
	@$(ON_NPU) python -m tools.demo --npu --model "$(MODEL)" --transport "$(TRANSPORT)"

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.weight_phase

soak: $(INSTALLED)
	$(BIN)/python -m tools.soak --seconds $(SOAK_SECONDS)

test: lint types docs wheel check-tests check-npu

test-all: CHOICE =
test-all: test

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -b html docs/source docs/_build

wheel: $(INSTALLED)
	$(BIN)/python -m build --no-isolation --outdir dist .

check-tests: $(INSTALLED)
	$(BIN)/python -X faulthandler -m pytest -m "$(CHOICE)" $(TESTS)

check-npu: $(NPU_INSTALLED)
	$(MAKE) -C csrc/cann_sim sanitize check check-operators PYTHON=$(abspath $(NPU_VENV))/bin/python
	CANN_SIM_ASYNC=1 $(ON_NPU) python -X faulthandler -m pytest -m "$(CHOICE)" $(NPU_TESTS)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	$(MAKE) -C csrc/cann_sim clean
	rm -rf $(VENV) $(NPU_VENV) .venv-vllm-* .models docs/_build dist build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
