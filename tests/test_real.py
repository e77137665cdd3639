"""Real films through the same code. MINIGRPO_REAL_DATA names a folder with train.jsonl and
test.jsonl; no film is ours to ship.
"""

import os
from pathlib import Path

import pytest

from minigrpo.data import read_jsonl
from minigrpo.metrics import constant_boxes, evaluate_answers
from tests.processes import python
from tests.test_programs import weights

DATA = os.environ.get("MINIGRPO_REAL_DATA")
pytestmark = pytest.mark.skipif(
    not DATA, reason="MINIGRPO_REAL_DATA is not set: it names a folder of real films"
)


def test_real_films_read_and_train(policy, tmp_path):
    train = Path(DATA) / "train.jsonl"
    policy.save_pretrained(tmp_path / "tiny")
    python(
        "train_sft.py",
        "--model",
        tmp_path / "tiny",
        "--train_data",
        train,
        "--output_dir",
        tmp_path / "sft",
        "--max_steps",
        2,
        "--batch_size",
        4,
    )
    assert weights(tmp_path / "sft")


def test_constant_box_is_a_strong_baseline():
    """Lungs lie alike in most chests: what a model adds must be measured against this."""
    train, test = (
        read_jsonl(Path(DATA) / f"{name}.jsonl", task="grounding", verify_images=False)
        for name in ("train", "test")
    )
    found = evaluate_answers(test, constant_boxes(train, test))["grounding"]["soft_f1"]["mean"]
    assert 0.74 < found < 0.78
