# Every target installs what it needs itself: on a fresh machine `make demo` or `make test` is all there is to type.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
PROTOS := $(shell find protos -name "*.proto")
MODEL ?= smollm2-135m
ADAPTERS_DIR ?= build/demo/adapters

.PHONY: install demo serve test check format protos bench clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt server/kernels/native.c
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# The embedded base model, fetched once into the cache folder (LORAPLEX_CACHE).
model: $(INSTALLED)
	$(BIN)/loraplex models fetch $(MODEL)

demo: model
	$(BIN)/python examples/demo.py

serve: model
	$(BIN)/loraplex serve --model $(MODEL) --adapters-dir $(ADAPTERS_DIR)

# Two processes, which share two cores: a test never has more than one neighbour.
test: model
	$(BIN)/pytest --numprocesses 2 --dist worksteal

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror server/kernels/native.c
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec compose.yaml

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i server/kernels/native.c

protos: $(INSTALLED)
	$(BIN)/python -m grpc_tools.protoc -Iserver/pb=protos --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

bench: model
	$(BIN)/loraplex bench throughput --model $(MODEL)

clean:
	rm -rf .venv build *.egg-info
