"""RadGraph: batches against the package one report at a time, F1 against the package's, weights that are not as they should be."""

import io
import json
import pickle
import random
import shutil
import tarfile

import pytest
import torch

pytest.importorskip("radgraph", reason="pip install -e '.[clinical]'")
from benchmarks.rewards import package_graph
from minigrpo.rewards.radgraph import RadGraph, radgraph_f1
from minigrpo.rewards.weights import unpack
from tests.scorer_weights import ENCODER, LABELS, RELATIONS, WORDS, reports, write_encoders, write_radgraph


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_encoders(folder)
    write_radgraph(folder)
    return folder


@pytest.fixture(scope="module")
def graph(folder):
    return RadGraph.from_weights(str(folder))


@pytest.fixture(scope="module")
def package(folder):
    return package_graph(folder)


def alone(package, text):
    found = package([text])["0"]
    return {"text": found["text"], "entities": found["entities"]}


@pytest.mark.parametrize("count", [48, pytest.param(400, marks=pytest.mark.slow)])
def test_batches_equal_the_package(graph, package, count):
    texts = reports(count)
    found = [annotation for start in range(0, count, 32) for annotation in graph.annotate(texts[start:start + 32])]
    assert [text for text, annotation in zip(texts, found) if annotation != alone(package, text)] == []
    assert sum(len(a["entities"]) for a in found) > 2.5 * count
    assert sum(len(e["relations"]) for a in found for e in a["entities"].values()) > 0.5 * count


def test_report_longer_than_the_encoder_is_read_in_parts(graph, package):
    """Folded into rows of 512 tokens; beside short reports it would fold these too."""
    draw, words, tokens = random.Random(0), [], lambda words: len(graph._row(graph._words(" ".join(words)))[0])
    while tokens(words + ["."]) < 560:
        words.append(draw.choice([*WORDS[:30], *["hepatosplenomegaly"] * 30]))  # of 18 tokens: many words would take seconds
    fit = max(count for count in range(len(words)) if tokens(words[:count]) <= 512)
    assert 0.8 * tokens(words) < tokens(words[:fit]) <= 512 < tokens(words)
    long, fits = " ".join(words), " ".join(words[:fit])
    texts = [long, fits, "No effusion.", "x"]  # the second has nearly the first's length
    annotations = graph.annotate(texts)
    assert annotations == [alone(package, text) for text in texts] and len(annotations[0]["entities"]) > 5


def test_odd_texts(graph, package):
    odd = ["a", ".", "pleural\n\neffusion", "\u200b", "é ü 中 文", "(/.) /? 10%.", "NO EFFUSION", "None"]
    assert graph.annotate(odd) == [alone(package, text) for text in odd]
    assert graph.annotate(["", " \n", "\\n"]) == [{"text": "", "entities": {}}] * 3  # the package crashes on the last two
    assert graph.annotate([]) == []


def test_relations_of_a_report_do_not_depend_on_its_batch(graph):
    """Reports as sentences of one document: the package masks one side of a pair only, and padding becomes relations."""
    texts = reports(16, seed=3)
    alone = [graph.annotate([text])[0] for text in texts]
    assert graph.annotate(texts) == alone and graph.annotate(texts[::-1] * 2) == alone[::-1] * 2


def test_same_text_is_annotated_once(graph, monkeypatch):
    seen, forward = [], graph._forward
    monkeypatch.setattr(graph, "_forward", lambda rows, words: seen.append(len(rows)) or forward(rows, words))
    assert len(graph.annotate(["No effusion."] * 8)) == 8 and sum(seen) == 1


# What RadGraph-XL says of two reports, from the tests of the radgraph package (MIT).
ABNORMALITY = {"text": "no acute cardiopulmonary abnormality", "entities": {
    "1": {"tokens": "acute", "label": "Observation::definitely absent", "start_ix": 1, "end_ix": 1, "relations": []},
    "2": {"tokens": "cardiopulmonary", "label": "Anatomy::definitely present", "start_ix": 2, "end_ix": 2, "relations": []},
    "3": {"tokens": "abnormality", "label": "Observation::definitely absent", "start_ix": 3, "end_ix": 3, "relations": [["located_at", "2"]]}}}
PROCESS = {"text": "no acute cardiopulmonary process", "entities": {
    **{key: ABNORMALITY["entities"][key] for key in "12"},
    "3": {"tokens": "process", "label": "Observation::definitely absent", "start_ix": 3, "end_ix": 3, "relations": [["located_at", "2"]]}}}
NOTHING = {"text": "stable", "entities": {}}


def test_f1_of_stored_annotations():
    f1 = radgraph_f1(PROCESS, ABNORMALITY)
    assert f1 == pytest.approx({"simple": 2 / 3, "partial": 2 / 3, "complete": 2 / 3, "radcliq": (2 / 3 + 0) / 2})
    assert radgraph_f1(ABNORMALITY, ABNORMALITY) == {"simple": 1, "partial": 1, "complete": 1, "radcliq": 1}
    assert set(radgraph_f1(NOTHING, NOTHING).values()) == set(radgraph_f1(NOTHING, PROCESS).values()) == {0}


def random_annotation(draw):
    entities = {str(n + 1): {"tokens": draw.choice(["heart", "Heart", "lung", "No"]), "label": draw.choice(LABELS[:3])}
                for n in range(draw.randrange(6))}
    for entity in entities.values():
        entity["relations"] = [[draw.choice(RELATIONS), draw.choice(list(entities))] for _ in range(draw.choice([0, 0, 1, 2]))]
    return {"text": "", "entities": entities}


def test_f1_equals_the_package_on_random_annotations():
    from radgraph.rewards import compute_reward
    draw, different = random.Random(0), 0
    for _ in range(500):
        hyp, ref = random_annotation(draw), random_annotation(draw)
        f1 = radgraph_f1(hyp, ref)
        assert (f1["simple"], f1["partial"], f1["complete"]) == pytest.approx(compute_reward(hyp, ref, "all"), abs=1e-12)
        different += len(set(f1.values())) > 2
    assert different > 20


def test_case_counts_where_the_package_has_it_count():
    """0.1.18 lower-cases the tokens of related entities only: 'Heart' and 'heart' are two entities and one relation."""
    def heart(tokens, relations):
        return {"entities": {"1": {"tokens": tokens, "label": "A", "relations": relations}, "2": {"tokens": "big", "label": "B", "relations": []}}}
    assert radgraph_f1(heart("Heart", [["modify", "2"]]), heart("heart", [["modify", "2"]]))["complete"] == 1
    assert radgraph_f1(heart("Heart", []), heart("heart", []))["complete"] == 0.5


def test_says_what_is_missing(tmp_path, folder, monkeypatch):
    with pytest.raises(ValueError, match=r"radgraph-xl.tar.gz is missing: fetch radgraph-xl.tar.gz \(416 MB\) from StanfordAIMI/RRG_scorers"):
        RadGraph.from_weights(str(tmp_path))
    shutil.copy(folder / "radgraph-xl.tar.gz", tmp_path)
    with pytest.raises(ValueError, match=f"{ENCODER} is missing: fetch the files of microsoft/{ENCODER} .config.json and tokenizer, under 1 MB"):
        RadGraph.from_weights(str(tmp_path))
    (tmp_path / "radgraph-xl/weights.th").unlink()
    with pytest.raises(ValueError, match="radgraph-xl lacks weights.th: delete it, and it is unpacked anew"):
        RadGraph.from_weights(str(tmp_path))
    monkeypatch.setattr("minigrpo.rewards.weights.hf_hub_download", lambda *names: 1 / 0)
    monkeypatch.setenv("MINIGRPO_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="could not be fetched .* put it into a folder DIR, and give --reward_weights DIR"):
        RadGraph.from_weights(None)


def test_archive_writes_nothing_outside_its_folder(tmp_path):
    with tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as tar:
        info = tarfile.TarInfo("../evil.txt")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))
    with pytest.raises(ValueError, match="bad.tar.gz cannot be unpacked"):
        unpack(tmp_path / "bad.tar.gz", tmp_path / "here/model")
    assert not list(tmp_path.rglob("evil.txt")) and not list((tmp_path / "here").iterdir())


def test_archive_cut_short_leaves_no_folder_behind(tmp_path, folder):
    """A half-unpacked folder would pass for a whole one in the next run."""
    whole = (folder / "radgraph-xl.tar.gz").read_bytes()
    (tmp_path / "radgraph-xl.tar.gz").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be unpacked .* fetch it again"):
        RadGraph.from_weights(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["radgraph-xl.tar.gz"]


class Runs:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('evil.txt').write_text('x')",)


def test_weights_run_no_code(tmp_path, folder, monkeypatch):
    shutil.copytree(folder, tmp_path / "w")
    monkeypatch.chdir(tmp_path)
    if not (tmp_path / "w/radgraph-xl").exists():
        unpack(tmp_path / "w/radgraph-xl.tar.gz", tmp_path / "w/radgraph-xl")
    torch.save({"x": Runs()}, tmp_path / "w/radgraph-xl/weights.th")
    with pytest.raises(pickle.UnpicklingError):
        RadGraph.from_weights(str(tmp_path / "w"))
    assert not (tmp_path / "evil.txt").exists()


def test_nan_is_a_failure_and_no_label(folder):
    """argmax takes NaN for the largest score: every span would be an entity."""
    broken = RadGraph.from_weights(str(folder))
    broken.embedder._matched_embedder.transformer_model.embeddings.word_embeddings.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="RadGraph gave NaN"):
        broken.annotate(["No effusion."])


def test_archive_that_links_reports_is_refused(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "w")
    if not (tmp_path / "w/radgraph-xl").exists():
        unpack(tmp_path / "w/radgraph-xl.tar.gz", tmp_path / "w/radgraph-xl")
    path = tmp_path / "w/radgraph-xl/config.json"
    config = json.loads(path.read_text())
    config["model"]["modules"]["coref"]["coref_prop"] = 1
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="links mentions across sentences"):
        RadGraph.from_weights(str(tmp_path / "w"))


def test_fingerprint_changes_with_the_weights(tmp_path, folder, graph):
    write_encoders(tmp_path)
    write_radgraph(tmp_path, seed=3)
    assert RadGraph.from_weights(str(tmp_path)).fingerprint != graph.fingerprint == RadGraph.from_weights(str(folder)).fingerprint
