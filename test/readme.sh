#!/bin/sh
# The README and doc/ are true: every option that they name exists, the program of one's own is
# test/example.c word for word and does what the README says, file sizes are as the README says.
# With RUN=1 (make readme) every command of the README that needs neither network nor GPU is run.
. test/check.sh
BIN=${BIN:-.} OUT=${OUT:-build}

# ---- Options ------------------------------------------------------------------------------------
for program in convert train infer; do
    "$BIN/$program" --help | sed -n 's/^  --\([a-z0-9-]*\).*/\1/p' >"$work/$program"
done
cat "$work/convert" "$work/train" "$work/infer" | sort -u >"$work/all"
echo help >>"$work/all"

# Commands of one of our programs, continued lines joined: their options must be that program's.
is_line() { grep -qx -- "$1" "$2" && echo there; }
join_lines() { sed -e ':join' -e '/\\$/ { N; s/\\\n//; b join' -e '}'; }
cat README.md doc/*.md | join_lines >"$work/text"
for program in convert train infer; do
    grep -E "^ {4}(\\$ )?\./$program " "$work/text" | grep -oE -- '--[a-z][a-z0-9-]+' | sort -u |
        sed 's/^--//' >"$work/used"
    check "options of $program in README and doc/" is "$([ -s "$work/used" ] && echo some)" some
    while read -r option; do
        check "$program --$option" is "$(is_line "$option" "$work/$program")" there
    done <"$work/used"
done

# What stands in `code` elsewhere is an option of one of the three; with _ or . it is the authors'.
grep -vE '^ {4}|pytorch_peer' "$work/text" | grep -oE '`[^`]*`' |
    grep -oE -- '--[a-z][A-Za-z0-9_.-]*' | grep -v '[_.]' | sed 's/^--//; s/-$//' |
    sort -u >"$work/used"
while read -r option; do
    check "option --$option" is "$(is_line "$option" "$work/all")" there
done <"$work/used"

# Targets of make.
grep -oE 'make [a-z][a-z0-9-]*(\.so)?( [a-z][a-z0-9]*-cuda)*' README.md doc/*.md |
    sed 's/^[^:]*:make //' | tr ' ' '\n' | sort -u | grep -vxE 'it|finds' >"$work/used"
while read -r target; do
    rule=$(grep -cE "^([a-z-]+ )*(\\$\(BIN\)/)?$target( [a-z-]+)*:" Makefile)
    check "make $target" is "$([ "$rule" -gt 0 ] && echo there)" there
done <"$work/used"

# Shards are made with the tokenizer that lies in a converted model's directory: who began with a
# GGUF has no other one.
grep -E '^ {4}\./convert --tokenize ' "$work/text" | sed 's/.* --tokenizer \([^ ]*\).*/\1/' |
    sort -u >"$work/used"
while read -r directory; do
    made=$(grep -cE "^ {4}\./convert --from .* --to $directory( |$)" "$work/text")
    check "--tokenizer $directory: convert makes it" is "$([ "$made" -gt 0 ] && echo made)" made
done <"$work/used"

# What a layer moves on a GPU is counted (not with SAN=1).
not_told() { "$OUT/races_bytes" | grep '^|' | grep -vxFf doc/gpu.md; }
[ ! -e "$OUT/races_bytes" ] ||
    check "doc/gpu.md has what build/races_bytes counts" is "$(not_told)" ""

# ---- The program of one's own -------------------------------------------------------------------
ours=$(sed -n '/^#include/,$p' test/example.c | sed 's|\.\./retrofit\.h|retrofit.h|')
theirs=$(sed -n '/^```c/,/^```/p' README.md | sed '1d;$d')
check "README.md shows test/example.c" is "$theirs" "$ours"
prompt="i=1 j=8 d=9 k=d e=k m=e a=i s=j b=s l=a t=l h=t u=b g=m w=h q=g f=q x=w r=u v=r p=f o=v n=x"
prompt="$prompt c=o | s"
token=$("$OUT/example" test/fixtures/lookup/base "$prompt" 1)
check "the example's token" is "$token" "60 '=8'"
"$OUT/example" nowhere "$prompt" 1 >/dev/null
check "the example's exit code without a model" is $? 1

# ---- Sizes, in lines: FIX=1 (make lines) corrects them -------------------------------------------------------
part=$(grep -n 'The method ends here\.' retrofit.h | cut -d : -f 1)
files="train.c infer.c convert.c retrofit_cuda.cu retrofit_ranks.h retrofit_mpi.c
modeling_retrofit.py"
size() { wc -l <"$1" | tr -d ' '; }
if [ -n "$FIX" ]; then
    for file in $files; do
        sed "s/^| \`$file\` | [^|]* |/| \`$file\` | $(size $file) |/" README.md >README.new
        mv README.new README.md
    done
    sed -e "s/^\(| \`retrofit.h\`, Part I |\) [^|]* |/\1 $part |/" \
        -e "s/the rest of the file, [^ ]* in all/the rest of the file, $(size retrofit.h) in all/" \
        README.md >README.new
    mv README.new README.md
fi
check "lines of Part I in the README (make lines corrects them)" is \
    "$(grep -c "^| \`retrofit.h\`, Part I | $part |" README.md)" 1
check "lines of retrofit.h in the README (make lines corrects them)" is \
    "$(grep -c "the rest of the file, $(size retrofit.h) in all" README.md)" 1
for file in $files; do
    check "lines of $file in the README (make lines corrects them)" is \
        "$(grep -c "^| \`$file\` | $(size $file) |" README.md)" 1
done
check "README.md is one page" is "$([ "$(size README.md)" -le 130 ] && echo short)" short

# ---- Commands -----------------------------------------------------------------------------------
# A stand-in for the downloaded model: a Llama of 30 layers, made of the shipped one's.
run_commands() {
    place=$work/place
    mkdir "$place" "$place/text"
    "$OUT/stand_in" test/fixtures/lookup/base "$place/smollm2"
    for i in 1 2 3 4 5 6 7 8; do cp test/fixtures/lookup/README.md "$place/text/$i.txt"; done
    "$OUT/lookup" 2000 1 8x3,6x4 | sed 's/^{"text": "\(.*\)"}$/\1/' >"$place/text/programs.txt"
    for program in convert train infer; do
        ln -s "$(realpath "$BIN/$program")" "$place/$program"
    done
    ln -s "$(pwd)/test" "$(pwd)/retrofit.h" "$place"
    join_lines <README.md | sed -n 's/^ \{4\}\(make demo\|\.\/.*\|cc .*\)/\1/p' |
        sed 's/ *#.*//' >"$work/commands"
    while read -r command <&3; do
        case $command in
        "make demo") (eval "$command") >"$work/log" 2>&1 ;;
        *) (cd "$place" && eval "$command") >"$work/log" 2>&1 ;;
        esac
        code=$?
        check "$command" is "exit code $code" "exit code 0"
        [ $code -eq 0 ] || tail -n 5 "$work/log"
    done 3<"$work/commands"
}
if [ -n "$RUN" ]; then run_commands; fi
printf '%-24s %d passed, %d failed\n' readme $passed $failed
[ $failed -eq 0 ]
