"""The study: what its arms differ in, what its cache keeps, how its figures are pooled; its
settings for real films; its page.
"""

import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from evaluate import EvaluateArguments
from minigrpo import stages, study
from minigrpo.rewards.spec import parse_spec
from minigrpo.run.args import parse_args
from minigrpo.stages import Run, run_all
from minigrpo.study import FULL, SMOKE, folders, plan
from minigrpo.study_results import HEADLINE, curves, gain, general_share, pooled, wording
from minigrpo.study_table import NOTHING, tables, write_page
from tests import processes
from train_grpo import GrpoArguments
from train_sft import SftArguments

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs/study").glob("*.yaml"))


# ---- the plan ------------------------------------------------------------------------------------


def commands(size=FULL):
    return {run.name: run.command for run in plan(size)}


def settings(command):
    """{argument: value} of a command; its own folder and name left out."""
    found, name = {}, None
    for word in map(str, command[1:]):
        name = word if word.startswith("--") else name
        found[name] = "" if word == name else word
    return found


def test_the_plan_holds_every_arm_and_seed():
    names = set(commands())
    arms = {
        f"{s}-{m}-{t}"
        for s in ("general", "domain")
        for m in ("direct", "thinking")
        for t in ("report", "grounding")
    }
    assert {
        f"{arm}-{seed}{test}"
        for arm in arms
        for seed in range(FULL.seeds)
        for test in ("", "-test")
    } <= names
    assert {f"{s}-{m}-sft" for s in ("general", "domain") for m in ("direct", "thinking")} <= names
    assert {
        f"reward-{r}-{seed}-test" for r in ("radgraph", "gleu") for seed in range(FULL.seeds)
    } <= names
    order = [run.name for run in plan(FULL)]
    assert all(
        order.index(need) < order.index(run.name) for run in plan(FULL) for need in run.needs
    )


@pytest.mark.parametrize(
    "a, b, differ",
    [
        ("general-direct-report-1", "domain-direct-report-1", {"--model"}),
        ("domain-direct-report-1", "domain-thinking-report-1", {"--think"}),
        ("general-direct-grounding-0", "general-thinking-grounding-0", {"--think"}),
        ("domain-direct-report-0", "domain-direct-report-1", {"--seed"}),
        ("domain-direct-report-0", "reward-radgraph-0", {"--reward"}),
        ("domain-direct-report-0", "reward-gleu-0", {"--reward"}),
        ("domain-direct-sft", "domain-thinking-sft", {"--think"}),
        ("general-direct-sft", "domain-direct-sft", {"--model"}),
        ("general-direct-report-0-test", "general-thinking-report-0-test", {"--think", "--model"}),
    ],
)
def test_matched_arms_differ_in_what_their_name_says(a, b, differ):
    a, b = settings(commands()[a]), settings(commands()[b])
    assert {name for name in a | b if a.get(name) != b.get(name)} == differ


def test_every_command_of_the_plan_parses(tmp_path):
    kinds = {
        "train_sft.py": SftArguments,
        "train_grpo.py": GrpoArguments,
        "evaluate.py": EvaluateArguments,
    }
    for run in plan(FULL, reward_weights=str(tmp_path)):  # with BERTScore among the rewards
        if run.command[0] in kinds:
            parse_args(kinds[run.command[0]], "", [str(word) for word in run.command[1:]])


def test_a_run_is_cached_by_all_that_it_stands_on(tmp_path):
    before, same = folders(plan(FULL), tmp_path), folders(plan(FULL), tmp_path)
    assert before == same and len(set(before.values())) == len(before)
    changed = folders(plan(replace(FULL, domain_steps=FULL.domain_steps + 1)), tmp_path)
    moved = {name for name in before if before[name] != changed[name]}
    assert moved == {name for name in before if name.startswith(("domain", "reward"))}
    more = folders(plan(replace(FULL, seeds=FULL.seeds + 1)), tmp_path)
    assert all(more[name] == folder for name, folder in before.items())


def test_a_failed_run_keeps_what_is_done_and_says_where_to_look(tmp_path, capsys):
    runs = [
        Run(
            "films",
            [
                "-m",
                "minigrpo.data.phantom",
                "--output_dir",
                "{out}",
                "--train",
                1,
                "--test",
                1,
                "--seed",
                0,
                "--size",
                32,
            ],
        ),
        Run(
            "bad",
            [
                "evaluate.py",
                "--data",
                "{films}/nowhere.jsonl",
                "--model",
                "{films}",
                "--output_dir",
                "{out}",
            ],
        ),
    ]
    where = folders(runs, tmp_path)
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            run_all(runs, where, tmp_path, jobs=1, threads=1, began=time.perf_counter())
        said = capsys.readouterr().out
        assert ended.value.code == 1 and re.search(
            r"(?s)bad failed .*nowhere.jsonl.*1 of 2 runs are done; the same command continues",
            said,
        )
    assert "2 runs, 1 of them done" in said
    assert (where["films"] / "done.json").exists() and not where["bad"].exists()


# ---- the figures ---------------------------------------------------------------------------------


def test_seeds_are_pooled_and_are_no_new_samples():
    """With three seeds taken as three times the samples, every interval would shrink by the square
    root of three.
    """
    before = {str(i): float(i % 2) for i in range(40)}
    seeds = [{i: {"gleu": value + 0.1 * s} for i, value in before.items()} for s in range(3)]
    after = [item["gleu"] for item in pooled(seeds).values()]
    found = gain(after, list(before.values()))
    assert (
        found["n"] == 40
        and found["mean"] == pytest.approx(0.1)
        and found["low"] == pytest.approx(found["high"])
    )


def test_the_general_starts_share_is_of_means_and_not_a_mean_of_shares():
    """A film on which the domain start scores 0 would make a mean of shares infinite."""
    figures = {"general": (0.2, 0.4, 0.0), "domain": (0.4, 0.8, 0.0)}
    after = {
        f"{start}-{mode}-{task}": {
            str(i): dict.fromkeys(metrics, value) for i, value in enumerate(figures[start])
        }
        for start in figures
        for mode in ("direct", "thinking")
        for task, metrics in HEADLINE.items()
    }
    assert set(general_share(after)) == {
        f"{m}-{t}" for m in ("direct", "thinking") for t in HEADLINE
    }
    for by_metric in general_share(after).values():
        for share in by_metric.values():
            assert share["mean"] == pytest.approx(0.5) and share["n"] == 3


def test_wording_counts_what_a_scorer_of_findings_passes_over():
    prose = "Please correlate with the clinical history and any prior imaging."
    found = wording(f"There is mild cardiomegaly. {prose}")
    assert found == {"of_scenes": 0, "of_films": 1, "unscored": len(prose)}
    assert wording("The crate is located at [0.02, 0.04, 0.49, 0.59].")["of_scenes"] == 1
    assert wording("") == {"of_scenes": 0, "of_films": 0, "unscored": 0}


def test_curves_are_means_over_seeds_and_parts(tmp_path):
    for seed in (0, 1):
        rows = [{"step": k, "reward": k + seed, "answer_tokens": 7.0} for k in range(50)]
        (tmp_path / f"{seed}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = curves([tmp_path / "0.jsonl", tmp_path / "1.jsonl"])
    assert set(found) == {"reward", "answer_tokens"} and len(found["reward"]) == 20
    assert found["reward"][0] == pytest.approx(1.0) and found["reward"][-1] == pytest.approx(
        49.0, abs=0.51
    )


# ---- settings for real films ---------------------------------------------------------------------


def test_there_are_settings_for_every_arm():
    names = {path.stem for path in CONFIGS}
    assert names == {"sft", "cold_start", "evaluate"} | {
        f"{s}-{m}-{t}"
        for s in ("general", "domain")
        for m in ("direct", "thinking")
        for t in ("report", "grounding")
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_settings_parse_and_are_the_papers(path):
    if path.stem == "evaluate":
        assert (
            parse_args(
                EvaluateArguments, "", [str(path), "--model", "m", "--output_dir", "o"]
            ).max_new_tokens
            == 4096
        )
        return
    if path.stem in ("sft", "cold_start"):
        args = parse_args(SftArguments, "", [str(path)])
        assert (
            args.learning_rate == 1e-5
            and args.freeze == []
            and args.bf16
            and args.shard
            and args.max_pixels == 262144
        )
        return
    args = parse_args(GrpoArguments, "", [str(path)])
    start, mode, task = path.stem.split("-")
    assert (args.prompts_per_step, args.group_size, args.updates_per_rollout, args.max_steps) == (
        512,
        8,
        4,
        300,
    )
    assert (args.learning_rate, args.kl_coef, args.clip_low, args.clip_high, args.dual_clip) == (
        1e-6,
        0.01,
        0.2,
        0.28,
        3.0,
    )
    assert args.max_new_tokens == (1024 if (mode, task) == ("direct", "report") else 4096)
    assert args.shard and args.max_pixels == 262144  # one budget in SFT, RL and evaluation
    assert (
        args.task == task
        and args.reward == {"report": "report=radcliq", "grounding": "grounding=soft_f1"}[task]
    )
    assert set(parse_spec(args.reward)) == {task}
    assert args.think == ((start, mode) == ("domain", "thinking"))
    assert args.box_scale == (1000 if (start, task) == ("general", "grounding") else 1)


# ---- the page ------------------------------------------------------------------------------------


def test_the_page_shows_what_the_results_say():
    page, results = (
        (ROOT / "docs/study.md").read_text(),
        json.loads((ROOT / "docs/study.json").read_text()),
    )
    body = re.search(r"<!-- results -->\n(.*)<!-- end -->", page, re.S)[1]
    assert tables(results) in body, "python -m minigrpo.study --table"
    assert all(
        (ROOT / "docs" / name).is_file() for name in re.findall(r"\((images/[\w.-]+)\)", body)
    )
    assert not results.get("smoke"), "figures of a smoke run mean nothing"


def test_a_page_without_markers_is_not_written_over(tmp_path):
    (tmp_path / "page.md").write_text("my notes\n")
    with pytest.raises(SystemExit, match="has no"):
        write_page(tmp_path / "page.md", {"runs": {}})
    assert tables({"runs": {}}) == NOTHING


def without_pictures(rank):
    import minigrpo.run.plots as plots

    plots.draw_curves = plots.draw_samples = lambda *_, **__: None  # two thirds of the time


def test_the_whole_study_runs_and_comes_from_its_cache(tmp_path, monkeypatch, capsys):
    """Films, scenes, traces, both SFTs, a run and an evaluation of every arm, tables, figures; once
    more from cache.
    """
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- results -->\n<!-- end -->\nafter\n")
    command = [
        "--smoke",
        "--output_dir",
        tmp_path / "runs",
        "--json",
        tmp_path / "study.json",
        "--page",
        page,
    ]
    processes.run(
        "python",
        ["-m", "minigrpo.study", *command],
        tmp_path / "log",
        prepare=without_pictures,
        seconds=500,
    )
    results = json.loads((tmp_path / "study.json").read_text())
    assert (
        len(results["runs"]) == 8
        and set(results["ablation"]) == {"none", "gleu", "radgraph", "mix"}
        and results["smoke"]
    )
    for name, run in results["runs"].items():
        metrics = HEADLINE[name.rsplit("-")[-1]]
        assert set(run["gain"]) == set(metrics) and len(run["seeds"]) == SMOKE.seeds
        for metric in metrics:
            assert run["gain"][metric]["mean"] == pytest.approx(
                run["rl"][metric]["mean"] - run["sft"][metric]["mean"]
            )
            assert set(run["gain"][metric]) == {"mean", "low", "high", "p", "n"}
        assert (
            ("thinking_length" in run["rl"])
            == ("thinking" in name)
            == ("thinking_words" in run["curves"])
        )
    text = page.read_text()
    assert (
        text.startswith("before\n")
        and text.endswith("after\n")
        and "A smoke run" in text
        and "### Table 3" in text
    )
    assert {path.name for path in (tmp_path / "images").iterdir()} == {
        f"study-{n}.png" for n in ("gains", "rewards", "lengths", "ablation")
    }

    monkeypatch.setattr(stages, "start", None)  # nothing may be run again
    monkeypatch.setattr(sys, "argv", ["study", *map(str, command)])
    study.main()
    assert page.read_text() == text and "31 runs, 31 of them done" in capsys.readouterr().out
    for folder in (tmp_path / "runs").glob("films-*/"):
        assert json.loads((folder / "done.json").read_text())["seconds"] >= 0
    monkeypatch.setattr(sys, "argv", ["study", "--table", *map(str, command[3:])])
    study.main()
    assert page.read_text() == text
