"""The benchmarks run, on a minute shape and without TRL, and their page holds what they
measured.
"""

import pytest
import torch

from benchmarks import growth, logprob, lora, step
from benchmarks.common import Shape, random_policy
from benchmarks.table import PAGE, page_with_tables

MINUTE = Shape(image=4, text=20, answer=5, prompts=2, group=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    policy, folder = random_policy(width=64, layers=3, vocab=512), tmp_path_factory.mktemp("bench")
    policy.save_pretrained(folder)
    return policy, folder


def test_step(saved, monkeypatch):
    """`measure` compares loss and gradients itself; here TRL is left out."""
    monkeypatch.setattr(step, "trl", None)
    _, folder = saved
    found = step.measure(MINUTE, folder, repeats=1)
    assert found["difference"]["hf"]["loss"] < 1e-5 and found["difference"]["hf"]["gradient"] < 1e-4
    assert (
        found.keys() >= {"rollout_vs_hf", "score_vs_hf", "limits"}
        and "trl" not in found["seconds"]["step"]
    )
    # in this process, which has room left from other tests, it may even be below 0
    assert isinstance(step.peak_of("ours", MINUTE, folder), int)


@pytest.mark.peers
def test_step_beside_trl(saved):
    pytest.importorskip("trl", reason="TRL is not installed: `make test-peers` installs it")
    _, folder = saved
    found = step.measure(MINUTE, folder, repeats=1)
    assert (
        found["difference"]["trl"]["loss"] < 1e-5 and found["difference"]["trl"]["gradient"] < 1e-4
    )
    assert found.keys() >= {"rollout_vs_trl", "score_vs_trl", "step_vs_trl"} and found[
        "limits"
    ].keys() >= {"step_vs_trl"}


def test_limits_by_hand(saved):
    """A text prompt of one token and answers of one: attention sees 1 key, and the answers are
    never read.
    """
    policy, _ = saved
    weights = sum(p.numel() for p in policy.language_model.layers.parameters() if p.dim() > 1)
    found = step.multiplications(policy, [], prompt=1, answer=1)
    assert found == {"image": 0, "prompt": weights + 2 * 3 * 64, "answer": 0, "head": 512 * 64}
    alone = step.limits(Shape(image=4, text=20, answer=5, group=1), policy)
    assert set(alone.values()) == {1.0}, "a group of one shares nothing"
    many = step.limits(Shape(image=441, text=30, answer=1, group=8), policy)
    assert 6 < many["score_vs_trl"] < 8 and many["rollout_vs_hf"] < many["rollout_vs_trl"]


def test_logprob_ways_agree():
    assert logprob.measure(10, 40, repeats=1)["seconds"].keys() >= {"ours", "naive", "checkpoint"}
    tensors = logprob.inputs(10, 40)
    grads = {}
    for way in logprob.WAYS:
        logprob.forward_backward(way, *tensors)
        grads[way] = tensors[1].grad
        torch.testing.assert_close(grads[way], grads["ours"], atol=1e-5, rtol=0)


def test_growth(saved):
    policy, _ = saved
    found = growth.measure(
        policy, policy.model, Shape(image=0, text=20, answer=5, prompts=1, group=2), repeats=1
    )
    assert found["score"].keys() == {"ours", "hf"}


@pytest.mark.slow
def test_lora(saved, phantom, tmp_path, monkeypatch):
    """In processes of their own, as the benchmark runs them: so many bytes cannot be this
    process's.
    """
    policy, _ = saved
    policy.save_pretrained(tmp_path / "model")
    (tmp_path / "films").symlink_to(phantom / "films")
    (tmp_path / "train.jsonl").write_text((phantom / "train.jsonl").read_text())
    monkeypatch.setattr(
        lora, "RUNS", {name: lora.RUNS[name] for name in ("all weights", "LoRA, rank 16")}
    )
    found = lora.measure(tmp_path)
    assert 0 < found["LoRA, rank 16"]["checkpoint_bytes"] < found["all weights"]["checkpoint_bytes"]
    assert all(run["peak_bytes"] > 1e8 for run in found.values())


def test_the_page_holds_what_was_measured():
    assert page_with_tables(PAGE.read_text()) == PAGE.read_text(), "python -m benchmarks.table"
