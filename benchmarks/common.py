"""What the benchmarks share: a random Qwen3-VL, prompts of exact length, interleaved timing, peak
memory, the JSON.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import GenerationConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from minigrpo.data import Sample
from minigrpo.policy import Policy
from minigrpo.run.files import write_aside
from minigrpo.tiny import initialise, train_tokenizer

RESULTS = Path(__file__).parent / "results"


@dataclass
class Shape:
    """What one step works on: B prompts of image and text tokens, G answers each, all of exactly
    `answer` tokens.
    """

    image: int  # tokens, a square number; 0: no image
    text: int  # tokens of the prompt besides the image's, chat layout included
    answer: int
    prompts: int = 2
    group: int = 8

    @property
    def prompt(self) -> int:
        return self.image + self.text


def random_policy(
    *, width: int = 256, layers: int = 6, vocab: int = 16_384, seed: int = 0
) -> Policy:
    """15.5M parameters by default."""
    # its words are few, the head's width is what costs
    tokenizer = train_tokenizer(["user", "assistant"], 300)
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 64,
            head_dim=32,
            max_position_embeddings=8192,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            rope_parameters=dict(
                rope_type="default",
                rope_theta=10_000.0,
                mrope_section=[6, 5, 5],
                mrope_interleaved=True,
            ),
        ),
        vision_config=dict(
            depth=layers,
            hidden_size=width,
            intermediate_size=2 * width,
            num_heads=width // 64,
            patch_size=16,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=width,
            num_position_embeddings=42 * 42,
            deepstack_visual_indexes=[layers // 3],
        ),
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    initialise(model)
    model.generation_config = GenerationConfig(
        eos_token_id=ids(["<|im_end|>", "<|endoftext|>"]), pad_token_id=tokenizer.pad_token_id
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size=dict(shortest_edge=32 * 32, longest_edge=2048 * 2048),
    )
    return endless(Policy(model.eval(), tokenizer, images))


def endless(policy: Policy) -> Policy:
    """No answer ends early: the only end token lies outside the vocabulary. The checkpoint that it
    is saved as is not so.
    """
    policy.end_ids = [len(policy.head)]
    return policy


def loaded(folder: Path) -> Policy:
    return endless(Policy.from_pretrained(str(folder)))


def samples_of(policy: Policy, shape: Shape, folder: Path) -> list[Sample]:
    """B questions of the shape's length (a digit is a token), each with its own image of noise."""
    samples = []
    for number in range(shape.prompts):
        path, side = folder / f"{shape.image}-{number}.png", 32 * int(shape.image**0.5)
        if shape.image:
            Image.effect_noise((side, side), 50 + number).convert("RGB").save(path)
        sample = Sample(str(number), str(path) if shape.image else None, "report", "", "")
        digits = shape.prompt - policy.encode([sample]).ids.shape[1]
        sample.question = str(number % 10) * digits
        samples.append(sample)
    assert policy.encode(samples).ids.shape == (shape.prompts, shape.prompt)
    return samples


def interleaved(
    repeats: int, **sides: Callable[[], object]
) -> tuple[dict[str, float], dict[str, object]]:
    """Median seconds of each side, run A B A B, so that what else the machine does falls on all;
    and what each gave last.
    """
    seconds, last = {name: [] for name in sides}, {}
    for _ in range(repeats):
        for name, run in sides.items():
            start = now()
            last[name] = run()
            seconds[name].append(now() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}, last


def now() -> float:
    """Wall clock; with one thread (OMP_NUM_THREADS=1) its own processor time, which a busy machine
    leaves as it is.
    """
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def peak_bytes(run: Callable[[], object]) -> int:
    """How far the resident memory of this process rises above its present level while `run` works
    (Linux).

    To be called once in a fresh process: what earlier work has freed may not have gone back to the
        system.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Bytes of this process, now (VmRSS) or at its peak (VmHWM) (Linux)."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    )
    return 1024 * int(line.split()[1])


def own_process(program: str, *arguments: str) -> str:
    """The last word that a benchmark prints when it runs by itself."""
    command = [sys.executable, "-m", f"benchmarks.{program}", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1]


def about(**more) -> dict:
    names = [
        line.split(": ")[1]
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    cpu = names[0] if names else platform.machine()
    threads = torch.get_num_threads()
    return {
        "machine": f"{cpu}, {os.cpu_count()} cores",
        "date": str(date.today()),
        "clock": "processor seconds of one thread"
        if threads == 1
        else f"wall clock, {threads} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    } | more


def write(name: str, result: dict) -> None:
    """Into benchmarks/results; what was measured before and isn't now stays."""
    path = RESULTS / name
    before = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(exist_ok=True)
    write_aside(path, json.dumps(before | rounded(result), indent=1) + "\n")


def rounded(value):
    """Four digits, which is more than any timing is worth."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
