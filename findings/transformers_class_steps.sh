#!/bin/sh
# AutoTokenizer of Hugging Face's transformers 5.23.0 does not follow normalizer and pre_tokenizer
# of tokenizer.json where tokenizer_config.json names LlamaTokenizer, GPT2Tokenizer
# or Qwen2Tokenizer: it takes vocabulary and merges, and builds the steps that the class has. 4.57.1
# follows the file. So models whose files name a class for want of a better one (OLMo-2's says
# GPT2Tokenizer, its pattern is GPT-4's) get other ids than they were trained with, without a word:
#
#     class           tokenizer.json has              text    tokenizers, 4.57.1   5.23.0
#     GPT2Tokenizer   GPT-4's pattern: 3 digits       1234    123 4                1234
#     Qwen2Tokenizer  GPT-2's pattern                 12      12                   1 2
#     LlamaTokenizer  Prepend and Replace of ▁        <s> a   <s> ▁▁ a             <s> ▁ a
#
# With PreTrainedTokenizerFast both versions follow the file. retrofit follows it too, and says in a
# note where transformers 5 would not.
set -e
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 4.57.1 5.23.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q transformers==$version
done
cat > "$work/ids.py" <<'PYTHON'
import json
import sys
import tokenizers
import transformers

GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
GPT4 = {"type": "Sequence", "pretokenizers": [
    {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex":
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"}},
    dict(GPT2, use_regex=False)]}
MARK = {"type": "Sequence", "normalizers": [
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
DIGITS = ["1", "2", "3", "4", "12", "123", "34", "1234"]
DIGIT_MERGES = [["1", "2"], ["12", "3"], ["3", "4"], ["12", "34"], ["123", "4"]]
CASES = {
    "GPT2Tokenizer": (None, GPT4, DIGITS, DIGIT_MERGES, "1234", ["123", "4"], ["1234"]),
    "Qwen2Tokenizer": (None, GPT2, DIGITS, DIGIT_MERGES, "12", ["12"], ["1", "2"]),
    "LlamaTokenizer": (MARK, None, ["a", "▁", "▁▁"], [["▁", "▁"]], "<s> a", ["<s>", "▁▁", "a"],
                       ["<s>", "▁", "a"]),
}
directory = sys.argv[1]
follows_file = transformers.__version__.startswith("4.")
for name, case in CASES.items():
    normalizer, pre_tokenizer, words, merges, text, file_says, five_says = case
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>"] + words)}
    special = [dict(id=i, content=word, single_word=False, lstrip=False, rstrip=False,
                    normalized=False, special=True)
               for i, word in enumerate(["<s>", "</s>", "<unk>"])]
    model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
                 end_of_word_suffix=None, fuse_unk=False, byte_fallback=False,
                 ignore_merges=False, vocab=vocabulary, merges=merges)
    file = dict(version="1.0", truncation=None, padding=None, added_tokens=special,
                normalizer=normalizer, pre_tokenizer=pre_tokenizer, post_processor=None,
                decoder=None, model=model)
    with open(f"{directory}/tokenizer.json", "w") as out:
        json.dump(file, out)
    config = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=False)
    tokens = {}
    for who in name, "PreTrainedTokenizerFast":
        with open(f"{directory}/tokenizer_config.json", "w") as out:
            json.dump(dict(config, tokenizer_class=who), out)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens[who] = tokenizer.convert_ids_to_tokens(ids)
    plain = tokenizers.Tokenizer.from_file(f"{directory}/tokenizer.json").encode(text).tokens
    print(transformers.__version__, name, repr(text), *tokens[name])
    assert plain == tokens["PreTrainedTokenizerFast"] == file_says, (plain, tokens)
    assert tokens[name] == (file_says if follows_file else five_says), "the behaviour has changed"
PYTHON
mkdir "$work/tokenizer"
for version in 4.57.1 5.23.0; do
    HF_HUB_OFFLINE=1 "$work/$version/bin/python" "$work/ids.py" "$work/tokenizer" \
        2> "$work/errors" || { cat "$work/errors"; exit 1; }
done
