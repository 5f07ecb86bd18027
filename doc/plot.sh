#!/bin/sh
# RUN/log.jsonl as a picture, RUN/plot.svg: losses, curriculum, learning rates, gradients, states.
# Needs gnuplot.
export LC_ALL=C RUN="$1" WORK=
fail() { echo "plot: $*" >&2 && exit 1; }
[ -n "$RUN" ] || fail "which run? make plot RUN=dir, a directory that train --out wrote"
[ -f "$RUN/log.jsonl" ] ||
    fail "$RUN/log.jsonl: no such file: RUN=dir is a directory that train --out wrote"
[ -w "$RUN" ] || fail "$RUN: not writable"
command -v gnuplot >/dev/null || fail "gnuplot was not found: install it (apt install gnuplot-nox)"
WORK=$(mktemp -d) || exit 1
picture=$RUN/plot.svg.$$
trap 'rm -rf "$WORK" "$picture"' EXIT
trap 'exit 1' INT TERM

# The log as tables: `steps`; `skips`, the steps that were skipped; `val.r`, the validations at r
# recurrences; and `there`, which says what there is to draw, since gnuplot ends at a plot without a
# point. A long run is thinned to 1,500 steps, each with the largest gradient norm up to it. The
# smoothed loss is the mean over a window around a step.
awk '
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
function min(x, y) { return x < y ? x : y }
function max(x, y) { return x == "NaN" || (y != "NaN" && y > x) ? y : x }
function axis_end(x, low) { # a little above x; "*" leaves it to gnuplot
    return x == "NaN" || x <= low ? "*" : sprintf("%.9g", x + 0.03 * (x - low))
}
BEGIN { work = ENVIRON["WORK"] "/" }
!/}$/ { next } # train is writing this line
/"val":/ {
    at = value("step")
    while (match($0, /"[0-9]+":[^,}]+/)) {
        split(substr($0, RSTART + 1, RLENGTH - 1), pair, "\":")
        $0 = substr($0, RSTART + RLENGTH)
        if (pair[2] == "null") continue
        print at, pair[2] >(work "val." pair[1])
        val_at[++vals] = at
        val[vals] = pair[2] + 0
        val_low = vals > 1 ? min(val_low, val[vals]) : val[vals]
    }
}
/"loss":/ {
    step[++n] = value("step")
    loss[n] = seen("losses", value("loss"))
    if (loss[n] != "NaN") low = count[n - 1] ? min(low, loss[n]) : loss[n]
    sum[n] = sum[n - 1] + (loss[n] != "NaN" ? loss[n] : 0)
    count[n] = count[n - 1] + (loss[n] != "NaN")
    norm[n] = positive("norms", value("grad_norm"))
    if (norm[n] != "NaN") norm_low = norm_low ? min(norm_low, norm[n]) : norm[n]
    if (value("grad_norm") == "NaN") {
        print step[n] >(work "skips")
        skips++
    }
    states = 0
    if (match($0, /"state_rms":\[[^]]+/))
        states = split(substr($0, RSTART + 13, RLENGTH - 13), rms, ",")
    begin = states && rms[1] != "null" ? rms[1] : "NaN"
    end = states && rms[states] != "null" ? rms[states] : "NaN"
    rest[n] = positive("means", value("mean_recurrence")) " " value("n") + value("k") " " \
        value("k") " " positive("lr", value("lr")) " " positive("muon", value("muon_lr")) " " \
        seen("states", begin) " " seen("states", end)
    facts = sprintf("last = %d; skips = %d; tokens = %.9g; flops = %.9g", step[n], skips,
                    value("tokens"), value("flops"))
}
END {
    if (!n) exit 1
    every = int((n - 1) / 1500) + 1
    norms = "NaN"
    # The largest losses after a tenth of the run: what lies before would press the rest flat.
    top = "NaN"
    val_top = "NaN"
    for (i = 1; i <= n; i++) {
        if (step[i] > step[n] / 10) top = max(top, loss[i])
        norms = max(norms, norm[i])
        if (i % every && i < n) continue
        half = int(n / 50) + 1
        from = i - min(half, i - 1)
        to = min(i + half, n)
        losses = count[to] - count[from - 1]
        smoothed = losses ? (sum[to] - sum[from - 1]) / losses : "NaN"
        print step[i], loss[i], smoothed, norms, rest[i] >(work "steps")
        norms = "NaN"
    }
    for (i = 1; i <= vals; i++)
        if (val_at[i] > step[n] / 10) val_top = max(val_top, val[i])
    for (name in there) print "there_" name " = 1" >(work "there")
    if (!norm_low) norm_low = 1
    printf "%s; few = %d; norm_low = %g\n", facts, (n <= 50), norm_low >(work "there")
    printf "top = \"%s\"; val_top = \"%s\"\n", axis_end(top, low), axis_end(val_top, val_low) \
        >(work "there")
}' "$RUN/log.jsonl" || fail "$RUN/log.jsonl has no step yet"
VALIDATED=$(cd "$WORK" && ls | sed -n 's/^val\.//p' | sort -n | tr '\n' ' ')
export VALIDATED

gnuplot >"$picture" 2>"$WORK/said" <<'END' || fail "gnuplot: $(cat "$WORK/said")"
work = system('printf %s "$WORK"') . '/'
validated = system('printf %s "$VALIDATED"')
there_losses = there_norms = there_means = there_lr = there_muon = there_states = 0
load work . 'there'
steps = work . 'steps'
lines = few ? 'linespoints pt 7 ps 0.5' : 'lines' # a line of one point is invisible
dots = last > 500 ? 0.25 : 0.4
absent = "set label 1 'not in this log' at graph 0.5, 0.5 center tc '#777777'; " \
    . "set yrange [0.1:1]; plot NaN notitle; unset label 1"
blue = '#1f4e8c'
orange = '#d95f02'
pale = '#a9bfd8'
red = '#d7191c'

set terminal svg size 1240,1240 dynamic font 'sans-serif,14' background '#ffffff'
facts = sprintf(': %d steps, %.4g tokens, %.3g FLOPs', last, tokens, flops)
set multiplot layout 3,2 title system('printf %s "$RUN"') . facts noenhanced font ',17'
set border 3 lc '#777777'
set tics nomirror textcolor '#333333'
set grid lc '#dddddd' lw 1 dt 1
set key at graph 0.5, 1.07 center center horizontal samplen 1.5 noenhanced
set tmargin 5
set lmargin 9
set rmargin 4
set xrange [0:last]
set xlabel 'step' offset 0, 0.4

set title 'Training loss' font ',16' offset 0, 1
set yrange [*:@top]
if (there_losses) {
    plot steps using 1:2 with @lines lc rgb pale title 'each step', \
        '' using 1:3 with lines lw 2.5 lc rgb blue title 'smoothed'
} else { @absent }

set title 'Validation loss by recurrences'
set palette defined (0 '#e0a800', 0.35 '#d9480f', 0.7 '#a11a6a', 1 '#2c1a75')
unset colorbox
set yrange [*:@val_top]
name(r) = r eq '0' ? 'no recurrence' : 'r = ' . r
n = words(validated)
if (n) {
    plot for [i = 1:n] work . 'val.' . word(validated, i) with linespoints pt 7 ps 0.5 lw 2 \
        lc palette frac (n > 1 ? (i - 1.) / (n - 1) : 1) title name(word(validated, i))
} else { @absent }

set title 'Curriculum: mean of the recurrences, and the n + k and k drawn'
set yrange [0:*]
if (there_means) {
    plot steps using 1:6 with points pt 7 ps dots lc rgb pale title 'n + k', \
        '' using 1:7 with points pt 7 ps dots lc rgb orange title 'k', \
        '' using 1:5 with @lines lw 2.5 lc rgb blue title 'mean'
} else { @absent }

set logscale y
set format y '10^{%T}'
set yrange [*:*]
set title 'Learning rate'
rates = (there_lr ? '8 ' : '') . (there_muon ? '9' : '')
if (words(rates)) {
    plot for [c in rates] steps using 1:(column(int(c))) with @lines lw 2.5 \
        lc rgb (c eq '8' ? blue : orange) title c eq '8' ? 'lr' : 'muon_lr'
} else { @absent }

set title 'Norm of the gradient, before clipping'
set format y '%g'
set yrange [*:*]
norms = there_norms ? "steps using 1:4 with " . lines . " lc rgb blue title 'norm'" : ''
bad = skips ? "work . 'skips' using 1:(norm_low) with points pt 2 ps 0.7 lw 2 lc rgb red " \
    . "title 'steps skipped: ' . skips" : ''
if (there_norms || skips) {
    eval 'plot ' . norms . (there_norms && skips ? ', ' : '') . bad
} else { @absent }

set title 'RMS of the state'
unset logscale y
set yrange [0:*]
if (there_states) {
    plot steps using 1:10 with points pt 7 ps dots lc rgb orange title 'after n recurrences', \
        '' using 1:11 with @lines lc rgb blue title 'after n + k'
} else { @absent }
END
mv "$picture" "$RUN/plot.svg" && echo "$RUN/plot.svg"
