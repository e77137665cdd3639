"""Checkpoints, archives, JSONL files and images that lie: each is refused with a message, and runs
nothing (SECURITY.md).
"""

import gzip
import io
import json
import os
import pickle
import re
import shutil
import struct
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minigrpo.data import read_jsonl
from minigrpo.data.sample import DataError, load_image
from minigrpo.policy import Policy

PAGE = (Path(__file__).parent.parent / "SECURITY.md").read_text()


def test_the_page_names_a_test_for_each_line():
    """And each test that it names exists."""
    there = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        there |= set(re.findall(r"^def (test_\w+)\(", path.read_text(), re.M))
    lines = [line.replace(r"\|", "") for line in PAGE.splitlines() if line.startswith("| ")]
    lines = [line for line in lines if line != "| input | what happens | tests |"]
    for line in lines:
        named = re.findall(r"`(test_\w+)`", line.split("|")[3])
        assert named and not set(named) - there, line
    assert len(lines) > 30 and not set(re.findall(r"`(test_\w+)`", PAGE)) - there


class Harm:
    def __reduce__(self):
        return os.mkdir, ("HARMED",)


@pytest.fixture
def checkpoint(policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy.save_pretrained(tmp_path / "model")
    yield tmp_path / "model"
    assert not os.path.exists("HARMED"), "code of the checkpoint ran"


def refusal(checkpoint):
    with pytest.raises(Exception) as refused:
        Policy.from_pretrained(str(checkpoint))
    return f"{type(refused.value).__name__}: {refused.value}"


def edit(path, **entries):
    path.write_text(
        json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **entries})
    )


def test_the_checkpoint_itself_loads(checkpoint, policy):
    assert Policy.from_pretrained(str(checkpoint)).head.shape == policy.head.shape


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights(checkpoint, name):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / name).write_bytes(pickle.dumps(Harm()))
    assert "is a pickle, which can run any code" in refusal(checkpoint)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "preprocessor_config.json"]
)
def test_code_in_the_checkpoint(checkpoint, name):
    (checkpoint / "mine.py").write_text("import os; os.mkdir('HARMED')")
    edit(checkpoint / name, auto_map={"AutoConfig": "mine.C", "AutoTokenizer": ["mine.T", None]})
    assert "code of its own (auto_map)" in refusal(checkpoint) and name in refusal(checkpoint)


@pytest.mark.parametrize(
    "shard", ["../elsewhere.safetensors", "/etc/passwd", "model.bin", "..\\x.safetensors", 7]
)
def test_shards_outside_the_folder(checkpoint, shard):
    shutil.copy(checkpoint / "model.safetensors", checkpoint.parent / "elsewhere.safetensors")
    (checkpoint / "model.safetensors").rename(checkpoint / "part.safetensors")
    edit(
        checkpoint / "model.safetensors.index.json",
        metadata={},
        weight_map={"lm_head.weight": shard},
    )
    assert "not a safetensors file in the folder" in refusal(checkpoint)


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: data[: len(data) // 2],
        lambda data: struct.pack("<Q", 2**62) + data[8:],
        lambda data: data[:8] + b"\xff" * 100 + data[108:],
        lambda data: b"",
    ],
)
def test_safetensors_that_lie(checkpoint, harm):
    path = checkpoint / "model.safetensors"
    path.write_bytes(harm(path.read_bytes()))
    assert "Safetensor" in refusal(checkpoint) or "ValueError" in refusal(checkpoint)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{", "\xff"])
def test_json_that_is_none(checkpoint, text):
    (checkpoint / "tokenizer_config.json").write_text(text, encoding="latin-1")
    assert refusal(checkpoint).startswith("ValueError") and "tokenizer_config.json" in refusal(
        checkpoint
    )


def line(tmp_path, image):
    (tmp_path / "data.jsonl").write_text(
        json.dumps(
            {"id": "a", "image": image, "task": "report", "question": "What?", "answer": "This."}
        )
    )
    return tmp_path / "data.jsonl"


def png_of(width, height):
    """A PNG of some kilobytes that claims any size."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "width, height", [(12_000, 12_000), (10_001, 10_000), (2**31 - 1, 2**31 - 1)]
)
def test_a_bomb_sized_image(tmp_path, width, height):
    """Bug: up to 178 million pixels, Pillow only warns."""
    (tmp_path / "bomb.png").write_bytes(png_of(width, height))
    with pytest.raises(DataError, match="data.jsonl:1.*cannot be read"):
        read_jsonl(line(tmp_path, "bomb.png"))
    with pytest.raises(Exception, match="million|exceeds|decompression bomb"):
        load_image(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    "image", ["../../../../etc/passwd", "/dev/zero", ".", "pipe", "script.png"]
)
def test_image_paths_that_are_no_images(tmp_path, image):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "script.png").write_text("%!PS\n(%pipe%touch HARMED) (w) file")
    with pytest.raises(DataError, match="data.jsonl:1: image .* (does not exist|cannot be read)"):
        read_jsonl(line(tmp_path, image))
    assert not os.path.exists("HARMED")


def test_a_line_of_a_gigabyte(tmp_path):
    """A sparse file, so it costs no disk; read whole it would cost memory."""
    with open(tmp_path / "data.jsonl", "wb") as file:
        file.truncate(10**9)
    tracemalloc.start()
    with pytest.raises(DataError, match="data.jsonl:1: longer than 16 MB"):
        read_jsonl(tmp_path / "data.jsonl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000, "not JSON"),
        ('{"id": ' + "9" * 5000 + "}", "not JSON"),
        ('{"id": "a", "id"', "not JSON"),
    ],
)
def test_json_lines_that_are_none(tmp_path, text, message):
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        read_jsonl(tmp_path / "data.jsonl")


def member(name, **more):
    info = tarfile.TarInfo(name)
    for key, value in more.items():
        setattr(info, key, value)
    return info


def test_a_tar_that_fills_the_disk(tmp_path, monkeypatch):
    """Bug: an archive was unpacked whatever its size: 40 KB of zeros packed tight become 40 MB."""
    weights = pytest.importorskip("minigrpo.rewards.weights")
    monkeypatch.setattr(weights, "MOST_UNPACKED", 30_000_000)
    with tarfile.open(tmp_path / "bomb.tar.gz", "w:gz") as tar:
        for number in range(4):
            tar.addfile(member(f"zeros-{number}", size=10_000_000), io.BytesIO(bytes(10_000_000)))
    assert (tmp_path / "bomb.tar.gz").stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"cannot be unpacked .*\(it holds more than 0 GB\)"):
        weights.unpack(tmp_path / "bomb.tar.gz", tmp_path / "in/folder")
    assert not any((tmp_path / "in").iterdir())


@pytest.mark.parametrize(
    "entry",
    [
        member("../outside.txt", size=4),
        member("/tmp/minigrpo-outside.txt", size=4),
        member("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("hard", type=tarfile.LNKTYPE, linkname="../../outside.txt"),
        member("dev", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
        member("here", type=tarfile.SYMTYPE, linkname="config.json"),
        member("pipe", type=tarfile.FIFOTYPE),
        member("same", type=tarfile.LNKTYPE, linkname="same"),
    ],
)
def test_a_tar_that_leaves_its_folder(tmp_path, entry):
    """Links are refused wherever they lead, and pipes and devices: an archive of weights has files
    and folders."""
    weights = pytest.importorskip("minigrpo.rewards.weights")
    with tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as tar:
        tar.addfile(entry, io.BytesIO(b"harm"))
    try:
        weights.unpack(tmp_path / "bad.tar.gz", tmp_path / "in/folder")
        assert entry.isreg() and entry.name[0] == "/", "an absolute name may become one inside"
    except ValueError as error:
        assert "cannot be unpacked" in str(error) and not any((tmp_path / "in").iterdir())
    assert not (tmp_path / "outside.txt").exists() and not (tmp_path / "in/outside.txt").exists()
    assert not os.path.exists("/tmp/minigrpo-outside.txt")
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def tar_of_many(path):
    with tarfile.open(path, "w:gz") as tar:
        for number in range(2000):
            tar.addfile(member(f"{number}"))


def tar_of_a_long_header(path):
    """A name of 100 MB, which tarfile reads into memory before any filter sees it."""
    with tarfile.open(path, "w:gz", format=tarfile.GNU_FORMAT, compresslevel=1) as tar:
        tar.addfile(member("a" * 100_000_000))


def tar_of_holes(path):
    """A sparse file of 1 TB in half a kB."""
    header = bytearray(member("holes", type=tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"%011o\0" % 0
    header[386:410] = b"%011o\0" % (2**32) + b"%011o\0" % 0
    header[483:495] = b"%011o\0" % (2**32)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    with gzip.open(path, "wb") as file:
        file.write(bytes(header) + bytes(10240))


@pytest.mark.parametrize(
    "harm, said",
    [
        (tar_of_many, "more than 100 files"),
        (tar_of_a_long_header, "one of its headers has 100,"),
        (tar_of_holes, "neither a file nor a folder"),
    ],
)
def test_a_tar_that_fills_memory_or_folders(tmp_path, harm, said):
    weights = pytest.importorskip("minigrpo.rewards.weights")
    harm(tmp_path / "bad.tar.gz")
    assert (tmp_path / "bad.tar.gz").stat().st_size < 1_000_000
    tracemalloc.start()
    with pytest.raises(ValueError, match=said):
        weights.unpack(tmp_path / "bad.tar.gz", tmp_path / "in/folder")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6 and not any((tmp_path / "in").iterdir())


# ---- entries and files of a checkpoint that reach out of it --------------------------------------


@pytest.mark.parametrize(
    "file, entries, message",
    [
        (
            "config.json",
            dict(transformers_weights="x.safetensors.index.json"),
            "another file of weights",
        ),
        ("config.json", dict(attn_implementation="kernels-community/flash-attn"), "for kernels"),
        ("config.json", dict(_attn_implementation="mine/kernel"), "for kernels"),
        (
            "config.json",
            dict(text_config=dict(attn_implementation="mine/kernel:main")),
            "for kernels",
        ),
        ("config.json", dict(attn_implementation={"text_config": "a/b"}), "for kernels"),
        ("config.json", dict(kernel_config={"RMSNorm": "mine/kernel"}), "for kernels"),
        (
            "config.json",
            dict(quantization_config=dict(quant_method="bitsandbytes")),
            "quantised .bitsan",
        ),
        ("config.json", dict(vision_config=dict(quantization_config=["x"])), "quantised"),
        (
            "config.json",
            dict(text_config=dict(auto_map={"AutoModel": "mine.M"})),
            "to run code of its own",
        ),
        (
            "config.json",
            dict(x=[[{"auto_map": {"AutoModel": "mine.M"}}]]),
            "to run code of its own",
        ),
        (
            "processor_config.json",
            dict(auto_map={"AutoProcessor": "mine.P"}),
            "to run code of its own",
        ),
        (
            "processor_config.json",
            dict(image_processor=dict(auto_map={"AutoImageProcessor": "mine.P"})),
            "to run code of its own",
        ),
        (
            "video_preprocessor_config.json",
            dict(auto_map={"AutoVideoProcessor": "mine.P"}),
            "code of its own",
        ),
        ("generation_config.json", dict(custom_generate="mine/generate"), "to run code of its own"),
        (
            "special_tokens_map.json",
            dict(auto_map={"AutoTokenizer": ["mine.T", None]}),
            "code of its own",
        ),
        ("tokenizer_config.json", dict(tokenizer_file="/etc/passwd"), "a file outside the folder"),
        (
            "tokenizer_config.json",
            dict(fast_tokenizer_files=["../tokenizer.1.json"]),
            "a file outside",
        ),
        ("tokenizer_config.json", dict(gguf_file="x.gguf"), "another file of weights"),
        (
            "tokenizer_config.json",
            dict(tokenizer_class="BertJapaneseTokenizer"),
            "not one of Qwen3-VL's",
        ),
    ],
)
def test_entries_that_name_code_kernels_or_files(checkpoint, file, entries, message):
    """Bug: `transformers_weights` named an index of the folder, and that a file outside."""
    (checkpoint / "mine.py").write_text("import os; os.mkdir('HARMED')")
    edit(checkpoint / file, **entries)
    said = refusal(checkpoint)
    assert said.startswith("ValueError") and file in said, said
    assert re.search(message, said), said


def test_weights_of_another_index(checkpoint):
    """The row of the fault itself, as it was loaded."""
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").rename(checkpoint.parent / "outside.safetensors")
    edit(
        checkpoint / "x.safetensors.index.json",
        metadata={},
        weight_map=dict.fromkeys(weights, "../outside.safetensors"),
    )
    edit(checkpoint / "config.json", transformers_weights="x.safetensors.index.json")
    assert "config.json asks for another file of weights (transformers_weights)" in refusal(
        checkpoint
    )


def test_entries_that_do_no_harm_are_let_be(checkpoint, policy):
    """What published checkpoints and frameworks write beside what is needed."""
    edit(
        checkpoint / "config.json",
        _attn_implementation="flash_attention_2",
        transformers_version="4.57.1",
        _attn_implementation_autoset=True,
        torch_dtype="bfloat16",
        quantization_config=None,
        _name_or_path="/home/me/models/base",
        use_cache=True,
        id2label={"0": "x"},
    )
    edit(
        checkpoint / "tokenizer_config.json",
        name_or_path="../base",
        processor_class="Qwen3VLProcessor",
        padding_side="right",
        vocab_file="vocab.json",
        chat_template_x=7,
    )
    edit(
        checkpoint / "generation_config.json", transformers_version="4.57.1", max_new_tokens=5, x=7
    )
    edit(checkpoint / "preprocessor_config.json", image_processor_type="Mine", x={"y": [7]})
    for name in ("trainer_state.json", "training_args.bin", "optimizer.pt", "args.json"):
        (checkpoint / name).write_bytes(b"\x80\x04}")
    again = Policy.from_pretrained(str(checkpoint))
    assert torch.equal(again.head, policy.head) and again.end_ids == policy.end_ids


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
)
def test_adapters_beside_the_weights(checkpoint, name):
    """Bug: transformers put them into the model and froze the rest: nothing was left to train."""
    (checkpoint / name).write_text("{}")
    said = refusal(checkpoint)
    assert name in said and "merge the adapter into it first" in said and "base model" in said


def test_adapters_alone(policy, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(
        '{"base_model_name_or_path": "elsewhere"}'
    )
    assert "give --model the base model" in refusal(tmp_path / "adapter")


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "video_preprocessor_config.json", "config.json"]
)
def test_links_out_of_the_folder(checkpoint, name):
    """Bug: what a link leads to was read, and saved with the trained model, for all to see."""
    shutil.copy(checkpoint / name, checkpoint.parent / "secret")
    (checkpoint / name).unlink()
    (checkpoint / name).symlink_to("../secret")
    assert f"{name} is a link to outside its folder" in refusal(checkpoint)


def test_links_inside_the_folder_and_to_weights(checkpoint, policy):
    (checkpoint / "config.json").rename(checkpoint / "config-of-mine.json")
    (checkpoint / "config.json").symlink_to("config-of-mine.json")
    (checkpoint / "model.safetensors").rename(checkpoint.parent / "shared.safetensors")
    (checkpoint / "model.safetensors").symlink_to("../shared.safetensors")
    assert torch.equal(Policy.from_pretrained(str(checkpoint)).head, policy.head)


@pytest.mark.parametrize(
    "make",
    [
        os.mkdir,
        os.mkfifo,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to(path.name),
    ],
    ids=["folder", "pipe", "device", "nowhere", "circle"],
)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "model.safetensors", "merges.txt"])
def test_what_is_no_plain_file(checkpoint, name, make):
    (checkpoint / name).unlink(missing_ok=True)
    make(checkpoint / name)
    said = refusal(checkpoint)
    assert (
        said.startswith("ValueError")
        and name in said
        and "fetch it" in said
        or "cannot be read" in said
    )


def test_a_distributed_checkpoint_is_a_pickle(checkpoint):
    """transformers unpickles `.metadata` beside `.distcp` files, where it sees them: here it sees
    none.
    """
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Harm()))
    (checkpoint / "__0_0.distcp").write_bytes(pickle.dumps(Harm()))
    Policy.from_pretrained(str(checkpoint))
    (checkpoint / "model.safetensors").unlink()
    assert "has no safetensors file" in refusal(checkpoint)


@pytest.mark.parametrize(
    "template, message",
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "more than 1 s",
        ),
        ("{{ '%9999999999d' % 1 }}", "MemoryError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ raise_exception('\x1b[2J') }}", r"\\x1b\[2J"),
        ("{% for %}", "TemplateSyntaxError"),
    ],
)
def test_templates_end_in_time(policy, checkpoint, template, message):
    """Bug: a template of nested loops never ended. It is tried in a fork that the system ends."""
    (checkpoint / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=message):
        Policy.from_pretrained(str(checkpoint))
