"""A second reading of which findings a text states, to judge the cleaner by: plain stems of words
and a negation that reaches to the end of its sentence. It shares nothing with
minigrpo/data/findings.py.
"""

STEMS = (
    *("cardiomeg", "enlarge", "effusion", "edema", "consolid", "pneumonia", "infiltrat", "atelect"),
    *("pneumothor", "nodul", "opaci", "granulom", "emphysem", "hyperinfl", "hyperexp", "flatten"),
    *("elevation", "fractur", "degener", "calcif", "scolio", "dextrocurv", "herni", "interstit"),
    *("scar", "thicken", "tortu", "sternotom", "cabg", "catheter", "pacemaker", "tube", "picc"),
    *("postsurg", "post-surg", "clips", "airspace"),
)
DENIALS = ("no", "not", "without", "longer", "resolved", "resolution", "removal", "removed")
DENIALS += ("withdrawn", "cleared", "consider", "recommend")


def stems(text: str) -> set[str]:
    found: set[str] = set()
    for sentence in text.lower().replace("but", ".").split(". "):
        words = [word.strip(".,;:()") for word in sentence.split()]
        behind = {"longer", "resolved", "removed", "withdrawn", "cleared", "recommended"} & {*words}
        if behind or "not seen" in sentence or "removal" in words or "resolution" in words:
            continue
        first = [k for k, word in enumerate(words) if word in DENIALS]
        if words[:3] == ["no", "change", "in"]:
            first = []
        if "not" in words and "significantly" in words:
            first = []
        for word in words[: first[0]] if first else words:
            found |= {stem for stem in STEMS if word.startswith(stem)}
    return found
