"""RadGraph: the entities and relations of a report, and how far two reports agree in them.

The model is that of the `radgraph` package (DyGIE++ on a BERT). The package annotates one report at
a time; here a batch takes one forward pass, with the package's own modules and the same
annotations.
"""

import tempfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, PretrainedConfig

from .radgraph_archive import MEND, Archive, read_archive
from .radgraph_transformers5 import import_radgraph, special_tokens
from .weights import cache_dir, find_file, fingerprint, load_encoder, load_tensors, unpack

# {"text": str, "entities": {"1": {"tokens", "label", "start_ix", "end_ix", "relations": [[type,
# id]]}}}
Annotation = dict

TOKENS_IN_BATCH = 4096  # padded tokens of one forward: bounds its memory
PAIRS_IN_BATCH = 8192  # pairs of spans whose relation is scored at once


class RadGraph:
    """Annotates texts. Make it with `from_weights`."""

    def __init__(self, package_model, device: str, fingerprint: str):
        self.name, self.fingerprint, self.device = (
            package_model.model_type,
            fingerprint,
            torch.device(device),
        )
        self.model = package_model.model.to(self.device).eval().requires_grad_(False)
        embedder = self.model._embedder.token_embedder_bert
        self.embedder, self.longest = embedder, embedder._matched_embedder._max_length
        indexer = package_model.reader._token_indexers["bert"]
        self.tokenizer, self.width = indexer._tokenizer, package_model.reader._max_span_width
        self.start, self.end = special_tokens(self.tokenizer)
        self.pieces: dict[str, list[int]] = {}  # of each word met so far
        if self.model._coref.coref_prop or self.model._loss_weights["coref"]:
            raise ValueError(
                f"this {self.name} archive links mentions across sentences, so the reports of a"
                " batch would affect each other: use the published radgraph or radgraph-xl"
            )

    @classmethod
    def from_weights(
        cls, weights_dir: str | None, *, xl: bool = True, device: str = "cpu"
    ) -> "RadGraph":
        """RadGraph-XL, or RadGraph 1.0. The folder holds the archive (or the folder that it unpacks
        to) and its encoder's.
        """
        import_radgraph()
        name = "radgraph-xl" if xl else "radgraph"
        folder = Path(weights_dir) / name if weights_dir else cache_dir() / name
        if not folder.is_dir():
            unpack(find_file(weights_dir, f"{name}.tar.gz"), folder)
        missing = [
            part
            for part in ("config.json", "weights.th", "vocabulary")
            if not (folder / part).exists()
        ]
        if missing:
            raise ValueError(
                f"{folder} lacks {', '.join(missing)}: delete it, and it is unpacked again from"
                f" {name}.tar.gz"
            )
        archive = read_archive(folder)
        source, _ = load_encoder(
            weights_dir,
            archive.encoder,
            _source_and_config,
            "config.json and tokenizer, under 1 MB",
        )
        weights = load_tensors(folder / "weights.th")
        try:
            model = _build(name, archive, source)
            model.model.load_state_dict(weights)
        except (
            ArithmeticError,
            AssertionError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise ValueError(
                f"{folder} fits neither its own config.json nor {source} "
                f"({str(error)[:300]}): {MEND}"
            ) from error
        vocabulary = sorted(model.reader._token_indexers["bert"]._tokenizer.get_vocab().items())
        return cls(
            model,
            device,
            fingerprint(
                folder / "weights.th",
                (folder / "config.json").read_text(),
                vocabulary,
                metadata.version("radgraph"),
                name,
            ),
        )

    def annotate(self, texts: list[str]) -> list[Annotation]:
        """The package's annotation of each text, each distinct text once. A blank text has no
        entities.
        """
        words = {text: self._words(text) for text in dict.fromkeys(texts)}
        rows = {text: self._row(annotations) for text, annotations in words.items() if annotations}
        annotations = {text: {"text": "", "entities": {}} for text in words if text not in rows}
        for batch in _batches(rows, self.longest):
            for text, entities in zip(
                batch,
                self._forward([rows[text] for text in batch], [words[text] for text in batch]),
            ):
                annotations[text] = {"text": " ".join(words[text]), "entities": entities}
        return [annotations[text] for text in texts]

    def _words(self, text: str) -> list[str]:
        from radgraph.utils import preprocess_reports

        return preprocess_reports([text], self.name)[0]["sentences"][0] if text.strip() else []

    def _row(self, words: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids [W] with special tokens, and the first and last token of each word [L, 2]; (-1,
        -1) where it has none.
        """
        words = [word[1:] if word in ("/.", "/?") else word for word in words]  # as its reader does
        new = [word for word in dict.fromkeys(words) if word not in self.pieces]
        if new:
            self.pieces.update(zip(new, self.tokenizer(new, add_special_tokens=False)["input_ids"]))
        ids, offsets, at = [], [], len(self.start)
        for word in words:
            pieces = self.pieces[word]
            offsets.append((at, at + len(pieces) - 1) if pieces else (-1, -1))
            ids += pieces
            at += len(pieces)
        # a longer text is encoded in parts of this many tokens
        room = self.longest - len(self.start) - len(self.end)
        parts = [ids[i : i + room] for i in range(0, len(ids), room)] or [[]]
        return torch.tensor(
            [i for part in parts for i in (*self.start, *part, *self.end)]
        ), torch.tensor(offsets)

    @torch.inference_mode()
    def _forward(self, rows: list[tuple[Tensor, Tensor]], words: list[list[str]]) -> list[dict]:
        """The entities of n reports from one pass through the encoder."""
        from radgraph.utils import get_entity

        ids, offsets = zip(*rows)
        # (n, W)
        mask = pad_sequence(
            [torch.ones(len(i), dtype=torch.bool) for i in ids], batch_first=True
        ).to(self.device)
        tokens = pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id).to(
            self.device
        )
        embedded = self.embedder(
            tokens,
            mask,
            pad_sequence(offsets, batch_first=True).to(self.device),
            mask,
            segment_concat_mask=mask,
        )  # (n, L, d)
        if not embedded.isfinite().all():
            raise FloatingPointError("RadGraph gave NaN")  # whose argmax would pass for a label
        width = embedded.shape[1]
        sizes = [len(_spans(len(words_of), self.width)) for words_of in words]
        # (S, 2) of all reports, S = sum of sizes
        spans = torch.cat([_spans(len(words_of), self.width) for words_of in words])
        # where each report's words start
        at = torch.arange(len(words)).repeat_interleave(torch.tensor(sizes))[:, None] * width
        # (1, S, D)
        vectors = self.model._endpoint_span_extractor(
            embedded.flatten(0, 1)[None], (spans + at)[None].to(self.device)
        )
        labels = self._entity_labels(vectors)
        kept, mentions = self._mentions(vectors, sizes, words, labels)
        relations = self._relations([vectors[0, index] for index in kept], mentions)
        result, first = [], 0
        for n, size in enumerate(sizes):
            # (start, end, label)
            named = [
                [*spans[i].tolist(), labels[i]] for i in range(first, first + size) if i in labels
            ]
            chosen = spans[kept[n].cpu()]
            linked = [
                [*chosen[i].tolist(), *chosen[j].tolist(), label] for i, j, label in relations[n]
            ]
            result.append(get_entity(named, linked, words[n]))
            first += size
        return result

    def _entity_labels(self, vectors: Tensor) -> dict[int, str]:
        """The label of each span (1, S) that has one. No label scores 0."""
        ner, space = self.model._ner, f"{self.name}__ner_labels"
        scores = ner._ner_scorers[space](vectors)[0]
        best = torch.cat([torch.zeros_like(scores[:, :1]), scores], -1).argmax(-1).cpu()
        return {
            i: ner.vocab.get_token_from_index(int(best[i]), space)
            for i in best.nonzero()[:, 0].tolist()
        }

    def _mentions(
        self, vectors: Tensor, sizes: list[int], words: list[list[str]], labels: dict[int, str]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of each report the entities that may enter a relation, in order [K], and their mention
        scores [K].

        The model allows the best-scored spans, half as many as words. The package scores all their
        pairs and then drops those that do not join two entities; leaving these out beforehand
        changes nothing and saves nearly all of the work.
        """
        relation = self.model._relation
        # (S,)
        scores = relation._mention_pruners[f"{self.name}__relation_labels"]._scorer(vectors)[
            0, :, 0
        ]
        kept, first = [], 0
        for words_of, size in zip(words, sizes):
            count = int(torch.ceil(torch.tensor(len(words_of)).float() * relation._spans_per_word))
            best = scores[first : first + size].topk(max(count, 1))[1] + first
            kept.append(
                torch.tensor(
                    sorted(labels.keys() & set(best.tolist())), dtype=torch.long, device=self.device
                )
            )
            first += size
        return kept, [scores[index] for index in kept]

    def _relations(
        self, vectors: list[Tensor], mentions: list[Tensor]
    ) -> list[list[tuple[int, int, str]]]:
        """(i, j, label) of each report's pairs of kept spans that have a relation. Pairs of all
        reports lie in one row.
        """
        relation, space = self.model._relation, f"{self.name}__relation_labels"
        sizes, flat, score = [len(v) for v in vectors], torch.cat(vectors), torch.cat(mentions)
        first = [sum(sizes[:n]) for n in range(len(sizes))]
        pairs = torch.cat(
            [
                torch.cartesian_prod(span, span)
                for span in (
                    torch.arange(f, f + k, device=self.device) for f, k in zip(first, sizes)
                )
            ]
        )
        best = []
        for part in pairs.view(-1, 2).split(PAIRS_IN_BATCH):
            a, b = flat[part[:, 0]], flat[part[:, 1]]
            scores = relation._relation_scorers[space](
                relation._relation_feedforwards[space](torch.cat([a, b, a * b], -1))
            )
            scores = scores + (score[part[:, 0]] + score[part[:, 1]])[:, None]
            # -1: no relation
            best.append(torch.cat([torch.zeros_like(scores[:, :1]), scores], -1).argmax(-1) - 1)
        best, relations, end = torch.cat(best).cpu(), [], 0
        for k in sizes:
            table, end = best[end : end + k * k].view(k, k), end + k * k
            relations.append(
                [
                    (i, j, relation.vocab.get_token_from_index(int(table[i, j]), space))
                    for i, j in (table >= 0).nonzero().tolist()
                ]
            )
        return relations


def _source_and_config(source: str) -> tuple[str, PretrainedConfig]:
    return source, AutoConfig.from_pretrained(source, trust_remote_code=False)


def _build(name: str, archive: Archive, source: str) -> SimpleNamespace:
    """The package's reader and model, without weights, as its RadGraph class has them; built only
    from the archive's numbers.
    """
    from radgraph.allennlp.common import cached_transformers
    from radgraph.allennlp.data import Vocabulary
    from radgraph.allennlp.data.token_indexers import PretrainedTransformerMismatchedIndexer
    from radgraph.allennlp.modules.text_field_embedders import BasicTextFieldEmbedder
    from radgraph.allennlp.modules.token_embedders import PretrainedTransformerMismatchedEmbedder
    from radgraph.dygie.models.dygie import DyGIE

    # the package reads a folder, and leaves a lock in it
    with tempfile.TemporaryDirectory() as scratch:
        for file, text in archive.vocabulary.items():
            (Path(scratch) / file).write_text(text, encoding="utf-8")
        vocabulary = Vocabulary.from_files(scratch, *archive.special)
    missing = {f"{name}__ner_labels", f"{name}__relation_labels"} - vocabulary.get_namespaces()
    if missing:
        raise ValueError(f"vocabulary/ lacks {', '.join(sorted(missing))}")
    indexer = PretrainedTransformerMismatchedIndexer(source, max_length=archive.longest)
    embedder = PretrainedTransformerMismatchedEmbedder(source, max_length=archive.longest)
    model = DyGIE(
        vocab=vocabulary, embedder=BasicTextFieldEmbedder({"bert": embedder}), **archive.settings
    )
    cached_transformers._model_cache.clear()  # it keeps a second copy of the encoder
    reader = SimpleNamespace(_token_indexers={"bert": indexer}, _max_span_width=archive.width)
    return SimpleNamespace(model_type=name, model=model, reader=reader)


def _spans(words: int, width: int) -> Tensor:
    """All spans of at most `width` words, first and last word [S, 2], in the package's order."""
    start = torch.arange(words)[:, None].expand(-1, width)
    end = start + torch.arange(width)
    inside = end < words
    return torch.stack([start[inside], end[inside]], -1)


def _batches(rows: dict[str, tuple], longest: int) -> list[list[str]]:
    """Batches of texts of similar length, at most TOKENS_IN_BATCH padded tokens each. A text longer
    than the encoder is a batch of its own.
    """
    batches, open_batch = [], []
    for text in sorted(rows, key=lambda text: len(rows[text][0]), reverse=True):
        if len(rows[text][0]) > longest:
            batches.append([text])
            continue
        most = len(rows[open_batch[0]][0]) if open_batch else 0
        if (len(open_batch) + 1) * most > TOKENS_IN_BATCH or len(rows[text][0]) < 0.8 * most:
            batches.append(open_batch)
            open_batch = []
        open_batch.append(text)
    return batches + ([open_batch] if open_batch else [])


def _f1(hyp: set, ref: set) -> float:
    both = len(hyp & ref)
    return 2 * both / (len(hyp) + len(ref)) if both else 0.0


def radgraph_f1(hyp: Annotation, ref: Annotation) -> dict[str, float]:
    """How far two reports agree, four times; each in 0..1, and 0 where either set is empty.

    simple: entities (tokens, label). partial: with a flag whether the entity has a relation.
        complete: (tokens, label, relation, target's tokens), and (tokens, label) for entities
    without one. These are the levels of the package's F1RadGraph 0.1.18, its letter case included:
    `complete` lower-cases entities that have relations, and no others. radcliq: the mean of F1 over
    (tokens, label) and F1 over ((tokens, label), (tokens, label), type), as RadCliQ uses it (Yu et
    al. 2023, Patterns 4:100802).
    """
    sets = [_sets(annotation["entities"]) for annotation in (hyp, ref)]
    scores = {level: _f1(sets[0][level], sets[1][level]) for level in sets[0]}
    return {level: scores[level] for level in ("simple", "partial", "complete")} | {
        "radcliq": (scores["simple"] + scores["relations"]) / 2
    }


def _sets(entities: dict[str, dict]) -> dict[str, set]:
    sets = {"simple": set(), "partial": set(), "complete": set(), "relations": set()}
    for entity in entities.values():
        named = (entity["tokens"], entity["label"])
        sets["simple"].add(named)
        sets["partial"].add((*named, bool(entity["relations"])))
        if not entity["relations"]:
            sets["complete"].add(named)
        for kind, target in entity["relations"]:
            other = entities[target]
            sets["complete"].add((named[0].lower(), named[1], kind, other["tokens"].lower()))
            sets["relations"].add((named, (other["tokens"], other["label"]), kind))
    return sets
