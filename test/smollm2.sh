#!/bin/sh
# SmolLM2-135M (Hugging Face, Apache 2.0), retrofitted: download, check against the authors'
# framework, surgery, training on Wikipedia introductions (CC BY-SA 4.0), loss by recurrences.
# Everything lies in local/smollm2, and what is there is not made again. STEPS= makes it longer or
# shorter; each number of steps is a run of its own.
set -e
check=$1 dir=local/smollm2 steps=${STEPS:-80} again="make smollm2${STEPS:+ STEPS=$STEPS}"
. test/steps.sh
run=$dir/run-$steps
mkdir -p $dir

# A model's loss on held-out text. What infer says is kept in a file.
loss() { # file, model, further options
    file=$1
    model=$2
    shift 2
    set -- "$BIN/infer" --model "$model" --eval $dir/val.bin --seq-len 256 --rows 32 "$@"
    show "$@"
    if [ ! -e "$file" ]; then
        "$@" >"$file.part"
        mv "$file.part" "$file"
    fi
    cat "$file"
}
loss_at() { awk -v r="$2" '$1 == r { print $2 }' "$1"; } # file, recurrences

say "1. The source model and the text"
run sh test/fetch_smollm2.sh $dir
run sh test/fetch_text.sh $dir
unless_there $dir/base "$BIN/convert" --from $dir/SmolLM2-135M-Instruct.Q4_1.gguf --to $dir/base
echo "against test/fixtures/smollm2_base.json:"
"$check" $dir/base test/fixtures/smollm2_base.json

say "2. Surgery: 30 layers -> 4 of prelude, 6 of core, 4 of coda"
unless_there $dir/recurrent "$BIN/convert" --from $dir/base --to $dir/recurrent --preset smollm2 \
    --adapter-init identity --mean-recurrence 4 --backprop-depth 4

say "3. Tokens"
for part in train val; do
    unless_there $dir/$part.bin "$BIN/convert" --tokenize $dir/$part.jsonl --tokenizer $dir/base \
        --to $dir/$part.bin
done

say "4. Before training: loss on held-out text, of the source model and after surgery"
loss $dir/loss-base $dir/base
loss $dir/loss-0 $dir/recurrent --recurrences 1,2,4,8

say "5. Training: $steps steps of 1024 tokens, mean recurrence 1 -> 4 by 1-sqrt"
# AdamW, because Muon's Newton-Schulz iterations cost a CPU more than such small steps do.
train_to "$steps" "$run" --model $dir/recurrent --data $dir/train.bin --val $dir/val.bin \
    --eval-rows 16 --eval-recurrences 1,2,4,8 --seq-len 256 --micro-batch-size 4 --shuffle \
    --optimizer adamw --lr 0.0005 --warmup 0.05 --cooldown 0.5

say "6. After training"
loss "$dir/loss-$steps" "$run" --recurrences 1,2,4,8
source=$(loss_at $dir/loss-base 0) trained=$(loss_at "$dir/loss-$steps" 4)
echo "At r = 4 the loss is $trained now. The source model's, of 30 layers, is $source."
if [ "$(awk "BEGIN { print ($trained > $source) }")" = 1 ]; then
    echo "So $steps steps do not win back what surgery took, 16 of 30 layers: the paper trains on" \
        "billions of tokens, this was $((steps * 1024)). STEPS=1000 goes on in that direction."
fi

say "7. A sample at r = 4"
run "$BIN/infer" --model "$run" --prompt "The capital of France is" --recurrences 4 --max-tokens 40
