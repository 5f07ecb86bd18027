#!/usr/bin/env python3
"""Prints the table tok_class_runs of retrofit.h, section 11: which code points are letters, numbers
and white space, as Hugging Face's regular expressions mean \\p{L}, \\p{N} and \\s.

    pip install unicodedata2==16.0.0        # Unicode 16; Python's own unicodedata has another version
    python3 test/unicode_classes.py         # prints the C strings
    python3 test/unicode_classes.py --check retrofit.h      # whether they stand in that file

\\p{L} is the general categories Lu, Ll, Lt, Lm and Lo; \\p{N} is Nd, Nl and No; \\s is the property
White_Space of Unicode's PropList.txt, listed below, because unicodedata2 does not have it.
Only a new version of Unicode needs this script: nothing in the build or in `make test` runs it."""
import sys

import unicodedata2

LAST = 0x10FFFF
COLUMNS = 100
WHITE_SPACE = [
    (0x0009, 0x000D),  # tab, line feed, vertical tab, form feed, carriage return
    (0x0020, 0x0020),  # space
    (0x0085, 0x0085),  # next line
    (0x00A0, 0x00A0),  # no-break space
    (0x1680, 0x1680),  # Ogham space mark
    (0x2000, 0x200A),  # en quad to hair space
    (0x2028, 0x2029),  # line separator, paragraph separator
    (0x202F, 0x202F),  # narrow no-break space
    (0x205F, 0x205F),  # medium mathematical space
    (0x3000, 0x3000),  # ideographic space
]


def is_letter(code_point):
    return unicodedata2.category(chr(code_point))[0] == "L"


def is_number(code_point):
    return unicodedata2.category(chr(code_point))[0] == "N"


def is_white_space(code_point):
    return any(first <= code_point <= last for first, last in WHITE_SPACE)


def run_lengths(is_in_class):
    """How many code points, from 0 on, are outside of the class, then how many inside, and so on.
    What is outside after the last one inside is left out."""
    lengths = []
    begin = 0
    inside = False
    for code_point in range(LAST + 1):
        if is_in_class(code_point) != inside:
            lengths.append(code_point - begin)
            begin = code_point
            inside = not inside
    if inside:
        lengths.append(LAST + 1 - begin)
    return lengths


def base_26(number):
    """Digits a = 0 to z = 25, the most significant one first; the last digit is a capital."""
    text = chr(ord("A") + number % 26)
    while number >= 26:
        number //= 26
        text = chr(ord("a") + number % 26) + text
    return text


def c_strings():
    """The initialiser's lines: one string for each class, cut into lines of at most 100 columns."""
    width = COLUMNS - len('    "",')
    lines = []
    for name, is_in_class in [
        ("\\p{L}", is_letter),
        ("\\p{N}", is_number),
        ("\\s", is_white_space),
    ]:
        runs = "".join(base_26(length) for length in run_lengths(is_in_class))
        parts = [runs[at : at + width] for at in range(0, len(runs), width)]
        lines.append("    // " + name)
        lines += ['    "' + part + '"' for part in parts]
        lines[-1] += ","
    return "\n".join(lines) + "\n"


def main():
    assert unicodedata2.unidata_version == "16.0.0", unicodedata2.unidata_version
    if len(sys.argv) == 3 and sys.argv[1] == "--check":
        if c_strings() not in open(sys.argv[2], encoding="utf-8").read():
            sys.exit(sys.argv[2] + ": its table is not the one of Unicode 16")
        print(sys.argv[2] + ": its table is the one of Unicode 16")
    else:
        print(c_strings(), end="")


main()
