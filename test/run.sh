#!/bin/sh
# Runs the test programs named as arguments, the shell tests, and beside them the GPU's tests on the
# emulator; adds up their "N passed, N failed" lines. The emulator's threads run in an order drawn
# from a seed: another every day, the same all day.
passed=0 failed=0
export GOMP_SPINCOUNT=1000 # two programs run at a time: waiting threads must not take a core
beside=$(mktemp -d) || exit 1
trap 'rm -rf "$beside"' EXIT
export EMULATOR_ORDER=2 EMULATOR_SEED=${EMULATOR_SEED:-$(date +%Y%m%d)}
emulated() {
    OMP_NUM_THREADS=1 "$OUT/$1" >"$beside/$1" 2>&1
    echo $? >"$beside/$1.code"
}
# TRIALS: fewer shapes. A build under the sanitizers has no races_test_ops, in which every access is
# checked for races; both take long.
(
    emulated test_emulator
    [ -e "$OUT/races_test_ops" ] || export TRIALS=7
    emulated emulated_test_ops
    emulated emulated_test_gpu
    [ ! -e "$OUT/races_test_ops" ] || EMULATOR_ORDER=0 TRIALS=10 emulated races_test_ops
    [ ! -e "$OUT/races_bytes" ] || emulated races_bytes
) &
count() { # name, exit code, output
    printf '%s\n' "$3"
    counts=$(printf '%s\n' "$3" |
        sed -n 's/^.* \([0-9]*\) passed, \([0-9]*\) failed$/\1 \2/p' | tail -n 1)
    if [ -z "$counts" ]; then # crashed before it could count
        echo "FAILED $1: exit code $2 without a result"
        counts="0 1"
    fi
    passed=$((passed + ${counts% *}))
    failed=$((failed + ${counts#* }))
    if [ "$2" -ne 0 ] && [ "${counts#* }" -eq 0 ]; then # no check failed, but the program did
        echo "FAILED $1: exit code $2"
        failed=$((failed + 1))
    fi
}
for test in "$@" make demos experiments library compilers readme contents keys device runs outputs resume plot \
    large gpu_report_test; do
    case $test in
    */*) set -- "$test" ;;
    *) set -- sh "test/$test.sh" ;;
    esac
    out=$(
        # This one's models are so small that a second thread waits more than it works.
        case $test in */test_thinking) export OMP_NUM_THREADS=1 ;; esac
        case $test in large) export MODELS=small ;; esac # the others are for make test-large
        "$@" 2>&1
    )
    count "$*" $? "$out"
done
wait
for code in "$beside"/*.code; do
    output=$(cat "${code%.code}")
    count "$(basename "$code" .code) (EMULATOR_SEED=$EMULATOR_SEED)" "$(cat "$code")" "$output"
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
