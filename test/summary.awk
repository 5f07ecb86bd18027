# Mean and standard error over seeds of experiment.sh's rows. Rows that differ in nothing but seed
# and result are one group; groups come in the order of their first rows. The error is sd / √n, with
# n - 1 in sd; one seed alone has none ("-"). test/experiments.sh checks it with known numbers.
function error(sum, squares, n) {
    if (n < 2) return "-"
    variance = (squares - sum * sum / n) / (n - 1)
    return sprintf("%.3g", sqrt((variance > 0 ? variance : 0) / n))
}
BEGIN {
    FS = OFS = "\t"
    print "task", "run", "step", "split", "flops", "paper_flops", "recurrences", "hops", \
        "accuracy", "accuracy_error", "loss", "loss_error", "seeds"
}
/^#/ || $1 == "task" { next }
{
    key = $1 OFS $2 OFS $4 OFS $5 OFS $6 OFS $7 OFS $8 OFS $9
    if (!(key in n)) keys[++count] = key
    n[key]++
    # Sums of differences from the first value: squares of close values would lose their digits.
    if (n[key] == 1) {
        accuracy[key] = $10
        loss[key] = $11
    }
    a = $10 - accuracy[key]
    accuracies[key] += a
    accuracy_squares[key] += a * a
    if ($11 == "-") next
    l = $11 - loss[key]
    losses[key] += l
    loss_squares[key] += l * l
}
END {
    for (i = 1; i <= count; i++) {
        key = keys[i]
        mean = accuracy[key] + accuracies[key] / n[key]
        spread = error(accuracies[key], accuracy_squares[key], n[key])
        printf "%s\t%.5g\t%s", key, mean, spread
        mean = loss[key] + losses[key] / n[key]
        spread = error(losses[key], loss_squares[key], n[key])
        printf loss[key] == "-" ? "\t-\t-" : "\t%.5g\t%s", mean, spread
        printf "\t%d\n", n[key]
    }
}
