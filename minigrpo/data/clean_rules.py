"""The rules of `minigrpo.data.clean`, in the order in which a sentence meets them: what goes, with
an example, what is left of it, and a like sentence that stays as it is. The tests try both.
"""

import re
from dataclasses import dataclass, field

FILM = (
    r"(?:the |a |an |any |his |her |most recent |recent |multiple |several |immediate )*"
    r"(?:prior|previous|earlier|last|old|former|comparison|outside|recent|available|xxxx|___)s?"
    r"(?:[ -](?:chest|portable|frontal|lateral|pa|ap|outside|available|recent|dated|from|of|the|on|"
    r"most|xxxx|___))*"
    r"(?:[ -](?:study|studies|exam\w*|x-?rays?|radiograph\w*|films?|images?|imaging|ct|scans?|"
    r"comparison|view|reports?|evaluation|dates?|priors?|one))*"
)
AGO = r"(?:(?! with(?:out)?\b| and no\b)[^,.;])*"
ADVERB = r"(?:(?:slight|mild|marked|significant|minimal|gross|essential|relative|moderate|somewhat|"
ADVERB += r"interval|overall|probab|like|fair|appreciab|substantial)(?:ly)? )*"
CHANGE = (
    r"(?:increased?|decreased?|improved|worsened|progressed|larger|smaller|changed|"
    r"unchanged|stable|persistent|similar|the same|better|worse|more (?:prominent|pronounced|"
    r"conspicuous|extensive)|less (?:prominent|pronounced|conspicuous|extensive)|decreasing|"
    r"increasing|improving|worsening|resolving)"
)


DENIED = re.compile(r"\b(?:no|not|without|nor|neither)\b[^.;,]*$", re.I)


@dataclass(frozen=True)
class Rule:
    name: str
    pattern: str  # of a regular expression, case ignored
    becomes: str  # what stands in its place
    example: str
    result: str
    untouched: str  # a like sentence, which the rule leaves alone
    affirmed: bool = False  # not behind a no: "no new nodule" does not say that there is none
    compiled: re.Pattern = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "compiled", re.compile(self.pattern, re.I))

    def __call__(self, sentence: str) -> str:
        def replaced(found: re.Match) -> str:
            denied = self.affirmed and DENIED.search(sentence[: found.start()])
            return found[0] if denied else found.expand(self.becomes)

        return self.compiled.sub(replaced, sentence)


RULES = [
    Rule(
        "heading",
        r"^(?:findings|impression|comparison|indication|conclusion|technique|exam\w*|"
        r"history)\s*:\s*",
        "",
        "FINDINGS: The lungs are clear.",
        "The lungs are clear.",
        "The findings are those of emphysema.",
    ),
    Rule(
        "advice behind a finding",
        r"[,;]? ?(?:and |which |for which )?(?:(?:further|follow-?up|clinical|dedicated|a|ct|"
        r"chest|repeat|"
        r"pa|lateral|short-term) )*(?:evaluation|imaging|follow-?up|correlation|ct|radiographs?|"
        r"views?|scan|study)\b[^,.;]*\b(?:recommended|suggested|advised|helpful|warranted|"
        r"indicated)"
        r"[^,.;]*",
        "",
        "There is a nodule in the left lung, CT is recommended.",
        "There is a nodule in the left lung.",
        "There is a nodule, seen in the lateral view.",
    ),
    Rule(
        "advice in the imperative",
        r"[,;] (?:and )?(?:recommend|consider|suggest|please|advise)\b[^.;]*",
        "",
        "Bibasilar opacities, recommend follow-up CT.",
        "Bibasilar opacities.",
        "Bibasilar opacities, considerable in size.",
    ),
    Rule(
        "no change in a finding",
        r"^(?:there (?:is|has been) )?no (?:significant |interval |definite )*changes? in (?:the "
        r"|an? )?",
        "",
        "No change in the large hiatal hernia.",
        "Large hiatal hernia.",
        "No hiatal hernia.",
    ),
    Rule(
        "position",
        r"^(?:stable|unchanged|persistent) (?:position|appearance|configuration) of (?:the )?",
        "",
        "Unchanged position of the right PICC.",
        "Right PICC.",
        "The position of the right PICC is normal.",
    ),
    Rule(
        "blank for a quantity",
        r"\b(there )(?:is|are) (?:an? )?(?:XXXX|_{2,}) of ",
        r"\1is ",
        "There are XXXX of prior granulomatous disease.",
        "There is prior granulomatous disease.",
        "There are signs of prior granulomatous disease.",
    ),
    Rule(
        "blank for a noun",
        r"(?<=[a-z]) (?:XXXX|_{2,}) (?:is|are) (?=\w)",
        ", ",
        "Median sternotomy XXXX are intact.",
        "Median sternotomy, intact.",
        "Median sternotomy wires are intact.",
    ),
    Rule(
        "blank with its preposition",
        r"(?:,? ?\b(?:of|from|on|to|at|by|dated|since|in|with|per|the|an?)\b)* ?(?:XXXX|_{2,})"
        r"(?:[ ,/-]*(?:XXXX|_{2,}))*(?=\s*(?:[,.;]|$))",
        "",
        "Calcified granuloma in the right lung of XXXX.",
        "Calcified granuloma in the right lung.",
        "Calcified granuloma in the right lung.",
    ),
    Rule(
        "blank",
        r"\b(?:XXXX|_{2,})(?: ?[-/] ?(?:XXXX|_{2,}))*\s*",
        "",
        "XXXX sternotomy wires are seen.",
        "Sternotomy wires are seen.",
        "Sternotomy wires are seen.",
    ),
    Rule(
        "opening clause of comparison",
        rf"^(?:(?:as |when |in )?compar(?:ed|ison) (?:to|with)|relative to|since|from) (?:{FILM}|"
        rf"[^,]*?)"
        rf"{AGO}, ?",
        "",
        "Compared to the prior study, there is a small left effusion.",
        "There is a small left effusion.",
        "In the left lung, there is a nodule.",
    ),
    Rule(
        "clause of comparison",
        r"[, ]*\b(?:(?:as |when |in |by |again )?(?:compar(?:ed|ison)|relative|similar|unchanged"
        rf"|changed|stable|in appearance) (?:in appearance |in size )?(?:to|with|from|since|"
        rf"compared to|"
        rf"when compared (?:to|with)) {FILM}\b{AGO}|(?:from|since|on|as on|than on|than in|than) "
        rf"{FILM}\b{AGO}"
        r"|since (?:the )?(?:that time|\d[^,.;]*)|in the (?:interim|interval)|as before|over time|"
        r"as (?:previously|before) (?:seen|noted|described)|"
        r"(?:with(?:out| no) |and )(?:significant |relevant |interval |definite |appreciable |any |"
        r"substantial )*changes?(?: [^,.;]*)?)",
        "",
        "Small right effusion, unchanged from prior.",
        "Small right effusion.",
        "Degenerative change of the spine.",
    ),
    Rule(
        "interval change of a finding",
        r"\b(?:there (?:has been|is|are|have been) )?(?:an? |some |slight |mild |significant |"
        r"marked |"
        r"minimal |moderate |further )*interval (?:slight |mild |significant |marked "
        r")*(?:development|"
        r"appearance|increase|decrease|improvement|worsening|progression|enlargement|placement|"
        r"insertion|change)(?: (?:of|in|to))?(?: the| an?)?\b(?=\s*\w)",
        "",
        "There has been interval development of a left effusion.",
        "Left effusion.",
        "There is a left effusion.",
    ),
    Rule(
        "a finding that has changed",
        rf"^(?:the |there (?:is|are) )?(.*?\S)\s*,? (?:ha(?:s|ve)(?: been)?|is|are|was|were|"
        rf"remains?|"
        rf"appears?|looks?|continues? to be) {ADVERB}{CHANGE}"
        r"(?: (?:in|the) (?:size|appearance|extent|interval))?(?=\s*(?:[,.;]|$))",
        r"\1",
        "The left effusion has slightly increased.",
        "Left effusion.",
        "The left effusion is small.",
    ),
    Rule(
        "a finding that persists",
        r"^(?:the )?(.*?\S) (?:persists?|remains?|continues?)(?: to be seen)?(?=\s*[,.;]|$)",
        r"\1",
        "The left effusion persists.",
        "Left effusion.",
        "The left effusion is small.",
    ),
    Rule(
        "remains",
        r"\b(?:has |have )?(?:remained|remains|continues to be)\b",
        "is",
        "The heart remains enlarged.",
        "The heart is enlarged.",
        "The remainder is clear.",
    ),
    Rule(
        "remain",
        r"\b(?:remain|continue to be)\b",
        "are",
        "The lungs remain hyperexpanded.",
        "The lungs are hyperexpanded.",
        "The remaining lungs are clear.",
    ),
    Rule(
        "joined adjective",
        rf"(?:,? (?:but|and|yet) |, )(?:not )?{ADVERB}(?:{CHANGE}|new)"
        rf"(?: in (?:size|appearance))?(?=\s*(?:[,.;]|$|\bin\b|\bwith))|"
        rf"\b{ADVERB}(?:unchanged|stable|persistent) (?:and|but) (?=\w)|"
        rf"(?<=\w) (?:and|but) {ADVERB}(?:unchanged|stable|persistent)(?= \w)",
        "",
        "The heart is enlarged but stable.",
        "The heart is enlarged.",
        "The heart is enlarged but clear.",
    ),
    Rule(
        "redemonstration",
        r"\b(?:there is )?(?:re-?demonstration|persistence|visualization) of (?:(?:the|an?) )?",
        "",
        "Redemonstration of a calcified nodule.",
        "Calcified nodule.",
        "A calcified nodule is demonstrated.",
    ),
    Rule(
        "again",
        r",? ?\b(?:once )?again\b(?!st)",
        "",
        "There is again a large hiatal hernia.",
        "There is a large hiatal hernia.",
        "A hiatal hernia against the heart.",
    ),
    Rule(
        "as seen before",
        r"\b(?:(?:as )?previously (?:seen|noted|described|identified|visualized|demonstrated|"
        r"reported|"
        r"questioned|mentioned)|re-?demonstrated (?=\w+ \w)) ?",
        "",
        "Previously noted granuloma in the left lung.",
        "Granuloma in the left lung.",
        "Granuloma noted in the left lung.",
    ),
    Rule(
        "redemonstrated",
        r"\bre-?demonstrated\b",
        "seen",
        "A hiatal hernia is redemonstrated.",
        "A hiatal hernia is seen.",
        "A hiatal hernia is demonstrated.",
    ),
    Rule(
        "adjective of change",
        r"\b(?:\w+ly |still )?(?:unchanged|stable|persistent|persisting|continued|"
        r"newly|new|worsening|worsened|improving|improved|progressive|progressing|increasing|"
        r"decreasing|enlarging|chronic-appearing|residual|resolving|still)(?:,? | ?(?=-))(?=\w)",
        "",
        "Stable cardiomegaly.",
        "Cardiomegaly.",
        "Increased interstitial markings.",
        affirmed=True,
    ),
]

# Not on this film: the finding went, and its sentence goes.
GONE = re.compile(
    r"\b(?:ha(?:s|ve) (?:\w+ly )?(?:resolved|cleared|been (?:removed|withdrawn))|"
    r"interval (?:\w+ )?(?:resolution|removal|clearing|extubation)|(?:is|are|was|were) (?:now "
    r")?(?:resolved|"
    r"removed|no longer|not (?:now |clearly |well |definitely )?(?:seen|visualized|identified|"
    r"present|evident|apparent))|no longer|resolved|resolution of|removal of|extubated)\b",
    re.I,
)
PAST = re.compile(
    r"\b(?:previous(?:ly)?|prior|earlier|no longer|interval|removed|resolv\w*|resolution|removal|"
    r"cleared|withdrawn|extubated)\b",
    re.I,
)
# No subject is left where a blank was one.
HEADLESS = re.compile(r"^(?:is|are|was|were|and|or|of|to|has|have)\b", re.I)
ADVICE = re.compile(r"^(?:please |would )?(?:consider|recommend|suggest|correlate|advise)\b", re.I)
# Says nothing of this film alone: an old one may be there.
NOT_NEW = re.compile(
    r"\b(?:no|without|not|nor)\b[^.;,]*\b(?:new|interval|acute change|changes?\b(?! of)|increas\w*|"
    r"progress\w*|worsen\w*|developing|significant change)\b",
    re.I,
)
# Talk, not film: who was told, and what should be done.
TALK = re.compile(
    r"\b(?:dr\.|discussed with|communicated|telephoned|notified|paged|by (?:tele)?phone|dictated|"
    r"recommend(?:ed|s|ation\w*)?|(?:is|are|may be|would be|be) (?:advised|suggested|helpful|"
    r"warranted)|correlat\w+ (?:with|clinically)|clinical(?:ly)? correlat\w+|follow-?up|"
    r"findings were (?:relayed|reported)|attending|(?:please|would) (?:correlate|consider))\b",
    re.I,
)
# What is left and still compares.
COMPARES = re.compile(
    r"\b(?:compar(?:ed|ison)|unchanged|stable|interval|again|new(?:ly)?|since|previous(?:ly)?|"
    r"prior "
    r"(?:study|studies|exam\w*|films?|radiograph\w*|x-?rays?|ct|imag\w*)|re-?demonstrat\w+|"
    r"persist\w*|"
    r"remain(?:s|ed)?|similar to|worsen\w*|improv\w+|increasing|decreasing|ha(?:s|ve) (?:\w+ly )?"
    r"(?:increased|decreased|changed|progressed|developed|appeared)|than (?:before|previously)|"
    r"(?:little|relevant|significant|interval) changes?)\b",
    re.I,
)
