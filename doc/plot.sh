#!/bin/sh
# plot.sh RUN: RUN/log.jsonl as a picture, RUN/plot.svg: losses, curriculum, learning rates,
# gradients, states. plot.sh RUN RUN...: several runs in one, FIRST/compare.svg, over FLOPs if one
# has made more steps than another. Needs gnuplot.
export LC_ALL=C WORK=
fail() { echo "plot: $*" >&2 && exit 1; }
if [ $# -eq 1 ] && [ ! -d "$1" ]; then # make plot RUN="a b"
    set -f
    set -- $1
    set +f
fi
[ $# -gt 0 ] || fail "which run? make plot RUN=dir, a directory that train --out wrote"
[ $# -le 8 ] || fail "$# runs: a picture has at most 8"
for run; do
    [ -f "$run/log.jsonl" ] ||
        fail "$run/log.jsonl: no such file: RUN=dir is a directory that train --out wrote"
done
[ -w "$1" ] || fail "$1: not writable"
command -v gnuplot >/dev/null || fail "gnuplot was not found: install it (apt install gnuplot-nox)"
WORK=$(mktemp -d) || exit 1
[ $# -eq 1 ] && picture=$1/plot.svg || picture=$1/compare.svg
trap 'rm -rf "$WORK" "$picture.$$"' EXIT
trap 'exit 1' INT TERM

# What tells the runs apart in legends: their paths without the directories that all share, or
# numbers if that is still long.
printf '%s\n' "$@" | tee "$WORK/paths" | awk '
{
    depth[NR] = split($0, parts, "/")
    for (i = 1; i <= depth[NR]; i++) part[NR, i] = parts[i]
}
function shared(i) { # whether all paths have the same directory there
    for (run = 1; run <= NR; run++)
        if (i >= depth[run] || part[run, i] != part[1, i]) return 0
    return 1
}
END {
    for (first = 1; shared(first); first++) continue
    for (run = 1; run <= NR; run++) {
        name[run] = part[run, first]
        for (i = first + 1; i <= depth[run]; i++) name[run] = name[run] "/" part[run, i]
        if (length(name[run]) > 24) long = 1
    }
    for (run = 1; run <= NR; run++) print long ? "run " run : name[run]
}' >"$WORK/names"

# A log as tables: i.steps; i.skips, the steps that were skipped; i.val.r, the validations at r
# recurrences; and `facts`, which says what there is to draw, since gnuplot ends at a plot without a
# point. A long run is thinned to 1,500 steps, each with the largest gradient norm up to it. The
# smoothed loss is the mean over a window around a step.
tables() { # number, run
    NUMBER=$1 awk '
function value(name) { # of this line; "NaN" if it is null or missing
    if (!match($0, "\"" name "\":[^],}]+")) return "NaN"
    name = substr($0, RSTART + length(name) + 3, RLENGTH - length(name) - 3)
    return name == "null" ? "NaN" : name + 0
}
function seen(name, x) { # notes that there is something to draw
    if (x != "NaN") there[name] = 1
    return x
}
function positive(name, x) { # what a logarithmic axis can show
    return seen(name, x != "NaN" && x > 0 ? x : "NaN")
}
function min(x, y) { return x == "NaN" || (y != "NaN" && y < x) ? y : x }
function max(x, y) { return x == "NaN" || (y != "NaN" && y > x) ? y : x }
BEGIN {
    run = ENVIRON["NUMBER"]
    table = ENVIRON["WORK"] "/" run "."
    facts = ENVIRON["WORK"] "/facts"
    low = peak = top = val_low = val_peak = val_top = norm_low = "NaN"
}
!/}$/ { next } # train is writing this line
/"val":/ {
    at = value("step")
    while (match($0, /"[0-9]+":[^,}]+/)) {
        split(substr($0, RSTART + 1, RLENGTH - 1), pair, "\":")
        $0 = substr($0, RSTART + RLENGTH)
        if (pair[2] == "null") continue
        print at, flops_at[at] + 0, pair[2] >(table "val." pair[1])
        val_at[++vals] = at
        val[vals] = pair[2] + 0
        val_low = min(val_low, val[vals])
        val_peak = max(val_peak, val[vals])
    }
}
/"loss":/ {
    step[++n] = value("step")
    flops[n] = flops_at[step[n]] = value("flops")
    loss[n] = seen("loss", value("loss"))
    low = min(low, loss[n])
    peak = max(peak, loss[n])
    sum[n] = sum[n - 1] + (loss[n] != "NaN" ? loss[n] : 0)
    count[n] = count[n - 1] + (loss[n] != "NaN")
    norm[n] = positive("norm", value("grad_norm"))
    norm_low = min(norm_low, norm[n])
    if (value("grad_norm") == "NaN") {
        print step[n], flops[n] >(table "skips")
        skips++
    }
    states = 0
    if (match($0, /"state_rms":\[[^]]+/))
        states = split(substr($0, RSTART + 13, RLENGTH - 13), rms, ",")
    begin = states && rms[1] != "null" ? rms[1] : "NaN"
    end = states && rms[states] != "null" ? rms[states] : "NaN"
    rest[n] = positive("mean", value("mean_recurrence")) " " value("n") + value("k") " " \
        value("k") " " positive("lr", value("lr")) " " positive("muon", value("muon_lr")) " " \
        seen("begin", begin) " " seen("end", end)
    tokens = value("tokens")
}
END {
    if (!n) exit 1
    every = int((n - 1) / 1500) + 1
    norms = "NaN"
    # The largest losses after a tenth of the run: what lies before would press the rest flat.
    for (i = 1; i <= n; i++) {
        if (step[i] > step[n] / 10) top = max(top, loss[i])
        norms = max(norms, norm[i])
        if (i % every && i < n) continue
        half = int(n / 50) + 1
        from = i - min(half, i - 1)
        to = min(i + half, n)
        losses = count[to] - count[from - 1]
        smoothed = losses ? (sum[to] - sum[from - 1]) / losses : "NaN"
        print step[i], flops[i], loss[i], smoothed, norms, rest[i] >(table "steps")
        norms = "NaN"
    }
    for (i = 1; i <= vals; i++)
        if (val_at[i] > step[n] / 10) val_top = max(val_top, val[i])
    for (name in there) printf "there_%s_%d = 1\n", name, run >>facts
    if (skips) printf "skips_%d = %d\n", run, skips >>facts
    printf "last_%d = %d; tokens_%d = %.9g; flops_%d = %.9g\n", run, step[n], run, tokens, run,
        flops[n] >>facts
    printf "low_%d = %s; top_%d = %s; peak_%d = %s\n", run, low, run, top, run, peak >>facts
    printf "val_low_%d = %s; val_top_%d = %s; val_peak_%d = %s\n", run, val_low, run, val_top, run,
        val_peak >>facts
    printf "norm_low_%d = %s\n", run, norm_low >>facts
}' "$2/log.jsonl" || fail "$2/log.jsonl has no step yet"
    (cd "$WORK" && ls) | sed -n "s/^$1\.val\.//p" | sort -n | tr '\n' ' ' >"$WORK/$1.depths"
}
number=0
for run; do
    number=$((number + 1))
    tables $number "$run"
done
echo "runs = $number" >>"$WORK/facts"

gnuplot >"$picture.$$" 2>"$WORK/said" <<'END' || fail "gnuplot: $(cat "$WORK/said")"
set encoding utf8
work = system('printf %s "$WORK"') . '/'
load work . 'facts'
file(i, table) = sprintf('%s%d.%s', work, i, table)
line(i, name) = system(sprintf('sed -n %dp "$WORK/%s"', i, name))
array path[runs]
array name[runs]
one = runs == 1
by_flops = 0
do for [i = 1:runs] {
    path[i] = line(i, 'paths')
    name[i] = line(i, 'names')
    if (value(sprintf('last_%d', i)) != last_1) { by_flops = 1 }
}
x = by_flops ? 2 : 1

# Of all runs: the largest or the smallest of a number, where there is one.
number(what, i) = value(sprintf('%s_%d', what, i))
larger(a, b) = a != a || b > a ? b : a
smaller(a, b) = a != a || b < a ? b : a
largest(what, i) = i ? larger(largest(what, i - 1), number(what, i)) : NaN
smallest(what, i) = i ? smaller(smallest(what, i - 1), number(what, i)) : NaN

# An axis ends a little above `top`; what lies above that is said.
axis_end(top, low) = top > low ? sprintf('%.9g', top + 0.03 * (top - low)) : '*'
above(end, peak) = end ne '*' && peak > real(end) ? sprintf('; it begins above, at %.3g', peak) : ''
loss_end = axis_end(largest('top', runs), smallest('low', runs))
loss_above = above(loss_end, largest('peak', runs))
val_end = axis_end(largest('val_top', runs), smallest('val_low', runs))
val_above = above(val_end, largest('val_peak', runs))

blue = '#1f4e8c'
orange = '#d95f02'
pale = '#a9bfd8'
red = '#d7191c'
array colors[8] = [0x1f4e8c, 0xd95f02, 0x1b8a5a, 0x8e44ad, 0xb8860b, 0x17a2b8, 0xc2185b, 0x555555]
toward_white(c, share) = int(c + share * (255 - c))
shade(c, s) = toward_white(c / 65536, s) * 65536 + toward_white(c / 256 % 256, s) * 256 \
    + toward_white(c % 256, s)
dots = last_1 > 500 ? 0.25 : 0.4
few = largest('last', runs) <= 50 # a line of one point is invisible
drawn = few ? ' with linespoints pt 7 ps 0.5' : ' with lines'
color(i) = sprintf(' lc rgb %d', colors[i])
there(what, i) = exists(sprintf('there_%s_%d', what, i))
steps(i, column) = sprintf(", file(%d, 'steps') using %d:%d", i, x, column)
titled(i, what) = sprintf(one ? " title '%s'" : " title name[%d] . ', %s'", one ? what : i, what)
alone(i, what) = one ? titled(i, what) : sprintf(' title name[%d]', i)
in_color(i, c) = one ? " lc rgb '" . c . "'" : color(i)

# The curves of each panel, each behind a comma.
loss = val = curriculum = rate = norm = state = ''
do for [i = 1:runs] {
    if (there('loss', i)) {
        if (one) { loss = steps(i, 3) . drawn . ' lc rgb pale' . titled(i, 'each step') }
        loss = loss . steps(i, 4) . drawn . ' lw 2.5' . in_color(i, blue) . alone(i, 'smoothed')
    }
    depths = system(sprintf('cat "$WORK/%d.depths"', i))
    n = words(depths)
    do for [j = 1:n] {
        r = word(depths, j)
        share = n > 1 ? (j - 1.) / (n - 1) : 1
        val = val . sprintf(", file(%d, 'val.%s') using %d:3", i, r, x) \
            . ' with linespoints pt 7 ps 0.5 lw 2' \
            . (one ? sprintf(' lc palette frac %g', share) \
                   : sprintf(' lc rgb %d', shade(colors[i], 0.65 * (1 - share)))) \
            . (one || n == 1 ? titled(i, r eq '0' ? 'no recurrence' : 'r = ' . r) : j < n \
                   ? ' notitle' : titled(i, 'r = ' . word(depths, 1) . ' to ' . r))
    }
    if (there('mean', i)) {
        if (one) {
            points = sprintf(' with points pt 7 ps %g lc rgb ', dots)
            curriculum = steps(i, 7) . points . 'pale' . titled(i, 'n + k') \
                . steps(i, 8) . points . 'orange' . titled(i, 'k')
        }
        curriculum = curriculum . steps(i, 6) . drawn . ' lw 2.5' . in_color(i, blue) \
            . alone(i, 'mean')
    }
    if (there('lr', i)) {
        rate = rate . steps(i, 9) . drawn . ' lw 2.5' . in_color(i, blue) . alone(i, 'lr')
    }
    if (there('muon', i)) {
        rate = rate . steps(i, 10) . drawn . ' lw 2.5' . (one ? '' : ' dt 2') \
            . in_color(i, orange) . (one ? titled(i, 'muon_lr') : ' notitle')
    }
    if (there('norm', i)) {
        norm = norm . steps(i, 5) . drawn . in_color(i, blue) . alone(i, 'norm')
    }
    if (exists(sprintf('skips_%d', i))) {
        lowest = smallest('norm_low', runs)
        at = lowest == lowest ? lowest : 1
        norm = norm . sprintf(", file(%d, 'skips') using %d:(%g)", i, x, at) \
            . ' with points pt 2 ps 0.7 lw 2' . in_color(i, red) \
            . titled(i, sprintf('steps skipped: %d', number('skips', i)))
    }
    if (there('begin', i) && one) {
        state = steps(i, 11) . sprintf(' with points pt 7 ps %g lc rgb orange', dots) \
            . titled(i, 'after n recurrences')
    }
    if (there('end', i)) {
        state = state . steps(i, 12) . drawn . in_color(i, blue) . alone(i, 'after n + k')
    }
}

# Title and panels. What the logs have nothing of gets no axes.
absent = (loss eq '' ? ', training loss' : '') . (val eq '' ? ', validation loss' : '') \
    . (curriculum eq '' ? ', recurrences' : '') . (rate eq '' ? ', learning rate' : '') \
    . (norm eq '' ? ', gradient' : '') . (state eq '' ? ', state' : '')
panels = (loss ne '') + (val ne '') + (curriculum ne '') + (rate ne '') + (norm ne '') \
    + (state ne '')
wrap(text) = strlen(text) <= 125 ? text : text[1:125] . "\n" . wrap(text[126:*])
lines(text) = strstrt(text, "\n") ? 1 + lines(text[strstrt(text, "\n") + 1:*]) : 1
title = ''
do for [i = 1:runs] {
    title = title . (i > 1 ? "\n" : '') \
        . wrap((one || name[i] eq path[i] ? '' : name[i] . ' = ') . path[i] \
        . sprintf(': %d steps, %.4g tokens, %.3g FLOPs', number('last', i), number('tokens', i), \
                  number('flops', i)))
}
if (absent ne '') {
    title = title . "\nnot in " . (one ? 'this log' : 'these logs') . ': ' . absent[3:*]
}
rows = panels > 2 ? (panels + 1) / 2 : 1
columns = panels > 1 ? 2 : 1
set terminal svg size 620 * columns, 20 + 24 * lines(title) + 390 * rows dynamic \
    font 'sans-serif,14' background '#ffffff'
set multiplot layout rows, columns scale 1, 0.96 title title noenhanced font ',17'
set border 3 lc '#777777'
set tics nomirror textcolor '#333333'
set grid lc '#dddddd' lw 1 dt 1
set key bmargin center horizontal samplen 1.5 noenhanced
set lmargin 9
set rmargin 4
set xrange [0:by_flops ? largest('flops', runs) : largest('last', runs)]
set xlabel by_flops ? 'FLOPs' : 'step' offset 0, 0.4
if (by_flops) { set format x '%.3g' }
set palette defined (0 '#e0a800', 0.35 '#d9480f', 0.7 '#a11a6a', 1 '#2c1a75')
unset colorbox

set yrange [*:@loss_end]
set title 'Training loss' . (one ? '' : ', smoothed') . loss_above font ',16' noenhanced
if (loss ne '') { eval 'plot' . loss[2:*] }
set yrange [*:@val_end]
set title 'Validation loss' . (one ? ' by recurrences' : ', pale for small r') . val_above
if (val ne '') { eval 'plot' . val[2:*] }
set yrange [0:*]
set title one ? 'Curriculum: mean of the recurrences, and the n + k and k drawn' \
    : 'Curriculum: mean of the recurrences'
if (curriculum ne '') { eval 'plot' . curriculum[2:*] }
set logscale y
set format y '%g'
set yrange [*:*]
set title one ? 'Learning rate' : 'Learning rate, and muon_lr (dashed)'
if (rate ne '') { eval 'plot' . rate[2:*] }
set title 'Norm of the gradient, before clipping'
if (norm ne '') { eval 'plot' . norm[2:*] }
unset logscale y
set yrange [0:*]
set title 'RMS of the state' . (one ? '' : ' after n + k recurrences')
if (state ne '') { eval 'plot' . state[2:*] }
END
mv "$picture.$$" "$picture" && echo "$picture"
