#!/bin/sh
# The NFC normalizer of Hugging Face's tokenizers 0.22.2 (Qwen's tokenizers have it) composes by the
# tables of Unicode 9 of 2016, whatever Unicode the Python beside it has: characters that were given
# canonical compositions later stay apart, so that the same text has other ids than after
# unicodedata.normalize("NFC", text).
#
#     U+11935 U+11930 (Dives Akuru, Unicode 13) stays two characters; Python makes U+11938 of them
#     U+0065 U+0301 becomes U+00E9 in both
#
# retrofit's NFC has the tables of Unicode 9 for that reason.
set -e
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q tokenizers==0.22.2
"$work/venv/bin/python" - <<'PYTHON'
import unicodedata
import tokenizers
from tokenizers import normalizers

def points(text):
    return " ".join(f"U+{ord(c):04X}" for c in text)

newer, older = "\U00011935\U00011930", "e\u0301"
nfc = normalizers.NFC().normalize_str
print("tokenizers", tokenizers.__version__, "Python's Unicode", unicodedata.unidata_version)
for text in (newer, older):
    print(points(text), "->", points(nfc(text)), "Python:",
          points(unicodedata.normalize("NFC", text)))
assert nfc(older) == "\u00e9" and nfc(newer) == newer, "the behaviour has changed"
assert unicodedata.normalize("NFC", newer) == "\U00011938", "Python older than Unicode 13"
PYTHON
