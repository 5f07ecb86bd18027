#!/bin/sh
# train and infer on a GPU, as a user calls them: built over the emulator, they must do what they do
# on a CPU, go on after a stop to the same bits, and say clearly what they can't.
. test/check.sh
train=$OUT/emulated_train infer=$OUT/emulated_infer tiny=test/fixtures/tiny/recurrent
export OMP_NUM_THREADS=1
fails() { # exit code, text on stderr, command
    code=$1 text=$2
    shift 2
    "$@" >"$work/stdout" 2>"$work/stderr"
    [ $? -eq "$code" ] && [ "$(grep -vc '^note: ' "$work/stderr")" -eq 1 ] &&
        grep -q -e "$text" "$work/stderr"
}
# Whether the losses and gradient norms of two logs are alike, number by number.
close() { # tolerance, log, log
    for log in "$2" "$3"; do
        grep -o '"loss":[^,]*\|"grad_norm":[^,]*\|"[0-9]*":[0-9.]*' "$log" |
            sed 's/.*://' >"$log.numbers"
    done
    [ "$(wc -l <"$2.numbers")" -gt 6 ] && paste "$2.numbers" "$3.numbers" |
        awk -v t="$1" 'NF != 2 || ($1 - $2) ^ 2 > (t * $2) ^ 2 { print; bad = 1 } END { exit bad }'
}
shard >"$work/shard.bin"
other=2 shard >"$work/val.bin"
run() { # out, options
    out=$1
    shift
    exec "$train" --model $tiny --data "$work/shard.bin" --val "$work/val.bin" \
        --out "$work/$out" --steps 3 --seq-len 16 --micro-batch-size 2 --batch-size 4 \
        --mean-recurrence 4 --eval-recurrences 1,3 --eval-rows 4 --lr 1e-3 "$@"
}
check "a CPU" run cpu --device cpu
check "fp32" run fp32 --device cuda --precision fp32
check "fp32 as on a CPU" close 1e-4 "$work/fp32/log.jsonl" "$work/cpu/log.jsonl"
check "bf16" run bf16 --save-every 1
check "it says where" grep -q "on emulator" "$work/said"
check "bf16 as on a CPU" close 3e-2 "$work/bf16/log.jsonl" "$work/cpu/log.jsonl"
check "recomputing" run recompute --recompute
same_file() { cmp "$work/$1/latest/$3" "$work/$2/latest/$3"; } # out, out, file
check "recomputing: the same bits" same_file bf16 recompute model.safetensors
check "frozen but for the core" run frozen --train core --precision fp32
check "frozen but for the core, on a CPU" run frozen_cpu --train core --device cpu
check "frozen: fp32 as on a CPU" close 1e-4 "$work/frozen/log.jsonl" "$work/frozen_cpu/log.jsonl"

(run killed --save-every 1) >"$work/said" 2>&1 &
pid=$!
while [ ! -e "$work/killed/latest" ] && kill -0 $pid 2>/dev/null; do sleep 0.02; done
kill -9 $pid 2>/dev/null
wait $pid 2>/dev/null
check "going on after kill -9" run killed --save-every 1 --resume
check "going on: the same bits" same_file bf16 killed model.safetensors
check "going on: the same moments" same_file bf16 killed optimizer.safetensors

# No GPU, or too little memory.
dry_run() { "$train" --model $tiny --steps 2 --dry-run "$@"; }
says_no_gpu() { dry_run | grep -q 'memory on the CPU (no GPU: none found)$'; }
EMULATOR_DEVICES=0 check "without a GPU, auto" says_no_gpu
EMULATOR_DEVICES=0 check "without a GPU, cuda" fails 1 "no GPU: none found$" "$train" --model $tiny \
    --data "$work/shard.bin" --out "$work/never" --steps 1 --device cuda
EMULATOR_DEVICES=0 dry_run --device cuda | sed -n '/^memory/,/^checkpoint/p' >"$work/planned"
check "without a GPU it can be planned" grep -q 'a GPU that is not here' "$work/planned"
dry_run --device cuda | sed -n '/^memory/,/^checkpoint/p' >"$work/counted"
same_memory() { # what is planned with is what is taken, line by line
    for line in weights gradients optimizer activations; do
        is "$(grep "$line" "$work/planned")" "$(grep "$line" "$work/counted")" || return 1
    done
}
check "as what it would take" same_memory
small() { # bytes of memory, options
    EMULATOR_MEMORY=$1 "$train" --model $tiny --data "$work/shard.bin" --out "$work/small" \
        --steps 1 --seq-len 64 --micro-batch-size 8 --backprop-depth 8 $2
}
check "out of memory, with what would fit" \
    fails 1 "GB are free: --batch-size 8 --micro-batch-size [1-4]* would fit" small 44000000 ""
fit=$(sed -n 's/.*free: \(.*\) would fit.*/\1/p' "$work/stderr")
check "what would fit does" small 44000000 "$fit"
rm -rf "$work/small"
check "out of memory, recomputing" fails 1 "--recompute would fit" small 35800000 ""
check "out of memory, whatever one does" fails 1 "no micro-batch fits" small 34500000 ""

# Inference.
for place in "cpu bf16" "cuda fp32" "cuda bf16"; do
    set -- $place
    "$infer" --model $tiny --tokens 5,9,2,77,31 --recurrences 3 --state-init zero \
        --logits "$work/$1.$2" --device $1 --precision $2 2>/dev/null
    "$infer" --model $tiny --eval "$work/shard.bin" --seq-len 16 --rows 6 --recurrences 1,4 \
        --device $1 --precision $2 2>/dev/null | awk 'NR > 1 { print $2 }' >"$work/$1.$2.eval"
done
# Whether two files of two losses are alike.
same() { # tolerance, file, file
    paste "$2" "$3" | awk -v t="$1" '
        NF != 2 || $1 == 0 || ($1 - $2) ^ 2 > t ^ 2 { bad = 1 }
        END { exit bad || NR != 2 }'
}
check "--eval in fp32" same 0.0002 "$work/cuda.fp32.eval" "$work/cpu.bf16.eval"
check "--eval in bf16" same 0.02 "$work/cuda.bf16.eval" "$work/cpu.bf16.eval"
check "--logits in fp32 differ from bf16's" sh -c "! cmp -s '$work/cuda.fp32' '$work/cuda.bf16'"
check "bench-cuda in miniature: errors that rounding explains, the same bits five times" \
    "$OUT/emulated_bench_cuda" --miniature
printf '%-24s %d passed, %d failed\n' "train, infer on a GPU" $passed $failed
[ $failed -eq 0 ]
