"""Our samples and rewards in the formats of TRL's GRPOTrainer and verl; docs/node.md says when and
how.

    python -m minigrpo.elsewhere --data mine/train.jsonl --output mine/train.parquet      # for verl
"""

import io
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from minigrpo.run.args import answer_early
from minigrpo.run.arguments import ElsewhereArguments

if __name__ == "__main__":
    answer_early(ElsewhereArguments, __doc__)  # what follows takes seconds to import

from minigrpo.data import Sample, load_image, read_jsonl
from minigrpo.data.film import header
from minigrpo.packages import need
from minigrpo.rewards import reward_fn
from minigrpo.run.args import input_errors, parse_args, run_errors
from minigrpo.run.files import aside


def packed(sample: Sample) -> str:
    """A sample as one text, which every data frame keeps unchanged."""
    return json.dumps(asdict(sample))


def unpacked(text: str) -> Sample:
    return Sample(**json.loads(text))


# ---- TRL -----------------------------------------------------------------------------------------


def trl_rows(samples: list[Sample]) -> list[dict]:
    """Rows of a datasets.Dataset: the prompt in TRL's format, the films as our loader reads them,
    and the sample for the reward.
    """
    return [
        {
            "prompt": [{"role": "user", "content": sample.question}],
            "images": [load_image(path) for path in sample.images],
            "sample": packed(sample),
        }
        for sample in samples
    ]


def trl_reward(spec: str, **settings) -> Callable:
    """One of GRPOTrainer's reward_funcs for a --reward such as report=gleu,grounding=soft_f1; None
    for an answer without a score.
    """
    reward = reward_fn(spec, **settings)

    def minigrpo_reward(completions: list, sample: list[str], **_) -> list[float | None]:
        scores = reward(
            [said[-1]["content"] for said in completions], [unpacked(text) for text in sample]
        )
        return [value if ok else None for value, ok in zip(scores.values, scores.valid)]

    return minigrpo_reward


# ---- verl ----------------------------------------------------------------------------------------


def verl_row(sample: Sample, index: int) -> dict:
    """A row of verl's parquet files: `<image>` marks the place of a film."""
    return {
        "data_source": f"minigrpo/{sample.task}",
        "ability": sample.task,
        "prompt": [{"role": "user", "content": "<image>" * len(sample.images) + sample.question}],
        "images": [{"bytes": _png(path)} for path in sample.images],
        "reward_model": {"style": "rule", "ground_truth": sample.answer},
        "extra_info": {"index": index, "sample": packed(sample)},
    }


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict | None = None,
    reward: str = "report=gleu,grounding=soft_f1",
) -> float:
    """verl's custom_reward_function. It needs a number for every answer, so one that cannot be
    scored ends the run: the model would learn from an invented number.
    """
    scores = _reward(reward)([solution_str], [unpacked(extra_info["sample"])])
    if not scores.valid[0]:
        raise ValueError(
            f"the reward {reward} gave no score for an answer to sample"
            f" {unpacked(extra_info['sample']).id}"
        )
    return scores.values[0]


@lru_cache
def _reward(spec: str):
    return reward_fn(spec)


def _png(path: str) -> bytes:
    """As our loader reads it: other loaders turn films of more than 8 bits white, or do not rotate
    them.
    """
    if header(path) in (("L", True), ("RGB", True)):
        return Path(path).read_bytes()
    load_image(path).save(stream := io.BytesIO(), "PNG")
    return stream.getvalue()


@run_errors(lambda: "Nothing was written", "the number of lines of --data")
def main() -> None:
    with input_errors():
        args = parse_args(ElsewhereArguments, __doc__)
        if Path(args.output).exists():
            raise ValueError(f"{args.output} exists already: give another --output")
        if not Path(args.output).parent.is_dir():
            raise ValueError(f"--output {args.output} can't be written: its folder does not exist")
        samples = read_jsonl(args.data, task=args.task)
        need("parquet", "pandas", "pyarrow")
    import pandas

    with aside(Path(args.output)) as part:
        pandas.DataFrame([verl_row(sample, i) for i, sample in enumerate(samples)]).to_parquet(part)
    print(f"{args.output}: {len(samples)} rows")


if __name__ == "__main__":
    main()
