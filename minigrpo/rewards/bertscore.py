"""BERTScore (Zhang et al. 2020, arXiv 1904.09675): each token of one text is matched to the most
similar one of the other.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer

from .bert import encode
from .cache import Cached
from .weights import load_encoder

SIZES = {"distilroberta-base": "331 MB", "distilbert-base-uncased": "268 MB"}
PAIRS_IN_BATCH = 64


class BertScore:
    """F1 of BERTScore, without idf weights, rescaled by a baseline. Make it with `from_weights`."""

    def __init__(self, model, tokenizer, *, layer: int, baseline: float, prefix: str, device: str):
        self.device, self.model, self.tokenizer = (
            torch.device(device),
            model.to(device).eval().requires_grad_(False),
            tokenizer,
        )
        self.layer, self.baseline, self.prefix = layer, baseline, prefix
        self.longest = min(tokenizer.model_max_length, 512)
        # Token vectors are large (about 0.2 MB per report) and cheap to recompute: cached in
        # memory, not on disk.
        self.references = Cached(self._embed, "", limit=1024)

    @classmethod
    def from_weights(
        cls,
        weights_dir: str | None,
        *,
        model: str = "distilroberta-base",
        layer: int = 5,
        baseline: float = 0.8473319,
        device: str = "cpu",
    ) -> "BertScore":
        """The default is RadCliQ's. The folder holds the model's own: DIR/distilroberta-base/ with
        config, tokenizer, weights.

        `layer`: the layer whose output is compared. `baseline`: the F of unrelated sentences for
            that layer (bert-score's tables).
        """

        def load(source):
            encoder = AutoModel.from_pretrained(
                source, trust_remote_code=False, use_safetensors=True
            )
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            return encoder, tokenizer

        encoder, tokenizer = load_encoder(
            weights_dir, model, load, SIZES.get(model, "config, tokenizer and weights")
        )
        layers = next(
            (part for name, part in encoder.named_modules() if name.split(".")[-1] == "layer"), None
        )
        if layers is None or not 1 <= layer <= len(layers):
            raise ValueError(
                f"BERTScore: {model} has no layer {layer}"
                + (f": choose 1 to {len(layers)}" if layers else "")
            )
        del layers[layer:]  # those above are not looked at
        # bert-score's add_prefix_space
        prefix = " " if getattr(encoder.config, "model_type", "") in ("roberta", "gpt2") else ""
        return cls(encoder, tokenizer, layer=layer, baseline=baseline, prefix=prefix, device=device)

    def _embed(self, texts: list[str]) -> list[tuple[Tensor, Tensor]]:
        """For each text the unit vectors of its tokens [T, d], and which of them count [T]: special
        tokens match, but have weight 0.
        """
        clean = [self.prefix + text.strip() if text.strip() else "" for text in texts]
        ids = self.tokenizer(clean, truncation=True, max_length=self.longest)["input_ids"]
        rows = encode(
            lambda tokens, mask: self.model(tokens, attention_mask=mask)[0],
            ids,
            self.tokenizer.pad_token_id,
            self.device,
        )
        special = torch.tensor([self.tokenizer.cls_token_id, self.tokenizer.sep_token_id])
        weights = [(~torch.isin(torch.tensor(row), special)).float().to(self.device) for row in ids]
        return [
            (row / row.norm(dim=-1, keepdim=True), weight) for row, weight in zip(rows, weights)
        ]

    @torch.inference_mode()
    def score(self, hyps: list[str], refs: list[str]) -> list[float]:
        """Rescaled F1 of each pair, (F - baseline) / (1 - baseline): at most 1, about 0 for
        unrelated texts; a blank text has F = 0. Each distinct text is encoded once; references are
        cached between calls.
        """
        if len(hyps) != len(refs):
            raise ValueError(f"{len(hyps)} hypotheses for {len(refs)} references: give pairs")
        distinct = list(dict.fromkeys(hyps))
        known = dict(zip(distinct, self._embed(distinct))) if distinct else {}
        pairs = list(zip([known[hyp] for hyp in hyps], self.references(refs)))
        f = [self._f1(pairs[i : i + PAIRS_IN_BATCH]) for i in range(0, len(pairs), PAIRS_IN_BATCH)]
        return ((torch.cat(f) - self.baseline) / (1 - self.baseline)).tolist() if f else []

    @staticmethod
    def _f1(pairs: list[tuple]) -> Tensor:
        """F of n pairs, [n]. Precision: the mean over the hypothesis' tokens of their best cosine;
        recall: the reference's.

        Padding can't be the best match, so a pair's score does not depend on the batch; in
        bert-score padding counts as a cosine of 0.
        """
        (hyp, hyp_weight), (ref, ref_weight) = (
            [pad_sequence(part, batch_first=True) for part in zip(*side)] for side in zip(*pairs)
        )
        padded = [
            pad_sequence(
                [torch.zeros_like(weight) for _, weight in side],
                batch_first=True,
                padding_value=1.0,
            ).bool()
            for side in zip(*pairs)
        ]
        cosines = hyp @ ref.transpose(1, 2)  # (n, T_hyp, T_ref)
        best_of_hyp = cosines.masked_fill(padded[1][:, None], -1.0).amax(2)
        best_of_ref = cosines.masked_fill(padded[0][:, :, None], -1.0).amax(1)
        precision = (best_of_hyp * hyp_weight).sum(1) / hyp_weight.sum(1)
        recall = (best_of_ref * ref_weight).sum(1) / ref_weight.sum(1)
        f = 2 * precision * recall / (precision + recall)
        # False for NaN: a text without tokens that count
        alike = torch.minimum(precision, recall) > 0
        return torch.where(
            alike, f, torch.where(hyp.isnan().any((1, 2)) | ref.isnan().any((1, 2)), torch.nan, 0.0)
        )
