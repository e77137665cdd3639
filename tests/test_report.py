"""report.html: parsed as HTML everywhere, template_opens_think and sorted in a real browser where a
Chromium is found.
"""

import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from minigrpo.data import Sample
from minigrpo.metrics import evaluate_answers
from minigrpo.run import report
from minigrpo.run.report import differences, write_report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
ATTACK = """<script>document.title="owned"</script>'"><img src=x \
onerror="document.title='owned'"> &amp; {{ 7*7 }} </script>"""
VOID = {"meta", "input", "image", "use", "rect", "br", "img", "link"}


class Page(HTMLParser):
    """Every tag with its attributes, the text inside each article, and whether tags close in
    order.
    """

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.articles = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "article":
            self.articles.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "article" in self.open:
            self.articles[-1] += data


@pytest.fixture
def shown(tmp_path):
    """(path of the page, samples, answers, items): two questions on one film, a report on another,
    one without a film.
    """
    for name, size in (("a", (600, 300)), ("b", (100, 200))):
        Image.radial_gradient("L").resize(size).save(tmp_path / f"{name}.png")
    a, b = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    samples = [
        Sample(
            "g1",
            a,
            "grounding",
            "Where is the heart?",
            "At [0.1, 0.1, 0.5, 0.5].",
            boxes=[[0.1, 0.1, 0.5, 0.5]],
            label="heart",
        ),
        Sample(
            "g2",
            a,
            "grounding",
            "Where is the lung?",
            "At [0.5, 0.5, 1, 1].",
            boxes=[[0.5, 0.5, 1.0, 1.0]],
            label=ATTACK,
        ),
        Sample("r1", [b, a], "report", ATTACK, "No effusion. The heart is large.", source="x"),
        Sample("c1", None, "conversation", "What?", "Nothing.", turns=[["What?", "Nothing."]]),
    ]
    answers = [
        "[0.1, 0.1, 0.5, 0.45] \ud800",
        "[1e300, 0.2, -5, 0.4] [0.6, 0.5, 0.5, 0.1]",
        f"<think>{ATTACK}</think>The heart is large. {ATTACK}",
        "<think>broken",
    ]
    items = evaluate_answers(samples, answers)["items"]
    return (
        write_report(tmp_path / "report.html", samples, answers, items, title=ATTACK),
        samples,
        answers,
        items,
    )


def test_the_page_is_whole_and_holds_everything(shown):
    page = Page(shown[0].read_text())
    assert (
        len(page.articles) == 4
        and "Where is the heart?" in page.articles[0]
        and "no text" in page.articles[3]
    )
    assert "first of 2 films" in page.articles[2]
    assert (
        "think block is broken" in page.articles[3]
        and "think block is broken" not in page.articles[2]
    )
    tags = [tag for tag, _ in page.tags]
    # a film that two questions share is stored once
    assert tags.count("image") == 2 and tags.count("use") == 3
    rects = [attributes for tag, attributes in page.tags if tag == "rect"]
    assert [r["class"] for r in rects] == ["true", "found", "true", "found", "found"]
    # 448 x 224
    assert (rects[0]["x"], rects[0]["y"], rects[0]["width"], rects[0]["height"]) == (
        "44.8",
        "22.4",
        "179.2",
        "89.6",
    )
    # SVG draws no reversed box
    assert all(float(r[side]) >= 0 for r in rects for side in ("width", "height"))
    scores = [
        json.loads(attributes["data-scores"]) for tag, attributes in page.tags if tag == "article"
    ]
    assert (
        scores[0]["soft_f1"] == round(shown[3][0]["soft_f1"], 3)
        and 0 < scores[2]["gleu"] < 1
        and "bleu4" in scores[2]
    )


def test_nothing_is_fetched_and_no_text_is_markup(shown):
    text = shown[0].read_text()
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert (
        tags.count("script") == 1
        and "img" not in tags
        and "link" not in tags
        and "iframe" not in tags
    )
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    for _, attributes in page.tags:
        for name in ("src", "href", "action"):
            assert re.match(r"data:image/jpeg;base64,|#film\d+$", attributes.get(name, "#film0"))
    assert (
        "url(" not in text
        and "@import" not in text
        and "http" not in re.sub(r'http-equiv="Content', "", text)
    )
    assert "default-src 'none'" in text
    assert "".join(page.articles).count(ATTACK) == 4  # as label, question, thinking and answer
    assert "{{ 7*7 }}" in text


def test_differences():
    def words(side, flag):
        return [part["text"] for part in side if part["changed"] is flag]

    left, right = differences(
        "The heart is normal. No large effusion at [0.1, 0.2, 0.3, 0.4].",
        "Small effusion at [0, 0, 1, 1]. The HEART is normal!",
    )
    # the first sentence moved, the box is drawn
    assert words(left, True) == ["No large"] and words(right, True) == ["Small"]
    assert (
        " ".join(part["text"] for part in left).split()
        == "The heart is normal. No large effusion at [0.1, 0.2, 0.3, 0.4].".split()
    )
    assert differences("", "") == ([], []) and words(differences("", "a b")[1], True) == ["a b"]
    left, right = differences("No mass. No mass. Clear.", "No mass. Clear.")
    assert len(words(left, True)) == 1 and not words(right, True)  # said twice, found once
    for odd in ("[", "[[", "[a", "...", "\N{LINE SEPARATOR}"):
        differences(odd, "a " + odd)


def test_endless_texts_are_cut(shown):
    """Bug: comparing two texts of a megabyte took hours, and 20,000 boxes were as many elements."""
    began = time.process_time()
    for texts in (["a b " * 200_000] * 2, ["x" * 1_000_000, "y" * 1_000_000]):
        for pieces in differences(*texts):
            assert pieces[-1]["text"] == report.LEFT_OUT
            assert sum(len(piece["text"]) for piece in pieces) < 60_000
    sample = Sample("g", None, "grounding", "Where?", "There.", boxes=[[0.1, 0.2, 0.3, 0.4]])
    answer = " ".join(["[0.1, 0.2, 0.3, 0.4]"] * 20_000)
    card = report.card(sample, answer, {}, None, False, 1.0)
    assert len(card["boxes"]) == 200 and card["more_boxes"] == 19_801
    assert time.process_time() - began < 10


def test_the_file_stays_small(shown, tmp_path, monkeypatch):
    _, samples, answers, items = shown

    def one(i):
        return replace(samples[0], id=str(i), image=str(tmp_path / f"copy{i}.png"))

    for i in range(8):
        shutil.copy(samples[0].image, tmp_path / f"copy{i}.png")
    many = [one(i) for i in range(8)]
    film = len(report.small_film(samples[0], samples[0].image)["href"])
    monkeypatch.setattr(report, "BUDGET", 3 * film)
    page = Page(
        write_report(
            tmp_path / "small.html", many, answers[:1] * 8, items[:1] * 8, title="t"
        ).read_text()
    )
    assert len(page.articles) == 3
    page = Page(
        write_report(
            tmp_path / "count.html", many, answers[:1] * 8, items[:1] * 8, title="t", count=2
        ).read_text()
    )
    assert len(page.articles) == 2


def browse(path, tmp_path, script=""):
    """The page as Chromium has it after its scripts and `script` ran."""
    copy = tmp_path / "browsed.html"
    copy.write_text(path.read_text().replace("</body>", f"<script>{script}</script></body>"))
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        copy.as_uri(),
    ]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HOME": str(tmp_path)},
    ).stdout


def body_of(dom):
    """Attributes of the body of what a browser wrote."""
    found = []

    class Body(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag == "body":
                found.extend(attributes)

    Body().feed(dom)
    assert found, "the browser wrote no body"
    return dict(found)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium")
def test_a_browser_opens_sorts_and_filters_it(shown, tmp_path):
    script = """
    const told = (control) => control.dispatchEvent(new Event("input"));
    const set = (id, value) => {
        const control = document.getElementById(id);
        control.value = value;
        told(control);
    };
    const about = (article) => article.querySelector(".about").textContent.split(" ")[0];
    const ids = () => [...document.querySelectorAll("article:not([hidden])")].map(about).join();
    const out = {}; out.start = ids();
    set("sort", "length"); out.up = ids();
    down.checked = true;
    set("sort", "length"); out.down = ids();
    set("sort", "soft_f1"); out.f1 = ids();
    set("sort", "gleu"); out.gleu = ids();
    set("sort", ""); down.checked = false; set("sort", "");
    set("search", "THE LUNG"); out.search = ids(); set("search", "");
    const task = document.querySelector("select[data-field=task]");
    task.value = "report"; told(task);
    out.task = ids(); out.title = document.title;
    out.count = document.getElementById("shown").textContent;
    task.value = ""; told(task);
    const film = document.querySelector("use").getBoundingClientRect();
    out.film = [film.width > 300, film.height > 100];
    document.querySelector("svg.film").dispatchEvent(new MouseEvent("click", {bubbles: true}));
    out.large = document.querySelectorAll(".film.large").length;
    const box = document.querySelector("input.boxes[value=true]");
    box.checked = false; told(box);
    out.hidden = getComputedStyle(document.querySelector("rect.true")).display;
    document.body.dataset.out = JSON.stringify(out)"""
    dom = browse(shown[0], tmp_path, script)
    out = json.loads(body_of(dom)["data-out"])
    lengths = {item["id"]: item["length"] for item in shown[3]}
    assert out["start"] == "g1,g2,r1,c1" and out["up"].split(",") == sorted(
        lengths, key=lengths.get
    )
    assert out["down"].split(",") == sorted(lengths, key=lambda name: -lengths[name])
    # those without the score come last
    assert out["f1"].startswith("g1,g2,") and out["gleu"] == "r1,c1,g1,g2"
    assert out["search"] == "g2" and out["task"] == "r1" and out["count"] == "1"
    assert out["title"] == ATTACK != "owned"
    assert out["film"] == [True, True] and out["large"] == 1 and out["hidden"] == "none"
