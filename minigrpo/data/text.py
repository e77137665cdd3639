"""Characters that are not what they look like: one spelling of each, which can be seen."""

import unicodedata

BLANK = "\u115f\u1160\u2800\u3164\uffa0"  # letters and signs that are drawn as nothing


def one_spelling(text: str) -> str:
    """Unicode's form C: an accent can stand in its letter or behind it, and the two would be
    different words to any score."""
    return unicodedata.normalize("NFC", text)


def can_be_seen(text: str) -> bool:
    """Whether a letter, number, sign or symbol is in it: white space, zero-width and control
    characters are none."""
    return any(unicodedata.category(char)[0] in "LNPS" and char not in BLANK for char in text)
