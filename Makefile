# `make report` and `make test` do all the set-up that they need in .venv; nothing outside this folder is touched.
PYTHON ?= python3
BIN := .venv/bin
COVERED := geometry vectors interventions evaluation narrowing
SHAPED := dimscope.geometry,dimscope.vectors,dimscope.texts,dimscope.activations,dimscope.interventions,dimscope.evaluation,dimscope.narrowing
THOROUGH := --cov --cov-report= --jaxtyping-packages=$(SHAPED),typechecking.checked
PACKAGES := checkpoints texts vectors activations geometry interventions evaluation narrowing page studies cli

.PHONY: report test coverage test-fast check bench clean

report: .venv/ready
	$(BIN)/dimscope report builtin --studies embedding layers damage narrowing --out report
	@echo "open report/index.html"

# One thread per worker: two workers of two threads each would mostly wait for each other on two cores.
# Bytecode is kept whatever the environment says: each worker would spend ten seconds on compiling the tests again.
test test-fast: export OMP_NUM_THREADS = 1
test test-fast: export PYTHONDONTWRITEBYTECODE =

test: .venv/dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(if $(COVERAGE),$(THOROUGH))
	$(if $(COVERAGE),@$(MAKE) --no-print-directory coverage)

# Measuring coverage, and checking every array against its annotated shape, takes as long again: `make test COVERAGE=1`,
# as the checks of a change do.
coverage:
	@echo "lines covered in this process and its workers (commands in subprocesses are not counted)"
	@for package in $(PACKAGES); do \
		case " $(COVERED) " in *" $$package "*) least=95 ;; *) least=0 ;; esac; \
		printf '%-14s' $$package; \
		$(BIN)/python -m coverage report --format=total --fail-under=$$least --include="**/dimscope/$$package/**" || exit 1; \
	done; printf '%-14s' total; $(BIN)/python -m coverage report --format=total

test-fast: .venv/dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not slow and not browser"

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check
	$(BIN)/lint-imports

bench: .venv/dev
	$(BIN)/python -m benchmarks.embedding
	$(BIN)/python -m benchmarks.layers
	$(BIN)/python -m benchmarks.damage
	$(BIN)/python -m benchmarks.narrowing

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/dev: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv report
