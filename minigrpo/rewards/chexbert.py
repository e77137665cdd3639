"""CheXbert (Smit et al. 2020, arXiv 2004.09167): fourteen findings of a report, and its vector. A
BERT with a linear head for each finding.
"""

import re

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel

from .bert import encode
from .weights import find_file, fingerprint, load_encoder, load_tensors

CONDITIONS = (
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
    "No Finding",
)
# the classes of a head; No Finding has the first two only
BLANK, POSITIVE, NEGATIVE, UNCERTAIN = range(4)
LONGEST = 512  # tokens; the rest of a text is not read


class CheXbert(nn.Module):
    """bert-base-uncased with 14 heads on [CLS]. Make it with `from_weights`."""

    def __init__(self, config, tokenizer, fingerprint: str = ""):
        super().__init__()
        self.bert = BertModel(config)
        self.linear_heads = nn.ModuleList(nn.Linear(config.hidden_size, 4) for _ in CONDITIONS[:-1])
        self.linear_heads.append(nn.Linear(config.hidden_size, 2))
        self.tokenizer, self.fingerprint = tokenizer, fingerprint

    @classmethod
    def from_weights(cls, weights_dir: str | None, *, device: str = "cpu") -> "CheXbert":
        """The folder holds chexbert.pth (1.31 GB) and bert-base-uncased/ (config.json and
        tokenizer).
        """
        path = find_file(weights_dir, "chexbert.pth")
        config, tokenizer = load_encoder(
            weights_dir,
            "bert-base-uncased",
            lambda source: (
                BertConfig.from_pretrained(source),
                AutoTokenizer.from_pretrained(source, trust_remote_code=False),
            ),
            "config.json and tokenizer, under 1 MB",
        )
        state = load_tensors(path, "model_state_dict")
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        state.pop("bert.embeddings.position_ids", None)  # a buffer that older transformers saved
        model = cls(
            config, tokenizer, fingerprint(path, "chexbert", sorted(tokenizer.get_vocab().items()))
        )
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"{path} does not fit the config of bert-base-uncased beside it: {error}"
            ) from error
        return model.to(device).eval().requires_grad_(False)

    def _cls(self, texts: list[str]) -> Tensor:
        """Last hidden state of [CLS], [N, d]."""
        clean = [re.sub(r"\s+", " ", text).strip() for text in texts]
        ids = (
            self.tokenizer(clean, truncation=True, max_length=LONGEST)["input_ids"] if clean else []
        )
        device = next(self.parameters()).device
        rows = encode(
            lambda tokens, mask: self.bert(tokens, attention_mask=mask)[0],
            ids,
            self.tokenizer.pad_token_id,
            device,
        )
        first = (
            torch.stack([row[0] for row in rows])
            if rows
            else torch.empty(0, self.bert.config.hidden_size, device=device)
        )
        if not first.isfinite().all():
            raise FloatingPointError("CheXbert gave NaN")  # whose argmax would pass for a class
        return first

    def _distinct(self, texts: list[str]) -> tuple[Tensor, list[int]]:
        distinct = {text: n for n, text in enumerate(dict.fromkeys(texts))}
        return self._cls(list(distinct)), [distinct[text] for text in texts]

    @torch.inference_mode()
    def labels(self, texts: list[str]) -> np.ndarray:
        """Classes [N, 14] in the order of CONDITIONS: 0 blank, 1 positive, 2 negative, 3
        uncertain.
        """
        rows, index = self._distinct(texts)
        return (
            torch.stack([head(rows).argmax(-1) for head in self.linear_heads], 1)
            .cpu()
            .numpy()[index]
        )

    def vectors(self, texts: list[str]) -> np.ndarray:
        """The [CLS] vectors [N, d], fp32. Their cosine is RadCliQ's s_emb."""
        rows, index = self._distinct(texts)
        return rows.float().cpu().numpy()[index]


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of a with that of b, [N, d] -> [N], in -1..1."""
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def label_f1(predicted: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """F1 of the findings of each pair of reports, [N, 14] -> [N], in 0..1. Positive and uncertain
    both count as present, as in the paper's metric. No finding in either report is full agreement:
    1.
    """
    a, b = ((labels == POSITIVE) | (labels == UNCERTAIN) for labels in (predicted, reference))
    both, either = (a & b).sum(-1), a.sum(-1) + b.sum(-1)
    return np.where(either > 0, 2 * both / np.maximum(either, 1), 1.0)
