# Draws panels of curves, of a heat map or of dots, as SVG that follows the reader's light or dark
# page. -v width=, height= of the picture, command= that made it. Input, fields between tabs:
#
#     panel  lines|heat|dots  x  y  width  height  title  label of x  label of y  [log|logy]
#     series  x  y  error        curves: points of a series, whose order is the legend's
#     column  row  value         heat: a cell; columns and rows in the order of their first cells
#     name  value  error         dots: a line of the panel; the first one is what to compare with
#
# An error of "-" draws no bar.
function tag(name, attributes) { printf "<%s %s/>\n", name, attributes }
function line(class, x1, y1, x2, y2) {
    tag("line", sprintf("class=\"%s\" x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\"", class, x1, \
        y1, x2, y2))
}
function text(class, at_x, at_y, anchor, words) {
    printf "<text class=\"%s\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">%s</text>\n", class, at_x, \
        at_y, anchor, words
}
function mark(class, at_x, at_y) {
    tag("circle", sprintf("class=\"%s\" cx=\"%.1f\" cy=\"%.1f\" r=\"3.5\"", class, at_x, at_y))
}
function sideways(at_x, at_y, words) {
    printf "<text transform=\"translate(%.1f %.1f) rotate(-90)\" ", at_x, at_y
    printf "text-anchor=\"middle\">%s</text>\n", words
}
function scaled_x(v) {
    if (logarithmic) return left + wide * log(v / low_x) / log(high_x / low_x)
    return left + wide * (v - low_x) / (high_x - low_x)
}
function scaled_y(v) {
    if (logarithmic_y) return top + high * log(high_y / v) / log(high_y / low_y)
    return top + high * (high_y - v) / (high_y - low_y)
}

# A round step, of which three to six make up a range.
function round_step(range) {
    unit = 1
    while (unit > range) unit /= 10
    while (unit * 10 <= range) unit *= 10
    range /= unit
    return range > 6 ? 2 * unit : range > 3 ? unit : range > 1.5 ? unit / 2 : unit / 4
}
function bounds(values, errors) { # sets minimum and maximum, with the error bars
    minimum = maximum = values[1]
    for (i = 1; i <= n; i++) {
        if (values[i] - errors[i] < minimum) minimum = values[i] - errors[i]
        if (values[i] + errors[i] > maximum) maximum = values[i] + errors[i]
    }
    if (maximum == minimum) maximum = minimum + 1
}
function round_bounds() { # widens them to multiples of a step, which it sets
    step = round_step(maximum - minimum)
    minimum = step * int(minimum / step + 1e-9)
    maximum = step * (int(maximum / step - 1e-9) + 1)
}

function tick_y(v) {
    line("grid", left, scaled_y(v), left + wide, scaled_y(v))
    text("small", left - 6, scaled_y(v) + 4, "end", sprintf("%.3g", v))
}
function axis_y() {
    bounds(Y, E)
    if (!logarithmic_y) round_bounds()
    low_y = minimum
    high_y = maximum
    for (v = low_y; !logarithmic_y && v < high_y + step / 2; v += step) tick_y(v)
    for (v = 1e-6; logarithmic_y && v <= high_y; v *= 10)
        for (m = 1; m < 10; m = m == 1 ? 2 : m == 2 ? 5 : 10)
            if (v * m >= low_y && v * m <= high_y) tick_y(v * m)
}
function axis_x() {
    bounds(X, none)
    low_x = logarithmic ? minimum : 0
    high_x = maximum
    if (logarithmic) {
        for (v = low_x; v <= high_x; v *= 2)
            text("small", scaled_x(v), top + high + 16, "middle", v)
        return
    }
    step = round_step(high_x)
    for (v = 0; v <= high_x; v += step)
        text("small", scaled_x(v), top + high + 16, "middle", sprintf("%.3g", v))
}

function draw_lines() {
    axis_y()
    axis_x()
    count = 0
    for (i = 1; i <= n; i++) {
        if (!(name[i] in number)) {
            number[name[i]] = ++count
            names[count] = name[i]
        }
        points[number[name[i]]] = points[number[name[i]]] sprintf("%.1f,%.1f ", scaled_x(X[i]), \
            scaled_y(Y[i]))
    }
    for (s = 1; s <= count; s++) {
        tag("polyline", sprintf("class=\"line s%d\" points=\"%s\"", s, points[s]))
        text_y = legend_y + 18 * (s - 1)
        line("line s" s, left + wide + 12, text_y - 4, left + wide + 34, text_y - 4)
        text("small", left + wide + 40, text_y, "start", names[s])
    }
    for (i = 1; i <= n; i++) {
        s = number[name[i]]
        if (given[i]) line("bar s" s, scaled_x(X[i]), scaled_y(Y[i] - E[i]), scaled_x(X[i]), \
            scaled_y(Y[i] + E[i]))
        mark("dot s" s, scaled_x(X[i]), scaled_y(Y[i]))
    }
}

function draw_heat() {
    columns = rows = 0
    for (i = 1; i <= n; i++) {
        if (!(name[i] in column)) column[name[i]] = columns++
        if (!(X[i] in row)) row[X[i]] = rows++
    }
    cell_x = wide / columns
    cell_y = high / rows
    for (i = 1; i <= n; i++) {
        at_x = left + cell_x * column[name[i]]
        at_y = top + cell_y * row[X[i]]
        tag("rect", sprintf("x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"%s\"", \
            at_x, at_y, cell_x - 1, cell_y - 1, color(Y[i])))
        class = Y[i] > 0.5 ? "cell light" : "cell"
        text(class, at_x + cell_x / 2, at_y + cell_y / 2 + 4, "middle", percent(Y[i]))
    }
    for (v in column) text("small", left + cell_x * (column[v] + 0.5), top + high + 16, "middle", v)
    for (v in row) text("small", left - 6, top + cell_y * (row[v] + 0.5) + 4, "end", v)
}
function percent(v) { return sprintf("%d", 100 * v + 0.5) }
# From pale yellow to dark blue, by way of green; both ends can be seen on light and dark pages.
function color(v) {
    if (v < 0.5) return mixed(v * 2, 253, 231, 160, 65, 174, 170)
    return mixed(v * 2 - 1, 65, 174, 170, 24, 54, 110)
}
function mixed(v, r1, g1, b1, r2, g2, b2) {
    return sprintf("#%02x%02x%02x", r1 + v * (r2 - r1), g1 + v * (g2 - g1), b1 + v * (b2 - b1))
}

function draw_dots() { # here X are the values, Y the errors
    bounds(X, Y)
    round_bounds()
    low_x = minimum
    high_x = maximum
    for (v = low_x; v < high_x + step / 2; v += step) {
        line("grid", scaled_x(v), top, scaled_x(v), top + high)
        text("small", scaled_x(v), top + high + 16, "middle", sprintf("%.3g", v))
    }
    line("reference", scaled_x(X[1]), top, scaled_x(X[1]), top + high)
    for (i = 1; i <= n; i++) {
        at_y = top + high * (i - 0.5) / n
        text("small", left - 8, at_y + 4, "end", name[i])
        line("bar s2", scaled_x(X[i] - Y[i]), at_y, scaled_x(X[i] + Y[i]), at_y)
        mark("dot s2", scaled_x(X[i]), at_y)
    }
}

function draw() {
    if (!n) return
    text("title", left, top - 12, "start", title)
    if (kind == "lines") draw_lines()
    if (kind == "heat") draw_heat()
    if (kind == "dots") draw_dots()
    text("label", left + wide / 2, top + high + 36, "middle", label_x)
    sideways(left - 44, top + high / 2, label_y)
    n = 0
    split("", number)
    split("", points)
    split("", column)
    split("", row)
}

BEGIN {
    FS = "\t"
    printf "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" ", width, \
        height, width
    printf "height=\"%d\" font-family=\"sans-serif\" font-size=\"13\">\n", height
    printf "<!-- %s -->\n<style>\n", command
    light = "bc4c00 0969da 1a7f37 8250df 9a6700 57606a"
    dark = "f0883e 58a6ff 3fb950 bc8cff d29922 9ea7b3"
    print "text { fill: #24292f; } .small, .cell { font-size: 11px; } .title { font-size: 14px; }"
    print ".grid { stroke: #d0d7de; } .reference { stroke: #57606a; stroke-dasharray: 4 3; }"
    print ".line { fill: none; stroke-width: 2; } .bar { stroke-width: 1.5; }"
    print ".cell { fill: #10233f; } .light { fill: #ffffff; }"
    styles(light)
    print "@media (prefers-color-scheme: dark) {"
    print "text { fill: #e6edf3; } .grid { stroke: #3d444d; } .reference { stroke: #9ea7b3; }"
    print ".cell { fill: #10233f; } .light { fill: #ffffff; }"
    styles(dark)
    print "}\n</style>"
}
function styles(colors) {
    split(colors, c, " ")
    for (s = 1; s <= 6; s++)
        printf ".line.s%d, .bar.s%d { stroke: #%s; } .dot.s%d { fill: #%s; }\n", s, s, c[s], s, c[s]
}
$1 == "panel" {
    draw()
    kind = $2
    left = $3
    top = legend_y = $4
    wide = $5
    high = $6
    title = $7
    label_x = $8
    label_y = $9
    logarithmic = $10 == "log"
    logarithmic_y = $10 == "logy"
    legend_y += 12
    next
}
{
    n++
    name[n] = $1
    X[n] = kind == "heat" ? $2 : $2 + 0
    Y[n] = $3 + 0
    given[n] = $4 != "-" && $4 != ""
    E[n] = $4 + 0
}
END {
    draw()
    print "</svg>"
}
