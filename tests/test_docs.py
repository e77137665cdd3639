"""What docs/ says is true: lines that it quotes, tests and arguments that it names, numbers that it
prints.

A reference to a line is a link and what stands there, with the function that it is in:
[`train_grpo.py`, `main`](../train_grpo.py) `policy.encode(samples)`.
`python tests/test_docs.py --fix` writes the table of KL estimators and docs/api.md anew.
"""

import ast
import doctest
import re
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/algorithm.md"
REFERENCE = re.compile(r"\[`([\w./]+)`,\s+`([\w.]+)`\]\(\.\./([\w./]+)\)\s+`([^`]+)`")
TABLE = re.compile(r"(?<=<!-- kl table -->\n).*?(?=\n<!-- end -->)", re.S)


def source_of(path, name):
    """The lines of a function, a method (Class.name) or a function inside another (outer.inner)."""
    text = (ROOT / path).read_text()
    node = ast.parse(text)
    for part in name.split("."):
        node = next(
            child
            for child in ast.walk(node)
            if isinstance(child, ast.FunctionDef | ast.ClassDef) and child.name == part
        )
    return ast.get_source_segment(text, node)


def fix():
    sys.path.insert(0, str(ROOT))
    from tests.test_kl import table

    PAGE.write_text(TABLE.sub(lambda _: table(), PAGE.read_text()))
    API.write_text(api_page())


API = ROOT / "docs/api.md"
MODULES = ("loss", "logprob", "grpo", "generate", "encode")


def api_page():
    """docs/api.md: the public functions and classes of the algorithm's files, as they say it."""
    page = [
        "# The functions",
        "Made from the docstrings by `python tests/test_docs.py --fix`; a test compares. What they"
        " compute, line by line: [algorithm.md](algorithm.md).",
    ]
    for name in MODULES:
        source = (ROOT / f"minigrpo/{name}.py").read_text()
        tree = ast.parse(source)
        page.append(f"## [`minigrpo.{name}`](../minigrpo/{name}.py)")
        page.append(as_markdown(ast.get_docstring(tree).split("\n\n")[0]))
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name[0] == "_":
                continue
            page.append(f"### `{node.name}`")
            page.append(f"```python\n{signature(node, source.splitlines())}\n```")
            page.append(as_markdown(ast.get_docstring(node) or ""))
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                text = isinstance(method, ast.FunctionDef) and ast.get_docstring(method)
                if text and method.name[0] != "_":
                    head = signature(method, source.splitlines())
                    page.append(f"```python\n{head}\n```\n\n{as_markdown(text)}")
    return "\n\n".join(filter(None, page)) + "\n"


def signature(node, lines):
    """`def f(a: int) -> str`, or a class with its fields, each with its comment."""
    if isinstance(node, ast.FunctionDef):
        head = "\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1])
        return textwrap.dedent(head).removesuffix(":")
    fields = [lines[n.lineno - 1] for n in node.body if isinstance(n, ast.AnnAssign)]
    return "\n".join([f"class {node.name}" + ":" * bool(fields), *fields])


def as_markdown(text):
    """A docstring, whose arguments become a list."""
    before, args, after = text.partition("Args:\n")
    if args:
        args, _, after = after.partition("\n\n")
        items = re.sub(r"^ {4}(\w[\w, ]*): ", r"- `\1`: ", re.sub(r"\n {8}", " ", args), flags=re.M)
        before = f"{before}**Args**\n\n{items}\n\n"
    after = re.sub(r"^(Returns|Raises): ", r"**\1** ", re.sub(r"\n +", " ", after), flags=re.M)
    return (before + after).strip()


def test_the_api_page_is_what_the_docstrings_say():
    assert API.read_text() == api_page(), "python tests/test_docs.py --fix"


GUIDE = ROOT / "docs/guide.md"
REFERENCES = REFERENCE.findall(PAGE.read_text() + GUIDE.read_text())


@pytest.mark.parametrize("named, function, path, quote", REFERENCES)
def test_quoted_lines_stand_where_the_page_says(named, function, path, quote):
    assert named == path
    assert "".join(quote.split()) in "".join(source_of(path, function).split())


def test_no_reference_is_written_in_another_form():
    for page, least in ((PAGE.read_text(), 25), (GUIDE.read_text(), 15)):
        links = re.findall(r"\(\.\./[\w./]+\.py\)\s+`", page)
        assert len(REFERENCE.findall(page)) == len(links) > least and "#L" not in page


def test_named_tests_arguments_and_configs_exist():
    from train_grpo import GrpoArguments

    page, code = (
        PAGE.read_text(),
        "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py")),
    )
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 20 and named <= set(re.findall(r"def (test_\w+)\(", code))
    assert set(re.findall(r"--([a-z_]+)\b", page)) - {"fix"} <= {
        field.name for field in fields(GrpoArguments)
    }
    assert all(
        (ROOT / path).is_file() for path in re.findall(r"`((?:configs|minigrpo)/[\w./]+)`", page)
    )


def test_worked_example():
    """The code prints what the page says, and the table by hand holds the same numbers."""
    section, names = PAGE.read_text().split("## A worked example")[1].split("\n## ")[0], {}
    for block in re.findall(r"```pycon\n(.*?)```", section, re.S):
        example = doctest.DocTestParser().get_doctest(block, names, "worked example", str(PAGE), 0)
        assert doctest.DocTestRunner().run(example, clear_globs=False).failed == 0
        names.update(example.globs)
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in section.splitlines()
        if re.match(r"\| \d, \d", line)
    ]
    for column, name in enumerate(("ratio", "loss", "kl", "gradient"), start=-4):
        by_hand = torch.tensor([float(row[column]) for row in table], dtype=torch.float64)
        torch.testing.assert_close(by_hand, names[name][names["mask"]].detach(), atol=1e-4, rtol=0)


if __name__ == "__main__":
    fix() if sys.argv[1:] == ["--fix"] else sys.exit(__doc__)
