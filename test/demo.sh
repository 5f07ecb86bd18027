#!/bin/sh
# The whole road on what the repository ships, on one screen: surgery, training with the curriculum,
# the baseline at equal FLOPs, and what recurrence buys. The model and the task:
# test/fixtures/lookup/README.md. What is quick and tells little goes to build/demo/log. A demo that
# was interrupted goes on; one that was finished begins anew.
set -e
lookup=$1 dir=build/demo again="make demo"
. test/steps.sh
base=test/fixtures/lookup/base tasks=test/fixtures/lookup/tasks.jsonl
shapes=8x3,6x4,4x6,3x8
if [ -e $dir/finished ]; then
    for part in recurrent train base; do rm -f $dir/$part.jsonl $dir/$part.bin; done
    rm -rf $dir/recurrent $dir/run $dir/once $dir/base
    rm -f $dir/log
    rm $dir/finished
fi
mkdir -p $dir
begin=$(date +%s)

quiet=
quietly() {
    quiet=yes
    (
        set -e
        "$@"
    ) >>$dir/log 2>&1
    quiet=
}
ended() { # exit code: what a quiet command said last is then the reason
    [ -z "$quiet" ] || tail -n 1 $dir/log >&2
    goes_on "$1"
}
trap 'ended $?' EXIT

say "The task: follow the variable behind the bar to its digit. A pretrained Llama of 3 layers" \
    "does so over 0 to 2 hops, and guesses beyond (.33 is chance):"
sed -n '1s/.*"prompt": "\([^"]*\)".*"answer": "=\(.\)".*/\1   (is \2)/p' $tasks
run "$BIN/infer" --model $base --tasks $tasks

say "Surgery: layer 0 becomes the prelude, layer 1 the core that is run r times, layer 2 the coda."
set -- "$BIN/convert" --from $base --to $dir/recurrent --prelude 0 --core 1 --coda 2 \
    --adapter-init identity --mean-recurrence 6 --backprop-depth 4
show "$@"
quietly unless_there $dir/recurrent "$@"
quietly write_to $dir/train.jsonl "$lookup" 19200 1 $shapes
quietly write_to $dir/base.jsonl "$lookup" 40000 2 $shapes
for part in train base; do
    quietly unless_there $dir/$part.bin "$BIN/convert" --tokenize $dir/$part.jsonl \
        --tokenizer $base --to $dir/$part.bin
done

say "Retrofitting: each step draws how often the core is run; the mean rises from 1 to 6."
hyperparameters="--seq-len 81 --micro-batch-size 48 --shuffle --muon-lr 0.01 --lr 0.002
    --warmup 0.05 --cooldown 0.4"
train_to 400 $dir/run --model $dir/recurrent --data $dir/train.bin --curriculum-warmup 0.6 \
    --state-init zero $hyperparameters

say "The baseline: the same Llama trained on with the same FLOPs, without recurrence."
flops() { sed -n 's/.*"flops":\([^,]*\),.*/\1/p' "$1" | tail -n 1; }
quietly train_to 1 $dir/once --model $base --data $dir/base.bin --seq-len 81 --micro-batch-size 48
all=$(flops $dir/run/log.jsonl) once=$(flops $dir/once/log.jsonl) # what one step costs
steps=$(awk "BEGIN { printf \"%d\", $all / $once + 0.5 }")
train_to "$steps" $dir/base --model $base --data $dir/base.bin $hyperparameters

say "What it bought: the baseline (0 recurrences), then ours. Every hop takes one recurrence more."
show "$BIN/infer" --model $dir/base --tasks $tasks
set -- "$BIN/infer" --model $dir/run --tasks $tasks --recurrences 1,2,4,8,16
show "$@"
"$BIN/infer" --model $dir/base --tasks $tasks
"$@" | sed '/^recurrences/d'

say "Before your eyes: the first program that asks for 6 hops or more."
# Takes one of those tasks: its prompt and its answer.
take() { # number
    task=$(grep '"hops": [67]}' $tasks | sed -n "$1p")
    prompt=$(printf %s "$task" | sed 's/.*"prompt": "\([^"]*\)".*/\1/')
    answer=$(printf %s "$task" | sed 's/.*"answer": "\([^"]*\)".*/\1/')
}
ask() { # recurrences; what infer says is then in $said
    set -- "$BIN/infer" --model $dir/run --prompt "$prompt" --max-tokens 1 --recurrences "$1"
    command=$(show "$@")
    said=$("$@" 2>/dev/null)
}
verdict() { if [ "$said" = "$answer" ]; then echo right; else echo "wrong: it is $answer"; fi; }
take 1
for r in 1 4 8; do
    ask $r
    [ $r -gt 1 ] || printf '%s\n' "$command"
    printf 'r = %s: %s   (%s)\n' "$r" "$said" "$(verdict)"
done

# What to try is tried first: the next program of this kind that 8 recurrences answer right.
number=1 said=
until [ -z "$task" ] || [ "$said" = "$answer" ]; do
    number=$((number + 1))
    take $number
    [ -z "$task" ] || ask 8
done
say "$(($(date +%s) - begin)) seconds. Everything lies in $dir, also what was quick: $dir/log." \
    "To go on:"
[ -z "$task" ] || printf 'another program, whose answer is %s:\n%s\n' "$answer" "$command"
printf 'both trainings in one picture:   $ make plot RUN="%s %s"\n' $dir/run $dir/base
printf 'with errors, from three seeds:   $ make experiment-recurrence\n'
: >$dir/finished
