#!/bin/sh
# make plot: what it draws of a log, and what it says where it cannot.
. test/check.sh
train=$BIN/train run=$work/run shell=$(command -v sh)
export OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0
plot() { sh doc/plot.sh "$@"; }
fails() { # text, command: it says one line and leaves the directory as it was
    text=$1
    shift
    before=$(ls -A "$run")
    ("$@") >"$work/stdout" 2>"$work/stderr"
    [ $? -eq 1 ] && [ "$(wc -l <"$work/stderr")" -eq 1 ] || return 1
    grep "^plot: .*$text" "$work/stderr" || return 1
    [ "$(ls -A "$run")" = "$before" ]
}
train() { # model, options
    model=$1
    shift
    rm -rf "$run"
    "$train" --model test/fixtures/tiny/"$model" --data "$work/shard.bin" --out "$run" \
        --steps 12 --seq-len 16 --micro-batch-size 2 "$@"
}
shard >"$work/shard.bin"
other=2 shard >"$work/val.bin"
check "a run" train recurrent --mean-recurrence 4 --val "$work/val.bin" --eval-every 3 \
    --eval-recurrences 1,2,4,16 --eval-rows 2
cp "$run/log.jsonl" "$work/whole.jsonl"

# ---- where it cannot draw
check "no run named" fails 'make plot RUN=dir' plot
check "a run that is not there" fails 'nowhere/log.jsonl: no such file' plot "$work/nowhere"
check "without gnuplot" fails 'apt install gnuplot-nox' \
    env PATH="$work" "$shell" doc/plot.sh "$run"
mkdir "$work/broken"
printf '#!/bin/sh\necho "<svg>"\necho wrong >&2\nexit 1\n' >"$work/broken/gnuplot"
chmod +x "$work/broken/gnuplot"
broken_plot() { env PATH="$work/broken:$PATH" "$shell" doc/plot.sh "$run"; }
check "gnuplot fails" fails 'gnuplot: wrong' broken_plot
echo before >"$run/plot.svg"
check "gnuplot fails, again" fails 'gnuplot: wrong' broken_plot
check "the picture before stays" grep -qx before "$run/plot.svg"
if ! command -v gnuplot >/dev/null; then
    echo "plot: gnuplot is not here: what it draws is not checked"
    printf '%-24s %d passed, %d failed\n' "make plot" $passed $failed
    [ $failed -eq 0 ]
    exit
fi

# ---- what it draws
# One line of output, a picture that is whole, nothing beside it, and so many panels without data.
drawn() { # panels
    out=$(plot "$run" 2>&1) || return 1
    [ "$out" = "$run/plot.svg" ] || return 1
    [ "$(ls -A "$run" | grep -c plot)" -eq 1 ] || return 1
    if command -v xmllint >/dev/null; then xmllint --noout "$run/plot.svg" || return 1; fi
    tail -n 2 "$run/plot.svg" | grep -q '^</svg>' || return 1
    for title in 'Training loss' 'Validation loss' Curriculum 'Learning rate' \
        'Norm of the gradient' 'RMS of the state'; do
        [ "$(grep -c ">$title" "$run/plot.svg")" -eq 1 ] || return 1
    done
    [ "$(grep -c 'not in this log' "$run/plot.svg")" -eq "$1" ]
}
curves() { # their names
    sed -n 's|.*<title>\(.*\)</title>.*|\1|p' "$run/plot.svg" | grep -vi gnuplot | tr '\n' ','
}
heights() { # curve: where its points are, upwards; the last one is the legend's
    sed -n "/<title>$1</,/<g id=/s/.*<use .*translate([0-9.]*,\([0-9.]*\)).*/-\1/p" \
        "$run/plot.svg" | sed '$d'
}
named() { [ "$(curves)" = "$1" ]; }
points() { [ "$(heights "$1" | wc -l)" -eq "$2" ]; }
check "the run, drawn" drawn 0
names='each step,smoothed,r = 1,r = 2,r = 4,r = 16,n + k,k,mean,lr,muon_lr,norm,'
check "its curves" named "${names}after n recurrences,after n + k,"
check "a point for each step" points 'n + k' 12
for r in 1 2 4 16; do check "a point for each validation, r = $r" points "r = $r" 4; done

# ---- logs with gaps
log() { cat >"$run/log.jsonl"; }
step() { # step, loss, norm, states, skipped
    printf '{"step":%d,"loss":%s,"grad_norm":%s,"mean_recurrence":4,"n":4,"k":2,' "$1" "$2" "$3"
    printf '"lr":1e-5,"muon_lr":0.001,"tokens":32,"flops":1e+09,"skipped":%d,' "$5"
    printf '"seconds":0.005,"state_rms":[%s]}\n' "$4"
}
{
    step 1 5 1 1,9,3 0
    printf '{"step":1,"val":{"1":7,"2":6}}\n'
    step 2 null null 1,null,3 1
    step 3 null null null,null 2
    step 4 3 2 1,2,3 2
    printf '{"step":4,"val":{"1":5,"2":null}}\n{"step":5,"loss":1,"gra'
} | log
check "steps that were skipped" drawn 0
check "they are marked" grep -q '<title>steps skipped: 2</title>' "$run/plot.svg"
check "at 2 of 4 steps" points 'steps skipped: 2' 2
check "numbers that were none" points 'r = 2' 1
check "half a line is not read" points norm 2
order() { # curves from the lowest to the highest at their first points
    for curve; do heights "$curve" | head -n 1; done >"$work/heights"
    [ "$(wc -l <"$work/heights")" -eq $# ] || return 1
    sort -n -u "$work/heights" | cmp - "$work/heights"
}
check "k, mean, n + k" order k mean 'n + k'
middle() { # whether the second height is between the first and the third
    awk '
        { h[NR] = $1 }
        END {
            d = (h[1] + h[3]) / 2 - h[2]
            exit !(NR == 3 && d < 0.02 && d > -0.02)
        }' "$work/heights"
}
check "2, 4 and 6 in their places" middle
check "lr, muon_lr" order lr muon_lr
check "the first state, the last" order 'after n recurrences' 'after n + k'
check "r = 2 is below r = 1" order 'r = 2' 'r = 1'
falls() { heights "$1" | awk '{ h[NR] = $1 } END { exit !(NR >= 2 && h[1] > h[2]) }'; }
check "the loss falls" falls 'each step'

step 1 5 1 1,3 0 | log
check "one step, no validation" drawn 1
check "one step: a point" points 'each step' 1
{
    step 1 null null null 1
    step 2 null null null 2
    echo '{"step":2,"val":{"1":null}}'
} | log
check "no numbers at all" drawn 3
check "those are marked" points 'steps skipped: 2' 2
: | log
check "no step yet" fails 'has no step yet' plot "$run"

# ---- other names, another model
step 1 5 1 1,3 0 | log
odd="$work/100% <a & 'b_c' \"d"
mv "$run" "$odd"
run=$odd
check "odd names" drawn 1
title="100% &lt;a &amp; 'b_c' \"d: 1 steps, 32 tokens, 1e+09 FLOPs"
check "in the title" grep -q ">[^<]*$title<" "$run/plot.svg"
check "the baseline" train base --optimizer adamw --val "$work/val.bin" --eval-rows 2
check "the baseline, drawn" drawn 2
check "the baseline: its curves" named 'each step,smoothed,no recurrence,lr,norm,'
printf '%-24s %d passed, %d failed\n' "make plot" $passed $failed
[ $failed -eq 0 ]
