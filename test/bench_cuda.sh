#!/bin/sh
# make bench-cuda: the GPU beside its limits (bench_cuda.c), then beside PyTorch (pytorch_peer.py),
# where python3 has torch and sees the GPU. The first argument is the program; the others go to it
# (--help lists them). PEER_STEPS: how many of PyTorch's training steps are timed.
binary=$1 peer=test/pytorch_peer.py
shift
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
[ -z "$(git status --porcelain --untracked-files=no 2>/dev/null)" ] || commit=$commit+changes
fields=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=$fields --format=csv
{
    "$binary" --commit "$commit" "$@"
    echo $? >"$work/code"
} | tee "$work/ours"
code=$(cat "$work/code")
grep -q '^## Limits' "$work/ours" || exit "$code" # nothing was measured

without_pytorch() {
    echo "no PyTorch beside it: $1"
    exit "$code"
}
python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
    without_pytorch "python3 has no torch, or torch no GPU"

# Writes the peer's line of JSON for these arguments to $work/theirs; if it fails, its last words go
# to stdout as a remark.
theirs() {
    python3 $peer "$@" >"$work/theirs" 2>"$work/why" && return
    echo "    PyTorch, $*: $(tail -n 1 "$work/why")"
    return 1
}
# The value of a key in that line.
field() { sed -n "s/.*\"$1\": \([^,}]*\).*/\1/p" "$work/theirs" | head -n 1; }
ratio() { awk "BEGIN { printf \"%.2f\", $1 / $2 }"; }
# A column of our table's row that begins with those fields: ours 4 AdamW '(8,8)' all
ours() {
    awk -v column="$1" -v a="$2" -v b="$3" -v c="$4" \
        '$1 == a && $2 == b && index($3, c) == 1 { print $column; exit }' "$work/ours"
}

printf '\n## Training beside PyTorch: tokens/s, and GB at most\n'
printf '%-10s %-7s %-8s %10s %8s %10s %8s %7s %9s\n' \
    optimizer '(n,k)' PyTorch ours GB theirs GB ratio 'of its GB'
for run in adamw:0:4 adamw:4:4 adamw:8:8 adamw:24:8 muon:8:8; do
    IFS=: read -r optimizer n k <<END
$run
END
    name=AdamW
    [ "$optimizer" = muon ] && name=Muon
    speed=$(ours 4 $name "($n,$k)" all) memory=$(ours 11 $name "($n,$k)" all)
    [ -n "$speed" ] || continue # not measured, or did not fit
    for mode in authors compile; do
        theirs --bench train --mode $mode --optimizer "$optimizer" --micro-batch 8 --seq-len 1024 \
            --no-grad-steps "$n" --grad-steps "$k" --steps "${PEER_STEPS:-5}" || continue
        their_speed=$(field tokens_per_s) their_memory=$(field peak_memory_GB)
        printf '%-10s %-7s %-8s %10.0f %8.2f %10.0f %8.2f %7s %9s\n' $name "($n,$k)" $mode \
            "$speed" "$memory" "$their_speed" "$their_memory" \
            "$(ratio "$speed" "$their_speed")" "$(ratio "$memory" "$their_memory")"
    done
done

printf '\n## Decoding beside PyTorch: tokens/s\n'
printf '%3s %-8s %10s %10s %7s\n' r PyTorch ours theirs ratio
for r in 1 4 8 32; do
    speed=$(awk -v r=$r '/^## / { on = /Decoding:/ } on && $1 == r { print $2; exit }' "$work/ours")
    [ -n "$speed" ] || continue
    for mode in authors static; do
        theirs --bench decode --mode $mode --recurrences $r --prompt-len 128 --new-tokens 64 ||
            continue
        their_speed=$(field tokens_per_s)
        printf '%3d %-8s %10.1f %10.1f %7s\n' $r $mode "$speed" "$their_speed" \
            "$(ratio "$speed" "$their_speed")"
    done
done

# Its shapes are ours but for the adapter, which it has as one product, and the head, of which it
# takes 8192 rows.
printf '\n## Operations beside PyTorch: TFLOP/s\n'
printf '%-24s %-8s %-8s %8s %8s %7s\n' operation what PyTorch ours theirs ratio
theirs --bench ops && cp "$work/theirs" "$work/ops" || exit "$code"
compare() { # operation, what, whose, field of the JSON line that the pattern selects
    speed=$(awk -v a="$1" -v b="$2" '$1 == a && $2 == b && $3 !~ /^1/ {
        for (i = 4; i < NF; i++) if ($(i + 1) == "TFLOP/s") print $i
    }' "$work/ours")
    grep "$5" "$work/ops" >"$work/theirs"
    other=$(field "$4")
    [ -z "$speed" ] || [ -z "$other" ] ||
        printf '%-24s %-8s %-8s %8.1f %8.1f %7s\n' "$1" "$2" "$3" "$speed" "$other" \
            "$(ratio "$speed" "$other")"
}
for shape in w_qkv:qkv proj:proj fc:fc w_down:down; do
    forward=matmul_forward
    case $shape in proj:* | w_down:*) forward=matmul_residual_forward ;; esac
    compare $forward "${shape%:*}" cuBLAS forward_tflops "\"name\": \"${shape#*:}\""
    compare matmul_backward_input "${shape%:*}" cuBLAS dgrad_tflops "\"name\": \"${shape#*:}\""
    compare matmul_backward_weight "${shape%:*}" cuBLAS wgrad_tflops "\"name\": \"${shape#*:}\""
done
for name in flash cudnn; do
    for pass in forward backward; do
        compare attention_$pass - $name ${pass}_tflops "\"name\": \"$name\", \"kv_expanded\": false"
    done
done
exit "$code"
