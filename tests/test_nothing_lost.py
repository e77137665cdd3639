"""Kills, full disks, signals, bad gradients, little memory, rewards that hang: what a run does, and that it loses nothing."""

import errno
import json
import os
import random
import signal
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train_grpo
import train_sft
from minigrpo.run import files, folder, log
from minigrpo.run.guard import in_time
from minigrpo.rewards import Scores
from tests.processes import finish, run, start


@pytest.fixture(scope="module")
def place(policy, phantom, tmp_path_factory):
    """place(program, name, *more): the arguments of a run in place.folder / name."""
    root = tmp_path_factory.mktemp("lost")
    policy.save_pretrained(root / "model")

    def arguments(program, name, *more, steps=4):
        words = ["--model", root / "model", "--train_data", phantom / "train.jsonl", "--output_dir", root / name, "--max_steps", steps,
                 "--save_steps", 1, "--learning_rate", 1e-3, *more]
        if program == "train_sft":
            return [*words, "--batch_size", 2]
        return [*words, "--reward", "tests.test_nothing_lost:letters", "--prompts_per_step", 2, "--group_size", 3, "--max_new_tokens", 8,
                "--updates_per_rollout", 2]
    arguments.folder = root
    return arguments


def letters(answers, samples):
    return [len(set(answer)) / 7 for answer in answers]


def rows(run_folder, name="metrics"):
    timeless = lambda row: {k: v for k, v in row.items() if "second" not in k and "memory" not in k}
    return [timeless(json.loads(line)) for line in (run_folder / f"{name}.jsonl").read_text().splitlines()]


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
            run(program, place(program, f"{program}-{steps}", steps=steps), place.folder / f"{program}-{steps}.log")
            made[program, steps] = place.folder / f"{program}-{steps}"
        return made[program, steps]
    return folder_of


def main(program, words):
    """The program in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [program.__name__ + ".py", *map(str, words)])
        patch.setattr(program, "draw_curves", lambda folder: None)
        program.main()


def stop(program, words):
    with pytest.raises(SystemExit) as stopped:
        main(program, words)
    return str(stopped.value)


# ---- kills ----------------------------------------------------------------------------------------------------------


def dying_at(rank, number):
    """kill -9 at the number-th time that a file is synced, renamed or a folder removed."""
    calls = []
    for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (folder.shutil, "rmtree")):
        def counted(*args, do=getattr(module, name), **more):
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return do(*args, **more)
        setattr(module, name, counted)


@pytest.mark.parametrize("program", [pytest.param("train_sft", marks=pytest.mark.slow), "train_grpo"])
def test_killed_in_the_middle_of_saves(program, place, whole):
    """kill -9 inside what writes args.json, a checkpoint, or the final model, several times in one run: it ends as the whole run."""
    words, kills = place(program, f"{program}-saves"), 0
    for number in (2, 24, 57):
        (code,) = finish(start(program, [*words, "--resume"], place.folder / "saves.log", prepare=partial(dying_at, number=number)))
        kills += code == -9
    assert kills == 3
    run(program, [*words, "--resume"], place.folder / "saves.log")
    assert_same(whole(program), place.folder / f"{program}-saves")


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train_sft", "train_grpo"])
def test_fifty_kills_at_random_instants(program, place, whole):
    """A run is killed again and again until it ends, then another one, up to fifty kills: each run ends as the one that was never
    killed. `pytest -rP` prints the figures of docs/node.md."""
    steps, draw, log = 40, random.Random(0), place.folder / "fifty.log-0"
    kills, early, in_save, runs, longest = 0, 0, 0, 0, 4.0
    while kills < 50:
        words, target = place(program, f"{program}-fifty-{runs}", steps=steps), place.folder / f"{program}-fifty-{runs}"
        while kills < 50:
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
    print(f"{program}: {kills} kills in {runs} runs of {steps} steps, {early} of them before the run's first step, {in_save} in a save; "
          "all runs ended like the one that was never killed, bit for bit")
    assert kills == 50 and kills - early >= 20


def test_a_kill_while_resuming_keeps_the_log(place, whole, tmp_path, monkeypatch):
    """Bug: --resume rewrote metrics.jsonl in place, and a kill there emptied it."""
    path = tmp_path / "metrics.jsonl"
    path.write_text((text := '{"step": 0, "loss": 1.0}\n') + '{"step": 1, "lo')
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train_sft.JsonLines(path, 1)
    assert path.read_text().startswith(text)
    monkeypatch.undo()
    train_sft.JsonLines(path, 1)
    assert path.read_text() == text


def test_a_damaged_checkpoint_is_not_used(place, whole):
    """One byte of the newest is wrong: it says so and goes on from the one before."""
    words, name = place("train_sft", "damaged"), "damaged"
    finish(start("train_sft", words, place.folder / "damaged.log", prepare=partial(dying_at, number=45)))
    checkpoints = folder.checkpoints(place.folder / name)
    assert len(checkpoints) == 2
    weights = checkpoints[-1] / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    said = run("train_sft", [*words, "--resume"], place.folder / "damaged.log")
    assert f"{checkpoints[-1]} cannot be used: model.safetensors: not as it was saved" in said and f"resuming from {checkpoints[-2]}" in said
    assert_same(whole("train_sft"), place.folder / name)


@pytest.mark.parametrize("harm, message", [
    (lambda c: (c / "config.json").unlink(), "not those that were saved (config.json)"),
    (lambda c: (c / "pytorch_model.bin").write_bytes(b"cos\nsystem\n"), "not those that were saved (pytorch_model.bin)"),
    (lambda c: (c / "checksums.json").unlink(), "no readable checksums.json"),
    (lambda c: (c / "checksums.json").write_text("[]"), "not those that were saved")])
def test_what_is_wrong_with_a_checkpoint_is_said(tmp_path, harm, message):
    (tmp_path / "part").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "part" / name).write_text(name)
    files.seal(tmp_path / "part", tmp_path / "step-000001")
    assert files.damage(tmp_path / "step-000001") is None
    harm(tmp_path / "step-000001")
    assert message in files.damage(tmp_path / "step-000001")


# ---- full disks, signals, locks -------------------------------------------------------------------------------------


def full_disk(rank):
    """The first saves find no room: once inside safetensors (a limit on the size of files), once while syncing."""
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save, sync, seen = folder._save_aside, files.sync, []

    def limited(*args):
        seen.append(1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000 if len(seen) == 1 else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        try:
            return save(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def no_room(path):
        if len(seen) == 2 and path.suffix == ".safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        return sync(path)
    folder._save_aside, files.sync = limited, no_room


def test_a_full_disk_costs_a_checkpoint_and_no_step(place, whole):
    said = run("train_grpo", place("train_grpo", "full"), place.folder / "full.log", prepare=full_disk)
    assert "checkpoint of step 1 not saved" in said and "File too large" in said
    assert "checkpoint of step 2 not saved ([Errno 28] No space left on device); the newest is none. Training goes on" in said
    assert "step 3 not saved" not in said
    assert_same(whole("train_grpo"), place.folder / "full")


def no_room_for_a_line(rank):
    """The line of step 2 finds a full disk."""
    write = log.JsonLines.write

    def full(self, row):
        if row["step"] == 2 and self.path.name == "metrics.jsonl":
            self.file.close()
            self.file = open("/dev/full", "w")
        write(self, row)
    log.JsonLines.write = full


def test_a_full_disk_at_a_log_line_ends_the_run_and_loses_nothing(place, whole):
    """Bug: it was a traceback, out of which nobody reads that --resume goes on."""
    words = place("train_sft", "full-line", "--save_steps", 1)
    said = run("train_sft", words, place.folder / "full-line.log", prepare=no_room_for_a_line, code=1)
    assert "metrics.jsonl cannot be written (No space left on device). Make room, then --resume" in said and "Traceback" not in said
    run("train_sft", [*words, "--resume"], place.folder / "full-line.log")
    assert_same(whole("train_sft"), place.folder / "full-line")


@pytest.mark.parametrize("program", ["train_sft", pytest.param("train_grpo", marks=pytest.mark.slow)])
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


# ---- inside a step --------------------------------------------------------------------------------------------------


def test_a_bad_gradient_skips_its_update(place, monkeypatch):
    """The step after it starts from the weights and the optimiser of the step before it; the batch is kept."""
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
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(*seen[1:])), "steps 1 and 2 changed nothing"
    final = load_file(place.folder / "nan/final/model.safetensors")
    assert all(w.isfinite().all() for w in final.values())
    kept = json.loads((place.folder / "nan/skipped/step-000001-0-rank-0.json").read_text())
    assert kept["grad_norm"] == "nan" and kept["batch"][0]["file"].endswith("train.jsonl") and kept["batch"][0]["line"] > 0


def test_too_many_bad_gradients_stop_the_run(place, monkeypatch):
    """Counted over restarts, too."""
    monkeypatch.setattr(train_grpo, "grpo_loss", lambda *args, loss=train_grpo.grpo_loss, **more: (
        (found := loss(*args, **more))[0] * float("nan"), found[1]))
    words = place("train_grpo", "too-many", "--max_skipped", 3)
    said = stop(train_grpo, words)
    assert "4 updates were skipped, --max_skipped is 3" in said and "--learning_rate" in said
    kept = sorted(path.name for path in (place.folder / "too-many/skipped").iterdir())
    assert kept == [f"step-00000{step}-{update}-rank-0.json" for step in (0, 1) for update in (0, 1)]
    batch = json.loads((place.folder / "too-many/skipped" / kept[0]).read_text())["batch"]
    assert len(batch) == 1 and len(batch[0]["answers"]) == 3
    assert "4 updates were skipped" in stop(train_grpo, [*words, "--resume"]), "2 before the checkpoint of step 1, and 2 again"


def test_out_of_memory_halves_and_goes_on(place, monkeypatch, capsys):
    """The same run as with the smaller sizes from the start, up to rounding; half-done gradients are thrown away."""
    main(train_grpo, place("train_grpo", "small", "--micro_tokens", 64, "--rollout_rows", 4, steps=1))
    generate, score = train_grpo.generate, train_grpo.Policy.score

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

    accumulate, settings = train_grpo.accumulate, SimpleNamespace(micro_tokens=0)

    def noting(*args):
        nonlocal settings
        settings = args[-1]
        return accumulate(*args)

    monkeypatch.setattr(train_grpo, "accumulate", noting)
    monkeypatch.setattr(train_grpo, "generate", little)
    monkeypatch.setattr(train_grpo.Policy, "score", fails_late)
    main(train_grpo, place("train_grpo", "large", "--micro_tokens", 256, "--rollout_rows", 16, steps=1))
    said = capsys.readouterr().err
    assert "out of memory with --micro_tokens 256; on with 128" in said and "--micro_tokens 128; on with 64" in said
    assert "--rollout_rows 8; on with 4" in said
    (one,), (other,) = rows(place.folder / "small"), rows(place.folder / "large")
    for name in ("loss", "grad_norm", "kl", "entropy"):
        assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7), name
    a, b = (load_file(place.folder / f"{name}/final/model.safetensors") for name in ("small", "large"))
    assert all(torch.allclose(a[k], b[k], rtol=0, atol=1e-5) for k in a)


def test_a_reward_that_hangs_masks_its_group(samples):
    answers, groups = [f"{i}" for i in range(6)], [s for s in samples[:3] for _ in range(2)]

    def reward(answers, given):
        if samples[1] in given:
            time.sleep(30)
        return Scores([float(a) for a in answers], [True] * len(answers), {"own": [1.0] * len(answers)})

    began = time.time()
    found = in_time(reward, answers, groups, 2, 0.3)
    assert time.time() - began < 5
    assert found.valid == [True, True, False, False, True, True] and found.values == [0.0, 1.0, 0.0, 0.0, 4.0, 5.0]
    assert [value == value for value in found.parts["own"]] == found.valid
    assert in_time(reward, answers[:2], groups[:2], 2, 5.0).values == [0.0, 1.0]
    with pytest.raises(ZeroDivisionError):
        in_time(lambda *_: 1 / 0, answers, groups, 2, 5.0)


# ---- validation, what is kept, other logs ---------------------------------------------------------------------------


@pytest.mark.parametrize("program, figure, better", [
    pytest.param(train_sft, "eval_loss", min, marks=pytest.mark.slow), (train_grpo, "eval_reward", max)])
def test_the_best_weights_are_kept(program, figure, better, place, phantom, monkeypatch):
    name, seen = f"best-{figure}", {}
    save = program.save_best
    monkeypatch.setattr(program, "save_best", lambda folder, step, policy: seen.update(
        {step: policy.head.detach().clone()}) or save(folder, step, policy))
    main(program, place(program.__name__, name, "--eval_data", phantom / "test.jsonl", "--eval_steps", 2, "--keep_checkpoints", 3, steps=6))
    found = {row["step"] + 1: row[figure] for row in rows(place.folder / name) if figure in row}
    assert list(found) == [2, 4, 6]
    best = next(step for step in found if found[step] == better(found.values()))
    (kept,) = (place.folder / name / "best").iterdir()
    assert kept.name == f"step-{best:06d}" and max(seen) == best
    stored = load_file(kept / "model.safetensors")
    assert torch.equal(stored.get("lm_head.weight", stored.get("model.language_model.embed_tokens.weight")), seen[best])


@pytest.mark.slow
def test_the_last_checkpoints_are_kept(place):
    words = place("train_sft", "kept", "--keep_checkpoints", 3, steps=8)
    finish(start("train_sft", words, place.folder / "kept.log", prepare=stopping_at_the_end))
    assert [path.name for path in sorted((place.folder / "kept/checkpoints").iterdir())] == ["step-000005", "step-000006", "step-000007"]


def stopping_at_the_end(rank):
    train_sft.save_final = lambda *_: os._exit(3)


def test_tensorboard_has_every_figure(place):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    main(train_sft, place("train_sft", "board", "--track", "tensorboard", steps=2))
    board = events.EventAccumulator(str(place.folder / "board/tensorboard"))
    board.Reload()
    logged = [json.loads(line) for line in (place.folder / "board/metrics.jsonl").read_text().splitlines()]
    assert set(board.Tags()["scalars"]) == set(logged[0]) - {"step"}
    assert [event.value for event in board.Scalars("loss")] == pytest.approx([row["loss"] for row in logged])


@pytest.mark.slow
def test_wandb_gets_every_row(place, monkeypatch):
    """Offline: the real package, its rows intercepted."""
    wandb = pytest.importorskip("wandb")
    got, asked = [], {}
    monkeypatch.setattr(wandb, "init", lambda **settings: asked.update(settings) or SimpleNamespace(log=lambda row, step: got.append((step, row))))
    main(train_sft, place("train_sft", "wandb", "--track", "wandb", steps=2))
    assert [step for step, _ in got] == [0, 1] and asked["resume"] == "allow" and asked["config"]["max_steps"] == 2
    assert [row["loss"] for _, row in got] == [row["loss"] for row in rows(place.folder / "wandb")]


def test_trackers_that_are_not_there(place, monkeypatch):
    import minigrpo.run.args
    monkeypatch.setattr(minigrpo.run.args, "find_spec", lambda name: None)
    assert "pip install wandb" in stop(train_sft, place("train_sft", "none", "--track", "wandb"))
