#!/bin/sh
# make plot: what it draws of a log, and what it says where it cannot.
. test/check.sh
train=$BIN/train run=$work/run shell=$(command -v sh)
export OMP_NUM_THREADS=1
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
# One line of output, a picture that is whole, nothing beside it, and a panel for all but the parts
# that are named as absent.
drawn() { # parts: "loss, state"
    out=$(plot "$run" 2>&1) || return 1
    [ "$out" = "$run/plot.svg" ] || return 1
    [ "$(ls -A "$run" | grep -c plot)" -eq 1 ] || return 1
    if command -v xmllint >/dev/null; then xmllint --noout "$run/plot.svg" || return 1; fi
    tail -n 2 "$run/plot.svg" | grep -q '^</svg>' || return 1
    panels "$run/plot.svg" "not in this log" "$1"
}
panels() { # picture, "not in …", parts
    is "$(sed -n "s/.*$2: \([^<]*\).*/\1/p" "$1")" "$3" || return 1
    while IFS=: read -r part title; do
        there=$(grep -c ">$title" "$1")
        case ", $3," in
        *", $part,"*) is "$title: $there" "$title: 0" || return 1 ;;
        *) is "$title: $there" "$title: 1" || return 1 ;;
        esac
    done <<'END'
training loss:Training loss
validation loss:Validation loss
recurrences:Curriculum
learning rate:Learning rate
gradient:Norm of the gradient
state:RMS of the state
END
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
check "the run, drawn" drawn ""
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
check "steps that were skipped" drawn ""
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
check "one step, no validation" drawn "validation loss"
check "one step: a point" points 'each step' 1
{
    step 1 null null null 1
    step 2 null null null 2
    echo '{"step":2,"val":{"1":null}}'
} | log
check "no numbers at all" drawn "training loss, validation loss, state"
check "those are marked" points 'steps skipped: 2' 2
: | log
check "no step yet" fails 'has no step yet' plot "$run"

# ---- other names, another model
step 1 5 1 1,3 0 | log
odd="$work/100% <a & 'b_c' \"d"
mv "$run" "$odd"
run=$odd
check "odd names" drawn "validation loss"
title="100% &lt;a &amp; 'b_c' \"d: 1 steps, 32 tokens, 1e+09 FLOPs"
check "in the title" grep -q ">[^<]*$title<" "$run/plot.svg"
check "the baseline" train base --optimizer adamw --val "$work/val.bin" --eval-rows 2
check "the baseline, drawn" drawn "recurrences, state"
check "the baseline: its curves" named 'each step,smoothed,no recurrence,lr,norm,'

# ---- what an axis leaves out is said
for i in 1 2 3 4 5 6 7 8 9 10 11; do step $i $((1000 / i)) 1 1,3 0; done | log
check "a loss that falls far" drawn "validation loss"
check "what lies above the axis" \
    grep -q '>Training loss; it begins above, at 1e+03<' "$run/plot.svg"

# ---- several runs in one picture
several=$work/several
a=$several/with/a b=$several/with/b
mkdir -p "$a" "$b" "$several/c d"
for i in 1 2; do step $i $((9 - i)) 1 1,3 0; done >"$a/log.jsonl"
echo '{"step":2,"val":{"1":7,"8":6}}' >>"$a/log.jsonl"
sed 's/,"mean_recurrence":4//; s/,"state_rms":[^]]*]//; /val/d' "$a/log.jsonl" >"$b/log.jsonl"
cp "$b/log.jsonl" "$several/c d"
compare() { # absent parts, the first run, the runs as they are given
    absent=$1 first=$2
    shift 2
    out=$(plot "$@" 2>&1) || return 1
    is "$out" "$first/compare.svg" || return 1
    [ ! -e "$first/plot.svg" ] || return 1
    if command -v xmllint >/dev/null; then xmllint --noout "$out" || return 1; fi
    panels "$out" "not in these logs" "$absent"
}
over() { is "$(grep -c ">$1<" "$2/compare.svg")" 6; }
titles() { sed -n 's|.*<text[^>]*>\(.*\)</text>|\1|p' "$1/compare.svg" | sed 's/<[^>]*>//g'; }
told() { titles "$1" | grep -qxF "$2"; }
check "two runs" compare "" "$a" "$a" "$b"
check "of as many steps: over steps" over step "$a"
check "which is which" told "$a" "a = $a: 2 steps, 32 tokens, 1e+09 FLOPs"
check "the other one" told "$a" "b = $b: 2 steps, 32 tokens, 1e+09 FLOPs"
run=$a
mv "$a/compare.svg" "$a/plot.svg"
names="a,b,a, r = 1 to 8,a,a,b,a,b,a,"
check "their curves" is "$(curves | sed 's/gnuplot_plot_[^,]*,//g')" "$names"
rm "$a/plot.svg"
check "a name with a space" compare "validation loss, recurrences, state" "$several/c d" \
    "$several/c d" "$b"
step 3 5 1 1,3 0 | sed 's/1e+09/3e+09/' >>"$b/log.jsonl"
check "in one word, as from make" compare "" "$a" "$a $b"
check "of other steps: over FLOPs" over FLOPs "$a"
long=$work/$(printf 'a-long-name-%d/' 1 2 3 4 5 6 7 8 9 10)
mkdir -p "$long/one-with-a-long-name-of-its-own" "$long/two"
for name in one-with-a-long-name-of-its-own two; do cp "$a/log.jsonl" "$long/$name"; done
check "long names" compare "" "$long/one-with-a-long-name-of-its-own" \
    "$long/one-with-a-long-name-of-its-own" "$long/two"
whole() { # the paths stand in the title, over several lines
    titles "$long/one-with-a-long-name-of-its-own" | tr -d '\n' >"$work/titles"
    grep -qF "run 1 = $long/one-with-a-long-name-of-its-own: 2 steps" "$work/titles" &&
        grep -qF "run 2 = $long/two: 2 steps" "$work/titles"
}
check "nothing of them is cut" whole
check "one that is not there" fails 'nowhere/log.jsonl: no such file' plot "$a" "$work/nowhere"
check "too many" fails '9 runs: a picture has at most 8' plot 1 2 3 4 5 6 7 8 9
printf '%-24s %d passed, %d failed\n' "make plot" $passed $failed
[ $failed -eq 0 ]
