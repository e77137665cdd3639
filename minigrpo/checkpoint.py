"""Qwen3-VL checkpoints: what is read from a folder or the hub, and all that a folder of ours holds.

Dense Qwen3-VL of every size, Instruct and Thinking, tied or untied head, one file or shards. What we write, transformers' own
`AutoProcessor` and vLLM load unchanged: weights, config, generation config, tokenizer, chat template, and the settings of both
the image and the video processor (the latter is not used here, but theirs is not made without it).
"""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from minigrpo.trust import check_folder

SMALLEST = 32 * 32  # pixels: one merged patch
PAPER = 512 * 512  # pixels, of its SFT
# Qwen3-VL's own, for a model that came without: frames of 64 x 64 pixels at least, all frames together 24,576 merged patches.
VIDEO = {"size": {"longest_edge": 25_165_824, "shortest_edge": 4096}, "video_processor_type": "Qwen3VLVideoProcessor"}


def read_config(name_or_dir: str) -> Qwen3VLConfig:
    """config.json of a folder or a model on the hub; whatever is not a dense Qwen3-VL is refused by its name."""
    folder = Path(name_or_dir)
    if str(name_or_dir) == "tiny" and not folder.exists():
        raise ValueError("only train_sft.py makes a `tiny` model (from --train_data, as `python -m minigrpo.tiny` does): give the folder "
                         "of a checkpoint, such as RUN/final")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{name_or_dir} is no checkpoint: it holds no config.json. Give a folder that "
                         "save_pretrained wrote, such as RUN/final, or a model's name on the hub")
    try:
        found, _ = PreTrainedConfig.get_config_dict(str(name_or_dir))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name_or_dir} is neither a checkpoint folder nor a model on the hub "
                         f"({str(error).splitlines()[0]})") from error
    kind = found.get("model_type")
    if kind == "qwen3_vl_moe":
        raise ValueError(f"{name_or_dir} is a mixture of experts ({kind}, such as Qwen3-VL-30B-A3B); minigrpo trains the dense "
                         "Qwen3-VL: 2B, 4B, 8B or 32B")
    if kind != "qwen3_vl":
        raise ValueError(f"{name_or_dir} is a {kind} model; minigrpo trains dense Qwen3-VL (qwen3_vl)")
    if "quantization_config" in found:
        method = found["quantization_config"].get("quant_method", "some method")
        raise ValueError(f"{name_or_dir} is quantised ({method}), and such weights can't be trained: give the checkpoint that "
                         "it was made from")
    return Qwen3VLConfig.from_dict(found)


def load(name_or_dir: str, device: str = "cpu", max_pixels: int = 0) -> tuple:
    """(model with fp32 weights, tokenizer, image processor, settings of the video processor).

    The weights are mapped from disk and converted one by one, so that only the fp32 model itself takes memory.
    """
    transformers_logging.disable_progress_bar()
    config = read_config(name_or_dir)
    if Path(name_or_dir).is_dir():
        check_folder(Path(name_or_dir))
    # eval() for good: Qwen3-VL has no dropout or batch statistics that training would need.
    model, about = Qwen3VLForConditionalGeneration.from_pretrained(
        name_or_dir, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    absent = sorted(about["missing_keys"]) + sorted(str(key[0]) for key in about["mismatched_keys"])
    if absent:  # transformers would go on with random weights in their place
        raise ValueError(f"{name_or_dir} lacks {len(absent)} weights that its config.json asks for, such as {absent[0]}: "
                         "fetch it again, or check that config.json belongs to it")
    tokenizer = AutoTokenizer.from_pretrained(name_or_dir, trust_remote_code=False)
    if not tokenizer.chat_template:
        tokenizer.chat_template = read_json(name_or_dir, "chat_template.json").get("chat_template")
    if not tokenizer.chat_template:
        raise ValueError(f"{name_or_dir} has no chat template: copy chat_template.jinja or chat_template.json from the model it "
                         "was made from")
    return (model.to(device).eval(), tokenizer, image_processor(name_or_dir, max_pixels),
            read_json(name_or_dir, "video_preprocessor_config.json"))


def image_processor(name_or_dir: str, max_pixels: int = 0, *, quiet: bool = False) -> Qwen2VLImageProcessorPil:
    """The checkpoint's, with its budget of pixels an image or, where `max_pixels` is given, with that one; says what differs."""
    processor = Qwen2VLImageProcessorPil.from_pretrained(name_or_dir)
    stored = processor.size["longest_edge"]
    note = (lambda text: None) if quiet else print
    if max_pixels and max_pixels != stored:
        note(f"note: {name_or_dir} was made for images of up to {stored:,} pixels, and --max_pixels is {max_pixels:,}: train and "
             "evaluate with one budget")
        set_budget(processor, max_pixels)
    elif stored > 4 * PAPER:
        note(f"note: {name_or_dir} takes images of up to {stored:,} pixels, {stored // 1024:,} tokens each: --max_pixels bounds "
             f"them (the paper's SFT: {PAPER})")
    return processor


def set_budget(processor: Qwen2VLImageProcessorPil, max_pixels: int) -> None:
    """Images of more pixels shrink to `max_pixels`. Tiny ones still grow, to a quarter of it at most: rounded up to whole tokens
    that stays within it."""
    if max_pixels < SMALLEST:
        raise ValueError(f"--max_pixels {max_pixels} is less than one token: an image token is 32 x 32 = {SMALLEST} pixels")
    processor.size = {"longest_edge": max_pixels, "shortest_edge": min(processor.size["shortest_edge"], max_pixels // 4)}


def save(folder: str | Path, model: Qwen3VLForConditionalGeneration, tokenizer, processor, video: dict | None,
         weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write a checkpoint folder, see above; `weights` in place of the model's own, where those are sharded."""
    folder = Path(folder)
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    path = folder / "preprocessor_config.json"  # the class that AutoProcessor makes; config.json would do, but vLLM asks here
    images = json.loads(path.read_text()) | {"processor_class": "Qwen3VLProcessor"}
    path.write_text(json.dumps(images, indent=2) + "\n")
    same = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std", "processor_class")
    settings = video or VIDEO | {name: images[name] for name in same}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def opens_thinking(tokenizer) -> bool:
    """Whether the chat template itself writes the first <think> of an answer, as Qwen3-VL-Thinking's does."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True)
    return text.rstrip().endswith("<think>")


def read_json(name_or_dir: str, file: str) -> dict:
    """A file of the checkpoint; {} where it has none."""
    path = cached_file(str(name_or_dir), file, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
