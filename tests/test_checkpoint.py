"""Checkpoints laid out like the hub's, of every size and kind, through loading, training's view of them, and saving."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.utils import is_torchvision_available

from minigrpo.checkpoint import read_config
from minigrpo.data import Sample, load_image, split_thinking
from minigrpo.generate import generate
from minigrpo.policy import Policy
from minigrpo.rewards import reward_fn
from tests.hub import SIZES, config_json, write_checkpoint

PARAMETERS = {"2B": 2.13e9, "4B": 4.44e9, "8B": 8.77e9, "32B": 33.4e9}  # as the hub shows them


@pytest.fixture(scope="module", params=[("2B", False), ("4B", True), ("8B", False), ("32B", True)], ids=lambda p: f"{p[0]}-{p[1]}")
def published(request, tmp_path_factory):
    """(folder, size, thinking)"""
    size, thinking = request.param
    return write_checkpoint(tmp_path_factory.mktemp(size) / "hub", size, thinking=thinking), size, thinking


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Films of four shapes, one far larger than the budget and one far smaller than a token."""
    folder = tmp_path_factory.mktemp("films")
    for name, size in (("large", (700, 600)), ("wide", (300, 90)), ("small", (20, 14)), ("plain", (256, 256))):
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{name}.png")
    return {path.stem: str(path) for path in folder.glob("*.png")}


@pytest.mark.parametrize("size", SIZES)
def test_the_published_configs_make_models_of_the_published_size(size, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_json(size)))
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(read_config(str(tmp_path)))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(PARAMETERS[size], rel=0.01)
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == SIZES[size]["tied"]


def test_loads_as_published_and_saves_what_loads_bit_for_bit(published, films, tmp_path):
    folder, size, thinking = published
    assert len(list(folder.glob("*.safetensors"))) > 1 and (folder / "model.safetensors.index.json").exists()
    policy = Policy.from_pretrained(str(folder), max_pixels=96 * 96)
    tied = policy.head is policy.language_model.embed_tokens.weight
    assert tied == SIZES[size]["tied"] and {p.dtype for p in policy.model.parameters()} == {torch.float32}
    assert policy.end_ids == sorted(policy.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    assert policy.opened == thinking
    # One step, so that it is not the file it came from; then plain transformers on what we saved.
    prompts = policy.encode([Sample("a", films["plain"], "report", "What is seen?", "")])
    tokens, mask = policy.encode_answers(["The heart is normal."])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    (-policy.score(prompts, tokens, mask).sum()).backward()
    optimizer.step()
    policy.save_pretrained(tmp_path / "saved")
    plain = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    inputs = dict(input_ids=prompts.ids, pixel_values=prompts.pixels, image_grid_thw=prompts.grids,
                  mm_token_type_ids=(prompts.ids == policy.model.config.image_token_id).int())
    with torch.no_grad():
        del policy.visual.patch_embed.forward  # ours is one matrix product, which rounds otherwise than their convolution
        assert torch.equal(plain(**inputs).logits, policy.model(**inputs).logits)
        again, policy = Policy.from_pretrained(str(tmp_path / "saved")), policy.to("cpu")
        assert torch.equal(again.score(prompts, tokens, mask), policy.score(prompts, tokens, mask))
    assert (again.end_ids, again.opened, again.image_processor.size["longest_edge"]) == (policy.end_ids, policy.opened, 96 * 96)
    # The files that vLLM and AutoProcessor open, with what the checkpoint said in them.
    read = lambda folder, name: json.loads((folder / name).read_text())
    assert read(tmp_path / "saved", "video_preprocessor_config.json") == read(folder, "video_preprocessor_config.json")
    assert read(tmp_path / "saved", "preprocessor_config.json")["processor_class"] == "Qwen3VLProcessor"
    generation = read(tmp_path / "saved", "generation_config.json")
    assert (generation["top_k"], generation["eos_token_id"]) == (20, read(folder, "generation_config.json")["eos_token_id"])
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == policy.tokenizer.chat_template


def processor_of(folder, monkeypatch) -> Qwen3VLProcessor:
    """AutoProcessor over the folder. Its video processor needs torchvision: where that is missing, only that one is left out,
    after it has been seen to be the right class."""
    if not is_torchvision_available():
        from transformers.models.auto import video_processing_auto as auto
        asked = []

        def made(_, name, **kwargs):
            asked.append(json.loads((folder / "video_preprocessor_config.json").read_text())["video_processor_type"])
        monkeypatch.setattr(auto.AutoVideoProcessor, "from_pretrained", classmethod(made))
        monkeypatch.setattr(Qwen3VLProcessor, "check_argument_for_proper_class", lambda self, name, value: type(value))
    found = AutoProcessor.from_pretrained(folder)
    found.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    assert type(found) is Qwen3VLProcessor and (is_torchvision_available() or asked == ["Qwen3VLVideoProcessor"])
    return found


def test_prompts_are_those_of_transformers_own_processor(published, films, tmp_path, monkeypatch):
    """Token for token, pixel for pixel: images of all shapes, none, and two."""
    folder, _, _ = published
    policy = Policy.from_pretrained(str(folder), max_pixels=160 * 160)
    policy.save_pretrained(tmp_path / "saved")
    processor = processor_of(tmp_path / "saved", monkeypatch)
    samples = [Sample(name, film, "report", f"What is seen on the {name} film? <think> é 1.25", "") for name, film in films.items()]
    samples += [replace(samples[0], image=[films["wide"], films["plain"]]), replace(samples[0], image=None)]
    for sample in samples:
        content = [{"type": "image", "image": load_image(path)} for path in sample.images] + [{"type": "text", "text": sample.question}]
        peer = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
                                             return_dict=True, return_tensors="pt")
        ours = policy.encode([sample])
        assert ours.ids.tolist() == peer["input_ids"].tolist()
        if sample.images:
            assert torch.equal(ours.pixels, peer["pixel_values"]) and torch.equal(ours.grids, peer["image_grid_thw"])
            assert (ours.grids.prod(1) * 256 <= 160 * 160).all()


@pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision")
@pytest.mark.parametrize("size", [(700, 600), (300, 90), (60, 50)])
def test_pixels_are_close_to_torchvisions(size, tmp_path):
    """Another resampling code, which rounds otherwise: one of 255 steps at most. (White noise differs by up to 21: PIL cuts
    off what overshoots black and white between its two passes, torchvision after both.)"""
    from transformers import Qwen2VLImageProcessor
    Image.radial_gradient("L").resize(size).convert("RGB").save(tmp_path / "film.png")
    policy = Policy.from_pretrained(str(write_checkpoint(tmp_path / "hub")), max_pixels=160 * 160)
    policy.save_pretrained(tmp_path / "saved")
    ours = policy.encode([Sample("a", str(tmp_path / "film.png"), "report", "?", "")])
    peer = Qwen2VLImageProcessor.from_pretrained(tmp_path / "saved")(images=[load_image(tmp_path / "film.png")], return_tensors="pt")
    assert torch.equal(ours.grids, peer["image_grid_thw"])
    steps = (ours.pixels - peer["pixel_values"]).abs() * 127.5
    assert steps.max() < 1.01 and steps.mean() < 0.02


def test_a_thinking_checkpoint_is_read_as_one(tmp_path):
    """Its chat template opens <think>: answers are read from inside it, and SFT teaches to close it."""
    policy = Policy.from_pretrained(str(write_checkpoint(tmp_path / "hub", "2B", thinking=True)))
    sample = Sample("a", None, "report", "What is seen?", "The heart is normal.")
    assert policy.tokenizer.decode(policy.encode([sample]).ids[0]).endswith("<|im_start|>assistant\n<think>\n")
    reward = reward_fn("gleu", opened=policy.opened)
    assert reward(["It is normal.\n</think>\n\nThe heart is normal.", "The heart is normal."], [sample] * 2).values == [1.0, 0.0]
    talk = replace(sample, task="conversation", turns=[["What is seen?", "The heart."], ["And?", "<think>\nLungs.\n</think>\n\nClear."]])
    prompts, blocks = policy.encode_turns([[sample, talk]])
    taught = [policy.tokenizer.decode(tokens[0][mask[0]]).split("<|im_end|>")[:-1] for tokens, mask, _ in blocks]
    assert sorted(map(len, taught)) == [1, 2]
    for answers in taught:
        for answer in answers:
            assert split_thinking(answer, opened=True)[2], answer
    whole = policy.tokenizer.decode(blocks[0][0][0][blocks[0][0][0] != policy.tokenizer.pad_token_id])
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


@pytest.mark.parametrize("change, message", [
    ({"model_type": "qwen3_vl_moe"}, "mixture of experts"), ({"model_type": "qwen2_5_vl"}, "qwen2_5_vl model"),
    ({"quantization_config": {"quant_method": "fp8"}}, r"quantised \(fp8\)")])
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
    with pytest.raises((ValueError, RuntimeError), match="lacks|size"):
        Policy.from_pretrained(str(folder))


def test_one_budget_of_pixels_travels_with_the_checkpoint(films, tmp_path, capsys):
    folder, samples = write_checkpoint(tmp_path / "hub"), [Sample("a", films["large"], "report", "?", "")]
    policy = Policy.from_pretrained(str(folder))
    assert "16,777,216 pixels" in capsys.readouterr().out and policy.encode(samples).grids.prod() > 1500
    policy = Policy.from_pretrained(str(folder), max_pixels=128 * 128)
    assert "--max_pixels is 16,384" in capsys.readouterr().out
    policy.save_pretrained(tmp_path / "saved")
    shutil.rmtree(folder)
    for budget, warned in ((0, False), (128 * 128, False), (64 * 64, True)):
        again = Policy.from_pretrained(str(tmp_path / "saved"), max_pixels=budget)
        assert int(again.encode(samples).grids.prod()) * 256 <= (budget or 128 * 128)
        assert ("one budget" in capsys.readouterr().out) == warned
    with pytest.raises(ValueError, match="less than one token"):
        Policy.from_pretrained(str(tmp_path / "saved"), max_pixels=100)
