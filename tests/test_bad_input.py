"""What a user gets wrong ends in one message that names it, before anything costs time, and never
in a traceback.
"""

import gzip
import json
import os
import re
import runpy
import shutil
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from PIL import Image

import evaluate
import train_grpo
import train_sft
from minigrpo import ask, cold_start, elsewhere, probe, tiny
from minigrpo.data import check, clean, join, openi, scenes, sharegpt
from minigrpo.data import phantom as phantom_films
from minigrpo.data.convert import adapter_main
from minigrpo.rewards import Scores
from minigrpo.run import evaluation, files, loop
from minigrpo.run.args import parse_args
from minigrpo.run.evaluation import read_answers
from minigrpo.run.guard import in_time
from minigrpo.run.names import ELSEWHERE, RENAMED
from tests import fake_sets
from tests.test_policy import copy_of


@pytest.fixture
def fails(monkeypatch, capsys):
    """Runs a program's main with these arguments, expects it to end with an error, and returns all
    that it said.
    """

    def run(main, *arguments, name="program.py"):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:  # any other exception would be a traceback
            main()
        assert ended.value.code not in (0, None)
        out = capsys.readouterr()
        return f"{out.out}{out.err}{ended.value.code}"

    return run


@pytest.fixture
def stored(phantom, tmp_path):
    """An evaluation of the phantom test films: answers alone, as a stopped one leaves them."""
    lines = [json.loads(line) for line in (phantom / "test.jsonl").read_text().splitlines()]
    rows = [
        {
            "id": line["id"],
            "question": line["question"],
            "reference": line["answer"],
            "answer": line["answer"],
        }
        for line in lines
    ]
    (tmp_path / "stored").mkdir()
    write_rows(tmp_path / "stored", rows)
    return tmp_path / "stored", rows


def write_rows(folder, rows):
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_an_output_folder_that_cannot_be_made_stops_before_sampling(
    fails, phantom, policy, tmp_path, monkeypatch
):
    """Bug: the folder was made after all answers were sampled, so a bad path cost hours and ended
    in a NotADirectoryError.
    """
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(evaluate.Policy, "from_pretrained", lambda *args, **more: policy)
    monkeypatch.setattr(evaluate, "greedy_answers", None)  # sampling would be a TypeError
    for place in (tmp_path / "file", tmp_path / "file/below/it"):
        said = fails(
            evaluate.main, "--model", "x", "--data", phantom / "test.jsonl", "--output_dir", place
        )
        assert f"--output_dir {place} cannot be created" in said
    monkeypatch.setattr(files.os, "access", lambda *given: False)  # root may write anywhere
    said = fails(
        evaluate.main,
        "--model",
        "x",
        "--data",
        phantom / "test.jsonl",
        "--output_dir",
        tmp_path / "read-only",
    )
    assert "cannot be written into" in said
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("argument", ["--predictions", "--baseline"])
def test_answers_to_other_questions_are_not_scored(fails, phantom, stored, tmp_path, argument):
    """Bug: two files whose ids are 1, 2, 3 passed for one, and answers were scored against another
    file's references.
    """
    folder, rows = stored
    write_rows(folder, [row | {"question": "Is there a fracture?"} for row in rows[:1]] + rows[1:])
    model = (
        []
        if argument == "--predictions"
        else ["--model", "constant", "--train_data", phantom / "train.jsonl"]
    )
    said = fails(
        evaluate.main,
        argument,
        folder,
        *model,
        "--data",
        phantom / "test.jsonl",
        "--output_dir",
        tmp_path / "out",
    )
    assert f"{argument} {folder} answers other questions: 1 of" in said and rows[0]["id"] in said
    assert not (tmp_path / "out").exists()


def test_cleaned_references_and_asking_to_think_are_the_same_questions(phantom, stored, capsys):
    folder, rows = stored
    samples = evaluate.read_jsonl(phantom / "test.jsonl")
    write_rows(folder, [row | {"question": row["question"] + " /think"} for row in rows])
    assert read_answers(folder, samples, "--baseline") == (
        [row["answer"] for row in rows],
        None,
        {},
    )
    assert not capsys.readouterr().out
    write_rows(folder, [row | {"reference": "Unchanged."} for row in rows])
    read_answers(folder, samples, "--baseline")
    assert f"note: {len(rows)} references differ from those" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "predictions.jsonl",
            '{"id": "café"}'.encode("latin-1"),
            "predictions.jsonl:1: not a prediction",
        ),
        (
            "predictions.jsonl",
            b'{"id": "a", "answer": "x", "answer": "y"}',
            "predictions.jsonl:1: not a prediction",
        ),
        ("metrics.json", b'{"model": ', "metrics.json is not JSON"),
        ("metrics.json", b"\xff\xfe\xff", "metrics.json is not JSON"),
        ("metrics.json", b"[]", "metrics.json is not a JSON object"),
        ("metrics.json", b'{"box_scale": 0}', "metrics.json: box_scale 0 must be a number above 0"),
        ("metrics.json", b'{"box_scale": NaN}', "metrics.json: box_scale nan must"),
        ("metrics.json", b'{"box_scale": "1000"}', "metrics.json: box_scale '1000' must"),
        (
            "metrics.json",
            b'{"template_opens_think": "no"}',
            "metrics.json: box_scale 1.0 must be a number above 0, and template_opens_think 'no'",
        ),
    ],
)
def test_a_broken_evaluation_is_named(fails, phantom, stored, tmp_path, name, content, message):
    """Bug: the message was "'utf-8' codec can't decode byte", or a traceback, and no file was
    named.
    """
    (stored[0] / name).write_bytes(content)
    said = fails(
        evaluate.main,
        "--predictions",
        stored[0],
        "--data",
        phantom / "test.jsonl",
        "--output_dir",
        tmp_path / "out",
    )
    assert f"{stored[0]}/{message}" in said


@pytest.mark.parametrize("extra", [["--template_opens_think"], ["--box_scale", 1000]])
def test_the_constant_answer_is_read_as_it_is_written(fails, phantom, tmp_path, extra):
    """Bug: with --template_opens_think every constant answer was an unclosed thought and scored 0,
    a baseline that anything beats.
    """
    said = fails(
        evaluate.main,
        "--model",
        "constant",
        "--train_data",
        phantom / "train.jsonl",
        "--data",
        phantom / "test.jsonl",
        "--output_dir",
        tmp_path / "out",
        *extra,
    )
    assert "leave out --template_opens_think and --box_scale" in said


@pytest.mark.parametrize("program", [train_sft, train_grpo])
@pytest.mark.parametrize(
    "extra, message",
    [
        (["--learning_rate", "-1"], "--learning_rate must be a number above 0"),
        (["--learning_rate", "nan"], "--learning_rate"),
        (["--grad_clip", "0"], "--grad_clip must be a number above 0"),
        (["--weight_decay", "-1"], "--weight_decay must be 0 or more"),
    ],
)
def test_bad_optimizer_settings_leave_no_run_folder(
    fails, phantom, tmp_path, program, extra, message
):
    """Bug: --grad_clip 0 zeroed every gradient in silence; a bad learning rate was a traceback that
    left a run folder behind.
    """
    said = fails(
        program.main,
        "--model",
        "tiny",
        "--train_data",
        phantom / "train.jsonl",
        "--output_dir",
        tmp_path / "run",
        *extra,
    )
    assert message in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize("program", [train_sft, train_grpo])
@pytest.mark.parametrize(
    "extra, message",
    [
        (["--device", "gpu"], "--device 'gpu' is not a device: write cpu, cuda"),
        (["--device", "cuda"], "finds no GPU here; write cpu"),
        (["--lora_alpha", 16], "add --lora_rank, or leave them out"),
        (["--lora_targets", "q_proj"], "add --lora_rank"),
    ],
)
def test_settings_that_this_machine_or_run_has_no_use_for(
    fails, phantom, tmp_path, program, extra, message, monkeypatch
):
    """Bug: --device cuda without a GPU was a traceback; --lora_alpha without --lora_rank trained
    all weights in silence.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = fails(
        program.main,
        "--model",
        "tiny",
        "--train_data",
        phantom / "train.jsonl",
        "--output_dir",
        tmp_path / "run",
        *extra,
    )
    assert message in said and not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be_made(fails, phantom, tmp_path):
    """Bug: --output_dir at or below a file was a NotADirectoryError."""
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file/below/it"):
        said = fails(
            train_sft.main,
            "--model",
            "tiny",
            "--train_data",
            phantom / "train.jsonl",
            "--output_dir",
            place,
        )
        assert f"--output_dir {place} cannot be created" in said
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_in_place_of_a_jsonl_file(fails, phantom):
    """Bug: `check FOLDER` said that there was no such file."""
    assert f"{phantom} is a folder: name the JSONL file in it" in fails(check.main, phantom)


@pytest.mark.parametrize(
    "extra, why",
    [
        (["--warmup", "-1"], "between 0 and 1"),
        (["--warmup", "2"], "between 0 and 1"),
        (["--beta2", "1"], "at least 0 and below 1"),
    ],
)
def test_bad_sft_settings(fails, phantom, tmp_path, extra, why):
    said = fails(
        train_sft.main,
        "--model",
        "tiny",
        "--train_data",
        phantom / "train.jsonl",
        "--output_dir",
        tmp_path / "run",
        *extra,
    )
    assert f"{extra[0]} must be {why}" in said


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--max_new_tokens", 0], "--max_new_tokens"),
        (["--temperature", -1], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--device", "gpu"], "--device 'gpu' is not a device"),
        (["--output", "{}/drawn.foo"], "name a .png or .jpg"),
        (["--output", "{}/nowhere/drawn.png"], "in a folder that exists"),
    ],
)
def test_ask_looks_at_its_arguments_before_it_loads_the_model(
    fails, phantom, tmp_path, extra, message
):
    """Bug: a traceback out of `generate`, or after the answer out of PIL."""
    film = next((phantom / "films").glob("*.png"))
    extra = [str(word).format(tmp_path) for word in extra]
    assert message in fails(
        ask.main, "--model", "/nowhere", "--image", film, "--output", tmp_path / "drawn.png", *extra
    )


def convert_openi(fails, root, out):
    return fails(
        lambda: adapter_main(openi.read, "films", "doc"),
        "--root",
        root,
        "--split",
        "train",
        "--output_dir",
        out,
    )


def test_an_adapter_s_output_folder_that_is_a_file(fails, tmp_path):
    """Bug: a NotADirectoryError's traceback."""
    fake_sets.openi(tmp_path / "set")
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file/below"):
        assert (
            "error: " in convert_openi(fails, tmp_path / "set", place)
            and (tmp_path / "file").read_text() == "mine"
        )


@pytest.mark.parametrize(
    "name, change",
    [
        (
            "indiana_reports.csv",
            lambda text: text.decode().replace("clear", "caf\xe9").encode("latin-1"),
        ),
        ("indiana_reports.csv.gz", lambda text: b"not gzip"),
        ("indiana_reports.csv.gz", lambda text: gzip.compress(text)[:-60]),
        ("indiana_reports.csv.gz", lambda text: gzip.compress(text)[:40] + b"\0\1\2" * 99),
    ],
)
def test_a_csv_file_that_cannot_be_read_is_named(fails, tmp_path, name, change):
    """Bug: bytes that are no UTF-8 near the start were an error without a file's name; a half .gz
    was a traceback.
    """
    fake_sets.openi(tmp_path / "set")
    plain = tmp_path / "set/indiana_reports.csv"
    text = plain.read_bytes()
    plain.unlink()
    (tmp_path / "set" / name).write_bytes(change(text))
    said = convert_openi(fails, tmp_path / "set", tmp_path / "out")
    assert (
        f"{tmp_path}/set/{name}:" in said
        and "not a readable CSV" in said
        and not (tmp_path / "out/train.jsonl").exists()
    )


def test_a_cleaned_file_that_cannot_be_written(fails, phantom, tmp_path):
    """Bug: a traceback; with --endpoint, after hours of rewriting."""
    (tmp_path / "file").write_text("mine")
    said = fails(
        clean.main, phantom / "train.jsonl", "--output_file", tmp_path / "file/clean.jsonl"
    )
    assert "cannot be written" in said and (tmp_path / "file").read_text() == "mine"


def test_nothing_left_after_cleaning_is_an_error(fails, tmp_path):
    """Bug: an empty file was written, which no program can read."""
    line = {
        "id": "a",
        "image": None,
        "task": "report",
        "question": "Write the findings.",
        "answer": "Unchanged.",
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    assert "nothing is left" in fails(
        clean.main, tmp_path / "a.jsonl", "--output_file", tmp_path / "b.jsonl"
    )
    assert not (tmp_path / "b.jsonl").exists()


@pytest.mark.parametrize("command", ["sharegpt", "join", "openi"])
def test_what_an_error_quotes_cannot_rewrite_the_terminal(fails, tmp_path, command):
    """Bug: an ESC in an item's id, in a file's name or in a column's was printed as it stood."""
    name = "a\x1b[2J\u202e"
    (tmp_path / f"{name}.json").write_text(json.dumps([{"id": name, "conversations": []}]))
    out = ["--output_file", tmp_path / "b.jsonl"]
    if command == "sharegpt":
        said = fails(sharegpt.main, tmp_path / f"{name}.json", *out)
    elif command == "join":
        said = fails(join.main, tmp_path / f"{name}.jsonl", *out)
    else:
        (tmp_path / "set").mkdir()
        (tmp_path / "set/indiana_reports.csv").write_text(f"{name},uid\n")
        said = convert_openi(fails, tmp_path / "set", tmp_path / "out")
    assert "a\\x1b[2J\\u202e" in said and "".join(said.split("\n")).isprintable()


def test_an_empty_llava_file_is_an_error(fails, tmp_path):
    """Bug: an empty file was written, which no program can read."""
    (tmp_path / "a.json").write_text("[]")
    assert "the list is empty" in fails(
        sharegpt.main, tmp_path / "a.json", "--output_file", tmp_path / "a.jsonl"
    )
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize("sheet", ["nowhere/sheet.png", "sheet.foo"])
def test_a_sheet_that_cannot_be_written_hides_no_error(fails, phantom, tmp_path, sheet):
    """Bug: a traceback in the place of the errors that had been found."""
    shutil.copytree(phantom, tmp_path / "data")
    with (tmp_path / "data/test.jsonl").open("a") as file:
        file.write("{not json\n")
    said = fails(check.main, tmp_path / "data/test.jsonl", "--sheet", tmp_path / sheet)
    assert (
        "not JSON" in said
        and f"--sheet {tmp_path / sheet} cannot be written" in said
        and "2 errors" in said
    )


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--train", -1], "--train must be"),
        (["--seed", -1], "--seed must be"),
        (["--size", 0], "--size must be"),
        (["--output_dir", "{}/file/below"], "lies below, a file"),
    ],
)
def test_phantom_arguments(fails, tmp_path, extra, message):
    """Bug: `wrote -1 + 0 films`; other values were a traceback out of a process pool."""
    (tmp_path / "file").write_text("mine")
    extra = [str(word).format(tmp_path) for word in extra]
    assert message in fails(
        phantom_films.main,
        "--output_dir",
        tmp_path / "films",
        "--train",
        1,
        "--test",
        1,
        "--seed",
        0,
        *extra,
    )
    assert not (tmp_path / "films").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rate: abc", "--learning_rate/--learning-rate: invalid float value: 'abc'"),
        ("learning_rate: [1, 2]", "learning_rate takes one value, got ['1', '2']"),
        ("learning_rate: {a: 1}", "learning_rate takes one value, got {'a': '1'}"),
        ("learning_rate:", "run.yaml: learning_rate is empty: give it"),
        ("group_size: 2.5", "--group-size: invalid int value: '2.5'"),
        ("group_size: true", "--group-size: invalid int value: 'true'"),
        ("bf16: maybe", "--bf16: "),
        ("train_data: [a, b]", "train_data takes one value"),
        ("kl_estimator: k4", "--kl-estimator: invalid choice: 'k4'"),
        ("freeze: vision", "freeze takes a list, got 'vision'"),
        ("freeze: [eyes]", "invalid choice: 'eyes'"),
        ("track: wandb", "track takes a list"),
        ("lora_targets: []", "lora_targets is empty"),
        ("1: 2\nlr: 3", "run.yaml: unknown settings: 1, lr"),
        ("a: [", "run.yaml is not YAML"),
    ],
)
def test_a_settings_file_is_checked_like_the_command_line(fails, tmp_path, text, message):
    """Bug: a list, a blank or a fraction in the place of a number was a traceback, some only when
    the model had been loaded.
    """
    (tmp_path / "run.yaml").write_text(text)
    assert message in fails(
        train_grpo.main,
        tmp_path / "run.yaml",
        "--model",
        "m",
        "--train_data",
        "t",
        "--output_dir",
        tmp_path / "run",
    )


def test_a_wrong_word_is_not_lost_behind_the_usage(fails):
    """Bug: the one line that says what is wrong stood behind sixty lines that list all
    arguments.
    """
    said = fails(train_grpo.main, "--model", "m", "--learning_rate", "fast")
    assert (
        len(said.splitlines()) < 5
        and "usage: program.py [settings.yaml] --name value ... (--help" in said
    )


def test_an_unknown_optimizer_in_a_settings_file(fails, tmp_path):
    """Bug: choices were those of the command line alone, so `optimizer: sgd` trained with Muon and
    said nothing.
    """
    (tmp_path / "run.yaml").write_text("optimizer: sgd")
    said = fails(
        train_sft.main,
        tmp_path / "run.yaml",
        "--model",
        "m",
        "--train_data",
        "t",
        "--output_dir",
        tmp_path / "run",
    )
    assert "--optimizer: invalid choice: 'sgd'" in said


def test_settings_files_that_cannot_be_read(fails, tmp_path):
    """Bug: a folder called x.yaml was a traceback, and bytes that are no text an error that named
    no file.
    """
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfea")
    assert "folder.yaml cannot be read" in fails(train_sft.main, tmp_path / "folder.yaml")
    assert "bytes.yaml is not YAML or JSON" in fails(train_sft.main, tmp_path / "bytes.yaml")


def test_a_run_s_args_json_is_a_settings_file(tmp_path):
    """What is empty in it was left out; a settings file of another encoding is read, too."""
    given = ["--model", "m", "--train_data", "t", "--output_dir", "o"]
    args = parse_args(train_grpo.GrpoArguments, "", [*given, "--freeze", "vision", "--bf16"])
    (tmp_path / "args.json").write_text(json.dumps(asdict(args)), encoding="utf-16")
    assert parse_args(train_grpo.GrpoArguments, "", [str(tmp_path / "args.json")]) == args
    again = parse_args(
        train_grpo.GrpoArguments,
        "",
        [str(tmp_path / "args.json"), "--freeze", "projector", "--bf16", "false"],
    )
    assert again.freeze == ["projector"] and not again.bf16


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--max_grad_norm", "nan"], "--max_grad_norm is nan"),
        (["--reward_timeout", "nan"], "--reward_timeout is nan"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--temperature", "inf"], "--temperature must be above 0"),
        (["--kl_coef", "nan"], "--kl_coef is nan"),
        (["--kl_coef", "inf"], "--kl_coef inf"),
        (["--clip_low", "nan"], "--clip_low is nan"),
        (["--seed", 10**18], "is too large"),
        (["--device", "cpu:abc"], "'cpu:abc' is not a device"),
    ],
)
def test_numbers_that_are_none(fails, phantom, tmp_path, extra, message):
    """Bug: nan passes a test for `<= 0`; the run skipped every update, or ended in a traceback
    after the first rollout.
    """
    said = fails(
        train_grpo.main,
        "--model",
        "m",
        "--train_data",
        phantom / "train.jsonl",
        "--output_dir",
        tmp_path / "run",
        *extra,
    )
    assert message in said and not (tmp_path / "run").exists()


def test_a_reward_without_a_time_limit():
    """Bug: --reward_timeout inf was an OverflowError after the first rollout."""
    assert in_time(
        lambda answers, samples: Scores([1.0], [True]), ["a"], [None], 1, float("inf")
    ).values == [1.0]


def test_a_gpu_that_is_not_there(fails, phantom, tmp_path, monkeypatch):
    """Bug: --device cuda:7 on a machine of one GPU was a traceback."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    said = fails(
        train_sft.main,
        "--model",
        "m",
        "--train_data",
        phantom / "train.jsonl",
        "--output_dir",
        tmp_path / "run",
        "--device",
        "cuda:7",
    )
    assert "--device cuda:7: there are 1 GPUs here" in said


@pytest.mark.parametrize("program", [train_sft, train_grpo])
def test_validation_on_the_training_data(fails, phantom, tmp_path, program):
    """Bug: best/ was chosen on what had been trained on, and nothing said so."""
    said = fails(
        program.main,
        "--model",
        "m",
        "--train_data",
        phantom / "train.jsonl",
        "--output_dir",
        tmp_path / "run",
        "--eval_data",
        phantom / "films/../train.jsonl",
    )
    assert "is the training data" in said


def copied(phantom, folder, name="train.jsonl", keep=slice(None)):
    """A copy of phantom films with some lines of a file about them."""
    shutil.copytree(phantom, folder)
    lines = (folder / name).read_text().splitlines()
    (folder / "copy.jsonl").write_text("\n".join(lines[keep]))
    return folder / "copy.jsonl"


@pytest.mark.parametrize("program", [train_sft, train_grpo])
@pytest.mark.parametrize("keep", [slice(None), slice(None, None, -1), slice(3, 9)])
def test_validation_on_a_copy_of_the_training_data(fails, phantom, tmp_path, program, keep):
    """Bug: paths alone were compared, so a copy, in another order or a part of it, with films of
    its own, passed for validation data."""
    copy = copied(phantom, tmp_path / "other", keep=keep)
    said = fails(
        program.main,
        "--model",
        "/nowhere",
        "--train_data",
        phantom / "train.jsonl",
        "--output_dir",
        tmp_path / "run",
        "--eval_data",
        copy,
    )
    assert f"--eval_data {copy} is a copy of --train_data, or of a part of it" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("program", [train_sft, train_grpo])
def test_validation_on_some_of_the_training_films(fails, phantom, tmp_path, program):
    """Films under another name, asked otherwise, of patients under other names."""
    copied(phantom, tmp_path / "other")
    lines = [json.loads(line) for line in (tmp_path / "other/test.jsonl").read_text().splitlines()]
    other = [json.loads(line) for line in (tmp_path / "other/train.jsonl").read_text().splitlines()]
    film = tmp_path / "other" / other[0]["image"]
    film.rename(film.with_name("renamed.png"))
    lines.append(
        other[0] | {"image": "films/renamed.png", "question": "Anything?", "patient": "nobody"}
    )
    lines[0]["patient"] = other[5]["patient"]
    (tmp_path / "other/test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = fails(
        program.main,
        "--model",
        "/nowhere",
        "--train_data",
        phantom / "train.jsonl",
        "--output_dir",
        tmp_path / "run",
        "--eval_data",
        tmp_path / "other/test.jsonl",
    )
    assert "note: 1 of 5 films and 1 of 6 patients of --eval_data " in said
    assert f"{tmp_path}/other/test.jsonl are also in --train_data" in said
    said = fails(
        program.main,
        "--model",
        "/nowhere",
        "--train_data",
        phantom / "train.jsonl",
        "--output_dir",
        tmp_path / "run",
        "--eval_data",
        phantom / "test.jsonl",
    )
    assert "are in --train_data" not in said


def test_the_constant_answer_is_not_chosen_on_a_copy_of_the_test_data(fails, phantom, tmp_path):
    copy = copied(phantom, tmp_path / "other", "test.jsonl")
    said = fails(
        evaluate.main,
        "--model",
        "constant",
        "--data",
        phantom / "test.jsonl",
        "--output_dir",
        tmp_path / "out",
        "--train_data",
        copy,
    )
    assert f"--data {phantom}/test.jsonl is a copy of --train_data" in said
    assert not (tmp_path / "out").exists()


def test_half_a_character_in_a_stored_answer(fails, phantom, stored, tmp_path):
    """Bug: a traceback out of the picture's text, after all had been scored."""
    write_rows(
        stored[0], [stored[1][0], *(row | {"answer": "Effusion \ud83d"} for row in stored[1][1:])]
    )
    said = fails(
        evaluate.main,
        "--predictions",
        stored[0],
        "--data",
        phantom / "test.jsonl",
        "--output_dir",
        tmp_path / "out",
    )
    assert f"{stored[0]}/predictions.jsonl:2: the answer holds '\\ud83d', half a character" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "scale, written, note",
    [
        (
            "1",
            1000,
            "boxes that the model wrote lie outside 0..1 and so score nothing (--box_scale is 1): "
            "should it be 1000?",
        ),
        (
            "1",
            3000,
            "score nothing (--box_scale is 1): should it be the side of the image in pixels?",
        ),
        ("1000", 1, "fractions already, and --box_scale 1000 divides"),
        ("1", 1, None),
        ("1000", 1000, None),
    ],
)
def test_answers_at_another_scale_are_said(phantom, stored, scale, written, note):
    """Bug: an untuned Qwen3-VL's boxes lie in 0..1000 and all score 0, and nothing said why."""
    samples = evaluate.read_jsonl(phantom / "test.jsonl")
    answers = [
        s.answer
        if s.task == "report"
        else f"[{', '.join(f'{value * written:g}' for value in s.boxes[0])}]"
        for s in samples
    ]
    said = evaluate.scale_note(answers, samples, False, float(scale))
    assert note in said if note else said is None


def test_evaluation_says_that_boxes_leave_the_film(phantom, stored, tmp_path, monkeypatch, capsys):
    write_rows(stored[0], [row | {"answer": "[100, 200, 300, 400]"} for row in stored[1]])
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "evaluate.py",
            "--predictions",
            str(stored[0]),
            "--data",
            str(phantom / "test.jsonl"),
            "--output_dir",
            str(tmp_path / "out"),
            "--task",
            "grounding",
            "--report_items",
            "0",
        ],
    )
    monkeypatch.setattr(evaluation, "draw_samples", lambda *args, **more: None)
    evaluate.main()
    assert "score nothing (--box_scale is 1): should it be 1000?" in capsys.readouterr().out


def test_the_constant_answer_is_not_chosen_on_the_test_data(fails, phantom, tmp_path):
    """Bug: the baseline was the best answer to the very films that it was scored on; with another
    model --train_data did nothing.
    """
    words = [
        "--data",
        phantom / "test.jsonl",
        "--output_dir",
        tmp_path / "out",
        "--train_data",
        phantom / "test.jsonl",
    ]
    assert "would be chosen on the samples" in fails(evaluate.main, "--model", "constant", *words)
    assert "leave it out with other models" in fails(evaluate.main, "--model", "m", *words)


@pytest.mark.parametrize(
    "program, words",
    [(train_grpo, ["--train_data", "{}/train.jsonl"]), (evaluate, ["--data", "{}/test.jsonl"])],
)
def test_tiny_where_only_train_sft_makes_it(fails, phantom, tmp_path, program, words):
    """Bug: `tiny` was looked for on the hub."""
    words = [word.format(phantom) for word in words]
    assert "only train_sft.py makes a `tiny` model" in fails(
        program.main, "--model", "tiny", *words, "--output_dir", tmp_path / "out"
    )


def test_films_and_questions_that_ask_cannot_take(fails, tmp_path):
    """Bug: a strip of a film was a traceback after the model had been loaded."""
    Image.new("L", (1005, 5)).save(tmp_path / "strip.png")
    assert "strip.png cannot be read" in fails(
        ask.main, "--model", "/nowhere", "--image", tmp_path / "strip.png"
    )
    assert "--question is empty" in fails(
        ask.main, "--model", "/nowhere", "--image", tmp_path / "strip.png", "--question", " "
    )


def test_a_tiny_model_s_folder_that_cannot_be_made(fails, phantom, tmp_path):
    """Bug: a NotADirectoryError's traceback."""
    (tmp_path / "file").write_text("mine")
    said = fails(
        tiny.main, "--train_data", phantom / "train.jsonl", "--output_dir", tmp_path / "file/below"
    )
    assert "cannot be created" in said and (tmp_path / "file").read_text() == "mine"


def test_arguments_of_check(fails, phantom):
    """Bug: "max_workers must be greater than 0" names no argument of ours."""
    assert "--workers must be at least 1" in fails(
        check.main, phantom / "test.jsonl", "--workers", 0
    )
    assert "/nowhere is neither a checkpoint folder" in fails(
        check.main, phantom / "test.jsonl", "--model", "/nowhere"
    )


def test_a_parquet_file_in_a_folder_that_is_not_there(fails, phantom, tmp_path):
    """Bug: a traceback after all films had been read."""
    assert "its folder does not exist" in fails(
        elsewhere.main, "--data", phantom / "test.jsonl", "--output", tmp_path / "no/x.parquet"
    )


def test_resume_in_a_folder_that_holds_no_run(fails, phantom, tmp_path):
    """Bug: --resume called any folder with a `final` a finished run, and removed the `checkpoints`
    in it.
    """
    for name in ("final", "checkpoints"):
        (tmp_path / "mine" / name).mkdir(parents=True)
    (tmp_path / "mine/checkpoints/thesis.txt").write_text("precious")
    said = fails(
        train_sft.main,
        "--model",
        "tiny",
        "--train_data",
        phantom / "train.jsonl",
        "--output_dir",
        tmp_path / "mine",
        "--resume",
    )
    assert (
        "is not empty and does not hold a run" in said
        and (tmp_path / "mine/checkpoints/thesis.txt").exists()
    )


@pytest.mark.parametrize("text", ["{", "[1, 2]", "7"])
def test_arguments_of_a_run_that_were_edited(fails, phantom, tmp_path, text):
    """Bug: "Expecting value: line 1" named no file, and 7 was a traceback."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/args.json").write_text(text)
    said = fails(
        train_sft.main,
        "--model",
        "tiny",
        "--train_data",
        phantom / "train.jsonl",
        "--output_dir",
        tmp_path / "run",
        "--resume",
    )
    assert f"{tmp_path}/run/args.json does not hold the arguments of a run" in said


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: [*rows, rows[0] | {"answer": "Other."}], "a second answer to"),
        (lambda rows: [rows[0] | {"cut_off": "yes"}, *rows[1:]], "cut_off"),
    ],
)
def test_predictions_that_contradict_themselves(fails, phantom, stored, tmp_path, change, message):
    """Bug: of two answers with one id the last counted in silence; a cut_off that is no truth value
    was a traceback.
    """
    write_rows(stored[0], change(stored[1]))
    said = fails(
        evaluate.main,
        "--predictions",
        stored[0],
        "--data",
        phantom / "test.jsonl",
        "--output_dir",
        tmp_path / "out",
    )
    assert (
        f"{stored[0]}/predictions.jsonl:" in said
        and message in said
        and not (tmp_path / "out").exists()
    )


@pytest.mark.parametrize("kind", [train_sft.SftArguments, train_grpo.GrpoArguments])
def test_validation_that_never_comes_is_said(kind):
    """Bug: it was an error, so a trial of 20 steps with the settings of the long run did not
    start.
    """

    def of(steps):
        return kind(
            model="m", train_data="a.jsonl", eval_data="b.jsonl", output_dir="o", max_steps=steps
        )

    args = of(20)
    args.check()
    assert any(
        "--eval_steps 50 is above --max_steps 20: --eval_data is never used" in note
        for note in args.inert()
    )
    assert of(50).inert() == []


def test_resuming_with_a_model_of_another_shape(fails, phantom, samples, policy, tmp_path):
    """Bug: GRPO went on with a reference of other layers and another vocabulary, and its KL meant
    nothing.
    """
    (tmp_path / "run").mkdir()
    (tmp_path / "run/args.json").write_text("{}")
    loop.save_checkpoint(tmp_path / "run", 1, policy)
    tiny.tiny_policy(samples, width=64, vocab_size=600).save_pretrained(tmp_path / "other")
    said = fails(
        train_grpo.main,
        "--model",
        tmp_path / "other",
        "--train_data",
        phantom / "train.jsonl",
        "--output_dir",
        tmp_path / "run",
        "--resume",
    )
    assert (
        "has other layers or tokens than" in said
        and "resume with the --model that the run was started with" in said
    )


# ---- settings files and paths ---------------------------------------------------------------


def grpo_args(*words):
    return parse_args(
        train_grpo.GrpoArguments, "", [*map(str, words), "--model", "m", "--train_data", "t"]
    )


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("run.yaml", "seed: 1\nseed: 2", "run.yaml: key 'seed' appears twice"),
        ("run.json", '{"seed": 1, "seed": 1}', "run.json: key 'seed' appears twice"),
        ("run.yaml", "seed: 010", "seed is 010, which YAML would read as an octal number"),
        ("run.yaml", "learning_rate: -010", "learning_rate is -010"),
        ("run.yaml", "group_size: 1:30", "--group-size: invalid int value: '1:30'"),
        ("run.yaml", "seed: 0x10", "--seed: invalid int value: '0x10'"),
        ("run.yaml", 'output_dir: "a\\0b"', "cannot be a path (embedded null byte)"),
        ("run.yaml", "output_dir: ~nobody-of-that-name/x", "no such home folder"),
    ],
)
def test_settings_that_mean_another_thing_than_they_say(fails, tmp_path, name, text, message):
    """Bug: the second of two won in silence; 010 was 8, 1:30 was 90, 0x10 was 16."""
    (tmp_path / name).write_text(text)
    assert message in fails(train_grpo.main, tmp_path / name, "--model", "m", "--train_data", "t")


@pytest.mark.parametrize("value", ["no", "on", "010", "2026-01-01 1:00:00", "1.0"])
def test_a_settings_file_s_text_stays_as_it_stands(tmp_path, value):
    """Bug: `output_dir: no` made a folder called False, and 010 one called 8."""
    (tmp_path / "run.yaml").write_text(f"output_dir: {value}")
    assert grpo_args(tmp_path / "run.yaml").output_dir == value


def test_home_is_expanded(tmp_path, monkeypatch):
    """Bug: `output_dir: ~/x` made a folder called ~ in the working directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text(
        "output_dir: ~/runs/x\neval_data: ~/val.jsonl\neval_steps: 1"
    )
    args = grpo_args("~/run.yaml", "--reward_weights=~/weights")
    assert [args.output_dir, args.eval_data, args.reward_weights] == [
        f"{tmp_path}/{name}" for name in ("runs/x", "val.jsonl", "weights")
    ]


def test_home_is_expanded_by_the_data_tools(tmp_path, monkeypatch, phantom):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(phantom / "test.jsonl", tmp_path / "a.jsonl")
    (tmp_path / "films").symlink_to(phantom / "films")
    for main, words in (
        (join.main, ["~/a.jsonl=2", "--output_file=~/b.jsonl"]),
        (clean.main, ["~/a.jsonl", "--output_file=~/c.jsonl"]),
        (sharegpt.main, ["~/a.jsonl", "--output_file=~/d.json"]),
    ):
        monkeypatch.setattr(sys, "argv", ["program.py", *words])
        main()
    assert (
        all((tmp_path / name).is_file() for name in ("b.jsonl", "c.jsonl", "d.json"))
        and not (tmp_path / "~").exists()
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--seed", 1, "{}/run.yaml"],
            "run.yaml: give one settings file, before all arguments: program.py",
        ),
        (
            ["--freeze", "vision", "--seed", 1, "{}/run.YAML"],
            "run.YAML: give one settings file, before",
        ),
        (
            ["{}/run.yaml", "{}/other.yml"],
            "other.yml: give one settings file, before all arguments",
        ),
        (["{}/run.yaml", "stray"], "unrecognized arguments: stray"),
    ],
)
def test_a_settings_file_in_the_wrong_place(fails, tmp_path, words, message):
    """Bug: "unrecognized arguments: run.yaml"."""
    (tmp_path / "run.yaml").write_text("group_size: 4")
    words = [str(word).format(tmp_path) for word in words]
    assert message in fails(
        train_grpo.main,
        *words,
        "--model",
        "m",
        "--train_data",
        "t",
        "--output_dir",
        tmp_path / "run",
    )


def test_a_settings_file_in_capitals(tmp_path):
    (tmp_path / "run.YAML").write_text("group_size: 3")
    assert grpo_args(tmp_path / "run.YAML", "--output_dir", "o").group_size == 3


@pytest.mark.parametrize(
    "program, data",
    [(train_sft, "--train_data"), (train_grpo, "--train_data"), (evaluate, "--data")],
)
@pytest.mark.parametrize(
    "name, message",
    [
        ("x" * 300, "cannot be a path (File name too long)"),
        (b"\xff\xfe", "is not UTF-8: give another"),
    ],
)
@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_names_that_no_folder_can_have(
    fails, phantom, policy, tmp_path, monkeypatch, program, data, name, message, resume
):
    """Bug: tracebacks, of the second kind after the first checkpoint."""
    # GRPO freezes one
    monkeypatch.setattr(program.Policy, "from_pretrained", lambda *args, **more: copy_of(policy))
    place = f"{tmp_path}/{os.fsdecode(name)}"
    said = fails(
        program.main,
        "--model",
        "m",
        data,
        phantom / "test.jsonl",
        "--output_dir",
        place,
        *(resume if program != evaluate else []),
    )
    assert message in said and not list(tmp_path.iterdir())


def test_a_name_that_is_too_long_for_the_data_tools(fails, phantom, tmp_path):
    said = fails(join.main, phantom / "test.jsonl", "--output_file", tmp_path / ("x" * 300))
    assert "cannot be a path (File name too long)" in said


@pytest.mark.parametrize("argument", ["--train_data", "--eval_data"])
def test_files_that_may_not_be_read(fails, phantom, tmp_path, monkeypatch, argument):
    """Bug: a PermissionError's traceback."""
    monkeypatch.setattr(
        loop,
        "read_jsonl",
        lambda *given, **more: (_ for _ in ()).throw(
            PermissionError(13, "Permission denied", "x.jsonl")
        ),
    )
    words = {"--train_data": phantom / "train.jsonl", "--eval_data": phantom / "test.jsonl"} | {
        argument: tmp_path
    }
    said = fails(
        train_sft.main, "--model", "tiny", "--output_dir", tmp_path / "run", *sum(words.items(), ())
    )
    assert "Permission denied: 'x.jsonl'" in said


def test_a_run_folder_that_may_not_be_written(fails, phantom, tmp_path, monkeypatch):
    """Bug: --resume in a folder of somebody else's was a traceback out of the lock."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/args.json").write_text("{}")
    opening = Path.open

    def refusing(self, mode="r", *given, **more):
        if "a" in mode or "w" in mode or "x" in mode:
            raise PermissionError(13, "Permission denied", str(self))
        return opening(self, mode, *given, **more)

    monkeypatch.setattr(Path, "open", refusing)  # root may write anywhere
    said = fails(
        train_sft.main,
        "--model",
        "tiny",
        "--train_data",
        phantom / "train.jsonl",
        "--output_dir",
        tmp_path / "run",
        "--resume",
    )
    assert f"{tmp_path}/run/.lock cannot be written (Permission denied)" in said


@pytest.mark.parametrize(
    "name, times",
    [("split=train/a.jsonl", 1), ("split=train/a.jsonl=3", 3), ("a=3", 1), ("a=3=2", 2)],
)
def test_equals_signs_in_the_paths_of_join(tmp_path, monkeypatch, name, times):
    """Bug: what stands behind the = of a folder's name was taken for a number of times."""
    monkeypatch.chdir(tmp_path)
    for path in ("split=train/a.jsonl", "a=3"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text("")
    path = name.removesuffix(f"={times}") if times > 1 else name
    assert join.parse_file(name) == (Path(path), times)


@pytest.mark.parametrize("text", ["no=where.jsonl", "a.jsonl=0", "a.jsonl=-1", "a.jsonl="])
def test_times_that_are_none(text):
    with pytest.raises(ValueError, match="is not a file; after a = comes how often"):
        join.parse_file(text)


def test_the_help_of_convert(monkeypatch, capsys):
    """Bug: it printed nothing."""
    monkeypatch.setattr(sys, "argv", ["convert", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("minigrpo.data.convert", run_name="__main__")
    assert (
        ended.value.code == 0 and "python -m minigrpo.data.openi --help" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "tool, words",
    [(phantom_films, ["--train", 2, "--test", 1]), (scenes, ["--train", 2, "--test", 1])],
)
def test_a_disk_that_is_full_of_films(fails, tmp_path, monkeypatch, tool, words):
    """Bug: a traceback out of a pool of processes."""

    def full(self, *given, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    said = fails(tool.main, "--output_dir", tmp_path / "films", *words, "--size", 64, "--seed", 0)
    assert "cannot be written (No space left on device)" in said and not list(
        tmp_path.rglob("*.part")
    ) + list(tmp_path.rglob("*.jsonl"))


def test_a_full_disk_is_no_fault_of_a_film(fails, tmp_path, monkeypatch):
    """Bug: every film that found no room was counted as "cannot be read", and left out."""
    fake_sets.openi(tmp_path / "set")

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    assert "cannot be written (No space left on device)" in convert_openi(
        fails, tmp_path / "set", tmp_path / "out"
    )
    assert not list((tmp_path / "out").rglob("*.p*"))


# ---- one check of a checkpoint, in every program -------------------------------------------------


@pytest.fixture(scope="module")
def speechless(policy, tmp_path_factory):
    """A checkpoint whose chat template shows no image."""
    folder = tmp_path_factory.mktemp("speechless") / "model"
    policy.save_pretrained(folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("<|image_pad|>", ""))
    return folder


PROGRAMS = {
    "sft": (train_sft, ["--train_data", "train"]),
    "grpo": (train_grpo, ["--train_data", "train"]),
    "sft --plan": (train_sft, ["--train_data", "train", "--plan"]),
    "grpo --plan": (train_grpo, ["--train_data", "train", "--plan"]),
    "sft --lora_rank": (train_sft, ["--train_data", "train", "--lora_rank", 2]),
    "grpo --lora_rank": (train_grpo, ["--train_data", "train", "--lora_rank", 2]),
    "evaluate": (evaluate, ["--data", "test"]),
    "probe": (probe, ["--data", "test"]),
    "ask": (ask, ["--image", "film"]),
    "check": (check, ["test"]),
    "cold_start": (cold_start, ["test", "--teacher", "checkpoint"]),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_checks_its_checkpoint(fails, phantom, speechless, tmp_path, program):
    module, words = PROGRAMS[program]
    places = {
        "train": phantom / "train.jsonl",
        "test": phantom / "test.jsonl",
        "film": next(phantom.rglob("*.png")),
    }
    words = [places.get(word, word) for word in words]
    if module is cold_start:
        words += ["--output_file", tmp_path / "out"]
    elif module not in (ask, check, probe):
        words += ["--output_dir", tmp_path / "out"]
    said = fails(module.main, *words, "--model", speechless)
    assert (
        f"{speechless}: the chat template" in said and "writes 0 <|image_pad|> for 1 images" in said
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "program", ["sft", "grpo", "evaluate", "probe", "ask", "check", "cold_start"]
)
def test_a_name_that_is_too_long_for_a_file(fails, phantom, tmp_path, program, monkeypatch):
    """Bug: OSError: [Errno 36], with a traceback, wherever a path was looked at."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    module, words = PROGRAMS[program]
    places = {
        "train": phantom / "train.jsonl",
        "test": phantom / "test.jsonl",
        "film": next(phantom.rglob("*.png")),
    }
    words = [places.get(word, word) for word in words]
    words += {cold_start: ["--output_file", tmp_path / "out"], ask: [], check: [], probe: []}.get(
        module, ["--output_dir", tmp_path / "out"]
    )
    said = fails(module.main, *words, "--model", "x" * 300)
    assert (
        "cannot be a path (File name too long)" in said or "neither a checkpoint folder nor" in said
    )
    if module is evaluate:
        for argument in ("--predictions", "--baseline"):
            model = ["--model", "constant", "--train_data", places["train"]] * (
                argument == "--baseline"
            )
            assert "File name too long" in fails(module.main, *words, *model, argument, "x" * 300)
    if module is ask:
        assert "File name too long" in fails(
            module.main, *words, "--model", "x", "--output", "x" * 300 + ".png"
        )


@pytest.mark.parametrize(
    "words, said",
    [
        (["--how", "constant"], "--how has been called --aggregation since 0.2.0"),
        (["--num_generations", 8], "instead of --num_generations use --group_size"),
        (["--beta=0.1"], "instead of --beta use --kl_coef"),
        (["--top_p", 0.9], "from the whole distribution"),
        (["--learning_rte", 3], "did you mean --learning_rate?"),
    ],
)
def test_an_argument_of_another_name(words, said, capsys):
    with pytest.raises(SystemExit):
        parse_args(
            train_grpo.GrpoArguments,
            "",
            ["--model", "m", "--train_data", "t", "--output_dir", "o", *map(str, words)],
        )
    assert said in capsys.readouterr().err


def test_no_argument_by_its_beginning(capsys):
    """Bug: train_sft.py --beta 0.1, which elsewhere is the weight of the KL, set --beta2."""
    with pytest.raises(SystemExit):
        parse_args(
            train_sft.SftArguments,
            "",
            ["--model", "m", "--train_data", "t", "--output_dir", "o", "--beta", "0.1"],
        )
    assert "--beta" in capsys.readouterr().err


def test_what_is_said_of_other_names_is_true():
    names = {
        field.name
        for kind in (train_grpo.GrpoArguments, train_sft.SftArguments, evaluate.EvaluateArguments)
        for field in fields(kind)
    }
    assert (
        not set(ELSEWHERE) & names and not set(RENAMED) & names and set(RENAMED.values()) <= names
    )
    assert {word for text in ELSEWHERE.values() for word in re.findall(r"--(\w+)", text)} <= names


def test_an_old_setting_is_answered_with_its_new_name(tmp_path):
    (tmp_path / "run.yaml").write_text("level: sequence\n")
    with pytest.raises(ValueError, match="--level has been called --ratio_level since 0.2.0"):
        parse_args(train_grpo.GrpoArguments, "", [str(tmp_path / "run.yaml")])
