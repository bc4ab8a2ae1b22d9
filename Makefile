# Everything happens in .venv, which each target sets up for itself; nothing but python3, pip and make is needed.
#   make demo          the whole story on a small real task, a few minutes on a CPU
#   make test          the test suite on all cores (about ten minutes on two)
#   make test-full     all of it: every combination of the losses' options, every kernel variant for every target, the
#                      GPU benchmark command in Triton's interpreter, each benchmark beside its peers (over an hour)
#   make lint          ruff, mypy, and the directions of imports
#   make format        ruff, changing files
#   make plant-errors  plants errors in a copy of the project and demands that a test fails for each
#   make bench-quick   every benchmark suite on this CPU beside PyTorch, torch.compile, TRL, Liger and CCE, in minutes
#   make bench-cpu     the recorded table of a CPU (about half an hour on a machine with nothing else to do)
#   make report        benchmarks/RESULTS.md and a page for each device from benchmarks/results/*.json
# Options: PYTHON=python3.12, PIP_ARGS="..." (passed to pip), ARGS="..." (passed to the demo or to pytest).

PYTHON   ?= python3
PIP_ARGS ?=
ARGS     ?=
VENV     := .venv
PY       := $(VENV)/bin/python
XDIST    := -n auto --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-full plant-errors lint format bench-quick bench-cpu report clean

demo: $(VENV)/.has-demo
	$(PY) -m caop_fast.cli demo $(ARGS)

test: $(VENV)/.has-dev
	$(PY) -m pytest $(XDIST) -m "not slow" $(ARGS)

test-full: $(VENV)/.has-dev bench-quick
	$(PY) -m pytest $(XDIST) --full-grid $(ARGS)

plant-errors: $(VENV)/.has-dev
	$(PY) -m tools.plant_errors $(ARGS)

lint: $(VENV)/.has-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/.has-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench-quick: $(VENV)/.has-bench $(VENV)/.has-peers
	$(PY) -m pytest benchmarks --benchmark-columns=median,iqr,rounds $(ARGS)

bench-cpu: $(VENV)/.has-bench $(VENV)/.has-peers
	$(PY) -m benchmarks.gpu --device cpu --minutes 60 $(ARGS)

report: $(VENV)/.has-bench
	$(PY) -m benchmarks.report $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache build dist

# Debian's python3 comes without ensurepip, so the environment is made without pip and the outer pip, however old, puts
# a recent one into it. The stamp comes last: a setup that was interrupted is repaired by the next make.
$(VENV)/.pip-ready:
	@echo "== making $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv --without-pip $(VENV)
	target=$$($(PY) -c "import site; print(site.getsitepackages()[0])") && \
	$(PYTHON) -m pip install --quiet --upgrade --target "$$target" $(PIP_ARGS) 'pip>=23'
	@touch $@

$(VENV)/.has-%: pyproject.toml constraints.txt | $(VENV)/.pip-ready
	@echo "== installing caop-fast[$*] and what it needs into $(VENV) (once; a minute or two)"
	$(PY) -m pip install --progress-bar on -c constraints.txt $(PIP_ARGS) -e ".[$*]"
	@touch $@
