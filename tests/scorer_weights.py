"""A folder of scorer weights in exactly the published formats, random and (unless told otherwise)
tiny.

RadGraph: an AllenNLP archive (config.json, vocabulary/, weights.th) that names its BERT. CheXbert:
    a pickle of tensors with
`module.` prefixes. Encoders: folders with config, tokenizer and, for BERTScore, weights.
"""

import json
import tarfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
)

# texts differ
SIZE = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    initializer_range=0.3,
)
BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
LABELS = [
    f"{kind}::{how}"
    for kind in ("Anatomy", "Observation")
    for how in ("definitely present", "uncertain", "definitely absent")
]
RELATIONS = ["modify", "located_at", "suggestive_of"]
ENCODER = "BiomedNLP-PubMedBERT-base-uncased-abstract-fulltext"
WORDS = """
    no acute cardiopulmonary process small bilateral pleural effusions with bibasilar atelectasis
    mild cardiomegaly is seen the heart size normal lungs are clear there pneumothorax left right
    lower lobe upper opacity consolidation edema moderate large stable unchanged tube catheter tip
    in of and or may represent pneumonia mediastinal contours unremarkable fracture rib
    degenerative changes spine low lung volumes interval increase decrease chronic hiatal hernia
    nodule mass hilar enlargement vascular congestion
""".split()


def reports(count: int, seed: int = 0, longest: int = 90) -> list[str]:
    """Random text that looks like reports: 1 to `longest` words, capitals, punctuation, numbers,
    unknown words.
    """
    draw = torch.Generator().manual_seed(seed)
    pick = lambda high: int(torch.randint(high, (1,), generator=draw))  # noqa: E731
    texts = []
    for _ in range(count):
        words = [WORDS[pick(len(WORDS))] for _ in range(1 + pick(longest))]
        for at in range(0, len(words), 7):
            words[at] = (
                words[at].capitalize()
                + ["", ",", ".", " 2.5 cm", " (PA/lateral)", " xylophone", " 10%."][pick(7)]
            )
        texts.append(" ".join(words) + ".")
    return texts


def wordpiece(folder: Path) -> int:
    """A BERT tokenizer's files as published: vocab.txt with the words above and single characters.
    Its size.
    """
    characters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789.,:;!?()/-%'\""))
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *characters,
        *("##" + c for c in characters),
        *dict.fromkeys(word for word in WORDS if len(word) > 1),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
        )
    )
    return len(vocabulary)


def byte_level(folder: Path) -> int:
    """A RoBERTa tokenizer's files as published: vocab.json and merges.txt. Its size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(
        reports(50),
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    model = json.loads(tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "RobertaTokenizer", "model_max_length": 512})
    )
    return tokenizer.get_vocab_size()


def write_encoders(folder: Path, size: dict = SIZE) -> None:
    """The folders of the encoders, weights only where BERTScore reads them."""
    torch.manual_seed(0)
    for name in (ENCODER, "bert-base-uncased"):
        vocabulary = wordpiece(folder / name)
        BertConfig(vocab_size=vocabulary, **size).save_pretrained(folder / name)
    vocabulary = wordpiece(folder / "distilbert-base-uncased")
    DistilBertModel(
        DistilBertConfig(
            vocab_size=vocabulary,
            dim=size["hidden_size"],
            n_layers=6,
            n_heads=size["num_attention_heads"],
            hidden_dim=size["intermediate_size"],
            initializer_range=size.get("initializer_range", 0.02),
        )
    ).save_pretrained(folder / "distilbert-base-uncased")
    vocabulary = byte_level(folder / "distilroberta-base")
    RobertaModel(
        RobertaConfig(
            vocab_size=vocabulary,
            max_position_embeddings=514,
            type_vocab_size=1,
            **size | {"num_hidden_layers": 6},
        )
    ).save_pretrained(folder / "distilroberta-base")


def write_chexbert(folder: Path, size: dict = SIZE) -> None:
    torch.manual_seed(1)
    bert = BertModel(BertConfig.from_pretrained(folder / "bert-base-uncased"))
    state = {f"module.bert.{name}": tensor for name, tensor in bert.state_dict().items()}
    for i in range(14):
        state[f"module.linear_heads.{i}.weight"] = torch.randn(
            4 if i < 13 else 2, size["hidden_size"]
        )
        state[f"module.linear_heads.{i}.bias"] = torch.randn(4 if i < 13 else 2)
    torch.save({"model_state_dict": state, "epoch": 7}, folder / "chexbert.pth")


def balance(model, embedder, encoder: Path, name: str) -> None:
    """Random scorers call all spans entities, or none: shift them so that 2% of the spans are, and
    a third of their pairs related.
    """
    from types import SimpleNamespace

    from radgraph.allennlp.data.token_indexers import PretrainedTransformerMismatchedIndexer

    from minigrpo.rewards.radgraph import RadGraph

    indexer = PretrainedTransformerMismatchedIndexer(model_name=str(encoder), max_length=512)
    reader = SimpleNamespace(_token_indexers={"bert": indexer}, _max_span_width=12)
    graph = RadGraph(SimpleNamespace(model_type=name, model=model, reader=reader), "cpu", "")
    for scorer, share in (
        (model._ner._ner_scorers[f"{name}__ner_labels"][1]._module, 0.02),
        (model._relation._relation_scorers[f"{name}__relation_labels"], 0.3),
    ):
        seen = []

        # of the spans is an entity this time: reports full of them would take seconds
        def none(module, inputs, scores):
            seen.append(scores.reshape(-1, scores.shape[-1]))
            return torch.full_like(scores, -1.0)

        with torch.no_grad():
            scorer.weight.mul_(20)
            hook = scorer.register_forward_hook(none)
            graph.annotate(reports(30, seed=5))
            hook.remove()
            scores = torch.cat(seen)
            scorer.bias.sub_(scores.mean(0))  # every label has its turn
            scorer.bias.sub_((scores - scores.mean(0)).max(1)[0].quantile(1 - share))


def write_radgraph(
    folder: Path, name: str = "radgraph-xl", size: dict = SIZE, hidden: int = 150, seed: int = 2
) -> None:
    """{name}.tar.gz. The folder must hold the encoders already."""
    from radgraph.allennlp.data import Vocabulary
    from radgraph.allennlp.modules import text_field_embedders, token_embedders
    from radgraph.dygie.models import dygie

    from minigrpo.rewards.radgraph_transformers5 import import_radgraph

    import_radgraph()
    bert = {
        "type": "pretrained_transformer_mismatched",
        "model_name": f"microsoft/{ENCODER}",
        "max_length": 512,
    }
    config = {
        "dataset_reader": {
            "type": "dygie",
            "max_span_width": 12,
            "token_indexers": {"bert": dict(bert)},
        },
        "model": {
            "type": "dygie",
            "embedder": {"token_embedders": {"bert": dict(bert)}},
            "initializer": {},
            "module_initializer": {},
            "modules": {
                "coref": {"spans_per_word": 0.3, "max_antecedents": 100, "coref_prop": 0},
                "ner": {},
                "relation": {"spans_per_word": 0.5},
                "events": {
                    "trigger_spans_per_word": 0.3,
                    "argument_spans_per_word": 0.8,
                    "loss_weights": {"trigger": 1.0, "arguments": 1.0},
                },
            },
            "loss_weights": {"ner": 0.2, "relation": 1.0, "coref": 0.0, "events": 0.0},
            "feature_size": 20,
            "max_span_width": 12,
            "target_task": "relation",
            "feedforward_params": {"num_layers": 2, "hidden_dims": hidden, "dropout": 0.4},
        },
    }
    here = folder / f".{name}"
    (here / "vocabulary").mkdir(parents=True)
    (here / "vocabulary/non_padded_namespaces.txt").write_text("*tags\n*labels\n")
    (here / f"vocabulary/{name}__ner_labels.txt").write_text("\n" + "\n".join(LABELS) + "\n")
    (here / f"vocabulary/{name}__relation_labels.txt").write_text("\n".join(RELATIONS) + "\n")
    (here / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    embedder = token_embedders.PretrainedTransformerMismatchedEmbedder(
        str(folder / ENCODER), max_length=512
    )
    settings = {
        key: value
        for key, value in config["model"].items()
        if key not in ("type", "embedder", "initializer", "module_initializer")
    }
    model = dygie.DyGIE(
        vocab=Vocabulary.from_files(str(here / "vocabulary")),
        embedder=text_field_embedders.BasicTextFieldEmbedder({"bert": embedder}),
        **json.loads(json.dumps(settings)),
    )
    balance(model, embedder, folder / ENCODER, name)
    torch.save(model.state_dict(), here / "weights.th")
    with tarfile.open(folder / f"{name}.tar.gz", "w:gz", compresslevel=1) as tar:
        for part in sorted(here.iterdir()):
            tar.add(part, arcname=part.name)
