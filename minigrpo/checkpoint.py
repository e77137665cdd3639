"""Qwen3-VL checkpoints: what is read from a folder or the hub, and what we write.

Dense Qwen3-VL of every size, Instruct and Thinking, tied or untied head, one file or shards.
Transformers, its `AutoProcessor` and vLLM load what we write, unchanged: weights, config,
generation config, tokenizer, chat template, and the settings of both the image and the video
processor (the latter is not used here, but `AutoProcessor` needs it).

Every program reads checkpoints through `open_checkpoint`: `trust.py` reads the files, transformers
builds its objects from selected entries, and `checks.py` checks that they belong together.
"""

import json
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.configuration_qwen3_vl import (
    Qwen3VLTextConfig,
    Qwen3VLVisionConfig,
)
from transformers.utils import logging as transformers_logging

from minigrpo import trust
from minigrpo.checks import (
    END,
    ORIGIN,
    Checkpoint,
    check_config,
    check_counts,
    check_finite,
    check_weights,
    check_whole,
    reading,
)
from minigrpo.choices import SMALLEST

PAPER = 512 * 512  # pixels, of its SFT
# Qwen3-VL's own, for a model that came without: frames of 64 x 64 pixels at least, all frames
# together 24,576 merged patches.
VIDEO = {
    "size": {"longest_edge": 25_165_824, "shortest_edge": 4096},
    "video_processor_type": "Qwen3VLVideoProcessor",
}

# What transformers is given of each file; nothing else in it has any effect.
MODEL = {
    "model_type",
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
}
TEXT = {
    *Qwen3VLTextConfig.__annotations__,
    "model_type",
    "rope_theta",
    "rope_scaling",
    "bos_token_id",
    "eos_token_id",
}
VISION = {*Qwen3VLVisionConfig.__annotations__, "model_type"}
TOKENIZER = {
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "additional_special_tokens",
    "extra_special_tokens",
    "tokenizer_class",
    "added_tokens_decoder",
    "add_prefix_space",
    "clean_up_tokenization_spaces",
    "errors",
    "model_max_length",
    "split_special_tokens",
}
TOKENIZERS = (
    None,
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
)
IMAGES = {
    "size",
    "min_pixels",
    "max_pixels",
    "patch_size",
    "temporal_patch_size",
    "merge_size",
    "image_mean",
    "image_std",
    "rescale_factor",
    "resample",
    "do_rescale",
    "do_normalize",
    "do_resize",
    "do_convert_rgb",
}
NEEDED = {"patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std"}
SAMPLING = {"do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}


def open_checkpoint(name: str, *, weights: bool = True) -> Checkpoint:
    """Open a folder or a model on the hub, and check that its parts agree: everything but the
    values of the weights.
    """
    c, files = _open(name)
    c.tokenizer = tokenizer_of(c, files)
    c.tokenizer.chat_template = template_of(c.folder, files)
    c.images, c.image_file, c.video = images_of(c.folder, files)
    c.generation = generation_of(c, files)
    check_whole(c)
    if max(abs(c.greys[0] + 1), abs(c.greys[1] - 1)) > 0.01:
        print(
            f"note: {c.folder / c.image_file}: black becomes {c.greys[0]:.3g} and white"
            f" {c.greys[1]:.3g}; with Qwen3-VL they become -1 and 1"
        )
    if weights:
        paths = trust.weight_files(c.folder, files)
        if c.folder != Path(name) and not all(path.exists() for path in paths):
            snapshot_download(name, revision=c.folder.name, allow_patterns=[p.name for p in paths])
        held = trust.read_headers(paths)
        c.weights = {weight: path for weight, (_, path) in held.items()}
        if unused := check_weights(c, held):
            print(
                f"note: {name} has {len(unused)} weights that Qwen3-VL does not have, such as"
                f" {unused[0]!r}: they are not used"
            )
    return c


def read_config(name: str) -> Qwen3VLConfig:
    """config.json alone; anything but a dense Qwen3-VL is refused, with its name."""
    return _open(name)[0].config


def _open(name: str) -> tuple[Checkpoint, dict]:
    folder = local_folder(name)
    files = trust.read_folder(folder)
    config = config_of(folder, files)
    check_config(folder, config)
    with reading(folder / "config.json"), torch.device("meta"):
        return Checkpoint(name, folder, Qwen3VLForConditionalGeneration(config).eval()), files


def local_folder(name: str) -> Path:
    """The folder itself, or the folder of a model in the hub's cache, fetched without the
    weights.
    """
    try:
        name.encode()
        if Path(name).is_dir():
            return Path(name)
        if Path(name).exists():
            raise ValueError(f"--model {name} is a file: give the folder that holds it")
    except UnicodeEncodeError:
        raise ValueError(
            f"--model {name!r}: the path is not UTF-8, which tokenizers and "
            "safetensors need: rename the folder"
        ) from None
    except OSError:  # too long for a file's name
        pass
    if name == "tiny":
        raise ValueError(
            "only train_sft.py makes a `tiny` model (from --train_data, as `python -m "
            "minigrpo.tiny` does): give the folder of a checkpoint, such as RUN/final"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=trust.SMALL))
    except Exception as error:  # of the name, the network, the cache
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{name[:300]} is neither a checkpoint folder nor a model on the hub ({reason[:300]})"
        ) from error


def chosen(values: dict, names: set[str]) -> dict:
    return {name: value for name, value in values.items() if name in names}


def config_of(folder: Path, files: dict) -> Qwen3VLConfig:
    if "config.json" not in files:
        raise ValueError(
            f"{folder} is not a checkpoint: it has no config.json. Give a folder that "
            "save_pretrained wrote, such as RUN/final, or a model's name on the hub"
        )
    content, path = files["config.json"], folder / "config.json"
    kind = content.get("model_type")
    if kind == "qwen3_vl_moe":
        raise ValueError(
            f"{folder} is a mixture of experts ({kind}, such as Qwen3-VL-30B-A3B); "
            "minigrpo trains the dense Qwen3-VL: 2B, 4B, 8B or 32B"
        )
    if kind != "qwen3_vl":
        raise ValueError(
            f"{folder} is a {trust.shown(kind)} model; minigrpo trains dense Qwen3-VL (qwen3_vl)"
        )
    check_counts(path, content)
    text, vision = content["text_config"], content["vision_config"]
    tied = content.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    with reading(path):
        return Qwen3VLConfig(
            **chosen(content, MODEL),
            tie_word_embeddings=tied,
            text_config=chosen(text, TEXT) | {"tie_word_embeddings": tied},
            vision_config=chosen(vision, VISION),
        )


@contextmanager
def clean_folder(links: list[Path], texts: dict[str, dict]):
    """A folder for transformers to read: links to these files, and these texts."""
    with TemporaryDirectory(prefix="minigrpo-") as place:
        for path in links:
            (Path(place) / path.name).symlink_to(path.absolute())
        for name, content in texts.items():
            (Path(place) / name).write_text(json.dumps(content))
        yield place


def tokenizer_of(c: Checkpoint, files: dict) -> PreTrainedTokenizerBase:
    names = [name for name in ("tokenizer.json", "vocab.json", "merges.txt") if name in files]
    if "tokenizer.json" in files:
        trust.check_tokenizer(c.folder / "tokenizer.json", files["tokenizer.json"])
    elif len(names) < 2:
        raise ValueError(f"{c.folder} has no tokenizer.json: {ORIGIN}")
    texts = {
        name: chosen(files.get(name, {}), TOKENIZER)
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    }
    texts |= chosen(files, {"added_tokens.json"})
    kind = texts["tokenizer_config.json"].get("tokenizer_class")
    if kind not in TOKENIZERS:
        raise ValueError(
            f"{c.folder / 'tokenizer_config.json'}: tokenizer_class {kind!r:.100} is not one of"
            f" Qwen3-VL's: {ORIGIN}"
        )
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        check_special_tokens(c.folder / name, texts[name], files)
    with (
        clean_folder([c.folder / name for name in names], texts) as place,
        reading(f"{c.folder}: the tokenizer ({', '.join([*names, 'tokenizer_config.json'])})"),
    ):
        tokenizer = AutoTokenizer.from_pretrained(place, config=c.config, trust_remote_code=False)
    tokenizer.name_or_path = c.name
    return tokenizer


def check_special_tokens(path: Path, settings: dict, files: dict) -> None:
    """Special tokens must be in the tokenizer: transformers would add a missing one, beyond the
    rows of the model.
    """
    length = settings.get("model_max_length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int | float)):
        raise ValueError(f"{path}: model_max_length {length!r:.100} is not a number: {ORIGIN}")
    whole, added = files.get("tokenizer.json", {}), settings.get("added_tokens_decoder") or {}
    with reading(path):
        known = set(whole["model"]["vocab"] if whole else files.get("vocab.json", {}))
        known |= {token["content"] for token in (whole.get("added_tokens") or [])}
        known |= {token["content"] for token in added.values()}
        known |= set(files.get("added_tokens.json", {}))
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and (not isinstance(token, str) or token not in known):
            raise ValueError(
                f"{path}: {key} {token!r:.100} is not a token of the tokenizer: {ORIGIN}"
            )


def template_of(folder: Path, files: dict) -> str:
    """The chat template, where transformers looks for it: chat_template.jinja,
    tokenizer_config.json, and then the chat_template.json of older checkpoints; of several
    templates, the one named default."""
    for name in ("chat_template.jinja", "tokenizer_config.json", "chat_template.json"):
        with reading(folder / name):
            template = files.get(name)
            template = template.get("chat_template") if isinstance(template, dict) else template
            if isinstance(template, list):
                template = {item["name"]: item["template"] for item in template}["default"]
            if template:
                return template + ""
    raise ValueError(
        f"{folder} has no chat template: copy chat_template.jinja or "
        "chat_template.json from the model that it was made from"
    )


def images_of(folder: Path, files: dict) -> tuple[Qwen2VLImageProcessorPil, str, dict]:
    """The image processor, its file, and the settings of the video processor, where transformers
    looks for them: processor_config.json, where its version 5 writes both, then a file for each.
    """
    both, name = files.get("processor_config.json", {}), "processor_config.json"
    images, video = both.get("image_processor"), both.get("video_processor")
    if not images:
        name = "preprocessor_config.json"
        images = files.get(name)
    if images is None:
        raise ValueError(f"{folder} has no {name}, the settings for images: {ORIGIN}")
    with reading(folder / name):
        images = {key: value for key, value in images.items() if value is not None}
        needed = NEEDED if "max_pixels" in images else NEEDED | {"size"}
        if absent := needed - images.keys():
            raise ValueError(f"it has no {', '.join(sorted(absent))}")
        return (
            Qwen2VLImageProcessorPil(**chosen(images, IMAGES)),
            name,
            dict(video or files.get("video_preprocessor_config.json", {})),
        )


def generation_of(c: Checkpoint, files: dict) -> GenerationConfig:
    """The generation config. Its end tokens are a list that includes the one SFT teaches. Sampling
    settings that transformers would refuse to save are left out: nothing here uses them.
    """
    settings = files.get("generation_config.json", {})
    with reading(c.folder / "generation_config.json"):
        ends = settings.get("eos_token_id")
        ends = [c.tokenizer.eos_token_id] if ends is None else ends
        ends = list(ends) if isinstance(ends, list) else [ends]
        ids = {
            key: settings[key]
            for key in ("bos_token_id", "pad_token_id")
            if type(settings.get(key)) is int
        }
        ids["eos_token_id"] = ends + [c.token(END)] * (c.token(END) not in ends)
        try:
            whole = GenerationConfig(**ids, **chosen(settings, SAMPLING))
            whole.validate(strict=True)
            return whole
        except ValueError:
            return GenerationConfig(**ids)


def load(name: str, device: str = "cpu", max_pixels: int = 0) -> tuple:
    """(model with fp32 weights, tokenizer, image processor, settings of the video processor).

    The weights are mapped from disk and converted one by one, so that only the fp32 model itself
    takes memory.
    """
    transformers_logging.disable_progress_bar()
    c = open_checkpoint(name)
    files = sorted(set(c.weights.values()))
    texts = {"generation_config.json": {}}
    if len(files) > 1:
        shards = {weight: path.name for weight, path in c.weights.items()}
        texts[trust.INDEX] = {"metadata": {}, "weight_map": shards}
    with clean_folder(files, texts) as place, reading(c.folder):
        model, about = Qwen3VLForConditionalGeneration.from_pretrained(
            place,
            config=c.config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
        )
        if absent := [*about["missing_keys"], *about["mismatched_keys"]]:
            raise ValueError(f"it lacks {absent[0]}")  # transformers would take random numbers
    check_finite(c.folder, model)
    model.generation_config = c.generation
    model.name_or_path = model.config.name_or_path = name  # not the folder that transformers saw
    set_budget(c, max_pixels)
    # eval() for good: Qwen3-VL has no dropout or batch statistics that training would need.
    return model.to(device).eval(), c.tokenizer, c.images, c.video


def set_budget(c: Checkpoint, max_pixels: int = 0, *, say=print) -> None:
    """Larger images shrink to `max_pixels`; 0 keeps the checkpoint's own limit. Tiny ones still
    grow, to at most a quarter of it, which rounded up to whole tokens stays within it.
    """
    stored = c.images.size["longest_edge"]
    if max_pixels and max_pixels < SMALLEST:
        raise ValueError(
            f"--max_pixels {max_pixels} is less than one token: an image token is "
            f"32 x 32 = {SMALLEST} pixels"
        )
    if max_pixels and max_pixels != stored:
        say(
            f"note: {c.name} was made for images of up to {stored:,} pixels, and --max_pixels is "
            f"{max_pixels:,}: train and evaluate with the same number"
        )
        c.images.size = {
            "longest_edge": max_pixels,
            "shortest_edge": min(c.images.size["shortest_edge"], max_pixels // 4),
        }
    elif stored > 4 * PAPER:
        say(
            f"note: {c.name} takes images of up to {stored:,} pixels, {stored // 1024:,} tokens "
            f"each: --max_pixels limits them (the paper's SFT: {PAPER})"
        )


def save(
    folder: str | Path,
    model: Qwen3VLForConditionalGeneration,
    tokenizer,
    processor,
    video: dict | None,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a checkpoint folder, see above; `weights` replace the model's own if those are
    sharded.
    """
    folder = Path(folder)
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    # The class that AutoProcessor makes; config.json would do, but vLLM asks here.
    path = folder / "preprocessor_config.json"
    images = json.loads(path.read_text()) | {"processor_class": "Qwen3VLProcessor"}
    path.write_text(json.dumps(images, indent=2) + "\n")
    same = (
        "patch_size",
        "temporal_patch_size",
        "merge_size",
        "image_mean",
        "image_std",
        "processor_class",
    )
    settings = video or VIDEO | {name: images[name] for name in same}
    path = folder / "video_preprocessor_config.json"
    path.write_text(json.dumps(settings, indent=2) + "\n")


def opens_thinking(tokenizer) -> bool:
    """Whether the chat template itself writes the first <think> of an answer, as that of
    Qwen3-VL-Thinking does."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True
    )
    return text.rstrip().endswith("<think>")
