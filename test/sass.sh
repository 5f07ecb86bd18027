#!/bin/sh
# make sass: the instruction mix of the loops that matter, counted in the machine code of
# retrofit_cuda.cu, beside the targets. It needs nvcc, cuobjdump and nvdisasm, but no GPU.
#     ARCHITECTURES='sm_80 sm_90'   which to compile for
#     CUOBJDUMP=file                where it is not beside nvcc (pip: nvidia-cuda-cuobjdump and
#                                   nvidia-cuda-nvdisasm)
# The arguments are nvcc's command. A loop is one that holds tensor-core instructions and no other
# loop; of several, as with and without the causal mask, the shortest counts.
dump=${CUOBJDUMP:-$(dirname "$1")/cuobjdump}
command -v "$dump" >/dev/null || dump=cuobjdump
command -v "$dump" >/dev/null || {
    echo "sass: cuobjdump was not found: install it beside nvcc, or name it with CUOBJDUMP=" \
        "(pip has it as nvidia-cuda-cuobjdump)" >&2
    exit 1
}
PATH=$PATH:$(dirname "$dump") # cuobjdump calls nvdisasm
command -v nvdisasm >/dev/null || {
    echo "sass: nvdisasm was not found, which $dump calls: install it beside that (pip has it as" \
        "nvidia-cuda-nvdisasm)" >&2
    exit 1
}
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

# kernel in words, least share of tensor-core instructions, pattern of its mangled name
cat >"$work/loops" <<'END'
product x·wᵀ|35|gemm_kernelILb0ELb0ELb1E13__nv_bfloat16S0_
product dy·w|35|gemm_kernelILb0ELb1ELb1E13__nv_bfloat16S0_
product dyᵀ·x|35|gemm_kernelILb1ELb1ELb1E13__nv_bfloat16f
attention, 64|30|attention_kernelI13__nv_bfloat16Li64ELi4E.*Lb1E
attention, 128|30|attention_kernelI13__nv_bfloat16Li128ELi4E.*Lb1E
its dK and dV, 64|25|backward_kv_kernelI13__nv_bfloat16Li64ELb1E
its dK and dV, 128|25|backward_kv_kernelI13__nv_bfloat16Li128ELb1E
its dQ, 64|25|backward_q_kernelI13__nv_bfloat16Li64ELb1E
its dQ, 128|25|backward_q_kernelI13__nv_bfloat16Li128ELb1E
END

# Of every kernel, in the loop: instructions, tensor-core ones, reads of blocks from shared memory,
# copies, those that compute addresses and conditions, spills.
count_loops() {
    awk '
        function finish(i, j, at, best, op) {
            best = 0
            for (i = 1; i <= jumps; i++) {
                inner = 1
                for (j = 1; j <= jumps; j++)
                    if (j != i && to[j] >= to[i] && from[j] <= from[i] && tensor(j)) inner = 0
                if (!inner || !tensor(i)) continue
                if (!best || from[i] - to[i] < from[best] - to[best]) best = i
            }
            if (!best) return
            split("", n)
            for (at = to[best]; at <= from[best]; at++) n[kind[at]]++
            print name, from[best] - to[best] + 1, n["mma"] + 0, n["ldsm"] + 0, n["copy"] + 0,
                n["address"] + 0, n["spill"] + 0
        }
        function tensor(i, at) {
            for (at = to[i]; at <= from[i]; at++) if (kind[at] == "mma") return 1
            return 0
        }
        function number(hex, i, value) {
            value = 0
            for (i = 1; i <= length(hex); i++)
                value = 16 * value + index("0123456789abcdef", substr(hex, i, 1)) - 1
            return value
        }
        $1 == "Function" {
            if (name) finish()
            name = $3
            count = jumps = 0
            next
        }
        match($0, /^\t* *\/\*[0-9a-f]+\*\//) {
            place = substr($0, RSTART, RLENGTH)
            gsub(/[^0-9a-f]/, "", place)
            text = substr($0, RSTART + RLENGTH)
            sub(/^ */, "", text)
            if (text !~ /;/) next
            sub(/^@!?U?P[0-9T]+ +/, "", text)
            line[place] = ++count
            op = text
            sub(/[ ;].*/, "", op)
            kind[count] = "other"
            if (op ~ /^HMMA/) kind[count] = "mma"
            else if (op ~ /^LDSM/) kind[count] = "ldsm"
            else if (op ~ /^LDGSTS/) kind[count] = "copy"
            else if (op ~ /^(LDL|STL)/) kind[count] = "spill"
            else if (op ~ /^U?(IMAD|IADD3?|LEA|LOP3|SHF|SEL|ISETP|MOV|LDC)/) kind[count] = "address"
            if (op != "BRA" || !match(text, /0x[0-9a-f]+/)) next
            target = substr(text, RSTART + 2, RLENGTH - 2)
            if (number(target) > number(place)) next
            while (length(target) < length(place)) target = "0" target
            if (!(target in line)) next
            to[++jumps] = line[target]
            from[jumps] = count
        }
        END { finish() }' "$1"
}

printf '| loop | for | instructions | tensor-core | of them | target | reads of tiles | copies '
printf '| addresses, a copy | registers | spills |\n|---|---|---|---|---|---|---|---|---|---|---|\n'
for architecture in ${ARCHITECTURES:-sm_80 sm_90}; do
    "$@" -arch="$architecture" -cubin -DRETROFIT_NO_CUBLAS -Xptxas -v retrofit_cuda.cu \
        -o "$work/cubin" 2>"$work/usage" || {
        cat "$work/usage" >&2
        exit 1
    }
    "$dump" -sass "$work/cubin" >"$work/sass" || exit 1
    count_loops "$work/sass" >"$work/counts"
    while IFS='|' read -r what least pattern; do
        used=$(awk -v pattern="$pattern" '
            /Compiling entry function/ { on = $0 ~ pattern }
            on && /Used/ { for (i = 1; i < NF; i++) if ($(i + 1) ~ /^registers/) print $i }
        ' "$work/usage" | head -n 1)
        grep "$pattern" "$work/counts" | head -n 1 | awk -v what="$what" -v least="$least" \
            -v architecture="$architecture" -v used="$used" '{
                printf "| %s | %s | %d | %d | %.0f %% | %d %% | %d | %d | %.1f | %d | %d |\n", what,
                    architecture, $2, $3, 100 * $3 / $2, least, $4, $5, $5 ? $6 / $5 : 0, used, $7
            }'
    done <"$work/loops"
done
