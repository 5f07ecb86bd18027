#!/usr/bin/env python3
"""Makes test/fixtures/tokenizers/qwen2_style and olmo2_style: what Hugging Face's tokenizers give.

    pip install tokenizers==0.22.2
    python3 test/tokenizer_fixtures.py test/fixtures/tokenizers

Steps and special tokens are those of Qwen2's and OLMo-2's tokenizer.json, the vocabulary is small
and made of the texts that llama3_style has, and a few more for NFC. OLMo-2's pattern is GPT-4's,
of which there is another spelling too: the ids must be the same.
"""
import json
import os
import sys

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT4 = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+")
MORE = [
    "cafe\u0301 re\u0301sume\u0301 A\u030a \u212b \u1e9b\u0323",  # composed, and singletons
    "q\u0307\u0323 d\u0323\u0307 e\u0327\u0301",  # marks that change places
    "\u1112\u1161\u11ab\u1100\u1173\u11af \u110b\u1163",  # Hangul of its letters
    "\u0915\u093c \u0958 \ufb1d \u2126 \u0344",  # what NFC takes apart and leaves so
    "it'\u017f we'LL I'D can'T '\u017f 'L l'",
    "<|im_start|>user\nWie geht's?<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|>b <|endoftext|> c<|pad|>d",
    "1 12 123 1234 12345 3.14 2026-11-30 \u00bd\u00be7\u0665",
    "x = 1;\r\n\r\n\ty = 2;   \n  \n", "tail  \n \t",
    "\u3000\u3000\u65e5\u672c\u8a9e\u3002 \u4e2d\u6587",
]


def tokenizer_of(pattern, behavior, invert, nfc, specials, texts):
    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior, invert),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False,
                                                    use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=640, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.model.continuing_subword_prefix = tokenizer.model.end_of_word_suffix = ""
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
    return tokenizer


def write(directory, tokenizer, texts, config):
    os.makedirs(directory, exist_ok=True)
    tokenizer.save(os.path.join(directory, "tokenizer.json"))
    cases = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        special = tokenizer.encode(text).ids
        cases.append({"text": text, "ids": ids, "ids_with_special": special,
                      "decoded": tokenizer.decode(ids)})
    for name, value in (("cases.json", cases), ("tokenizer_config.json", config)):
        with open(os.path.join(directory, name), "w") as file:
            json.dump(value, file, indent=0)


def main():
    where = sys.argv[1]
    with open(os.path.join(where, "llama3_style/cases.json")) as file:
        texts = [case["text"] for case in json.load(file)] + MORE
    end = "<|endoftext|>"
    chat = [end, "<|im_start|>", "<|im_end|>"]
    qwen2 = tokenizer_of(WORDS % r"\p{N}", "isolated", False, True, chat, texts)
    write(os.path.join(where, "qwen2_style"), qwen2, texts, {
        "add_bos_token": False, "add_prefix_space": False, "additional_special_tokens": chat[1:],
        "bos_token": None, "clean_up_tokenization_spaces": False, "eos_token": end,
        "errors": "replace", "model_max_length": 32768, "pad_token": end,
        "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer", "unk_token": None})

    digits = WORDS % r"\p{N}{1,3}"
    specials = [end, "<|pad|>"]
    olmo2 = tokenizer_of(digits, "removed", True, False, specials, texts)
    write(os.path.join(where, "olmo2_style"), olmo2, texts, {
        "add_prefix_space": False, "bos_token": end, "clean_up_tokenization_spaces": False,
        "eos_token": end, "extra_special_tokens": {}, "model_max_length": 8192,
        "pad_token": "<|pad|>", "tokenizer_class": "GPT2Tokenizer", "unk_token": end})
    other = tokenizer_of(GPT4, "removed", True, False, specials, texts)
    for text in texts:
        if other.encode(text).ids != olmo2.encode(text).ids:
            sys.exit(f"GPT-4's spelling cuts {text!r} otherwise")


main()
