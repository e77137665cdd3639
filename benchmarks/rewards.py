"""What rewards cost: RadGraph in batches beside its package one report at a time, and a step of
GLEU + soft F1.

    # --base adds a BERT of base size (about two minutes on a CPU)
    OMP_NUM_THREADS=1 python -m benchmarks.rewards

Random weights in the published archive's format. Seconds of CPU, so that a busy machine does not
count; the least of three.
"""

import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from transformers import BertConfig

from minigrpo.data import Sample, format_boxes
from minigrpo.rewards import reward_fn
from minigrpo.rewards.radgraph import RadGraph
from minigrpo.rewards.radgraph_transformers5 import import_radgraph
from tests.scorer_weights import BASE, ENCODER, SIZE, reports, wordpiece, write_radgraph


def package_graph(folder: Path):
    """The package's own RadGraph on the archive of `folder`, which names its encoder by a path, as
    the package wants.
    """
    here = folder / "package/radgraph-xl"
    shutil.unpack_archive(folder / "radgraph-xl.tar.gz", here)
    config = here / "config.json"
    config.write_text(config.read_text().replace(f"microsoft/{ENCODER}", str(folder / ENCODER)))
    with contextlib.redirect_stdout(io.StringIO()):
        return import_radgraph().RadGraph(
            model_type="radgraph-xl", model_cache_dir=str(folder / "package"), cuda=-1
        )


def seconds(function, repeats: int = 3) -> tuple[float, object]:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        result = function()
        times.append(time.process_time() - start)
    return min(times), result


def radgraph(size: dict, count: int = 32, repeats: int = 3) -> dict:
    """Milliseconds a report of both ways on `count` reports, and how many annotations differ."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        BertConfig(vocab_size=wordpiece(folder / ENCODER), **size).save_pretrained(folder / ENCODER)
        write_radgraph(folder, size=size)
        ours, package, texts = (
            RadGraph.from_weights(scratch),
            package_graph(folder),
            reports(count, seed=9),
        )
        ours.annotate(texts[:2]), package(texts[:2])
        batched, mine = seconds(lambda: ours.annotate(texts), repeats)
        single, theirs = seconds(lambda: [package([text])["0"] for text in texts], repeats)
    return {
        "width": size["hidden_size"],
        "layers": size["num_hidden_layers"],
        "reports": count,
        "words": sum(len(text.split()) for text in texts) / count,
        "entities": sum(len(graph["entities"]) for graph in mine),
        "ms_batched": 1000 * batched / count,
        "ms_package": 1000 * single / count,
        "times_faster": single / batched,
        "different": sum(a["entities"] != b["entities"] for a, b in zip(mine, theirs)),
    }


def light_step(answers: int = 4096) -> dict:
    """One step of GLEU on reports and soft F1 on boxes, half of the answers each."""
    draw = random.Random(0)
    texts, box = reports(answers, seed=1), lambda: sorted(draw.random() for _ in range(2))
    half, samples, written = answers // 2, [], []
    for n in range(half):
        samples.append(Sample(str(n), None, "report", "Report.", texts[half + n]))
        written.append(texts[n])
        boxes = [
            [[x1, y1, x2, y2] for (x1, x2), (y1, y2) in [(box(), box())]][0]
            for _ in range(draw.randint(1, 8))
        ]
        samples.append(Sample(str(n), None, "grounding", "Where?", "", boxes=boxes[:4]))
        written.append("The opacity is at " + format_boxes(boxes))
    reward = reward_fn("gleu+soft_f1")
    return {"answers": answers, "seconds_step": seconds(lambda: reward(written, samples))[0]}


if __name__ == "__main__":
    print(json.dumps({"light": light_step()}))
    print(json.dumps({"radgraph tiny": radgraph(SIZE)}))
    if "--base" in sys.argv:
        print(json.dumps({"radgraph base": radgraph(BASE, repeats=2)}))
