#!/bin/sh
# Several processes train together (make test-mpi): the same bits on 1, 2 and 4 ranks and in one
# process that does the same, going on with another number of them, and what happens when one of
# them is killed, hangs, fails or finds the disk full. In miniature, on the demo's model.
. test/check.sh
train=$OUT/mpi_train model=$work/model
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
mpirun=${MPIRUN:-mpirun}

"$BIN/convert" --from test/fixtures/lookup/base --to "$model" --prelude 0 --core 1 --coda 2 \
    --adapter-init identity --mean-recurrence 6 --backprop-depth 4 >"$work/said" 2>&1 ||
    cat "$work/said"
for part in train val; do
    case $part in train) seed=1 ;; val) seed=2 ;; esac
    "$OUT/lookup" 40 $seed 8x3,3x8 >"$work/$part.jsonl"
    "$BIN/convert" --tokenize "$work/$part.jsonl" --tokenizer "$model" --to "$work/$part.bin" \
        >"$work/said" 2>&1 || cat "$work/said"
done
options="--model $model --data $work/train.bin --seq-len 81 --micro-batch-size 1 --batch-size 8
    --lr 1e-3 --muon-lr 1e-3 --warmup 0.2 --curriculum-warmup 0.5"

# The log without times.
timeless() { sed 's/,"seconds":[0-9.]*//' "$work/$1/log.jsonl"; }
same() { # out, out: to the bit
    timeless "$1" >"$work/1.log" && timeless "$2" >"$work/2.log" || return 1
    cmp "$work/1.log" "$work/2.log" || return 1
    for file in model.safetensors optimizer.safetensors config.json manifest.json; do
        cmp "$work/$1/latest/$file" "$work/$2/latest/$file" || return 1
    done
}
alone() { # out, options: one process, of a program that was built without MPI
    out=$1
    shift
    "$BIN/train" $options --out "$work/$out" "$@"
}
ranks() { # ranks, out, options
    count=$1 out=$2
    shift 2
    "$mpirun" -np "$count" "$train" $options --out "$work/$out" "$@"
}

# ---- The same numbers ----
everywhere() { # what, options
    name=$1
    shift
    rm -rf "$work/one" "$work/w2" "$work/w4"
    check "$name: one process as four" alone one --as-ranks 4 "$@"
    check "$name: two ranks as four" ranks 2 w2 --as-ranks 4 "$@"
    check "$name: four ranks" ranks 4 w4 "$@"
    share=$(sed -n 's/.*, 4 ranks, the first with \([0-9]*\) % of the moments$/\1/p' "$work/said")
    check "$name: four ranks share the moments" [ "${share:-100}" -le $most ]
    check "$name: two ranks, the same bits" same w2 one
    check "$name: four ranks, the same bits" same w4 one
}
most=40 # per cent that a rank of four may have
for optimizer in adamw muon ellisadam; do
    everywhere $optimizer --steps 4 --optimizer $optimizer --val "$work/val.bin" --eval-rows 4 \
        --eval-recurrences 1,4
done
most=80 # of three matrices and a norm
everywhere "the core alone" --steps 3 --train core --throttle --shuffle
most=40
everywhere "recomputing" --steps 3 --optimizer muon --clip 0.01 --recompute --state-init zero
everywhere "the baseline" --steps 3 --model test/fixtures/lookup/base
differ() { ! cmp -s "$work/$1/latest/model.safetensors" "$work/$2/latest/model.safetensors"; }
check "one process as one" alone as1 --steps 3
check "as two: other draws, other bits" alone as2 --steps 3 --as-ranks 2
check "as two: they are others" differ as1 as2

# Sums of as many parts as processes, where the training has another number of them: the same draws
# and rows, the same losses but for rounding.
close() { # tolerance, out, out: loss by loss
    for out in "$2" "$3"; do
        sed -n 's/.*"loss":\([^,]*\),.*/\1/p' "$work/$out/log.jsonl" >"$work/$out.losses"
    done
    paste "$work/$2.losses" "$work/$3.losses" | awk -v t="$1" '
        NF != 2 || ($1 - $2) ^ 2 > (t * $2) ^ 2 { print; bad = 1 }
        END { exit bad || NR != 3 }'
}
check "two ranks as one" ranks 2 w2as1 --steps 3 --as-ranks 1
check "two ranks as one: within 1e-6" close 1e-6 w2as1 as1

# ---- Going on with another number of ranks ----
rm -rf "$work/through" "$work/saving"
check "in one go" ranks 4 through --steps 6
check "with checkpoints" ranks 4 saving --steps 6 --save-every 1 --keep 99
check "with checkpoints: the same bits" same saving through
from_third_step() { # ranks
    rm -rf "$work/again"
    mkdir "$work/again"
    cp -a "$work/saving/log.jsonl" "$work/saving/options.txt" "$work/saving/step_00000003" \
        "$work/again" || return 1
    ln -s step_00000003 "$work/again/latest"
    if [ "$1" -eq 0 ]; then "$BIN/train" --resume --out "$work/again" || return 1
    else "$mpirun" -np "$1" "$train" --resume --out "$work/again" || return 1; fi
    same again through
}
for count in 0 1 2 4; do check "going on with $count ranks (0: no MPI)" from_third_step $count; done
check "from one process" alone from1 --steps 3 --save-every 2 --keep 2
rm -rf "$work/from1/step_00000003"
ln -sfn step_00000002 "$work/from1/latest"
go_on() { "$mpirun" -np 2 "$train" --resume --out "$work/from1"; }
check "from one process to two ranks" go_on
check "from one process to two ranks: its draws and rows, within 1e-6" close 1e-6 from1 as1

# ---- When something dies ----
# Starts four ranks in the background that would train for minutes, and waits for a checkpoint.
begin() { # out, options
    out=$1
    shift
    rm -rf "${work:?}/$out"
    "$mpirun" -np 4 sh -c 'echo $$ >"$0.$OMPI_COMM_WORLD_RANK"; exec "$@"' "$work/pid" \
        "$train" $options --out "$work/$out" --steps 400 --save-every 1 "$@" 2>"$work/stderr" &
    mpirun_pid=$!
    for i in $(seq 300); do
        [ -e "$work/$out/latest/manifest.json" ] && return 0
        sleep 0.1
    done
    echo "no checkpoint after 30 seconds" >&2
    return 1
}
is_left() {
    for pid in $mpirun_pid $(cat "$work"/pid.?); do
        kill -0 "$pid" 2>/dev/null && return 0
    done
    return 1
}
# Whether all end within so many seconds, and not well.
ends_within() { # seconds
    for i in $(seq "$1"); do
        is_left || break
        sleep 1
    done
    if is_left; then
        echo "they are left after $1 seconds"
        kill -9 $mpirun_pid $(cat "$work"/pid.?)
        return 1
    fi
}
lines_of_train() { grep -c '^train: ' "$work/stderr"; }

# The newest checkpoint is whole: two ranks go on from it for some steps, to the bits of a run that
# nothing happened to.
flops_of() { sed -n 's/.*"step":'"$2"',.*"flops":\([^,]*\),.*/\1/p' "$work/$1/log.jsonl"; }
goes_on() { # out
    step=$(readlink "$work/$1/latest" | sed 's/step_0*//')
    flops=$(awk -v f="$(flops_of "$1" "$step")" 'BEGIN { print f * 1.1 }')
    "$mpirun" -np 2 "$train" --resume --out "$work/$1" --flops "$flops" || return 1
    rm -rf "$work/through"
    "$BIN/train" $options --as-ranks 4 --steps 400 --flops "$flops" --out "$work/through" ||
        return 1
    [ "$(readlink "$work/$1/latest" | sed 's/step_0*//')" -gt "$step" ] || return 1
    cmp "$work/$1/latest/model.safetensors" "$work/through/latest/model.safetensors"
}

begin dying
kill -KILL "$(cat "$work/pid.2")"
check "rank 2 is killed: all end" ends_within 10
wait $mpirun_pid
check "rank 2 is killed: not well" [ $? -ne 0 ]
check "rank 2 is killed: mpirun names it" grep -q 'rank 2 .*signal 9' "$work/stderr"
check "rank 2 is killed: the newest checkpoint is whole" goes_on dying

for rank in 0 3; do
    begin dying --patience 0.05
    kill -STOP "$(cat "$work/pid.$rank")"
    check "rank $rank hangs: all end" ends_within 15
    wait $mpirun_pid
    check "rank $rank hangs: not well" is $? 1
    check "rank $rank hangs: it is named" \
        grep -q "^train: rank [0-3]: no answer from rank $rank for [3-9].* s" "$work/stderr"
    check "rank $rank hangs: in one line" is "$(lines_of_train)" 1
    check "rank $rank hangs: the newest checkpoint is whole" goes_on dying
done

# A disk that is full: no file may grow beyond half of a checkpoint.
check "before the disk is full" ranks 2 full --as-ranks 4 --steps 5 --save-every 2 --flops 1
latest=$(readlink "$work/full/latest")
half=$(($(wc -c <"$work/full/latest/model.safetensors") / 1024))
disk_full() {
    "$mpirun" -np 2 sh -c 'ulimit -f "$0"; exec "$@"' $half "$train" $options --as-ranks 4 \
        --out "$work/full" --steps 5 --resume 2>"$work/stderr"
    [ $? -eq 1 ]
}
check "the disk is full: all end" disk_full
check "the disk is full: one line, of rank 0" \
    grep -q '^train: rank 0: .*safetensors.*(the checkpoint before is untouched)$' "$work/stderr"
check "the disk is full: in one line" is "$(lines_of_train)" 1
check "the disk is full: nothing half-written" is "$(ls "$work/full" | grep -c tmp)" 0
check "the disk is full: the checkpoint before" is "$(readlink "$work/full/latest")" "$latest"
check "room was made" ranks 4 full --as-ranks 4 --steps 5 --resume
check "without interruption" alone never --as-ranks 4 --steps 5
same_weights() { cmp "$work/$1/latest/model.safetensors" "$work/$2/latest/model.safetensors"; }
check "room was made: the same bits" same_weights full never

# What one of them alone cannot do, and what none can.
fails() { # exit code, text on the one line, command
    code=$1 text=$2
    shift 2
    "$@" >"$work/stdout" 2>"$work/stderr"
    is $? "$code" && is "$(lines_of_train)" 1 && grep -q -e "^train: $text" "$work/stderr"
}
one_fails() { # on rank 2 the shards are another place's
    "$mpirun" -np 4 sh -c '
        [ $OMPI_COMM_WORLD_RANK -ne 2 ] || shards=$0/nowhere.bin
        exec "$@" --data "${shards:-$0/train.bin}"' "$work" \
        "$train" --model "$model" --seq-len 81 --batch-size 32 --steps 3 --out "$work/never_begun"
}
check "one has no data: one line, that names it" fails 1 "rank 2: .*nowhere.bin" one_fails
check "one has no data: nothing was begun" test ! -e "$work/never_begun/latest"
check "no such model" fails 1 "rank 0: $work/nowhere: " ranks 4 f --steps 3 --model "$work/nowhere"
check "numbers that go wrong" fails 1 "rank 0: .*bad steps in a row: --resume-anyway" \
    ranks 2 bad --steps 9 --max-bad-steps 2 --optimizer adamw --lr 1000 --clip 0 --warmup 0
check "a batch for another number of ranks" fails 2 "rank 0: --batch-size 9 is 9 micro-batches" \
    ranks 4 f --steps 3 --batch-size 9
check "a run that is there" fails 2 "rank 0: .* holds a run already" ranks 4 full --steps 3
says_no_option() {
    ranks 4 f --nonsense 2>"$work/stderr"
    is "$(grep -c 'unknown option --nonsense' "$work/stderr")" 1
}
check "an unknown option: one line" says_no_option
check "built without MPI" fails 1 "rank 0: .*make MPI=1" \
    "$mpirun" -np 2 "$BIN/train" $options --out "$work/f" --steps 3
check "torchrun on a CPU" fails 1 "rank 0: .*torchrun starts GPUs only" \
    env RANK=0 WORLD_SIZE=2 TORCHELASTIC_RUN_ID=1 "$train" $options --out "$work/f" --steps 3
check "srun without MPI" fails 1 "rank 1: .*make MPI=1" \
    env SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2 "$BIN/train" $options --out "$work/f" --steps 3

# ---- Several GPUs, emulated: NCCL's calls, with a library in its place that adds in our order ----
# One of the emulator's orders lets each stream go only so far as it is waited for.
export EMULATOR_DEVICES=2 EMULATOR_ORDER=2 EMULATOR_SEED="${EMULATOR_SEED:-$(date +%Y%m%d)}"
on_gpu="--model test/fixtures/tiny/recurrent --data $work/shard.bin --steps 2 --seq-len 16
    --micro-batch-size 1 --batch-size 4 --mean-recurrence 3 --lr 1e-3 --muon-lr 1e-3"
shard >"$work/shard.bin"
with_nccl() { LD_LIBRARY_PATH=$OUT/nccl "$@"; }
gpus() { # out, options: by MPI
    out=$1
    shift
    with_nccl "$mpirun" -np 2 "$OUT/mpi_emulated_train" $on_gpu --out "$work/$out" "$@"
}
torchrun() { # out, options: as torchrun would start them, without MPI
    out=$1
    shift
    for rank in 1 0; do
        RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 TORCHELASTIC_RUN_ID=1 \
            with_nccl "$OUT/ranks_emulated_train" $on_gpu --out "$work/$out" "$@" \
            2>"$work/rank.$rank" &
        eval "rank_$rank=\$!"
    done
    wait $rank_0 && wait $rank_1 && return 0
    cat "$work/rank.0" "$work/rank.1"
    return 1
}
check "a GPU as two" "$OUT/ranks_emulated_train" $on_gpu --out "$work/gpu" --as-ranks 2
check "two GPUs by MPI" gpus two
check "two GPUs by MPI: the same bits" same two gpu
printf 'a number of long ago' >"$work/three.ranks"
touch -d '2 minutes ago' "$work/three.ranks"
check "two GPUs by torchrun" torchrun three
check "two GPUs by torchrun: the same bits" same three gpu
check "two GPUs by torchrun: no file is left" [ ! -e "$work/three.ranks" ]
check "two GPUs by torchrun: rank 1 is silent" [ ! -s "$work/rank.1" ]
check "two GPUs: it says so" grep -q "on emulator (GPU 0, rank 0), 2 ranks," "$work/rank.0"
check "two GPUs, AdamW in fp32" gpus adamw --optimizer adamw --precision fp32 --save-every 1
check "a GPU as two, AdamW in fp32" "$OUT/ranks_emulated_train" $on_gpu --out "$work/adamw_gpu" \
    --as-ranks 2 --optimizer adamw --precision fp32
check "two GPUs, AdamW in fp32: the same bits" same adamw adamw_gpu
one_gpu_hangs() {
    STAND_IN_PATIENCE=2 with_nccl "$mpirun" -np 2 sh -c '
        [ $OMPI_COMM_WORLD_RANK -ne 1 ] || echo $$ >"$0"
        exec "$@"' "$work/pid.gpu" "$OUT/mpi_emulated_train" $on_gpu --out "$work/hangs" \
        --save-every 1 --steps 1000 2>"$work/stderr" &
    mpirun_pid=$!
    for i in $(seq 600); do
        [ -e "$work/hangs/latest/manifest.json" ] && break
        sleep 0.1
    done
    kill -STOP "$(cat "$work/pid.gpu")" && wait $mpirun_pid
    is $? 1 && is "$(lines_of_train)" 1 || return 1
    grep -q "^train: rank 0: NCCL: an exchange: " "$work/stderr"
}
check "a GPU's connection breaks: one line, and all end" one_gpu_hangs
mkdir "$work/broken"
: >"$work/broken/libnccl.so.2"
without_nccl() {
    LD_LIBRARY_PATH=$work/broken "$mpirun" -np 2 "$OUT/mpi_emulated_train" $on_gpu --out "$work/f"
}
check "without NCCL" fails 1 "rank 0: .*libnccl.so.2: .*several GPUs need NCCL" without_nccl
unset EMULATOR_ORDER EMULATOR_SEED EMULATOR_DEVICES

# ---- A signal ----
# A signal that mpirun hands on stops the run with a checkpoint.
begin stopped >"$work/out" 2>&1
kill -USR1 $mpirun_pid
wait $mpirun_pid
check "SIGUSR1: they stop well" is $? 0
check "SIGUSR1: and say so" grep -q 'SIGUSR1: stopped after step .*--resume goes on' "$work/stderr"
check "SIGUSR1: going on" goes_on stopped
printf '%-24s %d passed, %d failed\n' "several processes" $passed $failed
[ $failed -eq 0 ]
