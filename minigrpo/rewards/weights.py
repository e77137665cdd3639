"""Where the clinical scorers' weights come from: a folder that you name (--reward_weights), or the Hugging Face hub.

The folder holds the files as they are published; each scorer asks for those it needs and says what is missing:

    DIR/radgraph-xl.tar.gz       RadGraph-XL, 416 MB (unpacked beside it on first use); radgraph.tar.gz is RadGraph 1.0
    DIR/chexbert.pth             CheXbert, 1.31 GB
    DIR/<encoder>/               a folder for each encoder that these name: config.json and tokenizer, for BERTScore the
                                 weights too: bert-base-uncased, distilroberta-base, distilbert-base-uncased, ...
"""

import hashlib
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import hf_hub_download

T = TypeVar("T")

MOST_UNPACKED = 10**10  # bytes of an archive's files; RadGraph's have about half a GB
REPO = "StanfordAIMI/RRG_scorers"  # holds the files of SIZES, tagged MIT
SIZES = {"radgraph-xl.tar.gz": "416 MB", "radgraph.tar.gz": "a BERT, hundreds of MB", "chexbert.pth": "1.31 GB"}


def find_file(weights_dir: str | None, name: str) -> Path:
    """The file `name` of SIZES, from the folder or the hub. ValueError: what is missing, how large it is, where to put it."""
    if weights_dir is None:
        try:
            return Path(hf_hub_download(REPO, name))
        except Exception as error:  # offline, no such host, no space: the hub raises a dozen kinds, the mend is one
            raise ValueError(f"{name} ({SIZES[name]}) could not be fetched from {REPO} on the Hugging Face hub "
                             f"({type(error).__name__}): fetch it elsewhere, put it into a folder DIR, and give --reward_weights DIR") from error
    path = Path(weights_dir) / name
    if not path.is_file():
        raise ValueError(f"{path} is missing: fetch {name} ({SIZES[name]}) from {REPO} on the Hugging Face hub and put it there")
    return path


def load_encoder(weights_dir: str | None, name: str, load: Callable[[str], T], size: str) -> T:
    """`load(folder or hub name)` of the encoder `name`, which transformers' from_pretrained takes. `size` says what it holds."""
    source = name if weights_dir is None else str(Path(weights_dir) / name.split("/")[-1])
    if weights_dir is not None and not os.path.isdir(source):
        raise ValueError(f"{source} is missing: fetch the files of {name} ({size}) from the Hugging Face hub and put them there")
    try:
        return load(source)
    except (OSError, ValueError) as error:
        mend = "fetch its files again" if weights_dir else \
            f"put its files into a folder DIR/{name.split('/')[-1]}, and give --reward_weights DIR"
        raise ValueError(f"{source} ({size}) could not be loaded ({str(error).splitlines()[0]}): {mend}") from error


def unpack(archive: Path, folder: Path) -> Path:
    """`folder` with what `archive` holds. It appears whole or not at all, and nothing is written outside it."""
    if not folder.is_dir():
        scratch = None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            scratch = tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-")
            with tarfile.open(archive, "r:gz") as tar:
                tar.extractall(scratch, filter=_bounded(MOST_UNPACKED))
            os.chmod(scratch, 0o755)
            os.replace(scratch, folder)
        except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
            if scratch:
                shutil.rmtree(scratch, ignore_errors=True)
            if not folder.is_dir():  # else another process was first
                raise ValueError(f"{archive} cannot be unpacked into {folder} ({error}): fetch it again, or unpack it by "
                                 "hand") from error
    return folder


def _bounded(most: int) -> Callable:
    """tarfile's `data` filter, until the members are more than `most` bytes in all: a small archive can hold a full disk."""
    left = most

    def keep(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
        nonlocal left
        left -= member.size
        if left < 0:
            raise tarfile.TarError(f"it holds more than {most // 10**9} GB")
        return tarfile.data_filter(member, folder)
    return keep


def cache_dir() -> Path:
    """$MINIGRPO_CACHE, or minigrpo in the user's cache folder."""
    if "MINIGRPO_CACHE" in os.environ:
        return Path(os.environ["MINIGRPO_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minigrpo"


def fingerprint(*parts: Path | str | list) -> str:
    """Changes with the content of each file and with each setting: what a cached score belongs to."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()[:32]
