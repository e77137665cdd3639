"""What radgraph 0.1.18 needs to run on transformers 5, in one place and ready for upstream.

Its copy of AllenNLP calls two tokenizer methods that transformers 5 removed. In upstream's code the
fix is one line each: `tokenizer.encode_plus(...)` becomes `tokenizer(...)`, and
`build_inputs_with_special_tokens(ids)` puts the special tokens around ids that the class has
already found (`single_sequence_start_tokens`, `single_sequence_end_tokens`). Here the same is given
to the tokenizers that radgraph makes, and to no other. Upstream should also declare `requests`,
which it imports.
"""

import warnings

from ..packages import how_to_install, need


def import_radgraph():
    """The radgraph package, patched. ValueError if it is not installed, or does not fit what is
    installed.
    """
    need("RadGraph", "radgraph", "requests")  # radgraph does not say that it needs the latter
    try:
        with warnings.catch_warnings():  # it turns all DeprecationWarnings on, for everybody
            import radgraph
            from radgraph.allennlp.common import cached_transformers
    except ImportError as error:
        raise ValueError(
            f"radgraph cannot be imported ({error}): {how_to_install('radgraph')}"
        ) from error
    if not getattr(cached_transformers, "mended", False):
        get_tokenizer = cached_transformers.get_tokenizer
        cached_transformers.get_tokenizer = lambda name, **kwargs: mend(
            get_tokenizer(name, **kwargs)
        )
        cached_transformers.mended = True
    return radgraph


def mend(tokenizer):
    """The tokenizer with the two methods of transformers 4 that radgraph calls."""
    if not hasattr(tokenizer, "encode_plus"):
        tokenizer.encode_plus = tokenizer.__call__
    if not hasattr(tokenizer, "build_inputs_with_special_tokens"):
        start, end = special_tokens(tokenizer)
        tokenizer.build_inputs_with_special_tokens = lambda ids: [*start, *ids, *end]
    return tokenizer


def special_tokens(tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text."""
    bare, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    at = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return full[:at], full[at + len(bare) :]
