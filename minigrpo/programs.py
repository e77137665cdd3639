"""train_sft, train_grpo and evaluate as modules, `minigrpo.programs.train_sft`, wherever the three
files are.

In a clone they are beside the package. An install has them in minigrpo/programs/ (pyproject.toml),
since a module `evaluate` in site-packages would hide another package of that name.
"""

from pathlib import Path

_INSTALLED = Path(__file__).with_suffix("")
CLONE = (
    None if _INSTALLED.is_dir() else _INSTALLED.parent.parent
)  # the clone's folder; None in an install
__path__ = [
    str(CLONE or _INSTALLED)
]  # which makes this module a package: Python looks for train_sft.py there
