"""Thinking traces for a cold start: a teacher sees film, question and answer, and thinks aloud up
to the answer.

    python -m minigrpo.cold_start data/phantom/train.jsonl --teacher drawing \\
        --output_file data/phantom/think.jsonl
    python -m minigrpo.cold_start data/mimic/train.jsonl --teacher http://127.0.0.1:8000/v1 \\
        --model Qwen3-VL-235B --limit 28000 --output_file data/mimic/think.jsonl
    python -m minigrpo.cold_start data/mimic/train.jsonl --teacher checkpoint \\
        --model Qwen/Qwen3-VL-8B-Instruct --output_file ...

A trace is kept if the reply is one closed <think> block followed by the answer, word for word, and
does not reveal that the answer was known; refused ones are counted by reason. The output has every
line of the file unchanged, answered directly, and a line with "thinking" for each trace:
train_sft.py appends ` /think` to their questions. Replies are cached beside the output, so that a
stopped run can be resumed.
"""

import base64
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from minigrpo.data import Sample, read_jsonl
from minigrpo.data.clean import lines_of
from minigrpo.data.rewrite import Endpoint, ask_all, check_address, is_reply, key_of
from minigrpo.data.traces import (
    TEMPLATES,
    check_reply,
    drawing_teacher,
    messages_for,
    read_templates,
)
from minigrpo.run.files import write_jsonl
from minigrpo.run.terminal import Parser, fail

# a conversation has many answers, and one block a turn teaches little
THINKING_TASKS = ("report", "grounding", "classification")


def endpoint_teacher(
    endpoint: Endpoint, templates: dict, max_new_tokens: int
) -> Callable[[Sample], tuple[str, bool]]:
    """Films are sent as data URLs, which every OpenAI-compatible server with vision reads."""

    def teach(sample: Sample) -> tuple[str, bool]:
        system, text = messages_for(sample, templates)
        images = [
            {"type": "image_url", "image_url": {"url": data_url(path)}} for path in sample.images
        ]
        return endpoint.chat(
            [
                {"role": "system", "content": system},
                {"role": "user", "content": [*images, {"type": "text", "text": text}]},
            ],
            max_tokens=max_new_tokens,
        )

    return teach


def data_url(path: str) -> str:
    """The film as an 8-bit PNG: 16-bit files and greys from DICOM are converted here, as for the
    student.
    """
    from io import BytesIO

    from minigrpo.data import load_image

    buffer = BytesIO()
    load_image(path).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def checkpoint_teacher(
    model: str, templates: dict, max_new_tokens: int, device: str
) -> Callable[[list[Sample]], list[tuple[str, bool]]]:
    """A Qwen3-VL on this machine; there is no system turn here, so that text goes before the
    question. Takes a batch.
    """
    from minigrpo.generate import generate
    from minigrpo.policy import Policy

    policy = Policy.from_pretrained(model, device=device, autocast=device != "cpu")

    def teach(samples: list[Sample]) -> list[tuple[str, bool]]:
        asked = [
            replace(sample, question="\n\n".join(messages_for(sample, templates)))
            for sample in samples
        ]
        rollout = generate(
            policy, policy.encode(asked), max_new_tokens=max_new_tokens, temperature=0
        )
        return list(zip(rollout.texts, rollout.finished.tolist()))

    return teach


def replies(
    args, endpoint: Endpoint | None, samples: list[Sample], chosen: list[Sample], templates: dict
) -> list[tuple[str, bool] | None]:
    """(reply, whether it is complete) for each chosen sample, from the cache if it was asked
    before; None if an endpoint gave no answer.
    """
    if args.teacher == "drawing":
        return list(map(drawing_teacher(samples, templates), chosen))
    cache = args.cache or args.output_file.with_suffix(".cache.jsonl")
    keys = [
        key_of(
            args.teacher == "checkpoint",
            args.model,
            args.max_new_tokens,
            s.images,
            *messages_for(s, templates),
        )
        for s in chosen
    ]
    if endpoint:
        return ask_all(
            endpoint_teacher(endpoint, templates, args.max_new_tokens),
            chosen,
            keys,
            cache,
            args.workers,
            "traces",
            is_reply,
        )
    teach = checkpoint_teacher(args.model, templates, args.max_new_tokens, args.device)
    batches = [slice(k, k + args.workers) for k in range(0, len(chosen), args.workers)]
    answered = ask_all(
        teach,
        [chosen[b] for b in batches],
        [key_of(*keys[b]) for b in batches],
        cache,
        1,
        "traces",
        are_replies,
    )
    return [reply for batch in answered for reply in batch]


def are_replies(answer: object) -> bool:
    return isinstance(answer, list) and all(map(is_reply, answer))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, help="JSONL file of samples")
    parser.add_argument(
        "--teacher",
        required=True,
        help=(
            "`drawing` (phantom films, drawn scenes), `checkpoint` (a Qwen3-VL on this "
            "machine), or an OpenAI-compatible address, such as http://127.0.0.1:8000/v1"
        ),
    )
    parser.add_argument(
        "--model", help="the teacher: checkpoint folder or hub name, or its name at the endpoint"
    )
    parser.add_argument("--output_file", type=Path, required=True, help="JSONL file to write")
    parser.add_argument(
        "--limit", type=int, help="ask about N samples, drawn with --seed; default: all"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument(
        "--traces_only",
        action="store_true",
        help="write only the traces, without the lines that are answered directly",
    )
    parser.add_argument("--max_new_tokens", type=int, default=2048, help="longest reply in tokens")
    parser.add_argument(
        "--workers", type=int, default=8, help="requests at once; for a checkpoint, samples at once"
    )
    parser.add_argument(
        "--templates",
        type=Path,
        default=TEMPLATES,
        help="the templates of the teacher and of the filters",
    )
    parser.add_argument(
        "--cache", type=Path, help="JSONL file of replies so far; default: beside --output_file"
    )
    parser.add_argument("--device", default="cpu", help="of a checkpoint: cpu or cuda")
    parser.add_argument(
        "--allow_sending_reports",
        action="store_true",
        help=(
            "send films and reports of credentialed or unknown data sets to an endpoint on another"
            " machine; only if you have the right to"
        ),
    )
    args = parser.parse_args()
    try:
        if args.output_file.exists():
            raise ValueError(
                f"{args.output_file} exists already: remove it, or give another --output_file"
            )
        if args.teacher != "drawing" and not args.model:
            raise ValueError(f"--teacher {args.teacher} needs --model, the teacher's name")
        for name in ("limit", "workers", "max_new_tokens"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
        endpoint = None
        if args.teacher not in ("drawing", "checkpoint"):
            endpoint = Endpoint(
                args.teacher, args.model, key=os.environ.get("OPENAI_API_KEY"), timeout=600.0
            )
        templates, samples = read_templates(args.templates), read_jsonl(args.file)
        open_to = [s for s in samples if s.task in THINKING_TASKS and s.images and not s.thinking]
        if not open_to:
            raise ValueError(
                f"{args.file} has no sample to think about, one with a film and a task of"
                f" {', '.join(THINKING_TASKS)}"
            )
        chosen = (
            open_to
            if args.limit is None
            else random.Random(args.seed).sample(open_to, min(args.limit, len(open_to)))
        )
        if endpoint:
            check_address(
                args.teacher,
                [s.source for s in chosen],
                "films and reports",
                args.allow_sending_reports,
            )
        args.output_file.parent.mkdir(parents=True, exist_ok=True)
        answers = replies(args, endpoint, samples, chosen, templates)
        records = lines_of(args.file, args.output_file)
    except (ValueError, OSError) as error:
        fail(error)

    counts: Counter[str] = Counter()
    traces = {}
    for sample, reply in zip(chosen, answers):
        trace, reason = check_reply(*reply, sample, templates) if reply else ("", "no answer")
        counts[reason] += 1
        if trace:
            traces[sample.id] = trace
    spoken = [
        record | {"id": f"{record['id']}-think", "thinking": traces[record["id"]]}
        for record in records
        if record["id"] in traces
    ]
    lines = spoken if args.traces_only else records + spoken
    try:
        write_jsonl(args.output_file, lines)
    except OSError as error:
        fail(f"{error}")
    refused = ", ".join(f"{n:,} {reason}" for reason, n in counts.most_common() if reason) or "none"
    print(
        f"{args.output_file}: {len(lines):,} lines; {len(chosen):,} samples asked, {len(traces):,}"
        f" traces kept; refused: {refused}"
    )


if __name__ == "__main__":
    main()
