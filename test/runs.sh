#!/bin/sh
# Runs that are not lost: killed, stopped, failing and damaged in every way that comes to mind,
# train goes on to the same bits, or says why not. test/shim.c makes calls fail.
. test/check.sh
train=$BIN/train tiny=test/fixtures/tiny/recurrent shim=$work/shim.so
export OMP_NUM_THREADS=1
kill_count=200 stop_count=50 call_stride=1
case $BIN in *san*) kill_count=10 stop_count=6 call_stride=7 ;; esac # the sanitizers are slow

# Whether a command fails with the code, and train's only line about it, the last one, has the text.
fails() { # exit code, text on stderr, command
    code=$1 text=$2
    shift 2
    ("$@") >"$work/stdout" 2>"$work/stderr"
    [ $? -eq "$code" ] || return 1
    [ "$(grep -c '^train: ' "$work/stderr")" -eq 1 ] || return 1
    tail -n 1 "$work/stderr" | grep '^train: ' | grep -q -e "$text"
}
says() { # text on stderr, command that succeeds
    text=$1
    shift
    ("$@") >"$work/stdout" 2>"$work/stderr" && grep -q -e "$text" "$work/stderr"
}

shard >"$work/shard.bin"
other=2 shard >"$work/val.bin"

# It replaces the shell, so that $! is train's number. A function that goes on after it must give it
# a shell of its own: (run …).
run() { # out, options
    out=$1
    shift
    exec "$train" --model $tiny --data "$work/shard.bin" --out "$work/$out" --steps 12 \
        --seq-len 16 --micro-batch-size 2 --batch-size 4 --mean-recurrence 4 --lr 1e-3 "$@"
}
long() { # out, options
    run "$@" --val "$work/val.bin" --eval-every 2 --eval-recurrences 1,3 --eval-rows 4 \
        --save-every 2
}
short() { run "$@" --steps 2 --save-every 1; }
slow() { run "$@" --batch-size 4000; } # seconds a step
resume_option() { # out: --resume if there is something to resume
    if [ -L "$work/$1/latest" ]; then echo --resume; fi
}
faulty() { # call, what happens at it, command
    at=$1 action=$2
    shift 2
    SHIM_AT=$at SHIM_DO=$action LD_PRELOAD=$shim "$@"
}
without_seconds() { sed 's/,"seconds":[0-9.]*//' "$work/$1/log.jsonl"; }
holds() { # out, what is in it
    out=$1
    shift
    [ "$(ls -A "$work/$out" | tr '\n' ' ')" = "$* " ]
}
names() { ls -A "$work/$1" "$work/$1/latest/" | sed 's|.*/.*||'; }
same() { # out, out: to the bit, and nothing else is there
    without_seconds "$1" >"$work/log.1" || return 1
    without_seconds "$2" >"$work/log.2" || return 1
    cmp "$work/log.1" "$work/log.2" || return 1
    for file in model.safetensors optimizer.safetensors config.json manifest.json; do
        cmp "$work/$1/latest/$file" "$work/$2/latest/$file" || return 1
    done
    [ "$(names "$1")" = "$(names "$2")" ]
}
moments() { # how many, the largest: random seconds
    awk -v n="$1" -v largest="$2" -v seed="$$" 'BEGIN {
        srand(seed)
        for (i = 0; i < n; i++) printf "%.4f\n", rand() * largest
    }'
}
wait_for() { # path that the process $pid makes
    while [ ! -e "$work/$1" ] && kill -0 $pid 2>/dev/null; do sleep 0.002; done
}
check "the shim" ${CC:-cc} -shared -fPIC -O1 test/shim.c -o "$shim" -ldl

# ---- kill -9 at random moments: what is there goes on
check "a run in one go" long through
check "it leaves" holds through latest log.jsonl options.txt step_00000012
kills=0 bad=0
for moment in $(moments 1000 0.1); do
    [ $kills -lt $kill_count ] && [ $bad -eq 0 ] || break
    (long killed $(resume_option killed)) 2>"$work/said" &
    pid=$!
    sleep "$moment"
    kill -9 $pid 2>/dev/null
    wait $pid 2>/dev/null
    code=$?
    if [ $code -eq 137 ]; then
        kills=$((kills + 1))
    elif [ $code -ne 0 ]; then
        bad=1
    else
        check "after $kills kills" same killed through
        rm -rf "$work/killed"
    fi
done
if [ -e "$work/killed" ]; then
    check "after the last kill" long killed $(resume_option killed)
    check "after all kills" same killed through
fi
check "so many kills" [ $kills -eq $kill_count ]

# ---- a kill, a full disk, a broken one at every call of a save
check "two steps" short pair
check "one step" short half --flops 1
count_calls() { # what is to happen: how many calls a run with one save makes
    rm -rf "$work/count"
    cp -a "$work/half" "$work/count"
    (
        export SHIM_COUNT="$work/calls"
        faulty 0 "$1" short count --resume
    ) 2>/dev/null
    cat "$work/calls"
}

# After a kill or an error at a call, what is left is the checkpoint before or the new one, and goes
# on.
struck() { # call, what happens at it
    rm -rf "$work/struck"
    cp -a "$work/half" "$work/struck" || return 1
    if [ "$2" = kill ]; then
        (faulty "$1" "$2" short struck --resume) >"$work/stdout" 2>"$work/stderr"
        [ $? -eq 137 ] || return 1
    else
        fails 1 . faulty "$1" "$2" short struck --resume || return 1
        holds struck latest log.jsonl options.txt step_00000001 ||
            holds struck latest log.jsonl options.txt step_00000001 step_00000002 ||
            holds struck latest log.jsonl options.txt step_00000002 || return 1
        [ "$(readlink "$work/struck/latest")" = step_00000002 ] ||
            holds struck latest log.jsonl options.txt step_00000001 || return 1
    fi
    cp "$work/stderr" "$work/why"
    (short struck --resume) || return 1
    # A line that could not be written to the log is lost, but not its step.
    if grep -q 'log.jsonl: writing failed.*are saved' "$work/why"; then
        cmp "$work/struck/latest/optimizer.safetensors" "$work/pair/latest/optimizer.safetensors"
    else
        same struck pair
    fi
}
for action in kill ENOSPC EIO short; do
    count=$(count_calls $action)
    check "calls of a save" [ "$count" -gt 50 ]
    call=1
    while [ $call -le "$count" ]; do
        check "$action at call $call" struck $call $action
        call=$((call + call_stride))
    done
done

# The first save of a run: what a kill leaves is replaced, or the run goes on from it.
struck_first() { # call
    rm -rf "$work/new"
    (faulty "$1" kill short new --flops 1) 2>/dev/null
    [ $? -eq 137 ] || return 1
    (short new $(resume_option new)) && same new pair
}
for call in 1 2 5 9 40 80 85 90 95; do
    check "a kill before there is a checkpoint, call $call" struck_first $call
done
SHIM_FREE=1000 check "a full disk is seen before" \
    fails 1 ' needs [0-9]* bytes, 1000 are free' faulty 0 none short half --resume
check "a full disk: nothing changed" holds half latest log.jsonl options.txt step_00000001

# ---- failures that show late: the steps that were made are saved first
check "all steps" run whole
late() { # call at which the log cannot be written
    rm -rf "$work/late"
    fails 1 'log.jsonl: writing failed.*; the steps before it are saved: --resume goes on' \
        faulty "$1" EIO run late || return 1
    (run late --resume) && cmp "$work/late/latest/model.safetensors" \
        "$work/whole/latest/model.safetensors"
}
check "a log that fails at some step" late 9
check "a log that fails at a later one" late 12

shrunk() { # a shard becomes shorter while it is trained on
    cp "$work/shard.bin" "$work/shrinking.bin"
    (run shrunk --data "$work/shrinking.bin" --steps 1000000) 2>"$work/stderr" &
    pid=$!
    wait_for shrunk/log.jsonl
    while [ "$(wc -l <"$work/shrunk/log.jsonl")" -lt 3 ] && kill -0 $pid; do sleep 0.01; done
    dd if=/dev/null of="$work/shrinking.bin" bs=1 seek=1100 2>/dev/null # cuts it off there
    wait $pid
    [ $? -eq 1 ] && grep 'shrinking.bin: became shorter.*are saved' "$work/stderr" &&
        [ -f "$work/shrunk/latest/model.safetensors" ]
}
check "a shard that becomes shorter" shrunk
limited() { # writes of more than some blocks fail
    ulimit -f 200
    run limited
}
check "a limit on file sizes" fails 1 'File too large' limited
check "a limit on file sizes: nothing half-written" holds limited log.jsonl options.txt
closed_streams() { (run closed --flops 1) >&- 2>&-; }
check "closed streams" closed_streams
other_lines=$(grep -vc '^{"step"' "$work/closed/log.jsonl")
check "closed streams: the log is the log" [ "$other_lines" -eq 0 ]

# ---- where links cannot be, and copies without them
links_fail() { # command: the link is the first call after the directories of $work/OUT
    call=$(echo "$work/" | tr -cd / | wc -c)
    faulty $((call + 1)) EPERM "$@"
}
check "no links: said" says 'no symbolic links: OUT/latest will be a file' \
    links_fail short linkless --flops 1
check "no links: a file" [ -f "$work/linkless/latest" ]
check "no links: infer finds it" "$BIN/infer" --model "$work/linkless" --tokens 1,2 --logits \
    "$work/logits.safetensors"
check "no links: goes on" short linkless --resume
check "no links: the same bits" cmp "$work/linkless/latest/model.safetensors" \
    "$work/pair/latest/model.safetensors"
cp -rL "$work/half" "$work/copied"
check "a copy without links goes on" short copied --resume
check "a copy without links: the same bits" same copied pair
cp -a "$work/half" "$work/unlinked"
rm "$work/unlinked/latest"
check "a run without its link" \
    fails 1 'latest names no checkpoint, but .*step_00000001 is intact: echo' \
    short unlinked --resume

# ---- the data, the model and the tokenizer of a run
cp -a "$work/half" "$work/known"
other=3 shard >"$work/others.bin"
check "other data" fails 1 '--data was .*the first shard that differs: others.bin' \
    short known --resume --data "$work/others.bin"
cp -a "$work/known/latest/" "$work/trained"
check "another model" fails 1 '--model was ' short known --resume --model "$work/trained"
check "validation that was not there" fails 1 '--val was ' \
    short known --resume --val "$work/val.bin"
check "nothing is left to do" says 'all steps are done already' short pair --resume

# ---- signals
stopped=0 bad=0
for moment in $(moments 200 0.08); do
    [ $stopped -lt $stop_count ] && [ $bad -eq 0 ] || break
    rm -rf "$work/stopped"
    (long stopped) 2>"$work/said" &
    pid=$!
    wait_for stopped/lock
    sleep "$moment"
    kill -TERM $pid 2>/dev/null
    wait $pid 2>/dev/null
    code=$?
    line='^train: SIGTERM: stopped after step [0-9]* of 12, saved in .*: --resume goes on$'
    if grep -q "$line" "$work/said"; then
        stopped=$((stopped + 1))
    elif [ $code -ne 0 ]; then
        bad=1
    fi
    check "SIGTERM: exit code 0" [ $code -eq 0 ]
    if [ $code -eq 0 ]; then
        check "SIGTERM: going on" long stopped --resume
        check "SIGTERM: the same bits" same stopped through
    fi
done
check "so many SIGTERMs" [ $stopped -eq $stop_count ]
signalled() { # call
    rm -rf "$work/signalled"
    says 'SIGTERM: stopped' faulty "$1" signal long signalled || return 1
    (long signalled --resume) && same signalled through
}
for call in 1 30 60 90 120 150; do check "SIGTERM at call $call" signalled $call; done

validating() { run validating --val "$work/val.bin" --eval-every 1 "$@"; }
(validating --eval-recurrences 1000) 2>"$work/said" &
pid=$!
while [ ! -s "$work/validating/log.jsonl" ] && kill -0 $pid 2>/dev/null; do sleep 0.002; done
kill -INT $pid
wait $pid
check "SIGINT in the midst of a validation" \
    grep -q '^train: SIGINT: stopped after step 1 of 12' "$work/said"
check "it saves" holds validating latest log.jsonl options.txt step_00000001
check "the validation is made up for" validating --eval-recurrences 1 --eval-rows 2 --resume
check "every validation once" [ "$(grep -c '"val"' "$work/validating/log.jsonl")" -eq 12 ]
for signal in INT TERM; do
    (slow twice) 2>"$work/said" &
    pid=$!
    wait_for twice/lock
    kill -$signal $pid
    sleep 0.1
    kill -$signal $pid
    wait $pid 2>/dev/null
    code=$?
    check "a second $signal ends it" [ $code -eq $([ $signal = INT ] && echo 130 || echo 143) ]
    check "a second $signal: nothing but the log" holds twice lock log.jsonl options.txt
    rm -rf "$work/twice"
done

# Under nohup the end of a terminal is no reason to stop.
(trap '' HUP; long hung) 2>"$work/said" &
pid=$!
wait_for hung/lock
kill -HUP $pid
wait $pid
check "SIGHUP under nohup" sh -c "! grep SIGHUP '$work/said'"
check "SIGHUP under nohup: the same bits" same hung through

# ---- one run at a time
(slow locked) 2>"$work/said" &
pid=$!
wait_for locked/lock
check "the lock names the process" fails 1 "process $pid trains there" run locked
check "the lock, --resume" fails 1 "process $pid trains there" run locked --resume
kill -9 $pid
wait $pid 2>/dev/null
check "the kernel lets go of the lock" run locked
check "a lock is not left" holds locked latest log.jsonl options.txt step_00000012

# ---- damage
kept() { run "$@" --save-every 2 --keep 3; }
check "--keep" kept kept
check "--keep: what stays" holds kept latest log.jsonl options.txt step_00000008 step_00000010 step_00000012

# A damaged checkpoint is refused. Going on from the one before, as the line says, gives the same
# bits.
damage() { # file, command that damages it
    rm -rf "$work/damaged"
    cp -a "$work/kept" "$work/damaged" || return 1
    (cd "$work/damaged/latest" && eval "$2") || return 1
    fails 1 "/$1: .*step_00000010 is intact: rm .* echo step_00000010 >.*, then --resume" \
        kept damaged --resume || return 1
    eval "$(sed -n 's/.* is intact: \(.*\), then --resume/\1/p' "$work/stderr")" || return 1
    (kept damaged --resume) && same damaged kept
}
for file in model.safetensors optimizer.safetensors config.json; do
    check "$file: a bit" damage $file \
        "printf '\\001' | dd of=$file bs=1 seek=700 conv=notrunc 2>/dev/null"
    check "$file: a byte more" damage $file "echo >>$file"
    check "$file: none" damage $file "rm $file"
done
check "half a manifest" damage manifest.json "truncate -s 100 manifest.json"
check "no manifest" damage manifest.json "rm manifest.json"
rm -rf "$work/damaged"
cp -a "$work/through" "$work/damaged"
echo >>"$work/damaged/latest/config.json"
check "no other checkpoint" fails 1 "config.json: damaged.*no other checkpoint" \
    long damaged --resume

# ---- other options
cp -a "$work/half" "$work/other"
check "a list of differences" \
    fails 1 'lr was 0.001, is 0.002; --seed was 1, is 7; --shuffle was 0, is 1 (--resume-any' \
    short other --resume --lr 2e-3 --seed 7 --shuffle
check "no others in it" \
    sh -c "! grep -v '^note: ' '$work/stderr' | grep -e --clip -e --steps -e --beta"
check "--resume-anyway" says 'resume-anyway: --lr was 0.001, is 0.002; --seed was 1, is 7$' \
    short other --resume-anyway --lr 2e-3 --seed 7
check "--resume-anyway: other bits" sh -c \
    "! cmp -s '$work/other/latest/model.safetensors' '$work/pair/latest/model.safetensors'"
check "without a difference, as ever" short half --resume-anyway
check "without a difference: the same bits" same half pair

# ---- numbers that go wrong
# Token 130 is met in steps 4 and 5 alone. Its embedding is 3e38, and an entry of the adapter is 10:
# the product is more than fp32 holds.
cp -r $tiny "$work/nan"
chmod -R u+w "$work/nan"
header=$(od -An -tu8 -N8 $tiny/model.safetensors | tr -d ' ')
width=$(sed -n 's/.*"n_embd": \([0-9]*\).*/\1/p' $tiny/config.json)
set_weights() { # tensor, first element, how many, 4 bytes in octal
    begin=$(head -c $((header + 8)) $tiny/model.safetensors |
        sed "s/.*\"$1\":{[^}]*\"data_offsets\":\[\([0-9]*\),.*/\1/")
    i=0
    while [ $((i += 1)) -le "$3" ]; do printf "$4"; done |
        dd of="$work/nan/model.safetensors" bs=1 seek=$((header + 8 + begin + $2 * 4)) \
            conv=notrunc 2>/dev/null
}
ten='\000\000\040\101' huge='\346\261\141\177' zero='\000\000\000\000' nan='\000\000\300\177'
set_weights transformer.adapter.weight "$width" 1 "$ten"
set_weights transformer.wte.weight $((130 * width)) "$width" "$huge"
shard 204 272 >"$work/bad.bin" # rows of 17 tokens; step s begins with row 4·(s - 1)
ill() { run "$@" --model "$work/nan" --data "$work/bad.bin"; }
gradient='the gradient of transformer.wte.weight'
check "bad steps" \
    says "step 5: the loss is nan, not finite is $gradient: skipped (2 in a row, 5 end the run)\$" \
    ill skips --save-every 1 --keep 9
skipped=$(grep -c '"loss":null,"grad_norm":null,.*"skipped":[12],' "$work/skips/log.jsonl")
check "bad steps in the log" [ "$skipped" -eq 2 ]
check "counted on" \
    sh -c "grep '\"step\":12,' '$work/skips/log.jsonl' | grep '\"skipped\":2,'"
schedule() { # what step 6 was to do
    sed -n 's/.*"step":6,.*\("n":.*"tokens":[0-9]*\).*/\1/p' "$work/$1/log.jsonl"
}
check "the schedule goes on" [ "$(schedule skips)" = "$(schedule through)" ]
weights() { echo "$work/skips/step_0000000$1/model.safetensors"; }
check "a skipped step changes nothing" cmp "$(weights 4)" "$(weights 5)"
check "other steps do" sh -c "! cmp -s '$(weights 5)' '$(weights 6)'"

budget=$(sed -n 's/.*"step":4,.*"flops":\([^,]*\),.*/\1/p' "$work/skips/log.jsonl" |
    awk '{ print $1 * 0.999 }')
ill resumed --save-every 1 --keep 9 --flops "$budget" 2>"$work/said" &
wait $!
check "stopped between bad steps" [ "$(readlink "$work/resumed/latest")" = step_00000004 ]
check "bad steps, going on" ill resumed --save-every 1 --keep 9 --resume
check "bad steps: the same bits" same resumed skips
saved='the steps before it are saved: --resume goes on from there$'
check "--max-bad-steps" fails 1 "step 5: .* $gradient: 2 bad steps in a row.*; $saved" \
    ill badly --save-every 2 --max-bad-steps 2
check "--max-bad-steps: its steps are saved" holds badly latest log.jsonl options.txt step_00000005
check "--max-bad-steps 3 goes on" ill badly --save-every 2 --max-bad-steps 3 --resume
check "--max-bad-steps 3: the same bits" \
    cmp "$work/badly/latest/optimizer.safetensors" "$work/skips/latest/optimizer.safetensors"

# The RMS norm of an embedding of zeros divides by next to nothing: its gradient is huge.
set_weights transformer.wte.weight $((130 * width)) "$width" "$zero"
check "an outlier of the gradient's norm" \
    says "^step 4: the gradient's norm, [0-9.e+]*, is [0-9]* times its average$" ill outlier
check "no other step is" sh -c "! grep 'times its average' '$work/stderr' | grep -v '^step [45]:'"

# A NaN that no step meets.
set_weights transformer.wte.weight $((130 * width + 5)) 1 "$nan"
check "poison is not trained on" \
    fails 1 "tensor transformer.wte.weight: number $((130 * width + 5)) is infinite or no number" \
    run poison --model "$work/nan"
check "poison is not trained on: nothing is left" [ ! -e "$work/poison" ]
check "weights that overflow" fails 1 'nan or infinity: not saved\|bad steps in a row' \
    run absurd --save-every 1 --lr 1000 --muon-lr 1000 --weight-decay 1000 --warmup 0
finite() { ! od -An -v -tf4 "$work/absurd/latest/$1" | grep -i -e nan -e inf; }
check "no poison was saved" finite model.safetensors
check "no poisoned moments" finite optimizer.safetensors

# ---- when to end
# The first step by which so many FLOPs were spent, the number of steps, and whether fewer were
# spent before the last one.
flops() { # out, FLOPs
    grep -o '"flops":[^,]*' "$work/$1/log.jsonl" | sed 's/.*://' | awk -v n="$2" '
        { last = before; before = $1; if ($1 >= n && !at) at = NR }
        END { print at, NR, last < n }'
}
check "--flops in a dry run" run dry --flops 3e8 --dry-run
end=$(sed -n 's/^--flops 3e+08: ends after step \([0-9]*\) of 12, .*/\1/p' "$work/out")
check "--flops" run budget --flops 3e8
check "--flops: at the first step that reaches it, as the dry run said" \
    [ "$(flops budget 3e8)" = "$end $end 1" ]
check "--flops: with a checkpoint" holds budget latest log.jsonl options.txt "step_0000000$end"
check "--flops reached: nothing left to do" run budget --flops 3e8 --resume
check "--flops: more of it goes on" run budget --flops 1e18 --resume
check "--flops: the same bits" \
    cmp "$work/budget/latest/model.safetensors" "$work/through/latest/model.safetensors"

timed() { run timed --batch-size 100 --steps 400 "$@"; }
check "--time-limit" \
    says 'train: --time-limit: stopped after step [0-9]* of 400, saved in .*: --resume goes on$' \
    timed --time-limit 0.05 --save-before 0.03
check "--time-limit: saving begins in time" awk -F '"seconds":' '
    { sum += $2 }
    END { print NR, sum; exit !(NR > 0 && sum < 1.5) }' "$work/timed/log.jsonl"
check "--time-limit: going on" says 'stopped after step' \
    timed --time-limit 0.005 --save-before 0 --resume
check "--time-limit without time" fails 2 'leaves no time to train' run timed --time-limit 3

# ---- the same recurrences in every step
check "--fixed-recurrences" run fixed --fixed-recurrences 3,2 --save-every 4
check "--fixed-recurrences: in every step" \
    [ "$(grep -c '"mean_recurrence":5,"n":3,"k":2,' "$work/fixed/log.jsonl")" -eq 12 ]
fixed_dry_run() { "$train" --model $tiny --steps 3 --fixed-recurrences 3,2 --dry-run; }
schedule_is_fixed() { fixed_dry_run | grep '   5      2 .* 3,2$'; }
check "--fixed-recurrences in a dry run" schedule_is_fixed
check "--fixed-recurrences: another curriculum makes no difference" \
    run fixed2 --fixed-recurrences 3,2 --curriculum none --mean-recurrence 9
check "--fixed-recurrences: the same weights" \
    cmp "$work/fixed/latest/model.safetensors" "$work/fixed2/latest/model.safetensors"
check "--fixed-recurrences is the run's" fails 1 'fixed-recurrences was 3,2, is none' \
    run fixed --resume
check "--fixed-recurrences of nothing" fails 2 'n,k like 4,8' run never --fixed-recurrences 3,0
check "--fixed-recurrences of one number" fails 2 'n,k like 4,8' run never --fixed-recurrences 3
check "--fixed-recurrences of a plain model" fails 2 'has no recurrence' \
    run never --fixed-recurrences 3,2 --model test/fixtures/tiny/base
check "nothing was made" [ ! -e "$work/never" ]

# ---- --resume alone goes on with the run's own options
own() { "$train" --out "$work/$1" --resume; }
same_weights() { cmp "$work/$1/latest/model.safetensors" "$work/$2/latest/model.safetensors"; }
check "options: a run to go on with" long owned --flops 1
check "options: what is recorded" \
    is "$(tr '\n' ' ' <"$work/owned/options.txt" | sed "s|$work|W|g")" "--model=$tiny \
--data=W/shard.bin --val=W/val.bin --save-every=2 --steps=12 --flops=1 --micro-batch-size=2 \
--batch-size=4 --seq-len=16 --mean-recurrence=4 --lr=0.001 --eval-every=2 \
--eval-recurrences=1,3 --eval-rows=4 "
sed -i '/--flops/d' "$work/owned/options.txt"
check "options: taken up" says "^note: going on with the options in $work/owned/options.txt$" \
    own owned
check "options: the same bits" same_weights owned through
check "options: one is given" says '--lr was 0.001, is 0.002$' \
    "$train" --out "$work/owned" --resume-anyway --lr 2e-3
check "options: and recorded" grep -q '^--lr=0.002$' "$work/owned/options.txt"
for line in --help --out=/ --resume --dry-run rubbish --nonsense=1; do
    echo "$line" >"$work/owned/options.txt"
    check "options: not $line" fails 1 "'$line' is not an option of a run" own owned
done
echo --lr=fast >"$work/owned/options.txt"
check "options: a wrong value" fails 2 "--lr needs a number, not 'fast'" own owned
rm "$work/owned/options.txt"
check "options: none" fails 2 'options.txt: No such file' own owned
check "options: no run" fails 2 'options.txt: No such file' own never
check "a checkpoint tells rows and start states" \
    grep -q '"trained_seq_len": 16' "$work/through/latest/config.json"
check "start states of zero" short zeros --state-init zero
check "start states of zero are told" \
    grep -q '"trained_state_init": "zero"' "$work/zeros/latest/config.json"

# ---- checkpoints that say what cannot be
check "another step" short renamed
mv "$work/renamed/step_00000002" "$work/renamed/step_00000007"
ln -sfn step_00000007 "$work/renamed/latest"
check "a name of another step" fails 1 'step_00000007: holds step 2: rename it' \
    short renamed --resume
check "and it is still there" [ -e "$work/renamed/step_00000007/model.safetensors" ]
check "a run whose log will be lost" short logless
rm "$work/logless/log.jsonl" && mkdir "$work/logless/log.jsonl"
check "a log that cannot be read" fails 1 'log.jsonl: not a regular file' short logless --resume

# ---- the time that is left counts the last validation, as long as those before it
# Validations at more and more recurrences, until one takes long enough to be seen in whole seconds.
last_eta() { sed -n 's/^step 2\/2 .* ETA \([0-9:]*\) .*/\1/p' "$work/stderr"; }
counts_validation() {
    for r in 2500 10000 40000 160000 640000; do
        rm -rf "$work/eta"
        (short eta --val "$work/val.bin" --eval-every 1 --eval-recurrences $r --eval-rows 2) \
            2>"$work/stderr" || return 1
        [ "$(last_eta)" = 0:00:00 ] || break
    done
    [ -n "$(last_eta)" ] && [ "$(last_eta)" != 0:00:00 ]
}
check "ETA: the last validation" counts_validation
first_eta() { sed -n 's/^step 1\/2 .* ETA \([0-9:]*\) .*/\1/p' "$work/stderr"; }
check "ETA: the first is a guess" [ "$(first_eta)" != 0:00:00 ]

# ---- stdout that fails
full() { "$train" "$@" >/dev/full; }
for option in --help --version --dry-run --dry-run=schedule; do
    check "$option on a full disk" fails 1 'writing to stdout failed' \
        full --model $tiny --steps 2 $option
done

# ---- a GPU that is not here
gpu() { "$train" --model $tiny --steps 2 "$@"; }
planned() { # text, options
    text=$1
    shift
    gpu --dry-run "$@" | grep -q -e "$text"
}
check "planned: memory" planned '80.000 GB has the GPU' --gpu-memory 80
check "planned: time" planned ' at 30 %, .* at 50 % of 989 TFLOP/s' --device cuda --gpu-tflops 989
check "planned: bf16" planned 'device=cuda  precision=bf16' --gpu-memory 80
check "planned: fp32" planned 'device=cuda  precision=fp32' --gpu-memory 80 --precision fp32
check "planned: too little memory" fails 1 'GB are free, and no micro-batch fits' \
    gpu --dry-run --gpu-memory 0.0001
check "planned: not for training" fails 2 'for --dry-run alone' run never --gpu-memory 80
check "planned: not a CPU" fails 2 'not with --device cpu' gpu --dry-run --device cpu --gpu-tflops 1

# ---- threads that wait give way, unless the user says otherwise
environment() { # assignments
    env -u OMP_WAIT_POLICY -u GOMP_SPINCOUNT -u KMP_BLOCKTIME OMP_DISPLAY_ENV=verbose "$@" \
        "$train" --help 2>&1 >/dev/null | grep 'GOMP_SPINCOUNT\|KMP_BLOCKTIME' | tail -n 1
}
default=$(environment A=1)
case $default in
*GOMP_SPINCOUNT*)
    check "threads spin shortly" is "$(echo $default)" "GOMP_SPINCOUNT = '2000'"
    check "or as the user says" is "$(echo $(environment GOMP_SPINCOUNT=7))" "GOMP_SPINCOUNT = '7'"
    ;;
*KMP_BLOCKTIME*)
    check "threads spin shortly" is "$(echo "$default" | grep -c "'[01]'\|=[01]$")" 1
    check "or as the user says" is "$(environment KMP_BLOCKTIME=7 | grep -c 7)" 1
    ;;
esac
printf '%-24s %d passed, %d failed\n' "runs that are not lost" $passed $failed
[ $failed -eq 0 ]
