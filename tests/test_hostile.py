"""Checkpoints, archives, JSONL files and images that lie: each is refused with a message, and runs nothing (SECURITY.md)."""

import gzip
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import tracemalloc
import zlib

import pytest

from minigrpo.data import read_jsonl
from minigrpo.data.sample import DataError, load_image
from minigrpo.policy import Policy


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
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **entries}))


def test_the_checkpoint_itself_loads(checkpoint, policy):
    assert Policy.from_pretrained(str(checkpoint)).head.shape == policy.head.shape


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights(checkpoint, name):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / name).write_bytes(pickle.dumps(Harm()))
    assert "is a pickle, which can run any code" in refusal(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_code_in_the_checkpoint(checkpoint, name):
    (checkpoint / "mine.py").write_text("import os; os.mkdir('HARMED')")
    edit(checkpoint / name, auto_map={"AutoConfig": "mine.C", "AutoTokenizer": ["mine.T", None]})
    assert "code of its own (auto_map)" in refusal(checkpoint) and name in refusal(checkpoint)


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "/etc/passwd", "model.bin", "..\\x.safetensors", 7])
def test_shards_outside_the_folder(checkpoint, shard):
    shutil.copy(checkpoint / "model.safetensors", checkpoint.parent / "elsewhere.safetensors")
    (checkpoint / "model.safetensors").rename(checkpoint / "part.safetensors")
    edit(checkpoint / "model.safetensors.index.json", metadata={}, weight_map={"lm_head.weight": shard})
    assert "no safetensors file of the folder" in refusal(checkpoint)


@pytest.mark.parametrize("harm", [
    lambda data: data[:len(data) // 2], lambda data: struct.pack("<Q", 2**62) + data[8:], lambda data: data[:8] + b"\xff" * 100 + data[108:],
    lambda data: b""])
def test_safetensors_that_lie(checkpoint, harm):
    path = checkpoint / "model.safetensors"
    path.write_bytes(harm(path.read_bytes()))
    assert "Safetensor" in refusal(checkpoint) or "ValueError" in refusal(checkpoint)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{", "\xff"])
def test_json_that_is_none(checkpoint, text):
    (checkpoint / "tokenizer_config.json").write_text(text, encoding="latin-1")
    assert refusal(checkpoint).startswith("ValueError") and "tokenizer_config.json" in refusal(checkpoint)


def line(tmp_path, image):
    (tmp_path / "data.jsonl").write_text(json.dumps({"id": "a", "image": image, "task": "report", "question": "What?", "answer": "This."}))
    return tmp_path / "data.jsonl"


def png_of(width, height):
    """A PNG of some kilobytes that claims any size."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + chunk(
        b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width, height", [(12_000, 12_000), (10_001, 10_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_sized_image(tmp_path, width, height):
    """Bug: up to 178 million pixels, Pillow only warns."""
    (tmp_path / "bomb.png").write_bytes(png_of(width, height))
    with pytest.raises(DataError, match="data.jsonl:1.*cannot be read"):
        read_jsonl(line(tmp_path, "bomb.png"))
    with pytest.raises(Exception, match="million|exceeds|decompression bomb"):
        load_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("image", ["../../../../etc/passwd", "/dev/zero", ".", "pipe", "script.png"])
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


@pytest.mark.parametrize("text, message", [("[" * 100_000, "not JSON"), ('{"id": ' + "9" * 5000 + "}", "not JSON"), ('{"id": "a", "id"', "not JSON")])
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


@pytest.mark.parametrize("entry", [
    member("../outside.txt", size=4), member("/tmp/minigrpo-outside.txt", size=4), member("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    member("hard", type=tarfile.LNKTYPE, linkname="../../outside.txt"), member("dev", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    member("here", type=tarfile.SYMTYPE, linkname="config.json"), member("pipe", type=tarfile.FIFOTYPE), member("same", type=tarfile.LNKTYPE, linkname="same")])
def test_a_tar_that_leaves_its_folder(tmp_path, entry):
    """Links are refused wherever they lead, and pipes and devices: an archive of weights has files and folders."""
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


@pytest.mark.parametrize("harm, said", [(tar_of_many, "more than 100 files"), (tar_of_a_long_header, "one of its headers has 100,"),
                                        (tar_of_holes, "neither a file nor a folder")])
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
