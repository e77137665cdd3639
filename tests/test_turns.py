"""Conversations and classification in supervised training: the loss is on every answer and on no
question.
"""

from dataclasses import replace

import pytest
import torch

from minigrpo.data import Sample
from minigrpo.loss import aggregate
from tests.processes import python

TURNS = [
    ["Is there an effusion?", "No effusion."],
    ["And the heart?\nIts size, please.", "The heart is at [0.42, 0.41, 0.78, 0.75]."],
    ["Sure?", "Yes."],
]


def talk(sample: Sample, turns=TURNS, image="") -> Sample:
    return replace(
        sample,
        task="conversation",
        turns=turns,
        question=turns[0][0],
        answer=turns[0][1],
        image=sample.image if image == "" else image,
        id=f"{sample.id}-talk-{len(turns)}",
    )


def peer_loss(policy, sample) -> tuple[float, int]:
    """transformers' own loss (mean over labels) on the chat that its template writes, labels found
    in the text: what stands between "assistant\\n" and the end token, with the end token. And the
    count of labels.
    """
    content = [{"type": "image"} for _ in sample.images] + [
        {"type": "text", "text": sample.turns[0][0]}
    ]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": sample.turns[0][1]},
    ]
    for question, answer in sample.turns[1:]:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    text = policy.tokenizer.apply_chat_template(messages, tokenize=False)
    image = policy.encoder.images([sample])
    for slots in image.slots[0]:
        text = text.replace(
            "<|vision_start|><|image_pad|><|vision_end|>",
            "<|vision_start|>" + "<|image_pad|>" * slots + "<|vision_end|>",
            1,
        )
    encoded = policy.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, labels = (
        torch.tensor([encoded["input_ids"]]),
        torch.full((1, len(encoded["input_ids"])), -100),
    )
    start = 0
    while (start := text.find("<|im_start|>assistant\n", start)) >= 0:
        begin = start + len("<|im_start|>assistant\n")
        stop = text.index("<|im_end|>", begin) + len("<|im_end|>")
        for place, (low, high) in enumerate(encoded["offset_mapping"]):
            if begin <= low and high <= stop:
                labels[0, place] = ids[0, place]
        start = stop
    kinds = (ids == policy.model.config.image_token_id).int()
    pixels = (
        {"pixel_values": policy.encode([sample]).pixels, "image_grid_thw": image.grids}
        if len(image.grids)
        else {}
    )
    positions, _ = policy.model.model.get_rope_index(
        ids, mm_token_type_ids=kinds, image_grid_thw=pixels.get("image_grid_thw")
    )
    loss = policy.model(
        input_ids=ids, labels=labels, position_ids=positions, mm_token_type_ids=kinds, **pixels
    ).loss
    return loss.item(), int((labels != -100).sum())


def our_loss(policy, group) -> tuple[float, int]:
    prompts, blocks = policy.encode_turns([group])
    prefix = policy.prefill(prompts)
    count = sum(int(mask.sum()) for _, mask, _ in blocks)
    loss = sum(
        aggregate(-policy.score(prefix, tokens, mask), mask, denominator=count)
        for tokens, mask, _ in blocks
    )
    return loss.item(), count


@pytest.mark.parametrize("case", ["film", "two films", "no film", "one turn"])
def test_loss_is_transformers_on_exactly_the_answers(policy, samples, case):
    """Questions in the loss, or an answer or its end token left out, would change the mean and the
    count.
    """
    sample = {
        "film": talk(samples[0]),
        "two films": talk(samples[0], image=[samples[0].image, samples[-1].image]),
        "no film": talk(samples[0], image=None),
        "one turn": talk(samples[0], TURNS[:1]),
    }[case]
    with torch.no_grad():
        ours, theirs = our_loss(policy, [sample]), peer_loss(policy, sample)
    assert ours[1] == theirs[1]
    assert abs(ours[0] - theirs[0]) < 1e-5


def test_a_talk_and_single_questions_share_a_film(policy, samples):
    """The mean over a film's rows is that of its rows on their own, weighted by their answer
    tokens.
    """
    first = samples[0]
    single = replace(
        first,
        task="classification",
        question="Which abnormalities?",
        answer="Cardiomegaly.",
        turns=None,
        id="labels",
    )
    group = [single, talk(first), talk(first, TURNS[:2])]
    with torch.no_grad():
        alone = [our_loss(policy, [sample]) for sample in group]
        together = our_loss(policy, group)
    assert together[1] == sum(count for _, count in alone)
    assert together[0] == pytest.approx(
        sum(loss * count for loss, count in alone) / together[1], abs=1e-5
    )


def test_masked_tokens_read_as_the_answers(policy, samples):
    """What the mask covers, decoded: every answer with its end, nothing else."""
    _, ((tokens, mask, _),) = policy.encode_turns([[talk(samples[0])]])
    assert policy.tokenizer.decode(tokens[mask]) == "".join(
        answer + "<|im_end|>" for _, answer in TURNS
    )


def test_a_later_answer_sees_the_earlier_turns(policy, samples):
    """A conversation whose turns were scored on their own would not notice what was said before."""
    other = [["Is there a nodule?", "A large one."], *TURNS[1:]]
    with torch.no_grad():
        last = []
        for turns in (TURNS, other):
            prompts, ((tokens, mask, _),) = policy.encode_turns([[talk(samples[0], turns)]])
            last.append(policy.score(prompts, tokens, mask)[mask][-3:])
    assert (last[0] - last[1]).abs().max() > 1e-4


def test_sft_trains_on_conversations_and_classification(policy, phantom, tmp_path):
    import json

    from minigrpo.data import read_jsonl

    report = json.loads((phantom / "train.jsonl").read_text().splitlines()[0])
    image = str(phantom / report["image"])
    lines = [
        {"id": "talk", "image": image, "task": "conversation", "turns": TURNS},
        {
            "id": "labels",
            "image": image,
            "task": "classification",
            "question": "Which abnormalities?",
            "answer": "Edema.",
        },
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_jsonl(tmp_path / "train.jsonl")[0].answer == "No effusion."
    policy.save_pretrained(tmp_path / "tiny")
    python(
        "train_sft.py",
        "--model",
        tmp_path / "tiny",
        "--train_data",
        tmp_path / "train.jsonl",
        "--output_dir",
        tmp_path / "sft",
        "--max_steps",
        12,
        "--batch_size",
        1,
        "--learning_rate",
        3e-3,
    )
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "sft/metrics.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < 0.7 * losses[0]
