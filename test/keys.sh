#!/bin/sh
# doc/checks.md has the tables of keys as the programs have them: each stands between two comments
# that name it. FIX=1 (make lines) writes them anew.
. test/check.sh
doc=doc/checks.md

# The rows of a C table, {"a b", "0|1", "why"}, in Markdown. Strings may go on over several lines.
rows() { # file, table
    sed -n "/^static const retrofit_key $2\[\]/,/^};/p" "$1" | tr '\n' ' ' |
        sed -e 's/"  *"//g' -e 's/{"/\
{"/g' | sed -n 's/^{"\([^"]*\)", *\(NULL\|"[^"]*"\), *\(NULL\|".*"\)}.*/\1\t\2\t\3/p' |
        awk -F '\t' '{
            gsub(" ", "`, `", $1)
            effect = $2 == "NULL" ? "used" : $2 == "\"*\"" ? "changes nothing" : ""
            if (effect == "") {
                effect = substr($2, 2, length($2) - 2)
                gsub(/\|/, " or ", effect)
                effect = effect == "" ? "refused" : "refused unless " effect
            }
            why = $3 == "NULL" ? "" : substr($3, 2, length($3) - 2)
            gsub(/\\"/, "\"", why)
            print "| `" $1 "` | " effect " | " why " |"
        }'
}
table() { # name
    for file in retrofit.h infer.c convert.c; do
        grep -q "^static const retrofit_key $1\[\]" "$file" && rows "$file" "$1"
    done
}
# The first row with a key counts: what a second one says of it would be dead.
keys_once() { # name
    [ -z "$(sed -n 's/^| \(`[^|]*`\) |.*/\1/p' "$work/$1" | sed 's/, /\
/g' | sort | uniq -d)" ]
}
block() { # name: what stands between its comments
    awk -v name="$1" '$0 == "<!-- end -->" { on = 0 } on { print }
        $0 == "<!-- " name " -->" { on = 1 }' "$doc"
}
for name in $(grep -ho '^static const retrofit_key [a-z_]*\[\]' retrofit.h infer.c convert.c |
    sed 's/.* //; s/\[\]//'); do
    (echo "| key | | |" && echo "|---|---|---|" && table "$name") >"$work/$name"
    if [ -n "${FIX:-}" ]; then
        awk -v name="$name" -v with="$work/$name" '$0 == "<!-- end -->" { off = 0 } !off { print }
            $0 == "<!-- " name " -->" { while ((getline line <with) > 0) print line; off = 1 }' \
            "$doc" >"$work/doc" && cat "$work/doc" >"$doc"
    fi
    block "$name" >"$work/block"
    check "$doc has the table $name (make lines writes it)" cmp "$work/block" "$work/$name"
    check "$name has no key twice" keys_once "$name"
    check "$name has rows" [ "$(wc -l <"$work/$name")" -gt 2 ]
done
printf '%-24s %d passed, %d failed\n' "tables of keys" $passed $failed
[ $failed -eq 0 ]
