#!/bin/sh
# (a) and (c) on a real model and real text: SmolLM2-135M retrofitted, and trained on with the same
# FLOPs; the loss on held-out text by recurrences. `make experiment-smollm2` after `make smollm2`,
# which downloads both. STEPS=80 as there; on a GPU STEPS=2500 ROWS=16 EVAL=256 are ten million
# tokens. Variables: DIR, where base, train.jsonl and val.jsonl are; LAYERS, convert's options for
# the surgery; T, tokens in a row.
set -e
dir=${DIR:-local/smollm2} last_step=${STEPS:-80} again="make experiment-smollm2"
place=${PLACE:-build/experiments} rows=${ROWS:-4} T=${T:-256}
. test/steps.sh
for part in base train.jsonl val.jsonl; do
    [ -e "$dir/$part" ] || {
        echo "experiment: $dir/$part is not there: make smollm2 downloads it" >&2
        exit 1
    }
done
here=$place/smollm2-$last_step
mkdir -p "$here"
for part in train val; do
    unless_there "$here/$part.bin" "$BIN/convert" --tokenize "$dir/$part.jsonl" \
        --tokenizer "$dir/base" --to "$here/$part.bin"
done
unless_there "$here/recurrent" "$BIN/convert" --from "$dir/base" --to "$here/recurrent" \
    ${LAYERS:---preset smollm2} --adapter-init identity --mean-recurrence 4 --backprop-depth 4

options="--seq-len $T --micro-batch-size $rows --shuffle --optimizer adamw --lr 0.0005
    --warmup 0.05 --cooldown 0.5"
train_to "$last_step" "$here/retrofit" --model "$here/recurrent" --data "$here/train.bin" $options
spent() { sed -n 's/.*"flops":\([^,]*\),.*/\1/p' "$here/$1/log.jsonl" | tail -n 1; } # run
train_to 1 "$here/once" --model "$dir/base" --data "$here/train.bin" $options
of_base=$(awk "BEGIN { n = int($(spent retrofit) / $(spent once) + 0.5); print n ? n : 1 }")
train_to "$of_base" "$here/base" --model "$dir/base" --data "$here/train.bin" $options

# The source as it is, trained on, and retrofitted: "run flops recurrences loss" a row.
measure() { # run, model, FLOPs, options
    run=$1 model=$2 flops=$3
    shift 3
    "$BIN/infer" --model "$model" --eval "$here/val.bin" --seq-len "$T" --rows "${EVAL:-32}" "$@" |
        awk -v OFS='\t' -v run="$run" -v flops="$flops" '$1 ~ /^[0-9]+$/ {
            print run, flops, $1, $2
        }'
}
table=$place/smollm2.tsv
{
    echo "# make experiment-smollm2 STEPS=$last_step"
    printf 'run\tflops\trecurrences\tloss\n'
    measure source "$dir/base" 0
    measure base "$here/base" "$(spent base)"
    measure retrofit "$here/retrofit" "$(spent retrofit)" --recurrences 1,2,4,8,16,32
} >"$here/table"
mv "$here/table" "$table"
cat "$table"
