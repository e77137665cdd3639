"""The allowed contents of a RadGraph archive: the numbers and names listed here. Everything else is
refused by name.

The radgraph package builds what an archive's config.json names, and imports any dotted `type`:
`subprocess.Popen` as the type of a regularizer is a command that runs. So the package never sees
the file. It is checked here against lists of keys, types and ranges, and the model is built from
the values that pass.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# bytes of config.json and of one file of the vocabulary; real ones have a few kB
MOST_CONFIG, MOST_LABELS = 10**6, 10**5
MOST_VOCABULARIES = 8  # files in vocabulary/
MEND = "fetch the archive again, from its authors, and delete the folder into which it was unpacked"
# a name that the package has registered; one with a dot is a path to code
WORD = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
PADDING = "non_padded_namespaces.txt"
UNREAD = None  # in place of a rule: what only training used


@dataclass
class Archive:
    """What RadGraph is built from."""

    encoder: str  # name on the Hugging Face hub
    longest: int  # tokens of one pass through the encoder
    width: int  # words of the longest span
    settings: dict  # numbers for `DyGIE`
    special: tuple[str | None, str | None]  # the vocabulary's padding and unknown tokens
    vocabulary: dict[str, str]  # file name: text


def read_archive(folder: Path) -> Archive:
    """The unpacked archive in `folder`. ValueError names anything that does not belong there."""
    path = folder / "config.json"
    try:
        config = json.loads(_text(path, MOST_CONFIG))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): {MEND}") from None
    _check(config, CONFIG, path, "")
    reader, model = config["dataset_reader"], config["model"]
    bert, same = reader["token_indexers"]["bert"], model["embedder"]["token_embedders"]["bert"]
    agree = all(bert[name] == same[name] for name in ("model_name", "max_length"))
    if not agree or reader["max_span_width"] != model["max_span_width"]:
        raise ValueError(
            f"{path}: dataset_reader and model do not agree on encoder, max_length "
            f"and max_span_width: {MEND}"
        )
    settings = {name: model[name] for name in BUILT if name in model}
    words = config.get("vocabulary") or {}
    return Archive(
        bert["model_name"],
        bert["max_length"],
        reader["max_span_width"],
        settings,
        (words.get("padding_token"), words.get("oov_token")),
        _vocabulary(folder / "vocabulary"),
    )


def _vocabulary(folder: Path) -> dict[str, str]:
    paths = sorted(folder.glob("[!.]*"))
    odd = [
        path.name
        for path in paths
        if not re.fullmatch(r"[\w*-]+\.txt", path.name) or not path.is_file()
    ]
    if odd or len(paths) > MOST_VOCABULARIES or not (folder / PADDING).is_file():
        what = f"holds {odd[0]!r}" if odd else f"has {len(paths)} files, or no {PADDING}"
        raise ValueError(f"{folder} {what}, and is therefore not a vocabulary of RadGraph: {MEND}")
    return {path.name: _text(path, MOST_LABELS) for path in paths}


def _text(path: Path, most: int) -> str:
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} is larger than {most:,} bytes: {MEND}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): {MEND}") from None


# ---- what may stand where: a dict of keys (with a ? they may be left out), or a test of a value --


def _check(value: Any, allowed: dict | Callable | None, path: Path, where: str) -> None:
    if allowed is UNREAD:
        return _plain(value, path, where)
    if not isinstance(allowed, dict):
        if not allowed(value):
            raise ValueError(
                f"{path}: {where} is {str(value)[:80]!r}, which no RadGraph has: {MEND}"
            )
        return
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {where or 'it'} is not an object: {MEND}")
    keys = {key.removesuffix("?"): rule for key, rule in allowed.items()}
    for key in value:
        if key not in keys:
            raise ValueError(
                f"{path}: {where}{'.' if where else ''}{str(key)[:80]} is unknown and therefore not"
                f" read: {MEND}"
            )
    for key, rule in allowed.items():
        name = f"{where}{'.' if where else ''}{key.removesuffix('?')}"
        if key in value or key.removesuffix("?") in value:
            _check(value[key.removesuffix("?")], rule, path, name)
        elif not key.endswith("?"):
            raise ValueError(f"{path}: {name} is missing: {MEND}")


def _plain(value: Any, path: Path, where: str) -> None:
    """Entries that are not read must not name code either: other programs could read them."""
    waiting = [(where, value)]
    while waiting:
        where, part = waiting.pop()
        inside = part.items() if isinstance(part, dict) else ()
        for key, inner in enumerate(part) if isinstance(part, list) else inside:
            word = isinstance(inner, str) and WORD.fullmatch(inner)
            if key == "_pretrained" or key == "type" and not word:
                raise ValueError(
                    f"{path}: {where}.{key} is {str(inner)[:80]!r}, which could be code: {MEND}"
                )
            waiting.append((f"{where}.{str(key)[:80]}", inner))


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _number(low: float, high: float) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value) and low <= value <= high

    return fits


def _one_of(*words: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in words


def _text_of(most: int) -> Callable[[Any], bool]:
    return lambda value: value is None or isinstance(value, str) and len(value) <= most


def _flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _nothing(value: Any) -> bool:
    return value is None


def _hub_name(value: Any) -> bool:
    short = isinstance(value, str) and len(value) <= 200 and ".." not in value
    return short and HUB_NAME.fullmatch(value) is not None


def _hidden(value: Any) -> bool:
    sizes = value if isinstance(value, list) else [value]
    return 0 < len(sizes) <= 4 and all(map(_whole(1, 4096), sizes))


BERT = {
    "type": _one_of("pretrained_transformer_mismatched"),
    "model_name": _hub_name,
    "max_length": _whole(8, 8192),
    "namespace?": _text_of(64),
    "token_min_padding_length?": _whole(0, 8192),
    "train_parameters?": _flag,
    "gradient_checkpointing?": _flag,
    "last_layer_only?": lambda value: value is True,
}
WEIGHTS = _number(0, 1e6)
# The arguments of the package's DyGIE that archives may set.
BUILT = {
    "max_span_width": _whole(1, 64),
    "feature_size": _whole(1, 256),
    "target_task": _one_of("ner", "relation", "coref", "events"),
    "feedforward_params": {
        "num_layers": _whole(1, 4),
        "hidden_dims": _hidden,
        "dropout": _number(0, 1),
    },
    "loss_weights": {f"{name}?": WEIGHTS for name in ("ner", "relation", "coref", "events")},
    "modules": {
        "ner": {"regularizer?": _nothing},
        "relation": {
            "spans_per_word": _number(0, 100),
            "positive_label_weight?": WEIGHTS,
            "regularizer?": _nothing,
        },
        "coref": {
            "spans_per_word": _number(0, 100),
            "max_antecedents": _whole(0, 10_000),
            "coref_prop?": _whole(0, 100),
            "coref_prop_dropout_f?": _number(0, 1),
            "regularizer?": _nothing,
        },
        "events": {
            "trigger_spans_per_word": _number(0, 100),
            "argument_spans_per_word": _number(0, 100),
            "loss_weights": {"trigger": WEIGHTS, "arguments": WEIGHTS},
            "regularizer?": _nothing,
        },
    },
}
CONFIG = {
    "type?": _one_of("default"),
    "dataset_reader": {
        "type?": _one_of("dygie"),
        "max_span_width": _whole(1, 64),
        "token_indexers": {"bert": BERT},
        "cache_directory?": _text_of(4096),
        "lazy?": _flag,
        "max_instances?": _nothing,
    },
    "model": {
        "type?": _one_of("dygie"),
        "embedder": {"type?": _one_of("basic"), "token_embedders": {"bert": BERT}},
        "initializer?": UNREAD,
        "module_initializer?": UNREAD,
        "regularizer?": _nothing,
        "display_metrics?": UNREAD,
        **BUILT,
    },
    "vocabulary?": {
        "type?": _one_of("from_files", "from_instances", "extend"),
        "padding_token?": _text_of(64),
        "oov_token?": _text_of(64),
    },
    **{
        f"{name}?": UNREAD
        for name in (
            "trainer",
            "data_loader",
            "validation_data_loader",
            "validation_dataset_reader",
            "train_data_path",
            "validation_data_path",
            "test_data_path",
            "datasets_for_vocab_creation",
            "evaluate_on_test",
            "random_seed",
            "numpy_seed",
            "pytorch_seed",
            "batch_weight_key",
            "distributed",
        )
    },
}
