"""A function of the user's own, named on the command line as module:function."""

import importlib
import os
import sys
from collections.abc import Callable

from minigrpo.packages import MissingPackage
from minigrpo.visible import text_of


def own_function(name: str, argument: str, takes: str) -> Callable:
    """The function that `name`, "module:function", is; the folder one stands in is looked through,
    too. ValueError says of which `argument` it is, what is wrong and how to mend it; `takes` names
    what the function is called with.
    """
    if os.getcwd() not in sys.path:
        # `minigrpo` is started elsewhere; last, so that no file here hides a package
        sys.path.append(os.getcwd())
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except MissingPackage as error:
        raise ValueError(f"{argument}: {error}") from error
    except Exception as error:  # a module of the user's own may fail in any way
        absent = (
            isinstance(error, AttributeError | ValueError) or getattr(error, "name", "") == module
        )
        mend = (
            "write module:function, and put the module's folder on PYTHONPATH"
            if absent
            else f"correct {module}"
        )
        raise ValueError(
            f"{argument}: cannot load {name!r} ({type(error).__name__}: {text_of(error)}): {mend}"
        ) from error
    if not callable(function):
        raise ValueError(f"{argument}: {name!r} is not a function: write one that takes {takes}")
    return function
