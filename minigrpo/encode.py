"""From samples to model inputs: chat template, tokens, image slots, patches, M-RoPE positions.

All of it runs on the CPU and needs no weights. The image itself is encoded on the model's device,
in `Policy.prefill`.

Shapes: B prompts, P prompt tokens (padded on the right), R answers, T answer tokens.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from minigrpo.checks import END
from minigrpo.data import Sample
from minigrpo.data.sample import load_film


@dataclass
class Prompts:
    """B encoded prompts, padded on the right."""

    ids: Tensor  # [B, P]
    mask: Tensor  # [B, P] bool, False on padding
    positions: Tensor  # [3, B, P] M-RoPE positions: time, height, width
    next_position: Tensor  # [B] the position of the first answer token, on all three axes
    patches: Tensor  # [patches of all images, channels * 16 * 16] uint8, an eighth of `pixels`
    grey_table: Tensor  # [channels, 2, 256] input of the model for each grey, see `grey_table_of`
    grids: Tensor  # [images, 3] patches of each image along time, height, width
    images: Tensor  # [B] images of each prompt
    stream_id: Tensor  # [B] names the random streams of its answers: its place in the batch

    @property
    def pixels(self) -> Tensor:
        """[patches of all images, channels * 2 * 16 * 16] fp32, as the vision tower takes them;
        computed on demand.
        """
        pixels = self.grey_table.new_empty(len(self.patches), *self.grey_table.shape)
        greys = self.patches.unflatten(1, (len(self.grey_table), -1))  # (patches, channels, 256)
        # Channel by channel: one index for all would take an int64 for every pixel.
        for channel, grey in enumerate(greys.unbind(1)):
            values = self.grey_table[channel].index_select(1, grey.flatten().int())
            pixels[:, channel] = values.unflatten(1, grey.shape).transpose(0, 1)
        return pixels.flatten(1)

    def to(self, device: torch.device) -> "Prompts":
        """A copy on `device`."""
        return Prompts(*(getattr(self, field.name).to(device) for field in fields(self)))

    def numbered(self, places: list[int]) -> "Prompts":
        """The same prompts with these places as their numbers: part of a larger batch then gets the
        same answers as in the whole.
        """
        return replace(self, stream_id=torch.tensor(places, device=self.ids.device))

    def select(self, rows: slice | Tensor, *, trim: bool = True) -> "Prompts":
        """The prompts `rows` (a slice, or indices in any order) with their own images; `trim` drops
        columns that are padding in all.
        """
        rows = torch.arange(len(self.ids), device=self.ids.device)[rows]
        images = spans(self.images, rows)
        patches = spans(self.grids.prod(1), images)
        mask = self.mask[rows]
        width = int(mask.sum(1).max()) if trim else mask.shape[1]
        return Prompts(
            self.ids[rows, :width],
            mask[:, :width],
            self.positions[:, rows, :width],
            self.next_position[rows],
            self.patches[patches],
            self.grey_table,
            self.grids[images],
            self.images[rows],
            self.stream_id[rows],
        )


@dataclass
class Images:
    """The images of B samples, cut into patches."""

    patches: Tensor  # [patches of all images, channels * 16 * 16] uint8
    grids: Tensor  # [images, 3]
    slots: list[list[int]]  # of each sample, the <|image_pad|> tokens of each of its images


class Encoder:
    """A tokenizer with its chat template and an image processor. `image_id` is the token that
    represents a patch of an image.
    """

    def __init__(self, tokenizer, image_processor, image_id: int, template_opens_think: bool):
        self.tokenizer, self.image_processor, self.image_id = tokenizer, image_processor, image_id
        self.template_opens_think = template_opens_think
        self.end_id = tokenizer.convert_tokens_to_ids(END)  # the one that answers are taught
        self.vision_end_id = tokenizer.convert_tokens_to_ids("<|vision_end|>")
        self.grey_table = grey_table_of(image_processor)

    def encode(self, samples: list[Sample]) -> Prompts:
        """B samples as prompts: chat template, image slots, pixels and M-RoPE positions. Images
        come before the question, and the prompt ends where the assistant's answer begins.
        """
        images = self.images(samples)
        chats = [self._chat(sample.question, slots) for sample, slots in zip(samples, images.slots)]
        return self._prompts(chats, images)

    def encode_turns(self, groups: list[list[Sample]]) -> tuple[Prompts, list[tuple]]:
        """Questions and answers about B images, for supervised training: prompts, and blocks of
        (tokens [B, T], mask [B, T], the B samples).

        The samples of a group share their image, so the prompt ends after it; a row is one question
        with its answer, or a whole conversation, and the mask covers each answer and its end token.
        A block has one row of every group, the longest first, since it is padded to its longest
        row; once a group has no more, its row is empty (sample None). All blocks follow the same
        prompts.
        """
        for group in groups:
            if any(sample.images != group[0].images for sample in group):
                raise ValueError(
                    f"samples of one group must share their image: {', '.join(s.id for s in group)}"
                )
        images, prompts = self.images([group[0] for group in groups]), []
        turns: list[list[tuple[list[int], list[int], Sample | None]]] = []
        for group, slots in zip(groups, images.slots):
            talks = [sample.turns or [[sample.question, sample.answer]] for sample in group]
            chats = [self._chat(talk[0][0], slots) for talk in talks]
            first, shared = chats[0], len(chats[0])
            if slots:  # up to the last image
                shared -= first[::-1].index(self.vision_end_id)
            prompts.append(first[:shared])
            rows = [
                (*self._talk(chat[shared:], talk), sample)
                for chat, talk, sample in zip(chats, talks, group)
            ]
            turns.append(sorted(rows, key=lambda row: -len(row[0])))
        blocks = []
        for number in range(max(map(len, turns))):
            block = [group[number] if number < len(group) else ([], [], None) for group in turns]
            tokens, _ = pad_right([ids for ids, _, _ in block], self.tokenizer.pad_token_id)
            mask, _ = pad_right([answered for _, answered, _ in block], 0)
            blocks.append((tokens, mask.bool(), [sample for *_, sample in block]))
        return self._prompts(prompts, images), blocks

    def images(self, samples: list[Sample]) -> Images:
        """The images of B samples, read, resized and cut into patches."""
        patches = torch.zeros(0, self.grey_table[:, 0].numel(), dtype=torch.uint8)
        grids = torch.zeros(0, 3, dtype=torch.long)
        films = [load_film(sample, path) for sample in samples for path in sample.images]
        if films:
            patches, grids = map(torch.cat, zip(*map(self._patches, films)))
        slots = iter((grids.prod(1) // self.image_processor.merge_size**2).tolist())
        return Images(patches, grids, [[next(slots) for _ in sample.images] for sample in samples])

    def _patches(self, image) -> tuple[Tensor, Tensor]:
        """An image as uint8 patches [n, channels * 16 * 16] and its grid [1, 3]: resized, but not
        yet scaled to the model's input values.
        """
        batch = self.image_processor(
            images=[image], do_rescale=False, do_normalize=False, return_tensors="pt"
        )
        patches = batch["pixel_values"].view(-1, *self.grey_table.shape)
        # A still image is the same at both moments.
        return patches[:, :, 0].flatten(1).to(torch.uint8), batch["image_grid_thw"]

    def _talk(self, question: list[int], turns: list[list[str]]) -> tuple[list[int], list[int]]:
        """The tokens of a row, and a mask that is 1 on its answers and end tokens. `question` is
        the part of the first turn that is in the prompt; later questions are written by the chat
        template, which sees everything before them.
        """
        tokens, mask, messages = list(question), [0] * len(question), []
        end = self.tokenizer.convert_ids_to_tokens(self.end_id)
        for number, (next_question, answer) in enumerate(turns):
            messages.append({"role": "user", "content": next_question})
            if number:
                text = self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
                # of the answer before: Thinking's template rewrites older answers
                last = text.rindex(end, 0, text.rindex(end))
                between = self._tokens(text[last + len(end) :])  # "\n", and the next question
                tokens, mask = tokens + between, mask + [0] * len(between)
            messages.append({"role": "assistant", "content": answer})
            ids = self._tokens(inside_thinking(answer) if self.template_opens_think else answer)
            tokens, mask = tokens + ids + [self.end_id], mask + [1] * (len(ids) + 1)
        return tokens, mask

    def _chat(self, question: str, slots: list[int]) -> list[int]:
        content = [{"type": "image"} for _ in slots] + [{"type": "text", "text": question}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        # The template writes one <|image_pad|> an image; each needs one for every merged patch.
        head, *tails = text.split("<|image_pad|>", len(slots))
        text = head + "".join("<|image_pad|>" * n + tail for n, tail in zip(slots, tails))
        return self._tokens(text)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _prompts(self, rows: list[list[int]], images: Images) -> Prompts:
        ids, mask = pad_right(rows, self.tokenizer.pad_token_id)
        merge = self.image_processor.merge_size
        positions, next_position = mrope_positions(ids, mask, images.grids, self.image_id, merge)
        return Prompts(
            ids,
            mask,
            positions,
            next_position,
            images.patches,
            self.grey_table,
            images.grids,
            torch.tensor([len(slots) for slots in images.slots]),
            torch.arange(len(rows)),
        )

    def encode_answers(self, answers: list[str]) -> tuple[Tensor, Tensor]:
        """Answers as tokens [R, T] and mask [R, T], each closed by its end token."""
        rows = [self._tokens(answer) + [self.end_id] for answer in answers]
        return pad_right(rows, self.tokenizer.pad_token_id)


def mrope_positions(
    ids: Tensor, mask: Tensor, grids: Tensor, image_id: int, merge: int
) -> tuple[Tensor, Tensor]:
    """M-RoPE positions [3, B, P] and the next free position [B] (Qwen2-VL, 2409.12191, section
    2.1).

    Text counts up by one on all three axes. An image starts where the text stopped, spreads over
    height and width at a single time, and the text resumes after its longer side. ids, mask [B, P];
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
    """The text after a <think> that the chat template has already written, with its line break; a
    plain answer closes it at once.
    """
    return (
        answer.removeprefix("<think>").removeprefix("\n")
        if answer.startswith("<think>")
        else f"\n</think>\n\n{answer}"
    )


def grey_table_of(image_processor) -> Tensor:
    """[channels, 2, 256] the processor's output for each grey level, obtained from one patch of 16
    x 16 that has all of them in order.
    """
    side, size = image_processor.patch_size, image_processor.merge_size
    grey = torch.arange(side * side, dtype=torch.uint8).view(side, side).tile(size, size)
    patch = image_processor(
        images=[grey[..., None].expand(-1, -1, 3).numpy()], do_resize=False, return_tensors="pt"
    )["pixel_values"]
    return patch[0].view(3, image_processor.temporal_patch_size, -1)


def spans(counts: Tensor, owners: Tensor) -> Tensor:
    """The positions of the items of these `owners`, when owner i has counts[i] items and all items
    follow one another.
    """
    ends = counts.cumsum(0).tolist()
    ranges = [torch.arange(ends[i - 1] if i else 0, ends[i]) for i in owners.tolist()]
    return torch.cat([torch.zeros(0, dtype=torch.long), *ranges]).to(counts.device)


def pad_right(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token lists -> ids [N, longest] and mask [N, longest] (True on tokens, whatever their id)."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    ids = torch.full(mask.shape, pad).masked_scatter(
        mask, torch.tensor([i for row in rows for i in row])
    )
    return ids, mask
