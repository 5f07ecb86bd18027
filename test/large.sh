#!/bin/sh
# The authors' checkpoints as published, at their true shapes, with random weights: two F32 shards
# with an index, Huginn's ids, no chat template. Each is made by surgery on a random plain model,
# loaded, evaluated, trained, killed, resumed and asked for a text; time and memory go to a table.
#     MODELS='tinyllama olmo2'   only these; small: the same in miniature, in seconds
#     PLACE=dir                  where to work; what is made there is removed in the end
#     DISK=15                    GB of disk it may take at a time
#     WHOLE=muon                 the optimizer of the step of all parameters: adamw, or the authors'
#     WRAP=nice                  what the programs run under
. test/steps.sh
TMPDIR=${PLACE:-${TMPDIR:-/tmp}}
export TMPDIR
. test/check.sh
trap 'exit 130' INT TERM HUP
large=$OUT/large times=$work/times.tsv prompt='The capital of France is'

# The options of a shape are those of the source's config.json; ids: how many its tokenizer has.
shape() { # model
    context=4096 eps=1e-05 tied=false scaling=null kind=llama class=LlamaForCausalLM
    d=2048 F=8192 layers=16 theta=500000.0 style=llama3_style fixture_ids=800 P=4 C=6 D=4
    case $1 in
    tinyllama)
        preset=$1 H=32 G=4 F=5632 V=32000 ids=32000 layers=22 C=8 theta=10000.0 context=2048
        style=llama2_style fixture_ids=900
        ;;
    llama3.2 | llama3.2-2-4-2)
        preset=$1 H=32 G=8 V=128256 ids=128256 tied=true context=131072
        scaling='{"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3"}'
        case $1 in *-2-4-2) P=2 C=4 D=2 ;; esac
        ;;
    olmo2)
        preset=$1 H=16 G=16 V=100352 ids=100278 eps=1e-06 kind=olmo2 class=Olmo2ForCausalLM
        ;;
    small)
        preset=tinyllama d=64 H=4 G=2 F=96 V=8000 ids=7990 layers=22 C=8 theta=10000.0 context=256
        style=llama2_style fixture_ids=900
        ;;
    *)
        echo "large.sh: $1 is none of tinyllama llama3.2 llama3.2-2-4-2 olmo2 small" >&2
        exit 2
        ;;
    esac
}

# The fixture's tokenizer with as many ids as the real one has: words that no text has fill it up.
make_tokenizer() { # directory
    mkdir -p "$1"
    cp "test/fixtures/tokenizers/$style/tokenizer_config.json" "$1"
    awk -v first=$fixture_ids -v end=$ids '
        { print }
        /"vocab": \{/ {
            for (i = first; i < end; i++) printf "      \"<word %d>\": %d,\n", i, i
        }' "test/fixtures/tokenizers/$style/tokenizer.json" >"$1/tokenizer.json"
}

plain_config() {
    cat <<END
{
  "architectures": ["$class"],
  "attention_bias": false,
  "hidden_act": "silu",
  "hidden_size": $d,
  "intermediate_size": $F,
  "max_position_embeddings": $context,
  "model_type": "$kind",
  "num_attention_heads": $H,
  "num_hidden_layers": $layers,
  "num_key_value_heads": $G,
  "rms_norm_eps": $eps,
  "rope_scaling": $scaling,
  "rope_theta": $theta,
  "tie_word_embeddings": $tied,
  "vocab_size": $V
}
END
}

# The members of the authors' file; theirs are in test/fixtures/{tiny,olmo2}/recurrent.
published_config() {
    code=llama
    [ $kind = llama ] || code=olmo
    cat <<END
{
  "activation_checkpoint_impl": "per-iteration",
  "architecture_class_name": "RecurrentGPT",
  "architectures": ["RavenForCausalLM"],
  "auto_map": {
    "AutoConfig": "raven_config_minimal.RavenConfig",
    "AutoModelForCausalLM": "raven_modeling_minimal_$code.RavenForCausalLM"
  },
  "bias": false,
  "block_class_name": "SandwichBlock",
  "block_size": $context,
  "bos_token_id": 65504,
  "eos_token_id": 65505,
  "head_dim": $((d / H)),
  "init_orthogonal": false,
  "init_strategy": "takase",
  "init_values": {"embed_scale": 1.0, "std": 0.008703882797784892},
  "initial_state_mode": "random",
  "injection_type": "linear",
  "intermediate_size": $F,
  "max_position_embeddings": $context,
  "mean_backprop_depth": 8,
  "mean_recurrence": 32,
  "mlp_class_name": "GatedMLP",
  "model_type": "huginn_raven",
  "n_embd": $d,
  "n_heads": $H,
  "n_layers": $((P + C + D)),
  "n_layers_in_coda": $D,
  "n_layers_in_prelude": $P,
  "n_layers_in_recurrent_block": $C,
  "nonlin_name": "SiLU",
  "norm_class_name": "RMSNorm_llama",
  "norm_eps": $eps,
  "num_key_value_heads": $G,
  "pad_token_id": 65509,
  "padded_vocab_size": $V,
  "padding_multiple": 4096,
  "qk_bias": false,
  "rope_base": 50000,
  "rope_scaling": $scaling,
  "rope_theta": $theta,
  "sampling_scheme": "poisson-lognormal-filling",
  "state_init": "like-init",
  "test_time_noise": 0,
  "test_time_noise_type": "fixed",
  "tie_embeddings": false,
  "tie_word_embeddings": false,
  "torch_dtype": "float32",
  "transformers_version": "4.53.0",
  "vocab_size": $V
}
END
}
published_generation_config() {
    cat <<END
{
  "_from_model_config": true,
  "bos_token_id": 65504,
  "eos_token_id": 65505,
  "pad_token_id": 65509,
  "transformers_version": "4.53.0"
}
END
}

# ---- Time and memory ---------------------------------------------------------------------------
# A program's standard output is in $work/stdout afterwards, what it says beside in $work/stderr.
wrapped() { ${WRAP-} "$@" >"$work/stdout" 2>"$work/stderr" || { cat "$work/stderr" && false; }; }
timed() { # what, command
    what=$1
    shift
    check "$model: $what" wrapped "$large" measure "$times" "$model: $what" "$@"
    tail -n 1 "$times" | row
}
timed_until() { # path, what, command
    path=$1 what=$2
    shift 2
    check "$model: $what" \
        wrapped "$large" measure-until "$path" "$times" "$model: $what" "$@"
    tail -n 1 "$times" | row
}
row() {
    awk -F '\t' '{
        printf "| %-52s | %7.1f | %7.1f | %5.2f | %5.2f | %5.2f |\n",
            $1, $2, $3, $4 * 1024 / 1e9, $5 * 1024 / 1e9, $6 * 1024 / 1e9
    }'
}
# Says how fast the last command wrote a file; the time is that of all it did.
speed() { # file
    bytes=$(wc -c <"$1")
    tail -n 1 "$times" | awk -F '\t' -v bytes="$bytes" \
        '{ printf "%s: %.2f GB written, %.0f MB/s\n", $1, bytes / 1e9, bytes / 1e6 / $2 }'
}

# ---- Parts of a model's run --------------------------------------------------------------------
make_plain() { # the random source, F32 and bf16, and surgery on both; the last one is left
    mkdir "$work/shape"
    plain_config >"$work/shape/config.json"
    make_tokenizer "$work/tokenizer"
    timed "a random source" "$BIN/convert" --random "$work/shape" --tokenizer "$work/tokenizer" \
        --to "$work/plain"
    timed "the source rewritten as bf16" "$BIN/convert" --from "$work/plain" --to "$work/bf16" \
        --dtype bf16
    speed "$work/bf16/model.safetensors"
    timed "surgery, bf16 to F32" "$BIN/convert" --from "$work/bf16" --to "$work/recurrent" \
        --preset $preset
    speed "$work/recurrent/model.safetensors"
    rm -r "$work/bf16" "$work/recurrent"
    timed "surgery, F32 to F32" "$BIN/convert" --from "$work/plain" --to "$work/recurrent" \
        --preset $preset
    speed "$work/recurrent/model.safetensors"
    rm -r "$work/plain" "$work/shape"
}

publish() {
    mkdir "$work/published"
    check "$model: two shards" wrapped "$large" publish "$work/recurrent" "$work/published"
    rm -r "$work/recurrent"
    published_config >"$work/published/config.json"
    published_generation_config >"$work/published/generation_config.json"
    cp "$work/tokenizer"/* "$work/published"
}

has() { grep -q -e "$1" "$2"; }
has_not() { ! grep -q -e "$1" "$2"; }
# The lines of a table of infer --eval: recurrences and loss.
losses_are_finite() {
    awk '/^ *[0-9]/ { lines++; if ($2 !~ /^[0-9.]+$/) bad = 1 } END { exit bad || lines != 2 }' \
        "$work/stdout"
}
# Five tokens, drawn, since random weights' likeliest one is often the same again; fewer if an end
# of text comes before. Their ids go to a file.
generate() { # directory, what, file
    timed "a text, $2" "$BIN/infer" --model "$1" --prompt "$prompt" --recurrences 2 --json \
        --max-tokens 5 --temperature 1 --seed 1
    sed 's/.*"tokens":\[\([0-9,]*\)\].*/\1/' "$work/stdout" | tr , '\n' >"$3"
}
# Random weights hardly ever write an end of text. So a word that they do write, not at once,
# becomes the tokenizer's: the same text must end where it comes first.
end_texts() {
    end=$(awk -v low=$fixture_ids -v high=$ids '
        NR == 1 { first = $1 }
        $1 != first && $1 >= low && $1 < high { print; exit }' "$work/ids")
    sed "s|\"eos_token\": \"[^\"]*\"|\"eos_token\": \"<word $end>\"|" \
        "$work/published/tokenizer_config.json" >"$work/tokenizer_config.json"
    mv "$work/tokenizer_config.json" "$work/published"
}
ends() { # directory, what
    generate "$1" "$2" "$work/ids_ended"
    check "$model: $2: it ends" has '"finish_reason":"stop"' "$work/stdout"
    sed "/^$end\$/,\$d" "$work/ids" >"$work/ids_expected"
    check "$model: $2: before the tokenizer's end of text" \
        cmp "$work/ids_expected" "$work/ids_ended"
}

evaluate() {
    timed "logits at r = 4" "$BIN/infer" --model "$work/published" --prompt "$prompt" \
        --recurrences 4 --logits "$work/logits.safetensors"
    check "$model: logits are finite" "$large" finite "$work/logits.safetensors"
    generate "$work/published" "of 5 tokens" "$work/ids"
    end_texts
    ends "$work/published" "as published"
    check "$model: Huginn's ids are told" has '65505.*Huginn' "$work/stderr"
    check "$model: text becomes tokens" wrapped "$BIN/convert" --tokenize "$work/text.txt" \
        --tokenizer "$work/published" --to "$work/text.bin"
    timed "evaluation, 2 rows at r = 1, 4" "$BIN/infer" --model "$work/published" \
        --eval "$work/text.bin" --seq-len 64 --rows 2 --recurrences 1,4
    check "$model: losses are finite" losses_are_finite
}

# Steps of 64 tokens: a recurrence without gradient and two with. They are so small that the trained
# model writes the same text.
training() { # out, options
    out=$1
    shift
    set -- --model "$work/published" --data "$work/text.bin" --out "$out" --steps 2 --seq-len 64 \
        --micro-batch-size 1 --fixed-recurrences 1,2 --lr 1e-7 --device cpu "$@"
    command=
    for word in "$@"; do command="$command '$word'"; done
}
# GB of memory, of a checkpoint, and what is free, as --dry-run says.
needs() { # options of a training
    training "$work/none" "$@" --dry-run
    eval "$BIN/train $command" 2>/dev/null | awk '
        /^memory/ { inside = 1 }
        inside && $1 == "all" { memory = $2; free = $4 }
        $1 == "checkpoint" { checkpoint = $2 }
        END { print memory, checkpoint, free }'
}
fits() { awk "BEGIN { exit !($1) }"; }

# A step of all parameters, or of the core if memory is short. It is not saved: its checkpoint, and
# the next one beside it, would be too large for the disk.
train_all() {
    for optimizer in adamw muon; do
        set -- $(needs --optimizer $optimizer)
        echo "$model: all parameters by $optimizer need $1 GB of memory, of $3, and $2 of disk"
    done
    optimizer=${WHOLE:-adamw} part=all
    set -- $(needs --optimizer "$optimizer")
    if fits "$1 * 1.1 > $3"; then part=core; fi
    training "$work/all" --optimizer "$optimizer" --train $part
    eval timed_until "$work/all/log.jsonl" "'a step of $part by $optimizer'" "$BIN/train" "$command"
    check "$model: its loss is a number" has '"loss":[0-9]' "$work/all/log.jsonl"
    rm -r "$work/all"
}

sums() { (cd "$1/latest" && cksum model.safetensors optimizer.safetensors config.json); }
# Two steps in one go, and two of which the first was saved and the program then killed.
train_and_resume() {
    for part in core adapter; do
        set -- $(needs --optimizer adamw --train $part)
        echo "$model: the $part by adamw needs $1 GB of memory, of $3, and $2 of disk"
        ! fits "2 * $2 < ${DISK:-15}" || break
    done
    training "$work/run" --optimizer adamw --train $part
    eval timed "'two steps of the $part, saved'" "$BIN/train" "$command"
    sums "$work/run" >"$work/sums"
    rm -r "$work/run"
    training "$work/run" --optimizer adamw --train $part --save-every 1
    eval timed_until "$work/run/latest" "'a step of the $part, saved and killed'" \
        "$BIN/train" "$command"
    rm "$work/published"/model*
    timed "resumed for the second step" "$BIN/train" --resume --out "$work/run"
    sums "$work/run" >"$work/sums_resumed"
    check "$model: the same bits" cmp "$work/sums" "$work/sums_resumed"
    ends "$work/run" "after training"
    check "$model: the ids are mended" has_not 'Huginn' "$work/stderr"
    check "$model: in its files too" \
        has_not 6550 "$work/run/latest/config.json" "$work/run/latest/generation_config.json"
}

cp README.md "$work/text.txt"
for model in ${MODELS:-tinyllama llama3.2-2-4-2 llama3.2 olmo2}; do
    shape "$model"
    make_plain
    publish
    evaluate
    train_all
    train_and_resume
    rm -rf "${work:?}/run" "$work/published" "$work/tokenizer" "$work/text.bin"
done

printf '\n| %-52s | seconds | of CPU  | GB    | own   | files |\n' "model: what"
echo "|---|---|---|---|---|---|"
row <"$times"
printf '%-24s %d passed, %d failed\n' large $passed $failed
[ $failed -eq 0 ]
