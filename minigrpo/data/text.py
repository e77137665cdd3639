"""Characters that are not what they look like: one spelling of each, which can be seen, and which
do nothing to a terminal."""

import unicodedata

LONGEST = 2000  # characters of a message
BLANK = "\u115f\u1160\u2800\u3164\uffa0"  # letters and signs that are drawn as nothing


def one_spelling(text: str) -> str:
    """Unicode's form C: an accent can stand in its letter or behind it, and the two would be
    different words to any score."""
    return unicodedata.normalize("NFC", text)


def can_be_seen(text: str) -> bool:
    """Whether a letter, number, sign or symbol is in it: white space, zero-width and control
    characters are none."""
    return any(unicodedata.category(char)[0] in "LNPS" and char not in BLANK for char in text)


def printable(text: str) -> str:
    """For a terminal: control characters, line ends and what turns the direction of writing are
    shown as their escapes."""
    return "".join(char if char == " " or unicodedata.category(char)[0] not in "CZ"
                   else ascii(char)[1:-1] for char in text)


def message(text: str) -> str:
    """One line of a message: `printable`, and cut in its middle where what it quotes is longer than
    anyone reads."""
    return printable(text if len(text) <= LONGEST
                     else f"{text[:LONGEST - 500]} [...] {text[-400:]}")
