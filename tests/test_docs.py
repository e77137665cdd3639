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
sys.path.insert(0, str(ROOT))  # for --fix, which runs this file by itself

from minigrpo.loss import kl_penalty  # noqa: E402

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

    PAGE.write_text(TABLE.sub(lambda _: kl_table(), REFERENCE.sub(moved, PAGE.read_text())))


@pytest.mark.parametrize("name, line, path, anchor, quote", REFERENCE.findall(PAGE.read_text()))
def test_quoted_lines_stand_where_the_page_says(name, line, path, anchor, quote):
    assert (name, line) == (path, anchor)
    assert found_at(path, int(line), quote) == int(line), "python tests/test_docs.py --fix"


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


def kl_table():
    """Expected value and gradient of each estimator, by enumeration of a vocabulary of three."""
    pi, ref, old = (torch.tensor(p, dtype=torch.float64).log() for p in ((0.6, 0.3, 0.1), (0.3, 0.3, 0.4), (0.3, 0.4, 0.3)))
    logits = pi.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    forward, reverse = (logp.exp() * (logp - ref)).sum(), (ref.exp() * (ref - logp)).sum()  # KL(pi||ref), KL(ref||pi)
    gradient_of = lambda x: torch.autograd.grad(x, logits, retain_graph=True)[0]
    meanings = {"0": torch.zeros(3).double(), "∇KL(π‖ref)": gradient_of(forward), "∇KL(ref‖π)": gradient_of(reverse)}

    def meaning(gradient):
        return next((name for name, known in meanings.items() if torch.allclose(gradient, known, atol=1e-12)), "neither")

    rows = ["| as a loss | mean, on-policy | mean, off-policy | gradient, on-policy | is | off-policy is |", "|" + "---|" * 6]
    for name in ("k1", "k2", "k3", "ρ k1", "ρ k2", "ρ k3"):
        means, gradients = [], []
        for sampler in (pi, old):  # whose samples the mean is over; the gradient flows through the estimate alone
            ratio = (logp - sampler).exp() if name.startswith("ρ") else None
            means.append((sampler.exp() * kl_penalty(logp, ref, name[-2:], ratio)).sum())
            gradients.append(gradient_of(means[-1]))
        values = [f"{mean.item():.4f}" + " = KL" * torch.allclose(mean, forward, atol=1e-12) for mean in means]
        numbers = ", ".join(f"{x:.4f}" for x in (gradients[0].round(decimals=4) + 0.0).tolist())
        rows.append("| " + " | ".join([name, *values, f"({numbers})", *map(meaning, gradients)]) + " |")
    return "\n".join(rows)


def test_kl_table():
    assert TABLE.search(PAGE.read_text())[0] == kl_table(), "python tests/test_docs.py --fix"


if __name__ == "__main__":
    fix() if sys.argv[1:] == ["--fix"] else sys.exit(__doc__)
