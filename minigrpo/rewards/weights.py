"""Where the clinical scorers' weights come from: a folder that you name (--reward_weights), or the
Hugging Face hub.

The folder has the files as they are published; each scorer looks for those it needs and says what
is missing:

    DIR/radgraph-xl.tar.gz   RadGraph-XL, 416 MB (unpacked beside it on first use);
                             radgraph.tar.gz is RadGraph 1.0
    DIR/chexbert.pth         CheXbert, 1.31 GB
    DIR/<encoder>/           a folder for each encoder that these name: config.json and tokenizer,
                             for BERTScore the weights too: bert-base-uncased, distilroberta-base,
                             distilbert-base-uncased, ...
"""

import gzip
import hashlib
import os
import pickle
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from torch import Tensor

from ..trust import INDEX, JSON, check_entry, entries, parse, read_text

T = TypeVar("T")

MOST_UNPACKED = 4 * 10**9  # bytes of an archive's files; RadGraph's have about half a GB
MOST_MEMBERS = 100  # files and folders of an archive; RadGraph's has about ten
# bytes that an archive's reader asks for at once: a header of a GB would be held in memory
MOST_AT_ONCE = 2**24
ENCODERS = ("bert", "distilbert", "roberta")  # model types
LARGEST = {
    "vocab_size": 500_000,
    "max_position_embeddings": 16_384,
    "type_vocab_size": 16,
    "num_hidden_layers": 64,
    "n_layers": 64,
    "hidden_size": 4096,
    "dim": 4096,
    "num_attention_heads": 64,
    "n_heads": 64,
    "intermediate_size": 16_384,
    "hidden_dim": 16_384,
}
PUBLISHED = [
    "config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "model.safetensors",
]
REPO = "StanfordAIMI/RRG_scorers"  # holds the files of SIZES, tagged MIT
SIZES = {
    "radgraph-xl.tar.gz": "416 MB",
    "radgraph.tar.gz": "a BERT, hundreds of MB",
    "chexbert.pth": "1.31 GB",
}


def find_file(weights_dir: str | None, name: str) -> Path:
    """The file `name` of SIZES, from the folder or the hub. ValueError: what is missing, how large
    it is, where to put it.
    """
    if weights_dir is None:
        try:
            return Path(hf_hub_download(REPO, name))
        # offline, no such host, no space: the hub raises a dozen kinds, the mend is one
        except Exception as error:
            raise ValueError(
                f"{name} ({SIZES[name]}) could not be fetched from {REPO} on the Hugging Face hub"
                f" ({type(error).__name__}): fetch it elsewhere, put it into a folder DIR, and give"
                " --reward_weights DIR"
            ) from error
    path = Path(weights_dir) / name
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: fetch {name} ({SIZES[name]}) from {REPO} on the Hugging Face hub"
            " and put it there"
        )
    return path


def load_encoder(weights_dir: str | None, name: str, load: Callable[[str], T], size: str) -> T:
    """`load(folder)` of the encoder `name`, after a check that its settings are harmless. `size`
    says what it contains.
    """
    source = name if weights_dir is None else str(Path(weights_dir) / name.split("/")[-1])
    if weights_dir is not None and not os.path.isdir(source):
        raise ValueError(
            f"{source} is missing: fetch the files of {name} ({size}) from the Hugging Face hub and"
            " put them there"
        )
    try:
        folder = source if weights_dir else snapshot_download(name, allow_patterns=PUBLISHED)
        check_encoder(Path(folder))
        return load(folder)
    # the hub, transformers, tokenizers and safetensors raise dozens of kinds; the mend is one
    except Exception as error:
        mend = (
            "fetch its files again"
            if weights_dir
            else (
                f"put its files into a folder DIR/{name.split('/')[-1]}, and give"
                " --reward_weights DIR"
            )
        )
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{source} ({size}) could not be loaded ({reason}): {mend}") from error


def check_encoder(folder: Path) -> None:
    """ValueError for an encoder's folder whose settings bring code, name files elsewhere, or would
    fill the memory."""
    if adapters := sorted(folder.glob("adapter_*")):
        raise ValueError(
            f"{adapters[0].name} names another model: a scorer's encoder has no adapter"
        )
    settings = {
        name: parse(folder / name, text)
        for name in JSON
        if (text := read_text(folder / name)) is not None
    }
    for name, setting in settings.items():
        for key, value in entries(setting):
            check_entry(folder / name, key, value)
    config = settings.get("config.json", {})
    if config.get("model_type") not in ENCODERS:
        raise ValueError(
            f"config.json: model_type {str(config.get('model_type'))[:80]!r} is not one of"
            f" {', '.join(ENCODERS)}"
        )
    for key, most in LARGEST.items():
        if key in config and (type(config[key]) is not int or not 1 <= config[key] <= most):
            raise ValueError(
                f"config.json: {key} is {str(config[key])[:80]}, not a number in 1..{most:,}"
            )
    if (folder / INDEX).exists():
        raise ValueError(f"{INDEX}: an encoder of this size has one model.safetensors")


def load_tensors(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """The tensors in a .pth or .th file (under `key`), and nothing else: a pickle that names
    anything else is refused, and so is a file that would unpack to far more than its size.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as packed:
                size = sum(entry.file_size for entry in packed.infolist())
            if size > path.stat().st_size + 2**20:
                raise ValueError(f"it unpacks to {size:,} bytes")
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state[key] if key else state
        if not isinstance(state, dict):
            raise ValueError("it holds no named tensors")
        if not all(isinstance(name, str) and isinstance(x, Tensor) for name, x in state.items()):
            raise ValueError("it contains more than named tensors")
    except pickle.UnpicklingError as error:  # whose own message advises to run the code
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it refers to {named[1]}, and could run code" if named else "no plain tensors"
        raise ValueError(
            f"{path} has no readable weights ({reason}): fetch it again, from its authors"
        ) from None
    except Exception as error:  # a damaged or hostile pickle makes torch raise of nearly every kind
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} has no readable weights ({reason[:300]}): fetch it again, from its authors"
        ) from error
    return dict(state)


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack `archive` into `folder`. It appears complete or not at all, and nothing is written
    outside it.
    """
    if not folder.is_dir():
        scratch = None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            scratch = tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-")
            with _Bounded(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                tar.extractall(scratch, filter=_only_files())
            os.chmod(scratch, 0o755)
            os.replace(scratch, folder)
        except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
            if scratch:
                shutil.rmtree(scratch, ignore_errors=True)
            if not folder.is_dir():  # else another process was first
                raise ValueError(
                    f"{archive} cannot be unpacked into {folder} "
                    f"({str(error)[:300]}): fetch it again, or unpack it by "
                    "hand"
                ) from error
    return folder


class _Bounded(gzip.GzipFile):
    """Reads an archive up to MOST_UNPACKED bytes: a small one can fill a disk."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MOST_AT_ONCE:
            raise tarfile.TarError(f"one of its headers has {size:,} bytes")
        data = super().read(size)
        if self.tell() > MOST_UNPACKED:
            raise tarfile.TarError(f"it holds more than {MOST_UNPACKED // 10**9} GB")
        return data


def _only_files() -> Callable:
    """tarfile's `data` filter for MOST_MEMBERS files and folders: no links, no devices, no sparse
    files, MOST_UNPACKED bytes in all."""
    members = size = 0

    def keep(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
        nonlocal members, size
        members, size = members + 1, size + member.size
        if not (member.isreg() or member.isdir()) or member.issparse():
            raise tarfile.TarError(f"{member.name[:80]!r} is neither a file nor a folder")
        if members > MOST_MEMBERS or size > MOST_UNPACKED:
            raise tarfile.TarError(
                f"it holds more than {MOST_UNPACKED // 10**9} GB"
                if size > MOST_UNPACKED
                else f"it holds more than {MOST_MEMBERS} files"
            )
        return tarfile.data_filter(member, folder)

    return keep


def cache_dir() -> Path:
    """$MINIGRPO_CACHE, or minigrpo in the user's cache folder."""
    if "MINIGRPO_CACHE" in os.environ:
        return Path(os.environ["MINIGRPO_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minigrpo"


def fingerprint(*parts: Path | str | list) -> str:
    """A hash that changes with the content of each file and each setting; part of the key of a
    cached score.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()[:32]
