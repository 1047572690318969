#!/usr/bin/env python3
"""Writes eval/words.h: what marking answers must know of Unicode 16 (eval/marks.c).

    python3 -m venv /tmp/unicode && /tmp/unicode/bin/pip install unicodedata2==16.0.0
    /tmp/unicode/bin/python tests/make_words.py > eval/words.h

Two texts that canonical caseless matching takes for the same (The Unicode Standard, definition D145) become the same
letters. Python's str.casefold knows what it was built with, so what Unicode 15 and 16 added is written out.
"""
import unicodedata2 as ud

N = 0x110000
SYLLABLES = range(0xAC00, 0xD7A4)  # of Hangul, decomposed by arithmetic
LATER_FOLDS = {0xA7CB: 0x264, 0xA7CC: 0xA7CD, 0xA7DA: 0xA7DB, 0xA7DC: 0x19B, 0x1C89: 0x1C8A,
               **{c: c + 0x20 for c in range(0x10D50, 0x10D66)}}
COMPATIBLE = "CJK COMPATIBILITY IDEOGRAPH"  # a thousand that nothing writes are left as they are
# Written without spaces between words, or with endings that no space sets apart: each letter is a word.
SPACELESS = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR")


def fold(c):
    """The letters that stand for c: NFD(casefold(NFD(c)))."""
    text = ud.normalize("NFD", chr(c))
    text = "".join(chr(LATER_FOLDS[ord(x)]) if ord(x) in LATER_FOLDS else x.casefold() for x in text)
    return ud.normalize("NFD", text)


def kind(c):
    """0: stands between words; else a WordKind."""
    category = ud.category(chr(c))
    if category == "Cf":
        return "IGNORED"
    if category[0] == "M" or 0x1160 <= c < 0x1200 or 0xD7B0 <= c < 0xD800:  # jamo that follow the first of a syllable
        return "MARK"
    if category == "Nd":
        return "DIGIT"
    if category[0] in "LN":
        return "ALONE" if ud.name(chr(c), "").startswith(SPACELESS) else "LETTER"
    return 0


def rows(values):
    """values[c] -> (first, last, value) of every run of one truthy value."""
    runs = []
    for c, value in enumerate(values):
        if value and runs and runs[-1][1] == c - 1 and runs[-1][2] == value:
            runs[-1][1] = c
        elif value:
            runs.append([c, c, value])
    return runs


def table(head, items):
    print(head + " = {")
    line = "   "
    for item in items:
        if len(line + item) > 98:
            print(line)
            line = "   "
        line += " " + item + ","
    print(line + "\n};\n")


def main():
    codes = [c for c in range(0x80, N) if not 0xD800 <= c < 0xE000 and c not in SYLLABLES]
    folds = [(c, fold(c)) for c in codes if fold(c) != chr(c) and not ud.name(chr(c), "").startswith(COMPATIBLE)]
    most = max(len(text) for _, text in folds)
    kinds, classes = [0] * N, [0] * N
    for c in [*codes, *SYLLABLES]:
        kinds[c], classes[c] = kind(c), ud.combining(chr(c))
    for a, b, v in rows(kinds):
        assert v != "DIGIT" or all(ud.digit(chr(c)) == (c - a) % 10 for c in range(a, b + 1)), "digits in another order"
    print(f"""// words.h: which characters beyond ASCII make words, and which are the same letters.
// Unicode {ud.unidata_version}, written by tests/make_words.py.
#ifndef WORDS_H
#define WORDS_H
#include <stdint.h>

// A letter or number; a decimal digit, its rows begin with 0; a letter that is a word by itself;
// what belongs to the letter before it; what is not there at all. What is in no row stands between
// words.
typedef enum {{ BETWEEN, LETTER, DIGIT, ALONE, MARK, IGNORED }} WordKind;

typedef struct {{
    uint32_t first, last;
    uint8_t value;
}} WordRange;

typedef struct {{
    uint32_t c, to[{most}];  // zeros behind the last
}} WordFold;
""")
    table("static const WordRange word_kinds[]", (f"{{{a:#x}, {b:#x}, {v}}}" for a, b, v in rows(kinds)))
    print("// Canonical combining classes.")
    table("static const WordRange word_marks[]", (f"{{{a:#x}, {b:#x}, {v}}}" for a, b, v in rows(classes)))
    print("// The letters that a character stands for, case folded and decomposed.")
    table("static const WordFold word_folds[]",
          (f"{{{c:#x}, {{{', '.join(hex(ord(x)) for x in text)}}}}}" for c, text in folds))
    print("#endif")


if __name__ == "__main__":
    main()
