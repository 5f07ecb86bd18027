#!/bin/sh
# experiment.sh NAME: one of the paper's claims in miniature. NAME is recurrence, curriculum, depth
# or ablations; `make experiment-NAME` is the way to call it. What it asks and what came out is told
# in doc/experiments.md. Variables: TASK=lookup or overwrite, SEEDS=3 (from 1 on), JOBS=2 trainings
# side by side, STEPS=300 of a training, ROWS=0 (all) tasks to measure with.
#
# A run is a row of the table below, with one seed. It lies in build/experiments/TASK/RUN.SEED until
# it is measured. Then RUN.SEED.tsv is there, and it is not run again. What two experiments share is
# run once.
set -e
name=$1 again="make experiment-$1"
export TASK="${TASK:-lookup}" SEEDS="${SEEDS:-3}" JOBS="${JOBS:-2}" STEPS="${STEPS:-300}"
export ROWS="${ROWS:-0}" OUT="${OUT:-build}" PLACE="${PLACE:-build/experiments}"
[ "$JOBS" = 1 ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # results are the same bits
. test/steps.sh
all=$PLACE/$TASK
[ "$STEPS" = 300 ] || all=$all-$STEPS # runs of other lengths do not mix

# experiment, run, layers as prelude/core/coda, what is held equal to `retrofit`, options of train.
# layers: `plain` is the base itself; +default has PyTorch's adapter instead of [0 | I]; +random
# has random weights instead of the base's.
settings() {
    cat <<'END'
recurrence retrofit      0/1/2         steps
recurrence fixed         0/1/2         flops  --fixed-recurrences 2,4
recurrence base          plain         flops
recurrence base-paper    plain         paper
curriculum retrofit      0/1/2         steps
curriculum linear        0/1/2         steps  --curriculum linear
curriculum none          0/1/2         steps  --curriculum none
curriculum linear-flops  0/1/2         flops  --curriculum linear
curriculum none-flops    0/1/2         flops  --curriculum none
depth      mean-4        0/1/2         steps  --mean-recurrence 4
depth      mean-8        0/1/2         steps  --mean-recurrence 8
depth      mean-16       0/1/2         steps  --mean-recurrence 16
ablations  retrofit      0/1/2         steps
ablations  random        0/1/2+random  steps
ablations  adapter       0/1/2+default steps
ablations  adamw         0/1/2         steps  --optimizer adamw
ablations  ellisadam     0/1/2         steps  --optimizer ellisadam
ablations  throttle      0/1/2         steps  --throttle
ablations  k-1           0/1/2         steps  --backprop-depth 1
ablations  k-2           0/1/2         steps  --backprop-depth 2
ablations  k-8           0/1/2         steps  --backprop-depth 8
ablations  core-0        none/0/1-2    steps
ablations  core-2        0-1/2/none    steps
ablations  core-0-1      none/0-1/2    steps
ablations  core-1-2      0/1-2/none    steps
ablations  core-0-1-2    none/0-2/none steps
END
}

# Every run has these; of two that contradict each other the later one counts. They are the demo's.
common="--seq-len 81 --micro-batch-size ${BATCH:-48} --shuffle --muon-lr 0.01 --lr 0.002
    --warmup 0.05 --cooldown 0.4"
recurrent="--mean-recurrence 6 --backprop-depth 4 --curriculum-warmup 0.6 --state-init zero"
fixture=test/fixtures/lookup/base shapes=8x3,6x4,4x6,3x8

# ---- What all runs of a task share: a pretrained base, programs to train on, tasks --------------

# The shipped base can look up, but it never saw a variable that is assigned twice. So the second
# task's base is trained first: 100 steps, from the shipped one, which leave it something to learn.
prepare() {
    mkdir -p "$all"
    write_to "$all/validation.jsonl" "$OUT/lookup" 512 1001 $asked tasks $kind
    write_to "$all/test.jsonl" "$OUT/lookup" 1024 1002 $asked tasks $kind
    seed=0
    while [ $seed -le "$SEEDS" ]; do # seed 0: what the second base is trained on
        write_to "$all/train.$seed.jsonl" "$OUT/lookup" 30000 $((seed + 100)) $shapes $kind
        unless_there "$all/train.$seed.bin" "$BIN/convert" --tokenize "$all/train.$seed.jsonl" \
            --tokenizer $fixture --to "$all/train.$seed.bin"
        seed=$((seed + 1))
    done
    [ "$TASK" = lookup ] || train_to "${BASE_STEPS:-100}" "$all/base" --model $fixture \
        --data "$all/train.0.bin" $common
}

# ---- One run: surgery, as many steps as are fair, training, measurement -------------------------

# Sets what the table says of a run.
read_setting() { # run
    settings | awk -v run="$1" '$2 == run { $1 = $2 = ""; print; exit }' >"$work/setting"
    read -r layers budget options <"$work/setting" || fail "$1: there is no such run"
}

make_model() { # run, seed: sets $model
    model=$all/$1.$2.model change=${layers#*+} adapter=identity from=$base
    [ $layers != plain ] || model=$base
    [ "$change" != default ] || adapter=default
    if [ "$change" = random ]; then
        from=$all/$1.$2.random
        unless_there "$from" "$BIN/convert" --random $base/config.json --tokenizer $base \
            --to "$from" --seed "$2"
    fi
    prelude=${layers%%/*} core=${layers#*/} coda=${layers##*/}
    [ $layers = plain ] || unless_there "$model" "$BIN/convert" --from "$from" --to "$model" \
        --prelude $prelude --core ${core%/*} --coda ${coda%+*} --adapter-init $adapter --seed "$2"
}

# FLOPs of a training, from the draws that it will make. Ours count everything, the paper's no
# attention, embedding and head.
flops_of() { # which: ours or paper; options of train
    which=$1
    shift
    "$BIN/train" "$@" --out "$all/none" --dry-run | sed -n \
        's/^training  *\([^ ]*\) FLOPs (\([^ ]*\) as the paper.*/\1 \2/p' >"$work/flops"
    read -r ours paper <"$work/flops"
    case $which in paper) echo "$paper" ;; *) echo "$ours" ;; esac
}

# How many steps of these options cost as much as all of `retrofit`: guessed in proportion, twice,
# since steps under a curriculum do not all cost the same.
steps_for() { # which FLOPs; options of train
    which=$1
    shift
    goal=$(flops_of $which --model "$work/reference" --data "$data" $common $recurrent \
        --steps "$STEPS")
    n=$STEPS
    for guess in 1 2; do
        n=$(awk "BEGIN { printf \"%d\", $n * $goal / $(flops_of $which "$@" --steps $n) + 0.5 }")
        [ "$n" -gt 0 ] || n=1
    done
    echo "$n"
}

# From infer's JSON, a row for all tasks and one for each number of hops.
rows_of() { # run, step, split; recurrences; stdin: JSON
    sed -n "s/.*\"step\":$2,.*\"flops\":\([^,]*\),\"paper_flops\":\([^,]*\),.*/\1 \2/p" \
        "$dir/log.jsonl" | tail -n 1 >"$work/spent"
    read -r spent paper <"$work/spent"
    awk -v start="$TASK $1 $seed $2 $3 $spent $paper" -v r="$4" -v RS='{"recurrences":' '
        function value(name) {
            match($0, "\"" name "\":[^],}]+")
            return substr($0, RSTART + length(name) + 3, RLENGTH - length(name) - 3)
        }
        NR > 1 {
            row = start " " (r == "" ? $0 + 0 : r)
            gsub(" ", "\t", row)
            print row "\tall\t" value("acc") "\t" value("loss")
            n = split(substr($0, index($0, "\"hops\":[") + 8), hops, /[],]/)
            for (i = 1; i <= n && hops[i] ~ /^[0-9.e-]+$/; i++)
                print row "\t" i - 1 "\t" hops[i] "\t-"
        }'
}

ask() { # model, tasks, recurrences (a plain model has none)
    set -- "$BIN/infer" --model "$1" --tasks "$2" --rows "$ROWS" --json ${3:+--recurrences "$3"}
    "$@"
}

# Every sixth of the training on the validation tasks at r = 8; the end on the test tasks by
# recurrences; and the base with its middle layer looped, as it is without any recurrent training.
measure() { # run
    some=8 depths=1,2,3,4,5,6,7,8,12,16,24,32
    case $1 in mean-*) depths=$depths,48,64 ;; esac
    [ $layers != plain ] || some='' depths=''
    for checkpoint in "$dir"/step_*; do
        step=$(echo "${checkpoint##*step_}" | sed 's/^0*//')
        # Where it was stopped and went on there is a checkpoint more.
        [ $((step % every)) = 0 ] || [ "$step" = "$steps" ] || continue
        ask "$checkpoint" "$all/validation.jsonl" "$some" | rows_of "$1" "$step" validation '' |
            grep '	all	'
    done
    ask "$dir" "$tasks" "$depths" | rows_of "$1" "$steps" test ''
    [ "$1" = base ] || return 0
    loops='' r=1
    while [ $r -le 32 ]; do
        loops="$loops 1"
        case $r in 1 | 2 | 3 | 4 | 6 | 8 | 16 | 32)
            rm -rf "$work/looped"
            "$OUT/stand_in" "$dir/latest" "$work/looped" 0 $loops 2
            ask "$work/looped" "$tasks" '' | rows_of looped "$steps" test $r
            ;;
        esac
        r=$((r + 1))
    done
}

one() { # run, seed
    dir=$all/$1.$2 data=$all/train.$2.bin
    read_setting "$1"
    make_model "$1" "$2"
    [ $layers = plain ] || options="$recurrent $options"
    steps=$STEPS
    if [ $budget != steps ]; then
        "$BIN/convert" --from "$base" --to "$work/reference" --prelude 0 --core 1 --coda 2
        steps=$(steps_for $budget --model "$model" --data "$data" $common $options)
    fi
    every=$(((steps + 5) / 6))
    train_to "$steps" "$dir" --model "$model" --data "$data" $common $options --seed "$2" \
        --save-every $every --keep 100
    measure "$1" >"$work/rows"
    mv "$work/rows" "$dir.tsv"
    rm -rf "$dir.model" "$dir.random" # and all checkpoints but the last, which may be looked at
    for checkpoint in "$dir"/step_*; do
        [ "$checkpoint" = "$last" ] || rm -r "$checkpoint"
    done
}

# ---- All runs of an experiment ------------------------------------------------------------------

fail() {
    echo "experiment: $*" >&2
    exit 1
}

# Runs that are not there yet, "run seed" a line: first all of the first seed, then the next one.
missing() {
    seed=1
    while [ $seed -le "$SEEDS" ]; do
        settings | awk -v name="$name" '$1 == name { print $2 }' | while read -r run; do
            [ -e "$all/$run.$seed.tsv" ] || echo "$run $seed"
        done
        seed=$((seed + 1))
    done
}

# One line, every second: how many runs are done, where the others are, and how long it will take.
watch_runs() {
    begin=$(date +%s) first=$(missing | wc -l)
    while sleep 1; do
        missing >"$work/missing"
        left=$(wc -l <"$work/missing")
        while read -r run seed; do
            [ ! -e "$all/$run.$seed.log" ] || tail -c 200 "$all/$run.$seed.log" | tr '\r' '\n' |
                sed -n "s|^step \([0-9]*\)/\([0-9]*\) .*|$run.$seed \1 \2|p" | tail -n 1
        done <"$work/missing" | awk -v first="$first" -v left="$left" -v name="$name" \
            -v seconds=$(($(date +%s) - begin)) '
            { part += $2 / $3; now = now "  " $1 " " int(100 * $2 / $3) " %" }
            END {
                ready = first - left + part
                eta = ready > 0 ? seconds * (first - ready) / ready : 0
                printf "\r%s: %d of %d runs%s  ETA %d:%02d\033[K", name, first - left, first, now,
                    eta / 60, eta % 60
            }'
    done
}

unwatch() {
    [ -z "$watcher" ] || kill "$watcher" 2>/dev/null || true
    [ -z "$watcher" ] || printf '\r\033[K'
    watcher=
}

# What the raw rows are, and what the summary's are, is said by their first lines.
summarise() {
    raw=$PLACE/$TASK-$name.runs.tsv summary=$PLACE/$TASK-$name.tsv
    command="# make experiment-$name TASK=$TASK SEEDS=$SEEDS STEPS=$STEPS"
    {
        echo "$command"
        echo "task run seed step split flops paper_flops recurrences hops accuracy loss" |
            tr ' ' '\t'
        settings | awk -v name="$name" '$1 == name { print $2 }' | while read -r run; do
            seed=1
            while [ $seed -le "$SEEDS" ]; do
                cat "$all/$run.$seed.tsv"
                seed=$((seed + 1))
            done
        done
    } >"$raw"
    {
        echo "$command"
        awk -f test/summary.awk "$raw"
    } >"$summary"
    sh test/experiment_charts.sh "$name" "$summary" "$PLACE/$TASK-$name"
}

# The summary on a screen: each run's accuracy on the test tasks by recurrences.
tell() {
    awk -F '\t' -v shown=1,2,4,8,16,32,64 '
        BEGIN {
            count = split(shown, r, ",")
            printf "%-14s %10s", "accuracy", "FLOPs"
            for (i = 1; i <= count; i++) printf "  %13s", "r = " r[i]
        }
        $4 != "test" || $8 != "all" { next }
        $2 != run { printf "\n%-14s %10.3g", run = $2, $5 }
        $7 == 0 { at = 1 }
        $7 > 0 { for (at = 1; at <= count && r[at] != $7; at++) continue }
        at <= count { printf "  %.3f ± %5s", $9, $10 }
        END { print "" }' "$summary"
    printf '\n%s\n' "$raw" "$summary" "$PLACE/$TASK-$name"*.svg
}

work=$(mktemp -d) || exit 1
watcher=
trap 'goes_on $?; rm -rf "$work"' EXIT
case $TASK in
lookup) kind='' asked=3x8 base=$fixture tasks=${fixture%/*}/tasks.jsonl ;;
overwrite) kind=overwrite asked=6x4 base=$all/base/latest tasks=$all/test.jsonl ;;
*) fail "TASK=$TASK: the tasks are lookup and overwrite" ;;
esac
if [ $# -eq 3 ]; then # one run, started below
    log=$all/$2.$3.log
    # A step that fails ends the script. What it said last is the reason; 255 stops xargs.
    ended() { # exit code, run and seed
        rm -rf "$work"
        case $1 in
        0) [ -t 3 ] || echo "$name: $2 is ready" >&3 ;;
        130) ;; # told to stop
        *)
            reason=$(grep -v '^$' "$log" | tail -n 1)
            echo "experiment: $2 failed: $reason (all that it said: $log)" >&4
            exit 255
            ;;
        esac
    }
    trap 'ended $? $run.$seed' EXIT
    run=$2 seed=$3
    exec 3>&1 4>&2 >"$log" 2>&1
    one "$run" "$seed"
    exit
fi
settings | grep -q "^$name " || fail "$name: there are recurrence, curriculum, depth, ablations"
prepare >"$work/prepared" 2>&1 || fail "$(tail -n 1 "$work/prepared")"
if [ -t 1 ]; then
    watch_runs &
    watcher=$!
    trap 'code=$?; unwatch; goes_on $code; rm -rf "$work"' EXIT
fi
if [ -n "$(missing)" ]; then
    missing | xargs -P "$JOBS" -n 2 sh "$0" "$name" 2>"$work/stderr" || {
        grep '^experiment:' "$work/stderr" >&2 || cat "$work/stderr" >&2
        exit 1
    }
fi
unwatch
summarise
tell
