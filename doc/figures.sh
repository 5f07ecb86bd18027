#!/bin/sh
# The README's two pictures: doc/architecture.svg and, from what `make demo` trained, doc/recurrences.svg.
# Both are readable on light and dark pages: colours follow the reader's preference.
set -e
export LC_ALL=C
tasks=test/fixtures/lookup/tasks.jsonl
depths=1,2,3,4,6,8,12,16,24,32

# What both pictures begin with. $1, $2: width and height.
head_of() {
    cat <<SVG
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 $1 $2" width="$1" height="$2" font-family="sans-serif" font-size="13">
<style>
  text { fill: #24292f; } .small { font-size: 11px; } .thin { stroke: #8c959f; fill: none; }
  .part { fill: #ddf4ff; stroke: #0969da; } .core { fill: #fff1e5; stroke: #bc4c00; } .new { fill: #dafbe1; stroke: #1a7f37; }
  .line { stroke: #bc4c00; fill: none; stroke-width: 2; } .base { stroke: #0969da; fill: none; stroke-width: 2; stroke-dasharray: 5 4; }
  .dot { fill: #bc4c00; } .arrow { fill: #8c959f; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } .thin { stroke: #6e7681; } .arrow { fill: #6e7681; }
    .part { fill: #0c2d4d; stroke: #58a6ff; } .core { fill: #3d2108; stroke: #f0883e; } .new { fill: #0f2f1a; stroke: #3fb950; }
    .line { stroke: #f0883e; } .base { stroke: #58a6ff; } .dot { fill: #f0883e; }
  }
</style>
SVG
}

box() { # class x y width label, second line
    echo "<rect class=\"$1\" x=\"$2\" y=\"$3\" width=\"$4\" height=\"44\" rx=\"6\"/>"
    echo "<text x=\"$(($2 + $4 / 2))\" y=\"$(($3 + 19))\" text-anchor=\"middle\">$5</text>"
    echo "<text class=\"small\" x=\"$(($2 + $4 / 2))\" y=\"$(($3 + 35))\" text-anchor=\"middle\">$6</text>"
}

arrow() { # x1 y1 x2 y2
    echo "<line class=\"thin\" x1=\"$1\" y1=\"$2\" x2=\"$3\" y2=\"$4\" marker-end=\"url(#tip)\"/>"
}

architecture() {
    head_of 760 190
    echo '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
    echo '<path class="arrow" d="M0,0 L8,4 L0,8 z"/></marker></defs>'
    echo '<text x="8" y="127">tokens</text>'
    box part 66 100 110 prelude 'P blocks'
    box new 236 100 110 adapter 'A_s·s + A_e·e'
    box core 386 100 110 core 'C blocks'
    box part 556 100 110 coda 'D blocks'
    echo '<text x="706" y="127">logits</text>'
    arrow 52 122 64 122
    arrow 176 122 234 122
    echo '<text class="small" x="205" y="114" text-anchor="middle">e</text>'
    arrow 346 122 384 122
    arrow 496 122 554 122
    echo '<text class="small" x="525" y="114" text-anchor="middle">s_r</text>'
    arrow 666 122 702 122
    echo '<path class="thin" d="M 516 122 V 50 H 291 V 96" marker-end="url(#tip)"/>'
    echo '<text x="403" y="42" text-anchor="middle">s_i: r times through the same weights</text>'
    echo '<text class="small" x="291" y="172" text-anchor="middle">s_0: random</text>'
    arrow 291 160 291 146
    echo '</svg>'
}

# Accuracy by recurrences, of all tasks: "recurrences accuracy error" a line from infer's JSON.
numbers() {
    tr '{' '\n' | sed -n 's/^"recurrences":\([0-9]*\),.*"acc":\([^,]*\),"acc_stderr":\([^,}]*\).*/\1 \2 \3/p'
}

recurrences() { # $1: the base's accuracy; stdin: numbers
    head_of 760 300
    awk -v base="$1" '
        function x(r) { return 70 + 620 * log(r) / log(32) }
        function y(a) { return 250 - 220 * a }
        { r[NR] = $1; a[NR] = $2; e[NR] = $3 }
        END {
            for (i = 0; i <= 4; i++) {
                printf "<line class=\"thin\" x1=\"70\" x2=\"690\" y1=\"%.1f\" y2=\"%.1f\" opacity=\".35\"/>\n", y(i / 4), y(i / 4)
                printf "<text class=\"small\" x=\"62\" y=\"%.1f\" text-anchor=\"end\">%.2f</text>\n", y(i / 4) + 4, i / 4
            }
            for (i = 1; i <= 32; i *= 2)
                printf "<text class=\"small\" x=\"%.1f\" y=\"268\" text-anchor=\"middle\">%d</text>\n", x(i), i
            print "<text x=\"380\" y=\"290\" text-anchor=\"middle\">recurrences at test time (trained with a mean of 6)</text>"
            printf "<line class=\"base\" x1=\"70\" x2=\"690\" y1=\"%.1f\" y2=\"%.1f\"/>\n", y(base), y(base)
            printf "<text class=\"small\" x=\"688\" y=\"%.1f\" text-anchor=\"end\">the base, trained on with the same FLOPs: %.3f</text>\n", y(base) + 16, base
            printf "<polyline class=\"line\" points=\""
            for (i = 1; i <= NR; i++) printf "%.1f,%.1f ", x(r[i]), y(a[i])
            print "\"/>"
            for (i = 1; i <= NR; i++) {
                printf "<line class=\"line\" x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\"/>\n", x(r[i]), x(r[i]), y(a[i] - e[i]), y(a[i] + e[i])
                printf "<circle class=\"dot\" cx=\"%.1f\" cy=\"%.1f\" r=\"4\"/>\n", x(r[i]), y(a[i])
            }
            printf "<text class=\"small\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">accuracy %.3f ± one standard error</text>\n", x(r[NR]) - 90, y(a[NR]) - 12, a[NR]
        }'
    echo '</svg>'
}

architecture >doc/architecture.svg
if [ -d build/demo/run ] && [ -d build/demo/base ]; then
    base=$(./infer --model build/demo/base --tasks $tasks --json | numbers | cut -d ' ' -f 2)
    ./infer --model build/demo/run --tasks $tasks --recurrences $depths --state-init zero --json | numbers |
        recurrences "$base" >doc/recurrences.svg
else
    echo "doc/recurrences.svg needs what make demo trains" >&2
fi
