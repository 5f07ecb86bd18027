#!/bin/sh
# The scripts of make demo and make smollm2, with stand-ins for the programs: what they show is what
# they run, an interrupted one goes on, and what they tell the user is so.
. test/check.sh
tree=$work/tree log=$work/log
mkdir -p "$tree/bin" "$tree/test/fixtures/lookup"
cp test/demo.sh test/smollm2.sh test/steps.sh "$tree/test"
cp test/fixtures/lookup/tasks.jsonl "$tree/test/fixtures/lookup"
stand_in() { # name; its script, after which its arguments are noted
    {
        printf '#!/bin/sh\necho "%s $*" >>"%s"\n' "$1" "$log"
        cat
    } >"$tree/$1"
    chmod +x "$tree/$1"
}
of='of() { # an option, arguments: its value
    name=$1
    while [ $# -gt 1 ]; do
        shift
        [ "$1" != "--$name" ] || echo "$2"
    done
}'
stand_in bin/convert <<END
$of
to=\$(of to "\$@")
case \$to in *.bin) : >"\$to" ;; *) mkdir -p "\$to" ;; esac
END
# Each step costs 100 FLOPs, the baseline's 40. \$STOP: where training is told to stop.
stand_in bin/train <<END
$of
out=\$(of out "\$@") steps=\$(of steps "\$@") cost=100
case "\$(of model "\$@")" in *base) cost=40 ;; esac
[ -z "\$WAIT" ] || sleep "\$WAIT"
[ -z "\$STOP" ] || [ "\$steps" -lt "\$STOP" ] || steps=\$STOP
mkdir -p "\$out/step_\$(printf %08d "\$steps")"
: >"\$out/latest"
echo "{\"flops\":\$((steps * cost)),}" >>"\$out/log.jsonl"
END
# At r = 8 all is right but the second deep task; at less it is wrong.
stand_in bin/infer <<END
$of
prompt=\$(of prompt "\$@") r=\$(of recurrences "\$@")
case "\$(of model "\$@")" in */base) loss=3.01 ;; */recurrent) loss=7.67 ;; *) loss=\$LOSS ;; esac
[ -z "\$(of eval "\$@")" ] || printf '  0  %s\n  4  %s\n' \$loss \$loss
[ -n "\$prompt" ] || exit 0
grep '"hops": [67]}' test/fixtures/lookup/tasks.jsonl | grep -nF "\"\$prompt\"" |
    sed 's/^\([0-9]*\):.*"answer": "\([^"]*\)".*/\1 \2/' | {
    read -r number answer
    [ "\$r" = 8 ] && [ "\$number" != 2 ] || answer="=x"
    echo "\$answer"
}
END
stand_in lookup </dev/null
stand_in check </dev/null
stand_in test/fetch_smollm2.sh </dev/null
stand_in test/fetch_text.sh </dev/null
demo() { (cd "$tree" && BIN=bin sh test/demo.sh ./lookup); }
smollm2() { (cd "$tree" && BIN=bin sh test/smollm2.sh ./check); }
stops() { # command that ends early, and says how to go on
    : >"$log"
    ! "$@" >"$work/shown" 2>"$work/stderr" && grep "^Stopped before the end: $again goes on" \
        "$work/stderr"
}
ends() {
    : >"$log"
    "$@" >"$work/shown" 2>"$work/stderr"
}
ran() { is "$(grep -c -- "$1" "$log")" "$2"; } # pattern, times
shown() { # the commands on the screen and in the demo's log, each in a line
    cat "$tree/build/demo/log" "$work/shown" |
        sed -e ':join' -e '/\\$/ { N; s/ \\\n */ /; b join' -e '}' | sed -n 's/^\$ //p'
}
says() { grep -qF "$1" "$work/shown"; }

# ---- make demo
again="make demo"
export STOP=300
check "the first training is stopped" stops demo
check "what follows is not done" ran '^bin/train' 1
export STOP=500
check "the baseline is stopped" stops demo
check "the first training went on" ran '^bin/train .*--resume .*--out build/demo/run$' 1
check "data are not made again" ran '^bin/convert\|^lookup' 0
check "the baseline has the same FLOPs" ran '^bin/train .*--steps 1000 ' 1
unset STOP
check "then it ends" ends demo
check "the baseline went on" ran '^bin/train .*--resume' 1
check "the first training was ready" ran '^bin/train' 1
check "once more: it begins anew" ends demo
check "with all of its trainings" ran '^bin/train' 3
check "and all data" ran '^bin/convert\|^lookup' 5
check "none goes on" ran '--resume' 0
cp "$log" "$work/whole"
typed() { # every command that is shown is one that ran
    shown >"$work/commands"
    [ "$(wc -l <"$work/commands")" -ge 14 ] || return 1
    : >"$log"
    (cd "$tree" && . "$work/commands") >/dev/null
    sort -u "$log" >"$work/typed"
    sort -u "$work/whole" | comm -13 - "$work/typed" | { ! grep .; }
}
check "what is shown is what runs" typed
unshown() { sort -u "$work/whole" | comm -23 - "$work/typed"; }
check "what runs is shown, but for three questions" is "$(unshown | wc -l)" 3
suggestion() { # its answer is the one that the demo says
    answer=$(sed -n 's/^another program, whose answer is \(.*\):$/\1/p' "$work/shown")
    shown | tail -n 1 >"$work/last"
    is "$( (cd "$tree" && . "$work/last"))" "$answer"
}
check "the suggestion gives the answer that it says" suggestion
check "wrong answers are called so" \
    is "$(grep -c '^r = [14]: =x   (wrong: it is =7)' "$work/shown")" 2
check "right ones too" is "$(grep -c '^r = 8: =7   (right)' "$work/shown")" 1
waits() { # told to stop, it ends once the training has saved
    rm -rf "$tree/build"
    (cd "$tree" && WAIT=2 STOP=300 BIN=bin exec sh test/demo.sh ./lookup) \
        >"$work/shown" 2>"$work/stderr" &
    demo=$!
    until grep -q '^bin/train' "$log"; do sleep 0.1; done
    kill -TERM $demo
    wait $demo
    is $? 130 && [ -e "$tree/build/demo/run/latest" ] && grep "make demo goes on" "$work/stderr"
}
: >"$log"
check "it waits until the training has saved" waits

# ---- make smollm2
again="make smollm2"
export LOSS=4.057
STOP=10 check "the training is stopped" stops smollm2
check "then it ends" ends smollm2
check "it went on" ran '^bin/train .*--resume' 1
check "nothing else was made again" ran '^bin/convert\|/\(base\|recurrent\) --eval' 0
check "the source's loss" says "is 4.057 now. The source model's, of 30 layers, is 3.01."
check "and what that means" says "So 80 steps do not win back what surgery took"
check "once more: all is there" ends smollm2
check "nothing is trained or measured again" ran '^bin/train\|--eval' 0
export LOSS=2.9 STEPS=9000 again="make smollm2 STEPS=9000"
STOP=10 check "more steps" stops smollm2
check "they begin anew" ran '--resume' 0
check "to the end" ends smollm2
check "better than the source" says "is 2.9 now. The source model's, of 30 layers, is 3.01."
check "then nothing was lost" is "$(grep -c 'do not win back' "$work/shown")" 0
check "the run before stays" [ -e "$tree/local/smollm2/run-80/latest" ]
printf '%-24s %d passed, %d failed\n' "make demo, make smollm2" $passed $failed
[ $failed -eq 0 ]
