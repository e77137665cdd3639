"""Optional packages, and how to install them. It imports none of them."""

import re
import shlex
from importlib import metadata
from importlib.util import find_spec

from minigrpo.programs import CLONE

# pip's name for a package that is imported under another name, or that works in only one version.
PIP = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "rouge_score": "rouge-score",
    "radgraph": "radgraph==0.1.18",
}
# The extra of minigrpo that brings it.
EXTRAS = {
    "peft": "lora",
    "pydicom": "dicom",
    "radgraph": "clinical",
    "requests": "clinical",
    "tensorboard": "track",
    "wandb": "track",
}


class MissingPackage(ModuleNotFoundError, ValueError):
    """A package that the user's request needs. It is also a ValueError: programs end with its
    message, as with any input error.
    """


def need(purpose: str, *packages: str) -> None:
    """MissingPackage for the first of the packages (their import names) that is not installed;
    `purpose` is what needs it."""
    for package in packages:
        if find_spec(package) is None:
            raise MissingPackage(
                f"{purpose} needs {package}: {how_to_install(package)}", name=package
            )


def how_to_install(package: str) -> str:
    text = f"pip install {PIP.get(package, package)}"
    if extra := EXTRAS.get(package):
        text += (
            f", or pip install -e '.[{extra}]' in the clone"
            if CLONE
            else f", or pip install 'minigrpo[{extra}]'"
        )
    return text


def explain(error: ModuleNotFoundError) -> str:
    """What to type after an import has failed; raises the error again if the cause is not a missing
    package.
    """
    package = (error.name or "").partition(".")[0]
    if isinstance(error, MissingPackage):
        return str(error)
    if package in ("", "minigrpo") or find_spec(package):
        raise error
    absent = left_out()
    return f"{package} is not installed: " + (
        f"{shlex.join(['pip', 'install', *absent])}, which `pip install --no-deps` left out"
        if absent
        else how_to_install(package)
    )


def left_out() -> list[str]:
    """What a plain `pip install` of minigrpo would have installed and is missing; empty for a clone
    that pip does not know.
    """
    absent = []
    try:
        requirements = [
            text for text in metadata.requires("minigrpo") or [] if "extra ==" not in text
        ]
    except metadata.PackageNotFoundError:
        return []
    for requirement in requirements:
        try:
            metadata.version(re.match(r"[\w.-]+", requirement)[0])
        except metadata.PackageNotFoundError:
            absent.append(requirement)
    return absent
