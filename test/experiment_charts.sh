#!/bin/sh
# experiment_charts.sh NAME SUMMARY.tsv PREFIX: the pictures of an experiment, PREFIX.svg and, for
# two of them, PREFIX-hops.svg, from what experiment.sh summarised.
set -e
name=$1 summary=$2 prefix=$3
command=$(sed -n '1s/^# //p' "$summary")
tab=$(printf '\t')
case $command in
*TASK=overwrite*) hops='older values of the variable' ;;
*) hops='hops to the digit' ;;
esac

# What the legends call the runs.
legend() {
    sed -e "s/^retrofit$tab/${1:-retrofitted}$tab/" -e "s/^fixed$tab/fixed r = 6$tab/" \
        -e "s/^base$tab/base, trained on$tab/" -e "s/^looped$tab/that, looped$tab/" \
        -e "s/^mean-\([0-9]*\)$tab/mean \1$tab/" -e "s/-flops$tab/$tab/"
}
picture() { # file, width, height; stdin: panels
    awk -v width="$2" -v height="$3" -v command="$command" -f test/charts.awk >"$1.part"
    mv "$1.part" "$1"
}
panel() { # kind, x, y, width, height, title, labels of x and y, log
    printf 'panel'
    printf '\t%s' "$@"
    printf '\n'
}
# Columns of the summary that awk's expressions pick, for the runs named, in their order. Fields:
# run step split flops paper recurrences hops accuracy accuracy_error loss loss_error.
rows() { # condition, what to print, runs
    condition=$1 what=$2
    shift 2
    for run; do
        awk -F '\t' -v OFS='\t' -v run="$run" '!/^#/ && $2 == run {
            step = $3; split_of = $4; flops = $5; paper = $6; r = $7; hops = $8
            accuracy = $9; accuracy_error = $10; loss = $11; loss_error = $12
            if ('"$condition"') print run, '"$what"'
        }' "$summary"
    done
}
validation='split_of == "validation" && hops == "all"'
by_r='split_of == "test" && hops == "all"'
by_hops='split_of == "test" && hops != "all"'

heat() { # y, width, title, run
    panel heat 70 "$1" "$2" 240 "$3" 'recurrences at test time' "$hops"
    rows "$by_hops" 'r, hops, accuracy' "$4" | cut -f 2-
}

case $name in
recurrence)
    {
        panel lines 70 50 300 260 'While training: validation tasks, r = 8' \
            'training FLOPs, 10¹²' accuracy
        rows "$validation" 'flops / 1e12, accuracy, accuracy_error' retrofit fixed base
        panel lines 530 50 300 260 'At the end: test tasks' 'recurrences at test time' accuracy log
        rows "$by_r && r" 'r, accuracy, accuracy_error' retrofit fixed
        # A base has no recurrences: its line is level.
        for r in 1 32; do rows "$by_r" "$r, accuracy, accuracy_error" base; done
        rows "$by_r" 'r, accuracy, accuracy_error' looped
    } | legend | picture "$prefix.svg" 980 370
    heat 50 620 'Accuracy of the retrofitted model, test tasks, %' retrofit |
        picture "$prefix-hops.svg" 720 360
    ;;
curriculum)
    {
        panel lines 70 50 300 260 'Equal steps: validation tasks, r = 8' 'training FLOPs, 10¹²' \
            'loss of the answer, nats' logy
        rows "$validation" 'flops / 1e12, loss, loss_error' retrofit linear none
        panel lines 530 50 300 260 'Equal FLOPs: validation tasks, r = 8' 'training FLOPs, 10¹²' \
            'loss of the answer, nats' logy
        rows "$validation" 'flops / 1e12, loss, loss_error' retrofit linear-flops none-flops
    } | legend 1-sqrt | picture "$prefix.svg" 980 370
    ;;
depth)
    {
        panel lines 70 50 520 260 'Trained with a mean of 4, 8, 16: test tasks' \
            'recurrences at test time' accuracy log
        rows "$by_r" 'r, accuracy, accuracy_error' mean-4 mean-8 mean-16
    } | legend | picture "$prefix.svg" 720 370
    {
        heat 50 660 'Accuracy, test tasks, %: trained with a mean of 4' mean-4
        heat 390 660 'with a mean of 8' mean-8
        heat 730 660 'with a mean of 16' mean-16
    } | picture "$prefix-hops.svg" 760 1040
    ;;
ablations)
    runs=$(awk -F '\t' '!/^#/ && $1 != "task" { print $2 }' "$summary" | uniq)
    {
        panel dots 150 50 500 $(($(echo "$runs" | wc -l) * 22)) 'One thing changed at a time' \
            'accuracy at r = 8, test tasks' ''
        rows "$by_r && r == 8" 'accuracy, accuracy_error' $runs
    } | picture "$prefix.svg" 720 $(($(echo "$runs" | wc -l) * 22 + 110))
    ;;
esac
