#!/bin/sh
# Runs that are not lost: killed, stopped, failing and damaged in every way that comes to mind, train goes on to the same bits, or says why not.
# test/shim.c makes calls fail.
. test/check.sh
train=$BIN/train tiny=test/fixtures/tiny/recurrent shim=$work/shim.so
export OMP_NUM_THREADS=1 ASAN_OPTIONS=verify_asan_link_order=0:detect_leaks=0
many=200 some=50 every=1
case $BIN in *san*) many=10 some=6 every=7 ;; esac # the sanitizers are slow
fails() { # exit code, text on stderr, command: its last line, the only one that train says of itself, has the text
    code=$1 text=$2
    shift 2
    ("$@") >"$work/stdout" 2>"$work/stderr"
    [ $? -eq "$code" ] && [ "$(grep -c '^train: ' "$work/stderr")" -eq 1 ] && tail -n 1 "$work/stderr" | grep '^train: ' | grep -q -e "$text"
}
says() { # text on stderr, command that succeeds
    text=$1
    shift
    ("$@") >"$work/stdout" 2>"$work/stderr" && grep -q -e "$text" "$work/stderr"
}
shard >"$work/shard.bin"
run() { # out, options
    out=$1
    shift
    exec "$train" --model $tiny --data "$work/shard.bin" --out "$work/$out" --steps 12 --seq-len 16 --micro-batch-size 2 --batch-size 4 \
        --mean-recurrence 4 --lr 1e-3 "$@"
}
long() { run "$@" --val "$work/shard.bin" --eval-every 2 --eval-recurrences 1,3 --eval-rows 4 --save-every 2; }
short() { run "$@" --steps 2 --save-every 1; }
slow() { run "$@" --batch-size 4000; } # seconds a step
again() { if [ -L "$work/$1/latest" ]; then echo --resume; fi; }
faulty() { # call, what, and a command
    at=$1 do=$2
    shift 2
    SHIM_AT=$at SHIM_DO=$do LD_PRELOAD=$shim "$@"
}
without_seconds() { sed 's/,"seconds":[0-9.]*//' "$work/$1/log.jsonl"; }
holds() { # out, what is in it
    out=$1
    shift
    [ "$(ls -A "$work/$out" | tr '\n' ' ')" = "$* " ]
}
same() { # out, out: to the bit, and nothing else is there
    without_seconds "$1" >"$work/log.1" && without_seconds "$2" >"$work/log.2" && cmp "$work/log.1" "$work/log.2" &&
        for file in model.safetensors optimizer.safetensors config.json manifest.json; do cmp "$work/$1/latest/$file" "$work/$2/latest/$file" || return 1; done
    [ "$(ls -A "$work/$1" "$work/$1/latest/" | sed 's|.*/.*||')" = "$(ls -A "$work/$2" "$work/$2/latest/" | sed 's|.*/.*||')" ]
}
moments() { awk -v n="$1" -v most="$2" -v seed="$$" 'BEGIN { srand(seed); for (i = 0; i < n; i++) printf "%.4f\n", rand() * most }'; }
appears() { # path, of the process $pid
    while [ ! -e "$work/$1" ] && kill -0 $pid 2>/dev/null; do sleep 0.002; done
}
check "the shim" ${CC:-cc} -shared -fPIC -O1 test/shim.c -o "$shim" -ldl

# ---- kill -9 at random moments: what is there goes on
check "a run in one go" long through
check "it leaves" holds through latest log.jsonl step_00000012
kills=0 bad=0
for moment in $(moments 1000 0.1); do
    [ $kills -lt $many ] && [ $bad -eq 0 ] || break
    (long killed $(again killed)) 2>"$work/said" &
    pid=$!
    sleep "$moment"
    kill -9 $pid 2>/dev/null
    wait $pid 2>/dev/null
    code=$?
    if [ $code -eq 137 ]; then kills=$((kills + 1)); elif [ $code -ne 0 ]; then bad=1; else
        check "after $kills kills" same killed through
        rm -rf "$work/killed"
    fi
done
[ ! -e "$work/killed" ] || { check "after the last kill" long killed $(again killed) && check "after all kills" same killed through; }
check "so many kills" [ $kills -eq $many ]

# ---- a kill, a full disk, a broken one at every call of a save
check "two steps" short pair
check "one step" short half --flops 1
calls() { # what is to happen: how many calls a run with one save makes
    rm -rf "$work/count" && cp -a "$work/half" "$work/count"
    (export SHIM_COUNT="$work/calls" && faulty 0 "$1" short count --resume) 2>/dev/null
    cat "$work/calls"
}
struck() { # call, what: what it left goes on
    rm -rf "$work/struck" && cp -a "$work/half" "$work/struck"
    if [ "$2" = kill ]; then
        (faulty "$1" "$2" short struck --resume) >"$work/stdout" 2>"$work/stderr"
        [ $? -eq 137 ] || return 1
    else
        fails 1 . faulty "$1" "$2" short struck --resume || return 1
        holds struck latest log.jsonl step_00000001 || holds struck latest log.jsonl step_00000001 step_00000002 || return 1
        [ "$(readlink "$work/struck/latest")" = step_00000002 ] || holds struck latest log.jsonl step_00000001 || return 1
    fi
    short struck --resume && same struck pair
}
for do in kill ENOSPC EIO short; do
    count=$(calls $do)
    check "calls of a save" [ "$count" -gt 50 ]
    k=1
    while [ $k -le "$count" ]; do
        check "$do at call $k" struck $k $do
        k=$((k + every))
    done
done
new() { # call: the first save of a run; what it left is replaced or gone on from
    rm -rf "$work/new"
    (faulty "$1" kill short new --flops 1) 2>/dev/null
    [ $? -eq 137 ] || return 1
    short new $(again new) && same new pair
}
for k in 1 2 5 9 40 80 85 90 95; do check "a kill before there is a checkpoint, call $k" new $k; done
SHIM_FREE=1000 check "a full disk is seen before" fails 1 ' needs [0-9]* bytes, 1000 are free' faulty 0 none short half --resume
check "a full disk: nothing changed" holds half latest log.jsonl step_00000001

# ---- signals
stopped=0 bad=0
for moment in $(moments 200 0.08); do
    [ $stopped -lt $some ] && [ $bad -eq 0 ] || break
    rm -rf "$work/stopped"
    (long stopped) 2>"$work/said" &
    pid=$!
    appears stopped/lock
    sleep "$moment"
    kill -TERM $pid 2>/dev/null
    wait $pid 2>/dev/null
    code=$?
    grep -q '^train: SIGTERM: stopped after step [0-9]* of 12, saved in .*: --resume goes on$' "$work/said" && stopped=$((stopped + 1)) || [ $code -eq 0 ] || bad=1
    check "SIGTERM: exit code 0" [ $code -eq 0 ]
    [ $code -eq 0 ] && check "SIGTERM: going on" long stopped --resume && check "SIGTERM: the same bits" same stopped through
done
check "so many SIGTERMs" [ $stopped -eq $some ]
amid() { rm -rf "$work/amid" && says 'SIGTERM: stopped' faulty "$1" signal long amid && long amid --resume && same amid through; }
for k in 1 30 60 90 120 150; do check "SIGTERM at call $k" amid $k; done
(run validating --val "$work/shard.bin" --eval-every 1 --eval-recurrences 1000) 2>"$work/said" &
pid=$!
while [ ! -s "$work/validating/log.jsonl" ] && kill -0 $pid 2>/dev/null; do sleep 0.002; done
kill -INT $pid
wait $pid
check "SIGINT in the midst of a validation" grep -q '^train: SIGINT: stopped after step 1 of 12' "$work/said"
check "it saves" holds validating latest log.jsonl step_00000001
check "the validation is made up for" run validating --val "$work/shard.bin" --eval-every 1 --eval-recurrences 1 --eval-rows 2 --resume
check "every validation once" [ "$(grep -c '"val"' "$work/validating/log.jsonl")" -eq 12 ]
for signal in INT TERM; do
    (slow twice) 2>"$work/said" &
    pid=$!
    appears twice/lock
    kill -$signal $pid
    sleep 0.1
    kill -$signal $pid
    wait $pid 2>/dev/null
    code=$?
    check "a second $signal ends it" [ $code -eq $([ $signal = INT ] && echo 130 || echo 143) ]
    check "a second $signal: nothing but the log" holds twice lock log.jsonl
    rm -rf "$work/twice"
done

# ---- one run at a time
(slow locked) 2>"$work/said" &
pid=$!
appears locked/lock
check "the lock names the process" fails 1 "process $pid trains there" run locked
check "the lock, --resume" fails 1 "process $pid trains there" run locked --resume
kill -9 $pid
wait $pid 2>/dev/null
check "the kernel lets go of the lock" run locked
check "a lock is not left" holds locked latest log.jsonl step_00000012

# ---- damage
check "--keep" run kept --save-every 2 --keep 3
check "--keep: what stays" holds kept latest log.jsonl step_00000008 step_00000010 step_00000012
damage() { # file, command that changes it: refused; then on from the one before, as the line says
    rm -rf "$work/damaged" && cp -a "$work/kept" "$work/damaged" && (cd "$work/damaged/latest" && eval "$2") || return 1
    fails 1 "/$1: .*step_00000010 is intact: ln -sfn step_00000010 .*, then --resume" run damaged --save-every 2 --keep 3 --resume || return 1
    eval "$(sed -n 's/.* is intact: \(.*\), then --resume/\1/p' "$work/stderr")" && run damaged --save-every 2 --keep 3 --resume && same damaged kept
}
for file in model.safetensors optimizer.safetensors config.json; do
    check "$file: a bit" damage $file "printf '\\001' | dd of=$file bs=1 seek=700 conv=notrunc 2>/dev/null"
    check "$file: a byte more" damage $file "echo >>$file"
    check "$file: none" damage $file "rm $file"
done
check "half a manifest" damage manifest.json "truncate -s 100 manifest.json"
check "no manifest" damage manifest.json "rm manifest.json"
rm -rf "$work/damaged" && cp -a "$work/through" "$work/damaged" && echo >>"$work/damaged/latest/config.json"
check "no other checkpoint" fails 1 "config.json: damaged.*no other checkpoint" long damaged --resume

# ---- other options
cp -a "$work/half" "$work/other"
check "a list of differences" fails 1 'lr was 0.001, is 0.002; --seed was 1, is 7; --shuffle was 0, is 1 (--resume-any' short other --resume --lr 2e-3 --seed 7 --shuffle
check "no others in it" sh -c "! grep -e --clip -e --steps -e --beta '$work/stderr'"
check "--resume-anyway" says 'resume-anyway: --lr was 0.001, is 0.002; --seed was 1, is 7$' short other --resume-anyway --lr 2e-3 --seed 7
check "--resume-anyway: other bits" sh -c "! cmp -s '$work/other/latest/model.safetensors' '$work/pair/latest/model.safetensors'"
check "without a difference, as ever" short half --resume-anyway
check "without a difference: the same bits" same half pair

# ---- numbers that go wrong: token 130's embedding, which steps 4 and 5 meet, times an entry of the adapter is more than fp32 holds
cp -r $tiny "$work/nan" && chmod -R u+w "$work/nan"
header=$(od -An -tu8 -N8 $tiny/model.safetensors | tr -d ' ')
width=$(sed -n 's/.*"n_embd": \([0-9]*\).*/\1/p' $tiny/config.json)
set_weights() { # tensor, first element, how many, 4 bytes in octal
    begin=$(head -c $((header + 8)) $tiny/model.safetensors | sed "s/.*\"$1\":{[^}]*\"data_offsets\":\[\([0-9]*\),.*/\1/")
    i=0
    while [ $((i += 1)) -le "$3" ]; do printf "$4"; done |
        dd of="$work/nan/model.safetensors" bs=1 seek=$((header + 8 + begin + $2 * 4)) conv=notrunc 2>/dev/null
}
set_weights transformer.adapter.weight "$width" 1 '\000\000\040\101'                     # 10
set_weights transformer.wte.weight $((130 * width)) "$width" '\346\261\141\177' # 3e38
shard 204 272 >"$work/bad.bin" # row 4·(step - 1), 17 tokens each
ill() { run "$@" --model "$work/nan" --data "$work/bad.bin"; }
check "bad steps" says 'step 5: the loss is nan, not finite is the gradient of transformer.wte.weight: skipped (2 in a row, 5 end the run)$' ill skips --save-every 1 --keep 9
check "bad steps in the log" [ "$(grep -c '"loss":null,"grad_norm":null,.*"skipped":[12],' "$work/skips/log.jsonl")" -eq 2 ]
check "counted on" sh -c "grep '\"step\":12,' '$work/skips/log.jsonl' | grep '\"skipped\":2,'"
lr() { sed -n 's/.*"step":6,.*\("n":.*"tokens":[0-9]*\).*/\1/p' "$work/$1/log.jsonl"; }
check "the schedule goes on" [ "$(lr skips)" = "$(lr through)" ]
check "a skipped step changes nothing" cmp "$work/skips/step_00000004/model.safetensors" "$work/skips/step_00000005/model.safetensors"
check "other steps do" sh -c "! cmp -s '$work/skips/step_00000005/model.safetensors' '$work/skips/step_00000006/model.safetensors'"
until=$(sed -n 's/.*"step":4,.*"flops":\([^,]*\),.*/\1/p' "$work/skips/log.jsonl")
ill resumed --save-every 1 --keep 9 --flops "$(echo "$until" | awk '{ print $1 * 0.999 }')" 2>"$work/said" &
wait $!
check "stopped between bad steps" [ "$(readlink "$work/resumed/latest")" = step_00000004 ]
check "bad steps, going on" ill resumed --save-every 1 --keep 9 --resume
check "bad steps: the same bits" same resumed skips
for resume in "" --resume; do # the second time from a checkpoint between the two
    check "--max-bad-steps $resume" fails 1 'step 5: .* the gradient of transformer.wte.weight: 2 bad steps in a row' ill badly --save-every 2 --max-bad-steps 2 $resume
    check "--max-bad-steps: the checkpoint stays $resume" holds badly latest log.jsonl step_00000004
done
check "--max-bad-steps 3 goes on" ill badly --save-every 2 --max-bad-steps 3 --resume
check "--max-bad-steps 3: the same bits" cmp "$work/badly/latest/optimizer.safetensors" "$work/skips/latest/optimizer.safetensors"
set_weights transformer.wte.weight $((130 * width)) "$width" '\000\000\000\000' # a norm that divides by next to nothing
check "an outlier of the gradient's norm" says "^step 4: the gradient's norm, [0-9.e+]*, is [0-9]* times its average$" ill outlier
check "no other step is" sh -c "! grep 'times its average' '$work/stderr' | grep -v '^step [45]:'"
set_weights transformer.wte.weight $((130 * width + 5)) 1 '\000\000\300\177' # a NaN that no step meets
check "poison is not saved" fails 1 'transformer.wte.weight of model.safetensors holds nan or infinity: not saved' run poison --model "$work/nan"
check "poison is not saved: nothing but the log" holds poison log.jsonl
check "weights that overflow" fails 1 'nan or infinity: not saved\|bad steps in a row' run absurd --save-every 1 --lr 1000 --muon-lr 1000 --weight-decay 1000 --warmup 0
check "no poison was saved" sh -c "! od -An -v -tf4 '$work/absurd/latest/model.safetensors' | grep -i -e nan -e inf"
check "no poisoned moments" sh -c "! od -An -v -tf4 '$work/absurd/latest/optimizer.safetensors' | grep -i -e nan -e inf"

# ---- when to end
flops() { grep -o '"flops":[^,]*' "$work/$1/log.jsonl" | sed 's/.*://' | awk -v n="$2" '{ last = before; before = $1; if ($1 >= n && !at) at = NR } END { print at, NR, last < n }'; }
check "--flops in a dry run" run dry --flops 3e8 --dry-run
at=$(sed -n 's/^--flops 3e+08: ends after step \([0-9]*\) of 12, .*/\1/p' "$work/out")
check "--flops" run budget --flops 3e8
check "--flops: at the first step that reaches it, as the dry run said" [ "$(flops budget 3e8)" = "$at $at 1" ]
check "--flops: with a checkpoint" holds budget latest log.jsonl "step_0000000$at"
check "--flops reached: nothing left to do" run budget --flops 3e8 --resume
check "--flops: more of it goes on" run budget --flops 1e18 --resume
check "--flops: the same bits" sh -c "cmp '$work/budget/latest/optimizer.safetensors' '$work/through/latest/optimizer.safetensors'"
check "--time-limit" says 'train: --time-limit: stopped after step [0-9]* of 400, saved in .*: --resume goes on$' run timed --batch-size 100 --steps 400 --time-limit 0.05 --save-before 0.03
check "--time-limit: saving begins in time" awk -F '"seconds":' '{ sum += $2 } END { print NR, sum; exit !(NR > 0 && sum < 1.5) }' "$work/timed/log.jsonl"
check "--time-limit: going on" says 'stopped after step' run timed --batch-size 100 --steps 400 --time-limit 0.005 --save-before 0 --resume
check "--time-limit without time" fails 2 'leaves no time to train' run timed --time-limit 3
check "--fixed-recurrences" run fixed --fixed-recurrences 3,2 --save-every 4
check "--fixed-recurrences: in every step" [ "$(grep -c '"mean_recurrence":5,"n":3,"k":2,' "$work/fixed/log.jsonl")" -eq 12 ]
check "--fixed-recurrences in a dry run" sh -c "'$train' --model $tiny --steps 3 --fixed-recurrences 3,2 --dry-run | grep '   5      2 .* 3,2$'"
check "--fixed-recurrences: another curriculum makes no difference" run fixed2 --fixed-recurrences 3,2 --curriculum none --mean-recurrence 9
check "--fixed-recurrences: the same weights" cmp "$work/fixed/latest/model.safetensors" "$work/fixed2/latest/model.safetensors"
check "--fixed-recurrences is the run's" fails 1 'fixed-recurrences was 3,2, is none' run fixed --resume
check "--fixed-recurrences of nothing" fails 2 'n,k like 4,8' run never --fixed-recurrences 3,0
check "--fixed-recurrences of one number" fails 2 'n,k like 4,8' run never --fixed-recurrences 3
check "--fixed-recurrences of a plain model" fails 2 'has no recurrence' run never --fixed-recurrences 3,2 --model test/fixtures/tiny/base
check "nothing was made" [ ! -e "$work/never" ]
printf '%-24s %d passed, %d failed\n' "runs that are not lost" $passed $failed
[ $failed -eq 0 ]
