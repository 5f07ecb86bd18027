# What the shell tests of train and infer share: a directory to work in, checks that count, and
# tokens to train on.
passed=0 failed=0
work=$(mktemp -d) || exit 1
# With SAN=1: a program that fails frees nothing, and the shim may be loaded before the sanitizer.
export ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0
trap 'rm -rf "$work"' EXIT
check() { # what, then a command that must succeed
    what=$1
    shift
    if ("$@") >"$work/out" 2>&1; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        printf 'FAILED %s: %s\n' "$what" "$*"
        head -n 5 "$work/out"
    fi
    cp "$work/out" "$work/said" # for checks of what the command said
}
is() { # two values that must be the same
    [ "$1" = "$2" ] || { echo "it is $1, it should be $2" && false; }
}
# A shard of 40 rows of 17 random tokens below 130, with token 130 at the places named: 256 int32 of
# header, then uint16. Another one for validation: other=2 shard.
shard() {
    awk -v bad=" $* " -v seed="${other:-1}" 'BEGIN {
        split("20240520 1 680", header)
        for (i = 1; i <= 256; i++)
            for (b = 0; b < 4; b++) printf "\\0%o", int(header[i] / 256 ^ b) % 256
        srand(seed)
        for (i = 0; i < 680; i++) {
            token = int(rand() * 130)
            printf "\\0%o\\000", index(bad, " " i " ") ? 130 : token
        }
    }' >"$work/shard.txt"
    printf '%b' "$(cat "$work/shard.txt")"
}
