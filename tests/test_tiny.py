"""The tiny checkpoint has every part of the real one."""

from minigrpo.policy import Policy


def test_tokenizer_speaks_qwen(policy):
    tokenizer = policy.tokenizer
    box = "It is at [0.15, 0.47, 0.60, 0.78]"
    pieces = [tokenizer.decode([token]) for token in tokenizer(box)["input_ids"]]
    assert "".join(pieces) == box and pieces[-9:] == [
        " [0.1",
        "5",
        ", 0.4",
        "7",
        ", 0.6",
        "0",
        ", 0.7",
        "8",
        "]",
    ]
    assert (
        tokenizer.decode(tokenizer("Heart, 12 é <think>x</think>")["input_ids"])
        == "Heart, 12 é <think>x</think>"
    )
    for token in ("<|im_end|>", "<|image_pad|>", "<think>", "</think>"):
        assert len(tokenizer(token)["input_ids"]) == 1
    assert (
        tokenizer.decode(
            tokenizer("<think>a</think>b<|im_end|>")["input_ids"], skip_special_tokens=True
        )
        == "<think>a</think>b"
    )


def test_chat_layout(policy, samples):
    text = policy.tokenizer.decode(policy.encode(samples[:1]).ids[0])
    slots = "<|image_pad|>" * 9  # 96 x 96 pixels, 32 a merged patch
    assert text == (
        f"<|im_start|>user\n<|vision_start|>{slots}<|vision_end|>{samples[0].question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_shape_of_the_real_one(policy, tmp_path):
    config = policy.model.config
    assert (
        config.vision_config.deepstack_visual_indexes
        and config.text_config.rope_parameters["mrope_interleaved"]
    )
    assert config.text_config.num_key_value_heads < config.text_config.num_attention_heads
    assert 1e6 < sum(p.numel() for p in policy.parameters()) < 1e7
    policy.save_pretrained(tmp_path / "tiny")
    names = {path.name for path in (tmp_path / "tiny").iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "preprocessor_config.json",
    }
    assert (
        Policy.from_pretrained(str(tmp_path / "tiny")).image_processor.size
        == policy.image_processor.size
    )
