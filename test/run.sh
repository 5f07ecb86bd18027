#!/bin/sh
# Runs the test programs named as arguments and the shell tests, and adds up their "N passed, N failed" lines.
passed=0 failed=0
for t in "$@" "sh test/compilers.sh" "sh test/example.sh"; do
    out=$($t 2>&1)
    code=$?
    printf '%s\n' "$out"
    counts=$(printf '%s\n' "$out" | sed -n 's/^.* \([0-9]*\) passed, \([0-9]*\) failed$/\1 \2/p' | tail -n 1)
    if [ -z "$counts" ]; then # crashed before it could count
        echo "FAILED $t: exit code $code without a result"
        counts="0 1"
    fi
    passed=$((passed + ${counts% *})) failed=$((failed + ${counts#* }))
    [ $code -eq 0 ] || [ "${counts#* }" -ne 0 ] || { echo "FAILED $t: exit code $code"; failed=$((failed + 1)); }
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
