# SPDX-License-Identifier: Apache-2.0
"""Named classes of ASCII characters in regular expressions, in Go and in Rust."""

from __future__ import annotations

ASCII = "".join(map(chr, range(32, 127)))
LETTERS = "".join(c for c in ASCII if c.isalpha())
DIGITS = "0123456789"
WORDS = LETTERS + DIGITS + "_"
PERL = {"d": DIGITS, "w": WORDS, "s": " "}
POSIX = {
    "alnum": LETTERS + DIGITS,
    "alpha": LETTERS,
    "ascii": ASCII,
    "blank": " ",
    "cntrl": "",
    "digit": DIGITS,
    "graph": ASCII[1:],
    "lower": LETTERS.lower(),
    "print": ASCII,
    "punct": "".join(c for c in ASCII[1:] if not c.isalnum()),
    "space": " ",
    "upper": LETTERS.upper(),
    "word": WORDS,
    "xdigit": "0123456789abcdefABCDEF",
}
CATEGORIES = (
    *("L", "Lu", "Ll", "Lt", "Lm", "Lo", "M", "Mn", "Mc", "Me", "N", "Nd", "Nl", "No", "P", "Pc", "Pd", "Ps", "Pe"),
    *("Pi", "Pf", "Po", "S", "Sm", "Sc", "Sk", "So", "Z", "Zs", "Zl", "Zp", "C", "Cc", "Cf", "Co"),
)
SCRIPTS = {"Latin": LETTERS, "Greek": "", "Cyrillic": "", "Han": "", "Arabic": "", "Hebrew": ""}
