"""The study on phantoms: does RL add to SFT, does thinking help, what does the reward do? One
command, resumable.

    # make study: everything that is not done yet, then docs/study.json, study.md, figures
    python -m minigrpo.study
    # make study-smoke
    python -m minigrpo.study --smoke --output_dir runs/study-smoke \\
        --json runs/study-smoke/study.json --page ""
    python -m minigrpo.study --table          # tables and figures from docs/study.json alone

{general, domain} start x {direct, thinking} x {report, grounding}: each evaluated before and after
GRPO, over several seeds. `general` learned to see and answer on drawn scenes, and saw films with
loose captions alone; `domain` is the same model after SFT on films. Both learned to think when
asked. Arms differ in what
their name says and in nothing else: the same steps, prompts, longest answer and seeds.

A run's folder is named by a hash of its command and of the runs that it stands on, so that a change
of a setting reruns what depends on it, and that alone. A change of the code does not: remove
output_dir then.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

BEGAN = time.perf_counter()
from minigrpo.run.args import answer_early
from minigrpo.run.arguments import StudyArguments

if __name__ == "__main__":
    answer_early(StudyArguments, __doc__)  # what follows takes seconds to import

import torch

from minigrpo.run.args import input_errors, parse_args, run_errors
from minigrpo.run.files import make_folder, write_aside
from minigrpo.stages import Run, hold, run_all
from minigrpo.study_results import collect
from minigrpo.study_table import draw_figures, page_text, tables, write_page

STARTS, MODES, TASKS = ("general", "domain"), ("direct", "thinking"), ("report", "grounding")
ENTITIES = "minigrpo.rewards.phantom_entities:complete"
# RadCliQ, the paper's reward, weighs findings and likeness of the text; so does this, without
# weights of a network.
REWARDS = {"report": f"0.5*gleu+0.5*{ENTITIES}", "grounding": "soft_f1"}
# The domain-direct report run under each other reward; "mix" is the arm itself.
ABLATION = {"gleu": "report=gleu", "radgraph": f"report={ENTITIES}"}
RANKS = 2  # processes that share a step of SFT


@dataclass
class Size:
    """How large a study is; GRPO's other settings are the demo's."""

    films: int
    test: int
    pixels: int  # of a film's side
    scenes: int
    captioned: int  # films with loose captions
    reading: int  # reports as text
    traces: int  # of thought, for each start
    general_steps: int
    domain_steps: int
    grpo_steps: dict[str, int]
    prompts: int
    group: int
    longest: int  # answer in tokens, thinking included
    seeds: int


FULL = Size(
    films=2400,
    test=300,
    pixels=224,
    scenes=2000,
    captioned=1600,
    reading=400,
    traces=2000,
    general_steps=1200,
    domain_steps=900,
    grpo_steps={"report": 100, "grounding": 140},
    prompts=16,
    group=8,
    longest=192,
    seeds=3,
)
SMOKE = Size(
    films=12,
    test=4,
    pixels=64,
    scenes=12,
    captioned=4,
    reading=4,
    traces=10,
    general_steps=2,
    domain_steps=2,
    grpo_steps={"report": 1, "grounding": 1},
    prompts=4,
    group=2,
    longest=24,
    seeds=1,
)


def plan(size: Size, reward_weights: str | None = None) -> list[Run]:
    """All runs, each after those that it needs."""
    runs: list[Run] = []

    def add(name: str, *command, alone: bool = False, ranks: int = 1) -> None:
        runs.append(Run(name, list(command), alone, ranks))

    add(
        "films",
        "-m",
        "minigrpo.data.phantom",
        "--output_dir",
        "{out}",
        "--train",
        size.films,
        "--test",
        size.test,
        "--seed",
        0,
        "--size",
        size.pixels,
        "--prose",
    )
    add(
        "scenes",
        "-m",
        "minigrpo.data.scenes",
        "--output_dir",
        "{out}",
        "--train",
        size.scenes,
        "--films",
        size.captioned,
        "--reading",
        size.reading,
        "--seed",
        0,
        "--size",
        size.pixels,
    )
    sft = [
        "--batch_size",
        10,
        "--micro_batch",
        10 // RANKS,
        "--optimizer",
        "muon",
        "--beta2",
        0.98,
        "--learning_rate",
        4e-3,
    ]
    for start, data, model, steps in (
        ("general", "scenes", "tiny", size.general_steps),
        ("domain", "films", "{general}/final", size.domain_steps),
    ):
        add(
            f"{data}-think",
            "-m",
            "minigrpo.cold_start",
            f"{{{data}}}/train.jsonl",
            "--teacher",
            "drawing",
            "--limit",
            size.traces,
            "--output_file",
            "{out}/think.jsonl",
        )
        weights = ["--task_weights", "report=2"] if data == "films" else []
        add(
            start,
            "train_sft.py",
            "--model",
            model,
            "--train_data",
            f"{{{data}-think}}/think.jsonl",
            "--max_steps",
            steps,
            "--output_dir",
            "{out}",
            *sft,
            *weights,
            alone=True,  # all else waits for it
            ranks=RANKS,
        )
    think = {"direct": [], "thinking": ["--think"]}
    evaluate = [
        "evaluate.py",
        "--data",
        "{films}/test.jsonl",
        "--max_new_tokens",
        size.longest,
        "--report_items",
        0,
        "--output_dir",
        "{out}",
    ]
    add("constant", *evaluate, "--model", "constant", "--train_data", "{films}/train.jsonl")
    for start in STARTS:
        for mode in MODES:
            add(f"{start}-{mode}-sft", *evaluate, "--model", f"{{{start}}}/final", *think[mode])

    def grpo(name: str, start: str, mode: str, task: str, seed: int, reward: str, *weights) -> None:
        add(
            name,
            "train_grpo.py",
            "--model",
            f"{{{start}}}/final",
            "--train_data",
            "{films}/train.jsonl",
            "--task",
            task,
            "--max_steps",
            size.grpo_steps[task],
            "--output_dir",
            "{out}",
            "--seed",
            seed,
            "--learning_rate",
            5e-5,
            "--prompts_per_step",
            size.prompts,
            "--group_size",
            size.group,
            "--micro_tokens",
            1200,
            "--freeze",
            "vision",
            "projector",
            "--max_new_tokens",
            size.longest,
            "--reward",
            reward,
            *weights,
            *think[mode],
        )
        add(f"{name}-test", *evaluate, "--model", f"{{{name}}}/final", "--task", task, *think[mode])

    for seed in range(size.seeds):
        for start in STARTS:
            for mode in MODES:
                for task in TASKS:
                    reward = f"{task}={REWARDS[task]}"
                    grpo(f"{start}-{mode}-{task}-{seed}", start, mode, task, seed, reward)
        for name, reward in rewards_compared(reward_weights).items():
            weights = ["--reward_weights", reward_weights] if name == "bertscore" else []
            grpo(f"reward-{name}-{seed}", "domain", "direct", "report", seed, reward, *weights)
    return runs


def rewards_compared(reward_weights: str | None) -> dict[str, str]:
    return ABLATION | ({"bertscore": "report=bertscore"} if reward_weights else {})


def folders(runs: list[Run], output_dir: Path) -> dict[str, Path]:
    """{run: its folder}, named by the hash of all that it depends on."""
    keys: dict[str, str] = {}
    for run in runs:
        whole = json.dumps([run.command, [keys[name] for name in run.needs]])
        keys[run.name] = hashlib.sha256(whole.encode()).hexdigest()[:10]
    return {name: output_dir / f"{name}-{key}" for name, key in keys.items()}


@run_errors(lambda: "The same command goes on", "--jobs")
def main() -> None:
    with input_errors():
        args = parse_args(StudyArguments, __doc__)
        target, page = Path(args.json), Path(args.page) if args.page else None
        if args.table and not target.is_file():
            raise ValueError(
                f"--table: {target} does not exist; run the study first, or name its --json"
            )
        if page:
            page_text(page)  # what cannot be rendered into shows now, not after hours
        if not args.table:
            make_folder(root := Path(args.output_dir))
            held = hold(root)  # noqa: F841  as long as this process lives
    if not args.table:
        size = SMOKE if args.smoke else FULL
        size.seeds = args.seeds or size.seeds
        runs = plan(size, args.reward_weights)
        where = folders(runs, root)
        run_all(runs, where, root, jobs=args.jobs, threads=torch.get_num_threads(), began=BEGAN)
        names = ["mix", *rewards_compared(args.reward_weights)]
        target.parent.mkdir(parents=True, exist_ok=True)
        write_aside(
            target, json.dumps(collect(where, size, names, smoke=args.smoke), indent=1) + "\n"
        )
    results = json.loads(target.read_text())
    print(tables(results))
    images = (page or target).parent / "images"
    if results["runs"]:
        draw_figures(results, images)
    if page:
        write_page(page, results)


if __name__ == "__main__":
    main()
