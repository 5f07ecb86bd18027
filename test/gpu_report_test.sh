#!/bin/sh
# gpu_report.sh without a GPU: every stage over the emulator in miniature, beside stand-ins for
# nvidia-smi, PyTorch and compute-sanitizer; then tests that fail, that hang, stages for which no
# time is left, programs that do not start, no PyTorch, no GPU, an interruption.
. test/check.sh
OUT=${OUT:-build} here=$(pwd)
export OMP_NUM_THREADS=1
unset CUDA_HOME CUDA_LIB NVCC SANITIZER LIMITS TRIALS MAKE CUDA_LAUNCH_BLOCKING
mkdir "$work/bin" "$work/said_before"
program() { # file; its text from stdin
    {
        echo '#!/bin/sh'
        cat
    } >"$1"
    chmod +x "$1"
}
program "$work/bin/nvidia-smi" <<'END'
case $* in
*-L*) echo "GPU 0: Emulated (UUID: none)" ;;
*driver_version*) echo "580.1, 345 MHz, 1980 MHz, 3201 MHz, 700 W, 1 GiB" ;;
*power.draw*) echo "1755, 99, 612.5, 60" ;;
*name*) echo "Emulated" ;;
esac
END
# PyTorch at speeds that are easily told from ours, with the depths that our miniature draws.
program "$work/bin/python3" <<'END'
case $* in
*import\ torch* | *import\ sys*) exit 0 ;;
*"--mode authors"*train* | *train*"--mode authors"*)
    echo '{"bench": "train", "tokens_per_s": 1.0, "peak_memory_GB": 1e-9, "torch": "0.1"}' ;;
*--draw*)
    echo '{"bench": "draws", "draws": "0,1 1,2 1,4", "wall_s": 9.0, "steady_wall_s": 3.0,' \
        '"graphs": 5, "tokens_per_s": 1e6, "tokens_per_s_with_compilation": 1.0}' ;;
*decode*) echo '{"bench": "decode", "end_to_end_tokens_per_s": 5, "tokens_per_s": 1e6}' ;;
*ops*)
    for name in qkv proj fc down; do
        echo "{\"op\": \"gemm\", \"name\": \"$name\", \"forward_tflops\": 1e3," \
            '"dgrad_tflops": 1e3, "wgrad_tflops": 1e3}'
    done
    for name in flash cudnn; do
        echo "{\"op\": \"sdpa\", \"name\": \"$name\", \"kv_expanded\": false," \
            '"forward_tflops": 1e3, "backward_tflops": 1e3}'
    done ;;
*) exit 1 ;;
esac
END
program "$work/bin/compute-sanitizer" <<'END'
while [ "${1#-}" != "$1" ]; do
    case $1 in --report-api-errors | --tool | --error-exitcode) shift ;; esac
    shift
done
exec "$@"
END
program "$work/bin/make" <<'END' # programs that "were not there" come from another folder
echo "make $*"
for file; do
    case $file in */new_*) ln -s "${file%new_*}built_${file##*new_}" "$file" || exit 2 ;; esac
done
END
emulated() { # program
    program "$work/built_$1" <<END
exec "$here/$OUT/emulated_$1" "\$@"
END
}
emulated test_ops
program "$work/built_bench_cuda" <<END # with a speed where what is tiny has none
said=\$("$here/$OUT/emulated_bench_cuda" "\$@")
code=\$?
echo "\$said" | sed 's| 0[.]0 TFLOP/s| 0.5 TFLOP/s|'
exit \$code
END
program "$work/built_test_gpu" <<'END' # the real one takes a minute over the emulator
echo "model on a GPU           12 passed, 0 failed"
END
# What another run says: after the first, what that one said.
program "$work/built_own_bench_cuda" <<END
exec "$work/built_bench_cuda" "\$@"
END
replay() {
    program "$work/$1" <<END
while [ \$# -gt 1 ]; do
    [ "\$1" != --only ] || only=\$2
    shift
done
cat "$work/said_before/\$only"
END
}
report=$work/report/report.md
run() { # what to set, seconds
    set_to=$1
    rm -rf "$work/report" "$work/report.old"
    env MINIATURE=1 BUILT="$work/built_" PATH="$work/bin:$PATH" $set_to \
        sh test/gpu_report.sh "$work/report" "$2" >"$work/stdout" 2>"$work/stderr"
    code=$?
}
has() { grep -qE -- "$1" "${2:-$report}" || { grep -E "${3:-^}" "${2:-$report}" && false; }; }
stage_is() { has "^\| $1 \| $2 \|" "$report" "^\| $1"; } # name, result
goal_is() { has "^$1.*$2" "$work/stdout" "^$1"; }      # its beginning, a pattern

# ---- Everything works
run "" 300
check "all stages" is "$code" 0
check "it says nothing on stderr" is "$(cat "$work/stderr")" ""
for name in "operations against fp64" training decoding "matrix products" attention memcheck \
    "models and training steps against the authors' numbers" "the same bits in 20 runs" \
    "PyTorch, training the authors' way" "torch.compile, training with drawn depths" racecheck \
    "PyTorch, decoding the authors' way" "PyTorch, products and attention"; do
    check "stage: $name" stage_is "$name" ok
done
check "no other" is "$(grep -cE '^\| .* \| (ok|FAILED|stopped|skipped) \|' "$report")" 13
check "the device" has "^\| device \| Emulated"
check "the driver" has "580.1, 345 MHz"
check "the clocks" has "1755 / 1755 / 1755 MHz, at most 61[23] W"
check "the products" has "^\| matrix products by \| our own kernels"
check "PyTorch's version" has "^\| PyTorch \| 0.1"
check "the commit" has "commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
check "tables of the benchmark" has "^\| AdamW \| \(1,2\) \| all \| [0-9]"
check "the limits once" is "$(grep -c '^### Limits' "$report")" 1
check "beside PyTorch" has "^\| the same, with .*: 5 graphs, in 9.0 s instead of 3.0 \| [0-9]+ \| 1.0"
for log in machine tests bench peer sanitizer clocks; do
    check "$log.log" is "$([ -s "$work/report/$log.log" ] && echo there)" there
done
check "ten goals" is "$(sed '1,/^### Goals/d' "$report" | grep -c '^| ')" 11
goal="training, times the authors' PyTorch"
check "a goal that is met" goal_is "$goal" "[0-9]; 1.5: met; 2: met$"
check "one that is not" goal_is "training, times torch.compile" \
    "with the time it took to compile\); 1.1: not met; 1.3: not met$"
check "one of less" goal_is "training memory, share" ": [0-9.]+; .6: met; .5: met$"
check "decoding" goal_is "decoding at r = 4, times" "; 5: not met; 10: not met$"
check "FA2 and cuDNN" goal_is "attention backward" ".75 of FA2: not met; 1.0 of cuDNN: not met$"
check "products beside PyTorch's" goal_is "our own products" \
    "12 shapes of PyTorch's cuBLAS\); .60: not met; 1.0: not met$"
check "what can't be measured" goal_is "drafts through the depths" "not measured \(they need a"

# ---- Tests that fail and hang, no PyTorch, cuBLASLt; the benchmark says what it said before
for only in training decoding matmul attention determinism; do
    awk -v only="--only $only" 'on && /^### / { exit } on && !/^\$ /; index($0, only) { on = 1 }' \
        "$work/report/bench.log" |
        sed 's|^matrix products by .*|matrix products by /lib/libcublasLt.so.13|' \
            >"$work/said_before/$only"
done
check "what the benchmark said" has "^Depths drawn" "$work/said_before/training"
replay built_own_bench_cuda
replay built_bench_cuda
program "$work/built_own_test_ops" <<'END'
exit 0
END
program "$work/built_test_ops" <<'END'
[ "$1" != cast ] || exit 0
line="cuda matmul_forward, N 3 I 4 O 5: out[7] is 1, should be 2: the first of 3 wrong ones of 15"
[ -z "$CUDA_LAUNCH_BLOCKING" ] || line="cuda $1, N 9: one by one"
printf 'FAILED %s\noperations on a GPU 1 passed, 2 failed\n' "$line"
exit 1
END
program "$work/built_test_gpu" <<'END'
echo "tiny n2k3: as far as it came"
exec sleep 60
END
program "$work/bin/python3" <<'END'
exit 1
END
run LIMITS=1 100
check "a test fails" is "$code" 1
check "it is said" stage_is "operations against fp64" FAILED
check "where" has "^    FAILED cuda matmul_forward, N 3 I 4 O 5: out\[7\] is 1, should be 2"
again="operations against fp64, launches one by one: matmul_forward"
check "once more, one by one" stage_is "$again" FAILED
check "and what that says" has "^    FAILED cuda matmul_forward, N 9: one by one"
models="models and training steps against the authors' numbers"
check "a test hangs" stage_is "$models" stopped
check "how far it came" has "^    tiny n2k3: as far as it came"
check "that one by one too" stage_is "$models, launches one by one" stopped
check "what comes after it" stage_is training ok
check "and after that" stage_is racecheck ok
check "no PyTorch" stage_is "PyTorch, decoding the authors' way" skipped
check "a goal says so" goal_is "$goal" "not measured \(PyTorch, tr.*skipped, python3 has no torch"
check "cuBLASLt" has "^\| matrix products by \| /lib/libcublasLt.so.13"
check "our own beside it" goal_is "our own products" ": 1 \([0-9]* shapes\); .60: met; 1.0: met$"

# ---- No time, programs that don't start, an interruption, no GPU
program "$work/built_test_ops" </dev/null # a busy machine takes longer than LIMITS for the real one
program "$work/built_test_gpu" </dev/null
run LIMITS=20 7
check "no time is left" is "$code" 0
check "for training" stage_is training skipped
check "and why" has "^\| training \| skipped \| *\| [0-9]+ s were left, it wants 6"
check "but for decoding" stage_is decoding ok
run "LIMITS=1 BUILT=$work/new_ MAKE=$work/bin/make" 100
check "programs that are not there" is "$code" 0
check "are built" stage_is building ok
check "all of them" has "^make  *-j[0-9]* $work/new_test_ops .*new_bench_cuda" \
    "$work/report/build.log"
rm -f "$work"/new_*
program "$work/new_test_ops" <<'END'
echo "version 'GLIBC_2.99' not found" >&2
exit 1
END
run "LIMITS=1 BUILT=$work/new_ MAKE=false" 100
check "nor can be built" is "$code" 1
check "it is told" stage_is building FAILED
check "what is missing" has "new_bench_cuda is not there"
program "$work/bin/false" <<'END'
echo "make $*"
rm -f "${BUILT}test_ops"
END
run "LIMITS=1 BUILT=$work/new_ MAKE=$work/bin/false" 100
check "those that don't start are built whatever their age" has "^make -B" "$work/report/build.log"

program "$work/built_test_gpu" <<END
echo \$\$ >"$work/pid"
exec sleep 60
END
interrupt() {
    rm -rf "$work/report"
    MINIATURE=1 BUILT="$work/built_" PATH="$work/bin:$PATH" sh test/gpu_report.sh \
        "$work/report" 100 >/dev/null 2>&1 &
    pid=$!
    tries=0
    while [ ! -s "$work/pid" ] && [ $tries -lt 200 ]; do
        sleep 0.1
        tries=$((tries + 1))
    done
    kill $pid
    wait $pid
}
interrupt
check "interrupted" is $? 130
check "it is in the report" has "^It was interrupted"
sleep 0.2
check "nothing goes on" is "$(kill -0 "$(cat "$work/pid")" 2>/dev/null && echo on)" ""

no_gpu() { # a pattern
    is $code 3 && is "$(wc -l <"$work/stderr")" 1 && has "^gpu_report: no GPU: $1" "$work/stderr" &&
        is "$(cat "$work/stdout")" "" && [ ! -e "$work/report" ]
}
emulated test_ops
run EMULATOR_DEVICES=0 100
check "no GPU for CUDA" no_gpu "CUDA finds none"
program "$work/bin/nvidia-smi" <<'END'
echo "No devices were found"
exit 6
END
run "" 100
check "no GPU at all" no_gpu "nvidia-smi names none"
printf '%-24s %d passed, %d failed\n' "make gpu-report" $passed $failed
[ $failed -eq 0 ]
