#!/bin/sh
# The whole road on what the repository ships: surgery, training with the curriculum, the baseline
# at equal FLOPs, and what recurrence buys. The model and the task: test/fixtures/lookup/README.md.
# A demo that was interrupted goes on; one that was finished begins anew.
set -e
lookup=$1 dir=build/demo again="make demo"
. test/steps.sh
base=test/fixtures/lookup/base tasks=test/fixtures/lookup/tasks.jsonl
shapes=8x3,6x4,4x6,3x8
if [ -e $dir/finished ]; then
    for part in recurrent train val base; do rm -f $dir/$part.jsonl $dir/$part.bin; done
    rm -rf $dir/recurrent $dir/run $dir/once $dir/base
    rm $dir/finished
fi
mkdir -p $dir
begin=$(date +%s)

say "1. The task: follow variables to their digit. A small pretrained Llama (3 layers) solves 0" \
    "to 2 hops and guesses beyond."
head -n 1 $tasks
run "$BIN/infer" --model $base --tasks $tasks

say "2. Surgery: layer 0 is the prelude, layer 1 the recurrent core, layer 2 the coda; the" \
    "adapter starts as [0 | I]."
unless_there $dir/recurrent "$BIN/convert" --from $base --to $dir/recurrent --prelude 0 --core 1 \
    --coda 2 --adapter-init identity --mean-recurrence 6 --backprop-depth 4

say "3. Data: fresh programs, one a row, to train on, to validate with, and for the baseline."
write_to $dir/train.jsonl "$lookup" 19200 1 $shapes
write_to $dir/base.jsonl "$lookup" 40000 2 $shapes
write_to $dir/val.jsonl "$lookup" 64 3 $shapes
for part in train base val; do
    unless_there $dir/$part.bin "$BIN/convert" --tokenize $dir/$part.jsonl --tokenizer $base \
        --to $dir/$part.bin
done

say "4. Retrofitting: 400 steps, mean recurrence 1 -> 6 by 1-sqrt."
hyperparameters="--seq-len 81 --micro-batch-size 48 --shuffle --muon-lr 0.01 --lr 0.002
    --warmup 0.05 --cooldown 0.4 --val $dir/val.bin --eval-every 50"
train_to 400 $dir/run --model $dir/recurrent --data $dir/train.bin --curriculum-warmup 0.6 \
    --state-init zero $hyperparameters --eval-recurrences 1,2,4,8

say "5. The baseline: the same base trained on with the same number of FLOPs, without recurrence." \
    "One step tells what a step costs."
flops() { sed -n 's/.*"flops":\([^,]*\),.*/\1/p' "$1" | tail -n 1; }
train_to 1 $dir/once --model $base --data $dir/base.bin --seq-len 81 --micro-batch-size 48
all=$(flops $dir/run/log.jsonl) once=$(flops $dir/once/log.jsonl)
steps=$(awk "BEGIN { printf \"%d\", $all / $once + 0.5 }")
train_to "$steps" $dir/base --model $base --data $dir/base.bin $hyperparameters

say "6. What it bought: accuracy by recurrences, and by hops."
echo "The base, trained on at equal FLOPs ($steps steps):"
run "$BIN/infer" --model $dir/base --tasks $tasks
echo "Retrofitted (400 steps):"
run "$BIN/infer" --model $dir/run --tasks $tasks --recurrences 1,2,4,8,16

say "7. One program before your eyes: the first that asks for 6 hops or more."
# Takes one of those tasks: its prompt and its answer.
take() { # number
    task=$(grep '"hops": [67]}' $tasks | sed -n "$1p")
    prompt=$(printf %s "$task" | sed 's/.*"prompt": "\([^"]*\)".*/\1/')
    answer=$(printf %s "$task" | sed 's/.*"answer": "\([^"]*\)".*/\1/')
}
ask() { # recurrences; what infer says is then in $said
    set -- "$BIN/infer" --model $dir/run --prompt "$prompt" --recurrences "$1" --max-tokens 1
    command=$(show "$@")
    said=$("$@" 2>/dev/null)
}
verdict() { if [ "$said" = "$answer" ]; then echo right; else echo "wrong: it is $answer"; fi; }
take 1
for r in 1 4 8; do
    ask $r
    printf '%s\n%s   (%s)\n' "$command" "$said" "$(verdict)"
done

# What to try is tried first: the next program of this kind that 8 recurrences answer right.
number=1 said=
until [ -z "$task" ] || [ "$said" = "$answer" ]; do
    number=$((number + 1))
    take $number
    [ -z "$task" ] || ask 8
done
say "$(($(date +%s) - begin)) seconds. Everything lies in $dir. To go on:"
[ -z "$task" ] || printf 'another program, whose answer is %s:\n%s\n' "$answer" "$command"
echo "both trainings in one picture (the losses are of all tokens, most of them random):"
printf '$ make plot RUN="%s %s"\n' $dir/run $dir/base
: >$dir/finished
