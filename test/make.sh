#!/bin/sh
# The Makefile: what other flags alter is compiled anew and nothing else is; clean spares what was
# trained. The sources are stand-ins, and so is nvcc.
. test/check.sh
tree=$work/tree
mkdir -p "$tree/test"
cp Makefile "$tree"
for program in convert train infer; do echo 'int main(void) { return 0; }' >"$tree/$program.c"; done
: >"$tree/retrofit.h"
: >"$tree/retrofit_cuda.cu"
cat >"$work/nvcc" <<'END'
#!/bin/sh
for last; do :; done
echo 'int on_gpu;' | cc -x c -c - -o "$last"
END
unset CC CFLAGS MAKEFLAGS MFLAGS MAKEOVERRIDES MAKELEVEL NVCC SAN STRICT OPENMP MARCH CUDA
printf '#!/bin/sh\nexec cc "$@"\n' >"$work/cc"
chmod +x "$work/nvcc" "$work/cc"

# What make with these variables compiles, by the names of the files that it writes.
compiles() { # names, variables
    expected=$1
    shift
    make -C "$tree" "$@" >"$work/made" 2>&1 || {
        cat "$work/made"
        return 1
    }
    is "$(sed -n 's/.* -o \([^ ]*\).*/\1/p' "$work/made" | sort | tr '\n' ' ')" "$expected"
}
own=build/retrofit_cuda_own.o cublas=build/retrofit_cuda.o programs="convert infer train "
set -- NVCC="$work/nvcc" CUARCH= CUDA_HOME=/nowhere
check "all" compiles "$programs" CUDA=0
check "nothing has changed" compiles "" CUDA=0
check "other CFLAGS" compiles "$programs" CUDA=0 CFLAGS=-O1
check "CFLAGS with quotes" compiles "$programs" CUDA=0 CFLAGS="-DA='\"b c\"'"
check "the same again" compiles "" CUDA=0 CFLAGS="-DA='\"b c\"'"
check "another compiler" compiles "$programs" CUDA=0 CC="$work/cc"
refuses_cpp() {
    ! make CUDA=0 CC=g++ >"$work/made" 2>&1 && grep -q 'retrofit is C: give CC=gcc' "$work/made"
}
check "a C++ compiler" refuses_cpp
check "MARCH" compiles "$programs" CUDA=0 MARCH=-mtune=generic
check "without OpenMP" compiles "$programs" CUDA=0 MARCH=-mtune=generic OPENMP=
check "STRICT" compiles "$programs" CUDA=0 MARCH=-mtune=generic OPENMP= STRICT=1
check "as at first" compiles "$programs" CUDA=0
check "with a GPU's file" compiles "$cublas infer train " "$@" CUBLAS=1
check "nothing has changed there" compiles "" "$@" CUBLAS=1
check "without cuBLAS" compiles "$own infer train " "$@" CUBLAS=0
check "with cuBLAS again" compiles "infer train " "$@" CUBLAS=1
check "nvcc's flags" compiles "$cublas $programs" "$@" CUBLAS=1 STRICT=1
check "without a GPU's file" compiles "infer train " CUDA=0 STRICT=1
check "with it again" compiles "infer train " "$@" CUBLAS=1 STRICT=1

there() { for path; do [ -e "$tree/$path" ] || return 1; done; }
gone() { for path; do [ ! -e "$tree/$path" ] || return 1; done; }
mkdir -p "$tree/build/demo/run" "$tree/build/san" "$tree/local/smollm2"
check "make clean" make -C "$tree" clean
check "it removes what was compiled" gone convert train infer build/flags_c build/san
check "it spares what was trained" there build/demo/run local/smollm2
check "make distclean" make -C "$tree" distclean
check "it removes all" gone build local
check "make clean where nothing is" make -C "$tree" clean
check "it makes nothing" gone build
printf '%-24s %d passed, %d failed\n' make $passed $failed
[ $failed -eq 0 ]
