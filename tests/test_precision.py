"""What makes one CPU a hundred times as slow as another: half precision without instructions for
it, threads that spin.

On a CPU nothing computes in half precision unless asked.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import evaluate
import train_grpo
import train_sft
from minigrpo.muon import Muon, orthogonalize
from minigrpo.run import evaluation, loop, roofline

ROOT = Path(__file__).parent.parent
HALF = (torch.bfloat16, torch.float16)


class HalfPrecision(TorchDispatchMode):
    """Collects the names of operations that read or write a tensor in half precision."""

    def __init__(self):
        super().__init__()
        self.operations, self.count = set(), 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.count += 1
        if any(
            isinstance(leaf, torch.Tensor) and leaf.dtype in HALF
            for leaf in tree_leaves([args, kwargs, result])
        ):
            self.operations.add(str(operation))
        return result


def operations_of(monkeypatch, program, *words):
    """(number of operations, those in half precision) of a program."""
    monkeypatch.setattr("sys.argv", [program.__name__ + ".py", *map(str, words)])
    monkeypatch.setattr(loop, "draw_curves", lambda folder: None)
    monkeypatch.setattr(evaluation, "draw_samples", lambda *_, **__: None)
    # modes are per thread
    monkeypatch.setattr(
        train_sft, "prefetch", lambda make, steps: ((step, make(step)) for step in steps)
    )
    with HalfPrecision() as seen:
        program.main()
    return seen.count, seen.operations


def test_no_program_computes_in_half_precision_on_a_cpu(phantom, tmp_path, monkeypatch):
    """Bug: torch's Muon iterates in bf16, and a step of SFT took 3.3 s instead of 0.2 on a CPU with
    AVX2 alone.
    """
    data, counts = ["--train_data", phantom / "train.jsonl"], {}
    counts["sft"] = operations_of(
        monkeypatch,
        train_sft,
        "--model",
        "tiny",
        *data,
        "--output_dir",
        tmp_path / "sft",
        "--max_steps",
        1,
        "--batch_size",
        2,
        "--optimizer",
        "muon",
        "--max_pixels",
        96 * 96,
        "--device",
        "cpu",
    )
    model = tmp_path / "sft/final"
    counts["grpo"] = operations_of(
        monkeypatch,
        train_grpo,
        "--model",
        model,
        *data,
        "--output_dir",
        tmp_path / "grpo",
        "--max_steps",
        1,
        "--prompts_per_step",
        2,
        "--updates_per_rollout",
        2,
        "--group_size",
        2,
        "--max_new_tokens",
        4,
        "--rollout_cap",
        2,
        "--device",
        "cpu",
    )
    counts["evaluate"] = operations_of(
        monkeypatch,
        evaluate,
        "--model",
        model,
        "--data",
        phantom / "test.jsonl",
        "--output_dir",
        tmp_path / "test",
        "--max_new_tokens",
        4,
        "--device",
        "cpu",
    )
    assert all(count > 100 for count, _ in counts.values())
    assert {name: half for name, (_, half) in counts.items()} == {
        "sft": set(),
        "grpo": set(),
        "evaluate": set(),
    }


def test_with_bf16_the_mode_sees_it(phantom, tmp_path, monkeypatch, capsys):
    """So that the test above can fail; and --bf16 says once what it costs here."""
    monkeypatch.setattr(loop, "note_on_bf16", lambda device: f"costs much on {device}")
    _, half = operations_of(
        monkeypatch,
        train_sft,
        "--model",
        "tiny",
        "--train_data",
        phantom / "train.jsonl",
        "--output_dir",
        tmp_path / "sft",
        "--max_steps",
        1,
        "--batch_size",
        1,
        "--max_pixels",
        96 * 96,
        "--device",
        "cpu",
        "--bf16",
    )
    assert half and json.loads((tmp_path / "sft/metrics.jsonl").read_text())["loss"] > 0
    assert capsys.readouterr().out.count("costs much on cpu") == 1


@pytest.mark.parametrize(
    "slower, expected", [(30.0, "takes 30 times as long as in fp32"), (0.5, None)]
)
def test_the_cost_of_bf16_is_measured(monkeypatch, slower, expected):
    times = iter([0.01, 0.01 * slower])
    monkeypatch.setattr(roofline, "_fastest", lambda *_, **__: next(times))
    note = roofline.note_on_bf16("cpu")
    assert expected in note if expected else note is None
    assert roofline.note_on_bf16("cuda:0") is None


def test_the_cost_of_bf16_as_it_is_here():
    assert (note := roofline.note_on_bf16("cpu")) is None or "times as long" in note


@pytest.mark.parametrize("shape", [(48, 48), (20, 64), (64, 20)])
def test_orthogonalize(shape):
    """Singular vectors stay, singular values come near 1; in fp32, and of zeros nothing."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrix)
    values = torch.linalg.svdvals(result)
    assert result.dtype == torch.float32 and 0.6 < values.min() and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    rotated = u.T @ result @ v.T
    torch.testing.assert_close(rotated, torch.diag(rotated.diagonal()), atol=1e-5, rtol=0)
    assert not orthogonalize(torch.zeros(shape)).any()


def test_muon_is_torchs_but_for_the_precision():
    """Weights after five steps: torch's iteration rounds to bf16, so they agree to a few hundredths
    of a step.
    """
    start = [
        torch.randn(shape, generator=torch.Generator().manual_seed(1))
        for shape in ((32, 16), (16, 48))
    ]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    optimizers = [
        Muon(ours, lr=1e-2, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, w in zip(ours, theirs, start):
        moved = (b.detach() - w).norm()
        assert (a - b).norm() < 0.03 * moved and moved > 0.01
    assert set(optimizers[0].state[ours[0]]) == set(optimizers[1].state[theirs[0]]), (
        "checkpoints keep their names"
    )


def test_threads_that_wait_soon_sleep():
    """Bug: they spun, and beside two busy programs on two cores a step took ten times as long.
    OpenMP reads the policy when torch is loaded, so every program must import minigrpo before it;
    what OpenMP took, it says itself.
    """
    for program in ("train_sft.py", "train_grpo.py", "evaluate.py"):
        imports = re.findall(
            r"^(?:import|from) (minigrpo|torch)", (ROOT / program).read_text(), re.M
        )
        assert imports[0] == "minigrpo", program
    environment = {**os.environ, "OMP_DISPLAY_ENV": "VERBOSE"}
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", "import minigrpo, torch"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert "GOMP_SPINCOUNT = '10000'" in done.stderr
