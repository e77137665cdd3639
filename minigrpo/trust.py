"""The files of an untrusted checkpoint folder: they may contain no code and no pickles, and name no
files outside. See SECURITY.md.

They are read here, within limits. transformers never sees the folder: `checkpoint.py` makes another
one for it, with the entries that a Qwen3-VL needs and links to weights and vocabulary.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from minigrpo.once import each_key_once
from minigrpo.visible import printable

JSON = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
)
INDEX = "model.safetensors.index.json"
LISTS = ("tokenizer.json", "vocab.json", "added_tokens.json", INDEX)  # keys: tokens, weights
TEXTS = ("merges.txt", "chat_template.jinja")
SMALL = [*JSON, *LISTS, *TEXTS, "adapter_config.json"]  # fetched from the hub before the weights
MB = 10**6
MOST = dict.fromkeys((*JSON, *TEXTS), 2 * MB) | dict.fromkeys((*LISTS, "merges.txt"), 32 * MB)
DEEPEST = 30  # levels of JSON
MOST_WEIGHTS = 20_000
FETCH = "fetch it again, from its authors"
BASE = "which cannot be trained: give the unquantised checkpoint"

# Keys, anywhere in JSON, with what they request.
KEYS = {
    "auto_map": "to run code of its own",
    "custom_generate": "to run code of its own",
    "kernel_config": "for kernels, which are code",
    "use_kernels": "for kernels, which are code",
    "fusion_config": "for other layers than Qwen3-VL's",
    "gguf_file": "for another file of weights",
    "transformers_weights": "for another file of weights",
}
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
FLOATS = ("F32", "F16", "BF16", "F64")
PARTS = {
    "normalizer": ("NFC",),
    "pre_tokenizer": ("Sequence", "Split", "ByteLevel"),
    "model": ("BPE",),
    "post_processor": ("ByteLevel", "TemplateProcessing"),
    "decoder": ("ByteLevel",),
}


def read_folder(folder: Path) -> dict:
    """Its small files by name: JSON as objects, other text unchanged. ValueError, with what to do,
    for anything that a checkpoint may not contain.
    """
    if adapters := sorted(folder.glob("adapter_*")):
        raise ValueError(
            f"{folder} holds {adapters[0].name!r} of an adapter: give --model the base "
            "model, or merge the adapter into it first (RUN/final is merged)"
        )
    files = {name: text for name in MOST if (text := read_text(folder / name)) is not None}
    for name in files.keys() - set(TEXTS):
        files[name] = parse(folder / name, files[name])
    for name in files.keys() & set(JSON):
        for key, value in entries(files[name]):
            check_entry(folder / name, key, value)
    return files


def read_text(path: Path) -> str | None:
    """None where there is none."""
    if not is_there(path):
        return None
    most = MOST.get(path.name, 2 * MB)
    if path.stat().st_size > most:
        raise ValueError(f"{path} is larger than {most // MB} MB, unlike Qwen3-VL's: {FETCH}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): {FETCH}") from None


def is_there(path: Path) -> bool:
    """ValueError for anything but a regular file, and for a Git-LFS pointer.

    Links must stay in the folder or lead to the hub's cache: files read here are saved again with
    the trained model, and a link might lead to any file of yours. Of weights only tensors are read,
    so they may be elsewhere.
    """
    try:
        target, home = path.resolve(strict=True), path.parent.resolve()
        if not target.is_file():
            raise ValueError(f"{path} is not a plain file: {FETCH}")
        with target.open("rb") as file:
            start = file.read(40)
    except FileNotFoundError:
        if path.is_symlink():
            raise ValueError(f"{path} is a broken link: {FETCH}") from None
        return False
    except (OSError, RuntimeError) as error:  # permissions, links in a circle
        raise ValueError(f"{path} cannot be read ({error}): check its permissions") from None
    cached = target.parent == home.parent.parent / "blobs"
    if path.suffix != ".safetensors" and home not in target.parents and not cached:
        raise ValueError(
            f"{path} is a link to outside its folder: replace it with a copy of its target, if you"
            " trust that"
        )
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a Git-LFS pointer and not the file itself: run `git lfs pull` "
            f"in {path.parent}"
        )
    return True


def parse(path: Path, text: str) -> dict:
    """A JSON object of finite numbers, no deeper than `DEEPEST`."""

    def refuse(name: str):
        raise ValueError(f"{name} is not a number of JSON")

    try:
        content = json.loads(text, object_pairs_hook=each_key_once, parse_constant=refuse)
        if not isinstance(content, dict):
            raise ValueError("it is not an object")
        for _ in entries(content):
            pass
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not usable JSON ({error}), perhaps cut off: {FETCH}") from None
    return content


def entries(value, depth: int = 0) -> Iterator[tuple]:
    """Every (key, value) inside."""
    if depth > DEEPEST:
        raise ValueError(f"it is nested more than {DEEPEST} deep")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is too large")
    if isinstance(value, dict):
        yield from value.items()
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for inner in inside:
        if inner and isinstance(inner, dict | list | float):
            yield from entries(inner, depth + 1)


def shown(text) -> str:
    """Untrusted text without control characters."""
    return printable(str(text)[:100])


def check_entry(path: Path, key: str, value) -> None:
    """ValueError for an entry that names code, a kernel or a file."""
    if value in (None, False):
        return
    asks, values = KEYS.get(key), value if isinstance(value, list) else [value]
    if key == "quantization_config":
        method = value.get("quant_method", "?") if isinstance(value, dict) else "?"
        raise ValueError(f"{path}: its weights are quantised ({shown(method)}), {BASE}")
    if key.endswith("attn_implementation") and value not in ATTENTIONS:
        asks = "for kernels, which are code"
    if key.endswith(("_file", "_files")) and any(set(str(name)) & set("/\\") for name in values):
        asks = "for a file outside the folder"
    if asks:
        raise ValueError(
            f"{path} asks {asks} ({shown(key)}), which minigrpo never does: remove that entry if"
            " the model works without it"
        )


def check_tokenizer(path: Path, content: dict) -> None:
    """Check that it is a byte-level BPE like Qwen3-VL's. Other parts can turn a word into a
    gigabyte, and a pattern with nested repetition can search forever.
    """
    for part, kinds in PARTS.items():
        for key, value in entries({part: content.get(part)}):
            if (
                key == "type"
                and value not in kinds
                or key == "Regex"
                and (len(str(value)) > 1000 or re.search(r"\)[*+?{]", str(value)))
            ):
                raise ValueError(f"{path}: {part} is not Qwen3-VL's ({key} {value!r:.50}): {FETCH}")
    model = content.get("model")
    if not isinstance(model, dict) or model.get("dropout"):
        raise ValueError(
            f"{path}: model is not a BPE that always splits a text the same way: {FETCH}"
        )


def weight_files(folder: Path, files: dict) -> list[Path]:
    """model.safetensors, or the shards of its index, in the folder itself; there or not."""
    single, index = folder / "model.safetensors", files.get(INDEX)
    if index is None:
        return [single]
    shards = index.get("weight_map")
    names = list(shards.values()) if isinstance(shards, dict) and shards else ["no weight_map"]
    for name in names:
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", str(name), re.ASCII):
            raise ValueError(
                f"{folder / INDEX} names {name!r:.200}, which is not a safetensors file in the"
                f" folder: {FETCH}"
            )
    if single.name not in names and is_there(single):
        raise ValueError(
            f"{folder} holds both {single.name} and {INDEX}: remove the one that does not belong to"
            " this model"
        )
    return [folder / name for name in sorted(set(names))]


def read_headers(paths: list[Path]) -> dict[str, tuple[tuple[int, ...], Path]]:
    """Shape and file of each weight; no values are read. ValueError for a file that is missing, cut
    off, a pickle, or contains anything but floats.
    """
    held = {}
    for path in paths:
        if not is_there(path):
            pickles = [other.name for other in path.parent.iterdir() if other.suffix in PICKLES]
            raise ValueError(
                f"{path.parent} has no safetensors file {path.name}"
                + (
                    f"; {shown(pickles[0])} is a pickle, which can run any code when it is read:"
                    " convert it to safetensors in a place where that is safe"
                    if pickles
                    else f": {FETCH}"
                )
            )
        try:
            with safe_open(path, "pt") as stored:
                if len(stored.keys()) > MOST_WEIGHTS:
                    raise ValueError(f"{path} holds more than {MOST_WEIGHTS:,} weights: {FETCH}")
                for name in stored.keys():
                    part = stored.get_slice(name)
                    kind = part.get_dtype()
                    if name in held:
                        raise ValueError(f"{path} and {held[name][1]} hold {name!r}: {FETCH}")
                    if kind not in FLOATS:
                        raise ValueError(f"{path}: {shown(name)} is quantised ({kind}), {BASE}")
                    held[name] = tuple(part.get_shape()), path
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is cut off or damaged ({shown(error)}): {FETCH}") from None
    return held
