#!/bin/sh
# make fuzz: libFuzzer on every target, for SECONDS_IN_ALL together. What it keeps in
# build/fuzz/corpus is where the next run goes on. Ends with the number of inputs.
corpus=build/fuzz/corpus
mkdir -p $corpus build/fuzz/log
inputs=0 failed=0
for program in convert infer train; do
    SEEDS=$corpus "$OUT/fuzz_$program" >build/fuzz/log/seeds || exit 1
done
list=$(for program in convert infer train; do
    LIST=1 "$OUT/fuzz_$program" | sed -n "s/^target /$program /p"
done)
targets=$(printf '%s\n' "$list" | wc -l)
seconds=$(((SECONDS_IN_ALL + targets - 1) / targets))
run() { # program, target
    log=build/fuzz/log/$1-$2
    ASAN_OPTIONS=detect_leaks=0 TARGET=$2 build/fuzz/$1 -max_total_time=$seconds -max_len=65536 \
        -timeout=20 -rss_limit_mb=2048 -print_final_stats=1 -artifact_prefix=build/fuzz/$1-$2- \
        $corpus/$1-$2 >"$log" 2>&1 || {
        echo "FAILED $1 $2: see $log"
        failed=$((failed + 1))
    }
    count=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    reached=$(sed -n 's/.*cov: \([0-9]*\) .*/\1/p' "$log" | tail -n 1)
    echo "$1 $2: ${count:-0} inputs, $reached edges"
    inputs=$((inputs + ${count:-0}))
}
while read -r program target; do
    run $program $target
done <<LIST
$list
LIST
echo "$inputs inputs of $targets readers, $failed failed"
[ $failed -eq 0 ]
