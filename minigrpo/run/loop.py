"""Everything around the steps of a run: where it starts or resumes, what follows each step, and how
it ends.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tqdm import tqdm

from minigrpo.data import Sample, check_apart, read_jsonl
from minigrpo.run.distributed import first, join, rank, ranks, say
from minigrpo.run.folder import last_checkpoint, open_run, run_errors, step_of
from minigrpo.run.guard import Skipped
from minigrpo.run.log import JsonLines
from minigrpo.run.plots import draw_curves, due
from minigrpo.run.roofline import note_on_bf16
from minigrpo.run.save import graceful_stop, save_best, save_checkpoint, save_final, stop_early
from minigrpo.run.schedule import learning_rate_at, set_learning_rate
from minigrpo.run.shard import gathered_layers
from minigrpo.run.state import load_optimizers
from minigrpo.run.track import tracker


def join_device(args) -> None:
    """Join the other processes of torchrun, if there are any, and print a note if --bf16 costs
    time.
    """
    join(args.device)
    if args.bf16 and (note := note_on_bf16(args.device)):
        say(note)


def join_run(args) -> Path | None:
    """`join_device`. Returns the checkpoint from which --resume continues, None for a new run."""
    join_device(args)
    return last_checkpoint(args)


def read_samples(args) -> tuple[list[Sample], list[Sample]]:
    """The samples of --train_data, and of --eval_data where it is given. Each rank looks at its
    part of the images."""
    read, validation = partial(read_jsonl, task=args.task, part=(rank(), ranks())), []
    # Absolute, so that films are found whatever a reward of the user's own does to the working
    # directory.
    train = read(os.path.abspath(args.train_data))
    if args.eval_data:
        validation = read(os.path.abspath(args.eval_data))
    if shared := check_apart(train, validation, ("--train_data", f"--eval_data {args.eval_data}")):
        say(f"note: {shared}")
    return train, validation


class Run:
    """A run in --output_dir, new or resumed from `checkpoint`:

        run = Run("sft", args, checkpoint, samples, schedule="cosine", best="eval_loss")
        with run.training(policy, optimizer):
            for step in run.steps():
                ...
                run.end_step(step, row, validate)

    `samples` are those that it reads. `best` names the figure by which the best weights are kept:
    the lowest of a loss, the highest of anything else. ValueError if the folder has other contents,
    or if another process writes there.
    """

    def __init__(self, name: str, args, checkpoint: Path | None, samples, *, schedule, best):
        self.name, self.args, self.checkpoint, self.schedule = name, args, checkpoint, schedule
        self.start = step_of(checkpoint)
        folder, self.lock = open_run(args, checkpoint, samples)
        # Absolute, whatever a reward of the user's own does to the working directory.
        self.folder = folder.absolute()
        self.log = self.lines("metrics.jsonl")
        self.skipped = Skipped(self.folder, args, int(sum(self.log.past("skipped_updates"))))
        self.measured, self.sign = best, -1 if best == "eval_loss" else 1
        self.best = max((self.sign * x for x in self.log.past(best)), default=-math.inf)

    def lines(self, name: str) -> JsonLines:
        """A file in the run's folder with a row for each step, continued where the run
        continues.
        """
        return JsonLines(self.folder / name, self.start)

    @contextmanager
    def training(self, policy, *optimizers, memory: str):
        """A context around all steps; at its end final/ is saved. `memory` names the arguments to
        lower if memory runs out. Ctrl-C and SIGTERM end the run after the current step.
        """
        self.policy, self.optimizers, self.redraw = policy, optimizers, due()
        if self.checkpoint:
            load_optimizers(self.checkpoint, policy, *optimizers)
        self.track = tracker(self.args, self.folder, self.start)
        for note in self.args.inert():
            say(f"note: {note}")
        with self.lock, run_errors(self.folder, memory), graceful_stop() as self.stopping:
            yield
            if first():  # before final/, by which --resume knows that nothing is left to do
                draw_curves(self.folder)
            save_final(self.folder, self.args.max_steps, policy, *optimizers)
        say(f"saved {self.folder / 'final'}")

    def steps(self, prepared: Iterable | None = None) -> Iterator:
        """The numbers of the remaining steps, with a progress bar; or (number, batch), if such
        pairs are `prepared`.
        """
        args = self.args
        self.bar = tqdm(
            prepared or range(self.start, args.max_steps),
            initial=self.start,
            total=args.max_steps,
            desc=self.name,
            disable=not first(),
        )
        self.began = time.perf_counter()
        for item in self.bar:
            number = item if prepared is None else item[0]
            self.rate = learning_rate_at(
                number, args.max_steps, args.learning_rate, args.warmup, self.schedule
            )
            set_learning_rate(self.optimizers, self.rate)
            yield item

    def seconds(self) -> float:
        """Seconds since the last step ended, including the wait for a batch, without saving and
        validation.
        """
        return time.perf_counter() - self.began

    def end_step(self, step: int, row: dict, validate: Callable[[], float | None] | None, **shown):
        """Write the step's figures and show some, validate and save when due, and stop if that was
        asked for or too many updates were skipped.
        """
        args, saved = self.args, (self.policy, *self.optimizers)
        row = {"step": step, **row, "learning_rate": self.rate}
        if validate and (step + 1) % args.eval_steps == 0:
            with gathered_layers(self.policy):
                value = validate()
            if value is not None:
                row[self.measured] = value
                if self.sign * value > self.best:
                    self.best = self.sign * value
                    save_best(self.folder, step + 1, self.policy)
        self.log.write(row)
        self.track(row)
        self.bar.set_postfix(**shown)
        self.skipped.stop_if_too_many()
        if code := self.stopping():
            stop_early(code, self.folder, step + 1, *saved, keep=args.keep_checkpoints)
        if (step + 1) % args.save_steps == 0 and step + 1 < args.max_steps:
            save_checkpoint(self.folder, step + 1, *saved, keep=args.keep_checkpoints)
        if first() and self.redraw():
            draw_curves(self.folder)
        self.began = time.perf_counter()
