"""RadGraph: batches against the package one report at a time, F1 against the package's, weights
that are not as they should be.
"""

import io
import json
import os
import random
import shutil
import tarfile
import zipfile

import pytest
import torch

pytest.importorskip("radgraph", reason="pip install -e '.[clinical]'")
from benchmarks.rewards import package_graph
from minigrpo.rewards.radgraph import RadGraph, radgraph_f1
from minigrpo.rewards.weights import unpack
from tests.scorer_weights import (
    ENCODER,
    LABELS,
    RELATIONS,
    WORDS,
    reports,
    write_encoders,
    write_radgraph,
)


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
    found = [
        annotation
        for start in range(0, count, 32)
        for annotation in graph.annotate(texts[start : start + 32])
    ]
    assert [
        text for text, annotation in zip(texts, found) if annotation != alone(package, text)
    ] == []
    assert sum(len(a["entities"]) for a in found) > 2.5 * count
    assert sum(len(e["relations"]) for a in found for e in a["entities"].values()) > 0.5 * count


def test_report_longer_than_the_encoder_is_read_in_parts(graph, package):
    """Folded into rows of 512 tokens; beside short reports it would fold these too."""
    draw, words, tokens = (
        random.Random(0),
        [],
        lambda words: len(graph._row(graph._words(" ".join(words)))[0]),
    )
    while tokens(words + ["."]) < 560:
        # of 18 tokens: many words would take seconds
        words.append(draw.choice([*WORDS[:30], *["hepatosplenomegaly"] * 30]))
    fit = max(count for count in range(len(words)) if tokens(words[:count]) <= 512)
    assert 0.8 * tokens(words) < tokens(words[:fit]) <= 512 < tokens(words)
    long, fits = " ".join(words), " ".join(words[:fit])
    texts = [long, fits, "No effusion.", "x"]  # the second has nearly the first's length
    annotations = graph.annotate(texts)
    assert (
        annotations == [alone(package, text) for text in texts]
        and len(annotations[0]["entities"]) > 5
    )


def test_odd_texts(graph, package):
    odd = [
        "a",
        ".",
        "pleural\n\neffusion",
        "\u200b",
        "é ü 中 文",
        "(/.) /? 10%.",
        "NO EFFUSION",
        "None",
    ]
    assert graph.annotate(odd) == [alone(package, text) for text in odd]
    # the package crashes on the last two
    assert graph.annotate(["", " \n", "\\n"]) == [{"text": "", "entities": {}}] * 3
    assert graph.annotate([]) == []


def test_relations_of_a_report_do_not_depend_on_its_batch(graph):
    """Reports as sentences of one document: the package masks one side of a pair only, and padding
    becomes relations.
    """
    texts = reports(16, seed=3)
    alone = [graph.annotate([text])[0] for text in texts]
    assert graph.annotate(texts) == alone and graph.annotate(texts[::-1] * 2) == alone[::-1] * 2


def test_same_text_is_annotated_once(graph, monkeypatch):
    seen, forward = [], graph._forward
    monkeypatch.setattr(
        graph, "_forward", lambda rows, words: seen.append(len(rows)) or forward(rows, words)
    )
    assert len(graph.annotate(["No effusion."] * 8)) == 8 and sum(seen) == 1


# What RadGraph-XL says of two reports, from the tests of the radgraph package (MIT).
ABNORMALITY = {
    "text": "no acute cardiopulmonary abnormality",
    "entities": {
        "1": {
            "tokens": "acute",
            "label": "Observation::definitely absent",
            "start_ix": 1,
            "end_ix": 1,
            "relations": [],
        },
        "2": {
            "tokens": "cardiopulmonary",
            "label": "Anatomy::definitely present",
            "start_ix": 2,
            "end_ix": 2,
            "relations": [],
        },
        "3": {
            "tokens": "abnormality",
            "label": "Observation::definitely absent",
            "start_ix": 3,
            "end_ix": 3,
            "relations": [["located_at", "2"]],
        },
    },
}
PROCESS = {
    "text": "no acute cardiopulmonary process",
    "entities": {
        **{key: ABNORMALITY["entities"][key] for key in "12"},
        "3": {
            "tokens": "process",
            "label": "Observation::definitely absent",
            "start_ix": 3,
            "end_ix": 3,
            "relations": [["located_at", "2"]],
        },
    },
}
NOTHING = {"text": "stable", "entities": {}}


def test_f1_of_stored_annotations():
    f1 = radgraph_f1(PROCESS, ABNORMALITY)
    assert f1 == pytest.approx(
        {"simple": 2 / 3, "partial": 2 / 3, "complete": 2 / 3, "radcliq": (2 / 3 + 0) / 2}
    )
    assert radgraph_f1(ABNORMALITY, ABNORMALITY) == {
        "simple": 1,
        "partial": 1,
        "complete": 1,
        "radcliq": 1,
    }
    assert (
        set(radgraph_f1(NOTHING, NOTHING).values())
        == set(radgraph_f1(NOTHING, PROCESS).values())
        == {0}
    )


def random_annotation(draw):
    entities = {
        str(n + 1): {
            "tokens": draw.choice(["heart", "Heart", "lung", "No"]),
            "label": draw.choice(LABELS[:3]),
        }
        for n in range(draw.randrange(6))
    }
    for entity in entities.values():
        entity["relations"] = [
            [draw.choice(RELATIONS), draw.choice(list(entities))]
            for _ in range(draw.choice([0, 0, 1, 2]))
        ]
    return {"text": "", "entities": entities}


def test_f1_equals_the_package_on_random_annotations():
    from radgraph.rewards import compute_reward

    draw, different = random.Random(0), 0
    for _ in range(500):
        hyp, ref = random_annotation(draw), random_annotation(draw)
        f1 = radgraph_f1(hyp, ref)
        assert (f1["simple"], f1["partial"], f1["complete"]) == pytest.approx(
            compute_reward(hyp, ref, "all"), abs=1e-12
        )
        different += len(set(f1.values())) > 2
    assert different > 20


def test_case_counts_where_the_package_has_it_count():
    """0.1.18 lower-cases the tokens of related entities only: 'Heart' and 'heart' are two entities
    and one relation.
    """

    def heart(tokens, relations):
        return {
            "entities": {
                "1": {"tokens": tokens, "label": "A", "relations": relations},
                "2": {"tokens": "big", "label": "B", "relations": []},
            }
        }

    assert (
        radgraph_f1(heart("Heart", [["modify", "2"]]), heart("heart", [["modify", "2"]]))[
            "complete"
        ]
        == 1
    )
    assert radgraph_f1(heart("Heart", []), heart("heart", []))["complete"] == 0.5


def test_says_what_is_missing(tmp_path, folder, monkeypatch):
    with pytest.raises(
        ValueError,
        match=(
            r"radgraph-xl.tar.gz is missing: fetch radgraph-xl.tar.gz \(416 MB\) from"
            r" StanfordAIMI/RRG_scorers"
        ),
    ):
        RadGraph.from_weights(str(tmp_path))
    shutil.copy(folder / "radgraph-xl.tar.gz", tmp_path)
    with pytest.raises(
        ValueError,
        match=(
            f"{ENCODER} is missing: fetch the files of microsoft/{ENCODER} .config.json and"
            " tokenizer, under 1 MB"
        ),
    ):
        RadGraph.from_weights(str(tmp_path))
    (tmp_path / "radgraph-xl/weights.th").unlink()
    with pytest.raises(
        ValueError, match="radgraph-xl lacks weights.th: delete it, and it is unpacked again"
    ):
        RadGraph.from_weights(str(tmp_path))
    monkeypatch.setattr("minigrpo.rewards.weights.hf_hub_download", lambda *names: 1 / 0)
    monkeypatch.setenv("MINIGRPO_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        ValueError,
        match="could not be fetched .* put it into a folder DIR, and give --reward_weights DIR",
    ):
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
    (tmp_path / "radgraph-xl.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be unpacked .* fetch it again"):
        RadGraph.from_weights(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["radgraph-xl.tar.gz"]


class Runs:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('evil.txt').write_text('x')",)


@pytest.fixture
def archive(tmp_path, folder, monkeypatch):
    """The unpacked archive beside its encoder, to be changed; nothing may have run at the end."""
    monkeypatch.chdir(tmp_path)
    for part in folder.glob("[!.]*"):
        if part.name != "radgraph-xl":
            (tmp_path / part.name).symlink_to(part)
    yield unpack(folder / "radgraph-xl.tar.gz", tmp_path / "radgraph-xl")
    assert not list(tmp_path.glob("evil*")), "something in the archive ran"


def set_in(path, place, value):
    """Changes one entry of a JSON file, `place` as in "model.modules.ner"."""
    config = json.loads(path.read_text())
    *way, last = place.split(".")
    inner = config
    for key in way:
        inner = inner.setdefault(key, {})
    inner[last] = value
    path.write_text(json.dumps(config))


RUN = {"type": "subprocess.Popen", "args": ["touch", "evil"]}
CODE = [
    *(
        (f"model.modules.{name}.regularizer", {"regexes": [[".*", RUN]]})
        for name in ("relation", "ner", "coref", "events")
    ),
    ("model.regularizer", {"regexes": [[".*", RUN]]}),
    ("model.initializer", {"regexes": [[".*", RUN]]}),
    ("model.module_initializer", RUN),
    ("model.embedder.type", "subprocess.Popen"),
    ("model.type", "os.system"),
    ("model.embedder.token_embedders.bert.type", "subprocess.Popen"),
    ("dataset_reader.token_indexers.bert", RUN),
    ("dataset_reader.token_indexers.other", RUN),
    ("dataset_reader.type", "subprocess.Popen"),
    ("vocabulary", RUN),
    ("trainer.optimizer", RUN),
    ("data_loader", {"sampler": [{"inner": RUN}]}),
    ("trainer.callbacks", [{"type": "pickle.load"}]),
    (
        "model.modules.relation",
        {"_pretrained": {"archive_file": "/evil.tar.gz", "module_path": "x"}},
    ),
    ("model.modules.relation.spans_per_word", RUN),
    ("model.modules.new", {}),
    ("model.loss_weights.ner", "0.2"),
    ("model.feedforward_params.hidden_dims", 10**9),
    ("model.feedforward_params.num_layers", True),
    ("model.feature_size", 1e400),
    ("model.modules.coref.max_antecedents", None),
    ("dataset_reader.token_indexers.bert.model_name", "../../elsewhere"),
    ("dataset_reader.token_indexers.bert.model_name", "/etc"),
    ("dataset_reader.token_indexers.bert.override_weights_file", "x.th"),
    ("import", "os"),
    ("model", []),
    ("model.modules", "subprocess.Popen"),
]


@pytest.mark.parametrize("place, value", CODE, ids=[place for place, _ in CODE])
def test_archive_cannot_name_code(archive, place, value):
    """Bug: the package imports and calls whatever a regularizer's `type` names, and this command
    ran."""
    set_in(archive / "config.json", place, value)
    with pytest.raises(ValueError) as refused:
        RadGraph.from_weights(str(archive.parent))
    assert f"{archive / 'config.json'}: {'.'.join(place.split('.')[:2])}" in str(refused.value)
    assert "fetch the archive again, from its authors" in str(refused.value)


def test_archive_as_trained_is_read(archive, graph):
    """What training leaves in config.json is not refused, and changes nothing: seeds, paths,
    optimizer, initializers."""
    groups = [[["_matched_embedder"], {"lr": 5e-5, "finetune": True}]]
    left = {
        "trainer": {
            "optimizer": {"type": "adamw", "lr": 1e-3, "parameter_groups": groups},
            "checkpointer": {"num_serialized_models_to_keep": 3},
            "learning_rate_scheduler": {"type": "slanted_triangular"},
        },
        "data_loader": {"sampler": {"type": "random"}},
        "train_data_path": "data/train.json",
        "numpy_seed": 1337,
        "model.initializer": {
            "regexes": [["_span_width_embedding.weight", {"type": "xavier_normal"}]]
        },
        "model.module_initializer": {"regexes": [[".*weight", {"type": "xavier_normal"}]]},
        "model.display_metrics": ["MEAN__ner_f1"],
    }
    for place, value in left.items():
        set_in(archive / "config.json", place, value)
    texts = reports(3)
    (archive / "vocabulary/.lock").unlink()
    assert RadGraph.from_weights(str(archive.parent)).annotate(texts) == graph.annotate(texts)
    assert not (archive / "vocabulary/.lock").exists()  # the package used to leave one


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", "{", '{"model": ' + "9" * 5000 + "}", " " * 2_000_000]
)
def test_config_that_is_none(archive, text):
    (archive / "config.json").write_text(text)
    with pytest.raises(ValueError, match="radgraph-xl/config.json.* fetch the archive again"):
        RadGraph.from_weights(str(archive.parent))


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "evil.sh").write_text("touch evil"),
        lambda folder: (folder / "more").mkdir(),
        lambda folder: (folder / "radgraph-xl__ner_labels.txt").write_text("x" * 200_000),
        lambda folder: (folder / "non_padded_namespaces.txt").unlink(),
        lambda folder: [(folder / f"more{n}.txt").write_text("a") for n in range(9)],
        lambda folder: (folder / "a.txt").write_bytes(b"\xff"),
        lambda folder: (folder / "radgraph-xl__ner_labels.txt").unlink(),
        lambda folder: (folder / "radgraph-xl__ner_labels.txt").write_text("a\nb\n"),
    ],
)
def test_vocabulary_that_is_none(archive, harm):
    """Bug: files of any size were read; without its labels a KeyError, with other ones an
    AssertionError."""
    harm(archive / "vocabulary")
    with pytest.raises(ValueError, match="fetch the archive again"):
        RadGraph.from_weights(str(archive.parent))


def test_weights_run_no_code(archive):
    torch.save({"x": Runs()}, archive / "weights.th")
    with pytest.raises(
        ValueError,
        match="weights.th has no readable weights .it refers to exec, and could run code",
    ):
        RadGraph.from_weights(str(archive.parent))


def inflated(path):
    """Two million zeros in two kB: torch's own files are not compressed."""
    torch.save({"x": torch.zeros(500_000)}, path)
    new = path.with_suffix(".new")
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    os.replace(new, path)


@pytest.mark.parametrize(
    "harm, said",
    [
        (lambda path: torch.save([torch.zeros(3)], path), "no named tensors"),
        (lambda path: torch.save({"x": 3}, path), "more than named tensors"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "has no readable weights"),
        (lambda path: path.write_bytes(b""), "has no readable weights"),
        (
            lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
            "has no readable weights",
        ),
        (inflated, "it unpacks to"),
        (lambda path: torch.save({"x": torch.zeros(3)}, path), "fits neither its own config.json"),
    ],
)
def test_weights_that_are_none(archive, harm, said):
    """Bugs: an AttributeError, a KeyError, an UnpicklingError that advises to run the code."""
    harm(archive / "weights.th")
    with pytest.raises(ValueError, match=said):
        RadGraph.from_weights(str(archive.parent))


@pytest.mark.parametrize(
    "file, place, value",
    [
        ("config.json", "auto_map", {"AutoModel": "evil.M"}),
        ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["evil.T", None]}),
        ("config.json", "inner.deep.auto_map", {"AutoConfig": "evil.C"}),
        ("config.json", "transformers_weights", "../evil.safetensors"),
        ("config.json", "quantization_config", {"quant_method": "evil"}),
        ("config.json", "_attn_implementation", "evil/kernel"),
        ("config.json", "num_hidden_layers", 10**6),
        ("config.json", "hidden_size", -1),
        ("config.json", "model_type", "evil"),
        ("adapter_config.json", "base_model_name_or_path", "evil/model"),
    ],
)
def test_encoder_brings_no_code(archive, file, place, value):
    """An encoder's folder is as foreign as the archive. Bug: transformers asked at the terminal
    whether to run its code."""
    encoder = archive.parent / ENCODER
    real = encoder.resolve()
    encoder.unlink()
    shutil.copytree(real, encoder)
    (encoder / "evil.py").write_text(
        "open('evil', 'w')\nfrom transformers import BertConfig as C, "
        "BertModel as M, BertTokenizer as T"
    )
    if not (encoder / file).exists():
        (encoder / file).write_text("{}")
    set_in(encoder / file, place, value)
    with pytest.raises(ValueError) as refused:
        RadGraph.from_weights(str(archive.parent))
    said = f"{encoder} (config.json and tokenizer, under 1 MB) could not be loaded ("
    assert said in str(refused.value) and file in str(refused.value)


def test_nan_is_a_failure_and_no_label(folder):
    """argmax takes NaN for the largest score: every span would be an entity."""
    broken = RadGraph.from_weights(str(folder))
    broken.embedder._matched_embedder.transformer_model.embeddings.word_embeddings.weight.fill_(
        torch.nan
    )
    with pytest.raises(FloatingPointError, match="RadGraph gave NaN"):
        broken.annotate(["No effusion."])


def test_archive_that_links_reports_is_refused(archive):
    set_in(archive / "config.json", "model.modules.coref.coref_prop", 1)
    with pytest.raises(ValueError, match="links mentions across sentences"):
        RadGraph.from_weights(str(archive.parent))


def test_fingerprint_changes_with_the_weights(tmp_path, folder, graph):
    write_encoders(tmp_path)
    write_radgraph(tmp_path, seed=3)
    assert (
        RadGraph.from_weights(str(tmp_path)).fingerprint
        != graph.fingerprint
        == RadGraph.from_weights(str(folder)).fingerprint
    )
