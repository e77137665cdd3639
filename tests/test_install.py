"""An install: what pip puts where, the commands in an empty folder, and what they say where a
package is absent."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest

from minigrpo import __version__, commands, packages, programs
from minigrpo.commands import COMMAND_OF, COMMANDS
from tests.processes import finish, grpo, python, sft, start
from tests.test_programs import same

ROOT = Path(__file__).parent.parent
FILES = {"train_sft.py", "train_grpo.py", "evaluate.py"}
HEAVY = [
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
    "PIL",
    "matplotlib",
    "tqdm",
    "yaml",
    "rouge_score",
    "jinja2",
    "peft",
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that pip has installed into, from a source distribution by way of a wheel."""
    place = tmp_path_factory.mktemp("install")
    shutil.copytree(
        ROOT / "minigrpo", place / "source/minigrpo", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in (*FILES, "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / "source")
    build = "from setuptools.build_meta import build_sdist; build_sdist('..')"
    quiet = {"cwd": place / "source", "check": True, "capture_output": True, "env": outside()}
    subprocess.run([sys.executable, "-c", build], **quiet)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--no-compile",
        "--target",
    ]
    subprocess.run([*pip, place / "site", *place.glob("*.tar.gz")], **quiet)
    return place / "site"


def outside(site=None):
    """The environment of a process that sees the install and not this clone."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | (
        {"PYTHONPATH": str(site)} if site else {}
    )


def in_install(site, folder, absent, rank):
    """In a fork that has torch and all else loaded already: minigrpo anew, from the install, as if
    started in `folder`; without the packages that are `absent`."""
    for name in list(sys.modules):
        if name.partition(".")[0] in {
            "minigrpo",
            "tests",
            "train_sft",
            "train_grpo",
            "evaluate",
            *absent,
        }:
            del sys.modules[name]
    sys.modules.update(dict.fromkeys(absent))  # None: importing it raises ModuleNotFoundError
    sys.path[:] = [str(site), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    os.chdir(folder)


@pytest.fixture
def minigrpo(installed, tmp_path):
    """callable(words...) -> what `python -m minigrpo WORDS` prints in an empty folder."""
    (tmp_path / "empty").mkdir()

    def call(*words, code=0, absent=()):
        log = tmp_path / "log"
        codes = finish(
            start(
                "python",
                ["-m", "minigrpo", *words],
                log,
                prepare=partial(in_install, installed, tmp_path / "empty", absent),
            )
        )
        said = Path(f"{log}-0").read_text()
        assert codes == [code], said[-3000:]
        return said

    return call


# ---- what is where -----------------------------------------------------------------------------


def test_an_install_has_the_whole_package_and_no_module_beside_it(installed):
    inside = {
        path.relative_to(ROOT)
        for path in (ROOT / "minigrpo").rglob("*")
        if path.suffix in (".py", ".html", ".yaml", ".typed")
    }
    assert (
        Path("minigrpo/run/report.html") in inside
        and Path("minigrpo/data/reasoning.yaml") in inside
    )
    inside |= {Path("minigrpo/programs") / name for name in FILES}
    assert {
        path.relative_to(installed)
        for path in (installed / "minigrpo").rglob("*")
        if path.is_file()
    } == inside
    assert {path.name for path in installed.iterdir()} == {
        "minigrpo",
        f"minigrpo-{__version__}.dist-info",
        "bin",
    }
    for name in FILES:  # the files of the clone, and no shims
        assert (installed / "minigrpo/programs" / name).read_bytes() == (ROOT / name).read_bytes()


def test_every_program_is_a_command():
    """Whatever runs with `python -m` or as a file."""
    runs = {
        str(path.relative_to(ROOT))
        for path in [*ROOT.glob("*.py"), *(ROOT / "minigrpo").rglob("*.py")]
        if '\nif __name__ == "__main__":\n    main()' in path.read_text()
    } - {"minigrpo/__main__.py"}
    modules = {
        path if "/" not in path else path.removesuffix(".py").replace("/", ".") for path in runs
    }
    assert modules == set(COMMAND_OF)
    assert all(callable(commands.load(program).main) for program in COMMAND_OF)


def test_the_package_names_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for package, extra in packages.EXTRAS.items():
        assert any(need.startswith(packages.PIP.get(package, package)) for need in extras[extra]), (
            package
        )
    assert {packages.PIP.get(name, name) for name in HEAVY[:-1]} <= {
        re.match(r"[\w-]+", need)[0] for need in project["dependencies"]
    }


# ---- the commands ------------------------------------------------------------------------------


def test_the_list_a_version_and_a_misspelt_command_take_no_time(installed, tmp_path):
    def script(*words, code=0, flags=()):
        done = subprocess.run(
            [sys.executable, *flags, installed / "bin/minigrpo", *words],
            cwd=tmp_path,
            env=outside(installed),
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    for words in ([], ["--help"]):
        said = script(*words, flags=["-X", "importtime"])
        assert "minigrpo.commands" in said and not re.search(
            r"\| +(torch|numpy|transformers)$", said, re.M
        )
        assert all(re.search(rf"^  {command} +\w.{{10,}}$", said, re.M) for command in COMMANDS)
    assert script("--version") == f"minigrpo {__version__}\n"
    assert (
        script("grop", code=2)
        == "minigrpo: error: no command 'grop': did you mean `minigrpo grpo`?\n"
    )


@pytest.mark.parametrize(
    "words, near",
    [
        ("train_sft.py", "sft"),
        ("train_grpo", "grpo"),
        ("eval", "evaluate"),
        ("chek", "data check"),
        ("data chek", "data check"),
        ("minigrpo.data.phantom", "data phantom"),
        ("cold-start", "cold_start"),
        ("data mimic", "data mimic_cxr"),
        ("data sft", "sft"),
    ],
)
def test_the_nearest_command_is_named(words, near, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/minigrpo", *words.split()])
    with pytest.raises(SystemExit, match="2"):
        commands.main()
    assert (
        capsys.readouterr().err
        == f"minigrpo: error: no command {words!r}: did you mean `minigrpo {near}`?\n"
    )


def test_the_tools_of_data_have_a_list_of_their_own(monkeypatch, capsys):
    for words in (["data"], ["data", "--help"]):
        monkeypatch.setattr(sys, "argv", ["minigrpo", *words])
        commands.main()
        said = capsys.readouterr().out
        assert "data check" in said and "\n  sft" not in said


def test_commands_are_printed_as_one_can_type_them_here(monkeypatch, tmp_path):
    lines = [["train_sft.py", "--model", "a b"], ["-m", "minigrpo.data.phantom", "--train", "3"]]
    monkeypatch.chdir(ROOT)
    assert list(map(commands.typed, lines)) == [
        "python train_sft.py --model 'a b'",
        "python -m minigrpo.data.phantom --train 3",
    ]
    monkeypatch.chdir(tmp_path)
    assert commands.typed(lines[0]) == f"python {ROOT / 'train_sft.py'} --model 'a b'"
    monkeypatch.setattr(commands, "CLONE", None)
    assert list(map(commands.typed, lines)) == [
        "minigrpo sft --model 'a b'",
        "minigrpo data phantom --train 3",
    ]


def test_the_programs_are_modules_in_a_clone_too():
    from minigrpo.programs import evaluate

    assert programs.CLONE == ROOT and Path(evaluate.__file__) == ROOT / "evaluate.py"


def test_training_from_an_install_is_training_in_a_clone(minigrpo, phantom, tmp_path):
    """Bug: no program was in the package, so that nothing could be trained after `pip install`."""
    assert "saved" in minigrpo("sft", *sft(phantom, tmp_path / "install", steps=1)[1:])
    python(*sft(phantom, tmp_path / "clone", steps=1))
    assert same(tmp_path / "install", tmp_path / "clone")


def test_messages_name_the_command_as_it_was_typed(minigrpo):
    said = minigrpo("grpo", "--learning_rate", "fast", code=2)
    assert (
        "\npython -m minigrpo grpo: error: argument --learning_rate" in said
        and "usage: python -m minigrpo grpo [settings.yaml]" in said
    )
    assert minigrpo("data", "check", "nowhere.jsonl", code=1).startswith(
        "python -m minigrpo data check: error: nowhere.jsonl"
    )
    help = minigrpo("data", "join", "--help")
    assert (
        "    python -m minigrpo data join data/mimic/train.jsonl" in help
        and "minigrpo.data.join" not in help
    )


@pytest.mark.slow
def test_a_reward_of_ones_own_is_found_in_the_folder(minigrpo, trained, phantom, tmp_path):
    (tmp_path / "empty/evaluate.py").write_text(
        "raise SystemExit('hidden')"
    )  # does not hide the program
    (tmp_path / "empty/my_rewards.py").write_text(
        "def short(answers, samples):\n    return [-float(len(answer)) for answer in answers]\n"
    )
    said = minigrpo(
        "grpo",
        *grpo(
            phantom,
            trained / "sft/final",
            tmp_path / "grpo",
            "--reward",
            "my_rewards:short",
            steps=1,
        )[1:],
    )
    assert "saved" in said


# ---- absent packages ---------------------------------------------------------------------------


def test_the_loss_needs_torch_alone(installed, tmp_path):
    (tmp_path / "loss.py").write_text(
        "import minigrpo, torch\nfrom minigrpo.logprob import linear_logprob\n"
        "from minigrpo.loss import group_advantages\n"
        "print(minigrpo.__file__, group_advantages(torch.tensor([[0.0, 1.0]])).tolist())\n"
    )
    codes = finish(
        start(
            "python",
            [tmp_path / "loss.py"],
            tmp_path / "log",
            prepare=partial(in_install, installed, tmp_path, HEAVY),
        )
    )
    said = Path(f"{tmp_path}/log-0").read_text()
    assert codes == [0] and str(installed) in said and "[[-" in said, said


@pytest.mark.parametrize(
    "command, package, message",
    [
        (
            "grpo --model m --train_data . --output_dir o",
            "scipy",
            "scipy is not installed: pip install scipy",
        ),
        ("evaluate --model m --data . --output_dir o", "rouge_score", "pip install rouge-score"),
        ("sft --model m --train_data . --output_dir o", "matplotlib", "pip install matplotlib"),
        ("data phantom", "numpy", "pip install numpy"),
        ("ask --model m --image .", "PIL", "pip install pillow"),
        (
            "sft --model m --train_data t --output_dir o --lora_rank 4",
            "peft",
            "--lora_rank needs peft: pip install peft, or pip install 'minigrpo[lora]'",
        ),
        (
            "sft --model m --train_data t --output_dir o --track wandb",
            "wandb",
            "--track wandb needs wandb: pip install wandb, or pip install 'minigrpo[track]'",
        ),
    ],
)
def test_an_absent_package_is_named_with_what_to_install(minigrpo, command, package, message):
    said = minigrpo(*command.split(), code=1, absent=[package])
    assert (
        said.startswith(f"python -m minigrpo {' '.join(command.split(' --')[0].split())}: error: ")
        and message in said
    )
    assert "Traceback" not in said


def test_a_package_that_is_needed_late_is_named_too(minigrpo, phantom):
    said = minigrpo(
        "data", "check", phantom / "test.jsonl", "--model", phantom, code=1, absent=["transformers"]
    )
    assert (
        "minigrpo data check: error: transformers is not installed: pip install transformers"
        in said
        and "Traceback" not in said
    )


def test_everything_that_pip_left_out_is_named_at_once(monkeypatch):
    monkeypatch.setattr(
        packages.metadata,
        "requires",
        lambda name: [
            "transformers>=5.17",
            "no-such-tqdm",
            "no-such-pillow>=3",
            "peft ; extra == 'x'",
        ],
    )
    assert packages.explain(ModuleNotFoundError(name="no_such_tqdm")) == (
        "no_such_tqdm is not installed: pip install no-such-tqdm 'no-such-pillow>=3', "
        "which `pip install --no-deps` left out"
    )


def test_other_failed_imports_keep_their_traceback():
    for name in ("minigrpo.nothing", "json.nothing", None):
        with pytest.raises(ModuleNotFoundError):
            packages.explain(ModuleNotFoundError("no such module", name=name))


# ---- the same with the script that pip has made ------------------------------------------------


@pytest.mark.slow
def test_films_training_and_evaluation_in_an_empty_folder(installed, tmp_path):
    def script(*words):
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=tmp_path,
            env=outside(installed),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    command, data = installed / "bin/minigrpo", ["--train_data", "films/train.jsonl"]
    script(
        command,
        "data",
        "phantom",
        "--output_dir",
        "films",
        "--train",
        12,
        "--test",
        4,
        "--size",
        96,
    )
    assert "no errors" in script(command, "data", "check", "films/train.jsonl", "films/test.jsonl")
    script(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        2,
        "-m",
        "minigrpo",
        "sft",
        "--model",
        "tiny",
        *data,
        "--output_dir",
        "sft",
        "--max_steps",
        2,
        "--batch_size",
        4,
    )
    script(
        command,
        "grpo",
        "--model",
        "sft/final",
        *data,
        "--output_dir",
        "grpo",
        "--max_steps",
        1,
        "--prompts_per_step",
        4,
        "--group_size",
        4,
        "--max_new_tokens",
        16,
    )
    script(
        command,
        "evaluate",
        "--model",
        "grpo/final",
        "--data",
        "films/test.jsonl",
        "--output_dir",
        "test",
        "--max_new_tokens",
        16,
    )
    assert (tmp_path / "test/table.md").exists() and (tmp_path / "test/report.html").exists()
    said = script(command, "quick", "--train", 16, "--test", 6, "--sft_steps", 2, "--grpo_steps", 1)
    assert (
        "$ minigrpo sft --model tiny --train_data runs/quick/data/train.jsonl" in said
        and (tmp_path / "runs/quick/quick.png").exists()
    )
