#!/bin/sh
# make experiment-NAME in miniature: two steps of two rows, one seed, eight tasks. That each one
# runs and writes what it should, that nothing is run twice, what an error says, and the summary's
# arithmetic. It needs the three programs, lookup and stand_in.
. test/check.sh
export PLACE="$work/experiments" SEEDS=1 STEPS=2 ROWS=8 BATCH=2 JOBS=2 BASE_STEPS=1
export BIN="${BIN:-.}" OUT="${OUT:-build}"
TAB=$(printf '\t')
all=$PLACE/lookup-2

experiment() { # name; what it says is in shown and stderr
    sh test/experiment.sh "$1" >"$work/shown" 2>"$work/stderr" || {
        cat "$work/stderr"
        false
    }
}
rows() { # experiment, run, pattern of what follows the step, number of rows
    file=$PLACE/${TASK:-lookup}-$1.tsv
    is "$(grep -c "^[a-z]*$TAB$2$TAB[0-9]*$TAB$3" "$file")" "$4"
}
raw_is_summarised() { # experiment: one seed, so row for row
    is "$(grep -vc '^#' "$PLACE/lookup-$1.runs.tsv")" "$(grep -vc '^#' "$PLACE/lookup-$1.tsv")" &&
        is "$(head -n 1 "$PLACE/lookup-$1.tsv")" \
            "# make experiment-$1 TASK=lookup SEEDS=1 STEPS=2"
}
drawn() { # files
    for file; do
        tail -n 1 "$PLACE/$file" | grep '^</svg>$' && ! grep 'nan\|inf"' "$PLACE/$file" &&
            grep '<circle\|<rect' "$PLACE/$file" || return 1
    done
}
numbers='[0-9.e+]*'
of_test="test$TAB$numbers$TAB$numbers$TAB[0-9]*${TAB}all$TAB"

# ---- Each experiment ----------------------------------------------------------------------------
check "recurrence" experiment recurrence
check "its runs are told" is "$(grep -c ' is ready$' "$work/shown")" 4
for run in retrofit:12 fixed:12 base:1 base-paper:1 looped:8; do
    check "accuracy by recurrences" rows recurrence ${run%:*} "$of_test" ${run#*:}
done
check "and while training" rows recurrence retrofit validation 2
check "raw numbers" raw_is_summarised recurrence
check "pictures" drawn lookup-recurrence.svg lookup-recurrence-hops.svg
# What a run spent may differ from what `retrofit` did by half a step, and a rounded digit.
equal() { # run, column of the FLOPs
    awk -F '\t' -v run="$1" -v column="$2" '
        $4 == "test" && $2 == "retrofit" { goal = $column }
        $4 == "test" && $2 == run { spent = $column; steps = $3 }
        END {
            off = spent > goal ? spent - goal : goal - spent
            print run, spent, goal, steps
            exit !(steps > 1 && off <= 0.51 * spent / steps + 0.01 * goal)
        }' "$PLACE/lookup-recurrence.tsv"
}
check "equal FLOPs" equal base 5
check "equal FLOPs by the paper's count" equal base-paper 6
again() {
    experiment recurrence && is "$(grep -c " is ready" "$work/shown")" 0
}
check "nothing is run again" again
some() {
    rm "$all/fixed.1.tsv"
    experiment recurrence && is "$(grep " is ready" "$work/shown")" "recurrence: fixed.1 is ready"
}
check "what is missing is" some
check "the training is not" grep 'is trained already' "$all/fixed.1.log"

check "curriculum" experiment curriculum
check "it shares a run" is "$(grep -c ' is ready$' "$work/shown")" 4
for run in retrofit linear none linear-flops none-flops; do
    check "accuracy by recurrences" rows curriculum $run "$of_test" 12
done
check "raw numbers" raw_is_summarised curriculum
check "picture" drawn lookup-curriculum.svg
check "depth" experiment depth
for mean in 4 8 16; do check "up to 64" rows depth mean-$mean "$of_test" 14; done
check "pictures" drawn lookup-depth.svg lookup-depth-hops.svg
check "ablations" experiment ablations
check "each of them" is "$(grep -c "$TAB$of_test" "$PLACE/lookup-ablations.tsv")" $((14 * 12))
check "picture" drawn lookup-ablations.svg
export TASK=overwrite
check "the second task" experiment recurrence
check "its base is trained first" [ -e "$PLACE/overwrite-2/base/step_00000001" ]
check "accuracy by recurrences" rows recurrence retrofit "$of_test" 12
export TASK=lookup
refuses() { # what it says, command
    said=$1
    shift
    ! "$@" >"$work/shown" 2>"$work/stderr" && cat "$work/stderr" &&
        is "$(grep -vc '^$\|^Stopped before the end' "$work/stderr")" 1 &&
        grep -qF "$said" "$work/stderr"
}
real() { # the same road on another model and text
    mkdir -p "$work/real" && cp -r test/fixtures/lookup/base "$work/real" &&
        "$OUT/lookup" 60 1 8x3 >"$work/real/train.jsonl" &&
        "$OUT/lookup" 9 2 8x3 >"$work/real/val.jsonl" &&
        DIR="$work/real" LAYERS='--prelude 0 --core 1 --coda 2' T=40 \
            sh test/experiment_smollm2.sh && rm -r "$work/real"
}
check "a real model" real
check "its losses" is "$(cut -f 1,3 "$PLACE/smollm2.tsv" | tr '\t\n' ': ')" \
    "$(printf '%s ' '# make experiment-smollm2 STEPS=2' run:recurrences source:0 base:0 \
        retrofit:1 retrofit:2 retrofit:4 retrofit:8 retrofit:16 retrofit:32)"
check "without its files" refuses "real/base is not there: make smollm2 downloads it" \
    env DIR="$work/real" sh test/experiment_smollm2.sh

# ---- Errors -------------------------------------------------------------------------------------
check "an unknown experiment" refuses "experiment: nothing: there are" \
    sh test/experiment.sh nothing
check "an unknown task" refuses "TASK=chess: the tasks are lookup and overwrite" \
    env TASK=chess sh test/experiment.sh depth
mkdir "$work/bin"
for program in convert infer; do ln -s "$(cd "$BIN" && pwd)/$program" "$work/bin"; done
printf '#!/bin/sh\necho "train: the disk is full" >&2\nexit 1\n' >"$work/bin/train"
chmod +x "$work/bin/train"
rm "$all/mean-8.1.tsv" "$PLACE/lookup-depth.tsv"
rm -r "$all/mean-8.1"
check "a step that fails" refuses "experiment: mean-8.1 failed: train: the disk is full" \
    env BIN="$work/bin" sh test/experiment.sh depth
check "no table then" [ ! -e "$PLACE/lookup-depth.tsv" ]
check "no rows of it" [ ! -e "$all/mean-8.1.tsv" ]
check "once it works: the rest" experiment depth
check "and the table" [ -e "$PLACE/lookup-depth.tsv" ]

# ---- Mean and standard error --------------------------------------------------------------------
# Of 1, 2, 3, 4: 2.5 ± √(5/3)/2 = .645. Losses that differ in the seventh digit keep theirs.
for seed in 1 2 3 4; do
    printf 'lookup\ta\t%s\t9\ttest\t1e9\t2e9\t8\tall\t%s\t%s\n' $seed $seed 3.000000$seed
    printf 'lookup\ta\t%s\t9\ttest\t1e9\t2e9\t8\t0\t0.5\t-\n' $seed
    [ $seed != 1 ] || printf 'lookup\tb\t1\t9\ttest\t1e9\t2e9\t8\tall\t0.25\t1\n'
done | awk -f test/summary.awk >"$work/summary"
row() { # what identifies it, the numbers
    is "$(grep "$1" "$work/summary" | cut -f 9- | tr '\t' ' ')" "$2"
}
check "mean and error" row "^lookup${TAB}a.*all" "2.5 0.645 3 6.45e-08 4"
check "no error of equal ones, no loss" row "^lookup${TAB}a.*8${TAB}0" "0.5 0 - - 4"
check "no error of one" row "^lookup${TAB}b" "0.25 - 1 - 1"
printf '%-24s %d passed, %d failed\n' "make experiment-…" $passed $failed
[ $failed -eq 0 ]
