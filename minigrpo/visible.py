"""Untrusted text made safe to show: terminal control sequences are escaped."""

import re
import unicodedata

LONGEST = 2000  # characters of a message

# Control characters but tab and line break (ESC begins a terminal's commands, CR and BS write over
# what stands there), line and paragraph separators, what turns the direction of text around, and
# halves of surrogate pairs, which nothing can encode.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""ESC becomes \x1b, four characters, and so on; everything else is unchanged."""
    return OBEYED.sub(lambda match: ascii(match[0])[1:-1], text)


def printable(text: str) -> str:
    """For a terminal: control characters, line ends and characters that change the writing
    direction are escaped.
    """
    return "".join(
        char if char == " " or unicodedata.category(char)[0] not in "CZ" else ascii(char)[1:-1]
        for char in text
    )


def text_of(error: object) -> str:
    """str(error), which may fail for a foreign class."""
    try:
        return str(error)
    except Exception:
        return f"{type(error).__name__} without text"


def messages(text: object) -> str:
    """`message` of each line."""
    return "\n".join(map(message, str(text).split("\n")))


def message(text: str) -> str:
    """One line of a message: `printable`, and shortened in the middle if it is too long to read."""
    return printable(
        text if len(text) <= LONGEST else f"{text[: LONGEST - 500]} [...] {text[-400:]}"
    )
