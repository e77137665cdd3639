"""A Qwen3-VL as a policy: one pass over each prompt, shared by the group of answers that follows
it.

The weights stay in a plain `Qwen3VLForConditionalGeneration`; the pass through its layers is
written out here, because the point of the whole project is in the attention: a group's answers read
the keys and values of one pass over their prompt.

Shapes: B prompts, G answers each, R = B G rows, P prompt tokens (padded on the right), T answer
    tokens, d width,
H query heads, K key heads, D head width.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3VLForConditionalGeneration

from minigrpo import checkpoint as checkpoints
from minigrpo.checks import END
from minigrpo.data import Sample
from minigrpo.data.sample import load_film
from minigrpo.logprob import linear_logprob


@dataclass
class Prompts:
    """B encoded prompts, padded on the right."""

    ids: Tensor  # [B, P]
    mask: Tensor  # [B, P] bool, False on padding
    positions: Tensor  # [3, B, P] M-RoPE positions: time, height, width
    next_position: Tensor  # [B] the position of the first answer token, on all three axes
    patches: Tensor  # [patches of all images, channels * 16 * 16] uint8, an eighth of `pixels`
    # [channels, 2, 256] what the model sees of each level of grey, at both of a patch's moments
    grey_table: Tensor
    grids: Tensor  # [images, 3] patches of each image along time, height, width
    images: Tensor  # [B] images of each prompt
    # [B] place in the batch that was encoded, which names the random streams of its answers in
    # `generate`
    stream_id: Tensor

    @property
    def pixels(self) -> Tensor:
        """[patches of all images, channels * 2 * 16 * 16] fp32, as the vision tower takes them:
        made when they are needed.
        """
        made = self.grey_table.new_empty(len(self.patches), *self.grey_table.shape)
        # (patches, 256)
        for channel, grey in enumerate(
            self.patches.unflatten(1, (len(self.grey_table), -1)).unbind(1)
        ):
            # by channel, and not by an int64 for every pixel
            seen = self.grey_table[channel].index_select(1, grey.flatten().int())
            made[:, channel] = seen.unflatten(1, grey.shape).transpose(0, 1)
        return made.flatten(1)

    def to(self, device: torch.device) -> "Prompts":
        """A copy on `device`."""
        return Prompts(*(getattr(self, field.name).to(device) for field in fields(self)))

    def numbered(self, places: list[int]) -> "Prompts":
        """The same prompts with these places as their numbers: part of a larger batch gives the
        answers that the whole would.
        """
        return replace(self, stream_id=torch.tensor(places, device=self.ids.device))

    def select(self, rows: slice | Tensor, *, trim: bool = True) -> "Prompts":
        """The prompts `rows` (a slice, or indices in any order) with their own images; `trim` drops
        what is padding for all.
        """
        chosen = torch.arange(len(self.ids), device=self.ids.device)[rows]
        images = spans(self.images, chosen)
        patches = spans(self.grids.prod(1), images)
        mask = self.mask[chosen]
        width = int(mask.sum(1).max()) if trim else mask.shape[1]
        return Prompts(
            self.ids[chosen, :width],
            mask[:, :width],
            self.positions[:, chosen, :width],
            self.next_position[chosen],
            self.patches[patches],
            self.grey_table,
            self.grids[images],
            self.images[chosen],
            self.stream_id[chosen],
        )


@dataclass
class Images:
    """The images of B samples, cut into patches."""

    patches: Tensor  # [patches of all images, channels * 16 * 16] uint8
    grids: Tensor  # [images, 3]
    # for each sample, the <|image_pad|> tokens that each of its images takes
    slots: list[list[int]]


@dataclass
class Prefix:
    """What a group shares: its prompt's keys and values in every layer, and where its answers
    start.
    """

    keys: list[Tensor]  # one [B, K, P, D] a layer
    values: list[Tensor]  # one [B, K, P, D] a layer
    mask: Tensor  # [B, P] bool
    next_position: Tensor  # [B]
    hidden: Tensor  # [B, d] last hidden state of the prompt, which predicts the first answer token

    @property
    def nbytes(self) -> int:
        """Of keys and values, which is what each decoding step reads of it."""
        return sum(x.nbytes for x in (*self.keys, *self.values))

    def select(self, prompts: Tensor) -> "Prefix":
        """What remains when only some `prompts` [B] (bool) are followed further."""
        keys, values = ([x[prompts] for x in layers] for layers in (self.keys, self.values))
        return Prefix(
            keys, values, self.mask[prompts], self.next_position[prompts], self.hidden[prompts]
        )

    def put(self, places: Tensor, fresh: "Prefix") -> None:
        """Other prompts, as many and of the same padded length, at `places` (indices)."""
        for old, new in zip((*self.keys, *self.values), (*fresh.keys, *fresh.values)):
            old[places] = new
        self.mask, self.next_position, self.hidden = (  # copies: these are views of the prompts
            old.index_copy(0, places, new)
            for old, new in (
                (self.mask, fresh.mask),
                (self.next_position, fresh.next_position),
                (self.hidden, fresh.hidden),
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
        # The patches arrive cut out, so the convolution over them is one matrix product; Conv3d
        # takes five times as long.
        patch = self.visual.patch_embed
        patch.forward = lambda x: F.linear(
            x.to(patch.proj.weight.dtype), patch.proj.weight.flatten(1), patch.proj.bias
        )
        self.end_id = tokenizer.convert_tokens_to_ids(END)  # the one that we teach
        ends = model.generation_config.eos_token_id
        ends = list(ends) if isinstance(ends, list) else [] if ends is None else [ends]
        ends += [self.end_id] * (self.end_id not in ends)
        model.generation_config.eos_token_id = ends  # saved so: other programs stop there, too
        self.end_ids = sorted(ends)  # Qwen3-VL has several, all of them end
        # what the model sees of each level of grey
        self.grey_table = grey_table_of(image_processor)
        self.vision_end_id = tokenizer.convert_tokens_to_ids("<|vision_end|>")

    @classmethod
    def from_pretrained(
        cls, name_or_dir: str, *, device: str = "cpu", autocast: bool = False, max_pixels: int = 0
    ) -> "Policy":
        """Load a checkpoint folder, or a name on the hub, with fp32 weights; `autocast` computes in
        bfloat16.

        Images are shrunk to at most `max_pixels`; 0 leaves the checkpoint's own budget. It is saved
        with the policy.
        """
        model, tokenizer, image_processor, video = checkpoints.load(
            str(name_or_dir), device, max_pixels
        )
        policy = cls(model, tokenizer, image_processor, autocast=autocast)
        policy.video = video
        return policy

    def save_pretrained(self, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write a checkpoint folder that transformers and vLLM load unchanged; `weights` in place
        of the model's own, by name.
        """
        if self.adapters is not None:
            raise ValueError(
                "adapters are no part of a plain checkpoint: merge_adapters first, or save_adapters"
                " alone"
            )
        checkpoints.save(
            folder, self.model, self.tokenizer, self.image_processor, self.video, weights
        )

    @property
    def device(self) -> torch.device:
        return self.head.device

    def parameters(self) -> list[torch.nn.Parameter]:
        """Those that are trained: neither frozen nor, with adapters, of the base model."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def to(self, device: str, *, autocast: bool = False) -> "Policy":
        """The same model on `device`, moved and not copied; `autocast` computes in bfloat16."""
        moved = Policy(
            self.model.to(device), self.tokenizer, self.image_processor, autocast=autocast
        )
        moved.adapters, moved.video = self.adapters, self.video
        return moved

    def freeze(self, parts: Sequence[str] = ("vision", "projector", "language")) -> "Policy":
        """Keep `parts` as they are; a tied head is part of the language model, the mergers behind
        the tower the projector.
        """
        for name, weight in self.model.named_parameters():
            if part_of(name) in parts:
                weight.requires_grad_(False)
        return self

    def checkpoint_activations(self) -> "Policy":
        """Keep the input of each layer alone for the backward pass, which computes the rest anew:
        less memory, more time.
        """
        self.activation_checkpointing = True
        for block in self.visual.blocks:
            block.forward = partial(checkpoint, type(block).forward, block, use_reentrant=False)
        return self

    # ---- prompts ---------------------------------------------------------------------------------

    def encode(self, samples: list[Sample]) -> Prompts:
        """B samples as prompts: chat template, image slots, pixels and M-RoPE positions. Images
        come before the question, and the prompt ends where the assistant's answer begins.
        """
        images = self._images(samples)
        return self._prompts(
            [self._chat(sample.question, slots) for sample, slots in zip(samples, images.slots)],
            images,
        )

    def encode_turns(self, groups: list[list[Sample]]) -> tuple[Prompts, list[tuple]]:
        """Questions and answers about B images, for supervised training: prompts, and blocks of
        (tokens [B, T], mask [B, T], the B samples).

        The samples of a group share their image, so the prompt ends behind it; a row is one
        question with its answer, or a whole conversation, and the mask covers each answer and its
        end token. A block holds one row of every group, the longest first, since it is padded to
        its longest; where a group has run out, the row is empty (sample None). Every block follows
        the same prompts.
        """
        for group in groups:
            if any(sample.images != group[0].images for sample in group):
                raise ValueError(
                    f"samples of one group must share their image: {', '.join(s.id for s in group)}"
                )
        images, prompts, turns = self._images([group[0] for group in groups]), [], []
        for group, slots in zip(groups, images.slots):
            talks = [sample.turns or [[sample.question, sample.answer]] for sample in group]
            chats = [self._chat(talk[0][0], slots) for talk in talks]
            cut = (
                len(chats[0]) - chats[0][::-1].index(self.vision_end_id) if slots else len(chats[0])
            )
            prompts.append(chats[0][:cut])
            rows = [self._talk(chat[cut:], talk) for chat, talk in zip(chats, talks)]
            turns.append(
                sorted(
                    ((*row, sample) for row, sample in zip(rows, group)),
                    key=lambda turn: -len(turn[0]),
                )
            )
        blocks = []
        for number in range(max(map(len, turns))):
            chosen = [group[number] if number < len(group) else ([], [], None) for group in turns]
            tokens, _ = pad_right([row for row, _, _ in chosen], self.tokenizer.pad_token_id)
            mask, _ = pad_right([answered for _, answered, _ in chosen], 0)
            blocks.append(
                (
                    tokens.to(self.device),
                    mask.bool().to(self.device),
                    [sample for *_, sample in chosen],
                )
            )
        return self._prompts(prompts, images), blocks

    def _images(self, samples: list[Sample]) -> "Images":
        cut = [
            self._patches(load_film(sample, path)) for sample in samples for path in sample.images
        ]
        patches = (
            torch.cat([patches for patches, _ in cut])
            if cut
            else torch.zeros(0, self.grey_table[:, 0].numel(), dtype=torch.uint8)
        )
        grids = torch.cat([grid for _, grid in cut]) if cut else torch.zeros(0, 3, dtype=torch.long)
        slots = iter((grids.prod(1) // self.image_processor.merge_size**2).tolist())
        return Images(patches, grids, [[next(slots) for _ in sample.images] for sample in samples])

    def _patches(self, image) -> tuple[Tensor, Tensor]:
        """An image as uint8 patches [n, channels * 16 * 16] and its grid [1, 3]: resized, but not
        yet scaled to what the model sees.
        """
        cut = self.image_processor(
            images=[image], do_rescale=False, do_normalize=False, return_tensors="pt"
        )
        # a still image: the same at both moments
        patches = cut["pixel_values"].view(-1, *self.grey_table.shape)
        return patches[:, :, 0].flatten(1).to(torch.uint8), cut["image_grid_thw"]

    def _talk(self, question: list[int], turns: list[list[str]]) -> tuple[list[int], list[int]]:
        """The tokens of a row and 1 on those of its answers and end tokens. `question` is what the
        prompt holds of the first turn; later questions are written by the chat template, which sees
        all that was said before them.
        """
        tokens, mask = list(question), [0] * len(question)
        end, messages = self.tokenizer.convert_ids_to_tokens(self.end_id), []
        for number, (asked, answer) in enumerate(turns):
            messages.append({"role": "user", "content": asked})
            if number:
                text = self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
                # of the answer before: Thinking's template rewrites older answers
                last = text.rindex(end, 0, text.rindex(end))
                between = self._tokens([text[last + len(end) :]])[0]  # "\n", and the next question
                tokens, mask = tokens + between, mask + [0] * len(between)
            messages.append({"role": "assistant", "content": answer})
            said = self._tokens([inside_thinking(answer) if self.template_opens_think else answer])[
                0
            ] + [self.end_id]
            tokens, mask = tokens + said, mask + [1] * len(said)
        return tokens, mask

    def _chat(self, question: str, slots: list[int]) -> list[int]:
        content = [{"type": "image"} for _ in slots] + [{"type": "text", "text": question}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        # The template writes one <|image_pad|> an image; each needs one for every merged patch.
        head, *tails = text.split("<|image_pad|>", len(slots))
        text = head + "".join("<|image_pad|>" * n + tail for n, tail in zip(slots, tails))
        return self._tokens([text])[0]

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def _prompts(self, rows: list[list[int]], images: "Images") -> Prompts:
        ids, mask = pad_right(rows, self.tokenizer.pad_token_id)
        positions, next_position = mrope_positions(
            ids,
            mask,
            images.grids,
            self.model.config.image_token_id,
            self.image_processor.merge_size,
        )
        counts = torch.tensor([len(slots) for slots in images.slots])
        return Prompts(
            ids,
            mask,
            positions,
            next_position,
            images.patches,
            self.grey_table,
            images.grids,
            counts,
            torch.arange(len(rows)),
        ).to(self.device)

    def encode_answers(self, answers: list[str]) -> tuple[Tensor, Tensor]:
        """Answers as tokens [R, T] and mask [R, T], each closed by its end token."""
        rows = [ids + [self.end_id] for ids in self._tokens(answers)]
        tokens, mask = pad_right(rows, self.tokenizer.pad_token_id)
        return tokens.to(self.device), mask.to(self.device)

    # ---- the two passes --------------------------------------------------------------------------

    def prefill(self, prompts: Prompts) -> Prefix:
        """Images and prompts once: their keys, values and last hidden states, with gradient where
        it is enabled.
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
                seen = self.visual(prompts.pixels, grid_thw=prompts.grids)
                x = x.masked_scatter(slots[..., None], seen.pooler_output.to(x.dtype))
                deepstack = seen.deepstack_features
            hidden, keys, values = self._layers(x, prompts.positions, attend, slots, deepstack)
        # or each decoding step would copy them
        keys, values = ([x.contiguous() for x in layers] for layers in (keys, values))
        last = prompts.mask.sum(1) - 1
        return Prefix(
            keys, values, prompts.mask, prompts.next_position, hidden[torch.arange(len(last)), last]
        )

    def follow(self, prefix: Prefix, tokens: Tensor) -> Tensor:
        """Hidden states [R, n, d] of answers [R, n] behind their prompts, all tokens at once, with
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

        group, steps = (
            len(tokens) // len(prefix.mask),
            torch.arange(tokens.shape[1], device=tokens.device),
        )
        # What an answer token may see: its prompt, without padding, and its own answer up to
        # itself. One table for all rows where no prompt is padded: for 4,096 tokens of answer it is
        # 64 MB, and R times that otherwise.
        # (1 or R, P)
        prompt = prefix.mask[:1] if prefix.mask.all() else prefix.mask.repeat_interleave(group, 0)
        causal = (steps <= steps[:, None]).expand(len(prompt), -1, -1)  # (1 or R, n, n)
        bias = bias_of(
            torch.cat([prompt[:, None].expand(-1, len(steps), -1), causal], dim=2), prefix
        )
        return self._answers(prefix, tokens, steps.expand(len(tokens), -1), attend)

    def decode(
        self, prefix: Prefix, tokens: Tensor, length: Tensor, cache: "AnswerCache"
    ) -> Tensor:
        """Hidden states [R, d] of one more token of each answer [R], of which `length` [R] precede
        it; adds them to the cache.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return shared_prefix_attention(
                q, *cache.append(layer, k, v), prefix.keys[layer], prefix.values[layer], bias
            )

        # (R, S): other columns are of an answer that had this row before
        own = cache.ages(tokens.device) <= length[:, None]
        bias = bias_of(
            torch.cat(
                [prefix.mask.repeat_interleave(len(tokens) // len(prefix.mask), 0), own], dim=1
            )[:, None],
            prefix,
        )
        hidden = self._answers(prefix, tokens[:, None], length[:, None], attend)[:, 0]
        cache.written += 1
        return hidden

    def decoding_bytes(self) -> int:
        """Weights that a decoding step reads, however many rows it has."""
        return sum(p.nbytes for p in self.language_model.layers.parameters()) + self.head.nbytes

    def _answers(self, prefix: Prefix, tokens: Tensor, steps: Tensor, attend: Callable) -> Tensor:
        # (R, n), on all axes
        positions = (
            prefix.next_position.repeat_interleave(len(tokens) // len(prefix.mask))[:, None] + steps
        )
        with self.precision():
            # Answers are plain tokens, also where the policy sampled an <|image_pad|>: no image
            # belongs to it.
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
        serves its whole group, so its backward pass runs once as well; it can be made beforehand
        with `prefill`, to serve several calls.
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
        # sharded layers want the same passes on every rank, whatever its answers
        if longest > 1 or self.sharded:
            followed = self.follow(prefix, tokens[:, : max(1, longest - 1)])
            hidden = torch.cat([hidden, followed], dim=1)[:, :longest]  # (R, longest, d)
        within = mask[:, :longest]
        # Only answer tokens are projected onto the vocabulary, and not in bf16: the sampler doesn't
        # either.
        found = linear_logprob(
            hidden[within], self.head, tokens[mask], temperature=temperature, entropy=entropy
        )
        empty = torch.zeros(mask.shape, device=mask.device)
        outs = [empty.masked_scatter(mask, x) for x in (found if entropy else (found,))]
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

        `attend` does the attention; `deepstack` holds features of early vision layers, which join
        at the image `slots` [N, S].
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
            # (N, H, S, D)
            q = (
                rotate(attention.q_norm(attention.q_proj(y).view(heads)), cos, sin)
                .transpose(1, 2)
                .to(v.dtype)
            )
            # (N, K, S, D)
            k = (
                rotate(attention.k_norm(attention.k_proj(y).view(heads)), cos, sin)
                .transpose(1, 2)
                .to(v.dtype)
            )
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
        # those of layers that are let go.
        return (
            torch.autocast(self.device.type, torch.bfloat16, cache_enabled=not self.sharded)
            if self.autocast
            else nullcontext()
        )


class AnswerCache:
    """Keys and values of the answers that are being decoded: a ring of `size` columns, one [R, K,
    size, D] a layer.

    Every step writes one column for all rows. A row that a new answer has taken over sees the
    columns written since then.
    """

    def __init__(self, size: int):
        self.size, self.written, self.layers = size, 0, {}

    def ages(self, device: torch.device) -> Tensor:
        """How many steps ago each column in use was written, [S]; 0 for the one of this step."""
        return (
            self.written - torch.arange(min(self.written + 1, self.size), device=device)
        ) % self.size

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """This step's k and v [R, K, 1, D] -> all that is in use, [R, K, S, D] each."""
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
    """What is added to scores: 0 where a token may look, -inf elsewhere; seen [R, n, P + S] bool ->
    [R, 1, n, P + S].
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


def mrope_positions(
    ids: Tensor, mask: Tensor, grids: Tensor, image_id: int, merge: int
) -> tuple[Tensor, Tensor]:
    """M-RoPE positions [3, B, P] and the next free position [B] (Qwen2-VL, 2409.12191, section
    2.1).

    Text counts up by one on all three axes. An image starts where the text left off, spreads over
    height and width at one moment, and the text resumes after its longer side. ids, mask [B, P];
    grids [images, 3] in prompt order.
    """
    positions, next_position = torch.zeros(3, *ids.shape, dtype=torch.long), []
    grid = iter(grids.tolist())
    for row, length in enumerate(mask.sum(1).tolist()):
        is_image, column, position = (ids[row, :length] == image_id).tolist(), 0, 0
        while column < length:
            if is_image[column]:
                _, height, width = (side // merge for side in next(grid))
                end = column + height * width
                y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
                positions[0, row, column:end] = position
                positions[1, row, column:end], positions[2, row, column:end] = (
                    position + y.flatten(),
                    position + x.flatten(),
                )
                position += max(height, width)
            else:
                end = next((c for c in range(column, length) if is_image[c]), length)
                positions[:, row, column:end] = position + torch.arange(end - column)
                position += end - column
            column = end
        next_position.append(position)
    return positions, torch.tensor(next_position)


def inside_thinking(answer: str) -> str:
    """What follows a <think> that the chat template has already written, with its line break; a
    plain answer closes it at once.
    """
    return (
        answer.removeprefix("<think>").removeprefix("\n")
        if answer.startswith("<think>")
        else f"\n</think>\n\n{answer}"
    )


def grey_table_of(image_processor) -> Tensor:
    """[channels, 2, 256] what the processor makes of each level of grey, asked of itself: a patch
    of 16 x 16 holds all in order.
    """
    side, size = image_processor.patch_size, image_processor.merge_size
    grey = torch.arange(side * side, dtype=torch.uint8).view(side, side).tile(size, size)
    seen = image_processor(
        images=[grey[..., None].expand(-1, -1, 3).numpy()], do_resize=False, return_tensors="pt"
    )["pixel_values"]
    return seen[0].view(3, image_processor.temporal_patch_size, -1)


def spans(counts: Tensor, chosen: Tensor) -> Tensor:
    """Where the items of the `chosen` owners lie, when owner i has counts[i] items and all lie one
    after the other.
    """
    ends, chosen = counts.cumsum(0).tolist(), chosen.tolist()
    found = [torch.arange(ends[i - 1] if i else 0, ends[i]) for i in chosen]
    return (torch.cat(found) if found else torch.zeros(0, dtype=torch.long)).to(counts.device)


def part_of(name: str) -> str:
    """Whether a parameter of Qwen3-VL belongs to `vision`, `projector` or `language`."""
    if ".visual." not in name:
        return "language"
    return "projector" if ".merger." in name or ".deepstack_merger_list." in name else "vision"


def pad_right(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token lists -> ids [N, longest] and mask [N, longest] (True on tokens, whatever their id)."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    ids = torch.full(mask.shape, pad).masked_scatter(
        mask, torch.tensor([i for row in rows for i in row])
    )
    return ids, mask
