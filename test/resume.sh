#!/bin/sh
# Stopped after any step, train goes on to the bits of the run that never stopped: with every
# optimizer, rows in order and shuffled, and micro-batches of every size that fits.
# The shards have 5, 3 and 3 rows, and a step takes 4. So a shard begins after steps 2 and 4, and
# amid a micro-batch in steps 2 and 5; an epoch ends amid a micro-batch in step 3, between two in
# step 6, and with step 11. 9 of the 12 steps are the curriculum.
. test/check.sh
train=$BIN/train tiny=test/fixtures/tiny/recurrent
export OMP_NUM_THREADS=1
stops="1 2 3 4 5 6 7 8 9 10 11"
case $BIN in *san*) stops="2 3 11" ;; esac # the sanitizers are slow

shard >"$work/whole.bin"
part() { # first row, rows: a shard of them
    head -c 8 "$work/whole.bin"
    printf "\\$(printf %o $(($2 * 17)))\\0\\0\\0" # the number of tokens
    tail -c +13 "$work/whole.bin" | head -c 1012
    tail -c +$((1025 + $1 * 34)) "$work/whole.bin" | head -c $(($2 * 34))
}
mkdir "$work/data"
part 0 5 >"$work/data/a.bin"
part 5 3 >"$work/data/b.bin"
part 8 3 >"$work/data/c.bin"
part 0 11 >"$work/one.bin"

run() { # out, options
    out=$1
    shift
    "$train" --model $tiny --data "$work/data/*.bin" --out "$work/$out" --steps 12 --seq-len 16 \
        --micro-batch-size 2 --batch-size 4 --mean-recurrence 6 --lr 1e-3 --muon-lr 1e-3 \
        --warmup 0.3 "$@"
}
same_steps() { # out, out: their logs and the weights
    for out in "$1" "$2"; do
        sed 's/,"seconds":[0-9.]*//' "$work/$out/log.jsonl" >"$work/$out.log" || return 1
    done
    cmp "$work/$1.log" "$work/$2.log" || return 1
    cmp "$work/$1/latest/model.safetensors" "$work/$2/latest/model.safetensors"
}
same() { # out, out: to the bit
    same_steps "$1" "$2" || return 1
    for file in optimizer.safetensors config.json manifest.json; do
        cmp "$work/$1/latest/$file" "$work/$2/latest/$file" || return 1
    done
}
differ() {
    ! cmp -s "$work/$1/latest/model.safetensors" "$work/$2/latest/model.safetensors"
}

# From the checkpoint of a step, but with a log that goes on behind it, as after a kill -9.
from() { # step, options
    step=$(printf 'step_%08d' "$1")
    shift
    rm -rf "$work/again"
    mkdir "$work/again" || return 1
    cp -a "$work/saving/log.jsonl" "$work/saving/$step" "$work/again" || return 1
    ln -s "$step" "$work/again/latest" || return 1
    run again --resume "$@" && same again through
}
everywhere() { # what, options
    name=$1
    shift
    rm -rf "$work/through" "$work/saving"
    check "$name: in one go" run through "$@"
    check "$name: with checkpoints" run saving --save-every 1 --keep 99 "$@"
    check "$name: the same bits" same saving through
    for stop in $stops; do check "$name: stopped after step $stop" from "$stop" "$@"; done
}

# The FLOPs that a run had spent after a step, or a little less: a budget that this step reaches.
budget() { # step
    sed -n "s/.*\"step\":$1,.*\"flops\":\([^,]*\),.*/\1/p" "$work/through/log.jsonl" |
        awk '{ print $1 * 0.999 }'
}
in_a_row() { # what, options: one run, stopped after each of the steps
    name=$1
    shift
    rm -rf "$work/chain"
    resume=
    for stop in $stops; do
        check "$name: on to step $stop" run chain --flops "$(budget $stop)" $resume "$@"
        checkpoint=$(printf 'step_%08d' "$stop")
        check "$name: stopped there" [ "$(readlink "$work/chain/latest")" = "$checkpoint" ]
        check "$name: and its log" [ "$(wc -l <"$work/chain/log.jsonl")" -eq "$stop" ]
        resume=--resume
    done
    check "$name: the last time" run chain --resume "$@"
    check "$name: the same bits" same chain through
}

for optimizer in adamw muon ellisadam; do
    for shuffle in "" --shuffle; do
        kind="$optimizer, ${shuffle:-in order}"
        everywhere "$kind" --optimizer $optimizer $shuffle
        in_a_row "$kind, time and again" --optimizer $optimizer $shuffle
        rm -rf "$work/last$shuffle"
        mv "$work/through" "$work/last$shuffle"
    done
    check "$optimizer: shuffled, other bits" differ last last--shuffle
done
check "one shard instead of three" run one --optimizer $optimizer --data "$work/one.bin"
check "one shard: the same bits" same_steps one last # the moments' file names the shards
everywhere "no accumulation" --micro-batch-size 4
everywhere "rows one by one" --micro-batch-size 1 --throttle
everywhere "the baseline" --model test/fixtures/tiny/base --shuffle

# The model that the run began with is as large as a checkpoint: who needs the room removes it.
cp -r $tiny "$work/model"
everywhere "its own model" --model "$work/model"
rm "$work/model/model.safetensors"
check "the model's weights are gone" from 6 --model "$work/model"
check "that is said" grep -q "there are no weights any more" "$work/said"
printf '%-24s %d passed, %d failed\n' "resumed to the bit" $passed $failed
[ $failed -eq 0 ]
