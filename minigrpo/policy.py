"""A Qwen3-VL as a policy: one pass over each prompt, shared by the group of answers to it.

The weights stay in a plain `Qwen3VLForConditionalGeneration`; the pass through its layers is
written out here, because the point of the project is in the attention: the answers of a group read
the keys and values of one pass over their prompt.

`prefill` encodes the image, so an image is encoded once per pass: three times in a default step of
GRPO, for the rollout, for the log-probs of the reference, and in the update, which has gradients
and is one pass for all answers of the group. Without a KL (`--kl_coef 0`) it is twice;
`--rollout_cap`, which also scores the policy, adds one, and activation checkpointing, which
recomputes the update's pass, another.

Shapes: B prompts, G answers each, R = B G rows, P prompt tokens (padded on the right), T answer
tokens, d width, H query heads, K key heads, D head width.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3VLForConditionalGeneration

from minigrpo import checkpoint as checkpoints
from minigrpo.data import Sample
from minigrpo.encode import Encoder, Prompts
from minigrpo.logprob import linear_logprob


@dataclass
class Prefix:
    """What the answers of a group share: the keys and values of their prompt in every layer, and
    where they start.
    """

    keys: list[Tensor]  # one [B, K, P, D] a layer
    values: list[Tensor]  # one [B, K, P, D] a layer
    mask: Tensor  # [B, P] bool
    next_position: Tensor  # [B]
    hidden: Tensor  # [B, d] last hidden state of the prompt, which predicts the first answer token

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values, which each decoding step reads."""
        return sum(x.nbytes for x in (*self.keys, *self.values))

    def select(self, prompts: Tensor) -> "Prefix":
        """The prefix of only those `prompts` [B] (bool) that are continued."""
        keys, values = ([x[prompts] for x in layers] for layers in (self.keys, self.values))
        return Prefix(
            keys, values, self.mask[prompts], self.next_position[prompts], self.hidden[prompts]
        )

    def put(self, places: Tensor, other: "Prefix") -> None:
        """Put other prompts, the same number and padded to the same length, at `places`
        (indices).
        """
        for old, new in zip((*self.keys, *self.values), (*other.keys, *other.values)):
            old[places] = new
        self.mask, self.next_position, self.hidden = (  # copies: these are views of the prompts
            old.index_copy(0, places, new)
            for old, new in (
                (self.mask, other.mask),
                (self.next_position, other.next_position),
                (self.hidden, other.hidden),
            )
        )


class Policy:
    """A Qwen3-VL, its tokenizer and its image processor."""

    def __init__(
        self,
        model: Qwen3VLForConditionalGeneration,
        tokenizer,
        image_processor,
        *,
        autocast: bool = False,
    ):
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.language_model, self.visual = model.model.language_model, model.model.visual
        self.head = model.lm_head.weight  # [V, d]
        self.autocast, self.activation_checkpointing = autocast, False
        self.sharded = False  # whether ranks hold slices of the decoder layers, see run/shard.py
        self.adapters = None  # the PeftModel around `model`, see lora.py
        self.video = {}  # settings of the checkpoint's video processor, kept for those who use it
        # for split_thinking: answers begin inside <think>
        self.template_opens_think = checkpoints.opens_thinking(tokenizer)
        self.encoder = Encoder(
            tokenizer, image_processor, model.config.image_token_id, self.template_opens_think
        )
        # The patches arrive cut out, so the convolution over them is one matrix product; Conv3d
        # takes five times as long.
        patch = self.visual.patch_embed
        patch.forward = lambda x: F.linear(
            x.to(patch.proj.weight.dtype), patch.proj.weight.flatten(1), patch.proj.bias
        )
        ends = model.generation_config.eos_token_id
        ends = list(ends) if isinstance(ends, list) else [] if ends is None else [ends]
        ends += [self.encoder.end_id] * (self.encoder.end_id not in ends)
        model.generation_config.eos_token_id = ends  # saved so: other programs stop there, too
        self.end_ids = sorted(ends)  # Qwen3-VL has several, all of them end

    @classmethod
    def from_pretrained(
        cls, name_or_dir: str, *, device: str = "cpu", autocast: bool = False, max_pixels: int = 0
    ) -> "Policy":
        """Load a checkpoint folder, or a name on the hub, with fp32 weights; `autocast` computes in
        bfloat16.

        Images are shrunk to at most `max_pixels`; 0 keeps the checkpoint's own limit. It is saved
        with the policy.
        """
        model, tokenizer, image_processor, video = checkpoints.load(
            str(name_or_dir), device, max_pixels
        )
        policy = cls(model, tokenizer, image_processor, autocast=autocast)
        policy.video = video
        return policy

    def save_pretrained(self, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write a checkpoint folder that transformers and vLLM load unchanged; `weights`, by name,
        replace the model's own.
        """
        if self.adapters is not None:
            raise ValueError(
                "a plain checkpoint has no adapters: call merge_adapters first, or only"
                " save_adapters"
            )
        checkpoints.save(
            folder, self.model, self.tokenizer, self.image_processor, self.video, weights
        )

    @property
    def device(self) -> torch.device:
        return self.head.device

    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that are trained: neither frozen nor, with adapters, of the base model."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def to(self, device: str, *, autocast: bool = False) -> "Policy":
        """The same model on `device`, moved, not copied; `autocast` computes in bfloat16."""
        moved = Policy(
            self.model.to(device), self.tokenizer, self.image_processor, autocast=autocast
        )
        moved.adapters, moved.video = self.adapters, self.video
        return moved

    def freeze(self, parts: Sequence[str] = ("vision", "projector", "language")) -> "Policy":
        """Do not train `parts`; a tied head belongs to the language model, the mergers after the
        tower to the projector.
        """
        for name, weight in self.model.named_parameters():
            if part_of(name) in parts:
                weight.requires_grad_(False)
        return self

    def checkpoint_activations(self) -> "Policy":
        """Keep only the input of each layer, and recompute the rest in the backward pass: less
        memory, more time.
        """
        self.activation_checkpointing = True
        for block in self.visual.blocks:
            block.forward = partial(checkpoint, type(block).forward, block, use_reentrant=False)
        return self

    # ---- prompts ---------------------------------------------------------------------------------

    def encode(self, samples: list[Sample]) -> Prompts:
        """B samples as prompts, see `Encoder.encode`, on the policy's device."""
        return self.encoder.encode(samples).to(self.device)

    def encode_turns(self, groups: list[list[Sample]]) -> tuple[Prompts, list[tuple]]:
        """Questions and answers about B images, for supervised training, see
        `Encoder.encode_turns`, on the policy's device."""
        prompts, blocks = self.encoder.encode_turns(groups)
        return prompts.to(self.device), [
            (tokens.to(self.device), mask.to(self.device), samples)
            for tokens, mask, samples in blocks
        ]

    def encode_answers(self, answers: list[str]) -> tuple[Tensor, Tensor]:
        """Answers as tokens [R, T] and mask [R, T], each closed by its end token."""
        tokens, mask = self.encoder.encode_answers(answers)
        return tokens.to(self.device), mask.to(self.device)

    # ---- the passes --------------------------------------------------------------------------

    def prefill(self, prompts: Prompts) -> Prefix:
        """Run images and prompts through the model once: their keys, values and last hidden states,
        with gradient where it is enabled.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # Padding is on the right, so the causal mask already hides it from every real token.
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            )

        with self.precision():
            x, deepstack = self.language_model.embed_tokens(prompts.ids), []
            slots = prompts.ids == self.model.config.image_token_id
            if len(prompts.grids):
                image = self.visual(prompts.pixels, grid_thw=prompts.grids)
                x = x.masked_scatter(slots[..., None], image.pooler_output.to(x.dtype))
                deepstack = image.deepstack_features
            hidden, keys, values = self._layers(x, prompts.positions, attend, slots, deepstack)
        # otherwise each decoding step would copy them
        keys, values = ([x.contiguous() for x in layers] for layers in (keys, values))
        last = prompts.mask.sum(1) - 1
        return Prefix(
            keys, values, prompts.mask, prompts.next_position, hidden[torch.arange(len(last)), last]
        )

    def follow(self, prefix: Prefix, tokens: Tensor) -> Tensor:
        """Hidden states [R, n, d] of answers [R, n] after their prompts, all tokens at once, with
        gradient where enabled.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = (
                torch.cat([shared.repeat_interleave(group, 0), own], dim=2)
                for shared, own in ((prefix.keys[layer], k), (prefix.values[layer], v))
            )
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, enable_gqa=q.shape[1] != k.shape[1]
            )

        group = len(tokens) // len(prefix.mask)
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        # What an answer token may attend to: its prompt, without padding, and its own answer up to
        # itself. One mask for all rows if no prompt is padded: for answers of 4,096 tokens it is 64
        # MB, and otherwise R times that.
        prompt = prefix.mask[:1] if prefix.mask.all() else prefix.mask.repeat_interleave(group, 0)
        prompt = prompt[:, None].expand(-1, len(steps), -1)  # (1 or R, n, P)
        causal = (steps <= steps[:, None]).expand(len(prompt), -1, -1)  # (1 or R, n, n)
        bias = bias_of(torch.cat([prompt, causal], dim=2), prefix)
        return self._answers(prefix, tokens, steps.expand(len(tokens), -1), attend)

    def decode(
        self, prefix: Prefix, tokens: Tensor, length: Tensor, cache: "AnswerCache"
    ) -> Tensor:
        """Hidden states [R, d] of one more token of each answer [R], preceded by `length` [R]
        others; adds it to the cache.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return shared_prefix_attention(
                q, *cache.append(layer, k, v), prefix.keys[layer], prefix.values[layer], bias
            )

        prompt = prefix.mask.repeat_interleave(len(tokens) // len(prefix.mask), 0)  # (R, P)
        # Older columns belong to an earlier answer in this row.
        own = cache.ages(tokens.device) <= length[:, None]  # (R, S)
        bias = bias_of(torch.cat([prompt, own], dim=1)[:, None], prefix)
        hidden = self._answers(prefix, tokens[:, None], length[:, None], attend)[:, 0]
        cache.written += 1
        return hidden

    def decoding_bytes(self) -> int:
        """Bytes of the weights that a decoding step reads, however many rows it has."""
        return sum(p.nbytes for p in self.language_model.layers.parameters()) + self.head.nbytes

    def _answers(self, prefix: Prefix, tokens: Tensor, steps: Tensor, attend: Callable) -> Tensor:
        group = len(tokens) // len(prefix.mask)
        # The same on all three axes.
        positions = prefix.next_position.repeat_interleave(group)[:, None] + steps  # (R, n)
        with self.precision():
            # Answers are plain tokens, even where the policy sampled an <|image_pad|>, which has no
            # image.
            return self._layers(
                self.language_model.embed_tokens(tokens), positions.expand(3, -1, -1), attend
            )[0]

    def score(
        self,
        prompts: Prompts | Prefix,
        tokens: Tensor,
        mask: Tensor,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """fp32 log-probs [R, T] of answers under the policy, 0 where masked (and the entropy [R, T]
        on request).

        tokens, mask [R, T]; row r answers prompt r // G, G = R / B. One pass over each prompt
        serves its whole group, so its backward pass also runs once; `prefill` can make it
        beforehand, for several calls.
        """
        prefix = prompts if isinstance(prompts, Prefix) else self.prefill(prompts)
        group, remainder = divmod(len(tokens), len(prefix.mask))
        if remainder or tokens.shape != mask.shape:
            raise ValueError(
                f"score needs tokens and mask [R, T] with R a multiple of the {len(prefix.mask)}"
                f" prompts, got {tuple(tokens.shape)} and {tuple(mask.shape)}"
            )
        hidden = prefix.hidden.repeat_interleave(group, 0)[:, None]  # predicts the first token
        mask = mask.bool()
        # part of a batch is padded to the whole's longest
        longest = int(mask.any(0).nonzero().max()) + 1 if mask.any() else 1
        # sharded layers need the same passes on every rank, whatever its answers
        if longest > 1 or self.sharded:
            followed = self.follow(prefix, tokens[:, : max(1, longest - 1)])
            hidden = torch.cat([hidden, followed], dim=1)[:, :longest]  # (R, longest, d)
        within = mask[:, :longest]
        # Only answer tokens are projected onto the vocabulary, and not in bf16, as in the sampler.
        values = linear_logprob(
            hidden[within], self.head, tokens[mask], temperature=temperature, entropy=entropy
        )
        empty = torch.zeros(mask.shape, device=mask.device)
        outs = [empty.masked_scatter(mask, x) for x in (values if entropy else (values,))]
        return tuple(outs) if entropy else outs[0]

    def _layers(
        self,
        x: Tensor,
        positions: Tensor,
        attend: Callable,
        slots: Tensor | None = None,
        deepstack: list[Tensor] = (),
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The decoder: x [N, S, d], positions [3, N, S] -> hidden states [N, S, d], and the keys
        and values of each layer.

        `attend` computes the attention; `deepstack` has features of early vision layers, which are
        added at the image `slots` [N, S].
        """
        # (N, S, 1, D)
        cos, sin = (part[:, :, None] for part in self.language_model.rotary_emb(x, positions))
        first, second = sin.chunk(2, dim=-1)
        sin = torch.cat([-first, second], dim=-1)  # the sign of `rotate`

        def block(number: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            layer = self.language_model.layers[number]
            attention, y = layer.self_attn, layer.input_layernorm(x)
            heads = (*y.shape[:2], -1, attention.head_dim)
            v = attention.v_proj(y).view(heads).transpose(1, 2)  # (N, K, S, D)
            # In bf16 the norms and the rotation give fp32, which the cache need not keep: attention
            # takes bf16.
            q = rotate(attention.q_norm(attention.q_proj(y).view(heads)), cos, sin)
            k = rotate(attention.k_norm(attention.k_proj(y).view(heads)), cos, sin)
            q, k = (z.transpose(1, 2).to(v.dtype) for z in (q, k))  # (N, H, S, D), (N, K, S, D)
            x = x + attention.o_proj(attend(number, q, k, v).transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            if number < len(deepstack):
                x = x.masked_scatter(slots[..., None], x[slots] + deepstack[number].to(x.dtype))
            return x, k, v

        keys, values = [], []
        graded, work = torch.is_grad_enabled(), block
        if self.activation_checkpointing and graded:
            work = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
        for number, layer in enumerate(self.language_model.layers):
            # A sharded layer gathers its weights around its own call; without gradient they are all
            # there already.
            x, k, v = layer(work, number, x) if self.sharded and graded else work(number, x)
            keys.append(k)
            values.append(v)
        return self.language_model.norm(x), keys, values

    def precision(self):
        """The context of every pass: bf16 for matrix products with `autocast`, else nothing."""
        # A weight is used once a pass, so a cache of bf16 copies saves nothing, and would keep
        # those of layers that are freed.
        return (
            torch.autocast(self.device.type, torch.bfloat16, cache_enabled=not self.sharded)
            if self.autocast
            else nullcontext()
        )


class AnswerCache:
    """Keys and values of the answers that are being decoded: a ring buffer of `size` columns, one
    [R, K, size, D] per layer.

    Every step writes one column for all rows. A row reused for a new answer sees the columns
    written since then.
    """

    def __init__(self, size: int):
        self.size, self.written, self.layers = size, 0, {}

    def ages(self, device: torch.device) -> Tensor:
        """How many steps ago each column in use was written, [S]; 0 for the one of this step."""
        return (
            self.written - torch.arange(min(self.written + 1, self.size), device=device)
        ) % self.size

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """This step's k and v [R, K, 1, D] -> all columns in use, [R, K, S, D] each."""
        if layer not in self.layers:
            room = (*k.shape[:2], self.size, k.shape[3])
            self.layers[layer] = k.new_empty(room), v.new_empty(room)
        for store, new in zip(self.layers[layer], (k, v)):
            store[:, :, self.written % self.size] = new[:, :, 0]
        return tuple(store[:, :, : self.written + 1] for store in self.layers[layer])

    @property
    def nbytes(self) -> int:
        """Of the columns in use."""
        return sum(
            store[:, :, : self.written].nbytes
            for stores in self.layers.values()
            for store in stores
        )

    def select(self, rows: Tensor) -> None:
        """Keep the answers `rows` (indices, or a bool for each)."""
        self.layers = {
            layer: tuple(store[rows] for store in stores) for layer, stores in self.layers.items()
        }


def bias_of(seen: Tensor, prefix: Prefix) -> Tensor:
    """What is added to attention scores: 0 where a token may attend, -inf elsewhere; seen [R, n,
    P + S] bool -> [R, 1, n, P + S].
    """
    return torch.zeros_like(seen, dtype=prefix.hidden.dtype).masked_fill_(~seen, -torch.inf)[
        :, None
    ]


def shared_prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, bias: Tensor
) -> Tensor:
    """Attention of one token of each answer to [its group's prompt, its own answer], exact.

    The queries of a group meet one copy of the prompt's keys, in one matrix product.
    q [R, H, 1, D], k and v [R, K, S, D], prefix_k and prefix_v [B, K, P, D], bias [R, 1, 1, P + S]
    with -inf on what a token may not see -> [R, H, 1, D].
    """
    (rows, heads, _, width), (prompts, key_heads, length) = q.shape, prefix_k.shape[:3]
    group, share = rows // prompts, heads // key_heads
    q = q.reshape(prompts, group, key_heads, share, width) * width**-0.5
    scores = q.new_empty(prompts, key_heads, group, share, length + k.shape[2])
    scores[..., :length] = (
        q.transpose(1, 2).reshape(prompts, key_heads, -1, width) @ prefix_k.mT
    ).view(*scores.shape[:4], length)
    scores[..., length:] = (q @ k.view(prompts, group, key_heads, -1, width).mT).transpose(1, 2)
    weight = scores.add_(bias.view(prompts, 1, group, 1, -1)).softmax(-1)
    on_prompt = (weight[..., :length].flatten(2, 3) @ prefix_v).view(
        prompts, key_heads, group, share, width
    )
    on_self = weight[..., length:].transpose(1, 2) @ v.view(prompts, group, key_heads, -1, width)
    return (on_prompt.transpose(1, 2) + on_self).reshape(rows, heads, 1, width)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (RoFormer 2104.09864), with the two halves of a head as the pairs.

    x [N, S, heads, D], cos and sin [N, S, 1, D]; the first half of sin is negative.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def part_of(name: str) -> str:
    """Whether a parameter of Qwen3-VL belongs to `vision`, `projector` or `language`."""
    if ".visual." not in name:
        return "language"
    return "projector" if ".merger." in name or ".deepstack_merger_list." in name else "vision"
