#!/bin/sh
# The Makefile: what other flags alter is compiled anew and nothing else is; clean spares what was
# trained. The sources are stand-ins, and so is nvcc.
. test/check.sh
tree=$work/tree
mkdir -p "$tree/test"
cp Makefile "$tree"
for program in convert train infer; do echo 'int main(void) { return 0; }' >"$tree/$program.c"; done
printf '%s\n' '#include <dlfcn.h>' \
    'int main(void) { return !dlopen("libcublasLt.so.13", RTLD_NOW); }' >"$tree/infer.c"
for file in retrofit.h retrofit_ranks.h retrofit_mpi.c; do : >"$tree/$file"; done
: >"$tree/retrofit_cuda.cu"
# A toolkit as it lies in a folder: nvcc, the runtime for linking, cuBLASLt's header and, as from pip,
# nothing but its library with the version in its name.
toolkit() { # folder, folder of its libraries
    mkdir -p "$1/bin" "$1/include" "$1/$2"
    cat >"$1/bin/nvcc" <<'END'
#!/bin/sh
for last; do :; done
echo 'int on_gpu;' | cc -x c -c - -o "$last"
END
    chmod +x "$1/bin/nvcc"
    : >"$1/include/cublasLt.h"
    printf '!<arch>\n' >"$1/$2/libcudart_static.a"
    echo 'int cublas;' | cc -x c -shared -fPIC - -o "$1/$2/libcublasLt.so.13"
}
toolkit "$work/cuda" lib64
toolkit "$work/site-packages/nvidia/cu13" lib
printf '#!/bin/sh\n[ "$1" = -show ] && echo gcc -DOF_MPI -lm\n' >"$work/mpicc"
chmod +x "$work/mpicc"
unset MPI MPICC CC CFLAGS MAKEFLAGS MFLAGS MAKEOVERRIDES MAKELEVEL NVCC SAN STRICT OPENMP MARCH CUDA
unset CUDA_HOME CUDA_LIB CUBLAS CUARCH LIBRARY_PATH LD_LIBRARY_PATH
printf '#!/bin/sh\nexec cc "$@"\n' >"$work/cc"
chmod +x "$work/cc"

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
set -- NVCC="$work/cuda/bin/nvcc" CUARCH=
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
check "for several processes" compiles "train " CUDA=0 MPI=1 MPICC="$work/mpicc"
check "with mpicc's flags" grep -q 'train.c -o train .*retrofit_mpi.c -DOF_MPI -lm' "$work/made"
check "for several processes: nothing has changed" compiles "" CUDA=0 MPI=1 MPICC="$work/mpicc"
check "for one process again" compiles "train " CUDA=0
check "with a GPU's file" compiles "$cublas infer train " "$@" CUBLAS=1
check "nothing has changed there" compiles "" "$@" CUBLAS=1
check "without cuBLAS" compiles "$own infer train " "$@" CUBLAS=0
check "with cuBLAS again" compiles "infer train " "$@" CUBLAS=1
check "nvcc's flags" compiles "$cublas $programs" "$@" CUBLAS=1 STRICT=1
check "without a GPU's file" compiles "infer train " CUDA=0 STRICT=1
check "with it again" compiles "infer train " "$@" CUBLAS=1 STRICT=1

cp "$tree/train.c" "$tree/test/test_ops.c"
for header in test run check; do : >"$tree/test/$header.h"; done
ops=build/cuda_test_ops own_ops=build/cuda_own_test_ops
check "a GPU's test" compiles "$ops " "$@" CUBLAS=1 STRICT=1 $ops
check "the same with our own products" compiles "$ops $own " "$@" CUBLAS=0 STRICT=1 $ops
check "that for compute-sanitizer beside it" compiles "$own_ops $ops " "$@" CUBLAS=1 STRICT=1 \
    $ops $own_ops
check "neither again" compiles "" "$@" CUBLAS=1 STRICT=1 $ops $own_ops

# ---- which toolkit is taken
pip=$work/site-packages/nvidia/cu13
uses() { # CUDA_HOME, folder of libraries, matrix products, command
    expected="for GPUs: CUDA_HOME=$1, libraries in $2, matrix products by $3"
    shift 3
    rm -f "$tree"/build/retrofit_cuda*
    env "$@" >"$work/made" 2>&1 || {
        cat "$work/made"
        return 1
    }
    is "$(grep '^for GPUs' "$work/made")" "$expected" && "$tree/infer"
}
stops() { # what it says in one line, command; nothing is compiled
    expected=$1
    shift
    rm -f "$tree/convert"
    env "$@" >"$work/made" 2>&1 && return 1
    cat "$work/made"
    [ "$(wc -l <"$work/made")" -eq 1 ] || return 1
    grep -qF "$expected" "$work/made" && [ ! -e "$tree/convert" ]
}
set -- make --no-print-directory -C "$tree" CUARCH=
lt=cuBLASLt
check "a toolkit with lib64" uses "$work/cuda" "$work/cuda/lib64" $lt "$@" \
    NVCC="$work/cuda/bin/nvcc"
check "pip's" uses "$pip" "$pip/lib" $lt "$@" NVCC="$pip/bin/nvcc"
check "pip's, over CUDA_HOME" uses "$pip" "$pip/lib" $lt CUDA_HOME="$work/cuda" "$@" \
    NVCC="$pip/bin/nvcc"
check "CUDA_HOME's, over PATH" uses "$pip" "$pip/lib" $lt CUDA_HOME="$pip" \
    PATH="$work/cuda/bin:$PATH" "$@"
check "PATH's" uses "$pip" "$pip/lib" $lt PATH="$pip/bin:$PATH" "$@"
check "by its name alone" uses "$pip" "$pip/lib" $lt PATH="$pip/bin:$PATH" "$@" NVCC=nvcc
check "without cuBLASLt" uses "$pip" "$pip/lib" 'our own kernels' "$@" CUBLAS=0 \
    NVCC="$pip/bin/nvcc"
rm "$pip/include/cublasLt.h"
check "without its header" uses "$pip" "$pip/lib" 'our own kernels' "$@" NVCC="$pip/bin/nvcc"
mv "$pip/lib" "$work/libraries"
check "no libcudart_static.a" stops "no libcudart_static.a below $pip" "$@" NVCC="$pip/bin/nvcc"
check "no nvcc" stops "NVCC=/no/nvcc was not found" "$@" NVCC=/no/nvcc
check "its folder given" uses "$pip" "$work/libraries" 'our own kernels' "$@" \
    NVCC="$pip/bin/nvcc" CUDA_LIB="$work/libraries"
check "CUDA=0 asks for none of it" compiles "infer train " CUDA=0 NVCC="$pip/bin/nvcc" \
    CUDA_HOME=/no
check "nor does make clean" make -C "$tree" clean NVCC="$pip/bin/nvcc"
check "all once more" make -C "$tree" CUDA=0

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
cp test/gpu_report.sh "$tree/test"
mkdir "$work/no_gpu"
printf '#!/bin/sh\nexit 6\n' >"$work/no_gpu/nvidia-smi"
chmod +x "$work/no_gpu/nvidia-smi"
without_gpu() {
    ! PATH="$work/no_gpu:$PATH" make --no-print-directory -C "$tree" gpu-report >"$work/made" 2>&1 &&
        grep -q '^gpu_report: no GPU: .*run it on a machine that has one$' "$work/made" &&
        grep -q 'gpu-report.* 3$' "$work/made" && is "$(wc -l <"$work/made")" 2
}
check "make gpu-report without a GPU" without_gpu
check "it makes nothing either" gone build gpu-report
printf '%-24s %d passed, %d failed\n' make $passed $failed
[ $failed -eq 0 ]
