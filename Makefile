# make demo   from nothing: builds, pre-trains a small model on the clips that ship with the project, shows what it reconstructs
# make test   from nothing: all tests, in JOBS=2 processes; make test-quick: the ops of small tensors, masks, clips, recipes and imports
# make compile-kernels  from nothing: the Triton kernels compiled for every kind of GPU, their figures compared (tests: for sm_90 alone)
# make lint   from nothing: formatters, linters and the type checker, at the versions of the [dev] extra
# make docs   from nothing: the documentation as a site, build/site
# make wheel, make sdist  from nothing: packages to publish, in dist, checked
# make hf-kernels  from nothing: the ops as a kernel that Hugging Face's kernels package loads, in build/hf-kernels
# make sanitize  from nothing: tests that call ops as no one should, under AddressSanitizer and UndefinedBehaviorSanitizer
# make old-processor  from nothing: each op once on an emulated processor without AVX; needs qemu-x86_64 (Debian's qemu-user)
# make aarch64  from nothing: compiled for aarch64, each op once on an emulated one; needs Debian's qemu-user and g++-aarch64-linux-gnu
# make bench  from nothing: every op and the training step beside the reference and tuned PyTorch
# make gpu    on a machine with a GPU: tests, kernel times, steps, profiles; a report in gpu-results (PYTHON's own torch is used)
# make study  from nothing: what pre-training is worth, in at most 40 minutes on two idle cores (docs/results.md); needs Fashion-MNIST
#
# Each makes its own virtual environment. PYTHON=python3.12 or TORCH='torch==2.10.0' choose others than the tested ones. Triton is the
# one that this torch requires; where it requires none, as a build for CPUs, the tested one; TRITON='triton==3.6.0' chooses another.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?=
TESTED_TRITON = triton==3.9.0; platform_system == 'Linux'
VENV ?= .venv
OUTPUT ?= demo-output
IMAGES ?= /usr/share/datasets/fashion-mnist

# One stamp per choice of torch and triton: another choice installs anew.
STAMP = $(VENV)/.installed-$(subst =,-,$(subst >,-,$(subst <,-,$(subst $() ,,$(TORCH)-$(TRITON)))))
CXX_FILES = $(shell find csrc -name '*.cpp' -o -name '*.h')
SOURCES = setup.py pyproject.toml $(CXX_FILES)

.PHONY: demo test test-quick compile-kernels lint docs wheel sdist hf-kernels sanitize old-processor aarch64 bench gpu study clean

demo: $(STAMP)
	$(VENV)/bin/stmae demo --output $(OUTPUT)

# A file's tests stay in one process, for they share fixtures. A thread each, for threads of several processes would wait for each
# other; the tests of ops set two. Waiting threads sleep.
PARALLEL = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
JOBS ?= 2

test: $(STAMP)
	$(PARALLEL) $(VENV)/bin/python -m pytest tests -n $(JOBS) --dist loadfile

QUICK = $(addprefix tests/,ops/test_gather_tokens.py ops/test_restore_tokens.py ops/test_random_masking.py ops/test_patch_loss.py \
	models/test_masking.py training/data/test_clips.py training/test_recipes.py package/test_imports.py)

test-quick: $(STAMP)
	$(PARALLEL) $(VENV)/bin/python -m pytest $(QUICK) -n $(JOBS) --dist loadfile

compile-kernels: $(STAMP)
	$(VENV)/bin/python -m pytest tests/kernels/test_compiled.py --every-target

lint: $(STAMP)-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)
	$(VENV)/bin/mypy

docs: $(STAMP)-dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

# torch's libraries are not packed: the wheel loads those of the torch that is installed.
wheel: $(STAMP)-dev
	rm -rf build/wheel
	$(VENV)/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH='$(abspath $(VENV))/bin':"$$PATH" $(VENV)/bin/auditwheel repair --exclude 'libtorch*.so' --exclude libc10.so --wheel-dir dist build/wheel/*.whl
	$(VENV)/bin/twine check --strict dist/*.whl

sdist: $(STAMP)-dev
	$(VENV)/bin/python -m build --sdist --no-isolation --outdir dist .
	$(VENV)/bin/twine check --strict dist/*.tar.gz

hf-kernels: $(STAMP)
	$(VENV)/bin/python -m stmae.integrations.hf_kernels build/hf-kernels

# Built beside the extension that is in use. Without optimisation, which would take the compiler several times as long.
SANITIZE = -fsanitize=address,undefined
RUNTIMES = $(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))
export ASAN_OPTIONS = detect_leaks=0:allocator_may_return_null=1
export UBSAN_OPTIONS = print_stacktrace=1

sanitize: $(STAMP)
	STMAE_CXXFLAGS='-O0 -g1 -fno-omit-frame-pointer $(SANITIZE) -fno-sanitize-recover=undefined' STMAE_LDFLAGS='$(SANITIZE)' \
		$(VENV)/bin/python setup.py -q build --build-base build/sanitize-objects --build-lib build/sanitize
	cd build/sanitize && LD_PRELOAD='$(RUNTIMES)' $(abspath $(VENV))/bin/python -m pytest -q -c ../../pyproject.toml --rootdir ../.. \
		--import-mode=append $(addprefix ../../tests/,ops/test_direct_calls.py ops/test_invalid_input.py ops/test_properties.py \
		training/data/test_pixels.py)

old-processor: $(STAMP)
	qemu-x86_64 -cpu Westmere $(VENV)/bin/python -m tests.support.each_op_once

aarch64: $(STAMP)
	PIP='$(VENV)/bin/python -m pip' tests/support/aarch64.sh

bench: $(STAMP)
	$(VENV)/bin/python -m pytest bench --benchmark-only --results bench-results.json

gpu:
	$(PYTHON) -m bench.gpu

study: $(STAMP)
	$(VENV)/bin/python -m studies.motion --images '$(IMAGES)'

$(STAMP): $(SOURCES)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'$(if $(TRITON), '$(TRITON)')
	$(VENV)/bin/python -c 'import triton' 2>/dev/null || $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check "$(TESTED_TRITON)"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[train,test,bench]'
	touch '$@'

$(STAMP)-dev: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch '$@'

clean:
	rm -rf $(VENV) build *.egg-info stmae/*.so
