"""The papers' settings stand in one place: what files of configs/ and the defaults say is the
same.
"""

import inspect

import pytest
import torch
import yaml

from minigrpo.loss import PRESETS, group_advantages, grpo_loss
from minigrpo.surrogates import surrogate_settings
from tests.test_grpo import ROOT
from train_grpo import GrpoArguments

KNOWN = {name: p.default for name, p in inspect.signature(grpo_loss).parameters.items()}


def settings_of(settings: dict) -> dict:
    """Of the loss, without what the function and the surrogate have as their defaults anyway."""
    known = KNOWN | surrogate_settings(settings.get("surrogate", "clip"))
    return {k: v for k, v in settings.items() if v != known[k] and k not in BESIDE}


BESIDE = ("max_tokens", "rollout_cap")


@pytest.mark.parametrize("name", ["dapo", "dr_grpo", "gspo", "cispo", "dppo", "sapo"])
def test_files_say_the_same(name):
    content = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
    args = GrpoArguments(model="m", train_data="t", output_dir="o", **content)
    assert settings_of(args.loss_settings()) == settings_of(PRESETS[name])


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
        rollout_logprob=logprob.detach(),
        max_tokens=5,
        **PRESETS[name],
    )
    loss.backward()
    assert loss.isfinite() and logprob.grad.abs().sum() > 0
