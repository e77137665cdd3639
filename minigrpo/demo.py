"""The whole road, as commands that you could type: films, SFT, GRPO for both tasks, evaluation before and after.

    python -m minigrpo.demo --output_dir runs/demo --seed 0                                     # make demo
    python -m minigrpo.demo --output_dir runs/real --data FOLDER --model runs/demo/sft/final    # make demo-real

FOLDER holds train.jsonl and test.jsonl; without one, phantom films are drawn. Leaves results.json, results.md and the
pictures in output_dir. Every command is printed before it runs.
"""

import json
import multiprocessing
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

BEGAN = time.perf_counter()
import minigrpo.policy  # noqa: E402, F401  loaded for the programs, see `run`
import minigrpo.run.plots  # noqa: E402, F401
from minigrpo.commands import python, typed  # noqa: E402
from minigrpo.run.args import input_errors, parse_args, run_errors  # noqa: E402
from minigrpo.run.files import write_aside  # noqa: E402

TASKS = {"report": "gleu", "grounding": "soft_f1"}
SHOWN = {"report": ["gleu", "rouge_l", "bleu4", "length"], "grounding": ["soft_f1", "map50", "boxes"]}


@dataclass
class DemoArguments:
    output_dir: str = field(default="runs/demo", metadata={"help": "folder to make"})
    seed: int = field(default=0, metadata={"help": "of films, weights, data order and sampling"})
    data: str | None = field(default=None, metadata={"help": "folder with train.jsonl and test.jsonl; default: draw phantoms"})
    model: str = field(default="tiny", metadata={"help": "what SFT starts from: a checkpoint, or `tiny`"})


@run_errors(lambda: "What is done is kept", "the number of other programs")
def main() -> None:
    with input_errors():
        args = parse_args(DemoArguments, __doc__)
        out = Path(args.output_dir)
        if out.exists():
            raise ValueError(f"{out} exists already: remove it, or choose another --output_dir (make demo OUT=runs/another)")
        for name in ("train.jsonl", "test.jsonl") if args.data is not None else ():
            if not (Path(args.data) / name).is_file():
                raise ValueError(f"--data {args.data!r} holds no {name}: give a folder with train.jsonl and test.jsonl "
                                 "(make demo-real DATA=FOLDER)")
        if args.model != "tiny" and not (Path(args.model) / "config.json").is_file():
            raise ValueError(f"--model {args.model} is no checkpoint folder: run the demo first, or name another")
    real = args.data is not None
    data = Path(args.data) if real else out / "films"
    # The tiny model wants larger steps than a real one (paper: SFT 1e-5, GRPO 1e-6); the loss constants are the paper's.
    sft = ["--batch_size", 10, "--questions_per_image", 8, "--micro_batch", 10, "--task_weights", "report=2", "--optimizer", "muon", "--beta2", 0.98]
    sft += ["--max_steps", 150, "--learning_rate", 2e-3] if real else ["--max_steps", 880, "--learning_rate", 4e-3]
    grpo = ["--learning_rate", 5e-5, "--prompts_per_step", 16, "--micro_tokens", 1200, "--freeze", "vision", "projector", "--max_new_tokens", 192]
    grpo_steps = {"report": 20 if real else 85, "grounding": 20 if real else 140}

    seconds: dict[str, float] = {}

    def run(stage: str, *command) -> None:
        line = [str(word) for word in command]
        print("\n$ " + typed(line), flush=True)
        began = time.perf_counter()
        # A fork has torch and transformers loaded already; eight fresh interpreters would spend 40 s on that.
        process = multiprocessing.get_context("fork").Process(target=python, args=(line,))
        process.start()
        try:
            process.join()
        except KeyboardInterrupt:  # it has the signal too: it finishes its step and leaves a checkpoint
            process.join()
        if process.exitcode:
            sys.exit(f"demo: {stage} failed, see above")
        seconds[stage] = round(time.perf_counter() - began, 1)

    seed = ["--seed", args.seed]
    if not real:
        run("films", "-m", "minigrpo.data.phantom", "--output_dir", data, "--train", 2400, "--test", 300, "--size", 224, *seed)
    train, test = data / "train.jsonl", data / "test.jsonl"
    run("sft", "train_sft.py", "--model", args.model, "--train_data", train, "--output_dir", out / "sft", *sft, *seed)
    evaluate = ["evaluate.py", "--data", test, "--max_new_tokens", 192]
    run("evaluate constant", *evaluate, "--model", "constant", "--train_data", train, "--output_dir", out / "constant/test")
    run("evaluate sft", *evaluate, "--model", out / "sft/final", "--baseline", out / "constant/test", "--output_dir", out / "sft/test")
    for task in TASKS:
        run(f"grpo {task}", "train_grpo.py", "--model", out / "sft/final", "--train_data", train, "--task", task,
            "--max_steps", grpo_steps[task], "--output_dir", out / task, *grpo, *seed)
        run(f"evaluate {task}", *evaluate, "--model", out / task / "final", "--task", task, "--baseline", out / "sft/test",
            "--output_dir", out / task / "test")
    seconds["total"] = round(time.perf_counter() - BEGAN, 1)

    results = collect(out)
    results["seconds"] = seconds
    results["peak_memory_mb"] = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
    write_aside(out / "results.json", json.dumps(results, indent=2) + "\n")
    write_aside(out / "results.md", table := markdown(results))
    print(f"\n{table}\nPictures: {', '.join(str(path) for path in sorted(out.glob('*/**/*.png')) if 'films' not in path.parts)}")


def collect(out: Path) -> dict:
    """{task: {"constant" | "sft" | "grpo": {metric: interval}, "grpo-sft" | "sft-constant": {metric: paired interval}}}."""
    read = {path.parent.parent.name: json.loads(path.read_text()) for path in out.glob("*/test/metrics.json")}
    results: dict = {}
    for task in TASKS:
        results[task] = {name: read[run]["tasks"][task] for name, run in (("constant", "constant"), ("sft", "sft"), ("grpo", task))}
        for name, run in (("sft-constant", "sft"), ("grpo-sft", task)):
            results[task][name] = {metric: {"mean": gain.pop("difference"), **gain}
                                   for metric, gain in read[run]["difference"][task].items()}
        rewards = [json.loads(line)["reward"] for line in (out / task / "metrics.jsonl").read_text().splitlines()]
        tenth = max(1, len(rewards) // 10)  # sampled at temperature 1, first and last tenth of the run
        results[task]["sampled_reward"] = {"first": sum(rewards[:tenth]) / tenth, "last": sum(rewards[-tenth:]) / tenth}
    return results


def markdown(results: dict) -> str:
    def cell(value: dict, sign: str = "") -> str:
        return f"{value['mean']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"

    lines = []
    for task, names in SHOWN.items():
        found = results[task]
        lines += [f"**{task}** ({found['sft']['n']} test samples, greedy, 95% bootstrap intervals)", "",
                  "| metric | constant answer | SFT | SFT + GRPO | gain of GRPO (paired) |", "|---|---|---|---|---|"]
        lines += [f"| {name} | {' | '.join(cell(found[m][name]) for m in ('constant', 'sft', 'grpo'))} | "
                  f"{cell(found['grpo-sft'][name], '+')} |" for name in names]
        sampled = found["sampled_reward"]
        lines += ["", f"Reward of sampled answers (T = 1): {sampled['first']:.3f} at the start of GRPO, {sampled['last']:.3f} at its end.", ""]
    lines.append(f"{results['seconds']['total']:.0f} s in all, {results['peak_memory_mb']} MB at the peak.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
