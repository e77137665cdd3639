"""Rewards against slow oracles, and the ways in which a policy would cheat them."""

import doctest
import itertools
import json
import math
import os
import random
import re
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.gleu_score import sentence_gleu

from minigrpo.data import Sample
from minigrpo.rewards import REWARDS, Scores, dice, gleu, length, reward_fn, soft_f1
from minigrpo.rewards.grounding import iou_matrix, match

HEART = [0.3, 0.4, 0.7, 0.8]
coordinate = st.integers(-2, 22).map(lambda value: value / 20)
boxes = st.lists(st.tuples(*[coordinate] * 4), max_size=4)


def report(answer="no pleural effusion", **other):
    return Sample("r", None, "report", "Report.", answer, **other)


def grounding(*reference):
    return Sample("g", None, "grounding", "Where?", "", boxes=list(reference))


def slow_iou(a, b):
    for x1, y1, x2, y2 in (a, b):
        if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
            return 0.0
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area_a, area_b = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (area_a + area_b - width * height)


def slow_total(predicted, reference):
    """The largest matched IoU, by trying every assignment."""
    few, many = sorted((predicted, reference), key=len)
    return max(sum(map(slow_iou, few, order)) for order in itertools.permutations(many, len(few)))


@given(boxes, boxes)
@settings(max_examples=120, deadline=None)
def test_grounding_rewards_equal_the_exhaustive_matching(predicted, reference):
    iou = iou_matrix(predicted, reference)
    assert iou.shape == (len(predicted), len(reference))
    assert np.allclose(
        iou,
        np.reshape([slow_iou(a, b) for a in predicted for b in reference], iou.shape),
        atol=1e-12,
    )
    if not predicted or not reference:
        assert soft_f1(predicted, reference) == dice(predicted, reference) == 0
        return
    total = slow_total(predicted, reference)
    assert math.isclose(match(predicted, reference).sum(), total, abs_tol=1e-9)
    assert math.isclose(
        dice(predicted, reference), 2 * total / (len(predicted) + len(reference)), abs_tol=1e-9
    )
    false_positives = len(predicted) - len(match(predicted, reference))
    precision = total / (total + false_positives) if total else 0
    recall = total / len(reference)
    expected = 2 * precision * recall / (precision + recall) if total else 0
    assert math.isclose(soft_f1(predicted, reference), expected, abs_tol=1e-9)


def test_known_values():
    half = [0.3, 0.4, 0.5, 0.8]  # IoU 0.5 with HEART
    assert soft_f1([HEART], [HEART]) == dice([HEART], [HEART]) == 1
    assert math.isclose(soft_f1([half], [HEART]), 2 * 0.5 / 1.5) and math.isclose(
        dice([half], [HEART]), 0.5
    )
    assert math.isclose(soft_f1([HEART, [0, 0, 0.1, 0.1]], [HEART]), 2 / 3)  # one false positive


@pytest.mark.parametrize(
    "bad",
    [
        [0.7, 0.8, 0.3, 0.4],
        [0.3, 0.4, 0.7, 8],
        [-0.3, 0.4, 0.7, 0.8],
        [0.3, 0.4, 0.3, 0.8],
        [1e308, -1e308, 1e308, 1e308],
    ],
)
def test_improper_box_is_a_false_positive(bad):
    assert soft_f1([bad], [HEART]) == 0
    assert math.isclose(soft_f1([HEART, bad], [HEART]), 2 / 3) and math.isclose(
        dice([HEART, bad], [HEART]), 2 / 3
    )


def test_soft_f1_loophole_that_dice_closes():
    """A box that overlaps a free reference by 1% is no false positive: guessing pays under soft F1,
    not under dice.
    """
    sliver = [0.0, 0.0, 0.1, 0.11]
    other = [0.09, 0.1, 0.5, 0.5]  # the second reference, which the sliver barely touches
    assert 0 < iou_matrix([sliver], [other])[0, 0] < 0.01
    honest, junk = [HEART], [HEART, sliver]
    assert soft_f1(junk, [HEART, other]) > soft_f1(honest, [HEART, other])
    assert dice(junk, [HEART, other]) < dice(honest, [HEART, other])


def test_silence_is_right_where_there_is_nothing_to_find():
    box, absent = "At [0.3, 0.4, 0.7, 0.8].", "There is no nodule."
    empty, found = grounding(), grounding(HEART)
    assert reward_fn("dice_or_none")([absent, box, "", " "], [empty] * 4).values == [1, 0, 0, 0]
    # a broken think block is an empty answer, and so no silence
    assert reward_fn("dice_or_none")([f"<think>{absent}"], [empty]).values == [0]
    answers = [absent, box, box + " [0, 0, 1, 1]"]
    assert (
        reward_fn("dice_or_none")(answers, [found] * 3).values
        == reward_fn("dice")(answers, [found] * 3).values
        == [0, 1, 2 / 3]
    )
    for name in ("soft_f1", "dice"):  # the paper's gives nothing to either
        assert reward_fn(name)([absent, box], [empty] * 2).values == [0, 0]
    assert reward_fn("format")([absent, box, ""], [empty] * 3).values == [1, 0, 0]


words = st.lists(
    st.sampled_from(["no", "pleural", "effusion", "is", "seen.", "The"]), max_size=14
).map(" ".join)


@given(words, words)
@settings(max_examples=150, deadline=None)
def test_gleu_equals_nltk(prediction, reference):
    if not prediction or not reference:
        assert gleu(prediction, reference) == 0
    else:
        assert (
            abs(
                gleu(prediction, reference) - sentence_gleu([reference.split()], prediction.split())
            )
            < 1e-12
        )


def test_gleu_ignores_nothing_but_white_space():
    assert gleu(" no\n pleural\teffusion", "no pleural effusion") == 1
    assert gleu("No", "no") == gleu("", "no") == gleu("no", "") == gleu("", "") == 0


def test_bare_name_covers_the_tasks_it_applies_to():
    assert reward_fn("gleu").tasks == {"report", "classification", "conversation"}
    assert reward_fn("soft_f1").tasks == reward_fn(" dice ").tasks == {"grounding"}
    assert reward_fn("0.9*gleu+0.1*soft_f1").tasks == {
        "report",
        "classification",
        "conversation",
        "grounding",
    }
    assert reward_fn("grounding=soft_f1").tasks == {"grounding"}


def test_sums_per_task_and_parts():
    answers, samples = ["no effusion", "[0.3, 0.4, 0.5, 0.8]"], [report(), grounding(HEART)]
    scores = reward_fn(" report = gleu , grounding = 0.5 * soft_f1 + 0.25*dice ")(answers, samples)
    expected = [gleu(answers[0], samples[0].answer), 0.5 * 2 / 3 + 0.25 * 0.5]
    assert np.allclose(scores.values, expected) and scores.valid == [True, True]
    assert math.isnan(scores.parts["gleu"][1]) and math.isnan(scores.parts["dice"][0])
    assert np.allclose(
        [scores.parts["gleu"][0], scores.parts["soft_f1"][1], scores.parts["dice"][1]],
        [expected[0], 2 / 3, 0.5],
    )
    bare = reward_fn("0.9*gleu+0.1*soft_f1")(answers, samples)
    assert np.allclose(bare.values, [0.9 * expected[0], 0.1 * 2 / 3])


def test_thinking_is_not_scored_and_a_broken_block_gets_the_floor():
    where = "[0.3, 0.4, 0.7, 0.8]"
    answers = [
        where,
        f"<think>[0, 0, 1, 1]?</think>{where}",
        f"<think>{where}",
        f"x</think>{where}",
        "nowhere",
    ]
    assert reward_fn("soft_f1")(answers, [grounding(HEART)] * 5).values == [1, 1, 0, 0, 0]
    assert reward_fn("soft_f1", template_opens_think=True)(
        answers[:4], [grounding(HEART)] * 4
    ).values == [0, 0, 0, 1]
    text = "no pleural effusion"
    written = [text, f"<think>a</think>{text}", f"<think>{text}"]
    assert reward_fn("gleu")(written, [report(text)] * 3).values == [1, 1, 0]


def test_box_scale():
    assert reward_fn("dice", box_scale=1000)(
        ["[300, 400, 700, 800]"], [grounding(HEART)]
    ).values == [1]


@pytest.fixture
def user_module(monkeypatch):
    module = types.ModuleType("user_rewards")
    module.length = lambda answers, samples: [len(answer) for answer in answers]
    module.holes = lambda answers, samples: [None, math.nan, math.inf, np.float32(0.5)]
    module.short = lambda answers, samples: [1.0]
    module.full = lambda answers, samples: Scores([1.0, 2.0], [True, False], {"inner": [3.0, 4.0]})
    module.constant = 3
    monkeypatch.setitem(sys.modules, "user_rewards", module)


def test_user_reward_gets_answers_as_written(user_module):
    reward = reward_fn("gleu+0.1*user_rewards:length")
    scores = reward(["<think>a</think> no", "[0, 0, 1, 1]"], [report("no"), grounding(HEART)])
    assert np.allclose(scores.values, [1 + 1.9, 1.2]) and scores.parts["user_rewards:length"] == [
        19,
        12,
    ]
    assert reward.tasks == {"report", "grounding", "classification", "conversation"}


def test_none_and_nan_mean_could_not_be_scored(user_module):
    scores = reward_fn("report=gleu+user_rewards:holes")(
        ["no pleural effusion"] * 4, [report()] * 4
    )
    assert scores.valid == [False, False, False, True] and scores.values == [0, 0, 0, 1.5]
    assert scores.parts["gleu"] == [1, 1, 1, 1]


def test_user_scores_keep_their_parts(user_module):
    scores = reward_fn("user_rewards:full")(["a", "b"], [report()] * 2)
    assert (scores.values, scores.valid) == ([1, 0], [True, False])
    assert scores.parts == {"user_rewards:full": [1, 2], "user_rewards:full.inner": [3, 4]}


@pytest.mark.parametrize(
    "spec, wrong, mend",
    [
        ("glue", "unknown reward 'glue'", "did you mean 'gleu'?"),
        ("", "unknown reward ''", "known: gleu, soft_f1, dice"),
        ("report=glue", "unknown reward 'glue'", "known: gleu, soft_f1, dice"),
        ("reprot=gleu", "unknown task 'reprot'", "did you mean 'report'?"),
        ("gleu,grounding=dice", "'gleu' has no task", "write task=reward"),
        ("report=gleu,report=gleu", "report appears twice", "join its rewards with +"),
        ("gleu+0.5*gleu", "'gleu' appears twice", "add up its weights"),
        ("x*gleu", "bad weight 'x'", "0.5*gleu"),
        ("nan*gleu", "bad weight 'nan'", "0.5*gleu"),
        ("0*gleu", "bad weight '0'", "a number other than 0"),
        ("*gleu", "bad weight ''", "0.5*gleu"),
        ("report=soft_f1", "'soft_f1' cannot score report", "choose from gleu"),
        ("grounding=gleu", "'gleu' cannot score grounding", "choose from soft_f1, dice"),
        ("no_module_here:f", "cannot load 'no_module_here:f'", "PYTHONPATH"),
        ("user_rewards:f", "cannot load 'user_rewards:f'", "module:function"),
        ("user_rewards:", "cannot load 'user_rewards:'", "module:function"),
        (":f", "cannot load ':f'", "module:function"),
        (
            "user_rewards:constant",
            "'user_rewards:constant' is not a function",
            "takes (answers, samples)",
        ),
    ],
)
def test_refuses_a_bad_spec(user_module, spec, wrong, mend):
    with pytest.raises(ValueError) as error:
        reward_fn(spec)
    assert (
        f"--reward {spec!r}: " in str(error.value)
        and wrong in str(error.value)
        and mend in str(error.value)
    )


def test_a_module_in_the_folder_is_found_and_hides_nothing(tmp_path, monkeypatch):
    """Bug: the script `minigrpo` has its own folder first on sys.path, not the user's."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lies_here.py").write_text(
        "def reward(answers, samples):\n    return [2.0] * len(answers)\n"
    )
    assert reward_fn("lies_here:reward")(["a"], [report()]).values == [2.0]
    assert sys.path[-1] == str(tmp_path) and str(tmp_path) not in sys.path[:-1]


def test_refuses_bad_calls(user_module):
    with pytest.raises(ValueError, match="2 answers for 1 samples: repeat each sample"):
        reward_fn("gleu")(["a", "b"], [report()])
    with pytest.raises(
        ValueError, match="scores grounding, but sample 'r' is report: leave such samples out"
    ):
        reward_fn("dice")(["a"], [report()])
    with pytest.raises(
        ValueError, match="'user_rewards:short' gave 1 values for 2 answers: return one for each"
    ):
        reward_fn("user_rewards:short")(["a", "b"], [report()] * 2)


def returning(monkeypatch, given):
    """The reward that gives this for two answers."""
    monkeypatch.setitem(
        sys.modules, "mine", types.SimpleNamespace(reward=lambda answers, samples: given)
    )
    return reward_fn("mine:reward")(["a", "b"], [report()] * 2)


@pytest.mark.parametrize(
    "given",
    [
        None,
        1.0,
        ["good", "bad"],
        {"a": 7, "b": 8},
        "12",
        b"12",
        {1.0, 2.0},
        frozenset({1, 2}),
        (x for x in (1.0, 2.0)),
        [[1.0], [2.0]],
        ["0.5", "1"],
        [1 + 2j, 3],
        {"a": 1, "b": 2}.values(),
        range(2),
        iter([1, 2]),
        map(float, "12"),
        np.ones((2, 1)),
        np.ones((1, 2)),
        np.float32(3),
        np.array(["1", "2"]),
        torch.ones(2, 1),
        torch.tensor(1.0),
        torch.ones(2, dtype=torch.complex64),
        [np.ones(1), np.ones(1)],
        [{}, {}],
        Scores([1, 2], [True, True], {"part": "12"}),
        Scores({1, 2}, [True, True]),
        Scores([1, 2], "ab"),
        Scores([1, 2], [True, True], {3: [1, 2]}),
        Scores([1, 2], [True, True], [[1, 2]]),
    ],
    ids=lambda given: type(given).__name__,
)
def test_a_reward_that_gives_no_list_of_numbers_is_named(monkeypatch, given):
    """Bug: the letters of "12", the keys of a dict and the members of a set were taken for scores;
    a forgotten `return` named nothing."""
    with pytest.raises(
        ValueError,
        match=r"reward 'mine:reward(\.\w+)?' gave .*: return (a list with a "
        r"number|\{name: a number)",
    ):
        returning(monkeypatch, given)


@pytest.mark.parametrize(
    "given",
    [
        [1, 2, 3],
        [1],
        [],
        (),
        np.ones(3),
        torch.ones(1),
        Scores([1], [True]),
        Scores([1, 2], [True]),
        Scores([1, 2], [True] * 2, {"part": [1]}),
    ],
)
def test_as_many_scores_as_answers(monkeypatch, given):
    """Bug: of Scores with too few marks of validity only zip complained."""
    with pytest.raises(
        ValueError,
        match=r"reward 'mine:reward(\.\w+)?' gave \d values for 2 answers: return "
        r"one for each",
    ):
        returning(monkeypatch, given)


@pytest.mark.parametrize(
    "given",
    [
        [0, 1],
        (0, 1.0),
        [False, True],
        np.array([0, 1]),
        np.array([0, 1], np.float16),
        np.array([False, True]),
        torch.tensor([0.0, 1.0]),
        torch.tensor([0, 1], dtype=torch.bfloat16, requires_grad=False),
        torch.tensor([0.0, 1.0], requires_grad=True),
        [np.float32(0), np.int8(1)],
        [np.bool_(False), torch.tensor(1.0)],
        [torch.tensor(False), torch.tensor(1)],
        [Fraction(0), Fraction(1)],
        Scores(np.array([0, 1]), np.array([True, True]), {"part": torch.tensor([2, 3])}),
        Scores(torch.tensor([0.0, 1.0]), torch.tensor([1, 1])),
        Scores((0, np.float64(1)), [np.True_, True], {"part": [np.float32(2), None]}),
    ],
    ids=lambda given: f"{type(given).__name__}-{str(given)[:30]}",
)
def test_vectors_of_numbers_are_scores(monkeypatch, given):
    """Bug: what NumPy or torch made was kept as it was in Scores, and no JSON line of the step
    could be written."""
    scores = returning(monkeypatch, given)
    assert scores.values == [0.0, 1.0] and scores.valid == [True, True]
    assert {type(x) for x in scores.values} == {float} and {type(x) for x in scores.valid} == {bool}
    assert all(type(x) is float for values in scores.parts.values() for x in values)
    json.dumps([scores.values, scores.valid, scores.parts], allow_nan=True)


@pytest.mark.parametrize(
    "bad",
    [None, math.nan, math.inf, np.float32("nan"), torch.tensor(math.inf), 10**400, 1e300, -1e16],
)
def test_what_no_group_can_compare_is_not_scored(monkeypatch, bad):
    """Bug: 1e300 is infinite in fp32, and made its whole group NaN; an int of 400 digits was an
    OverflowError."""
    scores = returning(monkeypatch, [bad, 0.5])
    assert scores.valid == [False, True] and scores.values == [0.0, 0.5]


def test_a_half_that_raises_does_not_make_scores_of_the_other_s_dict(monkeypatch):
    """Bug: once a call had raised, whatever its halves gave was strung together unread."""

    def reward(answers, samples):
        return {1.0: "", 2.0: ""} if "boom" not in answers else 1 / 0

    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(reward=reward))
    with pytest.raises(ValueError, match="reward 'mine:reward' gave dict"):
        reward_fn("mine:reward")(["a", "b", "boom", "c"], [report()] * 4)


def test_parts_and_errors_outlive_a_failure(monkeypatch):
    def reward(answers, samples):
        n = len(answers)
        if "boom" in answers:
            raise OSError("boom")
        return Scores([1.0] * n, [True] * n, {"inner": [2.0] * n}, ["slow"])

    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(reward=reward))
    scores = reward_fn("mine:reward")(["a", "b", "boom", "c"], [report()] * 4)
    assert scores.valid == [True, True, False, True]
    assert scores.errors == ["mine:reward: OSError: boom", "mine:reward: slow"]
    assert [x == 2 for x in scores.parts["mine:reward.inner"]] == [True, True, False, True]


@pytest.mark.parametrize(
    "end",
    [
        lambda: sys.exit(0),
        lambda: sys.exit("bye"),
        lambda: exec("raise GeneratorExit"),
        lambda: exec("raise KeyboardInterrupt"),
    ],
)
def test_a_reward_that_ends_the_program_is_named(monkeypatch, end):
    """Bug: `sys.exit(0)` in a reward ended the run with code 0 and without final/."""
    monkeypatch.setitem(
        sys.modules, "mine", types.SimpleNamespace(reward=lambda answers, samples: end())
    )
    with ThreadPoolExecutor(1) as pool:  # on the main thread it is the user's Ctrl-C
        scores = pool.submit(reward_fn("mine:reward"), ["a"], [report()]).result()
    assert scores.valid == [False]
    assert re.match("mine:reward: (SystemExit|GeneratorExit|KeyboardInterrupt): ", scores.errors[0])


def test_ctrl_c_is_the_user_s(monkeypatch):
    def reward(answers, samples):
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(reward=reward))
    with pytest.raises(KeyboardInterrupt):
        reward_fn("mine:reward")(["a"], [report()])


@pytest.mark.parametrize(
    "leave",
    [
        lambda place: os.chdir(place),
        lambda place: (os.chdir(place), 1 / 0),
        lambda place: (os.chdir(place), place.rmdir(), [1.0])[2],
    ],
)
def test_a_reward_that_leaves_the_working_directory(monkeypatch, tmp_path, leave):
    """Bug: the files that a run wrote by a relative path went where the reward had gone."""
    here = os.getcwd()
    (tmp_path / "away").mkdir()

    def reward(answers, samples):
        return leave(tmp_path / "away") or [1.0]

    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(reward=reward))
    with pytest.warns(
        UserWarning,
        match="reward 'mine:reward' changed the working directory from .* to .*: it has "
        "been restored",
    ):
        reward_fn("mine:reward")(["a"], [report()])
    assert os.getcwd() == here


@pytest.mark.parametrize(
    "code, reason",
    [
        ("def f(:", "SyntaxError: "),
        ("1 / 0", "ZeroDivisionError: "),
        ("import no_such_thing", "No module named 'no_such"),
    ],
)
def test_a_reward_s_module_that_fails_is_named(tmp_path, monkeypatch, code, reason):
    """Bug: a traceback; or, where it imports what is not there, the advice to write
    module:function.
    """
    (tmp_path / "broken_rewards.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError) as error:
        reward_fn("broken_rewards:f")
    assert reason in str(error.value) and str(error.value).endswith("correct broken_rewards")


def test_rows_are_scored_alone():
    """Order and neighbours change nothing: the value belongs to the answer."""
    rng = random.Random(0)
    pairs = [(" ".join(rng.choices("ab c".split(), k=5)), report("a b c")) for _ in range(6)]
    pairs += [(f"[{rng.random()}, 0, 1, {rng.random()}]", grounding(HEART)) for _ in range(6)]
    reward = reward_fn("gleu+soft_f1")
    alone = [reward([answer], [sample]).values[0] for answer, sample in pairs]
    order = rng.sample(range(12), 12)
    assert reward(*map(list, zip(*(pairs[i] for i in order)))).values == [alone[i] for i in order]


@pytest.mark.parametrize(
    "answer, question, template_opens_think, task, value",
    [
        ("No effusion.", "Report.", False, "report", 1),
        ("", "Report.", False, "report", 0),
        ("<think>a</think>No effusion.", "Report.", False, "report", 1),
        ("<think>a</think>", "Report.", False, "report", 0),
        ("<think>a</think><think>b</think>No effusion.", "Report.", False, "report", 0),
        ("<think>a No effusion.", "Report.", False, "report", 0),
        ("No effusion.", "Report. /think", False, "report", 0),  # asked to think, and did not
        ("<think>a</think>No effusion.", "Report. /think", False, "report", 1),
        ("a</think>No effusion.", "Report.", True, "report", 1),
        ("No effusion.", "Report.", True, "report", 0),
        ("[0.1, 0.1, 0.2, 0.2]", "Where?", False, "grounding", 1),
        ("nowhere", "Where?", False, "grounding", 0),
        # boxes that overlap nothing
        ("[0.2, 0.2, 0.1, 0.1] [0, 0, 7, 7]", "Where?", False, "grounding", 0),
        ("<think>[0.1, 0.1, 0.2, 0.2]</think>nowhere", "Where?", False, "grounding", 0),
    ],
)
def test_format(answer, question, template_opens_think, task, value):
    sample = Sample("s", None, task, question, "x", boxes=[HEART] if task == "grounding" else [])
    assert reward_fn("format", template_opens_think=template_opens_think)(
        [answer], [sample]
    ).values == [value]


def test_length_is_the_share_of_words_in_either_direction():
    assert [
        length(*pair)
        for pair in (("a b", "c d"), ("a", "c d"), ("a b c d", "e"), ("", "a"), ("a", ""))
    ] == [1, 0.5, 0.25, 0, 0]
    assert reward_fn("0.9*gleu+0.1*length")(["no pleural effusion"], [report()]).values == [
        pytest.approx(1.0)
    ]
    assert reward_fn("length")(["<think>some words</think>no pleural"], [report()]).values == [
        pytest.approx(2 / 3)
    ]


def test_step_of_4096_answers_takes_under_two_seconds():
    """GLEU on reports and soft F1 on boxes. CPU seconds, so that a busy machine does not fail
    it.
    """
    from benchmarks.rewards import light_step

    assert light_step(4096)["seconds_step"] < 2


@pytest.mark.parametrize("name", ["gleu", "length", "soft_f1", "dice", "dice_or_none", "format"])
@given(
    st.text(max_size=60)
    | st.lists(
        st.sampled_from(["[", "0.5", ",", "]", "1e999", "<think>", "</think>", "\x00"]), max_size=30
    ).map(" ".join)
)
@settings(max_examples=60, deadline=None)
def test_any_text_gets_a_finite_reward_in_range(name, answer):
    sample = grounding(HEART) if name in ("soft_f1", "dice", "dice_or_none") else report()
    scores = reward_fn(name)([answer], [sample])
    assert scores.valid == [True] and 0 <= scores.values[0] <= 1


PAGE = (Path(__file__).parent.parent / "docs/rewards.md").read_text()


def test_page_lists_every_reward_with_its_tasks():
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in PAGE.splitlines()
        if re.match(r"\| `\w+`", line)
    ]
    told = {
        name: row[1] for row in rows for name in re.findall(r"`(\w+)`", row[0]) if len(row) == 7
    }
    short = {
        "text": {"report", "classification", "conversation"},
        "all": {"report", "classification", "conversation", "grounding"},
    }
    assert {name: short.get(tasks, {tasks}) for name, tasks in told.items()} == {
        name: tasks for name, (_, tasks) in REWARDS.items()
    }


def test_every_reward_states_its_range_and_floor():
    assert [
        name for name, (function, _) in REWARDS.items() if "floor" not in function.__doc__.lower()
    ] == []


def test_examples_of_the_page_run(monkeypatch):
    example = doctest.DocTestParser().get_doctest(
        re.search(r"```pycon\n(.*?)```", PAGE, re.S)[1], {}, "rewards", None, 0
    )
    assert doctest.DocTestRunner().run(example).failed == 0
    module = types.ModuleType("my_rewards")
    exec(re.search(r"```python\n(.*?)```", PAGE, re.S)[1], module.__dict__)
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    samples = [report(label="Edema"), report(label="Edema"), report()]
    scores = reward_fn("my_rewards:mentions_the_label")(["mild edema", "clear", "edema"], samples)
    assert scores.values == [1, 0, 0] and scores.valid == [True, True, False]
