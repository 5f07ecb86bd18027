#!/bin/sh
# The contents table at the top of retrofit.h names functions and the lines they stand on. It must
# be true, and Part I at most 1,560 lines. FIX=1 (make lines) corrects the table.
. test/check.sh

# The line on which a function or a constant is defined: its name begins a definition, and the
# statement does not end in a semicolon there.
line_of() {
    awk -v name="$1" '
        $0 ~ "^[a-z].*[ *]" name "(\\(| = \\{)" {
            first = NR
            text = $0
            while (text !~ /[;{]$/ && (getline text) > 0) continue
            if (text ~ /\{$/ || text ~ /\}$/) { print first; exit }
        }' retrofit.h
}

table=$(sed -n '/^   Contents  /,/^   Usage:/p' retrofit.h | grep -E ' [0-9]+$')
names=$(printf '%s\n' "$table" | awk '{ print $(NF - 1) }')
count=$(printf '%s\n' "$names" | wc -l)
check "entries of the contents table" is "$([ "$count" -ge 18 ] && echo enough)" enough
for name in $names; do
    said=$(printf '%s\n' "$table" | awk -v name="$name" '$(NF - 1) == name { print $NF }')
    is=$(line_of "$name")
    if [ -n "$FIX" ] && [ -n "$is" ]; then
        awk -v name="$name" -v line="$is" '
            /^   Contents  /, /^   Usage:/ { if (NF > 1 && $(NF - 1) == name) sub(/[0-9]+$/, line) }
            { print }' retrofit.h >retrofit.h.new && mv retrofit.h.new retrofit.h
        said=$is
    fi
    check "contents: line of $name (make lines corrects it)" is "$said" "$is"
done

# Part I is at most 1,560 lines.
end=$(grep -n 'The method ends here\.' retrofit.h | cut -d : -f 1)
check "Part I of $end lines" is "$([ "$end" -le 1560 ] && echo short)" short
printf '%-24s %d passed, %d failed\n' contents $passed $failed
[ $failed -eq 0 ]
