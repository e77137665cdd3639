"""--plan: how much of the device's memory a run will need, before anything is loaded.

    # the memory at hand
    python train_grpo.py --model Qwen/Qwen3-VL-8B-Instruct --train_data ... --output_dir ... --plan
    # a device of 80 GB
    python train_grpo.py ... --plan 80

There are no formulas: the step itself runs, on torch's fake tensors, which have shapes but no data,
and a ledger adds up the live ones. Prompts are those of the first step; answers are assumed to have
the maximum length, so a run whose answers end earlier takes less. 1 GB is 1e9 bytes.
"""

import gc
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minigrpo.checkpoint import open_checkpoint, set_budget
from minigrpo.data import Sample, batch_at
from minigrpo.encode import Prompts
from minigrpo.generate import sample as sample_tokens
from minigrpo.lora import adapters_off, add_adapters
from minigrpo.policy import AnswerCache, Policy
from minigrpo.run.groups import micro_batches
from minigrpo.run.optimizers import grpo_optimizers, sft_optimizers

aten, TILE = torch.ops.aten, 512  # rows of logits at a time, the default of `linear_logprob`


class Ledger(TorchDispatchMode):
    """Adds up the bytes of all live tensors that were created under it, and their peak since
    `phase` began. (Weights and what is computed from them are fake; tokens, masks, positions and
    pixels are real.)
    """

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default):
            # How many rows a mask selects depends on data that fake tensors lack; masks are real
            # here.
            places = [
                part
                for i in args[1]
                for part in (
                    i.nonzero().unbind(1) if i is not None and i.dtype == torch.bool else (i,)
                )
            ]
            args = (args[0], places, *args[2:])
        if func is aten.masked_select.default and isinstance(args[0], FakeTensor):
            out = args[0].new_empty(int(args[1].expand(args[0].shape).sum()))
        else:
            out = func(*args, **(kwargs or {}))
        self.add(out)
        return out

    def add(self, tensors) -> None:
        for tensor in tree_leaves(tensors):
            if (
                isinstance(tensor, torch.Tensor)
                and (key := (store := tensor.untyped_storage())._cdata) not in self.known
            ):
                self.known[key] = store.nbytes()
                self.live += store.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(store, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self.known.pop(key)

    @contextmanager
    def phase(self, plan: "Plan", name: str):
        """Record the peak of `name` beyond what was in use before it."""
        before, self.peak = self.live, self.live
        with self:
            yield
        plan.phases[name] = max(plan.phases.get(name, 0), self.peak - before)
        plan.peaks[name] = max(plan.peaks.get(name, 0), self.peak)


@dataclass
class Plan:
    """Bytes. `lasting` is needed for the whole run; `phases` come on top of it, one after the
    other.
    """

    lasting: dict[str, int] = field(default_factory=dict)
    phases: dict[str, int] = field(default_factory=dict)
    # of each phase, with what was alive besides
    peaks: dict[str, int] = field(default_factory=dict)
    parts: dict[str, int] = field(default_factory=dict)  # what some phases consist of

    @property
    def worst(self) -> str:
        """The phase of the peak."""
        return max(self.peaks, key=self.peaks.get)

    @property
    def peak(self) -> int:
        return self.lasting["the program itself"] + self.lasting["prompts"] + self.peaks[self.worst]


def imagined_policy(args, fake: FakeTensorMode) -> Policy:
    """The policy without its data, from config.json, tokenizer and image settings alone."""
    c = open_checkpoint(args.model, weights=False)
    set_budget(c, args.max_pixels, say=lambda line: None)
    policy, model = Policy(c.model, c.tokenizer, c.images, autocast=args.bf16), c.model
    if args.lora_rank:
        with torch.device("meta"):
            add_adapters(policy, args)
    tensors: dict[int, torch.Tensor] = {}  # a tied head is one tensor
    with fake:
        for store in [
            store for module in model.modules() for store in (module._parameters, module._buffers)
        ]:
            for name, x in store.items():
                if x is not None and id(x) not in tensors:
                    # config.json may name bf16, which is how the hub stores them; we load them as
                    # fp32
                    empty = torch.empty_like(
                        x, device="cpu", dtype=torch.float32 if x.is_floating_point() else x.dtype
                    )
                    tensors[id(x)] = (
                        torch.nn.Parameter(empty, x.requires_grad)
                        if isinstance(x, torch.nn.Parameter)
                        else empty
                    )
                store[name] = tensors[id(x)] if x is not None else None
    policy.head = model.lm_head.weight
    return policy


def begin(
    args, ledger: Ledger, plan: Plan, optimizers_of, *, reference: bool
) -> tuple[Policy, Policy | None, list]:
    """Weights, reference, gradients and optimiser states: all that lasts."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    plan.lasting["the program itself"] = 0 if on_gpu(args) else resident()
    policy = imagined_policy(args, fake)
    policy.freeze(args.freeze)
    if args.activation_checkpointing:
        policy.checkpoint_activations()
    optimizers = optimizers_of(policy, args)
    for group in (
        [group for optimizer in optimizers for group in optimizer.param_groups]
        if on_gpu(args)
        else ()
    ):
        group["foreach"] = True  # what torch chooses on a GPU: faster, with more in hand at a time

    def taking(name: str, before: int = 0) -> None:
        plan.lasting[name] = ledger.live - before

    ledger.add(list(policy.model.parameters()))
    taking("weights")
    other = None
    if reference:
        other = imagined_policy(args, fake).freeze()
        ledger.add(list(other.model.parameters()))
        taking("reference", plan.lasting["weights"])
    before = ledger.live
    with fake, ledger:
        for weight in policy.parameters():
            weight.grad = torch.zeros_like(weight)
        taking("gradients", before)
        before = ledger.live
        with ledger.phase(plan, "optimiser step"):
            for optimizer in optimizers:
                optimizer.step()
    taking("optimiser", before)
    for optimizer in optimizers:
        optimizer.zero_grad()
    gc.collect()
    return policy, other, optimizers  # whose states live as long as they do


def plan_grpo(samples: list[Sample], args) -> Plan:
    """A step of train_grpo.py: its rollout when all answers have reached their full length, its
    largest micro-batch.
    """
    plan, ledger, G, T = Plan(), Ledger(), args.group_size, args.max_new_tokens
    policy, reference, optimizers = begin(
        args, ledger, plan, grpo_optimizers, reference=bool(args.kl_coef) and not args.lora_rank
    )
    reference = reference or policy
    prompts = policy.encode(batch_at(samples, 0, args.prompts_per_step, args.seed))
    B = len(prompts.ids)
    plan.lasting["prompts"] = sum(x.nbytes for x in vars(prompts).values())
    places = min(B, max(1, args.rollout_rows // G))
    with ledger.phase(plan, "rollout"), torch.no_grad():
        imagine_rollout(policy, prompts, places, G, T, plan)
    tokens, mask = torch.zeros(B * G, T, dtype=torch.long), torch.ones(B * G, T, dtype=torch.bool)
    size = B // args.updates_per_rollout
    parts = micro_batches(prompts, mask, range(size), args.micro_tokens)
    part, rows = max(
        parts, key=lambda part: len(part[0]) * (int(prompts.mask[part[0]].sum(1).max()) + G * T)
    )
    chosen, tokens, mask = prompts.select(part), tokens[rows], mask[rows]
    if args.kl_coef:
        with ledger.phase(plan, "reference pass"), torch.no_grad(), adapters_off(reference):
            reference.score(chosen, tokens, mask, temperature=args.temperature)
    for number in range(1 + (len(parts) > 1)):  # the second time there are gradients already
        with ledger.phase(plan, "update"):
            imagine_update(
                policy,
                lambda: policy.score(
                    chosen, tokens, mask, temperature=args.temperature, entropy=True
                )[0],
                plan,
            )
    plan.parts["tiles of logits, in update"] = 3 * 4 * min(TILE, len(tokens) * T) * len(policy.head)
    return plan


def imagine_rollout(
    policy: Policy, prompts: Prompts, places: int, group: int, length: int, plan: Plan
) -> None:
    """`generate` up to its last decoding step, with a refill if prompts wait."""
    first = prompts.select(slice(places), trim=False)
    prefix, cache = policy.prefill(first), AnswerCache(length)
    rows = torch.zeros(places * group, dtype=torch.long)
    policy.decode(prefix, rows, rows, cache)  # makes room for all
    cache.written = max(0, length - 1)
    hidden = policy.decode(prefix, rows, rows + cache.written, cache)
    sample_tokens(hidden, policy.head, 1.0, torch.zeros(len(rows), dtype=torch.float64))
    plan.parts["keys and values of prompts, in rollout"] = prefix.nbytes
    plan.parts["keys and values of answers, in rollout"] = sum(
        x.nbytes for stores in cache.layers.values() for x in stores
    )
    if places < len(prompts.ids):
        prefix.put(torch.arange(places), policy.prefill(first))


def imagine_update(policy: Policy, score, plan: Plan) -> None:
    kept: dict[int, int] = {}
    weights = {weight.untyped_storage()._cdata for weight in policy.model.parameters()}

    def keep(tensor):
        if (
            isinstance(tensor, FakeTensor)
            and (store := tensor.untyped_storage())._cdata not in weights
        ):
            kept[store._cdata] = store.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        if not policy.activation_checkpointing
        else nullcontext()
    ):
        loss = score().sum()
    loss.backward()
    if kept:
        plan.parts["activations, in update"] = sum(kept.values())


def plan_sft(parts: list[list[list[Sample]]], args) -> Plan:
    """A step of train_sft.py whose forward and backward passes are `parts`: its largest."""
    plan, ledger = Plan(), Ledger()
    policy, _, optimizers = begin(args, ledger, plan, sft_optimizers, reference=False)
    encoded = [policy.encode_turns(part) for part in parts]
    # and the next step's
    plan.lasting["prompts"] = 2 * sum(
        x.nbytes for prompts, _ in encoded for x in vars(prompts).values()
    )
    prompts, blocks = max(
        encoded,
        key=lambda part: part[0].ids.numel() + sum(tokens.numel() for tokens, *_ in part[1]),
    )

    def score():
        prefix = policy.prefill(prompts)
        return sum(policy.score(prefix, tokens, mask).sum() for tokens, mask, _ in blocks)

    for number in range(1 + (len(parts) > 1)):
        with ledger.phase(plan, "update"):
            imagine_update(policy, score, plan)
    plan.parts["tiles of logits, in update"] = (
        2 * 4 * min(TILE, max(int(mask.sum()) for _, mask, _ in blocks)) * len(policy.head)
    )
    return plan


def explain(args, make_plan, samples_note: str) -> str:
    """The table that --plan prints, and the settings that fit; make_plan(args) -> Plan."""
    plan = make_plan(args)
    room = args.plan * 1e9 or memory_at_hand(args)
    lines = [
        f"plan for {args.model} on {args.device}, {'bf16' if args.bf16 else 'fp32'}; {samples_note}"
    ]

    def row(name, size, note=""):
        return lines.append(f"  {name:<44}{size / 1e9:8.2f} GB  {note}".rstrip())

    for name, size in plan.lasting.items():
        row(name, size)
    for name, size in plan.phases.items():
        row(
            f"+ {name}",
            size,
            f"{(plan.lasting['the program itself'] + plan.peaks[name]) / 1e9:.2f} GB in all",
        )
    for name, size in plan.parts.items():
        row(f"    of which {name}", size)
    row(
        "peak",
        plan.peak,
        f"in the {plan.worst}; of {room / 1e9:.1f} GB" + (" at hand" if not args.plan else ""),
    )
    if on_gpu(args):
        lines.append(
            "  not counted: the CUDA context, about half a GB, and what the allocator loses between"
            " blocks"
        )
    else:
        lines.append(
            "  not counted: what glibc keeps of freed memory, up to 18% as measured;"
            " MALLOC_MMAP_THRESHOLD_=262144 avoids it"
        )
    if args.shard:
        lines.append(
            "  not counted: what --shard saves (docs/node.md has the arithmetic); these figures are"
            " for a rank that holds all layers"
        )
    if plan.peak <= room:
        return "\n".join([*lines, "fits"])
    lines.append("does not fit; what saves memory, one setting at a time:")
    for plan, words in lighter(args, plan, make_plan, room):
        lines.append(
            f"  {words:<62}{plan.peak / 1e9:8.2f} GB" + ("  fits" if plan.peak <= room else "")
        )
    if plan.peak > room:
        lines.append(
            "  no other setting saves more: use a smaller --model, lower --max_pixels, or a larger"
            " device"
        )
    return "\n".join(lines)


def lighter(args, plan: Plan, make_plan, room: float):
    """(plan, all settings changed so far) until it fits, each time changing a setting that affects
    the phase of the peak.
    """
    part = "micro_tokens" if hasattr(args, "micro_tokens") else "micro_batch"
    least, words, spent = (
        {"rollout_rows": getattr(args, "group_size", 1), "micro_batch": 1, "micro_tokens": 512},
        {},
        set(),
    )
    while plan.peak > room:
        name = "rollout_rows" if plan.worst == "rollout" else part
        if (
            sum(plan.lasting.values()) > 0.9 * room or plan.worst == "optimiser step"
        ) and not args.lora_rank:
            change = {
                "lora_rank": 16,
                "freeze": [part for part in args.freeze if part != "language"],
            }
        elif name not in spent and getattr(args, name) > least[name]:
            change = {name: max(least[name], getattr(args, name) // 4)}
        elif plan.worst != "rollout" and not args.activation_checkpointing:
            change = {"activation_checkpointing": True}
        elif not args.lora_rank:
            change = {
                "lora_rank": 16,
                "freeze": [part for part in args.freeze if part != "language"],
            }
        else:
            return
        changed = make_plan(replace(args, **change))
        # a group stays whole: no smaller part than that
        if changed.peak >= plan.peak and name in change:
            spent.add(name)
            continue
        args, plan = replace(args, **change), changed
        words |= {key: value for key, value in change.items() if key != "freeze"}
        yield (
            plan,
            " ".join(
                f"--{key}" if value is True else f"--{key} {value}" for key, value in words.items()
            ),
        )


def on_gpu(args) -> bool:
    return args.device.startswith("cuda")


def memory_at_hand(args) -> float:
    if on_gpu(args):
        return torch.cuda.mem_get_info(args.device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next(
        (1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")),
        float("inf"),
    )


@cache
def resident() -> int:
    """Bytes of this process when it was first asked: code and libraries (Linux; elsewhere 0)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)
