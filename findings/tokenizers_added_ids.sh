#!/bin/sh
# Hugging Face's tokenizers 0.22.2 does not keep the id that tokenizer.json gives an added token, if
# the token is not in the model's vocabulary and the id is not the next free one: it counts on from
# the vocabulary's size, without a word, and writes the other id when it saves. A model that was
# trained with the file's ids (a vocabulary padded to a round size, say, with its special tokens
# behind the padding) then gets wrong ones.
#
#     file: vocabulary {"a": 0, "b": 1}, added token "<e>" with id 9
#     "a<e>b" encodes to [0, 2, 1], not to [0, 9, 1]
#
# retrofit follows the file, and says in a note where the library would count differently.
set -e
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q tokenizers==0.22.2
"$work/venv/bin/python" - <<'PYTHON'
import json
import tokenizers
flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
             end_of_word_suffix=None, fuse_unk=False, byte_fallback=False, ignore_merges=False,
             vocab={"a": 0, "b": 1}, merges=[])
file = dict(version="1.0", truncation=None, padding=None, normalizer=None, pre_tokenizer=None,
            post_processor=None, decoder=None, model=model,
            added_tokens=[dict(id=9, content="<e>", **flags)])
tokenizer = tokenizers.Tokenizer.from_str(json.dumps(file))
ids = tokenizer.encode("a<e>b").ids
saved = json.loads(tokenizer.to_str())["added_tokens"][0]["id"]
print("tokenizers", tokenizers.__version__, "encodes to", ids, "and saves the id", saved)
assert ids == [0, 2, 1] and saved == 2, "the behaviour has changed"
PYTHON
