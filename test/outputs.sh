#!/bin/sh
# What convert and infer write is there as a whole or not at all, whatever stops them: a signal or an
# error at each call by which they change files (test/shim.c), a signal at random moments, a nohup.
. test/check.sh
shim=$work/shim.so bin=$(cd "$BIN" && pwd) fixtures=$(pwd)/test/fixtures
export OMP_NUM_THREADS=1
call_stride=1 kill_count=20
case $BIN in *san*) call_stride=5 kill_count=3 ;; esac # the sanitizers are slow
check "the shim" ${CC:-cc} -shared -fPIC -O1 test/shim.c -o "$shim" -ldl

# Each makes out in the directory that it runs in.
random() { exec "$bin/convert" --random "$fixtures/tiny/recurrent" --to out "$@"; }
surgery() {
    exec "$bin/convert" --from "$fixtures/lookup/base" --to out --prelude 0 --core 1 --coda 2
}
tokenize() {
    exec "$bin/convert" --tokenize ../text.txt --tokenizer "$fixtures/tokenizers/smollm_style" \
        --to out.bin
}
infer() { exec "$bin/infer" --model "$fixtures/lookup/base" --prompt 'a=1 b' "$@"; }
logits() { infer --logits out; }
trace() {
    exec "$bin/infer" --model "$fixtures/tiny/recurrent" --prompt 'a=1 b' --max-tokens 2 \
        --tokenizer "$fixtures/lookup/base" --trace out
}

# In an empty directory, or one with an old output.
there() { # directory, old output or "", command
    rm -rf "${work:?}/$1"
    mkdir "$work/$1"
    [ -z "$2" ] || echo old >"$work/$1/$2"
    cd "$work/$1" && shift 2 && "$@"
}
faulty() { # call, what happens at it, command
    export SHIM_AT="$1" SHIM_DO="$2" LD_PRELOAD="$shim"
    shift 2
    "$@"
}
count_calls() { # what happens, command
    (
        export SHIM_COUNT="$work/calls"
        there count "" faulty 0 "$@"
    ) >"$work/out" 2>&1
    cat "$work/calls"
}
# The directory has what a run that was left alone gave, or what was there before.
whole_or_nothing() { # directory, old output or ""
    diff -r "$work/$1" "$work/good" >"$work/diff" && return
    if [ -n "$2" ]; then is "$(cd "$work/$1" && head -c 100 *)" old; else is "$(ls -A "$work/$1")" ""; fi
}
struck() { # call, what happens, old output or "", command
    call=$1 action=$2 old=$3
    shift 3
    (there struck "$old" faulty "$call" "$action" "$@") >"$work/stdout" 2>"$work/stderr"
    code=$?
    if [ "$action" = signal ]; then
        is $code 143 || return 1
    else
        is $code 1 || return 1
        is "$(grep -c '^convert: \|^infer: ' "$work/stderr")" 1 || return 1
    fi
    whole_or_nothing struck "$old"
}
every_call() { # old output or "", command
    old=$1
    shift
    check "$*" there good "" "$@"
    for action in signal ENOSPC EIO short; do
        count=$(count_calls $action "$@")
        check "$*: calls that change files" [ "$count" -ge 1 ]
        call=1
        while [ "$call" -le "$count" ]; do
            check "$*: $action at call $call of $count" struck "$call" $action "$old" "$@"
            call=$((call + call_stride))
        done
    done
}
for i in $(seq 300); do echo "Once upon a time there were $i words."; done >"$work/text.txt"
every_call "" random
every_call "" surgery
every_call out.bin tokenize
every_call out logits
every_call out trace
every_call "" trace

# Through a link to a file, and to what is no file.
linked() { mkdir -p sub && ln -s sub/file out && echo old >sub/file && logits; }
check "a link" there linked "" linked
check "a link: stays one" [ -L "$work/linked/out" ]
check "a link: its file is written" cmp "$work/linked/sub/file" "$work/linked/out"
check "a link: nothing beside" is "$(ls "$work/linked" "$work/linked/sub" | wc -w)" 5
piped() { mkfifo out && (cat out >copy &) && trace; }
check "a pipe" there piped "" piped
check "a pipe: stays one" [ -p "$work/piped/out" ]

# Nobody reads the picture, and the program ends amid the trace.
unread() { # the program's exit code is left in code
    mkfifo picture
    (
        (trace) 2>picture
        echo $? >code
    ) &
    : <picture
    wait $!
}
check "a picture that nobody reads" there unread "" unread
check "a picture that nobody reads: SIGPIPE" is "$(cat "$work/unread/code")" 141
check "a picture that nobody reads: nothing is left" is "$(cd "$work/unread" && echo *)" \
    "code picture"

# At any moment. A vocabulary of 100,000 takes a tenth of a second or more.
sed 's/vocab_size": *[0-9]*/vocab_size": 100000/' "$fixtures/tiny/recurrent/config.json" \
    >"$work/large.json"
large() { exec "$bin/convert" --random "$work/large.json" --to out --seed 3; }
stopped=0
stop_at_moments() { # signal, what the seconds begin with
    i=0
    while [ $i -lt $kill_count ]; do
        i=$((i + 1))
        rm -rf "$work/stopped" && mkdir "$work/stopped"
        (cd "$work/stopped" && large) >"$work/stdout" 2>"$work/stderr" &
        pid=$!
        sleep "$2$i"
        kill -"$1" $pid 2>/dev/null
        wait $pid 2>/dev/null
        [ $? -le 128 ] || stopped=$((stopped + 1))
        left=$(ls -A "$work/stopped")
        check "SIG$1: nothing half-written" [ -z "$left" -o "$left" = out ]
    done
}
stop_at_moments TERM 0.0
stop_at_moments HUP 0.00
check "some were stopped" [ $stopped -gt 0 ]
ignoring() {
    trap '' HUP
    there ignoring "" random &
    pid=$!
    kill -HUP $pid
    wait $pid
}
check "nohup" ignoring
check "nohup: it goes on" [ -e "$work/ignoring/out/config.json" ]
printf '%-24s %d passed, %d failed\n' "outputs" $passed $failed
[ $failed -eq 0 ]
