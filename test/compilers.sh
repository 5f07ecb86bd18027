#!/bin/sh
# The header and the programs must compile without a warning as C11 and C++17, with every compiler
# that is here, with and without OpenMP, for the machine's own instructions and for plain x86-64's;
# the GPU's file as C++, and by nvcc where that is. (make itself has nvcc compile it for sm_80 and
# sm_90, with cuBLAS; here without.)
passed=0 failed=0
unit=$(mktemp -d) || exit 1
trap 'rm -rf "$unit"' EXIT
printf '#define RETROFIT_IMPLEMENTATION\n#include "retrofit.h"\n' >"$unit/c.c"
printf '#include "retrofit.h"\n#include "retrofit.h"\n' >"$unit/declarations.cpp"
try() {
    if out=$("$@" 2>&1); then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        printf 'FAILED %s\n%s\n' "$*" "$out" | head -n 12
    fi
}
has_openmp() { echo 'int main(void) { return 0; }' | $1 -fopenmp -x c - -o /dev/null 2>/dev/null; }
strict="-O1 -Wall -Wextra -Werror -fsyntax-only -I."
for cc in gcc clang; do
    command -v $cc >/dev/null || continue
    for flags in "" "-march=native" "-march=haswell" "-fopenmp"; do
        [ "$flags" != -fopenmp ] || has_openmp $cc || continue
        try $cc -std=c11 $strict $flags "$unit/c.c"
    done
    for program in convert train infer; do try $cc -std=c11 $strict $program.c; done
    for program in train infer; do try $cc -std=c11 $strict -DRETROFIT_CUDA $program.c; done
done
for cxx in g++ clang++; do
    command -v $cxx >/dev/null || continue
    try $cxx -std=c++17 $strict "$unit/declarations.cpp"
    try $cxx -std=c++17 $strict -fno-strict-aliasing -Wno-unknown-pragmas -x c++ retrofit_cuda.cu
done
if [ -n "$NVCC" ]; then
    for arch in sm_80 sm_90; do
        try "$NVCC" -std=c++17 -O1 -arch=$arch -ptx -DRETROFIT_NO_CUBLAS -Werror all-warnings \
            -Xcompiler -Wall,-Wextra -o "$unit/c.ptx" retrofit_cuda.cu
    done
fi
printf '%-24s %d passed, %d failed\n' compilers $passed $failed
[ $failed -eq 0 ]
