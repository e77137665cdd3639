"""Checkpoints with damaged files: each is refused with one message, or loads and can be used."""

import copy
import json
import os
import random
import time
from collections import Counter

import pytest

from minigrpo.checkpoint import open_checkpoint
from minigrpo.data import Sample
from minigrpo.generate import generate
from minigrpo.policy import Policy
from tests.hub import write_checkpoint

SECONDS = 10
DEEP = json.loads("[" * 200 + "]" * 200)
VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    14,
    16,
    0.5,
    -0.0,
    1e308,
    2**31,
    2**63,
    10**70,
    "",
    "x",
    "é\ud800",
    "\x1b[2J",
    "../../x",
    "/etc/passwd",
    "<|im_end|>",
    "x" * 10_000,
    [],
    [[]],
    [0],
    [1, 2, 3],
    list(range(10_000)),
    {},
    {"a": {}},
    {"x": None},
    DEEP,
    {"": DEEP},
]
KEYS = [
    "auto_map",
    "transformers_weights",
    "attn_implementation",
    "_attn_implementation",
    "quantization_config",
    "rope_scaling",
    "rope_parameters",
    "rope_theta",
    "dtype",
    "torch_dtype",
    "architectures",
    "id2label",
    "num_labels",
    "tokenizer_file",
    "tokenizer_class",
    "added_tokens_decoder",
    "extra_special_tokens",
    "model_max_length",
    "chat_template",
    "min_pixels",
    "max_pixels",
    "size",
    "do_resize",
    "rescale_factor",
    "temperature",
    "do_sample",
    "max_length",
    "eos_token_id",
    "pad_token_id",
    "bos_token",
    "unk_token",
    "image_processor",
    "video_processor",
    "tie_word_embeddings",
    "layer_types",
    "initializer_range",
    "truncation",
    "padding",
    "normalizer",
    "dropout",
    "weight_map",
    "use_cache",
    "sliding_window",
    "pruned_heads",
    "x",
]
TEXTS = [
    "",
    " ",
    "{",
    "[]",
    "null",
    "7",
    '"x"',
    "{}",
    "[" * 100_000,
    '{"a":' * 50_000,
    "9" * 6_000,
    '{"a": NaN}',
    '{"a": 1e999}',
    "\ufeff{}",
    "\x00",
    "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n",
    "{% for a in range(9) %}",
    "{{ 1 / 0 }}",
    "{{ raise_exception('no') }}",
    "{{ messages[0].content }}",
    "{% set x = namespace() %}{{ x.y.z }}",
]


@pytest.fixture(scope="module")
def sources(policy, tmp_path_factory):
    """Folders to damage: one as on the hub, a Thinking one, one of ours, and one with
    processor_config.json alone.
    """
    place = tmp_path_factory.mktemp("sources")
    write_checkpoint(place / "hub")
    write_checkpoint(place / "thinking", "8B", thinking=True)
    policy.save_pretrained(place / "ours")
    policy.save_pretrained(place / "nested")

    def read(name):
        return json.loads((place / "nested" / name).read_text())

    (place / "nested/processor_config.json").write_text(
        json.dumps(
            {
                "image_processor": read("preprocessor_config.json"),
                "video_processor": read("video_preprocessor_config.json"),
                "processor_class": "Qwen3VLProcessor",
            }
        )
    )
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (place / "nested" / name).unlink()
    return {
        folder.name: {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in place.iterdir()
    }


def objects(value):
    """Every list and object inside, itself included."""
    yield value
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list) and inner:
            yield from objects(inner)


def damage(files: dict[str, bytes], chance: random.Random) -> None:
    """One change to one file, most of them to a value of JSON."""
    name = chance.choice([name for name in sorted(files) if not name.endswith(".safetensors")])
    way = chance.random()
    if name.endswith(".json") and way < 0.8:
        try:
            content = json.loads(files[name])
            place = chance.choice([x for x in objects(content) if isinstance(x, dict | list) and x])
        except (ValueError, AttributeError, IndexError, TypeError, RecursionError):
            return  # damaged before
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = chance.choice(keys)
        if way < 0.1:
            del place[key]
        elif way < 0.3 and isinstance(place, dict):
            place[chance.choice(KEYS)] = copy.deepcopy(chance.choice(VALUES))
        elif way < 0.4 and isinstance(place, dict):
            place[key] = place[chance.choice(keys)]
        else:
            place[key] = copy.deepcopy(chance.choice(VALUES))
        files[name] = json.dumps(content).encode()
    elif way < 0.85:
        files[name] = files[name][: chance.randrange(len(files[name]) + 1)]
    elif way < 0.9:
        files[name] = chance.choice(TEXTS).encode("utf-8", "surrogatepass")
    elif way < 0.93:
        place = chance.randrange(len(files[name]) + 1)
        files[name] = (
            files[name][:place] + chance.randbytes(chance.choice([1, 100])) + files[name][place:]
        )
    elif way < 0.96:
        start, end = sorted(chance.randrange(len(files[name]) + 1) for _ in range(2))
        files[name] = files[name][:start] + files[name][end:]
    elif way < 0.98:
        files[name] = files[chance.choice(sorted(files))]
    else:
        del files[name]


def outcomes(sources, folder, numbers, use) -> tuple[Counter, float]:
    """How often `use(folder)` refused which file, or went well, for the damaged checkpoints of
    these numbers; and the longest time.
    """
    kinds, longest = Counter(), 0.0
    for number in numbers:
        chance = random.Random(number)
        files = dict(chance.choice(list(sources.values())))
        for _ in range(chance.choice([1, 1, 1, 2, 3])):
            damage(files, chance)
        place = folder / str(number)
        place.mkdir()
        for name, content in files.items():
            (place / name).write_bytes(content)
        began = time.perf_counter()
        try:
            use(str(place))
            kinds["clean"] += 1
        except ValueError as error:
            assert str(place) in str(error) and len(str(error)) < 3000, f"{number}: {error}"
            names = [name for name in (*sources["hub"], *sources["nested"]) if name in str(error)]
            kinds[names[0] if names else "the folder"] += 1
        except BaseException as error:
            raise AssertionError(f"{number}: {type(error).__name__}: {error}") from error
        seconds = time.perf_counter() - began
        assert seconds < SECONDS, f"{number}: {seconds:.1f} s"
        longest = max(longest, seconds)
        for path in place.iterdir():
            os.remove(path)
    return kinds, longest


def whole(folder: str) -> None:
    policy = Policy.from_pretrained(folder, max_pixels=64 * 64)
    prompts = policy.encode([Sample("a", None, "report", "What is seen?", "")])
    assert generate(policy, prompts, max_new_tokens=2, seed=0).texts


def test_damaged_files_through_the_checker(sources, tmp_path):
    kinds, _ = outcomes(sources, tmp_path, range(100), open_checkpoint)
    assert kinds["clean"] > 5 and len(kinds) > 5


@pytest.mark.slow
def test_ten_thousand_damaged_checkpoints_through_the_checker(sources, tmp_path):
    kinds, longest = outcomes(sources, tmp_path, range(10_000), open_checkpoint)
    print(dict(kinds.most_common()), f"longest {longest:.2f} s")
    assert kinds["clean"] > 500 and len(kinds) > 8


@pytest.mark.slow
def test_three_hundred_damaged_checkpoints_through_a_whole_load(sources, tmp_path):
    kinds, longest = outcomes(sources, tmp_path, range(20_000, 20_300), whole)
    print(dict(kinds.most_common()), f"longest {longest:.2f} s")
    assert kinds["clean"] > 15
