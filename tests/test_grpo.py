"""The step is what it says: short, and by hand with the plain node the very weights of the
program.
"""

import ast
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_grpo
from minigrpo import grpo
from minigrpo.data import batch_at, read_jsonl
from minigrpo.policy import Policy
from minigrpo.rewards import reward_fn
from minigrpo.run.args import parse_args
from tests import processes

ROOT = Path(__file__).parent.parent


def lines_of(path, name):
    """Lines of a function, without blank ones."""
    text = (ROOT / path).read_text()
    (node,) = [n for n in ast.walk(ast.parse(text)) if getattr(n, "name", None) == name]
    return sum(bool(line.strip()) for line in text.splitlines()[node.lineno - 1 : node.end_lineno])


def test_the_step_fits_on_a_screen():
    assert lines_of("minigrpo/grpo.py", "grpo_step") <= 70
    assert lines_of("minigrpo/sft.py", "sft_step") <= 70


def foreign_names(path):
    """The names of other modules that a file uses: imported ones, and `math.nan` of `math`."""
    tree = ast.parse((ROOT / path).read_text())
    names = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    modules = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} & names - modules
    dotted = {
        f"{n.value.id}.{n.attr}"
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in modules
    }
    return used | dotted


@pytest.mark.parametrize("program", ["train_grpo.py", "train_sft.py", "evaluate.py"])
def test_a_program_is_read_without_many_other_files(program):
    assert lines_of(program, "main") <= 90
    assert len(foreign_names(program)) <= 30


def test_no_line_is_wider_than_100_columns():
    files = [*ROOT.glob("*.py"), *ROOT.glob("minigrpo/**/*.py"), *ROOT.glob("tests/*.py")]
    wide = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 100
    ]
    assert not wide


def test_by_hand_it_is_the_program(trained, phantom, tmp_path):
    """Two steps of two updates with KL, bit for bit."""
    model = trained / "sft/final"
    words = [
        "--model",
        model,
        "--train_data",
        phantom / "train.jsonl",
        "--output_dir",
        tmp_path / "run",
        "--max_steps",
        2,
        "--prompts_per_step",
        4,
        "--group_size",
        4,
        "--updates_per_rollout",
        2,
        "--max_new_tokens",
        8,
        "--learning_rate",
        1e-3,
        "--kl_coef",
        0.1,
        "--reward",
        "dice",
        "--task",
        "grounding",
    ]
    processes.python("train_grpo.py", *words)
    args = parse_args(train_grpo.GrpoArguments, "", [str(word) for word in words])
    torch.manual_seed(0)
    policy = Policy.from_pretrained(args.model)
    reference = Policy.from_pretrained(args.model).freeze()
    reward = reward_fn(args.reward, box_scale=args.box_scale)
    train = read_jsonl(args.train_data, task=args.task)
    (optimizer,) = train_grpo.grpo_optimizers(policy, args)
    for step in range(2):
        samples = batch_at(train, step, args.prompts_per_step, args.seed)
        seed = args.seed * 1_000_003 + step
        grpo.grpo_step(
            policy,
            reference,
            optimizer,
            lambda: grpo.collect(policy, samples, reward, args, seed),
            args,
        )
    ours, theirs = policy.model.state_dict(), load_file(tmp_path / "run/final/model.safetensors")
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    start = load_file(Path(model) / "model.safetensors")
    assert any(not torch.equal(start[name], value) for name, value in theirs.items())


def test_the_ten_lines_of_the_readme():
    text = (ROOT / "README.md").read_text().split("## In ten lines")[1]
    names = {}
    exec(text.split("```python")[1].split("```")[0], names)
    weights = [p for p in names["policy"].parameters() if p.grad is not None]
    assert any(p.grad.abs().sum() > 0 for p in weights) or not names["advantage"].any()
    assert names["advantage"].abs().sum() > 0, "some answer has an a"
    assert (
        abs(names["loss"].item()) < 1e-5 and names["logprob"].shape == names["rollout"].mask.shape
    )
