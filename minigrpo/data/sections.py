"""Sections of a report: where they begin and end. Only a known name ends one, since `ETT: 3 cm
above the carina.` is a finding."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

from .ledger import Ledger

# Each section by the spellings that reports use, slips of the pen among them (most are counted in
# MIT-LCP's mimic-cxr code). In a spelling a space stands for any white space, and (S) for S, (S) or
# nothing.
SPELLINGS = {
    "FINDINGS": (
        "FINDING(S), FINDINS, FINDINDGS, FINDGINGS, FINDNGS, FINDNINGS, FINIDNGS, FINSINGS, FINSING"
    ),
    "FINDINGS AND IMPRESSION": (
        "FINDING(S) AND IMPRESSION(S), FINDING(S) & IMPRESSION(S), FINDING(S)/IMPRESSION(S), "
        "FINDING(S) / IMPRESSION(S), FINDING(S)/ IMPRESSION(S), IMPRESSION(S)/FINDING(S), "
        "IMPRESSION(S) AND FINDING(S)"
    ),
    "IMPRESSION": (
        "IMPRESSION(S), IMPRESSON, IMPRESSSION, IMPRESSIO, IMPRESSOIN, IMPRSSION, IMPRESION, "
        "IMPERSSION, IMPESSION, IMPRRESSION, IMPRESSION AND PLAN, IMPRESSION/PLAN, "
        "IMPRESSION AND RECOMMENDATION(S), END OF IMPRESSION, CONCLUSION(S), CONCUSION, SUMMARY, "
        "OPINION, DIAGNOSIS"
    ),
    "COMPARISON": (
        "COMPARISON(S), COMPARISION, COMPARISON EXAM(S), COMPARISON EXAMINATION(S), "
        "COMPARISON FILM(S), COMPARISON STUDY, COMPARISON STUDIES, REFERENCE EXAM(S), "
        "REFERENCE EXAMINATION"
    ),
    "INDICATION": (
        "INDICATION(S), CLINICAL INDICATION(S), REASON FOR EXAM, REASON FOR EXAMINATION, "
        "REASON FOR THE EXAM, REASON FOR THIS EXAM, REASON FOR THIS EXAMINATION, REASON FOR STUDY"
    ),
    "HISTORY": (
        "HISTORY, CLINICAL HISTORY, PATIENT HISTORY, CLINICAL INFORMATION, CLINICAL DATA, PFI"
    ),
    "TECHNIQUE": "TECHNIQUE(S), PROCEDURE(S), PROCEDURE COMMENT(S)",
    "EXAMINATION": "EXAMINATION(S), EXAM(S), TYPE OF EXAM, TYPE OF EXAMINATION, STUDY",
    "REPORT": "REPORT, FINAL REPORT, PRELIMINARY REPORT, NARRATIVE, ACCESSION NUMBER",
    "WET READ": "WET READ(S), WETREAD, WET READING",
    "RECOMMENDATIONS": (
        "RECOMMENDATION(S), RECOMMENDATION(S) AND FOLLOW UP, RECOMMENDATION(S) AND FOLLOW-UP"
    ),
    "NOTIFICATION": "NOTIFICATION(S), NOTIFICATION OF CRITICAL RESULT(S), ATTESTATION",
    "ADDENDUM": "ADDENDUM, ADDENDA",
}


def _each(text: str) -> Iterator[str]:
    """A spelling with each of its (S) in all three ways."""
    first, *others = text.split("(S)")
    for ends in product(("", "S", "(S)"), repeat=len(others)):
        yield first + "".join(end + other for end, other in zip(ends, others))


SECTION_OF = {
    spelling: section
    for section, spellings in SPELLINGS.items()
    for text in spellings.split(", ")
    for spelling in _each(text)
}


def _any(names: Iterable[str]) -> str:
    longest_first = sorted(names, key=len, reverse=True)
    return "|".join(re.escape(name).replace(r"\ ", r"\s+") for name in longest_first)


# In capitals anywhere before a colon, or alone on a line; as a sentence or a title is written, at
# the start of a line before a colon.
_CAPITALS = _any(SECTION_OF)
_TITLED = _any({*map(str.capitalize, SECTION_OF), *map(str.title, SECTION_OF)})
HEADING = re.compile(
    rf"(?<![^\s*])({_CAPITALS})[ \t]*:|^[ \t]*({_CAPITALS})[ \t]*$|" rf"^[ \t]*({_TITLED})[ \t]*:",
    re.M,
)
# What looks like a heading and is none that is known: it stays in its section.
UNKNOWN = re.compile(r"^[ \t]*([A-Z][A-Z /(),&-]*[A-Z)])[ \t]*:", re.M)


@dataclass
class Section:
    name: str  # a key of SPELLINGS
    text: str  # without its heading, stripped
    end: str | None  # the section whose heading ends it; None at the report's end


def sections(report: str) -> list[Section]:
    """All sections of a report in order; what stands before the first heading is none."""
    headings = list(HEADING.finditer(report))
    names = [SECTION_OF[" ".join(match[match.lastindex].upper().split())] for match in headings]
    ends = [match.start() for match in headings[1:]] + [len(report)]
    return [
        Section(name, report[match.end() : end].strip(), after)
        for match, name, end, after in zip(headings, names, ends, [*names[1:], None])
    ]


def findings_of(report: str) -> Section | None:
    """The findings, those that stand together with the impression where there are no others; None
    if there are none."""
    known = [section for section in sections(report) if section.text]
    return next(
        (
            section
            for name in ("FINDINGS", "FINDINGS AND IMPRESSION")
            for section in known
            if section.name == name
        ),
        None,
    )


def note_section(findings: Section, ledger: Ledger) -> None:
    """What was cut off behind a report's findings, and what was not, as notes of the ledger."""
    end = f"at {findings.end}" if findings.end else "with the report"
    ledger.notes[f"reports whose findings end {end}"] += 1
    if findings.name != "FINDINGS":
        ledger.notes["reports whose findings include the impression"] += 1
    if UNKNOWN.search(findings.text):
        ledger.notes["reports whose findings contain lines that begin like a heading (ETT:)"] += 1
