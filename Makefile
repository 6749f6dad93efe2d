# make demo   trains Hydra-PPO on real text on the CPU (creates .venv the first time)
# make test   runs every CPU test
# make slow   runs the tests that take longer
# make bench  measures kernelab beside its peers
# make lint   ruff and clang-format, as in CI
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ROW := OPENBLAS_NUM_THREADS=1

.PHONY: demo test slow bench lint format clean

demo: $(STAMP)
	$(BIN)/kernelab run hydra-rlhf --preset demo $(ARGS)

# Three processes: a kernel decorated under the interpreter cannot be compiled in the same process.
test: $(STAMP)
	$(ROW) $(BIN)/python -m pytest -m "not interp and not aot and not gpu and not slow" $(ARGS)
	$(ROW) TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "interp and not slow" $(ARGS)
	$(ROW) $(BIN)/python -m pytest -m "aot and not slow" $(ARGS)

slow: $(STAMP)
	$(ROW) $(BIN)/python -m pytest -m "slow and not interp and not aot and not gpu" $(ARGS)

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' | xargs -r $(BIN)/clang-format --dry-run --Werror

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' | xargs -r $(BIN)/clang-format -i

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/*/*.cpp csrc/*/*.h)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "kernelab needs Python 3.11 or newer, $(PYTHON) is %d.%d: make PYTHON=/path/to/python3.11" % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build kernelab/_C_cpu*.so *.egg-info
