"""Kills, full disks, signals, bad gradients, little memory, rewards that hang: what a run does, and
that it loses nothing.
"""

import errno
import json
import os
import pickle
import random
import shutil
import signal
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import train_grpo
import train_sft
from minigrpo import grpo
from minigrpo.data import read_jsonl
from minigrpo.rewards import Scores
from minigrpo.run import files, folder, log, loop, save, starts, track
from minigrpo.run.args import parse_args
from minigrpo.run.evaluation import write_predictions
from minigrpo.run.guard import in_time
from tests.processes import finish, run, start


@pytest.fixture(scope="module")
def place(policy, phantom, tmp_path_factory):
    """place(program, name, *more): the arguments of a run in place.folder / name."""
    root = tmp_path_factory.mktemp("lost")
    policy.save_pretrained(root / "model")

    def arguments(program, name, *more, steps=4):
        words = [
            "--model",
            root / "model",
            "--train_data",
            phantom / "train.jsonl",
            "--output_dir",
            root / name,
            "--max_steps",
            steps,
            "--save_steps",
            1,
            "--learning_rate",
            1e-3,
            *more,
        ]
        if program == "train_sft":
            return [*words, "--batch_size", 2]
        return [
            *words,
            "--reward",
            "tests.test_nothing_lost:letters",
            "--prompts_per_step",
            2,
            "--group_size",
            3,
            "--max_new_tokens",
            8,
            "--updates_per_rollout",
            2,
        ]

    arguments.folder = root
    return arguments


def letters(answers, samples):
    return [len(set(answer)) / 7 for answer in answers]


def rows(run_folder, name="metrics"):
    def timeless(row):
        return {k: v for k, v in row.items() if "second" not in k and "memory" not in k}

    return [
        timeless(json.loads(line))
        for line in (run_folder / f"{name}.jsonl").read_text().splitlines()
    ]


def assert_same(one, other):
    """Bit for bit: weights, and every line of the logs but its times."""
    a, b = load_file(one / "final/model.safetensors"), load_file(other / "final/model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert rows(one) == rows(other)
    if (one / "rollouts.jsonl").exists():
        assert rows(one, "rollouts") == rows(other, "rollouts")


@pytest.fixture(scope="module")
def whole(place):
    """program -> the folder of its run that was never stopped."""
    made = {}

    def folder_of(program, steps=4):
        if (program, steps) not in made:
            run(
                program,
                place(program, f"{program}-{steps}", steps=steps),
                place.folder / f"{program}-{steps}.log",
            )
            made[program, steps] = place.folder / f"{program}-{steps}"
        return made[program, steps]

    return folder_of


def main(program, words):
    """The program in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [program.__name__ + ".py", *map(str, words)])
        patch.setattr(loop, "draw_curves", lambda folder: None)
        program.main()


def stop(program, words):
    with pytest.raises(SystemExit) as stopped:
        main(program, words)
    return str(stopped.value)


# ---- kills ---------------------------------------------------------------------------------------


def dying_at(rank, number):
    """kill -9 at the number-th time that a file is synced, renamed or a folder removed."""
    calls = []
    for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree")):

        def counted(*args, do=getattr(module, name), **more):
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return do(*args, **more)

        setattr(module, name, counted)


@pytest.mark.parametrize(
    "program", [pytest.param("train_sft", marks=pytest.mark.slow), "train_grpo"]
)
def test_killed_in_the_middle_of_saves(program, place, whole):
    """kill -9 inside what writes args.json, a checkpoint, or the final model, several times in one
    run: it ends as the whole run.
    """
    words, kills = place(program, f"{program}-saves"), 0
    for number in (2, 24, 57):
        (code,) = finish(
            start(
                program,
                [*words, "--resume"],
                place.folder / "saves.log",
                prepare=partial(dying_at, number=number),
            )
        )
        kills += code == -9
    assert kills == 3
    run(program, [*words, "--resume"], place.folder / "saves.log")
    assert_same(whole(program), place.folder / f"{program}-saves")


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train_sft", "train_grpo"])
def test_a_hundred_kills_at_random_instants(program, place, whole):
    """A run is killed again and again until it ends, then another one, up to a hundred kills: each
    run ends as the one that was never killed. `pytest -rP` prints the figures of docs/node.md.
    """
    steps, draw, log = 40, random.Random(0), place.folder / "fifty.log-0"
    kills, early, in_save, runs, longest = 0, 0, 0, 0, 4.0
    while kills < 100:
        words, target = (
            place(program, f"{program}-fifty-{runs}", steps=steps),
            place.folder / f"{program}-fifty-{runs}",
        )
        while kills < 100:
            (process,) = start(program, [*words, "--resume"], place.folder / "fifty.log")
            process.join(draw.uniform(0.3, longest))
            in_save += any(target.glob("*/*.part")) or any(target.glob("*.part"))
            process.kill()
            (code,) = finish([process])
            if code == 0:
                break
            kills += 1
            early += "it/s" not in log.read_text() and "s/it" not in log.read_text()
        run(program, [*words, "--resume"], place.folder / "fifty.log")
        assert_same(whole(program, steps), target)
        runs += 1
    print(
        f"{program}: {kills} kills in {runs} runs of {steps} steps, {early} of them before the"
        f" run's first step, {in_save} in a save; all runs ended like the one that was never"
        " killed, bit for bit"
    )
    assert kills == 100 and kills - early >= 40


def test_a_kill_while_resuming_keeps_the_log(place, whole, tmp_path, monkeypatch):
    """Bug: --resume rewrote metrics.jsonl in place, and a kill there emptied it."""
    path = tmp_path / "metrics.jsonl"
    path.write_text((text := '{"step": 0, "loss": 1.0}\n') + '{"step": 1, "lo')
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        loop.JsonLines(path, 1)
    assert path.read_text().startswith(text)
    monkeypatch.undo()
    loop.JsonLines(path, 1)
    assert path.read_text() == text


def test_a_damaged_checkpoint_is_not_used(place, whole):
    """One byte of the newest is wrong: it says so and goes on from the one before."""
    words, name = place("train_sft", "damaged"), "damaged"
    finish(
        start(
            "train_sft", words, place.folder / "damaged.log", prepare=partial(dying_at, number=45)
        )
    )
    checkpoints = folder.checkpoints(place.folder / name)
    assert len(checkpoints) == 2
    weights = checkpoints[-1] / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    said = run("train_sft", [*words, "--resume"], place.folder / "damaged.log")
    assert (
        f"{checkpoints[-1]} cannot be used: model.safetensors: it has changed since it was saved"
        in said
        and f"resuming from {checkpoints[-2]}" in said
    )
    assert_same(whole("train_sft"), place.folder / name)


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda c: (c / "config.json").unlink(), "not those that were saved (config.json)"),
        (
            lambda c: (c / "pytorch_model.bin").write_bytes(b"cos\nsystem\n"),
            "not those that were saved (pytorch_model.bin)",
        ),
        (lambda c: (c / "checksums.json").unlink(), "no readable checksums.json"),
        (lambda c: (c / "checksums.json").write_text("[]"), "not those that were saved"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_said(tmp_path, harm, message):
    (tmp_path / "part").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "part" / name).write_text(name)
    files.seal(tmp_path / "part", tmp_path / "step-000001")
    assert files.damage(tmp_path / "step-000001") is None
    harm(tmp_path / "step-000001")
    assert message in files.damage(tmp_path / "step-000001")


# ---- full disks, signals, locks ------------------------------------------------------------------


def full_disk(rank):
    """The first saves find no room: once inside safetensors (a limit on the size of files), once
    while syncing.
    """
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    write, sync, seen = save._save, files.sync, []

    def limited(*args):
        seen.append(1)
        resource.setrlimit(
            resource.RLIMIT_FSIZE,
            (200_000 if len(seen) == 1 else resource.RLIM_INFINITY, resource.RLIM_INFINITY),
        )
        try:
            return write(*args)
        finally:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )

    def no_room(path):
        if len(seen) == 2 and path.suffix == ".safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        return sync(path)

    save._save, files.sync = limited, no_room


def test_a_full_disk_costs_a_checkpoint_and_no_step(place, whole):
    said = run(
        "train_grpo", place("train_grpo", "full"), place.folder / "full.log", prepare=full_disk
    )
    assert "checkpoint of step 1 was not saved" in said and "File too large" in said
    assert (
        "step-000002 cannot be written (No space left on device); the newest is step 0: no"
        " checkpoint has been saved yet. Training" in said
    )
    assert "step 3 was not saved" not in said
    assert_same(whole("train_grpo"), place.folder / "full")


def no_room_for_a_line(rank):
    """The line of step 2 finds a full disk."""
    write = log.JsonLines.write

    def full(self, row):
        if row["step"] == 2 and self.path.name == "metrics.jsonl":
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, self.file.fileno())
        write(self, row)

    log.JsonLines.write = full


def test_a_full_disk_at_a_log_line_ends_the_run_and_loses_nothing(place, whole):
    """Bug: it was a traceback, out of which nobody reads that --resume goes on."""
    words = place("train_sft", "full-line", "--save_steps", 1)
    said = run(
        "train_sft", words, place.folder / "full-line.log", prepare=no_room_for_a_line, code=1
    )
    assert (
        "metrics.jsonl cannot be written (No space left on device). Make room" in said
        and "--resume continues from" in said
        and "Traceback" not in said
    )
    run("train_sft", [*words, "--resume"], place.folder / "full-line.log")
    assert_same(whole("train_sft"), place.folder / "full-line")


@pytest.mark.parametrize(
    "program", ["train_sft", pytest.param("train_grpo", marks=pytest.mark.slow)]
)
def test_sigterm_saves_and_has_a_code_of_its_own(program, place, whole):
    words, name = place(program, f"{program}-term", "--save_steps", 100), f"{program}-term"
    (process,) = start(program, words, place.folder / "term.log")
    log = place.folder / name / "metrics.jsonl"
    while process.is_alive() and not (log.exists() and log.read_text()):
        time.sleep(0.01)
    process.terminate()
    assert finish([process]) == [75]
    assert "--resume continues" in (place.folder / "term.log-0").read_text()
    run(program, [*words, "--resume"], place.folder / "term.log")
    assert_same(whole(program), place.folder / name)


def test_a_second_run_into_the_same_folder_is_refused(place):
    """The lock dies with its process: after kill -9 the folder is free."""
    words, name = place("train_sft", "locked", steps=1000), place.folder / "locked"
    (process,) = start("train_sft", words, place.folder / "locked.log")
    while process.is_alive() and not (name / "metrics.jsonl").exists():
        time.sleep(0.01)
    assert "is in use: another process is writing this run" in stop(train_sft, [*words, "--resume"])
    assert process.is_alive()
    process.kill()
    process.join()
    words[words.index("--max_steps") + 1] = len(rows(name)) + 1
    main(train_sft, [*words, "--resume"])
    assert (name / "final").exists()


# ---- what is kept, and what is not ours -----------------------------------------------------


def begun(place, name, policy, *steps, optimizer=None):
    """A run's folder with checkpoints, as a killed run leaves it."""
    run_folder = place.folder / name
    run_folder.mkdir()
    (run_folder / "args.json").write_text("{}")
    for step in steps:
        loop.save_checkpoint(run_folder, step, policy, *([optimizer] if optimizer else []), keep=9)
    return run_folder


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_checkpoint_just_saved_stays(place, policy, monkeypatch):
    """Bug: of checkpoints 3 and 6, 6 damaged, a run that went on from 3 deleted the 4 that it had
    just saved, since 6 is a higher number; killed there, it was lost."""
    run_folder, seen = begun(place, "newer", policy, 3, 6), []
    flip_a_bit(run_folder / "checkpoints/step-000006/model.safetensors")
    save = loop.save_checkpoint

    def dying(folder, step, *more, **keep):
        save(folder, step, *more, **keep)
        seen.extend(names(folder / "checkpoints"))
        sys.exit("killed")

    monkeypatch.setattr(loop, "save_checkpoint", dying)
    assert (
        stop(
            train_sft, [*place("train_sft", "newer", "--keep_checkpoints", 1, steps=8), "--resume"]
        )
        == "killed"
    )
    assert seen == ["step-000004", "step-000006.damaged"]


def test_damaged_checkpoints_do_not_count(place, policy, monkeypatch, capsys):
    """Of those to keep: 1 is older than the one that the run goes on from, 2 is damaged."""
    run_folder = begun(place, "counted", policy, 1, 2, 3)
    flip_a_bit(run_folder / "checkpoints/step-000002/model.safetensors")
    args = SimpleNamespace(**vars(train_sft.SftArguments("m", "t", str(run_folder), resume=True)))
    checkpoint = loop.last_checkpoint(args)
    folder._tidy(run_folder, checkpoint)
    assert (
        "step-000002 is damaged and has been renamed to step-000002.damaged"
        in capsys.readouterr().out
    )
    loop.save_checkpoint(run_folder, 4, policy, keep=3)
    assert names(run_folder / "checkpoints") == [
        "step-000001",
        "step-000002.damaged",
        "step-000003",
        "step-000004",
    ]


def test_checkpoints_beyond_the_present_step_do_not_count(place, policy):
    """Somebody has put it there while the run went on; it is neither counted nor removed."""
    run_folder = begun(place, "beyond", policy, 9)
    for step in (1, 2, 3):
        loop.save_checkpoint(run_folder, step, policy, keep=2)
    assert names(run_folder / "checkpoints") == ["step-000002", "step-000003", "step-000009"]


def foreign(folder):
    """Things of a user's own in a folder of the run."""
    (folder / "keep").mkdir(parents=True)
    (folder / "step-000001.bak2").mkdir()
    (folder / "step-000002.txt").write_text("mine")
    (folder / "elsewhere").mkdir()
    for name in ("keep", "step-000001.bak2", "elsewhere"):
        (folder / name / "thesis.txt").write_text("mine")
    (folder / "step-000001").symlink_to(folder / "elsewhere")
    (folder / "step-000000").symlink_to(folder / "nowhere")
    (folder / "step-000007").write_text("mine")
    return names(folder)


@pytest.mark.parametrize("save, where", [("save_checkpoint", "checkpoints"), ("save_best", "best")])
def test_only_the_run_s_own_folders_are_removed(save, where, place, policy):
    """Bug: a file, or a name such as step-000001.bak2, was a traceback; a folder of the user's was
    deleted.
    """
    run_folder = begun(place, f"foreign-{where}", policy)
    mine = foreign(run_folder / where)
    for step in (3, 4, 5):
        getattr(loop, save)(run_folder, step, policy)
    assert names(run_folder / where) == sorted([*mine, "step-000005"])
    assert all(
        (run_folder / where / name / "thesis.txt").exists()
        for name in ("keep", "step-000001.bak2", "elsewhere")
    )


def test_a_finished_run_leaves_what_is_not_its_own(place, policy):
    """Bug: checkpoints/ was removed whole."""
    run_folder = begun(place, "foreign-end", policy, 3)
    mine = foreign(run_folder / "checkpoints")
    main(train_sft, [*place("train_sft", "foreign-end"), "--resume"])
    assert (run_folder / "final").exists() and names(run_folder / "checkpoints") == [
        name for name in mine if name != "step-000003"
    ]


def test_a_link_where_a_checkpoint_must_go_stays(place, policy, capsys):
    """It is said, and the run goes on."""
    run_folder = begun(place, "link", policy)
    foreign(run_folder / "checkpoints")
    loop.save_checkpoint(run_folder, 1, policy)
    assert "checkpoint of step 1 was not saved" in capsys.readouterr().err
    assert names(run_folder / "checkpoints/elsewhere") == ["thesis.txt"] and not list(
        run_folder.rglob("*.part")
    )


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o027, 0o640)])
def test_files_have_the_mode_of_the_umask(mask, mode, place, policy):
    """Bug: safetensors writes files that nobody but their owner can read."""
    before = os.umask(mask)
    try:
        run_folder = begun(place, f"mode-{mode}", policy, 1)
        loop.save_best(run_folder, 1, policy)
    finally:
        os.umask(before)
    modes = {
        path.name: path.stat().st_mode & 0o777 for path in run_folder.rglob("*") if path.is_file()
    }
    assert modes["model.safetensors"] == mode and set(modes.values()) == {mode}


# ---- what a run was made of -----------------------------------------------------------------


def opened(capsys, words, samples=(), program=train_sft):
    """What `open_run` says to these arguments."""
    kind = train_sft.SftArguments if program is train_sft else train_grpo.GrpoArguments
    _, lock = loop.open_run(
        parse_args(kind, "", [*map(str, words)]), *([None, samples] if samples else [])
    )
    lock.close()
    return capsys.readouterr().out


def test_the_first_arguments_stay(place, capsys):
    """Bug: each --resume overwrote args.json, so the third start said "was 0.0001 when this run
    began".
    """
    words = place("train_sft", "arguments")
    opened(capsys, words)
    for rate in (1e-4, 1e-3):
        said = opened(capsys, [*words, "--learning_rate", rate, "--resume"])
    assert json.loads((place.folder / "arguments/args.json").read_text())["learning_rate"] == 1e-3
    assert "--learning_rate is 0.001 now; it was 0.001 from step 0, 0.0001 from step 0" in said
    starts = [
        json.loads(line)
        for line in (place.folder / "arguments/starts.jsonl").read_text().splitlines()
    ]
    assert [start["args"]["learning_rate"] for start in starts] == [1e-3, 1e-4, 1e-3]
    assert all(
        {"minigrpo", "commit", "python", "torch", "transformers"} <= start["versions"].keys()
        for start in starts
    )


def test_another_schedule_is_pointed_out(place, capsys):
    """Bug: SFT resumed with another --max_steps jumps along its cosine, and nothing said so."""
    opened(capsys, place("train_sft", "schedule"))
    said = opened(capsys, [*place("train_sft", "schedule", steps=8), "--resume"])
    assert (
        "--max_steps is 8 now; it was 4 from step 0. The learning rate's schedule ends there"
        in said
    )


def changed(what, data):
    """Change one thing that a run learns from."""
    lines = (data / "train.jsonl").read_text().splitlines(keepends=True)
    if what == "order":
        (data / "train.jsonl").write_text("".join(lines[::-1]))
    elif what == "half":
        (data / "train.jsonl").write_text("".join(lines[: len(lines) // 2]))
    elif what == "a word":
        (data / "train.jsonl").write_text("".join(lines).replace("effusion", "Effusion"))
    elif what == "a film":
        film = sorted((data / "films").iterdir())[-1]
        film.write_bytes(film.read_bytes() + b"\0")
    elif what == "validation":
        (data / "test.jsonl").write_text((data / "train.jsonl").read_text())
    elif what == "the model":
        flip_a_bit(data / "model/config.json")
    elif what == "weights of the same size":
        path = data / "model/model.safetensors"
        path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))


@pytest.mark.parametrize(
    "what, said",
    [
        ("order", "--train_data"),
        ("half", "--train_data"),
        ("a word", "--train_data"),
        ("a film", "films"),
        ("validation", "--eval_data"),
        ("the model", "--model"),
        ("weights of the same size", "--model"),
        ("nothing", None),
    ],
)
def test_changed_data_are_named_on_resume(what, said, place, phantom, tmp_path, capsys):
    """Bug: a run went on with a file that had been reordered, edited or halved, to other weights,
    without a word.
    """
    data = shutil.copytree(phantom, tmp_path / "data")
    shutil.copytree(place.folder / "model", data / "model")
    (data / "model/checksums.json").unlink(missing_ok=True)  # a model from elsewhere has none
    words = [
        "--model",
        data / "model",
        "--train_data",
        data / "train.jsonl",
        "--eval_data",
        data / "test.jsonl",
        "--eval_steps",
        1,
        "--output_dir",
        tmp_path / "run",
    ]

    def samples():
        return read_jsonl(data / "train.jsonl", verify_images=False)

    opened(capsys, words, samples())
    changed(what, data)
    notes = opened(capsys, [*words, "--resume"], samples())
    assert (
        f"the content of {said}"
        in notes.replace("the content of the films", "the content of films")
        if said
        else not notes
    )
    again = opened(capsys, [*words, "--resume"], samples())
    assert again == notes.replace(" now; ", " since step 0; "), (
        "it is still not what the run began with"
    )


def test_other_weights_of_the_reward_are_named_on_resume(place, tmp_path):
    """Bug: with another file in --reward_weights the reward was another one, without a word."""
    (tmp_path / "encoder").mkdir()
    words = map(str, place("train_grpo", "weights"))
    args = parse_args(train_grpo.GrpoArguments, "", [*words])
    args.reward_weights = str(tmp_path)
    told = []
    for name in ("chexbert.pth", "encoder/model.safetensors"):
        for byte in b"ab":
            (tmp_path / name).write_bytes(bytes([byte]) * 2_000_000)
            told.append(starts.content(args, [])["--reward_weights"])
    assert len(set(told)) == 4


@pytest.mark.parametrize("name", [".lock", "args.json", "starts.jsonl", "metrics.jsonl"])
def test_a_pipe_in_a_run_s_folder_is_not_waited_for(name, place, capsys):
    """Bug: --resume hung as it opened the pipe."""
    words = place("train_sft", f"pipe{name}")
    opened(capsys, words)
    path = place.folder / f"pipe{name}" / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    reader = os.open(path, os.O_RDWR | os.O_NONBLOCK)  # without the mend: no hang of the tests
    try:
        with pytest.raises(ValueError, match="not a regular file"):
            folder._check_folder(
                path.parent, parse_args(train_sft.SftArguments, "", [*map(str, words), "--resume"])
            )
    finally:
        os.close(reader)


@pytest.mark.parametrize("name", ["a.safetensors", "checksums.json"])
def test_a_pipe_in_a_checkpoint_is_damage(name, tmp_path):
    with files.aside(tmp_path / "step") as part:
        part.mkdir()
        (part / "a.safetensors").write_bytes(b"a")
    (tmp_path / "step" / name).unlink()
    os.mkfifo(tmp_path / "step" / name)
    assert files.damage(tmp_path / "step") == f"{name} is not a regular file"


def test_other_versions_are_named_on_resume(place, capsys, monkeypatch):
    words = place("train_grpo", "versions")
    opened(capsys, words, program=train_grpo)
    monkeypatch.setattr(starts.platform, "python_version", lambda: "3.99.0")
    assert "note: python is 3.99.0 now; it was 3." in opened(
        capsys, [*words, "--resume"], program=train_grpo
    )


def test_damaged_starts_stay_and_count_for_nothing(place, capsys):
    words, harm = (
        place("train_sft", "starts"),
        b'\xff\n5\n{"step": 2, "args": 7}\n{"step": 3}\n{"ste',
    )
    opened(capsys, words)
    path = place.folder / "starts/starts.jsonl"
    first = path.read_bytes()
    path.write_bytes(first + harm)
    assert "--seed is 3 now; it was 0 from step 0" in opened(
        capsys, [*words, "--seed", 3, "--resume"]
    )
    assert (
        path.read_bytes().startswith(first + harm + b"\n{")
        and len(starts.past_starts(place.folder / "starts", {})) == 3
    )


@pytest.mark.parametrize(
    "figure, wanted, message",
    [
        ("momentum_buffer", "adamw", "holds the state of --optimizer muon"),
        ("exp_avg", "muon", "holds the state of --optimizer adamw"),
    ],
)
def test_another_optimizer_is_refused(figure, wanted, message, place, policy):
    """Bug: KeyError 'step', with args.json rewritten already."""
    state = SimpleNamespace(
        state={p: {figure: torch.zeros_like(p)} for p in policy.model.parameters() if p.dim() == 2}
    )
    run_folder = begun(place, f"optimizer-{wanted}", policy, 1, optimizer=state)
    said = stop(
        train_sft, [*place("train_sft", f"optimizer-{wanted}"), "--resume", "--optimizer", wanted]
    )
    assert message in said and f"resume with --optimizer {message.split()[-1]}" in said
    assert (run_folder / "args.json").read_text() == "{}" and not (
        run_folder / "starts.jsonl"
    ).exists()


def test_a_run_of_another_program_is_refused(place, capsys):
    """Bug: train_grpo.py --resume went on in a run of train_sft.py, with a note for every
    argument.
    """
    opened(capsys, place("train_sft", "whose"))
    assert "holds a run of train_sft.py: resume it with that" in stop(
        train_grpo, [*place("train_grpo", "whose"), "--resume"]
    )


@pytest.mark.parametrize("steps", [4, 9])
def test_a_finished_run(steps, tmp_path, capsys):
    """Bug: a kill between final/ and the curves left a run without curves; and of a larger
    --max_steps it said "is finished" alone.
    """
    (tmp_path / "final").mkdir()
    (tmp_path / "args.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(4))
    )
    with pytest.raises(SystemExit) as ended:
        loop.last_checkpoint(
            train_sft.SftArguments("m", "t", str(tmp_path), resume=True, max_steps=steps)
        )
    assert ended.value.code == 0 and (tmp_path / "curves.png").exists()
    said = capsys.readouterr().out
    assert (
        "It took 4 steps, and --max_steps is 9" in said and f"--model {tmp_path}/final" in said
    ) == (steps > 4)


def test_damaged_lines_of_a_log_are_set_aside(tmp_path, capsys):
    """Bug: two NUL bytes in the first line erased all rows behind it in silence; a line `5` was a
    traceback.
    """
    path, good = (
        tmp_path / "metrics.jsonl",
        [b'{"step": %d, "loss": 1.0}' % step for step in range(4)],
    )
    path.write_bytes(
        b"\n".join(
            [
                b"\0\0" + good[0],
                good[1],
                b"5",
                good[2],
                b'\xff{"step"',
                b'{"loss": 1}',
                good[3],
                b'{"step": 4, "lo',
            ]
        )
    )
    log = loop.JsonLines(path, 9)
    assert path.read_bytes() == b"\n".join([*good[1:], b""]) and log.past("loss") == [1.0] * 3
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes().split(b"\n") == [
        b"\0\0" + good[0],
        b"5",
        b'\xff{"step"',
        b'{"loss": 1}',
        b"",
    ]
    assert (
        f"note: {path}: line 1, 3, 5, 6: not a row of a log, moved to metrics.jsonl.damaged"
        in capsys.readouterr().out
    )
    loop.JsonLines(path, 9)
    assert not capsys.readouterr().out


# ---- what happens around a run --------------------------------------------------------------


NO_ROOM = [
    Exception("No space left on device (os error 28)"),
    SafetensorError("I/O error: No space left on device"),
    OSError(errno.ENOSPC, "No space left on device"),
]


def no_room_in(where, error):
    """`Policy.save_pretrained` that fails half-way in folders of this name."""
    save = train_sft.Policy.save_pretrained

    def full(self, target, weights=None):
        save(self, target, weights)
        if where in str(target):
            raise error

    return full


@pytest.mark.parametrize("error", NO_ROOM, ids=lambda error: type(error).__name__)
def test_a_checkpoint_that_cannot_be_written(error, place, policy, monkeypatch, capsys):
    """Bug: tokenizers raises a plain Exception, which was a traceback and left a .part that filled
    the disk.
    """
    run_folder = begun(place, f"no-room-{type(error).__name__}", policy, 1)
    monkeypatch.setattr(train_sft.Policy, "save_pretrained", no_room_in("step-000002", error))
    loop.save_checkpoint(run_folder, 2, policy)
    loop.save_best(run_folder, 2, policy)
    said = capsys.readouterr().err
    assert (
        "checkpoint of step 2 was not saved" in said
        and "best model so far, of step 2, was not saved" in said
    )
    assert (
        f"{run_folder}/checkpoints/step-000002 cannot be written (" in said
        and said.count("No space left on device") == 2
    )
    assert names(run_folder / "checkpoints") == ["step-000001"] and not list(
        run_folder.rglob("*.part")
    )


@pytest.mark.parametrize("program", [train_sft, pytest.param(train_grpo, marks=pytest.mark.slow)])
def test_a_final_model_that_cannot_be_written(program, place, whole, monkeypatch):
    """Bug: a traceback, and without a checkpoint the run was lost."""
    name, words = (
        f"{program.__name__}-end",
        place(program.__name__, f"{program.__name__}-end", "--save_steps", 100),
    )
    with monkeypatch.context() as patch:
        patch.setattr(train_sft.Policy, "save_pretrained", no_room_in("final", NO_ROOM[0]))
        said = stop(program, words)
    assert (
        f"{name}/final cannot be written (No space left on device (os error 28))" in said
        and "--resume finishes the run" in said
    )
    assert f"All 4 steps are in {place.folder / name}/checkpoints/step-000004" in said and not list(
        (place.folder / name).rglob("*.part")
    )
    monkeypatch.setattr(torch.optim.AdamW, "step", None)  # no step is done again
    main(program, [*words, "--resume"])
    assert_same(whole(program.__name__), place.folder / name)
    assert not (place.folder / name / "checkpoints").exists()


@pytest.mark.parametrize(
    "stream, kind",
    [
        (1, "full"),
        (2, "pipe"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((2, "full"), (1, "pipe"), (2, "closed"))
        ),
    ],
)
def test_output_that_cannot_be_written_ends_nothing(stream, kind, place):
    """Bug: a terminal's log on a full disk, or `| head`, ended the training."""
    name = f"output-{stream}-{kind}"
    words = place("train_sft", name, "--batch_size", 1, steps=2)
    run(
        "train_sft",
        words,
        place.folder / f"{name}.log",
        prepare=partial(without_output, stream=stream, kind=kind),
    )
    assert (place.folder / name / "final").exists()


def without_output(rank, stream, kind):
    if kind == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), stream)
    elif kind == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, stream)
    else:
        os.close(stream)
        # as an interpreter that is started so has it
        setattr(sys, ("stdin", "stdout", "stderr")[stream], None)


def happening(place, name, event):
    """`tracker` that lets something happen behind the run's back after step 1."""

    def tracker(args, folder, start):
        return lambda row: event(place.folder / name) if row["step"] == 1 else None

    return tracker


@pytest.mark.parametrize(
    "name, event",
    [
        ("renamed", lambda folder: folder.rename(folder.with_name("elsewhere"))),
        ("removed", shutil.rmtree),
        ("no-log", lambda folder: (folder / "metrics.jsonl").unlink()),
    ],
)
def test_a_run_s_folder_that_is_gone(name, event, place, monkeypatch):
    """Bug: exit 0 with nothing but final/, or a traceback."""
    monkeypatch.setattr(loop, "tracker", happening(place, name, event))
    said = stop(train_sft, place("train_sft", name, "--save_steps", 100))
    assert (
        "metrics.jsonl cannot be written (it or its folder was removed or renamed)" in said
        and "--resume" in said
    )
    assert not (place.folder / name / "final").exists()


@pytest.mark.parametrize("program", [pytest.param(train_sft, marks=pytest.mark.slow), train_grpo])
def test_a_film_that_vanishes(program, place, phantom, whole, monkeypatch, tmp_path):
    """Bug: a traceback that named no way to go on."""
    data, name = shutil.copytree(phantom, tmp_path / "data"), f"{program.__name__}-film"
    words = place(program.__name__, name)
    words[words.index("--train_data") + 1] = data / "train.jsonl"

    def away(_):
        return (data / "films").rename(data / "away")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "tracker", happening(place, name, away))
        said = stop(program, words)
    assert (
        f"image {data}/films/phantom-train-" in said
        and "cannot be read (no such file): restore it" in said
    )
    assert f"--resume continues from {place.folder / name}/checkpoints/step-00000" in said
    (data / "away").rename(data / "films")
    main(program, [*words, "--resume"])
    assert_same(whole(program.__name__), place.folder / name)


CPU_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you"
    " tried to allocate 9999999999 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    "error", [RuntimeError(CPU_MEMORY), MemoryError()], ids=["torch", "python"]
)
@pytest.mark.parametrize(
    "program, names", [(train_sft, "--micro_batch"), (train_grpo, "--micro_tokens")]
)
def test_too_little_memory_on_a_cpu(program, names, error, place, monkeypatch, capsys):
    """Bug: halved on a GPU alone; on a CPU a traceback."""

    def score(*args, **more):
        raise error

    monkeypatch.setattr(program.Policy, "score", score)
    said = stop(
        program, place(program.__name__, f"memory-{program.__name__}-{type(error).__name__}")
    )
    assert (
        "out of memory (" in said
        and f"Lower {names}" in said
        and "--resume continues from step 0" in said
    )
    assert f"out of memory with {names}" in capsys.readouterr().err


def test_a_tracker_that_fails_is_left_out(place, monkeypatch, capsys):
    """Bug: TensorBoard on a full disk ended the training."""
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(track, "_tensorboard", lambda *_: lambda row: 1 / 0)
    main(train_sft, place("train_sft", "tracker", "--track", "tensorboard", steps=2))
    assert capsys.readouterr().out.count("--track tensorboard failed (division by zero)") == 1
    assert len(rows(place.folder / "tracker")) == 2


def test_scores_are_not_written_over_answers(tmp_path, samples):
    """Bug: predictions.jsonl was written anew in place, and a kill or a full disk there left 0 or
    20 of 27 answers.
    """
    path, answers = tmp_path / "predictions.jsonl", [s.answer for s in samples]
    write_predictions(path, samples, answers, None)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_predictions(
            path, samples, answers, None, [{"gleu": 1.0}] * 5 + [{"gleu": {1}}] * len(samples)
        )
    assert path.read_bytes() == before


# ---- the writer -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [*NO_ROOM, KeyError("x"), RuntimeError("PytorchStreamWriter failed"), MemoryError()],
    ids=lambda error: type(error).__name__,
)
def test_every_failure_to_write_is_one_error(error, tmp_path):
    (tmp_path / "a").write_text("before")
    with pytest.raises(files.WriteError) as failed, files.aside(tmp_path / "a") as part:
        part.write_text("half")
        raise error
    assert failed.value.path == tmp_path / "a" and str(failed.value).startswith(
        f"{tmp_path}/a cannot be written ("
    )
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "before"
    assert str(pickle.loads(pickle.dumps(failed.value))) == str(failed.value)


def test_a_part_that_is_somebody_s_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "a.part").symlink_to(tmp_path / "precious")
    files.write_aside(tmp_path / "a", "new")
    assert (
        (tmp_path / "precious").read_text() == "precious"
        and (tmp_path / "a").read_text() == "new"
        and names(tmp_path) == ["a", "precious"]
    )


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_writer_leaves_nothing(end, tmp_path):
    with pytest.raises(end), files.aside(tmp_path / "a") as part:
        part.mkdir()
        (part / "half").write_text("half")
        raise end
    assert not names(tmp_path)


# ---- inside a step -------------------------------------------------------------------------------


def test_a_bad_gradient_skips_its_update(place, monkeypatch):
    """The step after it starts from the weights and the optimiser of the step before it; the batch
    is kept.
    """
    clip, norms, seen = torch.nn.utils.clip_grad_norm_, iter([1, float("nan"), 1e9, 1]), []

    def worse(parameters, most):
        clip(parameters, most)
        seen.append([p.detach().clone() for p in parameters])
        norm = torch.tensor(next(norms))
        if norm != 1:
            for p in parameters:
                p.grad.fill_(norm)
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", worse)
    main(train_sft, place("train_sft", "nan"))
    assert [row["skipped_updates"] for row in rows(place.folder / "nan")] == [0, 1, 1, 0]
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(*seen[1:])), (
        "steps 1 and 2 changed nothing"
    )
    final = load_file(place.folder / "nan/final/model.safetensors")
    assert all(w.isfinite().all() for w in final.values())
    kept = json.loads((place.folder / "nan/skipped/step-000001-0-rank-0.json").read_text())
    assert (
        kept["grad_norm"] == "nan"
        and kept["batch"][0]["file"].endswith("train.jsonl")
        and kept["batch"][0]["line"] > 0
    )


def test_too_many_bad_gradients_stop_the_run(place, monkeypatch):
    """Counted over restarts, too."""
    monkeypatch.setattr(
        grpo,
        "grpo_loss",
        lambda *args, loss=grpo.grpo_loss, **more: (
            (found := loss(*args, **more))[0] * float("nan"),
            found[1],
        ),
    )
    words = place("train_grpo", "too-many", "--max_skipped", 3)
    said = stop(train_grpo, words)
    assert "4 updates were skipped, and --max_skipped is 3" in said and "--learning_rate" in said
    kept = sorted(path.name for path in (place.folder / "too-many/skipped").iterdir())
    assert kept == [
        f"step-00000{step}-{update}-rank-0.json" for step in (0, 1) for update in (0, 1)
    ]
    batch = json.loads((place.folder / "too-many/skipped" / kept[0]).read_text())["batch"]
    assert len(batch) == 1 and len(batch[0]["answers"]) == 3
    assert "4 updates were skipped" in stop(train_grpo, [*words, "--resume"]), (
        "2 before the checkpoint of step 1, and 2 again"
    )


def test_out_of_memory_halves_and_goes_on(place, monkeypatch, capsys):
    """The same run as with the smaller sizes from the start, up to rounding; half-done gradients
    are thrown away.
    """
    main(
        train_grpo, place("train_grpo", "small", "--micro_tokens", 64, "--rollout_rows", 4, steps=1)
    )
    generate, score = grpo.generate, train_grpo.Policy.score

    def little(*args, rows_at_once, **more):
        if rows_at_once > 4:
            raise torch.OutOfMemoryError("pretended")
        return generate(*args, rows_at_once=rows_at_once, **more)

    def fails_late(policy, prompts, *args, **more):
        found = score(policy, prompts, *args, **more)
        if settings.micro_tokens > 64 and torch.is_grad_enabled():
            (found[0].sum() * 1e3).backward()  # what a failed try may leave behind
            raise torch.OutOfMemoryError("pretended")
        return found

    micro_batches, settings = grpo.micro_batches, SimpleNamespace(micro_tokens=0)

    def noting(*args):
        settings.micro_tokens = args[-1]
        return micro_batches(*args)

    monkeypatch.setattr(grpo, "micro_batches", noting)
    monkeypatch.setattr(grpo, "generate", little)
    monkeypatch.setattr(train_grpo.Policy, "score", fails_late)
    main(
        train_grpo,
        place("train_grpo", "large", "--micro_tokens", 256, "--rollout_rows", 16, steps=1),
    )
    said = capsys.readouterr().err
    assert (
        "out of memory with --micro_tokens 256; continuing with 128" in said
        and "--micro_tokens 128; continuing with 64" in said
    )
    assert "--rollout_rows 8; continuing with 4" in said
    (one,), (other,) = rows(place.folder / "small"), rows(place.folder / "large")
    for name in ("loss", "grad_norm", "kl", "entropy"):
        assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7), name
    a, b = (
        load_file(place.folder / f"{name}/final/model.safetensors") for name in ("small", "large")
    )
    assert all(torch.allclose(a[k], b[k], rtol=0, atol=1e-5) for k in a)


def test_a_reward_that_hangs_masks_its_group(samples):
    answers, groups = [f"{i}" for i in range(6)], [s for s in samples[:3] for _ in range(2)]

    def reward(answers, given):
        if samples[1] in given:
            time.sleep(30)
        return Scores(
            [float(a) for a in answers], [True] * len(answers), {"own": [1.0] * len(answers)}
        )

    began = time.time()
    found = in_time(reward, answers, groups, 2, 0.3)
    assert time.time() - began < 5
    assert found.valid == [True, True, False, False, True, True] and found.values == [
        0.0,
        1.0,
        0.0,
        0.0,
        4.0,
        5.0,
    ]
    assert [value == value for value in found.parts["own"]] == found.valid
    assert in_time(reward, answers[:2], groups[:2], 2, 5.0).values == [0.0, 1.0]
    with pytest.raises(ZeroDivisionError):
        in_time(lambda *_: 1 / 0, answers, groups, 2, 5.0)


# ---- validation, what is kept, other logs --------------------------------------------------------


@pytest.mark.parametrize(
    "program, figure, better",
    [
        pytest.param(train_sft, "eval_loss", min, marks=pytest.mark.slow),
        (train_grpo, "eval_reward", max),
    ],
)
def test_the_best_weights_are_kept(program, figure, better, place, phantom, monkeypatch):
    name, seen = f"best-{figure}", {}
    save = loop.save_best
    monkeypatch.setattr(
        loop,
        "save_best",
        lambda folder, step, policy: (
            seen.update({step: policy.head.detach().clone()}) or save(folder, step, policy)
        ),
    )
    main(
        program,
        place(
            program.__name__,
            name,
            "--eval_data",
            phantom / "test.jsonl",
            "--eval_steps",
            2,
            "--keep_checkpoints",
            3,
            steps=6,
        ),
    )
    found = {row["step"] + 1: row[figure] for row in rows(place.folder / name) if figure in row}
    assert list(found) == [2, 4, 6]
    best = next(step for step in found if found[step] == better(found.values()))
    (kept,) = (place.folder / name / "best").iterdir()
    assert kept.name == f"step-{best:06d}" and max(seen) == best
    stored = load_file(kept / "model.safetensors")
    assert torch.equal(
        stored.get("lm_head.weight", stored.get("model.language_model.embed_tokens.weight")),
        seen[best],
    )


@pytest.mark.slow
def test_the_last_checkpoints_are_kept(place):
    words = place("train_sft", "kept", "--keep_checkpoints", 3, steps=8)
    finish(start("train_sft", words, place.folder / "kept.log", prepare=stopping_at_the_end))
    assert [path.name for path in sorted((place.folder / "kept/checkpoints").iterdir())] == [
        "step-000005",
        "step-000006",
        "step-000007",
    ]


def stopping_at_the_end(rank):
    loop.save_final = lambda *_: os._exit(3)


def test_tensorboard_has_every_figure(place):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    main(train_sft, place("train_sft", "board", "--track", "tensorboard", steps=2))
    board = events.EventAccumulator(str(place.folder / "board/tensorboard"))
    board.Reload()
    logged = [
        json.loads(line) for line in (place.folder / "board/metrics.jsonl").read_text().splitlines()
    ]
    assert set(board.Tags()["scalars"]) == set(logged[0]) - {"step"}
    assert [event.value for event in board.Scalars("loss")] == pytest.approx(
        [row["loss"] for row in logged]
    )


@pytest.mark.slow
def test_wandb_gets_every_row(place, monkeypatch):
    """Offline: the real package, its rows intercepted."""
    wandb = pytest.importorskip("wandb")
    got, asked = [], {}
    monkeypatch.setattr(
        wandb,
        "init",
        lambda **settings: (
            asked.update(settings) or SimpleNamespace(log=lambda row, step: got.append((step, row)))
        ),
    )
    main(train_sft, place("train_sft", "wandb", "--track", "wandb", steps=2))
    assert (
        [step for step, _ in got] == [0, 1]
        and asked["resume"] == "allow"
        and asked["config"]["max_steps"] == 2
    )
    assert [row["loss"] for _, row in got] == [row["loss"] for row in rows(place.folder / "wandb")]


def test_trackers_that_are_not_there(place, monkeypatch):
    monkeypatch.setattr("minigrpo.packages.find_spec", lambda name: None)
    assert "pip install wandb" in stop(train_sft, place("train_sft", "none", "--track", "wandb"))
