"""A wrong argument, a missing file and --help are answered before torch is imported, and the help
can be read.
"""

import os
import re
import resource
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from minigrpo.commands import ARGUMENTS, COMMANDS
from minigrpo.run import arguments
from minigrpo.run.args import parser_of

ROOT = Path(__file__).parent.parent
SECONDS = 1.5  # of the processor: the clock also counts what other programs take
HEAVY = re.compile(r"\| +(torch|transformers|numpy|matplotlib)$", re.M)
FILE = {
    "sft": "--model tiny --train_data nowhere --output_dir o",
    "grpo": "--model m --train_data nowhere --output_dir o",
    "evaluate": "--model m --data nowhere --output_dir o",
    "probe": "--model m --data nowhere",
    "ask": "--model m --image nowhere",
    "tiny": "--train_data nowhere --output_dir o",
    "elsewhere": "--data nowhere --output o",
    "demo": "--data nowhere",
}
FOLDER = {
    "sft": "--model ./nowhere --train_data README.md --output_dir o",
    "grpo": "--model ./nowhere --train_data README.md --output_dir o",
    "evaluate": "--model ./nowhere --data README.md --output_dir o",
    "probe": "--model ./nowhere --data README.md",
}


def answer(line, code, **environment):
    """What `python LINE` prints, without the list of its imports, and that list."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *line],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert done.returncode == code, done.stderr[-2000:]
    assert seconds < SECONDS
    lines = done.stderr.splitlines()
    imports = [text for text in lines if text.startswith("import time:")]
    said = [text for text in lines if not text.startswith("import time:")]
    return done.stdout + "\n".join(said), "\n".join(imports)


@pytest.mark.parametrize("command", ARGUMENTS)
def test_wrong_arguments_are_answered_at_once(command):
    program = COMMANDS[command][0]
    for line in (
        [program] if program.endswith(".py") else ["-m", program],
        ["-m", "minigrpo", command],
    ):
        for words, code, message in [
            ("--no_such_flag 1", 2, "error: "),
            ("--help", 0, "--help"),
            (FILE.get(command), 1, "nowhere"),
            (FOLDER.get(command), 1, "--model ./nowhere: no such checkpoint folder"),
        ]:
            if words:
                said, imports = answer([*line, *words.split()], code)
                assert message in said and "Traceback" not in said
                assert "minigrpo.run.arguments" in imports and not HEAVY.search(imports)


# convert is no program by itself, which it says
@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {*ARGUMENTS, "data convert"}))
def test_the_data_tools_need_no_torch_for_an_answer(command):
    said, imports = answer(["-m", "minigrpo", *command.split(), "--no_such_flag"], 2)
    assert "error: " in said and not re.search(r"\| +(torch|transformers)$", imports, re.M)


def test_of_several_ranks_the_first_alone_speaks():
    for words, code in (("--no_such_flag 1", 2), ("--help", 0)):
        said, _ = answer(["train_sft.py", *words.split()], code, RANK="1", WORLD_SIZE="2")
        assert said == ""
        assert answer(["train_sft.py", *words.split()], code, RANK="0", WORLD_SIZE="2")[0]


# ---- the help ------------------------------------------------------------------------------------

THREE = [arguments.SftArguments, arguments.GrpoArguments, arguments.EvaluateArguments]


def help_of(kind, word, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    program = {"Sft": "train_sft", "Grpo": "train_grpo", "Evaluate": "evaluate"}[
        kind.__name__.removesuffix("Arguments")
    ]
    doc = __import__(program).__doc__
    with pytest.raises(SystemExit, match="0"):
        parser_of(kind, doc).parse_args([word])
    return doc, capsys.readouterr().out


def test_every_argument_is_in_one_group():
    placed = [name for names in arguments.GROUPS.values() for name in names]
    known = {field.name for kind in THREE for field in fields(kind)}
    assert sorted(placed) == sorted(known) and arguments.COMMON <= known


@pytest.mark.parametrize("kind", THREE)
def test_help_fits_on_two_screens(kind, capsys, monkeypatch):
    doc, said = help_of(kind, "--help", capsys, monkeypatch)
    assert len(said.splitlines()) <= 100 and max(map(len, said.splitlines())) <= 100
    shown = re.findall(r"^  --(\w+)(?=  | [A-Z[]|$)", said, re.M)
    assert set(shown) == {field.name for field in fields(kind)} & arguments.COMMON
    assert doc.strip() in said  # with the examples in lines of their own
    assert "None" not in said and "--output_dir TEXT" in said and "--help-all" in said


@pytest.mark.parametrize("kind", THREE)
def test_help_all_has_each_option_once(kind, capsys, monkeypatch):
    _, said = help_of(kind, "--help-all", capsys, monkeypatch)
    shown = re.findall(r"^  --(\w+)(?=  | [A-Z[]|$)", said, re.M)
    assert sorted(shown) == sorted(field.name for field in fields(kind))
    assert "default: None" not in said and max(map(len, said.splitlines())) <= 100
