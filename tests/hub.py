"""Small random checkpoints laid out like those of Qwen3-VL on the hub: its config.json as
published, bf16 shards with an index, a tokenizer with its special tokens, both kinds of chat
template, and the settings of image, video and generation.
"""

import json
import re
from pathlib import Path

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from minigrpo.tiny import train_tokenizer

# What tells the four sizes apart, as published: the language model, its tied or untied head, the
# vision tower.
SIZES = {
    "2B": dict(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        tied=True,
        tower=1024,
    ),
    "4B": dict(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        tied=True,
        tower=1024,
    ),
    "8B": dict(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        tied=False,
        tower=1152,
    ),
    "32B": dict(
        hidden_size=5120,
        intermediate_size=25600,
        num_hidden_layers=64,
        num_attention_heads=64,
        tied=False,
        tower=1152,
    ),
}
TOWERS = {
    1024: dict(depth=24, intermediate_size=4096, deepstack_visual_indexes=[5, 11, 17]),
    1152: dict(depth=27, intermediate_size=4304, deepstack_visual_indexes=[8, 16, 24]),
}
SPECIAL = dict(
    image_token_id=151655,
    video_token_id=151656,
    vision_start_token_id=151652,
    vision_end_token_id=151653,
)

# The parts of the two templates that decide about tokens: render_content, and how Thinking treats
# what was thought before.
INSTRUCT = """{%- macro render(content) -%}{%- if content is string -%}{{- content -}}
{%- else -%}{%- for item in content -%}
{%- if item.type == 'image' or 'image' in item -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif 'text' in item -%}{{- item.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + render(message.content) + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
THINKING = INSTRUCT.replace(
    "render(message.content) +",
    "(('<think>\\n\\n</think>\\n\\n' if message.role == 'assistant' and "
    "loop.last else '') + render(message.content).split('</think>')[-1].lstrip('\\n')) +",
).replace("assistant\\n' -}}{%- endif", "assistant\\n<think>\\n' -}}{%- endif")


def config_json(size: str) -> dict:
    """config.json as it stands on the hub."""
    own = dict(SIZES[size])
    tied, tower = own.pop("tied"), own.pop("tower")
    text = own | dict(
        model_type="qwen3_vl_text",
        vocab_size=151936,
        num_key_value_heads=8,
        head_dim=128,
        hidden_act="silu",
        attention_bias=False,
        rms_norm_eps=1e-6,
        rope_theta=5_000_000,
        max_position_embeddings=262144,
        dtype="bfloat16",
        bos_token_id=151643,
        eos_token_id=151645,
        tie_word_embeddings=tied,
        use_cache=True,
        rope_scaling=dict(mrope_interleaved=True, mrope_section=[24, 20, 20], rope_type="default"),
    )
    vision = TOWERS[tower] | dict(
        model_type="qwen3_vl",
        hidden_size=tower,
        num_heads=16,
        out_hidden_size=own["hidden_size"],
        hidden_act="gelu_pytorch_tanh",
        in_channels=3,
        patch_size=16,
        spatial_merge_size=2,
        temporal_patch_size=2,
        num_position_embeddings=2304,
    )
    return (
        dict(
            architectures=["Qwen3VLForConditionalGeneration"],
            model_type="qwen3_vl",
            tie_word_embeddings=tied,
            text_config=text,
            vision_config=vision,
            transformers_version="4.57.0.dev0",
        )
        | SPECIAL
    )


def write_checkpoint(
    folder: Path, size: str = "2B", *, thinking: bool = False, shard: str = "300KB", layers: int = 4
) -> Path:
    """The same parts as the real one at a width of 64 and with few layers, of which DeepStack needs
    three; ids of the special tokens are those of a small vocabulary.
    """
    tokenizer = train_tokenizer(
        ["What is seen? The heart is normal, the lungs are clear. user assistant"], 400
    )
    tokenizer.chat_template = THINKING if thinking else INSTRUCT
    ids = tokenizer.convert_tokens_to_ids
    published = config_json(size)
    share = published["text_config"]["num_attention_heads"] // 8
    published["text_config"] |= dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_key_value_heads=2,
        num_attention_heads=2 * share,
        head_dim=16,
        rope_scaling=dict(mrope_interleaved=True, mrope_section=[4, 2, 2], rope_type="default"),
        bos_token_id=ids("<|endoftext|>"),
        eos_token_id=ids("<|im_end|>"),
    )
    published["vision_config"] |= dict(
        depth=layers,
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        out_hidden_size=64,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1, 2],
    )
    published |= {
        name: ids("<|" + re.sub("(image|video)", r"\1_pad", name.removesuffix("_token_id")) + "|>")
        for name in SPECIAL
    }
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(published)).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    pixels = dict(
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        processor_class="Qwen3VLProcessor",
    )
    files = {
        "config.json": published,
        "generation_config.json": dict(
            bos_token_id=ids("<|endoftext|>"),
            pad_token_id=ids("<|endoftext|>"),
            do_sample=True,
            top_k=20,
            eos_token_id=[ids("<|im_end|>"), ids("<|endoftext|>")],
            top_p=0.8,
            temperature=0.7,
        ),
        "preprocessor_config.json": (
            pixels
            | dict(
                image_processor_type="Qwen2VLImageProcessorFast",
                size=dict(longest_edge=16_777_216, shortest_edge=65_536),
            )
        ),
        "video_preprocessor_config.json": (
            pixels
            | dict(
                video_processor_type="Qwen3VLVideoProcessor",
                size=dict(longest_edge=25_165_824, shortest_edge=4096),
            )
        ),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    return folder


def cache_as_downloaded(folder: Path, cache: Path, name: str) -> Path:
    """The checkpoint `folder` as huggingface_hub keeps the model `name`: links in a snapshot, files
    among the blobs.
    """
    place, commit = (
        cache / f"models--{name.replace('/', '--')}",
        "0123456789abcdef0123456789abcdef01234567",
    )
    snapshot = place / "snapshots" / commit
    for inside in (snapshot, place / "blobs", place / "refs"):
        inside.mkdir(parents=True)
    (place / "refs/main").write_text(commit)
    for number, path in enumerate(sorted(folder.iterdir())):
        (place / "blobs" / f"{number:040x}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot
