#!/bin/sh
# The whole road on what the repository ships: surgery, training with the curriculum, the baseline
# at equal FLOPs, and what recurrence buys. The model and the task: test/fixtures/lookup/README.md.
set -e
# Threads that wait give way soon: it costs nothing alone, and saves much time where others compute.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT-1000}"
lookup=$1 dir=build/demo
base=test/fixtures/lookup/base tasks=test/fixtures/lookup/tasks.jsonl
rm -rf $dir
mkdir -p $dir
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
[ -t 1 ] || say() { printf '\n%s\n' "$*"; }
begin=$(date +%s)

say "1. The task: follow variables to their digit. A small pretrained Llama (3 layers) solves 0" \
    "to 2 hops and guesses beyond."
head -n 1 $tasks
./infer --model $base --tasks $tasks

say "2. Surgery: layer 0 is the prelude, layer 1 the recurrent core, layer 2 the coda; the" \
    "adapter starts as [0 | I]."
./convert --from $base --to $dir/recurrent --prelude 0 --core 1 --coda 2 --adapter-init identity \
    --mean-recurrence 6 --backprop-depth 4

say "3. Training data: fresh programs, one a row."
$lookup 19200 1 8x3,6x4,4x6,3x8 >$dir/train.jsonl
$lookup 40000 2 8x3,6x4,4x6,3x8 >$dir/base.jsonl
./convert --tokenize $dir/train.jsonl --tokenizer $base --to $dir/train.bin
./convert --tokenize $dir/base.jsonl --tokenizer $base --to $dir/base.bin

say "4. Retrofitting: 400 steps, mean recurrence 1 -> 6 by 1-sqrt."
hyperparameters="--micro-batch-size 48 --seq-len 81 --muon-lr 0.01 --lr 0.002 --warmup 0.05
    --cooldown 0.4 --shuffle"
./train --model $dir/recurrent --data $dir/train.bin --out $dir/run --steps 400 \
    --curriculum-warmup 0.6 --state-init zero $hyperparameters

say "5. The baseline: the same base trained on with the same number of FLOPs, without recurrence."
flops() { sed -n 's/.*"flops":\([^,]*\),.*/\1/p' "$1" | tail -n 1; }
./train --model $base --data $dir/base.bin --out $dir/once --steps 1 $hyperparameters 2>/dev/null
all=$(flops $dir/run/log.jsonl) once=$(flops $dir/once/log.jsonl)
steps=$(awk "BEGIN { printf \"%d\", $all / $once + 0.5 }")
./train --model $base --data $dir/base.bin --out $dir/base --steps "$steps" $hyperparameters

say "6. What it bought: accuracy by recurrences, and by hops."
echo "the base, trained on at equal FLOPs ($steps steps):"
./infer --model $dir/base --tasks $tasks
echo "retrofitted (400 steps):"
./infer --model $dir/run --tasks $tasks --recurrences 1,2,4,8,16 --state-init zero

say "7. One program before your eyes: the first task, and the answer at r = 1 and r = 8."
deep=$(sed -n '/"hops": [67]}/{p;q;}' $tasks)
prompt=$(printf '%s' "$deep" | sed 's/.*"prompt": "\([^"]*\)".*/\1/')
answer=$(printf '%s' "$deep" |
    sed 's/.*"answer": "\([^"]*\)".*"hops": \(.*\)}/\1, \2 hops away/')
echo "$prompt?   (the answer is $answer)"
for r in 1 8; do
    printf 'r = %d: %s' $r "$prompt"
    ./infer --model $dir/run --prompt "$prompt" --recurrences $r --max-tokens 1 --state-init zero \
        2>/dev/null
done
echo
echo "$(($(date +%s) - begin)) seconds. Everything lies in $dir; try:" \
    "./infer --model $dir/run --prompt \"$prompt\" --recurrences 4"
