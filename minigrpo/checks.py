"""Checks whether the files of a checkpoint belong together, and to a Qwen3-VL.

A fault is a ValueError that names the file, what is wrong, and what to do.
"""

import math
import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.utils import logging as transformers_logging

from minigrpo.bounded import try_out
from minigrpo.choices import SMALLEST
from minigrpo.visible import text_of

END = "<|im_end|>"  # what SFT teaches an answer to end with
PLACES = {
    "image_token_id": "<|image_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
PROBE = "Where is the heart? At [0.25, 1], é."
ROPES = ("default", "linear", "yarn", "llama3")
ORIGIN = "copy it from the model that this one was made from"

# The whole numbers of config.json, each with the most that is believed before weights are seen.
COUNTS = {
    "text_config": (
        {"num_hidden_layers": 200}
        | dict.fromkeys(
            (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "max_position_embeddings",
            ),
            2**24,
        )
    ),
    "vision_config": (
        {"depth": 200}
        | dict.fromkeys(
            (
                "hidden_size",
                "intermediate_size",
                "num_heads",
                "in_channels",
                "patch_size",
                "temporal_patch_size",
                "spatial_merge_size",
                "out_hidden_size",
                "num_position_embeddings",
            ),
            2**24,
        )
    ),
}


@dataclass
class Checkpoint:
    """The contents of a folder."""

    name: str
    folder: Path
    model: Qwen3VLForConditionalGeneration  # on the meta device: all of it but its numbers
    tokenizer: PreTrainedTokenizerBase | None = None
    images: Qwen2VLImageProcessorPil | None = None
    image_file: str = "preprocessor_config.json"
    video: dict = field(default_factory=dict)
    generation: GenerationConfig | None = None
    weights: dict[str, Path] = field(default_factory=dict)  # the file of each, where asked for

    @property
    def config(self) -> Qwen3VLConfig:
        return self.model.config

    @property
    def rows(self) -> int:
        return self.config.text_config.vocab_size

    @property
    def cuts(self) -> tuple[tuple, tuple]:
        """How images are cut into patches, and how the vision tower expects them."""
        images, tower = self.images, self.config.vision_config
        return (
            (images.patch_size, images.temporal_patch_size, images.merge_size),
            (tower.patch_size, tower.temporal_patch_size, tower.spatial_merge_size),
        )

    @property
    def greys(self) -> tuple[float, float]:
        """The smallest model input for a black pixel, and the largest for a white one."""
        images = self.images
        scale = images.rescale_factor if images.do_rescale else 1.0
        if not images.do_normalize:
            return 0.0, 255 * scale
        mean, std = images.image_mean, images.image_std
        return (
            min(-m / s for m, s in zip(mean, std)),
            max((255 * scale - m) / s for m, s in zip(mean, std)),
        )

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        return self.tokenizer.get_vocab()

    def token(self, text: str | None) -> int | None:
        """The id of a text that the tokenizer has as one token."""
        return self.vocabulary.get(text)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


class Check(NamedTuple):
    file: str
    holds: Callable[..., bool]  # an exception is a no
    fault: str  # a format of what `holds` takes
    mend: str = ORIGIN


def sections(text: Qwen3VLTextConfig) -> list[int]:
    """The numbers of M-RoPE frequencies for time, height and width."""
    return text.rope_parameters["mrope_section"]


CONFIG = [
    Check("config.json", *row)
    for row in (  # of text_config t and vision_config v
        (
            lambda t, v: t.num_attention_heads % t.num_key_value_heads == 0,
            (
                "num_attention_heads {t.num_attention_heads} is not a multiple of"
                " num_key_value_heads {t.num_key_value_heads}"
            ),
        ),
        (
            lambda t, v: v.hidden_size % (4 * v.num_heads) == 0,
            (
                "vision_config: hidden_size {v.hidden_size} is not num_heads {v.num_heads} times a"
                " multiple of 4"
            ),
        ),
        (
            lambda t, v: v.out_hidden_size == t.hidden_size,
            (
                "out_hidden_size {v.out_hidden_size} of vision_config is not hidden_size"
                " {t.hidden_size} of text_config"
            ),
        ),
        (
            lambda t, v: (
                (v.patch_size, v.temporal_patch_size, v.in_channels) == (16, 2, 3)
                and v.spatial_merge_size <= 8
            ),
            (
                "patch_size {v.patch_size}, temporal_patch_size {v.temporal_patch_size},"
                " in_channels {v.in_channels} and spatial_merge_size {v.spatial_merge_size} are not"
                " Qwen3-VL's 16, 2, 3, 2"
            ),
        ),
        (
            lambda t, v: (
                len(v.deepstack_visual_indexes)
                == len(set(v.deepstack_visual_indexes))
                <= t.num_hidden_layers
                and set(v.deepstack_visual_indexes) <= set(range(v.depth))
            ),
            "deepstack_visual_indexes are not layers of a vision tower of depth {v.depth}",
        ),
        (
            lambda t, v: 0 < t.rms_norm_eps < 1,
            "rms_norm_eps {t.rms_norm_eps} is not between 0 and 1",
        ),
        (
            lambda t, v: (
                t.rope_parameters["rope_type"] in ROPES
                and t.rope_parameters["rope_theta"] > 0
                and [2 * sum(sections(t)), len(sections(t))] == [t.head_dim, 3]
                and min(sections(t)) > 0
            ),
            "{t.rope_parameters} is not a rotary embedding of Qwen3-VL for heads of {t.head_dim}",
        ),
    )
]
WHOLE = [
    Check(*row)
    for row in (  # of a checkpoint c
        (
            "tokenizer.json",
            lambda c: max(c.vocabulary.values()) < c.rows,
            "it has more tokens than the model has embeddings ({c.rows})",
        ),
        (
            "tokenizer.json",
            lambda c: all([c.token(text)] == c.ids(text) for text in (END, *PLACES.values())),
            f"{END}, {', '.join(PLACES.values())}: one of these is not a token of its own",
        ),
        (
            "tokenizer.json",
            lambda c: c.tokenizer.decode(c.ids(PROBE)) == PROBE,
            f"the tokens of {PROBE!r} do not decode to that text again",
        ),
        (
            "config.json",
            lambda c: all(getattr(c.config, key) == c.token(text) for key, text in PLACES.items()),
            f"{', '.join(PLACES)} are not the tokenizer's ids of {', '.join(PLACES.values())}",
        ),
        (
            "tokenizer_config.json",
            lambda c: c.token(c.tokenizer.pad_token) is not None,
            "it names no pad_token that the tokenizer knows",
            'write "pad_token": "<|endoftext|>" into it',
        ),
        (
            "generation_config.json",
            lambda c: all(
                type(end) is int and end in c.tokenizer.added_tokens_decoder
                for end in c.generation.eos_token_id
            ),
            "its eos_token_id {c.generation.eos_token_id} are not special tokens of the tokenizer",
            "write the ids of <|im_end|> and <|endoftext|> there, [151645, 151643] in Qwen3-VL",
        ),
        (
            "{c.image_file}",
            lambda c: c.cuts[0] == c.cuts[1],
            (
                "patch_size, temporal_patch_size and merge_size {c.cuts[0]} are not those of the"
                " vision tower in config.json, {c.cuts[1]}"
            ),
        ),
        (
            "{c.image_file}",
            lambda c: (
                0 < c.images.size["shortest_edge"] <= c.images.size["longest_edge"] < 2**40
                and c.images.size["shortest_edge"] <= 2**22
                and c.images.size["longest_edge"] >= SMALLEST
            ),
            "size {c.images.size} is not the smallest and the largest number of pixels",
        ),
        (
            "{c.image_file}",
            lambda c: (
                len(c.images.image_mean) == len(c.images.image_std) == 3
                and min(c.images.image_std) > 0
                and max(map(abs, c.images.image_mean)) < math.inf
                and c.images.rescale_factor > 0
                and max(map(abs, c.greys)) <= 10
                and c.greys[1] - c.greys[0] >= 0.1
                and c.images.resample in range(6)
                and c.images.do_resize is c.images.do_convert_rgb is True
                and {c.images.do_rescale, c.images.do_normalize} <= {True, False}
            ),
            (
                "image_mean, image_std, rescale_factor, resample or one of do_resize,"
                " do_convert_rgb, do_rescale and do_normalize differs from Qwen3-VL's, which turn"
                " black into -1 and white into 1"
            ),
        ),
    )
]


@contextmanager
def reading(what: str | Path, mend: str = ORIGIN):
    """A context: whatever transformers, torch or a Rust library raises in it is a fault of
    `what`.
    """
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its warnings repeat what a stranger wrote
    try:
        yield
    except BaseException as error:
        if not is_fault(error):
            raise
        said = " ".join((text_of(error).strip() or type(error).__name__).split())
        raise ValueError(f"{what} cannot be used ({said[:300]!r}): {mend}") from None
    finally:
        transformers_logging.set_verbosity(level)


def is_fault(error: BaseException) -> bool:
    """Not Ctrl-C or an exit. A panic in Rust is not an Exception but has a class of its own."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def check_counts(path: Path, content: dict) -> None:
    """Check numbers of layers, widths and so on in config.json, before they are used."""
    for part, counts in COUNTS.items():
        if not isinstance(content.get(part), dict):
            raise ValueError(f"{path} has no {part}: {ORIGIN}")
        for key, most in counts.items():
            number = content[part].get(key)
            if type(number) is not int or not 1 <= number <= most:
                raise ValueError(
                    f"{path}: {part}.{key} is {number!r:.100}, and must be a whole "
                    f"number from 1 to {most}: {ORIGIN}"
                )
    for key in ("rope_scaling", "rope_parameters"):
        rope = content["text_config"].get(key) or {}
        kind = rope.get("rope_type", rope.get("type", ROPES[0])) if isinstance(rope, dict) else None
        if kind not in ROPES:
            raise ValueError(f"{path}: text_config.{key} {rope!r:.200} is not Qwen3-VL's: {ORIGIN}")


def check_config(folder: Path, config: Qwen3VLConfig) -> None:
    _run(CONFIG, folder, t=config.text_config, v=config.vision_config)


def check_whole(c: Checkpoint) -> None:
    _run(WHOLE, c.folder, c=c)
    check_template(c)


def _run(checks: list[Check], folder: Path, **of) -> None:
    for check in checks:
        try:
            holds = check.holds(**of)
        except BaseException as error:  # such as a text where a number belongs
            if not is_fault(error):
                raise
            holds = False
        if not holds:
            file, fault = check.file.format(**of), check.fault.format(**of)
            raise ValueError(f"{folder / file}: {fault[:500]}: {check.mend}")


def check_template(c: Checkpoint) -> None:
    """Check that it writes images, questions and answers where `Policy` looks for them, in time. A
    template is a program: transformers' sandbox keeps it from files and from Python, `try_out` from
    endless loops and strings of gigabytes.
    """

    def wrote(*turns, answer: bool = True) -> str:
        roles = ("user", "assistant", "user")
        messages = [{"role": role, "content": content} for role, content in zip(roles, turns)]
        return c.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer
        )

    def probe() -> None:
        for count in (1, 2, 0):
            asked = [{"type": "image"}] * count + [{"type": "text", "text": PROBE}]
            text, closed = wrote(asked), wrote(asked, answer=False)
            for token in ("<|image_pad|>", "<|vision_end|>"):
                if text.count(token) != count:
                    raise ValueError(f"it writes {text.count(token)} {token} for {count} images")
            if text.count(PROBE) != 1 or text.find(PROBE) < text.rfind("<|vision_end|>"):
                raise ValueError("it does not write a question once, after its images")
            if not text.startswith(closed) or text == closed:
                raise ValueError("it does not begin the assistant's turn (add_generation_prompt)")
        first, _, second = wrote("One?", "Seen.", "Two?").rpartition(END)[0].rpartition(END)
        if "Seen." not in first or "Two?" not in second or "Seen." in second:
            raise ValueError(f"it does not end each turn of a conversation with {END}")

    try:
        try_out(probe)
    except ValueError as error:
        raise ValueError(
            f"{c.folder}: the chat template (chat_template.jinja, chat_template.json, "
            f"tokenizer_config.json) cannot be used: {error}: {ORIGIN}"
        ) from None


def check_weights(c: Checkpoint, held: dict[str, tuple[tuple[int, ...], Path]]) -> list[str]:
    """Compare names and shapes of the weights in their files with those that config.json requires,
    before memory is allocated. Returns superfluous ones.
    """
    path, asked = c.folder / "config.json", c.model.state_dict()
    if c.config.tie_word_embeddings:
        del asked["lm_head.weight"]
        if "lm_head.weight" in held and not is_tied(held):
            raise ValueError(
                f"{path} says that the head and the embeddings are tied (tie_word_embeddings), but"
                " the weights hold two that differ: set it to false"
            )
    for part, place in (
        ("text_config.num_hidden_layers", "model.language_model.layers"),
        ("vision_config.depth", "model.visual.blocks"),
    ):
        number = re.compile(rf"{re.escape(place)}\.(\d+)\.")
        layers = [
            len({match[1] for match in map(number.match, names) if match})
            for names in (asked, held)
        ]
        if layers[0] != layers[1]:
            raise ValueError(
                f"{path}: {part} is {layers[0]}, and the weights have {layers[1]}: take both from"
                " one model"
            )
    if absent := sorted(asked.keys() - held.keys()):
        raise ValueError(
            f"{c.folder} lacks {len(absent)} weights that its config.json requires, "
            f"such as {absent[0]}: fetch it again, or check that config.json belongs "
            "to it"
        )
    for name, weight in asked.items():
        size, file = held[name]
        if size != tuple(weight.shape):
            raise ValueError(
                f"{file}: {name} has shape {size}, and config.json requires {tuple(weight.shape)}:"
                " take both from one model"
            )
    return sorted(
        name
        for name in held.keys() - asked.keys() - {"lm_head.weight"}
        if not name.endswith("inv_freq")
    )


def is_tied(held: dict[str, tuple[tuple[int, ...], Path]]) -> bool:
    pair = []
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        if name not in held:
            return True  # nothing to differ from: it is missed later
        with safe_open(held[name][1], "pt") as stored:
            pair.append(stored.get_tensor(name))
    return torch.equal(*pair)


def check_finite(path: Path, model: torch.nn.Module) -> None:
    """Check the minimum and maximum of each weight, which are NaN if any element is."""
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        if not all(bound.isfinite() for bound in weight.aminmax()):
            raise ValueError(
                f"{path}: the weight {name} holds NaN or infinity. The training that wrote it"
                " diverged: give an earlier checkpoint"
            )
