"""CheXbert and BERTScore on tiny checkpoints of the published formats, against slow loops and the
bert-score package.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertModel

from minigrpo.rewards.bertscore import BertScore
from minigrpo.rewards.chexbert import CONDITIONS, CheXbert, cosine, label_f1
from tests.scorer_weights import reports, write_chexbert, write_encoders

RADCLIQ = dict(model="distilroberta-base", baseline=0.8473319)
PAPER = dict(model="distilbert-base-uncased", baseline=0.66620487)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_encoders(folder)
    write_chexbert(folder)
    return folder


@pytest.fixture(scope="module")
def chexbert(folder):
    return CheXbert.from_weights(str(folder))


def test_chexbert_equals_one_report_at_a_time(folder, chexbert):
    """BertModel and 14 linear heads on [CLS], each report alone, from the raw file."""
    state = torch.load(folder / "chexbert.pth", weights_only=True)["model_state_dict"]
    bert, tokenizer = (
        BertModel(chexbert.bert.config).eval(),
        AutoTokenizer.from_pretrained(folder / "bert-base-uncased"),
    )
    bert.load_state_dict(
        {name.removeprefix("module.bert."): x for name, x in state.items() if "bert" in name}
    )
    texts = [*reports(30), "", "Heart\n\n size  normal."] + reports(3)
    labels, vectors = chexbert.labels(texts), chexbert.vectors(texts)
    for n, text in enumerate(texts):
        ids = tokenizer(" ".join(text.split()), return_tensors="pt")
        with torch.no_grad():
            vector = bert(**ids)[0][0, 0]
            wanted = [
                int(
                    (
                        state[f"module.linear_heads.{i}.weight"] @ vector
                        + state[f"module.linear_heads.{i}.bias"]
                    ).argmax()
                )
                for i in range(14)
            ]
        assert labels[n].tolist() == wanted
        np.testing.assert_allclose(vectors[n], vector, atol=1e-5)
    assert (
        len(CONDITIONS) == 14 and CONDITIONS[1] == "Cardiomegaly" and CONDITIONS[-1] == "No Finding"
    )
    assert len(np.unique(labels, axis=0)) > 5 and labels[:, -1].max() == 1
    assert chexbert.labels([]).shape == (0, 14) and chexbert.vectors([]).shape == (0, 32)


def test_chexbert_reads_512_tokens(chexbert):
    long = "pleural effusion " * 400
    assert (chexbert.vectors([long]) == chexbert.vectors([long + "edema"])).all()


def test_label_f1_by_hand():
    rows = np.zeros((4, 14), dtype=int)
    rows[1, [1, 4]] = 1, 3  # positive and uncertain both count
    rows[2, [1, 5]] = 1, 2  # negative does not
    assert label_f1(rows[[0, 1, 2, 1]], rows[[0, 1, 1, 3]]).tolist() == [
        1,
        1,
        pytest.approx(2 / 3),
        0,
    ]
    assert cosine(np.array([[3.0, 4.0]]), np.array([[4.0, 3.0]])) == pytest.approx(0.96)


def test_chexbert_runs_no_code_and_names_a_wrong_file(tmp_path, folder, monkeypatch):
    (tmp_path / "bert-base-uncased").symlink_to(folder / "bert-base-uncased")
    with pytest.raises(
        ValueError, match=r"chexbert.pth is missing: fetch chexbert.pth \(1.31 GB\)"
    ):
        CheXbert.from_weights(str(tmp_path))

    class Runs:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'evil')!r}, 'w')",)

    torch.save({"model_state_dict": Runs()}, tmp_path / "chexbert.pth")
    with pytest.raises(
        ValueError,
        match="chexbert.pth has no readable weights .it refers to exec, and could run code",
    ):
        CheXbert.from_weights(str(tmp_path))
    assert not (tmp_path / "evil").exists()
    state = torch.load(folder / "chexbert.pth", weights_only=True)
    del state["model_state_dict"]["module.linear_heads.13.bias"]
    torch.save(state, tmp_path / "chexbert.pth")
    with pytest.raises(ValueError, match="does not fit the config of bert-base-uncased"):
        CheXbert.from_weights(str(tmp_path))


@pytest.mark.parametrize(
    "name, load",
    [("bert-base-uncased", CheXbert.from_weights), ("distilroberta-base", BertScore.from_weights)],
)
@pytest.mark.parametrize(
    "file, entries, said",
    [
        (
            "config.json",
            {"auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}, "model_type": "evil"},
            "config.json asks to run code of its own",
        ),
        (
            "tokenizer_config.json",
            {"inner": [{"auto_map": {"AutoTokenizer": ["evil.T", None]}}]},
            "tokenizer_config.json asks to run code of its own",
        ),
        (
            "config.json",
            {"attn_implementation": "evil/kernel"},
            "config.json asks for kernels, which are code",
        ),
        (
            "config.json",
            {"vocab_size": 10**12},
            "config.json: vocab_size is 1000000000000, not a number in 1..500,000",
        ),
        (
            "adapter_config.json",
            {"base_model_name_or_path": "evil/model"},
            "adapter_config.json names another model",
        ),
        ("tokenizer_config.json", None, "tokenizer_config.json is not usable JSON"),
        ("config.json", [], "config.json is not usable JSON (it is not an object)"),
    ],
)
def test_a_scorer_s_encoder_brings_no_code(tmp_path, folder, name, load, file, entries, said):
    """CheXbert's and BERTScore's folders are checked as RadGraph's is."""
    for part in folder.iterdir():
        if part.name != name:
            (tmp_path / part.name).symlink_to(part)
    shutil.copytree(folder / name, tmp_path / name)
    path = tmp_path / name / file
    if entries is None or isinstance(entries, list):
        path.write_text("[" * 100_000 if entries is None else "[]")
    else:
        path.write_text(
            json.dumps((json.loads(path.read_text()) if path.exists() else {}) | entries)
        )
    with pytest.raises(ValueError) as refused:
        load(str(tmp_path))
    assert "could not be loaded (" in str(refused.value) and said in str(refused.value)


def test_bertscore_reads_no_pickle(tmp_path, folder):
    """Bug: pytorch_model.bin was read where a folder has no safetensors."""
    shutil.copytree(folder / "distilroberta-base", tmp_path / "distilroberta-base")
    weights = tmp_path / "distilroberta-base/model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(ValueError, match="distilroberta-base .331 MB. could not be loaded"):
        BertScore.from_weights(str(tmp_path))


@pytest.mark.parametrize(
    "state",
    [
        [torch.zeros(3)],
        {"model_state_dict": 3},
        {"model_state_dict": {"a": "b"}},
        {"model_state_dict": {3: torch.zeros(3)}},
        {},
    ],
)
def test_chexbert_of_other_things_is_named(tmp_path, folder, state):
    """Bug: an AttributeError for what is no dict."""
    (tmp_path / "bert-base-uncased").symlink_to(folder / "bert-base-uncased")
    torch.save(state, tmp_path / "chexbert.pth")
    with pytest.raises(ValueError, match="chexbert.pth has no readable weights"):
        CheXbert.from_weights(str(tmp_path))


def test_chexbert_nan_is_a_failure_and_no_label(folder):
    broken = CheXbert.from_weights(str(folder))
    broken.bert.embeddings.word_embeddings.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="CheXbert gave NaN"):
        broken.labels(["No effusion."])


@pytest.mark.parametrize("settings", [RADCLIQ, PAPER], ids=["radcliq", "paper"])
def test_bertscore_equals_the_package(folder, settings, monkeypatch):
    """On transformers 5 bert-score 0.3.13 drops the space before RoBERTa's first word, silently,
    and crashes on an empty text; so it is given its token ids here, and scores them itself.
    """
    bert_score = pytest.importorskip("bert_score")
    space = " " if "roberta" in settings["model"] else ""
    monkeypatch.setattr(
        "bert_score.utils.sent_encode",
        lambda tokenizer, text: tokenizer(space + text.strip())["input_ids"],
    )
    hyps, refs = reports(60, seed=1), reports(30, seed=2) * 2
    theirs = bert_score.BERTScorer(
        model_type=str(folder / settings["model"]), num_layers=5, device="cpu"
    ).score(hyps, refs)[2]
    ours = torch.tensor(BertScore.from_weights(str(folder), **settings).score(hyps, refs))
    alike = theirs > 0.05  # else a padded zero can be the package's best match: see below
    assert alike.sum() > 40
    torch.testing.assert_close(
        ours[alike],
        ((theirs - settings["baseline"]) / (1 - settings["baseline"]))[alike],
        atol=1e-4,
        rtol=0,
    )


def test_bertscore_of_a_pair_does_not_depend_on_its_batch(folder):
    """Masked cosines are zeros in bert-score: where all real ones are negative, padding won, and 0
    / 0 was NaN.
    """
    hyps, refs = reports(40, seed=1), reports(40, seed=2)
    score = BertScore.from_weights(str(folder), **PAPER)
    together = score.score(hyps, refs)
    assert np.isfinite(together).all()
    np.testing.assert_allclose(
        together, [score.score([hyp], [ref])[0] for hyp, ref in zip(hyps, refs)], atol=1e-4
    )


def test_padding_is_nobodys_best_match():
    """Of the two tokens of hyp one has cosine 0.6, one -0.5: P = 0.05, R = 0.6. Padding as a cosine
    of 0 would make P 0.3.
    """
    ref = torch.tensor([[1.0, 0.0]])
    hyp = torch.tensor([[0.6, 0.8], [-0.5, 0.75**0.5]])
    pair, longer = (
        ((hyp, torch.ones(2)), (ref, torch.ones(1))),
        ((hyp.repeat(3, 1), torch.ones(6)), (hyp.repeat(3, 1), torch.ones(6))),
    )
    wanted = 2 * 0.05 * 0.6 / 0.65
    assert BertScore._f1([pair])[0] == pytest.approx(wanted, abs=1e-6) and BertScore._f1(
        [pair, longer]
    ).tolist() == pytest.approx([wanted, 1], abs=1e-6)
    other = (pair[1], pair[0])
    assert BertScore._f1([other, longer])[0] == pytest.approx(wanted, abs=1e-6)


def test_bertscore_of_equal_and_blank_texts(folder):
    score = BertScore.from_weights(str(folder))
    floor = -0.8473319 / (1 - 0.8473319)
    assert score.score(
        ["Heart size normal.", "", "x", " \n"], ["Heart size normal.", "x", "", ""]
    ) == pytest.approx([1, floor, floor, floor], abs=1e-5)
    assert score.score([], []) == []
    with pytest.raises(ValueError, match="1 hypotheses for 2 references"):
        score.score(["a"], ["a", "b"])


def test_bertscore_tokenises_with_a_prefix_space(folder):
    """RoBERTa has other tokens for a word after a space: without it the first word of every report
    would differ.
    """
    score = BertScore.from_weights(str(folder))
    seen = []
    score.tokenizer = lambda texts, **settings: (
        seen.extend(texts) or (_ for _ in ()).throw(RuntimeError)
    )
    with pytest.raises(RuntimeError):
        score._embed(["Heart ", ""])
    assert seen == [" Heart", ""]


def test_bertscore_remembers_references(folder):
    score = BertScore.from_weights(str(folder))
    score.score(["a", "b", "c"], ["No effusion."] * 3)
    score.score(["d"], ["No effusion."])
    assert score.references.scored == 1


def test_bertscore_says_what_is_wrong(folder, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"distilroberta-base is missing: fetch the files of distilroberta-base \(331 MB\)",
    ):
        BertScore.from_weights(str(tmp_path))
    with pytest.raises(ValueError, match="has no layer 9: choose 1 to 6"):
        BertScore.from_weights(str(folder), layer=9)
