"""The demo goes on where it was stopped: what counts as done, whose folder it may go on in, and,
killed anywhere, the same bits.
"""

import json
import os
import random
import re
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from evaluate import EvaluateArguments
from minigrpo import demo, stages
from minigrpo.demo import (
    FOLDERS,
    PHANTOM,
    REAL,
    SMOKE,
    DemoArguments,
    begin,
    empty,
    estimate,
    plan,
    sampled_figures,
)
from minigrpo.run import files
from minigrpo.run.args import parse_args
from minigrpo.stages import Run, Screen, hold, last_bar, run_all, startable
from tests import processes
from train_grpo import GrpoArguments
from train_sft import SftArguments

# ---- the plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, args",
    [(PHANTOM, DemoArguments()), (REAL, DemoArguments(data="mine")), (SMOKE, DemoArguments())],
)
def test_every_stage_parses_and_comes_after_those_that_it_needs(size, args):
    kinds = {
        "train_sft.py": SftArguments,
        "train_grpo.py": GrpoArguments,
        "evaluate.py": EvaluateArguments,
    }
    runs = plan(size, args)
    names = [run.name for run in runs]
    assert set(names) == set(FOLDERS) - ({"films"} if args.data else set())
    for run in runs:
        assert all(need in names[: names.index(run.name)] for need in run.needs if need != "films")
        if run.command[0] in kinds:
            parse_args(kinds[run.command[0]], "", [str(word) for word in run.command[1:]])
    assert not size.measured or set(size.measured) == set(names), (
        "python -m minigrpo.demo says how long every stage takes"
    )


def test_real_films_have_no_drawing_to_be_judged_by():
    """Their reports are trained with GLEU, and probed with it."""
    for args, reward in (
        (DemoArguments(), "phantom_entities:complete"),
        (DemoArguments(data="mine"), "gleu"),
    ):
        commands = {run.name: run.command for run in plan(PHANTOM if not args.data else REAL, args)}
        for name in ("grpo report", "probe report", "probe sft"):
            spec = commands[name][commands[name].index("--reward") + 1]
            assert reward in spec.partition("report=")[2], name
        # the same questions before and after, with the same seed, sampled as in training
        before, after = commands["probe sft"], commands["probe report"]
        assert before[before.index("--samples") :][:4] == after[after.index("--samples") :][:4]


def test_sampled_figures_pair_the_same_questions():
    def row(sampled, best, no_spread=0.0):
        return {"sampled": sampled, "best": best, "no_spread": no_spread}

    before, after = [row(0.2, 0.6), row(0.8, 0.9, 1.0)], [row(0.3, 0.7), row(0.9, 0.9)]
    figures = sampled_figures(before, after)
    assert figures["before"]["mean"] == pytest.approx(0.5)
    assert figures["after"]["mean"] == pytest.approx(0.6)
    gain = figures["gain"]
    assert gain["mean"] == pytest.approx(gain["low"]) == pytest.approx(gain["high"])
    assert figures["best"]["mean"] == pytest.approx(0.75) and figures["no_spread"]["mean"] == 0.5


def test_who_runs_beside_whom():
    """After SFT, which has all threads, two at once, in the order of the plan."""
    runs = {run.name: run for run in plan(PHANTOM, DemoArguments())}

    def at(going, done, jobs=2):
        return [
            run.name
            for run in startable(
                [run for name, run in runs.items() if name not in (*going, *done)],
                set(done),
                [runs[name] for name in going],
                jobs,
            )
        ]

    assert at([], []) == ["films"] and at(["films"], []) == []
    assert at([], ["films"]) == ["sft"], (
        "the constant answers wait: beside SFT they would take its second thread"
    )
    assert at(["sft"], ["films"]) == []
    assert at([], ["films", "sft"]) == ["evaluate constant", "grpo report"]
    assert at(["grpo report"], ["films", "sft", "evaluate constant"]) == ["evaluate sft"]
    assert at(["grpo report"], ["films", "sft", "evaluate constant", "evaluate sft"]) == [
        "grpo grounding"
    ]
    assert at([], ["films", "sft", "evaluate constant", "evaluate sft"], jobs=1) == ["grpo report"]


def test_a_run_that_wants_to_be_alone_is_not_put_off_for_ever():
    a, b, c = Run("a", []), Run("b", [], alone=True), Run("c", [])
    assert startable([b, c], set(), [a], 2) == [] and startable([b, c], set(), [], 2) == [b]


# ---- the folder ----------------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """begun(**changes): begin a smoke demo in tmp_path/demo, with a lock that is free at once
    afterwards.
    """
    monkeypatch.setattr(demo, "programs_sum", lambda: "one")

    def start(out=tmp_path / "demo", **changes):
        args = replace(DemoArguments(smoke=True), **changes)
        held, found = begin(out, args, plan(SMOKE if args.smoke else PHANTOM, args))
        held.close()
        return found

    return start


def test_a_demo_goes_on_with_what_it_was_begun_with(begun, tmp_path, monkeypatch):
    first = begun()
    monkeypatch.setattr(torch, "get_num_threads", lambda: first["threads"] + 3)
    assert begun() == first, "on as many threads as before, or it would end with other bits"


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(seed=1), "begun with --seed 0, and now it is 1"),
        (dict(smoke=False), "begun with other commands"),
        (dict(data="mine"), "begun with --data None, and now it is .*mine"),
        (dict(model="mine"), "begun with --model tiny, and now it is .*mine"),
    ],
)
def test_other_arguments_are_refused(changes, message, begun, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("train.jsonl", "test.jsonl", "config.json"):
        (tmp_path / "mine" / name).write_text("{}")
    begun()
    before = (tmp_path / "demo/demo.json").read_text()
    with pytest.raises(ValueError, match=message + r".*--fresh \(make demo FRESH=1\)"):
        begun(**changes)
    assert (tmp_path / "demo/demo.json").read_text() == before


def test_other_programs_and_other_data_are_refused(begun, tmp_path, monkeypatch):
    """Half of the results would come from each."""
    for name in ("train.jsonl", "test.jsonl", "config.json", "checksums.json"):
        (tmp_path / name).write_text("{}")
    own = dict(data=str(tmp_path), model=str(tmp_path))
    begun(**own)
    begun(**own | dict(data=f"{tmp_path}/demo/.."))  # the same by another name
    (tmp_path / "test.jsonl").write_text("{ }")
    with pytest.raises(ValueError, match="when .*test.jsonl was another file than it is now"):
        begun(**own)
    (tmp_path / "test.jsonl").write_text("{}")
    (tmp_path / "checksums.json").write_text("{ }")
    with pytest.raises(ValueError, match="when .*checksums.json was another file"):
        begun(**own)
    (tmp_path / "checksums.json").write_text("{}")
    monkeypatch.setattr(demo, "programs_sum", lambda: "other")
    with pytest.raises(ValueError, match="another version of the programs"):
        begun(**own)


def test_the_version_of_the_programs_is_all_of_our_code(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        demo, "checksum", lambda path: read.append(path.name) or files.checksum(path)
    )
    assert len(demo.programs_sum()) == 64 and {
        "train_sft.py",
        "train_grpo.py",
        "evaluate.py",
        "policy.py",
        "loss.py",
        "plots.py",
    } <= set(read)


def test_what_no_demo_has_made_is_neither_gone_on_in_nor_removed(begun, tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/thesis.txt").write_text("precious")
    for fresh in (False, True):
        with pytest.raises(ValueError, match="exists already and holds no demo to go on with"):
            begun(fresh=fresh)
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["thesis.txt"]
    begun(out=tmp_path / "other")
    (tmp_path / "other/thesis.txt").write_text("precious")
    with pytest.raises(
        ValueError, match="no demo has written thesis.txt: move that elsewhere first"
    ):
        begun(out=tmp_path / "other", fresh=True)
    assert (tmp_path / "other/demo.json").exists() and (tmp_path / "other/thesis.txt").exists()


def test_a_damaged_demo_json_is_named(begun, tmp_path):
    begun()
    (tmp_path / "demo/demo.json").write_text("{}")
    with pytest.raises(ValueError, match="demo.json is not what a demo has written"):
        begun()


def all_of_it(out):
    """A folder as a demo leaves it."""
    for folder in FOLDERS.values():
        (out / folder).mkdir(parents=True, exist_ok=True)
        for name in (f"{folder}/done.json", f"{folder}/part.txt", f"{folder}.log"):
            (out / name).write_text("{}")
    for name in ("results.json", "results.md", "spent.json"):
        (out / name).write_text("{}")


def test_fresh_begins_anew(begun, tmp_path):
    begun()
    all_of_it(out := tmp_path / "demo")
    assert begun(seed=7, fresh=True)["arguments"]["seed"] == 7
    assert {path.name for path in out.iterdir()} == {".lock", "demo.json"}
    begun(out=tmp_path / "new", fresh=True)  # nothing to remove


def test_killed_while_it_removes_it_leaves_no_half_stage_that_counts(begun, tmp_path, monkeypatch):
    begun()
    all_of_it(out := tmp_path / "demo")
    remove = shutil.rmtree

    def dying(path):
        remove(path / "test" if (path / "test").exists() else path)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.shutil, "rmtree", dying)
    with pytest.raises(KeyboardInterrupt):
        empty(out)
    assert (out / "demo.json").exists() and not [*out.rglob("done.json")], (
        "still known as a demo's, and nothing in it is done"
    )


def test_two_demos_do_not_share_a_folder(tmp_path, capsys, monkeypatch):
    held = hold(tmp_path)
    began = time.monotonic()
    with pytest.raises(
        ValueError, match=f"in use by process {os.getpid()}: wait for it, or end it"
    ):
        hold(tmp_path)
    assert time.monotonic() - began < 1
    # whoever began it was killed, and its programs are still at work
    monkeypatch.setattr(stages, "is_alive", lambda number: False)
    with pytest.raises(ValueError, match="programs that were started there are still running"):
        hold(tmp_path, patience=0.1)
    assert f"left running in {tmp_path}" in capsys.readouterr().out
    monkeypatch.setattr(stages.time, "sleep", lambda seconds: held.close())
    hold(tmp_path).close()


# ---- stages --------------------------------------------------------------------------------------


def films(out, name="films"):
    return Run(
        name,
        [
            "-m",
            "minigrpo.data.phantom",
            "--output_dir",
            "{out}",
            "--train",
            1,
            "--test",
            1,
            "--size",
            32,
        ],
    )


def test_a_stage_without_its_last_file_is_done_anew(tmp_path, capsys):
    """Everything is there but done.json, as a kill leaves it; a film among it is half written."""
    where, runs = {"films": tmp_path / "films"}, [films(tmp_path)]
    run_all(runs, where, tmp_path, jobs=1, threads=1, began=time.perf_counter())
    whole = {
        path.name: path.read_bytes() for path in (tmp_path / "films").rglob("*") if path.is_file()
    }
    done = json.loads(whole.pop("done.json"))
    assert done["command"] == runs[0].command and done["seconds"] > 0
    run_all(runs, where, tmp_path, jobs=1, threads=1, began=time.perf_counter())
    assert "1 runs, 1 of them done already" in capsys.readouterr().out

    film = next((tmp_path / "films/films").glob("*.png"))
    film.write_bytes(film.read_bytes()[:100])
    (tmp_path / "films/done.json").unlink()
    run_all(runs, where, tmp_path, jobs=1, threads=1, began=time.perf_counter())
    again = {
        path.name: path.read_bytes() for path in (tmp_path / "films").rglob("*") if path.is_file()
    }
    spent = json.loads((tmp_path / "spent.json").read_text())
    assert (
        json.loads(again.pop("done.json"))["seconds"]
        == round(spent["runs"]["films"], 1)
        > done["seconds"]
    ), "both attempts"
    assert again == whole and spent["starts"] == 2


def test_what_was_spent_adds_up_over_starts(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr(stages.time, "perf_counter", lambda: now)
    first = stages.Spent(tmp_path, began=97.0)
    for now in (102.0, 104.0):  # the time of two that run side by side counts for both
        first.add([tmp_path / "a", tmp_path / "b/test"], save=False)
    now = 109.0  # the kill comes before the next save
    second = stages.Spent(tmp_path, began=108.0)
    now = 111.0
    second.add([tmp_path / "a"], save=True)
    assert stages.read_spent(tmp_path) | {"peak_memory_mb": 0} == {
        "total": 3.0 + 4.0 + 1.0 + 2.0,
        "starts": 2,
        "peak_memory_mb": 0,
        "runs": {"a": 6.0, "b/test": 4.0},
    }
    second.forget(tmp_path / "a")
    second.add([tmp_path / "a"], save=True)
    assert stages.read_spent(tmp_path)["runs"]["a"] == 0.0


def test_two_bars_share_the_terminal(tmp_path, monkeypatch, capsys):
    """Each program writes to its log; the bars stand below the lines, and make room where the
    terminal is narrow.
    """
    screen = Screen()
    screen.terminal = True
    monkeypatch.setattr(stages.shutil, "get_terminal_size", lambda: os.terminal_size((70, 20)))
    for name in ("grpo report", "grpo grounding"):
        (tmp_path / f"{name}.log").write_text(
            "of an earlier start\n\rgrpo:  99%|#########9| 1/1 [00:00]"
        )
        screen.follow(name, tmp_path / f"{name}.log")
    screen.update()
    assert capsys.readouterr().out == "", "nothing new"
    with (tmp_path / "grpo report.log").open("a") as log:
        log.write(
            "note: x\n\rgrpo:   1%|          | 1/85 [00:01]\rgrpo:   2%|2         | 2/85 [00:02,"
            " reward=0.5]\nWriting model shards: 100%|####| 1/1 [00:00]\n"
        )
    with (tmp_path / "grpo grounding.log").open("a") as log:
        log.write(
            "\rgrpo:  50%|#####     | 70/140 [01:02<01:02, 1.0it/s, kl=0.0010, reward=0.561,"
            " tokens=28]"
        )
    screen.update()
    bars = (
        "grpo report: 2%|2         | 2/85 [00:02, reward=0.5]\ngrpo grounding: 50% 70/140"
        " [01:02<01:02, 1.0it/s, kl=0.0010, reward=0\n"
    )
    assert capsys.readouterr().out == bars
    screen.say("grpo report: done in 3 s")
    assert capsys.readouterr().out == "\x1b[2A\r\x1b[Jgrpo report: done in 3 s\n" + bars
    screen.leave("grpo report")
    screen.say()
    assert capsys.readouterr().out == "\x1b[2A\r\x1b[J" + bars.splitlines(True)[1]
    assert last_bar("no bar: 5 [x]\n") == ""


def test_before_a_stage_it_says_how_long_it_takes(tmp_path):
    """At the pace of what is done already: twice as slow as measured."""
    runs = [Run("a", [], alone=True), Run("b", []), Run("c", [])]
    where, measured = (
        {run.name: tmp_path / run.name for run in runs},
        {"a": 60.0, "b": 120.0, "c": 60.0},
    )
    assert estimate(runs[0], runs, where, measured, 2).startswith(
        ": 60 s when measured ("
    ) and "may take 2.5 minutes" in estimate(runs[0], runs, where, measured, 2)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/done.json").write_text('{"seconds": 120.0}')
    assert "all that is left may take 3.0 minutes at the pace so far" in estimate(
        runs[1], runs, where, measured, 2
    )
    assert estimate(runs[0], runs, where, {}, 2) == ""


# ---- kills ---------------------------------------------------------------------------------------


def of_its_own(rank):
    """A session of its own, so that all of it can be killed at once."""
    os.setsid()


def words(out):
    return ["-m", "minigrpo.demo", "--smoke", "--output_dir", out]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, seconds) of a demo that nobody disturbed."""
    out, began = tmp_path_factory.mktemp("demo") / "whole", time.monotonic()
    said = processes.run(
        "python", words(out), out.with_suffix(".log"), prepare=of_its_own, seconds=600
    )
    assert "[8 of 8] evaluate grounding" in said and "SFT + GRPO" in said
    return out, time.monotonic() - began


def assert_same(one, other):
    """Weights bit for bit, films, every line of the logs but its times, answers and figures."""

    def timeless(row):
        return {k: v for k, v in row.items() if "second" not in k and "memory" not in k}

    for run in ("sft", "grounding", "report"):
        a, b = (load_file(out / run / "final/model.safetensors") for out in (one, other))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), run
        a, b = (
            [timeless(json.loads(line)) for line in (out / run / "metrics.jsonl").open()]
            for out in (one, other)
        )
        assert a == b
        assert (other / run / "curves.png").stat().st_size > 1000 and not (
            other / run / "checkpoints"
        ).exists()
    for pattern in ("films/*.jsonl", "films/films/*.png", "*/test/predictions.jsonl"):
        a, b = (
            {path.relative_to(out): path.read_bytes() for path in out.glob(pattern)}
            for out in (one, other)
        )
        assert a == b and a
    a, b = (json.loads((out / "results.json").read_text()) for out in (one, other))
    assert (
        all(a[task] == b[task] for task in demo.TASKS)
        and a["seconds"].keys() == b["seconds"].keys()
    )
    assert (
        {path.name for path in one.glob("*/test/*")}
        == {path.name for path in other.glob("*/test/*")}
        >= {"samples.png", "report.html"}
    )


def kill(process, all_at_once):
    """kill -9 of the demo and its programs, or of the demo alone; before it has its own session
    there is nothing else.
    """
    own = os.getpgid(process.pid) == process.pid
    (os.killpg if all_at_once and own else os.kill)(process.pid, signal.SIGKILL)


def starts(out):
    """How often the demo has begun work here."""
    spent = out / "spent.json"
    return json.loads(spent.read_text())["starts"] if spent.exists() else 0


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


INSTANTS = {
    "films": lambda out: (
        any((out / "films/films").glob("*.png")) and not (out / "films/done.json").exists()
    ),
    "sft": lambda out: 3 <= lines(out / "sft/metrics.jsonl") < SMOKE.sft_steps,
    "evaluate constant": lambda out: (out / "constant/test/predictions.jsonl").exists(),
    "evaluate sft": lambda out: (
        (out / "sft/test").exists() and not (out / "sft/test/metrics.json").exists()
    ),
    "grpo": lambda out: 1 <= lines(out / "grounding/metrics.jsonl"),
    "drawing": lambda out: (out / "report/test/table.md").exists(),
}


@pytest.mark.slow
@pytest.mark.parametrize("all_at_once", [True, False], ids=["a power cut", "the demo alone"])
def test_killed_in_every_stage(all_at_once, whole, tmp_path):
    """kill -9 of everything, as a power cut does, or of the demo alone, whose programs then end by
    themselves: it goes on and ends as the demo that nobody disturbed, bit for bit.
    """
    out, kills = tmp_path / "demo", 0
    for instant in INSTANTS.values():
        (process,) = processes.start("python", words(out), tmp_path / "log", prepare=of_its_own)
        # an instant of a stage that ran beside the one before has come already
        while process.is_alive() and not (starts(out) > kills and instant(out)):
            time.sleep(0.005)
        assert process.is_alive(), (tmp_path / "log-0").read_text()
        kill(process, all_at_once)
        kills += processes.finish([process]) == [-9]
    assert kills == len(INSTANTS)
    said = processes.run("python", words(out), tmp_path / "log", prepare=of_its_own, seconds=600)
    assert re.search("8 runs, [67] of them done already", said)
    assert_same(whole[0], out)
    assert json.loads((out / "results.json").read_text())["starts"] == kills + 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_instants(seed, whole, tmp_path):
    """Three kills at any time of what is left; `pytest -rP` prints where they came."""
    out, draw, came = tmp_path / "demo", random.Random(seed), []
    for left in (1.0, 0.7, 0.5):
        (process,) = processes.start("python", words(out), tmp_path / "log", prepare=of_its_own)
        process.join(draw.uniform(0.5, left * whole[1]))
        came.append(
            (
                process.is_alive(),
                *(
                    name
                    for name, folder in FOLDERS.items()
                    if (out / folder / "done.json").exists()
                ),
            )
        )
        if process.is_alive():
            kill(process, draw.random() < 0.7)
        processes.finish([process])
    processes.run("python", words(out), tmp_path / "log", prepare=of_its_own, seconds=600)
    print("killed with these stages done:", *came, sep="\n")
    assert_same(whole[0], out)


def dying_in_pictures(rank, name):
    """All of it is killed when a picture of this kind is half written."""
    from minigrpo.run import evaluation, loop, plots

    of_its_own(rank)

    def half(path, *_, **__):
        path = path / "curves.png" if path.is_dir() else path
        path.write_bytes(b"\x89PNG")
        os.killpg(0, signal.SIGKILL)

    for module in (plots, loop, evaluation):
        if hasattr(module, name):
            setattr(module, name, half)


def dying_in_curves(rank):
    dying_in_pictures(rank, "draw_curves")


def dying_in_samples(rank):
    dying_in_pictures(rank, "draw_samples")


@pytest.mark.slow
def test_killed_inside_drawing_and_by_ctrl_c(whole, tmp_path):
    """A half-written picture is drawn anew. Ctrl-C, which a terminal sends to all, is 130, SIGTERM
    to the demo alone 75.
    """
    out = tmp_path / "demo"
    for prepare in (dying_in_curves, dying_in_samples):
        assert processes.finish(
            processes.start("python", words(out), tmp_path / "log", prepare=prepare)
        ) == [-9]
    for number, send, code in ((signal.SIGINT, os.killpg, 130), (signal.SIGTERM, os.kill, 75)):
        (process,) = processes.start("python", words(out), tmp_path / "log", prepare=of_its_own)
        before = lines(out / "grounding/metrics.jsonl")
        while process.is_alive() and lines(out / "grounding/metrics.jsonl") == before:
            time.sleep(0.005)
        send(process.pid, number)
        assert processes.finish([process]) == [code]
        said = (tmp_path / "log-0").read_text()
        assert (
            "stopping: programs that train finish their step" in said
            and "runs are done; the same command continues from there" in said
        )
        assert "Traceback" not in said + "".join(log.read_text() for log in out.rglob("*.log"))
        assert any((out / "grounding/checkpoints").iterdir())
    processes.run("python", words(out), tmp_path / "log", prepare=of_its_own, seconds=600)
    assert_same(whole[0], out)


@pytest.mark.slow
def test_a_finished_demo_is_left_as_it_is(whole, tmp_path):
    before = (whole[0] / "results.json").read_bytes()
    said = processes.run("python", words(whole[0]), tmp_path / "log", prepare=of_its_own)
    assert "8 runs, 8 of them done already" in said and "SFT + GRPO" in said
    assert (whole[0] / "results.json").read_bytes() == before
