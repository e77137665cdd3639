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

from .rewrite import Endpoint, check_address, rewrite_all
from .rows import one_paragraph
from .sample import read_jsonl


def words(*patterns: str) -> re.Pattern:
    return re.compile(rf"\b(?:{'|'.join(patterns)})\b", re.I)


# Words that a sentence can lose and still be true of this film: "Unchanged small effusion." ->
# "Small effusion."
LOOSE = re.compile(
    r"\b(?:(?:grossly|essentially|relatively|once|still)"
    r" )?(?:unchanged|stable|persistent|persisting|again|new)\b[ ,]*",
    re.I,
)
# Not after a no: "No new consolidation." does not say that there is none.
NEGATED = words("no", "not", "without", "nor", "neither")
# Clauses that speak of other films, from the comma or the word that opens them to the next comma or
# the end.
OPENERS = words(
    r"(?:as |when |in |by )?(?:compar(?:ed|ison)|relative) (?:to|with)",
    "since",
    "in the (?:interim|interval)",
    "as before",
    "(?:from|as on|similar to) (?:the )?(?:prior|previous)",
    "with(?:out| no) (?:significant |relevant |interval )*changes?",
)
CLAUSE = re.compile(rf"[, ]*{OPENERS.pattern}[^,;]*", re.I)
# What is left and still compares: the whole sentence goes, since the verbs of change can't be taken
# out of it.
COMPARES = words(
    "prior",
    "previous(?:ly)?",
    "comparison",
    "compared",
    "unchanged",
    "stable",
    "changed?",
    "interval",
    "again",
    "new(?:ly)?",
    "since",
    "earlier",
    "former",
    "(?:in|de)creas(?:ed?|es|ing)",
    "improv(?:ed?|es|ing|ement)",
    "wors(?:e|ened?|ens|ening)",
    "progress(?:ed|es|ion|ive(?:ly)?)",
    "resol(?:ved?|ves|ving|ution)",
    "enlarg(?:ing|es)",
    "remov(?:ed|al)",
    "remain(?:s|ed)?",
    "has (?:developed|cleared|appeared|been (?:placed|withdrawn|advanced))",
    "persist(?:s|ed)?",
    "no longer",
    "re-?demonstrated",
    "follow-?up",
)
# Talk, not film: who was told, what should be done, and what de-identification left blank.
TALK = re.compile(
    r"___|XXXX|\bdr\.|\b(?:discussed with|communicated|telephoned|notified|paged|by"
    r" phone|recommend(?:ed|s|ation)?|dictated|"
    r"is advised)\b",
    re.I,
)
# The subject of a predicate: "The heart is unchanged." must not become "The heart is."
PREDICATE = words(
    r"(?:is|are|was|were|remains?|appears?|has|have)\s+(?:\w+ly\s+)?(?:unchanged|stable|persistent)"
)
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9_\"(])")


def clean_report(text: str) -> str:
    """The sentences of a report that speak of this film alone; "" if none do."""
    text = one_paragraph(text).replace("Dr. ", "Dr.")  # its dot ends no sentence
    kept = [clean_sentence(sentence) for sentence in SENTENCE.split(text)]
    return " ".join(filter(None, kept))


def clean_sentence(sentence: str) -> str:
    """The sentence without its comparison, or "" where that is all it says."""
    if TALK.search(sentence) or PREDICATE.search(sentence):
        return ""
    short = CLAUSE.sub("", sentence)
    short = LOOSE.sub(lambda word: word[0] if NEGATED.search(short[: word.start()]) else "", short)
    short = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", short)  # "a new opacity", "an opacity"
    if COMPARES.search(short) or len(re.findall(r"[A-Za-z]{2,}", short)) < 2:
        return ""
    if short == sentence:
        return sentence
    short = re.sub(r"\s+([,.;])", r"\1", re.sub(r"\s{2,}", " ", short)).strip(" ,;.") + "."
    return short[:1].upper() + short[1:]


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


if __name__ == "__main__":
    main()
