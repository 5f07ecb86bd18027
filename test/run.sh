#!/bin/sh
# Runs the test programs named as arguments, the shell tests, and beside them the GPU's tests on the emulator; adds up their "N passed, N failed"
# lines. The emulator's threads run in an order drawn from a seed: another every day, the same all day.
passed=0 failed=0
export GOMP_SPINCOUNT=1000 # two programs at a time: waiting threads must not take the other's core
beside=$(mktemp -d) || exit 1
trap 'rm -rf "$beside"' EXIT
export EMULATOR_ORDER=2 EMULATOR_SEED=${EMULATOR_SEED:-$(date +%Y%m%d)}
# under the sanitizers, and where every access is checked for races, fewer shapes
emulated() { OMP_NUM_THREADS=1 "$OUT/$1" >"$beside/$1" 2>&1; echo $? >"$beside/$1.code"; }
(
    emulated test_emulator
    [ -e "$OUT/races_test_ops" ] || export TRIALS=14
    emulated emulated_test_ops
    emulated emulated_test_gpu
    [ ! -e "$OUT/races_test_ops" ] || EMULATOR_ORDER=0 TRIALS=10 emulated races_test_ops
) &
count() { # name, exit code, output
    printf '%s\n' "$3"
    counts=$(printf '%s\n' "$3" | sed -n 's/^.* \([0-9]*\) passed, \([0-9]*\) failed$/\1 \2/p' | tail -n 1)
    if [ -z "$counts" ]; then # crashed before it could count
        echo "FAILED $1: exit code $2 without a result"
        counts="0 1"
    fi
    passed=$((passed + ${counts% *})) failed=$((failed + ${counts#* }))
    [ "$2" -eq 0 ] || [ "${counts#* }" -ne 0 ] || { echo "FAILED $1: exit code $2"; failed=$((failed + 1)); }
}
for t in "$@" "sh test/compilers.sh" "sh test/readme.sh" "sh test/contents.sh" "sh test/device.sh" "sh test/runs.sh" "sh test/resume.sh" "sh test/plot.sh"; do
    out=$($t 2>&1)
    count "$t" $? "$out"
done
wait
for code in "$beside"/*.code; do
    count "$(basename "$code" .code) (EMULATOR_SEED=$EMULATOR_SEED)" "$(cat "$code")" "$(cat "${code%.code}")"
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
