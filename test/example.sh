#!/bin/sh
# The README's program of one's own is test/example.c, word for word, and does what the README says.
passed=0 failed=0
check() { if [ "$2" = "$3" ]; then passed=$((passed + 1)); else failed=$((failed + 1)); printf 'FAILED %s: got %s\n' "$1" "$2"; fi; }
ours=$(sed -n '/^int main/,/^}/p' test/example.c)
theirs=$(sed -n '/^```c/,/^```/p' README.md | sed -n '/^int main/,/^}/p')
check "README.md shows test/example.c" "$theirs" "$ours"
prompt="i=1 j=8 d=9 k=d e=k m=e a=i s=j b=s l=a t=l h=t u=b g=m w=h q=g f=q x=w r=u v=r p=f o=v n=x c=o | s"
check "the example's token" "$("$OUT/example" test/fixtures/lookup/base "$prompt" 1)" "60 '=8'"
"$OUT/example" nowhere "$prompt" 1 >/dev/null
check "the example's exit code without a model" $? 1
printf '%-24s %d passed, %d failed\n' example $passed $failed
[ $failed -eq 0 ]
