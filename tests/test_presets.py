"""The papers' settings stand in one place: what files of configs/ and the defaults say is the
same.
"""

import inspect

import pytest
import torch
import yaml

from minigrpo.loss import PRESETS, group_advantages, grpo_loss
from tests.test_grpo import ROOT
from train_grpo import GrpoArguments

KNOWN = inspect.signature(grpo_loss).parameters


def settings_of(args) -> dict:
    """Of the loss, without what the function has as its default anyway."""
    return {
        name: value for name, value in args.loss_settings().items() if value != KNOWN[name].default
    }


@pytest.mark.parametrize("name", ["dapo", "dr_grpo", "gspo", "cispo"])
def test_files_say_the_same(name):
    content = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
    args = GrpoArguments(model="m", train_data="t", output_dir="o", **content)
    expected = {k: v for k, v in PRESETS[name].items() if v != KNOWN[k].default}
    found = {k: v for k, v in settings_of(args).items() if k not in ("max_tokens", "rollout_cap")}
    if name == "cispo":  # which has no clip
        found = {k: v for k, v in found.items() if not k.startswith(("clip", "dual"))}
    assert found == expected


def test_the_trainer_s_defaults_are_radvlm():
    args = GrpoArguments(model="m", train_data="t", output_dir="o")
    assert {name: args.loss_settings()[name] for name in PRESETS["radvlm"]} == PRESETS["radvlm"]


@pytest.mark.parametrize("name", PRESETS)
def test_each_is_taken(name):
    torch.manual_seed(0)
    logprob = torch.randn(4, 5, requires_grad=True)
    advantage = group_advantages(torch.randn(1, 4)).view(-1)
    loss, _ = grpo_loss(
        logprob,
        logprob.detach() + 0.1,
        advantage,
        torch.ones(4, 5),
        ref_logprob=torch.randn(4, 5),
        max_tokens=5,
        **PRESETS[name],
    )
    loss.backward()
    assert loss.isfinite() and logprob.grad.abs().sum() > 0
