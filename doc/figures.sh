#!/bin/sh
# The pictures of README and doc/: doc/architecture.svg; from what `make demo` trained,
# doc/recurrences.svg; of what `make smollm2` downloads, doc/layers.svg. All are readable on light
# and dark pages: colours follow the reader's preference.
set -e
export LC_ALL=C
tasks=test/fixtures/lookup/tasks.jsonl
depths=1,2,3,4,6,8,12,16,24,32

# What all pictures begin with. $1, $2: width and height.
begin_picture() {
    cat <<SVG
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 $1 $2" width="$1" height="$2"
  font-family="sans-serif" font-size="13">
<style>
  text { fill: #24292f; }
  .small { font-size: 11px; }
  .thin { stroke: #8c959f; fill: none; }
  .arrow { fill: #8c959f; }
  .part { fill: #ddf4ff; stroke: #0969da; }
  .core { fill: #fff1e5; stroke: #bc4c00; }
  .new { fill: #dafbe1; stroke: #1a7f37; }
  .line { stroke: #bc4c00; fill: none; stroke-width: 2; }
  .base { stroke: #0969da; fill: none; stroke-width: 2; stroke-dasharray: 5 4; }
  .dot { fill: #bc4c00; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .thin { stroke: #6e7681; }
    .arrow { fill: #6e7681; }
    .part { fill: #0c2d4d; stroke: #58a6ff; }
    .core { fill: #3d2108; stroke: #f0883e; }
    .new { fill: #0f2f1a; stroke: #3fb950; }
    .line { stroke: #f0883e; }
    .base { stroke: #58a6ff; }
    .dot { fill: #f0883e; }
  }
</style>
SVG
}

# ---- The architecture ---------------------------------------------------------------------------

text() { # class x y anchor words
    echo "<text class=\"$1\" x=\"$2\" y=\"$3\" text-anchor=\"$4\">$5</text>"
}

box() { # class x label, second line: 110 wide, 44 high, on one height
    echo "<rect class=\"$1\" x=\"$2\" y=\"100\" width=\"110\" height=\"44\" rx=\"6\"/>"
    text label $(($2 + 55)) 119 middle "$3"
    text small $(($2 + 55)) 135 middle "$4"
}

arrow() { # x1 y1 x2 y2
    echo "<line class=\"thin\" x1=\"$1\" y1=\"$2\" x2=\"$3\" y2=\"$4\" marker-end=\"url(#tip)\"/>"
}

architecture() {
    begin_picture 760 190
    echo '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
    echo '<path class="arrow" d="M0,0 L8,4 L0,8 z"/></marker></defs>'
    text label 8 127 start tokens
    arrow 55 122 64 122
    box part 66 prelude 'P blocks'
    arrow 176 122 234 122
    text small 205 114 middle e
    box new 236 adapter 'A_s·s + A_e·e'
    arrow 346 122 384 122
    box core 386 core 'C blocks'
    arrow 496 122 554 122
    text small 525 114 middle s_r
    box part 556 coda 'D blocks'
    arrow 666 122 702 122
    text label 706 127 start logits
    echo '<path class="thin" d="M 516 122 V 50 H 291 V 96" marker-end="url(#tip)"/>'
    text label 403 42 middle 's_i: r times through the same weights'
    text small 291 172 middle 's_0: random'
    arrow 291 160 291 146
    echo '</svg>'
}

# ---- Accuracy by recurrences --------------------------------------------------------------------

# "recurrences accuracy error" a line, of all tasks, from infer's JSON.
numbers() {
    tr '{' '\n' |
        sed -n 's/^"recurrences":\([0-9]*\),.*"acc":\([^,]*\),"acc_stderr":\([^,}]*\).*/\1 \2 \3/p'
}

recurrences() { # $1: the base's accuracy; stdin: numbers
    begin_picture 760 300
    awk -v base="$1" '
        function x(r) { return 70 + 620 * log(r) / log(32) }
        function y(a) { return 250 - 220 * a }
        function line(class, x1, y1, x2, y2) {
            printf "<line class=\"%s\" x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\"/>\n",
                class, x1, y1, x2, y2
        }
        function text(class, at_x, at_y, anchor, words) {
            printf "<text class=\"%s\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">%s</text>\n",
                class, at_x, at_y, anchor, words
        }
        { r[NR] = $1; a[NR] = $2; e[NR] = $3 }
        END {
            for (i = 0; i <= 4; i++) {
                line("thin", 70, y(i / 4), 690, y(i / 4))
                text("small", 62, y(i / 4) + 4, "end", sprintf("%.2f", i / 4))
            }
            for (i = 1; i <= 32; i *= 2) text("small", x(i), 268, "middle", i)
            text("label", 380, 290, "middle", "recurrences at test time (trained with a mean of 6)")
            line("base", 70, y(base), 690, y(base))
            text("small", 688, y(base) + 16, "end",
                sprintf("the base, trained on with the same FLOPs: %.3f", base))
            printf "<polyline class=\"line\" points=\""
            for (i = 1; i <= NR; i++) printf "%.1f,%.1f ", x(r[i]), y(a[i])
            print "\"/>"
            for (i = 1; i <= NR; i++) {
                line("line", x(r[i]), y(a[i] - e[i]), x(r[i]), y(a[i] + e[i]))
                printf "<circle class=\"dot\" cx=\"%.1f\" cy=\"%.1f\" r=\"4\"/>\n", x(r[i]), y(a[i])
            }
            text("small", x(r[NR]) - 2, y(a[NR]) + 22, "end",
                sprintf("accuracy %.3f ± one standard error", a[NR]))
        }'
    echo '</svg>'
}

# ---- What each layer does -----------------------------------------------------------------------

model=local/smollm2/base measured=local/smollm2/train.jsonl

# "n layer influence distance part" a line, of a core of so many layers.
report() {
    ./convert --from $model --report --core "auto:$1" --text $measured 2>/dev/null | awk '
        NR == 2 { n = $(NF - 2) }
        $1 ~ /^[0-9]+$/ { print n, $1, $2, $3, $4 }'
}

layers() { # stdin: reports; the first one is drawn as bars, the distances of all as curves
    begin_picture 760 310
    cat <<SVG
<style>
  .gone { fill: #f6f8fa; stroke: #8c959f; }
  @media (prefers-color-scheme: dark) { .gone { fill: #21262d; stroke: #6e7681; } }
</style>
SVG
    awk '
        function tag(name, attributes) { printf "<%s %s/>\n", name, attributes }
        function line(class, x1, y1, x2, y2) {
            tag("line", sprintf("class=\"%s\" x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\"",
                class, x1, y1, x2, y2))
        }
        function box(class, at_x, at_y, width, height) {
            tag("rect", sprintf("class=\"%s\" x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\"",
                class, at_x, at_y, width, height))
        }
        function text(class, at_x, at_y, anchor, words) {
            printf "<text class=\"%s\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">%s</text>\n",
                class, at_x, at_y, anchor, words
        }
        function influence_y(v) { return 240 - 100 * log(v / 0.01) / log(10) }
        function distance_y(v) { return 240 - 400 * v }
        function class_of(part) {
            return part == "core" ? "core" : part == "dropped" ? "gone" : "part"
        }
        function axis(x0, width, title) { # layers that are `width` apart
            text("label", x0, 22, "start", title)
            for (i = 0; i < layers; i += 5)
                text("small", x0 + width * (i + 0.5), 258, "middle", i)
        }
        BEGIN { layers = 0 }
        !($1 in first) { first[$1] = ++reports; n[reports] = $1 }
        first[$1] == 1 { influence[layers] = $3; part[layers] = $5; layers++ }
        { count[$1]++; distance[$1, $2] = $4 }
        END {
            axis(50, 11, "influence: 1 - cos(input, output)")
            for (v = 0.01; v < 2; v *= 10) {
                line("thin", 50, influence_y(v), 380, influence_y(v))
                text("small", 44, influence_y(v) + 4, "end", v)
            }
            for (i = 0; i < layers; i++)
                box(class_of(part[i]), 51 + 11 * i, influence_y(influence[i]), 9,
                    240 - influence_y(influence[i]))
            x = 50
            split("prelude, coda;core;dropped", names, ";")
            split("part;core;gone", classes, ";")
            for (i = 1; i <= 3; i++) {
                box(classes[i], x, 280, 11, 11)
                text("small", x + 16, 290, "start", names[i])
                x += i == 1 ? 110 : 64
            }

            axis(430, 10, "angle / π between the inputs of layers i and i + n")
            for (v = 0; v < 0.55; v += 0.1) {
                line("thin", 430, distance_y(v), 730, distance_y(v))
                text("small", 424, distance_y(v) + 4, "end", v)
            }
            for (k = 1; k <= reports; k++) {
                last = layers - n[k]
                printf "<polyline class=\"%s\" points=\"", k == 1 ? "line" : "base"
                for (i = 0; i <= last; i++)
                    printf "%.1f,%.1f ", 435 + 10 * i, distance_y(distance[n[k], i])
                print "\"/>"
                text("small", 440 + 10 * last, distance_y(distance[n[k], last]) + 4, "start",
                    "n = " n[k])
            }
            text("small", 580, 290, "middle", "the first layer i of n that are skipped")
        }'
    echo '</svg>'
}

architecture >doc/architecture.svg
if [ -d build/demo/run ] && [ -d build/demo/base ]; then
    base=$(./infer --model build/demo/base --tasks $tasks --json | numbers | cut -d ' ' -f 2)
    ./infer --model build/demo/run --tasks $tasks --recurrences $depths --state-init zero --json |
        numbers | recurrences "$base" >doc/recurrences.svg
else
    echo "doc/recurrences.svg needs what make demo trains" >&2
fi
if [ -d $model ] && [ -e $measured ]; then
    for core in 16 6 20; do report $core; done | layers >doc/layers.svg
else
    echo "doc/layers.svg needs what make smollm2 downloads" >&2
fi
