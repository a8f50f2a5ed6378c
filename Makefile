PYTHON ?= python3
RUN := .env-run
DEV := .env-dev
OLDEST := .env-oldest
NEWEST := .env-3.13
STANDIN := build/gpu/done
ROOMS := tarflow export runtime shards quality serve cli
PIP_FLAGS := --quiet --disable-pip-version-check

CPP := runtime/cpp
CPP_BUILD := $(CPP)/build
ONNXRUNTIME_ROOT ?= $(CURDIR)/$(CPP_BUILD)/onnxruntime
CMAKE_FLAGS := -DONNXRUNTIME_ROOT=$(ONNXRUNTIME_ROOT)

.PHONY: generate test prepare lint types unit cpp cpp-dev cpp-test bench torture demo dist clean

generate: $(RUN)/done ## 64 demo images in samples.png, with nothing but the runtime installed
	$(RUN)/bin/tarflow generate --n 64 --labels 0-9 --guidance 1 -o samples.png

test: ## everything that is checked before a change lands
	$(MAKE) -j 2 prepare
	$(MAKE) unit cpp-test

prepare: lint types $(DEV)/chromium $(NEWEST)/done $(STANDIN) build/debian.tar cpp-dev # what needs no idle machine: one core each

lint: $(DEV)/done
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .

types: $(DEV)/done
	$(DEV)/bin/mypy

unit: $(DEV)/done $(DEV)/chromium $(OLDEST)/done $(NEWEST)/done $(STANDIN) build/debian.tar cpp-dev
	$(DEV)/bin/pytest -n 2 --dist worksteal --durations=12

cpp: $(CPP_BUILD)/needs ## libtarflow, in runtime/cpp/build/release
	cd $(CPP) && cmake --preset release $(CMAKE_FLAGS) && cmake --build --preset release

cpp-dev: $(CPP_BUILD)/needs
	cd $(CPP) && cmake --preset dev $(CMAKE_FLAGS) > /dev/null && cmake --build --preset dev

cpp-test: cpp-dev $(DEV)/done ## libtarflow's own tests, also under sanitizers, and its fuzz targets for 30 seconds
	$(CPP)/cmake/debian-packages.sh g++-aarch64-linux-gnu qemu-user-static
	PYTHON=$(CURDIR)/$(DEV)/bin/python $(CPP)/tests/run.sh $(CMAKE_FLAGS)

bench: export TARFLOW_LIBRARY = $(CURDIR)/$(CPP_BUILD)/release/libtarflow.so
bench: export PATH := $(CURDIR)/$(DEV)/bin:$(PATH)
bench: $(DEV)/done cpp ## every way to draw, beside PyTorch, in one run; floors and growth; writes bench/RESULTS.md: an hour
	python -m bench.compare
	python -m bench.cpp
	python -m bench.floor
	python -m bench.growth
	python -m bench.native

torture: $(DEV)/done ## kills (with strace), damaged files, hostile clients; writes bench/RESULTS-TORTURE.md: some hours
	$(DEV)/bin/python -m bench.torture

demo: $(DEV)/done ## train the demo model and put its bundle into the package
	PATH="$(CURDIR)/$(DEV)/bin:$$PATH" recipes/digits.sh runs/digits
	$(DEV)/bin/tarflow export runs/digits/digits_model_2_128_4_3_0.15.safetensors -o tarflow/demo --force

dist: $(DEV)/done ## an sdist, and a wheel made of it, in dist/
	$(DEV)/bin/python -m build --outdir dist .

$(RUN)/done: pyproject.toml constraints.txt $(wildcard $(foreach room,$(ROOMS),$(room)/*.py $(room)/*/*.py $(room)/*/*/*.py) runtime/native/src/* serve/page/* tarflow/demo/* tarflow/features/*)
	$(PYTHON) -m venv $(RUN)
	$(RUN)/bin/pip install $(PIP_FLAGS) -c constraints.txt --force-reinstall --no-deps .
	$(RUN)/bin/pip install $(PIP_FLAGS) -c constraints.txt .
	mkdir -p $(@D)
	touch $@

$(DEV)/chromium: $(DEV)/done | $(CPP_BUILD)/needs ## the browser that the page is tested in, what links test hosts, what kills at a call
	$(CPP)/cmake/debian-packages.sh chromium iproute2 strace
	touch $@

$(CPP_BUILD)/needs: $(CPP)/cmake/debian-packages.sh $(CPP)/cmake/onnxruntime-headers.sh
	$(CPP)/cmake/debian-packages.sh
	$(CPP)/cmake/onnxruntime-headers.sh $(ONNXRUNTIME_ROOT)
	mkdir -p $(@D)
	touch $@

$(DEV)/done: pyproject.toml constraints.txt $(wildcard runtime/native/src/*) | $(CPP_BUILD)/needs
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/pip install $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	mkdir -p $(@D)
	touch $@

# The lowest versions that pyproject.toml allows; and a Triton server, of a wheel that is for NumPy 1, as they are.
$(OLDEST)/done: pyproject.toml tests/lowest_bounds.py | $(DEV)/done
	$(PYTHON) -m venv $(OLDEST)
	$(PYTHON) tests/lowest_bounds.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install $(PIP_FLAGS) -c $(OLDEST)/constraints.txt -e ".[serve,ray]"
	$(OLDEST)/bin/pip install $(PIP_FLAGS) --no-deps nvidia-pytriton==0.7.0
	touch $@

PYTHON_3_13 = $(shell for python in python3.13 ~/.pyenv/versions/3.13.*/bin/python3.13; do \
	$$python -c "" 2> /dev/null && echo $$python && break; done)

# Python 3.13, if there is one.
$(NEWEST)/done: pyproject.toml constraints.txt | $(OLDEST)/done
	mkdir -p $(@D)
	if [ "$(PYTHON_3_13)" ]; then "$(PYTHON_3_13)" -m venv $(NEWEST) && \
	  $(NEWEST)/bin/pip install $(PIP_FLAGS) -c constraints.txt -e ".[serve]"; fi
	touch $@

# What stands in for CUDA's libraries, and ONNX Runtime for GPUs, which it lets run where there is none.
$(STANDIN): $(wildcard bench/gpu/standin/src/*) bench/gpu/standin/build.py bench/gpu/wheels.py | $(DEV)/done
	$(DEV)/bin/python -m bench.gpu.standin.build
	touch $@

# A fresh Debian, for what builds an image in it. Where it cannot be had, those tests are skipped, and say so.
build/debian.tar:
	mkdir -p build
	-$(CPP)/cmake/debian-packages.sh mmdebstrap iproute2 && mmdebstrap --quiet --variant=minbase bookworm build/debian.partial.tar http://deb.debian.org/debian && mv build/debian.partial.tar $@

clean:
	rm -rf $(RUN) $(DEV) $(OLDEST) $(NEWEST) $(CPP_BUILD) build dist *.egg-info runtime/native/_decoder*.so samples.png
