"""What docs/ says is true: lines that it quotes, tests and arguments that it names, numbers that it prints.

A reference to a line is a link and what stands there: [`train_grpo.py:92`](../train_grpo.py#L92) `policy.encode(samples)`.
`python tests/test_docs.py --fix` moves the numbers to where the quoted text now is (the nearest place, if there are
several) and writes the table of KL estimators anew.
"""

import doctest
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/algorithm.md"
REFERENCE = re.compile(r"\[`([\w./]+):(\d+)`\]\(\.\./([\w./]+)#L(\d+)\) `([^`]+)`")
TABLE = re.compile(r"(?<=<!-- kl table -->\n).*?(?=\n<!-- end -->)", re.S)


def found_at(path, line, quote):
    """Where `quote` stands in the file, nearest to `line`."""
    lines = (ROOT / path).read_text().splitlines()
    places = [n for n, text in enumerate(lines, start=1) if quote in text]
    return min(places, key=lambda n: abs(n - line), default=None)


def fix():
    def moved(match):
        _, line, path, _, quote = match.groups()
        now = found_at(path, int(line), quote)
        if now is None:
            print(f"nowhere in {path}: {quote}")
            return match[0]
        return f"[`{path}:{now}`](../{path}#L{now}) `{quote}`"

    sys.path.insert(0, str(ROOT))
    from tests.test_kl import table
    PAGE.write_text(TABLE.sub(lambda _: table(), REFERENCE.sub(moved, PAGE.read_text())))


@pytest.mark.parametrize("name, line, path, anchor, quote", REFERENCE.findall(PAGE.read_text()))
def test_quoted_lines_stand_where_the_page_says(name, line, path, anchor, quote):
    assert (name, line) == (path, anchor)
    assert found_at(path, int(line), quote) == int(line), "python tests/test_docs.py --fix"


def test_no_reference_is_written_in_another_form():
    page = PAGE.read_text()
    assert len(REFERENCE.findall(page)) == page.count("#L") > 25


def test_named_tests_arguments_and_configs_exist():
    from train_grpo import GrpoArguments
    page, code = PAGE.read_text(), "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 20 and named <= set(re.findall(r"def (test_\w+)\(", code))
    assert set(re.findall(r"--([a-z_]+)\b", page)) - {"fix"} <= {field.name for field in fields(GrpoArguments)}
    assert all((ROOT / path).is_file() for path in re.findall(r"`((?:configs|minigrpo)/[\w./]+)`", page))


def test_worked_example():
    """The code prints what the page says, and the table by hand holds the same numbers."""
    section, names = PAGE.read_text().split("## A worked example")[1].split("\n## ")[0], {}
    for block in re.findall(r"```pycon\n(.*?)```", section, re.S):
        example = doctest.DocTestParser().get_doctest(block, names, "worked example", str(PAGE), 0)
        assert doctest.DocTestRunner().run(example, clear_globs=False).failed == 0
        names.update(example.globs)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if re.match(r"\| \d, \d", line)]
    for column, name in enumerate(("ratio", "loss", "kl", "gradient"), start=-4):
        by_hand = torch.tensor([float(row[column]) for row in table], dtype=torch.float64)
        torch.testing.assert_close(by_hand, names[name][names["mask"]].detach(), atol=1e-4, rtol=0)


if __name__ == "__main__":
    fix() if sys.argv[1:] == ["--fix"] else sys.exit(__doc__)
