"""Our data and rewards, as TRL and verl call them; with TRL installed (make test-peers), its
trainer takes a step on them.
"""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minigrpo.data import load_image, read_jsonl
from minigrpo.elsewhere import compute_score, packed, trl_reward, unpacked, verl_row
from minigrpo.rewards import reward_fn
from tests.processes import python

ROOT = Path(__file__).parent.parent
SPEC = "report=gleu,grounding=soft_f1"


@pytest.fixture(scope="module")
def answered(samples):
    """Samples of both tasks, each with an answer that is half right."""
    chosen = [s for s in samples if s.task in ("report", "grounding")][:8]
    return chosen, [
        s.answer[: len(s.answer) * 2 // 3]
        if s.task == "report"
        else s.answer + " and [0.1, 0.1, 0.2, 0.2]"
        for s in chosen
    ]


def test_the_rewards_are_ours(answered):
    chosen, answers = answered
    ours = reward_fn(SPEC)(answers, chosen).values
    assert len(set(ours)) > 3
    asked = dict(
        completions=[[{"role": "assistant", "content": a}] for a in answers],
        sample=[packed(s) for s in chosen],
        prompts=[None] * 8,
    )
    assert trl_reward(SPEC)(**asked, trainer_state=None) == ours
    rows = [verl_row(s, i) for i, s in enumerate(chosen)]
    assert [
        compute_score(
            row["data_source"],
            answer,
            row["reward_model"]["ground_truth"],
            row["extra_info"],
            reward=SPEC,
        )
        for row, answer in zip(rows, answers)
    ] == ours


def flaky(answers, samples):
    return [None if "x" in answer else 1.0 for answer in answers]


def test_an_answer_without_a_score_is_masked_or_ends_the_run(samples):
    spec = "tests.test_elsewhere:flaky"
    assert trl_reward(spec)([[{"content": "x"}], [{"content": "y"}]], [packed(samples[0])] * 2) == [
        None,
        1.0,
    ]
    with pytest.raises(ValueError, match="gave no score"):
        compute_score("minigrpo/report", "x", "", {"sample": packed(samples[0])}, reward=spec)


def test_verl_rows_hold_the_film_as_we_see_it(samples, tmp_path):
    """Bug to guard against: a 16-bit film that another loader clips to white."""
    row = verl_row(samples[0], 3)
    assert (
        row["prompt"][0]["content"] == "<image>" + samples[0].question
        and unpacked(row["extra_info"]["sample"]) == samples[0]
    )
    Image.fromarray((np.arange(64 * 64).reshape(64, 64) * 15).astype(np.uint16)).save(
        tmp_path / "deep.png"
    )
    deep = type(samples[0])(**{**vars(samples[0]), "image": str(tmp_path / "deep.png")})
    for sample in (samples[0], deep):
        (film,) = verl_row(sample, 0)["images"]
        shown = np.asarray(Image.open(io.BytesIO(film["bytes"])).convert("RGB"))
        assert (shown == np.asarray(load_image(sample.image))).all() and shown.mean() < 250


def test_the_parquet_file(phantom, tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    python(
        "-m",
        "minigrpo.elsewhere",
        "--data",
        phantom / "test.jsonl",
        "--output",
        tmp_path / "test.parquet",
    )
    rows, samples = (
        pandas.read_parquet(tmp_path / "test.parquet"),
        read_jsonl(phantom / "test.jsonl"),
    )
    assert [unpacked(extra["sample"]) for extra in rows["extra_info"]] == samples
    assert compute_score("", samples[0].answer, "", rows["extra_info"][0]) == pytest.approx(1.0)


@pytest.mark.peers
def test_trl_takes_a_step_with_our_rewards(policy, samples, tmp_path, monkeypatch):
    """elsewhere/trl_grpo.py as it is, but for sizes and for vLLM; the rewards that it logs are
    those of our functions.
    """
    pytest.importorskip("trl")
    from benchmarks.sides import processor_of

    monkeypatch.syspath_prepend(ROOT / "elsewhere")
    import trl_grpo

    policy.save_pretrained(tmp_path / "model")
    seen, make = [], trl_grpo.trl_reward

    def spied(spec):
        reward = make(spec)

        def minigrpo_reward(**given):
            seen.append(
                (given["sample"], [c[-1]["content"] for c in given["completions"]], reward(**given))
            )
            return seen[-1][2]

        return minigrpo_reward

    monkeypatch.setattr(trl_grpo, "trl_reward", spied)
    trainer = trl_grpo.make_trainer(
        str(tmp_path / "model"),
        [s for s in samples if s.task == "report"][:4],
        str(tmp_path / "out"),
        processing_class=processor_of(policy),
        per_device_train_batch_size=4,
        num_generations=4,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        max_completion_length=8,
        use_cpu=True,
        bf16=False,
        max_steps=1,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    texts, answers, rewards = seen[0]
    assert (
        rewards == reward_fn(SPEC)(answers, [unpacked(text) for text in texts]).values
        and len(rewards) == 4
    )
    assert trainer.state.log_history[0]["reward"] == pytest.approx(sum(rewards) / 4, abs=1e-6)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))
