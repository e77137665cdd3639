"""What the tests share: a handful of phantom films, one random tiny Qwen3-VL that has seen their
text, small runs.
"""

import pytest
import torch

from minigrpo.data import read_jsonl
from minigrpo.data.phantom import Arguments, write_phantom
from minigrpo.tiny import tiny_policy
from tests.processes import grpo, python, sft

# Files of ten seconds and more. A worker that took one of them last would still be busy long after
# the other had finished.
FIRST = [
    "programs",
    "study",
    "plan",
    "nothing_lost",
    "distributed",
    "clinical",
    "shard",
    "lora",
    "train_grpo",
    "checkpoint",
]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in FIRST)


@pytest.fixture(scope="session")
def phantom(tmp_path_factory):
    """Folder with train.jsonl (12 films) and test.jsonl (4 films)."""
    folder = tmp_path_factory.mktemp("phantom")
    write_phantom(folder, Arguments(train=12, test=4, seed=0, size=192))
    return folder


@pytest.fixture(scope="session")
def samples(phantom):
    return read_jsonl(phantom / "train.jsonl")


@pytest.fixture(scope="session")
def policy(samples):
    torch.manual_seed(0)
    return tiny_policy(samples, seed=0, pixels=96 * 96)


@pytest.fixture(scope="session")
def trained(phantom, tmp_path_factory):
    """Folder with an SFT run and a GRPO run on top of it, four and three steps long."""
    out = tmp_path_factory.mktemp("runs")
    python(*sft(phantom, out / "sft"), curves=True)
    python(*grpo(phantom, out / "sft/final", out / "grpo"), curves=True)
    return out


@pytest.fixture(scope="session")
def mixed(samples, tmp_path_factory):
    """Prompts that differ in everything: one image, an image of other shape, two images, none."""
    from dataclasses import replace

    from PIL import Image

    wide = tmp_path_factory.mktemp("images") / "wide.png"
    Image.radial_gradient("L").resize((200, 90)).save(wide)
    first, second, third, fourth = samples[:4]
    return [
        first,
        replace(second, image=str(wide)),
        replace(third, image=[third.image, str(wide)], question="Compare both."),
        replace(
            fourth,
            image=None,
            question="What does an effusion look like on a film? Answer in one sentence, please.",
        ),
    ]
