"""The command line: `minigrpo sft ...` is `python train_sft.py ...`, from any folder, in a clone
or in an install.

Imports nothing heavy, so that a list of the commands, a version or a misspelt command is answered
at once.
"""

import ast
import importlib
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from minigrpo import __version__
from minigrpo.packages import explain
from minigrpo.programs import CLONE
from minigrpo.run.terminal import steady_output

COMMANDS = {  # command: (file in a clone, or module; what it does)
    "quick": ("minigrpo.quick", "see GRPO learn, in a minute and a half"),
    "demo": (
        "minigrpo.demo",
        "films, SFT, GRPO, evaluation with a tiny model: ten minutes on two cores",
    ),
    "sft": ("train_sft.py", "supervised fine-tuning"),
    "grpo": ("train_grpo.py", "Group Relative Policy Optimization"),
    "evaluate": ("evaluate.py", "answers to a test file, scored with 95% intervals"),
    "probe": ("minigrpo.probe", "greedy, sampled, best of G: where GRPO has room to gain"),
    "ask": ("minigrpo.ask", "one question about one film"),
    "curves": ("minigrpo.curves", "the curves of several runs in one picture"),
    "study": ("minigrpo.study", "the study on phantoms, an hour and a half on two cores"),
    "cold_start": ("minigrpo.cold_start", "traces of thought from a teacher, for SFT"),
    "tiny": ("minigrpo.tiny", "a tiny Qwen3-VL with random weights"),
    "elsewhere": ("minigrpo.elsewhere", "samples as verl reads them"),
    "data phantom": ("minigrpo.data.phantom", "draw chest films with boxes, reports and questions"),
    "data scenes": ("minigrpo.data.scenes", "draw everyday scenes with boxes and captions"),
    "data check": (
        "minigrpo.data.check",
        "check JSONL files: what is in them, and every error at once",
    ),
    "data clean": ("minigrpo.data.clean", "reduce reports to what their film shows"),
    "data join": ("minigrpo.data.join", "join several JSONL files"),
    "data sharegpt": ("minigrpo.data.sharegpt", "LLaVA / ShareGPT JSON to JSONL, and back"),
    "data convert": ("minigrpo.data.convert", "what the converters below have in common"),
    "data openi": ("minigrpo.data.openi", "convert Open-i (open to everyone)"),
    "data nih": ("minigrpo.data.nih", "convert NIH ChestX-ray14 (open to everyone)"),
    "data mimic_cxr": ("minigrpo.data.mimic_cxr", "convert MIMIC-CXR"),
    "data chexpert_plus": ("minigrpo.data.chexpert_plus", "convert CheXpert Plus"),
    "data chest_imagenome": ("minigrpo.data.chest_imagenome", "convert Chest ImaGenome"),
    "data vindr_cxr": ("minigrpo.data.vindr_cxr", "convert VinDr-CXR"),
    "data ms_cxr": ("minigrpo.data.ms_cxr", "convert MS-CXR"),
    "data padchest_gr": ("minigrpo.data.padchest_gr", "convert PadChest-GR"),
}
ARGUMENTS = {
    "quick": "QuickArguments",
    "demo": "DemoArguments",
    "sft": "SftArguments",
    "grpo": "GrpoArguments",
    "evaluate": "EvaluateArguments",
    "probe": "ProbeArguments",
    "ask": "AskArguments",
    "study": "StudyArguments",
    "tiny": "TinyArguments",
    "elsewhere": "ElsewhereArguments",
}  # of the programs that import torch, in minigrpo/run/arguments.py; the others parse their own
COMMAND_OF = {program: command for command, (program, _) in COMMANDS.items()}


def main() -> None:
    """`minigrpo COMMAND ...`, or `python -m minigrpo COMMAND ...`."""
    steady_output()
    script, *words = sys.argv
    name = "minigrpo" if Path(script).stem == "minigrpo" else "python -m minigrpo"
    if words[:1] == ["--version"]:
        return print(f"minigrpo {__version__}")
    group = "data " if words[:1] == ["data"] else ""
    command = group + "".join(words[bool(group) :][:1])
    if command.strip() in ("", "data") or command.removeprefix(group) in ("-h", "--help"):
        return print(overview(name, group))
    if command not in COMMANDS:
        near = nearest(command.removeprefix(group))
        print(
            f"{name}: error: no command {command!r}"
            + (f": did you mean `{name} {near}`?" if near else f"; `{name}` lists them"),
            file=sys.stderr,
        )
        sys.exit(2)
    sys.argv = [f"{name} {command}", *words[1 + bool(group) :]]
    try:
        doc = as_commands(docstring(COMMANDS[command][0]), name)  # the examples of its --help
        if command in ARGUMENTS:
            from minigrpo.run import args, arguments

            args.answer_early(getattr(arguments, ARGUMENTS[command]), doc)
        program = load(COMMANDS[command][0])
        program.__doc__ = doc
        program.main()
    except ModuleNotFoundError as error:
        sys.exit(f"{name} {command}: error: {explain(error)}")  # `fail` imports what may be absent


def overview(name: str, group: str = "") -> str:
    """The commands of the group, one per line."""
    shown = {command: does for command, (_, does) in COMMANDS.items() if command.startswith(group)}
    lines = [
        f"usage: {name} COMMAND ...    ({name} COMMAND --help says what it takes; --version)",
        "",
    ]
    return "\n".join([*lines, *(f"  {command:22}{does}" for command, does in shown.items())])


def nearest(command: str) -> str:
    """The command that was probably meant, also by the name of a program's file or module; empty if
    nothing is similar.
    """
    from difflib import get_close_matches

    meant = {
        name: right
        for right, (program, _) in COMMANDS.items()
        for name in (right.removeprefix("data "), program, program.removesuffix(".py"))
    }
    near = get_close_matches(command, meant, n=1)
    return meant[near[0]] if near else ""


def load(program: str) -> ModuleType:
    """train_sft.py, or minigrpo.data.check, as a module; its `main` is the program."""
    return importlib.import_module(module_name(program))


def docstring(program: str) -> str:
    """The program's, without importing it, which takes seconds."""
    return ast.get_docstring(
        ast.parse(Path(find_spec(module_name(program)).origin).read_text(encoding="utf-8")),
        clean=False,
    )


def module_name(program: str) -> str:
    return f"minigrpo.programs.{program[:-3]}" if program.endswith(".py") else program


def as_commands(text: str, name: str) -> str:
    """`python train_sft.py` and the like in a text as `minigrpo sft`."""

    def replaced(match: re.Match) -> str:
        command = COMMAND_OF.get(match[1])
        return f"{name} {command}" if command else match[0]

    return re.sub(r"\bpython (?:-m )?([\w.]+\w)", replaced, text)


def python(line: list[str]) -> None:
    """Do what `python LINE` does in a clone, in this process, from any folder and in an install:
    LINE is a program and its arguments, `train_sft.py --model ...`, or `-m`, a module and its
    arguments."""
    program, *words = line[1:] if line[0] == "-m" else line
    sys.argv = [
        " ".join(_call(program)).removeprefix("python " if program.endswith(".py") else ""),
        *words,
    ]
    load(program).main()


def typed(line: list[str]) -> str:
    """LINE (see `python`) as the user can type it here: `python train_sft.py ...` in a clone,
    `minigrpo sft ...` in an install."""
    program, *words = line[1:] if line[0] == "-m" else line
    return shlex.join([*_call(program), *words])


def _call(program: str) -> list[str]:
    if CLONE is None:
        return ["minigrpo", *COMMAND_OF[program].split()]
    if not program.endswith(".py"):
        return ["python", "-m", program]
    return ["python", program if Path.cwd() == CLONE else str(CLONE / program)]
