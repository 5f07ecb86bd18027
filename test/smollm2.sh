#!/bin/sh
# SmolLM2-135M (Hugging Face, Apache 2.0), retrofitted: download, check against the authors'
# framework, surgery, training on Wikipedia introductions (CC BY-SA 4.0), loss by recurrences.
# Everything lies in local/smollm2. STEPS= makes it longer or shorter.
set -e
# Threads that wait give way soon: it costs nothing alone, and saves much time where others compute.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT-1000}"
check=$1 dir=local/smollm2 steps=${STEPS:-80}
say() { printf '\n%s\n' "$*"; }
mkdir -p $dir

say "1. The source model and the text"
sh test/fetch_smollm2.sh $dir
sh test/fetch_text.sh $dir
[ -f $dir/base/config.json ] || ./convert --from $dir/SmolLM2-135M-Instruct.Q4_1.gguf --to $dir/base
echo "against test/fixtures/smollm2_base.json:"
"$check" $dir/base test/fixtures/smollm2_base.json

say "2. Surgery: 30 layers -> 4 of prelude, 6 of core, 4 of coda"
rm -rf $dir/recurrent $dir/run
./convert --from $dir/base --to $dir/recurrent --preset smollm2 --adapter-init identity \
    --mean-recurrence 4 --backprop-depth 4

say "3. Tokens"
for part in train val; do
    [ -f $dir/$part.bin ] ||
        ./convert --tokenize $dir/$part.jsonl --tokenizer $dir/base --to $dir/$part.bin
done

say "4. Before training: loss on held-out text by recurrences"
loss() {
    ./infer --model "$1" --eval $dir/val.bin --seq-len 256 --rows 32 --recurrences 1,2,4,8 \
        2>/dev/null
}
loss $dir/recurrent

say "5. Training: $steps steps of 1024 tokens, mean recurrence 1 -> 4 by 1-sqrt"
# AdamW, because Muon's Newton-Schulz iterations cost a CPU more than such small steps do.
./train --model $dir/recurrent --data $dir/train.bin --val $dir/val.bin --eval-rows 16 \
    --out $dir/run --steps "$steps" --seq-len 256 --micro-batch-size 4 --shuffle \
    --optimizer adamw --lr 0.0005 --warmup 0.05 --cooldown 0.5

say "6. After training"
loss $dir/run

say "7. A sample at r = 4"
printf 'The capital of France is'
./infer --model $dir/run --prompt "The capital of France is" --recurrences 4 --max-tokens 40
