#!/bin/sh
# retrofit.h in other programs: the training loop of test/train_example.c does what train does;
# libretrofit.so gives from C and, where python3 is, from doc/training.md's Python what
# test/example.c gives, and exports nothing but retrofit.h's names.
. test/check.sh
BIN=${BIN:-.} OUT=${OUT:-build}
export OMP_NUM_THREADS=1
tiny=test/fixtures/tiny/recurrent base=test/fixtures/lookup/base

# ---- The training loop
shard >"$work/shard.bin"
loop() { "$OUT/train_example" "$@"; }
check "a training loop" loop $tiny "$work/shard.bin" 12 "$work/example"
cp "$work/said" "$work/steps"
check "its steps" is "$(grep -c '^step [0-9]*  loss [0-9.]*  n,k [0-9]*,[0-9]*  |g| [0-9.]*$' \
    "$work/steps")" 12
check "train" "$BIN/train" --model $tiny --data "$work/shard.bin" --out "$work/run" --steps 12 \
    --seq-len 64 --micro-batch-size 4 --shuffle --optimizer adamw --lr 1e-3 --warmup .1 \
    --cooldown .5
check "the same bits" cmp "$work/example/model.safetensors" "$work/run/latest/model.safetensors"
fails() { # why, arguments
    why=$1
    shift
    ! loop "$@" 2>"$work/stderr" && is "$(cat "$work/stderr")" "train_example: $why"
}
check "an output that is there" fails "$work/example: File exists" $tiny "$work/shard.bin" 1 \
    "$work/example"
check "a shard that is not" fails "$work/none.bin: no such file" $tiny "$work/none.bin" 1 \
    "$work/other"

# ---- The library
prompt="i=1 j=8 d=9 k=d e=k m=e a=i s=j b=s l=a t=l h=t u=b g=m w=h q=g f=q x=w r=u v=r p=f o=v n=x"
prompt="$prompt c=o | s"
expected=$("$OUT/example" $base "$prompt" 1)
user() { "$OUT/library_user" "$@" $base "$prompt" 1; }
check "the library, from C" is "$(user "$BIN/libretrofit.so")" "$expected"
check "no library" is "$(user "$work/none.so" 2>/dev/null || echo "exit code $?")" "exit code 1"
if command -v nm >/dev/null; then
    nm -D --defined-only "$BIN/libretrofit.so" | awk '$2 ~ /^[A-Z]$/ { print $3 }' | sed 's/@.*//' |
        grep -v '^retrofit_' >"$work/foreign"
    case $BIN in
    *san*) ;; # the sanitizers have names of their own
    *) check "it exports only names of retrofit.h" is "$(cat "$work/foreign")" "" ;;
    esac
fi
# The doc's Python: where python3 is and the library needs no sanitizer's run time.
case $BIN in
*san*) ;;
*)
    if command -v python3 >/dev/null; then
        sed -n '/^```python/,/^```/p' doc/training.md | sed '/^```/d' >"$work/next.py"
        ln -s "$(realpath "$BIN/libretrofit.so")" "$work"
        python() { (home=$(pwd) && cd "$work" && python3 next.py "$home/$base" "$prompt" 1); }
        check "the library, from doc/training.md's Python" is "$(python)" "$expected"
    fi
    ;;
esac
printf '%-24s %d passed, %d failed\n' "as a library" $passed $failed
[ $failed -eq 0 ]
