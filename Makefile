# Each target sets up what it needs: a virtual environment in .venv, installed from constraints.txt, built in place.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard csrc/*/*)
# OpenMP threads that wait spin for a moment, then sleep: where other processes run, endless spinning makes a small model
# a hundred times slower (docs/tuning.md).
export GOMP_SPINCOUNT ?= 10000

.PHONY: demo study test soak lint bench bench-check gpu clean

demo: .venv/installed
	$(BIN)/python -m studies.demo

# Forty minutes: trains the adaptor and the six models of PRe, runs the paradox study, writes docs/results.md from it. A
# killed paradox study goes on where it was.
study: .venv/installed
	$(BIN)/python -m studies.adaptor
	$(BIN)/python -m studies.predictive
	$(BIN)/python -m studies.paradox --images 24
	$(BIN)/python -m studies.paradox --out out/studies/paradox-codecs --images 60 --degradations 'codec:*' \
		--methods codec_adaptor:out/studies/adaptor/adapters.safetensors
	$(BIN)/python -m studies.paradox --out out/studies/paradox-predictive --models out/studies/predictive/with-0 \
		--images 24 --methods untuned
	$(BIN)/python -m studies.results

test: .venv/installed .venv/quantisation
	$(BIN)/python -m pytest -q
	PYTHONPATH=.venv/quantisation $(BIN)/python -m pytest -q tests/models/test_quantised.py

# Thousands of steps, calls from threads, random examples (docs/reliability.md), studies and a service on Ray.
soak: .venv/installed
	VQFAST_SOAK=1 $(BIN)/python -m pytest -q --durations=0 tests/soak tests/tuning/test_threads.py tests/tuning/test_fuzz.py
	$(BIN)/pip install -q -c constraints.txt -r examples/serve/requirements.txt 'ray[data]==2.60.0'
	VQFAST_SOAK=1 $(BIN)/python -m pytest -q tests/soak/test_ray.py
	$(BIN)/python -m pytest -q examples/serve

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/lint-imports

# Appends to benchmarks/results/<device>/ and rewrites the README's table from it: on an otherwise idle machine.
bench: .venv/installed
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds --record benchmarks/results
	$(BIN)/python -m benchmarks.report

# Whether the speed-ups of this machine's committed results still hold.
bench-check: .venv/installed
	$(BIN)/python -m benchmarks.check

# On a machine with a GPU: builds, tests the triton and cuda backends, measures them. Uses the PyTorch that is there.
gpu:
	bash benchmarks/gpu.sh out/gpu

clean:
	rm -rf .venv build out *.egg-info vqfast/*.so

# Beside the environment, not in it: transformers imports torchao wherever it is, which is slow and prints warnings.
.venv/quantisation: .venv/installed
	$(BIN)/pip install -q --no-deps --upgrade --target $@ torchao==0.18.0 bitsandbytes==0.50.2
	touch $@

# torch first and pinned: a range would take the newest build with gigabytes of CUDA libraries.
.venv/installed: pyproject.toml setup.py constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch setuptools ninja
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation --config-settings editable_mode=compat \
		-e ".[test,lint,bench]"
	touch $@
