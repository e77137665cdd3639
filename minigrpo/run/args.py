"""Dataclasses filled from the command line, or from a YAML or JSON file, and errors that end a
program with one message.

Imports no torch (minigrpo/run/arguments.py says why).
"""

import argparse
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml

from minigrpo.choices import SMALLEST
from minigrpo.once import each_key_once
from minigrpo.run.files import WriteError
from minigrpo.run.names import hint
from minigrpo.run.terminal import fail, path_of, speak_in_turn, steady_output

T = TypeVar("T")
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
FILES = ("train_data", "eval_data", "data", "image", "predictions", "baseline")  # to be read


def checked_device(name: str, argument: str = "--device") -> str:
    """What --device (or another `argument`) means on this machine: auto is cuda if there is a GPU.
    ValueError for a device that does not exist.
    """
    if name == "cpu":
        return name
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"{argument} {name!r} is not a device: write cpu, cuda, or cuda:1 for the second GPU"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"{argument} {name}: torch {torch.__version__} finds no GPU here; write cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{argument} {name}: there are {torch.cuda.device_count()} GPUs here, numbered from"
            " cuda:0"
        )
    return name


def check_pixels(number: int) -> None:
    """ValueError for a --max_pixels that holds no image token."""
    if number and number < SMALLEST:
        raise ValueError(
            f"--max_pixels {number} is less than one token of 32 x 32 pixels: give {SMALLEST} or"
            " more, or 0 for the limit of --model"
        )


def check_box_scale(number: float) -> None:
    """ValueError for a --box_scale that is not a positive number."""
    if not 0 < number < math.inf:
        raise ValueError(
            f"--box_scale must be above 0, got {number}: 1 for fractions, 1000 for an untuned"
            " Qwen3-VL"
        )


def at_least_one(args, name: str) -> None:
    """ValueError for an argument `name` that is below 1."""
    if getattr(args, name) < 1:
        raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")


def answer_early(kind: type[T], description: str) -> None:
    """At the very start of a program, before its imports, which take seconds: --help, and errors in
    the arguments, or in the files they name, that can be found without torch.
    """
    with input_errors():
        check_files(read_args(kind, description))


def parse_args(kind: type[T], description: str, argv: list[str] | None = None) -> T:
    """`program.py --name value ...` or `program.py settings.yaml --name value ...`; the command
    line wins. Checked by `check` and `check_with_torch` of the dataclass, if it has them.
    """
    args = read_args(kind, description, argv)
    if hasattr(args, "check_with_torch"):
        args.check_with_torch()
    return args


def read_args(kind: type[T], description: str, argv: list[str] | None = None) -> T:
    """`parse_args` without torch, and so without `check_with_torch`."""
    steady_output()
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = parser_of(kind, description)
    if argv and argv[0].lower().endswith(SETTINGS):
        path = Path(path_of(argv.pop(0)))
        argv = words_of(read_settings(path), parser, path) + argv
    parsed, unknown = parser.parse_known_args(argv)
    for word in unknown:
        if word.lower().endswith(SETTINGS) and not word.startswith("-"):
            raise ValueError(
                f"{word}: give one settings file, before all arguments: {parser.prog} "
                f"{word} --name value ..."
            )
    if unknown:
        names = [action.dest for action in parser._actions if action.dest != argparse.SUPPRESS]
        hints = [text for word in unknown if word.startswith("-") and (text := hint(word, names))]
        parser.error("\n".join([f"unrecognized arguments: {' '.join(unknown)}", *hints]))
    args = kind(**vars(parsed))
    for name in set(PATHS) & set(vars(args)):
        if getattr(args, name):
            setattr(args, name, path_of(getattr(args, name)))
    if hasattr(args, "check"):
        args.check()
    return args


def check_files(args) -> None:
    """ValueError for an input file, or a model's folder, that does not exist."""
    for name in FILES:
        path = getattr(args, name, None)
        if path and not Path(path).exists():
            raise ValueError(
                f"--{name} {path}: no such file: check the path, or create the file first"
            )
    # any other name may be a model's on the hub: OWNER/NAME
    model = getattr(args, "model", None) or ""
    if (model.startswith((".", "/")) or model.count("/") > 1) and not Path(model).exists():
        raise ValueError(f"--model {model}: no such checkpoint folder: check the path")


class Parser(argparse.ArgumentParser):
    """With several ranks only the first prints, and its error ends the others."""

    def error(self, message: str) -> NoReturn:
        speak_in_turn()
        super().error(message)

    def _print_message(self, message: str, file=None) -> None:
        if not int(os.environ.get("RANK", 0)):
            super()._print_message(message, file)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Each option once, on lines of at most 100 columns."""

    def __init__(self, prog: str):
        width = min(100, shutil.get_terminal_size((100, 24)).columns)
        super().__init__(prog, max_help_position=30, width=width)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.dest == argparse.SUPPRESS:  # -h, --help
            return ", ".join(action.option_strings)
        value = f" {self._format_args(action, action.metavar)}" if action.metavar else ""
        return action.option_strings[0] + value


class HelpAction(argparse.Action):
    """Prints the help, without the options named in `const`."""

    def __call__(self, parser, namespace, values, option_string=None) -> NoReturn:
        for action in parser._actions:
            if action.dest in self.const:
                action.help = argparse.SUPPRESS
        parser.print_help()
        parser.exit()


def parser_of(kind: type, description: str) -> Parser:
    """An option for each field of the dataclass; `metadata` has further arguments for argparse.

    `kind.groups`, if present, is {title: names of fields}, and `kind.common` the names that --help
    shows; --help-all shows all.
    """
    known = {field.name: field for field in fields(kind)}
    groups, common = getattr(kind, "groups", {"options": known}), getattr(kind, "common", known)
    rare = [name for name in known if name not in common]
    lists = "--help lists the common ones, --help-all all" if rare else "--help lists them all"
    parser = Parser(
        description=description,
        usage=f"%(prog)s [settings.yaml] --name value ... ({lists})",
        allow_abbrev=False,
        add_help=False,
        formatter_class=HelpFormatter,
    )
    types = get_type_hints(kind)
    for title, names in groups.items():
        group = parser.add_argument_group(title)
        for name in names:
            if name in known:
                add_option(group, known[name], types[name])
    group = parser.add_argument_group("help")
    told = dict(action=HelpAction, nargs=0, dest=argparse.SUPPRESS, default=argparse.SUPPRESS)
    shown = "the common options" if rare else "this list"
    group.add_argument("-h", "--help", **told, const=rare, help=shown)
    if rare:
        group.add_argument("--help-all", **told, const=(), help=f"also the other {len(rare)}")
    return parser


def add_option(group: argparse._ArgumentGroup, field: Field, kind: Any) -> None:
    """--name, or --na-me: a text or number; true or false, or no value for true; or a list."""
    name, settings = field.name, dict(field.metadata)
    kind = next(iter(get_args(kind)), kind) if get_origin(kind) is not list else kind  # X | None
    notes = [f"one of {', '.join(settings['choices'])}"] if "choices" in settings else []
    if field.default is field.default_factory is MISSING:
        settings["required"] = True
        notes.append("required")
    else:
        default = field.default if field.default is not MISSING else field.default_factory()
        settings["default"] = default
        if default is not False and default not in (None, "", []):
            shown = " ".join(default) if isinstance(default, list) else default
            notes.append(f"default: {shown}")
    if kind is bool:
        settings |= dict(type=yes_or_no, nargs="?", const=True)
    elif get_origin(kind) is list:
        settings |= dict(type=get_args(kind)[0], nargs="+", metavar="NAME")
    else:
        settings |= dict(type=kind)
        settings.setdefault("metavar", {int: "N", float: "X"}.get(kind, "TEXT"))
    said = settings["help"] + (f" ({'; '.join(notes)})" if notes else "")
    settings["help"] = said.replace("%", "%%")  # argparse fills in %(default)s and the like
    group.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]), **settings)


def yes_or_no(text: str) -> bool:
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def words_of(settings: dict, parser: Parser, path: Path) -> list[str]:
    """Settings as the words of a command line, so that types and choices are checked as there.
    ValueError names file and setting.
    """
    actions = {a.dest: a for a in parser._actions if a.dest != argparse.SUPPRESS}
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
                f"{path}: {name} is {value}, which YAML would read as an octal number: write it"
                " without the leading 0"
            )
        else:
            words += [f"--{name}", *map(str, value)] if takes_list else [f"--{name}={value}"]
    return words


class _Settings(yaml.BaseLoader):
    """YAML whose values remain text, as on a command line: a folder called no is not False. Only
    null is None.
    """

    def construct_mapping(self, node, deep=False):
        return each_key_once(
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


def read_settings(path: Path) -> dict:
    """The `name: value` pairs of a YAML or JSON file; a value is a text, None, or a list of
    such.
    """
    try:
        text = path.read_bytes()  # bytes, so that the parsers find out the encoding
        if path.suffix.lower() == ".json":
            settings = json.loads(
                text,
                object_pairs_hook=each_key_once,
                parse_int=str,
                parse_float=str,
                parse_constant=str,
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
    """A context around a program's set-up: a user's error ends the program with one message instead
    of a traceback.
    """
    try:
        yield
    # a path that is too long, that is missing, that may not be read
    except (ValueError, OSError) as error:
        speak_in_turn()
        fail(error)
    except (MemoryError, RuntimeError) as error:
        from minigrpo.run.distributed import is_lost  # imports torch

        if is_lost(error):
            sys.exit(1)  # the rank that failed has said why
        if not out_of_memory(error):
            raise
        fail(
            f"{_first_line(error)}. Take a smaller --model, or a machine with more memory; --plan"
            " says how much a run needs"
        )


@contextmanager
def run_errors(advice: Callable[[], str], memory: str):
    """A context around what follows the set-up: an external cause, such as a full disk, a film that
    is gone, or too little memory, ends the program with one message, followed by `advice`. Any
    other error is a bug and keeps its traceback.

    `memory` names the arguments to lower where memory runs out.
    """
    try:
        yield
        return
    except WriteError as error:
        text = f"{error}. Make room, or remove the cause"
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        text = f"{_first_line(error)}. Lower {memory}"
    except ValueError as error:
        from minigrpo.data import DataError  # imports numpy

        if not isinstance(error, DataError):
            raise
        text = str(error)
    fail(f"{text}. {advice()}")


def out_of_memory(error: BaseException) -> bool:
    """Whether torch, on a GPU or a CPU, or Python ran out of memory."""
    import torch

    named = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return named or "allocate memory" in str(error)


def _first_line(error: BaseException) -> str:
    return f"out of memory ({(str(error) or type(error).__name__).splitlines()[0]})"
