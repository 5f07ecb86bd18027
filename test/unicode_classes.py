#!/usr/bin/env python3
"""Prints the tables of retrofit.h, section 11, that come from the Unicode data. tok_class_runs:
which code points are letters, numbers, white space and parts of words, as Hugging Face's regular
expressions mean \\p{L}, \\p{N}, \\s and \\w. tok_nfc_pairs, tok_nfc_classes: what NFC needs.

    pip install unicodedata2==16.0.0        # Unicode 16, which Python's own is not
    python3 test/unicode_classes.py         # prints the C strings
    python3 test/unicode_classes.py --check retrofit.h      # whether they stand in that file

\\p{L} is the general categories Lu, Ll, Lt, Lm and Lo, \\p{N} is Nd, Nl and No, \\s is the property
White_Space of Unicode's PropList.txt, \\w is the categories L, M, Nd, Nl and Pc, and what else has
the properties Alphabetic or Join_Control. What unicodedata2 does not have is listed below.

NFC is that of Unicode 9, which Hugging Face's tokenizers 0.22 has: characters that came later are
left alone. Those that Unicode 16 would decompose or reorder are listed below as NEWER.
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
WORD = [  # in \\w, but in none of its categories
    (0x200C, 0x200D),  # the two joiners
    (0x24B6, 0x24E9),  # letters in circles
    (0x1F130, 0x1F149),  # letters in squares
    (0x1F150, 0x1F169),  # letters in black circles
    (0x1F170, 0x1F189),  # letters in black squares
]
# fmt: off
NEWER = [
    (0x07FD, 0x07FD), (0x0897, 0x089F), (0x08CA, 0x08D3), (0x09FE, 0x09FE), (0x0C3C, 0x0C3C),
    (0x0D3B, 0x0D3C), (0x0EBA, 0x0EBA), (0x1715, 0x1715), (0x1ABF, 0x1ACE), (0x1DF6, 0x1DFA),
    (0xA82C, 0xA82C), (0x105C9, 0x105C9), (0x105E4, 0x105E4), (0x10D24, 0x10D27),
    (0x10D69, 0x10D6D), (0x10EAB, 0x10EAC), (0x10EFD, 0x10EFF), (0x10F46, 0x10F50),
    (0x10F82, 0x10F85), (0x11070, 0x11070), (0x1133B, 0x1133B), (0x11383, 0x11383),
    (0x11385, 0x11385), (0x1138E, 0x1138E), (0x11391, 0x11391), (0x113C5, 0x113C5),
    (0x113C7, 0x113C8), (0x113CE, 0x113D0), (0x1145E, 0x1145E), (0x11839, 0x1183A),
    (0x11938, 0x11938), (0x1193D, 0x1193E), (0x11943, 0x11943), (0x119E0, 0x119E0),
    (0x11A34, 0x11A34), (0x11A47, 0x11A47), (0x11A99, 0x11A99), (0x11D42, 0x11D42),
    (0x11D44, 0x11D45), (0x11D97, 0x11D97), (0x11F41, 0x11F42), (0x16121, 0x16128),
    (0x1612F, 0x1612F), (0x16D68, 0x16D6A), (0x16FF0, 0x16FF1), (0x1E08F, 0x1E08F),
    (0x1E130, 0x1E136), (0x1E2AE, 0x1E2AE), (0x1E2EC, 0x1E2EF), (0x1E4EC, 0x1E4EF),
    (0x1E5EE, 0x1E5EF),
]
# fmt: on
FIRST_MARK = 0x300  # all second characters of a decomposition are from here on


def is_listed(code_point, ranges):
    return any(first <= code_point <= last for first, last in ranges)


def is_letter(code_point):
    return unicodedata2.category(chr(code_point))[0] == "L"


def is_number(code_point):
    return unicodedata2.category(chr(code_point))[0] == "N"


def is_white_space(code_point):
    return is_listed(code_point, WHITE_SPACE)


def is_word(code_point):
    category = unicodedata2.category(chr(code_point))
    return category[0] in "LM" or category in ("Nd", "Nl", "Pc") or is_listed(code_point, WORD)


def combining_class(code_point):
    return 0 if is_listed(code_point, NEWER) else unicodedata2.combining(chr(code_point))


def decomposition(code_point):
    """One step of the canonical decomposition: none, one or two code points."""
    text = unicodedata2.decomposition(chr(code_point))
    is_canonical = text and text[0] != "<" and not is_listed(code_point, NEWER)
    return [int(part, 16) for part in text.split()] if is_canonical else []


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


def cut(text):
    """A C string, cut into lines of at most 100 columns."""
    width = COLUMNS - len('    "",')
    parts = [text[at : at + width] for at in range(0, len(text), width)]
    return ['    "' + part + '"' for part in parts]


def class_runs():
    """The initialiser's lines: one string for each class."""
    lines = []
    for name, is_in_class in [
        ("\\p{L}", is_letter),
        ("\\p{N}", is_number),
        ("\\s", is_white_space),
        ("\\w", is_word),
    ]:
        lines.append("    // " + name)
        lines += cut("".join(base_26(length) for length in run_lengths(is_in_class)))
        lines[-1] += ","
    return "\n".join(lines) + "\n"


def nfc_pairs():
    """For each code point that has a decomposition: how far it is from the one before, the first
    code point of it, and the second: 0 if there is none, else counted from FIRST_MARK - 1, doubled,
    + 1 if the two are not composed again."""
    text = ""
    before = 0
    for code_point in range(LAST + 1):
        parts = decomposition(code_point)
        if not parts:
            continue
        text += base_26(code_point - before) + base_26(parts[0])
        before = code_point
        second = 0
        if len(parts) == 2:
            pair = chr(parts[0]) + chr(parts[1])
            is_excluded = unicodedata2.normalize("NFC", pair) != chr(code_point)
            second = 2 * (parts[1] - FIRST_MARK + 1) + is_excluded
        text += base_26(second)
    return "\n".join(cut(text)) + ";\n"


def nfc_classes():
    """For each run of code points with one combining class that is not 0: how far its first one is
    from the end of the run before, how many they are, and the class."""
    text = ""
    end = 0
    begin = 0
    while begin <= LAST:
        number = combining_class(begin)
        length = 1
        while number and combining_class(begin + length) == number:
            length += 1
        if number:
            text += base_26(begin - end) + base_26(length) + base_26(number)
            end = begin + length
        begin += length
    return "\n".join(cut(text)) + ";\n"


def main():
    assert unicodedata2.unidata_version == "16.0.0", unicodedata2.unidata_version
    tables = [class_runs(), nfc_pairs(), nfc_classes()]
    if len(sys.argv) == 3 and sys.argv[1] == "--check":
        text = open(sys.argv[2], encoding="utf-8").read()
        if not all(table in text for table in tables):
            sys.exit(sys.argv[2] + ": its tables are not those of Unicode")
        print(sys.argv[2] + ": its tables are those of Unicode")
    else:
        print("\n".join(tables), end="")


main()
