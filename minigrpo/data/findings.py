"""Which findings a report states, read by rules: a finding's word that no negation reaches. It
keeps the books of `minigrpo.data.clean` and judges no model; for that there is CheXbert.
"""

import re
from collections import Counter

# Stems: a word that begins so names the finding.
FINDINGS = {
    "cardiomegaly": r"cardiomegal|enlarged (?:heart|cardi)|(?:heart|cardi\w+)\b[^.;]*\benlarge",
    "enlargement": r"enlarge",
    "effusion": r"effusion",
    "edema": r"o?edema",
    "congestion": r"congesti|cephalization",
    "consolidation": r"consolidat",
    "pneumonia": r"pneumonia",
    "infiltrate": r"infiltrat",
    "atelectasis": r"atelecta|collapse\b",
    "pneumothorax": r"pneumothora|hydropneumothora",
    "nodule": r"nodul",
    "mass": r"mass(?:es)?\b",
    "opacity": r"opaci",
    "granuloma": r"granulom",
    "emphysema": r"emphysem|bullous|bulla",
    "hyperinflation": r"hyperinflat|hyperexpan|hyperlucen|flatten",
    "elevated diaphragm": r"eventrat|elevat\w*[^.;]*diaphragm|diaphragm\w*[^.;]*elevat",
    "fracture": r"fractur",
    "degenerative": r"degenerat|osteophyt|spondyl|osteoarthr|arthrit",
    "calcification": r"calcif",
    "scoliosis": r"scolio|kyphos|levocurv|dextrocurv",
    "hernia": r"herni",
    "interstitial": r"interstiti|reticul",
    "scarring": r"scar|fibro",
    "thickening": r"thicken",
    "tortuosity": r"tortuo|ectasia|ectatic|uncoil",
    "lymphadenopathy": r"adenopath",
    "device": r"catheter|pacemaker|pacer|defibrillat|\btubes?\b|\bport\b|picc|stent|clips|wires",
    "surgery": r"sternotom|cabg|postsurgic|postoperat|thoracotom|lobectom|mastectom",
    "low volumes": r"(?:low|small|decreased|diminished|reduced) lung volume|hypoinflat",
}
_FINDINGS = {name: re.compile(rf"\b(?:{stems})", re.I) for name, stems in FINDINGS.items()}
# A negation reaches to the end of its clause.
_NEGATION = re.compile(
    r"\b(?:no(?! (?:\w+ )*changes? in\b)|not|without|nor|neither|never|free of|clear of|negative "
    r"for|absence of|absent|"
    r"rather than|resolved|resolution of|no longer|unlikely|removal of|removed)\b",
    re.I,
)
_CLAUSE = re.compile(
    r"[.;:]\s|[.;]$|,? \b(?:but|however|although|though|except)\b|, (?=there )", re.I
)
# said behind what it denies
_BEHIND = re.compile(
    r"\b(?:(?:is|are|was|were) (?:not|no longer)|ha(?:s|ve) (?:\w+ )?(?:resolved|cleared|removed|"
    r"withdrawn)|"
    r"resolved|no longer|(?:is|are) (?:unlikely|absent))\b",
    re.I,
)


def stated_findings(text: str) -> set[str]:
    """The names in `FINDINGS` of what the text states and does not deny."""
    stated = set()
    for clause in _CLAUSE.split(" ".join(text.split())):
        if _BEHIND.search(clause):
            continue
        negation = _NEGATION.search(clause)
        reach = clause[: negation.start()] if negation else clause
        # "no effusion or fracture" denies both, "fracture without effusion" the second alone
        stated |= {name for name, pattern in _FINDINGS.items() if pattern.search(reach)}
    return stated


def count_findings(before: list[str], after: list[str]) -> dict[str, tuple[int, int, list[int]]]:
    """{finding: (reports that state it before, after, places of those that lost it)}."""
    stated = [(stated_findings(a), stated_findings(b)) for a, b in zip(before, after, strict=True)]
    first, second = (Counter(name for pair in stated for name in pair[k]) for k in (0, 1))
    return {
        name: (
            first[name],
            second[name],
            [i for i, (a, b) in enumerate(stated) if name in a and name not in b],
        )
        for name in FINDINGS
        if first[name] or second[name]
    }
