"""Checkpoints laid out like the hub's, of every size and kind, through loading, training's view of
them, and saving.
"""

import json
import math
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.utils import is_torchvision_available

from minigrpo.checkpoint import read_config
from minigrpo.data import Sample, load_image, split_thinking
from minigrpo.generate import generate
from minigrpo.policy import Policy
from minigrpo.rewards import reward_fn
from tests.hub import SIZES, cache_as_downloaded, config_json, write_checkpoint

PARAMETERS = {"2B": 2.13e9, "4B": 4.44e9, "8B": 8.77e9, "32B": 33.4e9}  # as the hub shows them


@pytest.fixture(
    scope="module",
    params=[("2B", False), ("4B", True), ("8B", False), ("32B", True)],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def published(request, tmp_path_factory):
    """(folder, size, thinking)"""
    size, thinking = request.param
    return (
        write_checkpoint(tmp_path_factory.mktemp(size) / "hub", size, thinking=thinking),
        size,
        thinking,
    )


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Films of four shapes, one far larger than the budget and one far smaller than a token."""
    folder = tmp_path_factory.mktemp("films")
    for name, size in (
        ("large", (700, 600)),
        ("wide", (300, 90)),
        ("small", (20, 14)),
        ("plain", (256, 256)),
    ):
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{name}.png")
    return {path.stem: str(path) for path in folder.glob("*.png")}


@pytest.mark.parametrize("size", SIZES)
def test_the_published_configs_make_models_of_the_published_size(size, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_json(size)))
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(read_config(str(tmp_path)))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(PARAMETERS[size], rel=0.01)
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == SIZES[size][
        "tied"
    ]


def test_loads_as_published_and_saves_what_loads_bit_for_bit(published, films, tmp_path):
    folder, size, thinking = published
    assert (
        len(list(folder.glob("*.safetensors"))) > 1
        and (folder / "model.safetensors.index.json").exists()
    )
    policy = Policy.from_pretrained(str(folder), max_pixels=96 * 96)
    tied = policy.head is policy.language_model.embed_tokens.weight
    assert tied == SIZES[size]["tied"] and {p.dtype for p in policy.model.parameters()} == {
        torch.float32
    }
    assert policy.end_ids == sorted(
        policy.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    )
    assert policy.template_opens_think == thinking
    # One step, so that it is not the file it came from; then plain transformers on what we saved.
    prompts = policy.encode([Sample("a", films["plain"], "report", "What is seen?", "")])
    tokens, mask = policy.encode_answers(["The heart is normal."])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    (-policy.score(prompts, tokens, mask).sum()).backward()
    optimizer.step()
    policy.save_pretrained(tmp_path / "saved")
    plain = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    inputs = dict(
        input_ids=prompts.ids,
        pixel_values=prompts.pixels,
        image_grid_thw=prompts.grids,
        mm_token_type_ids=(prompts.ids == policy.model.config.image_token_id).int(),
    )
    with torch.no_grad():
        # ours is one matrix product, which rounds otherwise than their convolution
        del policy.visual.patch_embed.forward
        assert torch.equal(plain(**inputs).logits, policy.model(**inputs).logits)
        again, policy = Policy.from_pretrained(str(tmp_path / "saved")), policy.to("cpu")
        assert torch.equal(again.score(prompts, tokens, mask), policy.score(prompts, tokens, mask))
    assert (
        again.end_ids,
        again.template_opens_think,
        again.image_processor.size["longest_edge"],
    ) == (policy.end_ids, policy.template_opens_think, 96 * 96)

    # The files that vLLM and AutoProcessor open, with what the checkpoint said in them.
    def read(folder, name):
        return json.loads((folder / name).read_text())

    assert read(tmp_path / "saved", "video_preprocessor_config.json") == read(
        folder, "video_preprocessor_config.json"
    )
    assert (
        read(tmp_path / "saved", "preprocessor_config.json")["processor_class"]
        == "Qwen3VLProcessor"
    )
    generation = read(tmp_path / "saved", "generation_config.json")
    assert (generation["top_k"], generation["eos_token_id"]) == (
        20,
        read(folder, "generation_config.json")["eos_token_id"],
    )
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template
        == policy.tokenizer.chat_template
    )


def processor_of(folder, monkeypatch) -> Qwen3VLProcessor:
    """AutoProcessor over the folder. Its video processor needs torchvision: where that is missing,
    only that one is left out, after it has been seen to be the right class.
    """
    if not is_torchvision_available():
        from transformers.models.auto import video_processing_auto as auto

        asked = []

        def made(_, name, **kwargs):
            asked.append(
                json.loads((folder / "video_preprocessor_config.json").read_text())[
                    "video_processor_type"
                ]
            )

        monkeypatch.setattr(auto.AutoVideoProcessor, "from_pretrained", classmethod(made))
        monkeypatch.setattr(
            Qwen3VLProcessor,
            "check_argument_for_proper_class",
            lambda self, name, value: type(value),
        )
    found = AutoProcessor.from_pretrained(folder)
    found.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    assert type(found) is Qwen3VLProcessor and (
        is_torchvision_available() or asked == ["Qwen3VLVideoProcessor"]
    )
    return found


def test_prompts_are_those_of_transformers_own_processor(published, films, tmp_path, monkeypatch):
    """Token for token, pixel for pixel: images of all shapes, none, and two."""
    folder, _, _ = published
    policy = Policy.from_pretrained(str(folder), max_pixels=160 * 160)
    policy.save_pretrained(tmp_path / "saved")
    processor = processor_of(tmp_path / "saved", monkeypatch)
    samples = [
        Sample(name, film, "report", f"What is seen on the {name} film? <think> é 1.25", "")
        for name, film in films.items()
    ]
    samples += [
        replace(samples[0], image=[films["wide"], films["plain"]]),
        replace(samples[0], image=None),
    ]
    for sample in samples:
        content = [{"type": "image", "image": load_image(path)} for path in sample.images] + [
            {"type": "text", "text": sample.question}
        ]
        peer = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        ours = policy.encode([sample])
        assert ours.ids.tolist() == peer["input_ids"].tolist()
        if sample.images:
            assert torch.equal(ours.pixels, peer["pixel_values"]) and torch.equal(
                ours.grids, peer["image_grid_thw"]
            )
            assert (ours.grids.prod(1) * 256 <= 160 * 160).all()


@pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision")
@pytest.mark.parametrize("size", [(700, 600), (300, 90), (60, 50)])
def test_pixels_are_close_to_torchvisions(size, tmp_path):
    """Another resampling code, which rounds otherwise: one of 255 steps at most. (White noise
    differs by up to 21: PIL cuts off what overshoots black and white between its two passes,
    torchvision after both.)
    """
    from transformers import Qwen2VLImageProcessor

    Image.radial_gradient("L").resize(size).convert("RGB").save(tmp_path / "film.png")
    policy = Policy.from_pretrained(str(write_checkpoint(tmp_path / "hub")), max_pixels=160 * 160)
    policy.save_pretrained(tmp_path / "saved")
    ours = policy.encode([Sample("a", str(tmp_path / "film.png"), "report", "?", "")])
    peer = Qwen2VLImageProcessor.from_pretrained(tmp_path / "saved")(
        images=[load_image(tmp_path / "film.png")], return_tensors="pt"
    )
    assert torch.equal(ours.grids, peer["image_grid_thw"])
    steps = (ours.pixels - peer["pixel_values"]).abs() * 127.5
    assert steps.max() < 1.01 and steps.mean() < 0.02


def test_a_thinking_checkpoint_is_read_as_one(tmp_path):
    """Its chat template opens <think>: answers are read from inside it, and SFT teaches to close
    it.
    """
    policy = Policy.from_pretrained(str(write_checkpoint(tmp_path / "hub", "2B", thinking=True)))
    sample = Sample("a", None, "report", "What is seen?", "The heart is normal.")
    assert policy.tokenizer.decode(policy.encode([sample]).ids[0]).endswith(
        "<|im_start|>assistant\n<think>\n"
    )
    reward = reward_fn("gleu", template_opens_think=policy.template_opens_think)
    assert reward(
        ["It is normal.\n</think>\n\nThe heart is normal.", "The heart is normal."], [sample] * 2
    ).values == [1.0, 0.0]
    talk = replace(
        sample,
        task="conversation",
        turns=[["What is seen?", "The heart."], ["And?", "<think>\nLungs.\n</think>\n\nClear."]],
    )
    prompts, blocks = policy.encode_turns([[sample, talk]])
    taught = [
        policy.tokenizer.decode(tokens[0][mask[0]]).split("<|im_end|>")[:-1]
        for tokens, mask, _ in blocks
    ]
    assert sorted(map(len, taught)) == [1, 2]
    for answers in taught:
        for answer in answers:
            assert split_thinking(answer, template_opens_think=True)[2], answer
    whole = policy.tokenizer.decode(
        blocks[0][0][0][blocks[0][0][0] != policy.tokenizer.pad_token_id]
    )
    assert whole.count("<|im_start|>assistant\n<think>\n") == 1 and whole.count("And?") == 1
    assert generate(policy, policy.encode([sample]), max_new_tokens=2, seed=0).texts


def test_a_template_kept_beside_the_tokenizer(tmp_path):
    """Older hub checkpoints have chat_template.json alone."""
    folder = write_checkpoint(tmp_path / "hub")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        Policy.from_pretrained(str(folder))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert Policy.from_pretrained(str(folder)).tokenizer.chat_template == template


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "qwen3_vl_moe"}, "mixture of experts"),
        ({"model_type": "qwen2_5_vl"}, "qwen2_5_vl model"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantised \(fp8\)"),
    ],
)
def test_other_models_are_refused_by_name(change, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_json("2B") | change))
    with pytest.raises(ValueError, match=message) as error:
        Policy.from_pretrained(str(tmp_path))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("wrong", ["vocab_size", "num_hidden_layers"])
def test_weights_that_do_not_fit_the_config_are_not_made_up(wrong, tmp_path):
    """transformers would train on with random ones, and a warning among others."""
    folder = write_checkpoint(tmp_path / "hub")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][wrong] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError), match="requires|the weights have"):
        Policy.from_pretrained(str(folder))


def test_one_budget_of_pixels_travels_with_the_checkpoint(films, tmp_path, capsys):
    folder, samples = (
        write_checkpoint(tmp_path / "hub"),
        [Sample("a", films["large"], "report", "?", "")],
    )
    policy = Policy.from_pretrained(str(folder))
    assert (
        "16,777,216 pixels" in capsys.readouterr().out
        and policy.encode(samples).grids.prod() > 1500
    )
    policy = Policy.from_pretrained(str(folder), max_pixels=128 * 128)
    assert "--max_pixels is 16,384" in capsys.readouterr().out
    policy.save_pretrained(tmp_path / "saved")
    shutil.rmtree(folder)
    for budget, warned in ((0, False), (128 * 128, False), (64 * 64, True)):
        again = Policy.from_pretrained(str(tmp_path / "saved"), max_pixels=budget)
        assert int(again.encode(samples).grids.prod()) * 256 <= (budget or 128 * 128)
        assert ("the same number" in capsys.readouterr().out) == warned
    with pytest.raises(ValueError, match="less than one token"):
        Policy.from_pretrained(str(tmp_path / "saved"), max_pixels=100)


# ---- a checkpoint against itself -----------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("sound") / "hub", shard="10MB")


@pytest.fixture
def hub(sound, tmp_path):
    """A copy to damage, with its weights in one file."""
    return Path(shutil.copytree(sound, tmp_path / "hub"))


def edit(file: str, **changes):
    """A change of entries of a JSON file: of an object inside by "object.entry", removed by ...; of
    the whole file by a text."""

    def change(folder):
        content = json.loads((folder / file).read_text())
        for key, value in changes.items():
            *inside, key = key.split("__")
            place = content
            for name in inside:
                place = place[name]
            if value is ...:
                del place[key]
            else:
                place[key] = value
        (folder / file).write_text(json.dumps(content))

    return change


def write(file: str, content: str | bytes):
    return lambda folder: (folder / file).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def half(file: str):
    def change(folder):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: len(content) // 2])

    return change


def weight(name: str, alter, file: str = "model.safetensors"):
    """A change of one weight: `alter` takes it and returns it, or None for none."""

    def change(folder):
        weights = load_file(folder / file)
        weights[name] = alter(weights.get(name))
        save_file(
            {key: value for key, value in weights.items() if value is not None}, folder / file
        )

    return change


def value(index, number):
    def alter(tensor):
        tensor.flatten()[index] = number
        return tensor

    return alter


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4967215360\n"
NORM, WORDS = "model.language_model.norm.weight", "model.language_model.embed_tokens.weight"
GRIEF = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}"
)
DOUBLING = (
    "{% set x = namespace(y='ab') %}{% for i in range(60) %}{% set x.y = x.y + x.y %}{% endfor %}"
    "{{ x.y }}"
)
CALLS = "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}"
SPLIT = {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}
PREPEND = {"type": "Prepend", "prepend": "x" * 1000}

FAULTS = {
    # Files that are not there, not all there, or somewhere else.
    "no preprocessor_config": (
        lambda f: (f / "preprocessor_config.json").unlink(),
        "no preprocessor_config.json.*copy it from",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json.*copy it"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no safetensors.*fetch it again"),
    "pointer as weights": (write("model.safetensors", POINTER), "model.safetensors.*git lfs pull"),
    "pointer as tokenizer": (write("tokenizer.json", POINTER), "tokenizer.json.*git lfs pull"),
    "pointer as template": (write("chat_template.jinja", POINTER), "template.jinja.*git lfs pull"),
    "pointer as config": (write("config.json", POINTER), "config.json.*git lfs pull"),
    "pointer as images": (write("preprocessor_config.json", POINTER), "preproc.*git lfs pull"),
    "half the weights": (half("model.safetensors"), "model.safetensors is cut off"),
    "half the tokenizer": (half("tokenizer.json"), "tokenizer.json .*cut off.*fetch it"),
    "half the template": (half("chat_template.jinja"), "chat_template.jinja.*cannot be used.*copy"),
    "half the config": (half("config.json"), "config.json .*cut off: fetch it"),
    "no weights in it": (write("model.safetensors", b""), "model.safetensors is cut off"),
    # The chat template.
    "no image token": (
        write("chat_template.jinja", "{{ messages[0].content[-1].text }}"),
        "writes 0 <.image_pad.> for 1 images",
    ),
    "one image of two": (
        lambda f: (f / "chat_template.jinja").write_text(
            (f / "chat_template.jinja")
            .read_text()
            .replace("for item in content", "for item in content[-2:]")
        ),
        "writes 1 <.image_pad.> for 2 images",
    ),
    "no question": (
        lambda f: (f / "chat_template.jinja").write_text(
            (f / "chat_template.jinja").read_text().replace("item.text", "'?'")
        ),
        "does not write a question",
    ),
    "no turn of the assistant": (
        lambda f: (f / "chat_template.jinja").write_text(
            (f / "chat_template.jinja").read_text().partition("{%- if add_generation_prompt")[0]
        ),
        "begin the assistant's turn",
    ),
    "no ends of turns": (
        lambda f: (f / "chat_template.jinja").write_text(
            (f / "chat_template.jinja").read_text().replace("<|im_end|>", "")
        ),
        "does not end each turn",
    ),
    "loops without end": (write("chat_template.jinja", GRIEF), "takes more than 1 s"),
    "a text that doubles": (write("chat_template.jinja", DOUBLING), "MemoryError"),
    "calls of calls": (write("chat_template.jinja", CALLS), "RecursionError"),
    "a text of a gigabyte": (write("chat_template.jinja", "{{ 'x' * 10**9 }}"), "MemoryError"),
    # Tokens.
    "pad null": (
        edit("tokenizer_config.json", pad_token=None),
        'no pad_token.*"pad_token": "<.endof',
    ),
    "pad unknown": (
        edit("tokenizer_config.json", pad_token="<pad>"),
        "tokenizer_config.json: pad_token '<pad>' is not a token of the tokenizer",
    ),
    "eos unknown": (
        edit("tokenizer_config.json", eos_token=dict(content="zzz")),
        "tokenizer_config.json: eos_token 'zzz' is not a token of the tokenizer",
    ),
    "eos a number": (
        edit("tokenizer_config.json", eos_token=5),
        "tokenizer_config.json: eos_token 5 is not a token of the tokenizer",
    ),
    "longest is a word": (
        edit("tokenizer_config.json", model_max_length="x"),
        "tokenizer_config.json: model_max_length 'x' is not a number",
    ),
    "end of another name": (
        lambda f: (f / "tokenizer.json").write_text(
            (f / "tokenizer.json").read_text().replace("<|im_end|>", "<|the_end|>")
        ),
        "eos_token '<.im_end.>' is not a token of the tokenizer",
    ),
    "image of another id": (
        edit("config.json", image_token_id=5),
        "image_token_id.*not the tokenizer's",
    ),
    "end of another id": (edit("config.json", vision_end_token_id=5), "not the tokenizer's ids"),
    "eos x": (
        edit("generation_config.json", eos_token_id="x"),
        r"eos_token_id \['x', 304\] are not",
    ),
    "eos a word": (edit("generation_config.json", eos_token_id=[304, 40]), "not special tokens"),
    "eos of no token": (edit("generation_config.json", eos_token_id=10**6), "not special tokens"),
    "more tokens than rows": (edit("config.json", text_config__vocab_size=300), "more tokens than"),
    "no bytes": (edit("tokenizer.json", decoder=None), "do not decode to that text again"),
    "dropout": (edit("tokenizer.json", model__dropout=0.5), "always splits a text the same way"),
    "pattern of patterns": (
        edit("tokenizer.json", pre_tokenizer=SPLIT),
        "pre_tokenizer is not Qwen3",
    ),
    "words that grow": (edit("tokenizer.json", normalizer=PREPEND), "normalizer is not Qwen3-VL's"),
    # Images.
    "patches of 14": (
        edit("preprocessor_config.json", patch_size=14),
        r"\(14, 2, 2\) are not those",
    ),
    "merge 0": (edit("preprocessor_config.json", merge_size=0), r"\(16, 2, 0\) are not those"),
    "merge 1": (edit("preprocessor_config.json", merge_size=1), r"\(16, 2, 1\) are not those"),
    "moments of 1": (
        edit("preprocessor_config.json", temporal_patch_size=1),
        r"\(16, 1, 2\) are not",
    ),
    "no size": (edit("preprocessor_config.json", size=None), "it has no size"),
    "no brightness": (edit("preprocessor_config.json", image_mean=...), "it has no image_mean"),
    "size of 0": (
        edit("preprocessor_config.json", size=dict(longest_edge=0, shortest_edge=0)),
        "size",
    ),
    "spread of 0": (edit("preprocessor_config.json", image_std=[0.5, 0, 0.5]), "image_std"),
    "mean of two": (edit("preprocessor_config.json", image_mean=[0.5, 0.5]), "image_mean"),
    "black is white": (
        edit("preprocessor_config.json", rescale_factor=1e9),
        "rescale_factor.*differs from Qwen3-VL's, which turn black into -1 and white into 1",
    ),
    "not rescaled": (
        edit("preprocessor_config.json", do_rescale=False),
        "black into -1 and white into 1",
    ),
    "one grey": (
        edit("preprocessor_config.json", image_std=[99, 99, 99]),
        "black into -1 and white",
    ),
    "not resized": (edit("preprocessor_config.json", do_resize=False), "do_resize"),
    # The config.
    "a deep config": (
        edit("config.json", x=json.loads("[" * 500 + "]" * 500)),
        "more than 30 deep",
    ),
    "a list as config": (
        write("config.json", "[]"),
        "config.json is not usable JSON.*not an object",
    ),
    "a list as text_config": (
        edit("config.json", text_config=[]),
        "config.json has no text_config",
    ),
    "no vision_config": (
        edit("config.json", vision_config=...),
        "config.json has no vision_config",
    ),
    "no heads": (
        edit("config.json", text_config__num_attention_heads=0),
        "num_attention_heads is 0",
    ),
    "no key heads": (
        edit("config.json", text_config__num_key_value_heads=0),
        "num_key_value_heads is 0",
    ),
    "no vision heads": (edit("config.json", vision_config__num_heads=0), "num_heads is 0"),
    "half a head": (edit("config.json", vision_config__num_heads=5), "num_heads 5 times"),
    "a tower of 14": (edit("config.json", vision_config__patch_size=14), "patch_size 14, temp"),
    "a million layers": (
        edit("config.json", text_config__num_hidden_layers=10**6),
        "is 1000000, and",
    ),
    "a million blocks": (edit("config.json", vision_config__depth=10**6), "depth is 1000000, and"),
    "a wide config": (
        edit("config.json", text_config__intermediate_size=2**24),
        "has shape .*requires",
    ),
    "a wide vocabulary": (
        edit("config.json", text_config__vocab_size=2**24),
        "has shape .*requires",
    ),
    "layers of text": (
        edit("config.json", text_config__num_hidden_layers="4"),
        "is '4', and must be",
    ),
    "layers of another": (
        edit("config.json", text_config__num_hidden_layers=3),
        "is 3, and the weig",
    ),
    "not a number": (
        lambda f: (f / "config.json").write_text(
            (f / "config.json").read_text().replace("1e-06", "NaN")
        ),
        "NaN is not a number",
    ),
    "another rotation": (
        edit(
            "config.json",
            text_config__rope_scaling=dict(
                rope_type="default", mrope_section=[4, 4, 4], mrope_interleaved=True
            ),
        ),
        "heads of 16",
    ),
    "tied, with another head": (
        weight("lm_head.weight", lambda _: torch.ones(322, 64)),
        "tie_word_embeddings.*differ: set it to false",
    ),
    "untied, without a head": (
        edit("config.json", tie_word_embeddings=False),
        "lacks .*lm_head.weight",
    ),
    # Weights.
    "NaN": (weight(NORM, value(3, math.nan)), f"{NORM} holds NaN"),
    "infinity": (weight(WORDS, value(-1, math.inf)), f"{WORDS} holds NaN or infinity"),
    "NaN in the tower": (
        weight("model.visual.blocks.1.norm1.bias", value(0, math.nan)),
        "norm1.bias holds",
    ),
    "weights of bytes": (weight(NORM, lambda w: w.to(torch.uint8)), r"quantised \(U8\)"),
    "weights of 8 bits": (
        weight(NORM, lambda w: w.to(torch.float8_e4m3fn)),
        r"quantised \(F8_E4M3\)",
    ),
    "a weight less": (weight(NORM, lambda w: None), f"lacks 1 weights.*such as {NORM}"),
    "both kinds of weights": (
        write(
            "model.safetensors.index.json", json.dumps({"weight_map": {NORM: "part.safetensors"}})
        ),
        "holds both",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_file_and_the_mend(fault, hub, capfd):
    damage, message = FAULTS[fault]
    damage(hub)
    began = time.process_time()
    with pytest.raises(ValueError, match=message) as error:
        Policy.from_pretrained(str(hub))
    said = str(error.value)
    assert str(hub) in said and ": " in said and "\n" not in said and len(said) < 2000
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "settings, words",
    [
        (edit("generation_config.json", eos_token_id="<|endoftext|>"), "<|endoftext|>"),
        (edit("generation_config.json", eos_token_id=["<|endoftext|>"]), "<|endoftext|>"),
        (edit("generation_config.json", eos_token_id=None), "<|endoftext|>"),
        (edit("generation_config.json", eos_token_id=...), "<|endoftext|>"),
        (lambda f: (f / "generation_config.json").unlink(), "<|endoftext|>"),
        (lambda f: (f / "generation_config.json").unlink(), "<|im_end|>"),
    ],
    ids=["other", "list of other", "null", "none", "no file", "no file, right eos"],
)
def test_the_end_token_that_is_taught_always_ends_an_answer(settings, words, hub, tmp_path):
    """Bug: with another eos there, answers ran on to their longest: cut_off 24 of 24."""
    policy = Policy.from_pretrained(str(hub), max_pixels=64 * 64)
    ids = policy.tokenizer.convert_tokens_to_ids
    settings(hub)
    path = hub / "generation_config.json"
    if path.exists():
        path.write_text(path.read_text().replace('"<|endoftext|>"', str(ids("<|endoftext|>"))))
    edit("tokenizer_config.json", eos_token=words)(hub)
    edit("config.json", text_config__eos_token_id=ids("<|endoftext|>"))(hub)
    policy = Policy.from_pretrained(str(hub), max_pixels=64 * 64)
    assert policy.encoder.end_id == ids("<|im_end|>") and policy.encoder.end_id in policy.end_ids
    policy.save_pretrained(tmp_path / "final")
    saved = json.loads((tmp_path / "final/generation_config.json").read_text())
    assert sorted(saved["eos_token_id"]) == policy.end_ids
    plain = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "final")
    assert policy.encoder.end_id in plain.generation_config.eos_token_id


@pytest.mark.parametrize(
    "settings",
    [
        dict(do_sample=False, temperature=0.7),
        dict(temperature=0.01, top_k=5),
        dict(top_p=7.0, do_sample=True),
        dict(num_beams=4, length_penalty=2.0),
    ],
)
def test_settings_of_sampling_do_not_stop_a_run_when_it_saves(settings, hub, tmp_path):
    """transformers warns of such ones when it loads, and refuses to save what it was given so."""
    edit("generation_config.json", do_sample=..., temperature=..., top_k=..., top_p=...)(hub)
    edit("generation_config.json", **settings)(hub)
    policy = Policy.from_pretrained(str(hub), max_pixels=64 * 64)
    policy.save_pretrained(tmp_path / "final")
    assert Policy.from_pretrained(str(tmp_path / "final")).end_ids == policy.end_ids


def test_image_and_video_settings_in_one_file(hub, tmp_path):
    """transformers 5 writes processor_config.json alone, and so do frameworks that train with
    it.
    """

    def read(name):
        return json.loads((hub / name).read_text())

    names = ("preprocessor_config.json", "video_preprocessor_config.json")
    images, video = map(read, names)
    for name in names:
        (hub / name).unlink()
    both = dict(
        image_processor=images | {"size": dict(longest_edge=64 * 64, shortest_edge=32 * 32)},
        video_processor=video,
        processor_class="Qwen3VLProcessor",
    )
    (hub / "processor_config.json").write_text(json.dumps(both))
    policy = Policy.from_pretrained(str(hub))
    assert policy.image_processor.size["longest_edge"] == 64 * 64 and policy.video == video
    policy.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/video_preprocessor_config.json").read_text()) == video
    assert (
        Policy.from_pretrained(str(tmp_path / "saved")).image_processor.size["longest_edge"]
        == 64 * 64
    )
    edit("processor_config.json", image_processor__patch_size=14)(hub)
    with pytest.raises(ValueError, match="processor_config.json: patch_size.*14"):
        Policy.from_pretrained(str(hub))


def test_a_model_of_the_hub_is_found_in_its_cache(sound, tmp_path, monkeypatch):
    """As huggingface_hub keeps it: links to blobs. Its small files come first, then the weights."""
    name = "Qwen/Qwen3-VL-2B-Instruct"
    snapshot = cache_as_downloaded(sound, tmp_path / "cache", name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    policy = Policy.from_pretrained(name, max_pixels=64 * 64)
    alone = Policy.from_pretrained(str(sound), max_pixels=64 * 64)
    assert torch.equal(policy.head, alone.head) and policy.model.name_or_path == name
    policy.save_pretrained(tmp_path / "saved")
    assert not any("minigrpo-" in path.read_text() for path in (tmp_path / "saved").glob("*.json"))
    (snapshot / "model.safetensors").unlink()
    asked = []

    def download(model, revision=None, allow_patterns=None):
        asked.append((model, revision, allow_patterns))
        if revision:
            (snapshot / "model.safetensors").write_bytes((sound / "model.safetensors").read_bytes())
        return str(snapshot)

    monkeypatch.setattr("minigrpo.checkpoint.snapshot_download", download)
    Policy.from_pretrained(name)
    assert [(model, revision) for model, revision, _ in asked] == [
        (name, None),
        (name, snapshot.name),
    ]
    assert asked[1][2] == ["model.safetensors"] and "config.json" in asked[0][2]


@pytest.mark.parametrize(
    "name, message",
    [
        ("x" * 300, "neither a checkpoint folder nor a model on the hub"),
        (f"{'x' * 300}/y", "neither a checkpoint folder nor a model on the hub"),
        ("a/b/c", "neither a checkpoint folder nor a model on the hub"),
        ("tiny", "only train_sft.py"),
        (os.fsdecode(b"model-\xff"), r"'model-\\udcff': the path is not UTF-8.*rename the folder"),
        (__file__, "is a file: give the folder"),
    ],
)
def test_names_that_are_no_model(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    os.mkdir(b"model-\xff")
    with pytest.raises(ValueError, match=message):
        Policy.from_pretrained(name)


def test_unused_weights_are_named(hub, capsys):
    weight("v_head.weight", lambda _: torch.ones(3))(hub)
    Policy.from_pretrained(str(hub))
    assert (
        "1 weights that Qwen3-VL does not have, such as 'v_head.weight'" in capsys.readouterr().out
    )
