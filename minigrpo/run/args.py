"""Arguments of the programs: dataclasses on the command line, or from a YAML or JSON file, and
their errors.
"""

import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
import yaml
from transformers import HfArgumentParser

from minigrpo.checkpoint import SMALLEST
from minigrpo.data import TASKS, DataError
from minigrpo.packages import need
from minigrpo.run.distributed import is_lost, ranks, speak_in_turn
from minigrpo.run.files import WriteError
from minigrpo.run.names import hint
from minigrpo.run.terminal import fail, path_of, steady_output

T = TypeVar("T")
PARTS = ("vision", "projector", "language")  # of a Qwen3-VL, to freeze
TRACKERS = ("tensorboard", "wandb")  # named like the packages that they need
LARGEST_SEED = 2**40
SETTINGS = (".yaml", ".yml", ".json")
PATHS = (
    "model",
    "train_data",
    "eval_data",
    "data",
    "output_dir",
    "output",
    "image",
    "predictions",
    "baseline",
    "reward_weights",
    "json",
    "page",
)  # arguments in which ~ is the home folder
# the language model's, for adapters
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class RunArguments:
    """What every training program takes; each adds a learning rate and a warm-up of its own."""

    model: str = field(
        metadata={
            "help": (
                "checkpoint folder or hub name of a dense Qwen3-VL; for train_sft.py also `tiny`: a"
                " small random one"
            )
        }
    )
    train_data: str = field(metadata={"help": "JSONL file of training samples"})
    output_dir: str = field(
        metadata={
            "help": (
                "run folder to make: args.json, starts.jsonl, metrics.jsonl, curves.png,"
                " checkpoints/, final/"
            )
        }
    )
    task: str = field(
        default="all",
        metadata={"help": "train on samples of this task only", "choices": [*TASKS, "all"]},
    )
    max_steps: int = field(
        default=300, metadata={"help": "optimisation steps (for GRPO: rollout batches)"}
    )
    save_steps: int = field(
        default=50, metadata={"help": "save a checkpoint to resume from every so many steps"}
    )
    keep_checkpoints: int = field(
        default=2, metadata={"help": "how many of the newest checkpoints stay"}
    )
    eval_data: str | None = field(
        default=None,
        metadata={
            "help": (
                "JSONL file of validation samples; the weights that do best on them are kept in"
                " best/"
            )
        },
    )
    eval_steps: int = field(
        default=50, metadata={"help": "validate every so many steps, if there is --eval_data"}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's decoupled weight decay"})
    grad_clip: float = field(
        default=1.0, metadata={"help": "gradients of a larger norm are scaled down to it"}
    )
    max_grad_norm: float = field(
        default=1e4,
        metadata={
            "help": (
                "an update whose gradient norm is above this, or not a number, is skipped and its"
                " batch kept in skipped/"
            )
        },
    )
    max_skipped: int = field(
        default=10, metadata={"help": "stop the run when so many updates were skipped"}
    )
    track: list[str] = field(
        default_factory=list,
        metadata={"help": "also log to these, which must be installed", "choices": list(TRACKERS)},
    )
    seed: int = field(
        default=0,
        metadata={"help": "seeds the data order, sampling and, for --model tiny, the weights"},
    )
    resume: bool = field(
        default=False, metadata={"help": "continue the run in output_dir from its last checkpoint"}
    )
    device: str = field(
        default="auto", metadata={"help": "cpu, cuda, or auto: cuda where there is one"}
    )
    max_pixels: int = field(
        default=0,
        metadata={
            "help": (
                "images of more pixels are shrunk to so many, in training and, since the checkpoint"
                " keeps the number, wherever it is used later; 1,024 are a token (the paper:"
                " 262144); 0: what --model was made for"
            )
        },
    )
    freeze: list[str] = field(
        default_factory=list,
        metadata={
            "help": (
                "what to keep as it is: the vision tower, the projector behind it, the language"
                " model; cheaper, and less to unlearn"
            ),
            "choices": list(PARTS),
        },
    )
    lora_rank: int = field(
        default=0,
        metadata={
            "help": (
                "train adapters of this rank instead of the weights (LoRA, 2106.09685; needs peft);"
                " 0: off. GRPO's reference is then the model with its adapters off. They want a"
                " learning rate about ten times as high"
            )
        },
    )
    lora_alpha: float = field(
        default=32.0, metadata={"help": "adapters count lora_alpha / lora_rank times"}
    )
    lora_targets: list[str] = field(
        default_factory=lambda: list(LINEAR),
        metadata={
            "help": "linear layers of the language model that get adapters",
            "choices": list(LINEAR),
        },
    )
    bf16: bool = field(
        default=False, metadata={"help": "compute in bfloat16 (weights and optimiser stay in fp32)"}
    )
    activation_checkpointing: bool = field(
        default=False,
        metadata={
            "help": (
                "keep the input of each layer alone for the backward pass, which computes the rest"
                " anew: less memory, more time"
            )
        },
    )
    shard: bool = field(
        default=False,
        metadata={
            "help": (
                "under torchrun, cut up the decoder layers over the ranks (FSDP2): for full"
                " fine-tuning of 8B on cards of 80 GB; slower"
            )
        },
    )
    plan: float | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": 0.0,
            "metavar": "GB",
            "help": (
                "load nothing, and print what the run will take of the memory at hand, or of so"
                " many GB, and the settings that fit"
            ),
        },
    )

    def check(self) -> None:
        """Settings that can't work are an error now, not after hours."""
        for name, value in vars(self).items():
            if value != value:  # NaN passes every test for being too small or too large
                raise ValueError(f"--{name} is nan: give it a number")
        if abs(self.seed) > LARGEST_SEED:
            raise ValueError(
                f"--seed {self.seed} is too large: the seeds of epochs and steps are made of it;"
                f" {LARGEST_SEED} at most"
            )
        for name in ("max_steps", "save_steps", "keep_checkpoints", "eval_steps", "max_skipped"):
            at_least_one(self, name)
        for name in ("learning_rate", "grad_clip"):  # a clip at 0 would zero every gradient
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name} must be a number above 0, got {getattr(self, name)}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(
                f"--warmup must lie in 0..1, got {self.warmup}: it is a share of the steps"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"--weight_decay must be 0 or more, got {self.weight_decay}")
        if self.max_grad_norm <= 0:
            raise ValueError(
                f"--max_grad_norm must be above 0, got {self.max_grad_norm}: larger gradients are"
                " skipped"
            )
        for name in self.track:
            need(f"--track {name}", name)
        if self.eval_data and os.path.realpath(self.eval_data) == os.path.realpath(self.train_data):
            raise ValueError(
                f"--eval_data {self.eval_data} is the training data: best/ would hold what knows it"
                " by heart. Keep some patients apart"
            )
        check_pixels(self.max_pixels)
        if self.plan is not None and (self.model == "tiny" or not 0 <= self.plan < math.inf):
            raise ValueError(
                "--plan is for a checkpoint, and takes the GB of a device or nothing: a tiny model"
                " fits anywhere"
                if self.model == "tiny"
                else f"--plan takes the GB of a device, got {self.plan}"
            )
        if self.lora_rank < 0:
            raise ValueError(f"--lora_rank must be 0 (off) or more, got {self.lora_rank}")
        if set(self.freeze) == set(PARTS):
            raise ValueError(f"--freeze {' '.join(self.freeze)}: nothing is left to train")
        if self.shard and (self.lora_rank or "language" in self.freeze):
            raise ValueError(
                f"--shard with {'--lora_rank' if self.lora_rank else '--freeze language'}: it cuts"
                " up layers that are trained, and here theirs are frozen; leave out --shard"
            )
        if self.lora_rank:
            need("--lora_rank", "peft")
            if self.lora_alpha <= 0:
                raise ValueError(
                    f"--lora_rank {self.lora_rank} needs --lora_alpha above 0, got"
                    f" {self.lora_alpha}"
                )
            if "language" in self.freeze:
                raise ValueError(
                    "--freeze language with --lora_rank: the adapters are in the language model,"
                    " and all else is frozen already; leave out --freeze"
                )
        elif self.lora_alpha != RunArguments.lora_alpha or self.lora_targets != list(LINEAR):
            raise ValueError(
                "--lora_alpha and --lora_targets are of adapters: add --lora_rank, or leave them"
                " out to train the weights"
            )
        self.device = checked_device(self.device)

    def inert(self) -> list[str]:
        """Settings that have no effect beside the others, said once in the log, so that nobody
        tunes them.
        """
        notes = [
            (
                self.eval_data and self.eval_steps > self.max_steps,
                (
                    f"--eval_steps {self.eval_steps} is above --max_steps {self.max_steps}: "
                    "--eval_data is never looked at, and nothing is kept in best/"
                ),
            ),
            (
                self.shard and ranks() == 1,
                "--shard: there is one process, which holds all; torchrun starts more",
            ),
        ]
        return [note for holds, note in notes if holds]


def checked_device(name: str, argument: str = "--device") -> str:
    """What --device (or another `argument`) means on this machine: auto is cuda where there is one.
    ValueError for a device that is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"{argument} {name!r} is no device: write cpu, cuda, or cuda:1 for the second GPU"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"{argument} {name}: torch {torch.__version__} finds no GPU here; write cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{argument} {name}: there are {torch.cuda.device_count()} GPUs here, and the first is"
            " cuda:0"
        )
    return name


def check_pixels(number: int) -> None:
    """ValueError for a --max_pixels that holds no image token."""
    if number and number < SMALLEST:
        raise ValueError(
            f"--max_pixels {number} is less than one token of 32 x 32 pixels: give {SMALLEST} or"
            " more, or 0 for what --model was made for"
        )


def check_box_scale(number: float) -> None:
    """ValueError for a --box_scale that nothing can be divided by."""
    if not 0 < number < math.inf:
        raise ValueError(
            f"--box_scale must be above 0, got {number}: 1 for fractions, 1000 for Qwen3-VL's own"
        )


def at_least_one(args, name: str) -> None:
    """ValueError for an argument `name` that is below 1."""
    if getattr(args, name) < 1:
        raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")


def parse_args(kind: type[T], description: str, argv: list[str] | None = None) -> T:
    """`program.py --name value ...` or `program.py settings.yaml --name value ...`; the command
    line wins.
    """
    steady_output()
    argv = list(sys.argv[1:] if argv is None else argv)
    usage = "%(prog)s [settings.yaml] --name value ... (--help lists them all)"
    parser = HfArgumentParser(kind, description=description, usage=usage, allow_abbrev=False)
    if argv and argv[0].lower().endswith(SETTINGS):
        path = Path(path_of(argv.pop(0)))
        argv = words_of(read_settings(path), parser, path) + argv
    parsed, unknown = parser.parse_known_args(argv)
    for word in unknown:
        if word.lower().endswith(SETTINGS) and not word.startswith("-"):
            raise ValueError(
                f"{word}: a settings file comes first, and alone: {parser.prog} "
                f"{word} --name value ..."
            )
    if unknown:
        names = [action.dest for action in parser._actions]
        hints = [text for word in unknown if word.startswith("-") and (text := hint(word, names))]
        parser.error("\n".join([f"unrecognized arguments: {' '.join(unknown)}", *hints]))
    args = kind(**vars(parsed))
    for name in set(PATHS) & set(vars(args)):
        if getattr(args, name):
            setattr(args, name, path_of(getattr(args, name)))
    if hasattr(args, "check"):
        args.check()
    return args


def words_of(settings: dict, parser: HfArgumentParser, path: Path) -> list[str]:
    """Settings as the words of a command line, so that types and choices are checked as there.
    ValueError names file and setting.
    """
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    if unknown := [str(name) for name in settings if name not in actions]:
        hints = [text for name in unknown if (text := hint(name, list(actions)))]
        raise ValueError("\n".join([f"{path}: unknown settings: {', '.join(unknown)}", *hints]))
    words = []
    for name, value in settings.items():
        takes_list = actions[name].nargs == "+"
        if value in (None, []):  # as args.json writes what was left out
            if value != parser.get_default(name):
                raise ValueError(f"{path}: {name} is empty: give it a value, or leave it out")
        elif isinstance(value, dict) or isinstance(value, list) != takes_list:
            raise ValueError(
                f"{path}: {name} takes {'a list' if takes_list else 'one value'}, got {value!r}"
            )
        elif actions[name].type in (int, float) and re.fullmatch(r"[-+]?0\d+", str(value)):
            raise ValueError(
                f"{path}: {name} is {value}, which YAML reads by eights and people by "
                "tens: write it without the leading 0"
            )
        else:
            words += [f"--{name}", *map(str, value)] if takes_list else [f"--{name}={value}"]
    return words


class _Settings(yaml.BaseLoader):
    """YAML whose values stay the text that stands there, as on a command line: a folder called no
    is not False. Only null is None."""

    def construct_mapping(self, node, deep=False):
        return _once(
            [
                (
                    str(self.construct_object(key, deep=True)),
                    self.construct_object(value, deep=True),
                )
                for key, value in node.value
            ]
        )


_Settings.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_Settings.add_constructor("tag:yaml.org,2002:null", lambda loader, node: None)


def _once(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"{twice} stands there twice: which one counts? Remove the other")
    return found


def read_settings(path: Path) -> dict:
    """The `name: value` pairs of a YAML or JSON file; a value is a text, None, or a list of
    such.
    """
    try:
        text = path.read_bytes()  # bytes, so that the parsers find out the encoding
        if path.suffix.lower() == ".json":
            settings = json.loads(
                text, object_pairs_hook=_once, parse_int=str, parse_float=str, parse_constant=str
            )
        else:
            settings = yaml.load(text, _Settings)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such settings file") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a settings file ({error.strerror})") from None
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML or JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path} must hold `name: value` pairs, the same names as on the command line"
        )
    return settings


@contextmanager
def input_errors():
    """Around a program's set-up: what the user gave wrong ends the program with one message instead
    of a traceback.
    """
    try:
        yield
    # a path that is too long, that is missing, that may not be read
    except (ValueError, OSError) as error:
        speak_in_turn()
        fail(error)
    except (MemoryError, RuntimeError) as error:
        if is_lost(error):
            sys.exit(1)  # the rank that failed has said why
        if not out_of_memory(error):
            raise
        fail(
            f"{_first_line(error)}. Take a smaller --model, or a machine with more memory; --plan "
            "says what a run will take"
        )


@contextmanager
def run_errors(advice: Callable[[], str], memory: str):
    """Around what follows the set-up: what comes from outside, such as a full disk, a film that is
    gone, or too little memory, ends the program with one message, `advice` behind it. All else is
    a fault of the program and keeps its traceback.

    `memory` names the arguments to lower where memory runs out.
    """
    try:
        yield
        return
    except WriteError as error:
        text = f"{error}. Make room, or mend the cause"
    except DataError as error:
        text = str(error)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        text = f"{_first_line(error)}. Lower {memory}"
    fail(f"{text}. {advice()}")


def out_of_memory(error: BaseException) -> bool:
    """Whether torch, on a GPU or on a CPU, or Python found no memory."""
    named = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return named or "allocate memory" in str(error)


def _first_line(error: BaseException) -> str:
    return f"out of memory ({(str(error) or type(error).__name__).splitlines()[0]})"
