#!/bin/sh
# make gpu-report: what a GPU can prove and measure in a few minutes, the most valuable first.
#
#     gpu_report.sh FOLDER [SECONDS]        (480)
#
# Stages follow each other, each under its own limit and none longer than what is left of the
# SECONDS; none stops the next. FOLDER gets report.md, ready for doc/results.md, and a log of each
# kind. Exit codes: 0, 1 if a stage failed, 3 without a GPU (then there is no FOLDER either).
#
# CUDA_HOME, CUDA_LIB, NVCC and SANITIZER are what the Makefile found. The programs are built if they
# are not there, are older than their source or do not start. BUILT=build/cuda_, what their paths
# begin with, says that they were built elsewhere: then they are taken whatever their age. COMMIT
# names the version where there is no git. MINIATURE=1 makes everything tiny and LIMITS (percent)
# the stages' limits short, for the test.
folder=${1:?usage: gpu_report.sh FOLDER [SECONDS]} total=${2:-480}
built=${BUILT:-build/cuda_} peer=test/pytorch_peer.py pair=8,8 decoded=8 miniature=
if [ -n "$MINIATURE" ]; then
    pair=1,2 decoded=4 miniature=--miniature
    export TRIALS="${TRIALS:-1}"
fi
case $total in '' | *[!0-9]*)
    echo "gpu_report: SECONDS=$total is not a number" >&2
    exit 1
    ;;
esac

has_gpu() {
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi -L 2>/dev/null | grep -q '^GPU'
    else
        ls /dev/nvidia[0-9]* >/dev/null 2>&1
    fi
}
without_gpu() {
    echo "gpu_report: no GPU: $1; run it on a machine that has one" >&2
    exit 3
}
has_gpu || without_gpu "nvidia-smi names none, or there is none in /dev"

start=$(date +%s)
threads=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
left() { echo $((total - 2 - $(date +%s) + start)); } # but for two seconds to write the report
work=$(mktemp -d) || exit 1
child='' sampler=''
end() { # of this program, whatever ends it
    [ -z "$sampler" ] || kill "$sampler" 2>/dev/null
    [ -z "$child" ] || kill "$child" 2>/dev/null
    rm -rf "$work"
}
trap end EXIT
trap 'interrupted' HUP INT TERM
interrupted() {
    [ ! -d "$folder" ] || report "It was interrupted."
    exit 130
}

# ---- Stages -------------------------------------------------------------------------------------
# $work/stages has a line for each: name, result, seconds, remark, with tabs between them.
failed=0
result() { # name, result, seconds, remark
    printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" >>"$work/stages"
    printf '%-8s %s%s%s\n' "$2" "$1" "${3:+, $3 s}" "${4:+: $4}"
}
not_run() { result "$1" skipped '' "$2"; } # name, why

# Name, seconds at most, seconds below which it is not begun, log, command. What the command says
# goes to the log, and alone to $work/said. Returns its exit code; 125 if it was not begun.
stage() {
    name=$1 limit=$(($2 * ${LIMITS:-100} / 100)) least=$(($3 * ${LIMITS:-100} / 100))
    log=$folder/$4.log
    shift 4
    : >"$work/said"
    seconds=$(left)
    if [ "$seconds" -le 0 ] || [ "$seconds" -lt "$least" ]; then
        [ "$seconds" -ge 0 ] || seconds=0
        not_run "$name" "$seconds s were left, it wants $least"
        code=125
        return $code
    fi
    [ "$limit" -ge 1 ] || limit=1
    [ "$limit" -le "$seconds" ] || limit=$seconds
    printf '\n### %s\n$ %s\n' "$name" "$*" >>"$log"
    before=$(wc -c <"$log")
    began=$(date +%s)
    timeout -k 2 "$limit" "$@" >>"$log" 2>&1 &
    child=$!
    wait $child
    code=$?
    child=
    took=$(($(date +%s) - began))
    tail -c +$((before + 1)) "$log" >"$work/said"
    case $code in
    0) result "$name" ok $took '' ;;
    124 | 137) result "$name" stopped $took "after its limit of $limit s" ;;
    *) result "$name" FAILED $took "exit code $code" ;;
    esac
    [ $code -eq 0 ] || keep_failure
    return $code
}

# What a stage that failed said: its checks that failed, or else its last lines.
keep_failure() {
    failed=1
    {
        printf '\n**%s** (`%s`):\n\n' "$name" "$log"
        grep -E '^FAILED|ABOVE|^retrofit:|^========= (Invalid|Error|ERROR|Race|Unsafe|RACE)' \
            "$work/said" | head -n 12 >"$work/lines"
        grep -E ' [0-9]+ passed, [0-9]+ failed$|^========= ERROR SUMMARY' "$work/said" |
            tail -n 1 >>"$work/lines"
        [ -s "$work/lines" ] || grep -v '^$' "$work/said" | tail -n 5 >"$work/lines"
        [ -s "$work/lines" ] || echo "(it said nothing)" >"$work/lines"
        cut -c 1-400 "$work/lines" | sed 's/^/    /'
    } >>"$work/failures"
}

# ---- Our programs -------------------------------------------------------------------------------
# cuBLASLt is looked for where pip puts it too, for programs that were built elsewhere. The folders
# are not for PyTorch, which has its own.
libraries=
add_library() {
    for file in "$1"/libcublasLt.so.*; do
        [ ! -e "$file" ] || libraries=$libraries${libraries:+:}$1
        return 0
    done
}
find_libraries() {
    packages=$(python3 -c 'import nvidia; print(*nvidia.__path__)' 2>/dev/null)
    for place in "$CUDA_LIB" "$CUDA_HOME/lib64"; do add_library "$place"; done
    for place in $packages; do
        for inside in "$place"/*/lib; do add_library "$inside"; done
    done
    if [ -z "$libraries" ]; then
        for place in /usr/local/cuda*/lib64 /usr/local/cuda*/targets/*/lib; do
            add_library "$place"
        done
    fi
    path=LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
}

# Whether a program that is there starts: made for this processor, these libraries, this GPU.
starts() {
    [ -x "$1" ] || return 1
    TRIALS=1 timeout 60 env "$path" "$1" cast >"$work/start" 2>&1
    case $? in 126 | 127 | 132) return 1 ;; esac
    ! grep -qE 'built for other GPUs|no kernel image|GLIBC|GLIBCXX|loading shared libraries' \
        "$work/start"
}

make_programs() { # name of the stage, names
    stage_name=$1
    shift
    stage "$stage_name" 200 30 build "${MAKE:-make}" $again -j"$threads" "$@"
}

# Whether there is an nvcc for these programs, and newer source.
are_old() {
    [ -z "$BUILT" ] && [ -n "$NVCC" ] &&
        [ -n "$(find retrofit_cuda.cu retrofit.h test/*.[ch] -newer "$1")" ]
}

build_programs() {
    programs="${built}test_ops ${built}test_gpu ${built}bench_cuda" again=''
    if [ -n "$started" ] && [ -x "${built}test_gpu" ] && [ -x "${built}bench_cuda" ] &&
        ! are_old $programs; then
        origin="found"
        return
    fi
    [ -n "$started" ] || [ ! -e "${built}test_ops" ] || again=-B # that one does not run here
    # The second nvcc costs nothing where there are cores enough.
    [ "$threads" -lt 8 ] ||
        programs="$programs ${built}own_test_ops ${built}own_bench_cuda"
    origin="built here"
    make_programs "building" $programs
}

have() { # name of the stage, its program
    [ -x "$2" ] || not_run "$1" "$2 is not there"
    [ -x "$2" ]
}

# A test, and if it fails the same with every kernel waited for, so that an error shows where it is
# made: of operations only the one that failed first.
test_stage() { # name, seconds at most, at least, program
    have "$1" "$4" || return
    stage "$1" "$2" "$3" tests env "$path" "$4" && return
    [ $code -ne 125 ] || return
    operation=
    case $4 in *test_ops)
        operation=$(sed -n 's/^FAILED [^ ]* \([a-z0-9_]*\)[,:].*/\1/p' "$work/said" | head -n 1)
        ;;
    esac
    stage "$1, launches one by one${operation:+: $operation}" 60 5 tests \
        env "$path" CUDA_LAUNCH_BLOCKING=1 "$4" $operation
}

# The benchmark's part, its tables for the report and its lines for the goals.
bench_stage() { # name, seconds at most, at least, the part, the file of its lines, its program
    have "$1" "$6" || return
    stage "$1" "$2" "$3" bench env "$path" "$6" $miniature --brief --commit "$commit" --only "$4" \
        --markdown "$work/$5.md"
    cp "$work/said" "$work/$5"
}

# ---- PyTorch ------------------------------------------------------------------------------------
look_for_torch() {
    torch='' no_torch="python3 was not found"
    command -v python3 >/dev/null || return
    no_torch="python3 has no torch"
    timeout 60 python3 -c 'import torch' 2>/dev/null || return
    no_torch="torch sees no GPU"
    timeout 60 python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
        2>/dev/null || return
    torch=yes
}
peer_stage() { # name, seconds at most, at least, where its lines of JSON go, arguments
    file=$work/$4 said_name=$1 most=$2 minimum=$3
    shift 4
    if [ -z "$torch" ]; then
        not_run "$said_name" "$no_torch"
        return
    fi
    # Nothing that was compiled before counts as compiled.
    stage "$said_name" "$most" "$minimum" peer env TORCHINDUCTOR_CACHE_DIR="$work/inductor" \
        python3 $peer "$@"
    grep '^{' "$work/said" >"$file"
}

# ---- compute-sanitizer --------------------------------------------------------------------------
sanitizer_stage() { # tool, its options
    tool=$1
    shift
    sanitizer=
    for file in "$SANITIZER" compute-sanitizer "$CUDA_HOME/bin/compute-sanitizer" \
        /usr/local/cuda/bin/compute-sanitizer; do
        [ -n "$sanitizer" ] || sanitizer=$(command -v "$file" 2>/dev/null)
    done
    if [ -z "$sanitizer" ] || [ ! -x "${own}test_ops" ]; then
        why="compute-sanitizer was not found"
        [ -z "$sanitizer" ] || why="${own}test_ops is not there"
        not_run "$tool" "$why"
        return
    fi
    stage "$tool" 80 15 sanitizer env TRIALS="${TRIALS:-2}" "$sanitizer" --tool "$tool" "$@" \
        --error-exitcode 1 "${own}test_ops"
}

# ---- What was measured --------------------------------------------------------------------------
# A column of our table's row that begins with these words.
column() { # file, column, word, word…
    awk -v column="$2" -v a="$3" -v b="$4" -v c="$5" \
        '$1 == a && (b == "" || $2 == b) && (c == "" || $3 == c) { print $column; exit }' \
        "$work/$1" 2>/dev/null
}
# The value of a key in the first line of JSON with that pattern.
field() { # file, key, pattern
    grep -e "${3:-.}" "$work/$1" 2>/dev/null | sed -n "s/.*\"$2\": \"\{0,1\}\([^,}\"]*\).*/\1/p" |
        head -n 1
}
ratio() { # a / b; nothing if either is missing
    [ -n "$1" ] && [ -n "$2" ] && awk "BEGIN { if ($2 > 0) printf \"%.3g\", $1 / $2 }"
}
in_decoding() { # column, first field: of the table of plain decoding, of that of drafts
    awk -v table="$1" -v column="$2" -v r="$3" \
        '/^## / { on = $2 == table } on && $1 == r { print $column; exit }' "$work/decoding" \
        2>/dev/null
}
# TFLOP/s of the product or attention with that name, of many rows.
rate() { # file, operation, what
    awk -v a="$2" -v b="$3" '$1 == a && $2 == b && $3 !~ /^1/ {
        for (i = 4; i < NF; i++) if ($(i + 1) == "TFLOP/s") { print $i; exit }
    }' "$work/$1" 2>/dev/null
}
# The geometric mean of the ratios of pairs on stdin, and how many there are; nothing if none.
mean_ratio() {
    awk '$1 > 0 && $2 > 0 { sum += log($1 / $2); n++ }
        END { if (n) printf "%.3g %d\n", exp(sum / n), n }'
}
# Our own products beside cuBLASLt's, shape by shape.
own_pairs() {
    awk '{ rate = "" }
        /^matmul_/ { for (i = 4; i < NF; i++) if ($(i + 1) == "TFLOP/s") rate = $i }
        rate == "" { next }
        NR == FNR { own[$1, $2, $3] = rate; next }
        ($1, $2, $3) in own { print own[$1, $2, $3], rate }' "$work/own_matmul" "$work/matmul" \
        2>/dev/null
}
# Ours beside PyTorch's: the products that both have.
torch_pairs() {
    for shape in w_qkv:qkv proj:proj fc:fc w_down:down; do
        forward=matmul_forward
        case $shape in proj:* | w_down:*) forward=matmul_residual_forward ;; esac
        for part in $forward:forward matmul_backward_input:dgrad matmul_backward_weight:wgrad; do
            echo "$(rate matmul "${part%:*}" "${shape%:*}")" \
                "$(field ops "${part#*:}_tflops" "\"name\": \"${shape#*:}\"")"
        done
    done
}

# Why something has no figure: what became of its stages, named by their beginnings.
why_not() {
    for wanted; do
        awk -F '\t' -v wanted="$wanted" 'index($1, wanted) == 1 && $2 != "ok" {
            printf "%s: %s%s\n", $1, $2, $4 == "" ? "" : ", " $4
            exit
        }' "$work/stages"
    done | head -n 1
}
# One goal: whether its two steps are met, in one line here and one in the report.
goal() { # what, direction, first, its value, then, its value, remark, the stages it comes from
    what=$1 direction=$2 first=$3 value=$4 second=$5 other=$6 remark=$7
    shift 7
    met() { # value, limit
        if [ -z "$1" ]; then echo "not measured"; else
            awk "BEGIN { met = $1 $direction $2; print met ? \"met\" : \"not met\" }"
        fi
    }
    measured=$value
    [ "$value" = "$other" ] || measured="${value:-?} and ${other:-?}"
    if [ -z "$value$other" ]; then
        why=$(why_not "$@")
        measured="not measured (${remark:-${why:-no figure for it}})"
        verdict="not measured"
    else
        verdict="$first: $(met "$value" "${first%% *}"); $second: $(met "$other" "${second%% *}")"
        measured="$measured${remark:+ ($remark)}"
    fi
    printf '| %s | %s | %s | %s | %s |\n' "$what" "$first" "$second" "$measured" "$verdict" \
        >>"$work/goals"
    if [ "$verdict" = "not measured" ]; then echo "$what: $measured"; else
        echo "$what: $measured; $verdict"
    fi >>"$work/goal_lines"
}

goals() {
    speed=$(column training 4 AdamW "($pair)" all) memory=$(column training 11 AdamW "($pair)" all)
    authors=$(field authors tokens_per_s) x=$(ratio "$speed" "$authors")
    goal "training, times the authors' PyTorch" '>=' 1.5 "$x" 2 "$x" '' training "PyTorch, tr"
    x='' remark=''
    drawn=$(sed -n 's/^Depths drawn.* \([0-9.]*\) tokens.s,.*/\1/p' "$work/training" 2>/dev/null)
    depths=$(sed -n 's/^Depths drawn, (n,k) = \([0-9, ]*\):.*/\1/p' "$work/training" 2>/dev/null)
    compiled=$(field draws tokens_per_s)
    with=$(field draws tokens_per_s_with_compilation)
    theirs=$(sed -n 's/.*"draws": "\([^"]*\)".*/\1/p' "$work/draws" 2>/dev/null)
    if [ -n "$compiled" ] && [ "$depths" != "$theirs" ]; then
        remark="the depths drawn differ"
    elif [ -n "$compiled" ]; then
        x=$(ratio "$drawn" "$compiled")
        remark="$(ratio "$drawn" "$with") with the time it took to compile"
    fi
    goal "training, times torch.compile, depths drawn" '>=' 1.1 "$x" 1.3 "$x" "$remark" \
        training torch.compile
    x=$(column training 6 AdamW "($pair)" all)
    [ "$x" != - ] || x=
    goal "training, share of the bf16 peak" '>=' .52 "$x" .62 "$x" '' training
    set -- $(own_pairs | mean_ratio)
    remark=${2:+$2 shapes}
    if [ -z "$1" ] && [ "$gemm" = "our own kernels" ]; then
        set -- $(torch_pairs | mean_ratio)
        remark=${2:+"$2 shapes of PyTorch's cuBLAS"}
    fi
    goal "our own products, share of cuBLASLt's speed" '>=' .60 "$1" 1.0 "$1" "$remark" \
        "matrix products" "building with" "our own" "PyTorch, pr"
    for pass in forward backward; do
        x=$(rate attention attention_$pass -)
        fa2=$(ratio "$x" "$(field ops ${pass}_tflops '"name": "flash", "kv_expanded": false')")
        cudnn=$(ratio "$x" "$(field ops ${pass}_tflops '"name": "cudnn", "kv_expanded": false')")
        bound=.85
        [ $pass = forward ] || bound=.75
        goal "attention $pass, of FA2's speed and of cuDNN's" '>=' "$bound of FA2" "$fa2" \
            "1.0 of cuDNN" "$cudnn" '' attention "PyTorch, pr"
    done
    x=$(ratio "$memory" "$(field authors peak_memory_GB)")
    goal "training memory, share of PyTorch's" '<=' .6 "$x" .5 "$x" '' training "PyTorch, tr"
    x=$(in_decoding Decoding: 6 "$decoded")
    goal "decoding at r = $decoded, share of the copy bandwidth" '>=' .65 "$x" .85 "$x" '' decoding
    tokens=$(in_decoding Decoding: 2 "$decoded")
    x=$(ratio "$tokens" "$(field decode tokens_per_s)")
    goal "decoding at r = $decoded, times the authors' generate" '>=' 5 "$x" 10 "$x" '' decoding \
        "PyTorch, decoding"
    best=$(in_decoding Drafts: 6 32)
    x=$(ratio "$best" "$(in_decoding Decoding: 2 32)")
    goal "drafts through the depths at r = 32, times plain" '>=' 4.5 '' 7 '' \
        "they need a trained model${x:+; if every draft were right, $x}" decoding
}

# ---- The report ---------------------------------------------------------------------------------
# A part of the benchmark's tables; the limits only the first time.
tables() {
    for part in training decoding matmul attention own_matmul determinism; do
        [ -s "$work/$part.md" ] || continue
        [ $part != own_matmul ] || printf '\nThe same products by our own kernels:\n'
        awk -v limits="$limits" -v part=$part '
            /^## / { on = limits != "" || !/^## Limits/ }
            /^0 faults/ || !on || (/^(error|explained): / && part != "attention") { next }
            /^## / { print "#" $0; next }
            { print }' "$work/$part.md" | cat -s
        limits=
    done
}
row() { [ -z "$2" ] || [ -z "$3" ] || echo "| $1 | $2 | $3 | $(ratio "$2" "$3") |"; }
beside_pytorch() {
    row "training ($pair), AdamW, tokens/s: the authors' way" "$speed" "$authors"
    row "the same, GB at most" "$memory" "$(field authors peak_memory_GB)"
    row "training, depths drawn, tokens/s: torch.compile once everything is compiled" \
        "$drawn" "$compiled"
    row "the same, with the time it took to compile: $(field draws graphs) graphs, in \
$(field draws wall_s) s instead of $(field draws steady_wall_s)" "$drawn" "$with"
    row "decoding at r = $decoded, tokens/s: the authors' way" "$tokens" \
        "$(field decode tokens_per_s)"
    for pass in forward backward; do
        for name in flash cudnn; do
            row "attention $pass, TFLOP/s: $name" "$(rate attention attention_$pass -)" \
                "$(field ops ${pass}_tflops "\"name\": \"$name\", \"kv_expanded\": false")"
        done
    done
    set -- $(torch_pairs | mean_ratio)
    [ -z "$1" ] || echo "| matrix products, geometric mean of $2 | | cuBLAS | $1 |"
}
# Of the samples under load: the clock's lowest, median and highest, the highest power.
clocks() {
    awk -F ', *' '$2 > 50 { print $1, $3 }' "$folder/clocks.log" 2>/dev/null | sort -n |
        awk '{ clock[NR] = $1; if ($2 > power) power = $2 }
            END { if (NR) printf "%d / %d / %d MHz, at most %.0f W in %d samples", clock[1],
                clock[int((NR + 1) / 2)], clock[NR], power, NR }'
}
fact() { [ -z "$2" ] || echo "| $1 | $2 |"; }
facts() {
    printf '| what | here |\n|---|---|\n'
    fact device "$device"
    fact "driver, clocks, power limit, memory" "$settings"
    fact "SM clock under load, lowest / median / highest" "$(clocks)"
    fact processor "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), $threads threads"
    fact toolkit "${toolkit:-no nvcc}"
    fact "CUDA_HOME, CUDA_LIB" "${CUDA_HOME:--}, ${CUDA_LIB:--}"
    fact "matrix products by" "${gemm:-not known}"
    fact PyTorch "$(field authors torch)"
    fact "programs" "$origin"
    fact "date, commit" "$(date +%Y-%m-%d), $commit"
}
report() { # a remark
    rm -f "$work/goals" "$work/goal_lines"
    goals
    {
        echo "## GPU: ${device:-unknown}, $(date +%Y-%m-%d), commit $commit"
        echo
        [ -z "$1" ] || printf '%s\n\n' "$1"
        facts
        printf '\n| stage | result | seconds | remark |\n|---|---|--:|---|\n'
        awk -F '\t' '{ printf "| %s | %s | %s | %s |\n", $1, $2, $3, $4 }' "$work/stages"
        if [ -s "$work/failures" ]; then
            printf '\n### What failed\n'
            cat "$work/failures"
        fi
        limits=first
        echo
        tables
        beside_pytorch >"$work/beside"
        if [ -s "$work/beside" ]; then
            printf '\n### Beside PyTorch\n\n| what | retrofit | PyTorch | ratio |\n|---|--:|--:|--:|\n'
            cat "$work/beside"
        fi
        printf '\n### Goals\n\n| goal | first | then | measured | |\n|---|--:|--:|---|---|\n'
        cat "$work/goals"
    } >"$folder/report.md"
    echo
    echo "Goals ($folder/report.md has the rest):"
    cat "$work/goal_lines"
}

# ---- All of it ----------------------------------------------------------------------------------
commit=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
[ -z "$(git status --porcelain --untracked-files=no 2>/dev/null)" ] || commit=$commit+changes
query() { nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null | head -n 1; }
device=$(query name)
settings=$(query driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,memory.total)
toolkit=$([ -z "$NVCC" ] || $NVCC --version 2>/dev/null | grep -o 'release.*' | head -n 1)
gemm=''
: >"$work/stages"
find_libraries
started=
if starts "${built}test_ops"; then
    started=yes
    ! grep -q 'no GPU: none found' "$work/start" || without_gpu "CUDA finds none"
fi
if [ -e "$folder" ]; then
    rm -rf "$folder.old"
    mv "$folder" "$folder.old" || exit 1
fi
mkdir -p "$folder" || exit 1
{
    printf 'CUDA_HOME=%s\nCUDA_LIB=%s\nNVCC=%s\nlibraries: %s\n' "$CUDA_HOME" "$CUDA_LIB" "$NVCC" \
        "$libraries"
    nvidia-smi
} >"$folder/machine.log" 2>&1
sample() {
    nvidia-smi --query-gpu=clocks.sm,utilization.gpu,power.draw,temperature.gpu \
        --format=csv,noheader,nounits | head -n 1
    sleep 2
}
(while sample; do :; done) >"$folder/clocks.log" 2>/dev/null &
sampler=$!
echo "${device:-a GPU}, commit $commit: $total s at most; CUDA_HOME=$CUDA_HOME CUDA_LIB=$CUDA_LIB"

build_programs
test_stage "operations against fp64" 100 10 "${built}test_ops"
test_stage "models and training steps against the authors' numbers" 100 20 "${built}test_gpu"
bench_stage "training" 110 30 training training "${built}bench_cuda"
bench_stage "decoding" 60 15 decoding decoding "${built}bench_cuda"
look_for_torch
depths="--no-grad-steps ${pair%,*} --grad-steps ${pair#*,}"
peer_stage "PyTorch, training the authors' way" 60 20 authors --bench train --mode authors \
    --micro-batch 8 --seq-len 1024 $depths --warmup 2 --steps 4
peer_stage "torch.compile, training with drawn depths" 130 45 draws --bench train --mode compile \
    --micro-batch 8 --seq-len 1024 --draw 8 --steps 16
peer_stage "PyTorch, decoding the authors' way" 60 20 decode --bench decode --mode authors \
    --recurrences "$decoded" --prompt-len 128 --new-tokens 64 --repeats 2
bench_stage "matrix products" 90 20 matmul matmul "${built}bench_cuda"
bench_stage "attention" 40 10 attention attention "${built}bench_cuda"
peer_stage "PyTorch, products and attention" 45 15 ops --bench ops
bench_stage "the same bits in 20 runs" 45 10 determinism determinism "${built}bench_cuda"
gemm=$(sed -n 's/^matrix products by //p' "$work/matmul" "$work/training" 2>/dev/null | head -n 1)
own=$built
if [ -n "$gemm" ] && [ "$gemm" != "our own kernels" ]; then
    own=${built}own_ again=''
    [ -x "${own}test_ops" ] && [ -x "${own}bench_cuda" ] ||
        make_programs "building with our own products" "${own}test_ops" "${own}bench_cuda"
    bench_stage "our own products" 90 20 matmul own_matmul "${own}bench_cuda"
fi
sanitizer_stage memcheck --report-api-errors no
sanitizer_stage racecheck
report ''
exit $failed
