"""Comparison of open answers: one form for texts that mean the same.

Ours, near to SQuAD (arXiv:1606.05250) and VQA (arXiv:1505.00468); docs/differences.md lists what differs and why.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

ARTICLES = ("a", "an", "the")
# Quotes and dashes that NFKC leaves as they are.
PLAIN = str.maketrans({**dict.fromkeys("‘’‛ʼ`´", "'"), **dict.fromkeys("‐‑‒–—―−﹣", "-"), "⁄": "/", "∕": "/"})
# Scripts without blanks between words: each character is a word.
WITHOUT_BLANKS = re.compile(
    "[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\u3041-\u30ff\u31f0-\u31ff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"
)
POWERS = re.compile(r"(?<=\d)(?=[²³¹⁰-⁹₀-₉¼-¾⅐-⅞])")  # 10² is not 102, and 5½ is not 51/2
THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3})((?:,\d{3})+)(?![\d,])")


def normalized(answer: str) -> str:
    """Return the form in which open answers are compared: words and signs, one blank apart.

    Compatibility forms of Unicode are unified (NFKC), as are case, quotes and dashes. Punctuation becomes a blank, except
    within numbers (1.5, 3/4, -5), as a sign after a word (O-), and "%". Symbols such as + < > are words. Each character of
    a script without blanks is a word. "a", "an" and "the" are left out before another word, but not a capital "A" within
    an answer (vitamin A deficiency) or in front of another letter (A B).
    """
    words = [word for word, is_article in _words(answer) if not is_article]
    return " ".join(words)


def same_answer(one: str, two: str) -> bool:
    """Return whether two open answers count as equal: identical, or with one form, articles left out or not."""
    if one.strip() == two.strip() or normalized(one) == normalized(two) != "":
        return True
    whole = [[word for word, _ in _words(answer)] for answer in (one, two)]
    return whole[0] == whole[1] != []


def parse_open(raw: str) -> str | None:
    """Return the answer in a generation: its only non-empty line. Anything else, or nothing, is a failure, never a guess."""
    lines = [line.strip() for line in raw.splitlines() if line.strip()]
    answer = re.sub(r"\s+", " ", lines[0]) if len(lines) == 1 else ""
    return answer if normalized(answer) else None


def word_f1(said: str, meant: str) -> float:
    """Return the F1 of the words of two answers in their normalized form, 0..1 (SQuAD, arXiv:1606.05250, section 6)."""
    if same_answer(said, meant):
        return 1.0
    of_said, of_meant = normalized(said).split(), normalized(meant).split()
    common = sum((Counter(of_said) & Counter(of_meant)).values())
    return 2 * common / (len(of_said) + len(of_meant)) if common else 0.0


def _words(answer: str) -> list[tuple[str, bool]]:
    """(word in lower case, whether it is an article that may be left out) in order."""
    seen = "".join(char for char in answer if unicodedata.category(char) != "Cf")  # no soft hyphens, no joiners
    text = unicodedata.normalize("NFKC", POWERS.sub(" ", seen.translate(PLAIN))).translate(PLAIN)
    text = THOUSANDS.sub(lambda m: m[1] + m[2].replace(",", ""), text)
    spaced = "".join(_kept(text, i) for i in range(len(text)))
    words = WITHOUT_BLANKS.sub(r" \g<0> ", spaced).split()
    return [
        (unicodedata.normalize("NFKC", word.casefold()), _is_article(word, i == 0, words[i + 1 : i + 2]))
        for i, word in enumerate(words)
    ]


def _is_article(word: str, is_first: bool, after: list[str]) -> bool:
    """Return whether a word may be left out: an article before another word, and not a capital "A" that names something.

    It does within an answer (vitamin A deficiency), and in front of another single letter ("A B", two options).
    """
    if not after or word.casefold() not in ARTICLES:
        return False
    is_letter = len(after[0]) == 1 and after[0].isascii() and after[0].isalpha()
    return word != "A" or (is_first and not is_letter)


def _kept(text: str, i: int) -> str:
    """The character at `i` as it stands in the normalized form: itself, apart from its neighbours, or a blank."""
    char, category = text[i], unicodedata.category(text[i])
    before, after = text[i - 1] if i else " ", text[i + 1] if i + 1 < len(text) else " "
    if category.startswith("S") or char == "%":
        return f" {char} " if category != "Sk" else " "
    if not category.startswith("P"):
        return char
    if char in ".,/:-" and before.isdigit() and after.isdigit():
        return "." if char == "," else char
    if char in "-." and after.isdigit() and not before.isalnum():
        return char  # -5, .5
    if char == "-" and not after.isalnum() and (before.isalnum() or not text[i + 1 :].strip()):
        return " - "  # O-, Rh-, HER2 -
    return " "
