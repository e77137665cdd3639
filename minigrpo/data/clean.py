"""Reports cut down to what this film shows: no earlier films, no comparison, no talk with
colleagues.

    python -m minigrpo.data.clean mimic/train.jsonl --output_file mimic/train-clean.jsonl
    python -m minigrpo.data.clean openi/train.jsonl --output_file openi/train-clean.jsonl \\
        --endpoint http://127.0.0.1:8000/v1 --model NAME

A model sees one film, so a report that says "unchanged" teaches it to invent a past. The first
command follows rules (`clean_report`); the second asks a language model at any OpenAI-compatible
endpoint instead (`minigrpo.data.rewrite`). Other tasks pass through; a report with nothing left is
dropped and counted. Boxes and findings of a sample stay as they are.
"""

import json
import os
import re
from pathlib import Path

from minigrpo.run.files import write_jsonl
from minigrpo.run.terminal import Parser, fail
from minigrpo.visible import message

from .clean_rules import ADVICE, COMPARES, GONE, HEADLESS, NOT_NEW, PAST, RULES, TALK
from .findings import count_findings, stated_findings
from .rewrite import Endpoint, check_address, rewrite_all
from .rows import one_paragraph
from .sample import read_jsonl

# A dot that ends no sentence, in a report: it stands for the dot until the sentences are cut.
ABBREVIATION = re.compile(
    r"\b(?:dr|mr|mrs|ms|vs|approx|e\.g|i\.e)\.(?=\s+\S)|"
    r"\b(?:etc|a\.m|p\.m|st|fig|min|max)\.(?=\s+(?-i:[a-z0-9]))|"
    r"(?<=\d)\.(?=\d)|\b[A-Z]\.(?=\s?[A-Z]\.)",
    re.I,
)
SENTENCE = re.compile(r"(?<=[.!?])\s+")
# Where a sentence that compares falls into two.
CLAUSES = re.compile(
    r",? but (?=(?:the|there|an?|no)\b)|; |,? (?:and|while|although) (?=(?:the|there|no|an?) "
    r"[^,.;]*"
    r"\b(?:is|are|has|have|persist\w*|remain\w*)\b)",
    re.I,
)
VERB = re.compile(
    r"\b(?:is|are|was|were|has|have|there|seen|noted|present|appears?|shows?|normal|clear|intact|"
    r"unremarkable|within|no|not|without|low|large|small|increased|prominent|mild\w*)\b",
    re.I,
)


def clean_report(text: str) -> str:
    """The sentences of a report that speak of this film alone; "" if none do."""
    text = re.sub(r"\.{2,}", ".", one_paragraph(text))
    text = ABBREVIATION.sub(lambda found: found[0].replace(".", "\0"), text)
    kept = [clean_sentence(part.replace("\0", ".")) for part in SENTENCE.split(text)]
    return " ".join(filter(None, kept))


def clean_sentence(sentence: str) -> str:
    """The sentence without its comparison, or "" where that is all it says. One that states a
    finding on this film keeps it: where the rules would lose it, the sentence stays as it was.
    """
    if COMPARES.search(sentence) or GONE.search(sentence):
        parts = CLAUSES.split(sentence)
        if len(parts) > 1:  # "stable, but there is an effusion" says two things
            return " ".join(filter(None, (clean_sentence(tidy(part, "")) for part in parts)))
    stated = stated_findings(sentence)
    if ADVICE.search(sentence) or (GONE.search(sentence) and PAST.search(sentence) and not stated):
        return ""
    short = sentence
    for rule in RULES:
        short = rule(short)
    short = tidy(short, sentence)
    if stated - stated_findings(short):
        return sentence if ends(sentence) else tidy(sentence, "")
    if stated:
        return short
    rest = any(said.search(short) for said in (TALK, COMPARES, NOT_NEW, HEADLESS))
    # without its comparison "Stable heart size" says nothing; what lost nothing stays
    return short if (short == sentence or VERB.search(short)) and not rest else ""


def ends(sentence: str) -> bool:
    return sentence.endswith((".", "!", "?")) and sentence[0].isupper()


def tidy(short: str, before: str) -> str:
    """Grammar after words have gone: articles, ends that hang, blanks, a capital, a dot."""
    if short == before and ends(short):
        return short
    short = re.sub(r"\b(?:the|an?) (?=(?:the|an?) )", "", short, flags=re.I)
    short = re.sub(r"\b([Aa])n? (?=([a-z])?)", article, short)
    short = re.sub(r"\s+", " ", short)
    short = re.sub(r"\s+([,.;:])", r"\1", re.sub(r"(?:[,;:]\s*)+([,.;:])", r"\1", short))
    loose = r"(?:but|and|or|with|without|the|an?|of|in|to|from|than|at|which|is|are|as|appears?)"
    short = short.strip(" ,;:.!?")
    while re.search(rf"(?:[,;:]|\b{loose})$", short, re.I):
        short = re.sub(rf"\s*(?:[,;:]|\b{loose})$", "", short, flags=re.I).strip(" ,;:")
    short = re.sub(r"^(?:but|and|or|with|of|in|which|,|;)\s+(?=there )", "", short, flags=re.I)
    return short[:1].upper() + short[1:] + "." if re.search(r"[A-Za-z]{3}", short) else ""


def article(found: re.Match) -> str:
    """ "a" or "an" as the next letter wants it; what sounds otherwise than it looks stays."""
    letter, rest = found[2], found.string[found.end() :]
    if letter is None or rest.startswith(("one", "uni", "use", "hour", "eu", "x-ray")):
        return found[0]
    return found[1] + ("n " if letter in "aeiou" else " ")


def lines_of(path: Path, target: Path) -> list[dict]:
    """The JSON objects of a checked file, image paths as they must read from where `target`
    lies.
    """
    read_jsonl(path, verify_images=False)
    records = [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]

    def moved(name: str) -> str:
        return name if os.path.isabs(name) else os.path.relpath(path.parent / name, target.parent)

    for record in records:
        image = record["image"]
        record["image"] = (
            [moved(name) for name in image]
            if isinstance(image, list)
            else moved(image)
            if image
            else None
        )
    return records


def ledger(before: list[str], after: list[str]) -> str:
    """For each finding the reports that state it before and after, and up to two of which it is
    gone: on this film it is not, or the rules have lost it.
    """
    lines = [f"  {'finding':<20}{'before':>8}{'after':>8}{'gone':>8}"]
    for name, (first, second, gone) in count_findings(before, after).items():
        lines.append(f"  {name:<20}{first:>8,}{second:>8,}{len(gone):>8,}")
        lines += [f"    gone from: {message(before[i][:160])}" for i in gone[:2]]
    return "\n".join(lines)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, help="JSONL file whose reports are cleaned")
    parser.add_argument("--output_file", type=Path, required=True, help="JSONL file to write")
    parser.add_argument(
        "--endpoint",
        help=(
            "base address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1; without"
            " it, rules clean"
        ),
    )
    parser.add_argument("--model", help="the model's name at the endpoint")
    parser.add_argument("--workers", type=int, default=8, help="requests at once")
    parser.add_argument(
        "--cache",
        type=Path,
        help=(
            "JSONL file of answers so far, from which a stopped run goes on; default: beside "
            "--output_file"
        ),
    )
    parser.add_argument(
        "--allow_sending_reports",
        action="store_true",
        help=(
            "send reports of credentialed or unknown sets to an endpoint "
            "that is not this machine: only with the right to do so"
        ),
    )
    args = parser.parse_args()
    try:
        if args.output_file.exists():
            raise ValueError(
                f"{args.output_file} exists already: remove it, or give another --output_file"
            )
        if args.endpoint and not args.model:
            raise ValueError("--endpoint needs --model, the model's name there")
        endpoint, key = None, os.environ.get("OPENAI_API_KEY")
        if args.endpoint:
            endpoint = Endpoint(args.endpoint, args.model, key)
        records = lines_of(args.file, args.output_file)
        reports = [record for record in records if record["task"] == "report"]
        if args.endpoint:
            check_address(
                args.endpoint,
                [r.get("source") for r in reports],
                "reports",
                args.allow_sending_reports,
            )
            args.output_file.parent.mkdir(parents=True, exist_ok=True)
            cache = args.cache or args.output_file.with_suffix(".cache.jsonl")
            answers = rewrite_all(
                endpoint, [record["answer"] for record in reports], cache, args.workers
            )
        else:
            answers = [clean_report(record["answer"]) for record in reports]
    except (ValueError, OSError) as error:
        fail(error)
    changed = sum(
        answer not in (record["answer"], None) for answer, record in zip(answers, reports)
    )
    unanswered = answers.count(None)
    before = [record["answer"] for record in reports]
    for record, answer in zip(reports, answers):
        # one that the server did not answer may still compare: it is left out
        record["answer"] = answer or ""
    kept = [record for record in records if record["task"] != "report" or record["answer"]]
    if not kept:
        fail(
            f"nothing is left of the {len(reports):,} reports of {args.file}, so nothing is written"
        )
    try:
        write_jsonl(args.output_file, kept)
    except OSError as error:
        fail(f"{error}: give another --output_file")
    print(
        f"{args.output_file}: {len(records):,} samples read, {len(kept):,} kept,"
        f" {len(records) - len(kept):,} dropped (nothing left of the"
        f" report{f', or no answer: {unanswered:,}' if unanswered else ''}); {len(reports):,}"
        f" reports, {changed:,} changed"
    )
    print(ledger(before, [record["answer"] for record in reports]))


if __name__ == "__main__":
    main()
