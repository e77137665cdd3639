"""A tiny Qwen3-VL with random weights: every part of the real one, small enough to train on a CPU
in minutes.

    python -m minigrpo.tiny --train_data data/phantom/train.jsonl --output_dir models/tiny

Vision tower with merger and DeepStack, interleaved M-RoPE, grouped-query attention with q/k norms,
tied head; the tokenizer is byte-level BPE with Qwen's splitting rule, special tokens and chat
layout, trained on the given texts. The result is a checkpoint folder like that of
`Qwen/Qwen3-VL-2B-Instruct` and loads the same way.
"""

from pathlib import Path

from minigrpo.run.args import answer_early
from minigrpo.run.arguments import TinyArguments

if __name__ == "__main__":
    answer_early(TinyArguments, __doc__)  # what follows takes seconds to import

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from minigrpo.data import Sample, read_jsonl
from minigrpo.policy import Policy
from minigrpo.run.args import input_errors, parse_args
from minigrpo.run.files import aside, make_folder

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
VISIBLE = [
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]
TINY_PIXELS = 160 * 160
# Qwen splits digits one by one: six tokens a coordinate, of which four are always the same. Here
# the first digit takes its punctuation along, ", 0.4" and "2", so a box is 9 tokens and not 25.
SPLIT = (
    r",? ?\[?[01]\.\p{N}|(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The part of Qwen3-VL's chat layout that messages of text and images use.
CHAT_TEMPLATE = """{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- else -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def tiny_policy(
    samples: list[Sample],
    *,
    seed: int = 0,
    vocab_size: int = 1024,
    width: int = 128,
    layers: int = 3,
    pixels: int | None = None,
) -> Policy:
    """A random tiny Qwen3-VL whose tokenizer was trained on the samples; images are shrunk to at
    most `pixels`.
    """
    # "user" and "assistant" stand in every prompt, and would be 13 tokens otherwise.
    texts = [text for s in samples for text in (f"user\n{s.question}", f"assistant\n{s.answer}")]
    tokenizer = train_tokenizer(texts, vocab_size)
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("image_pad", "video_pad", "vision_start", "vision_end", "im_end", "endoftext")
    }
    heads, depth, vision_width = width // 32, 4, 96
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=32,
            max_position_embeddings=4096,
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
            depth=depth,
            hidden_size=vision_width,
            intermediate_size=4 * vision_width,
            num_heads=3,
            patch_size=16,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=width,
            num_position_embeddings=10 * 10,
            deepstack_visual_indexes=[1, 2],
        ),
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    initialise(model)
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["im_end"], ids["endoftext"]], pad_token_id=ids["endoftext"]
    )
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size=dict(shortest_edge=32 * 32, longest_edge=pixels or TINY_PIXELS),
    )
    return Policy(model.eval(), tokenizer, image_processor)


@torch.no_grad()
def initialise(model: Qwen3VLForConditionalGeneration) -> None:
    """Initial weights from which a narrow model learns to see within hundreds of steps.

    A standard deviation of 0.02, which suits widths in the thousands, makes the outputs of narrow
    layers too small: here it is 1 / sqrt(inputs), smaller where a block adds to the residual, and
    patches have position embeddings from the start (the sines and cosines of 1706.03762 over rows
    and columns, as trainable weights).
    """
    for name, weight in model.named_parameters():
        if name.endswith("embed_tokens.weight"):
            weight.normal_(0, 0.1)
        elif name.endswith("pos_embed.weight"):
            weight.copy_(sine_positions(int(weight.shape[0] ** 0.5), weight.shape[1]))
        elif weight.dim() > 1:
            block_output = name.endswith(
                ("o_proj.weight", "down_proj.weight", "attn.proj.weight", "mlp.linear_fc2.weight")
            )
            weight.normal_(0, (0.3 if block_output else 1.0) * weight[0].numel() ** -0.5)


def sine_positions(side: int, width: int) -> torch.Tensor:
    """[side * side, width]: sines and cosines of row and column at width / 4 frequencies."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    frequency = 50.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = [axis.flatten()[:, None] * frequency for axis in (row, column)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocab_size` tokens learned from `texts`, and Qwen's special tokens
    on top of these.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    bpe.add_tokens([AddedToken(t, special=False, normalized=False) for t in VISIBLE])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    with input_errors():
        args = parse_args(TinyArguments, __doc__)
        folder = Path(args.output_dir)
        if folder.exists():
            raise ValueError(f"{folder} exists already: give another --output_dir")
        policy = tiny_policy(read_jsonl(args.train_data), seed=args.seed)
        make_folder(folder.parent)
        with aside(folder) as part:
            policy.save_pretrained(part)
    print(
        f"{folder}: {sum(p.numel() for p in policy.parameters()) / 1e6:.1f}M parameters,"
        f" {len(policy.tokenizer)} tokens"
    )


if __name__ == "__main__":
    main()
