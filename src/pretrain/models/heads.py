"""Heads on the backbone's hidden states (B, T, D): vocabulary, sequence and token heads.

A vocabulary head exposes its parts (features, weight, bias, softcap), so that a loss can select the target positions
before the projection. Letters: B rows, T tokens, D hidden, V vocabulary, C classes, N targets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.errors import ConfigError, ModelError
from pretrain.nn.kernels import dropout
from pretrain.nn.mlp import activation
from pretrain.nn.tensor_parallel import VocabShard, copy_to_tensor_parallel

__all__ = [
    "HEAD_KINDS",
    "IMAGE_HEADS",
    "LABELLED",
    "LanguageHead",
    "SequenceHead",
    "TokenHead",
    "Transform",
    "architectures_of",
    "decoder_head",
    "kind_named_by",
    "kind_of_class",
    "labels_named_by",
    "pool_documents",
    "pretraining_head",
    "text_architectures",
]

HEAD_KINDS = (
    "causal-lm",
    "masked-lm",
    "sequence-classification",
    "token-classification",
    "question-answering",
    "image-classification",
    "segmentation",
    "object-detection",
    "audio-classification",
    "masked-image",
)


LABELLED = (
    *("sequence-classification", "token-classification", "image-classification"),
    *("segmentation", "object-detection", "audio-classification"),
)
# Ending of an architecture's name in config.json -> kind of head.
ARCHITECTURES = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForPreTraining": "masked-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForSemanticSegmentation": "segmentation",
    "ForObjectDetection": "object-detection",
    "ForAudioClassification": "audio-classification",
}


# Of the heads that families of images have besides those of their pre-training; transformers lacks some of them.
IMAGE_HEADS = ("ForImageClassification", "ForSemanticSegmentation", "ForObjectDetection")
_TEXT_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def architectures_of(name: str, *endings: str) -> dict[str | None, str]:
    """Return kind of head -> class name in transformers, of a body and of the heads with these endings."""
    return {None: f"{name}Model"} | {ARCHITECTURES[ending]: name + ending for ending in endings}


def text_architectures(name: str, language: str = "ForCausalLM") -> dict[str | None, str]:
    """Return the same of a family with a language-model head and three others."""
    return architectures_of(name, language, *_TEXT_HEADS)


class Transform(nn.Module):
    """A dense layer, an activation and an optional norm; (..., D) -> (..., D)."""

    def __init__(
        self, hidden_size: int, act: str, norm: nn.Module | None, bias: bool = True
    ) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.norm = norm
        self.activation = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.dense(x))
        return x if self.norm is None else self.norm(x)


class LanguageHead(nn.Module):
    """Scores over the vocabulary, (B, T, D) -> (B, T, V).

    Args:
        embedding: the token embedding; its weight is used while the head is tied.
        tied: share the embedding's weight.
        transform: module before the projection, as in masked-language models.
        bias: add a bias per token of the vocabulary.
        softcap: scores become ``softcap * tanh(scores / softcap)``.

    Attributes:
        vocab: the rows of the vocabulary that this rank holds under tensor parallelism, or None.
    """

    vocab: VocabShard | None = None

    def __init__(
        self,
        embedding: nn.Embedding,
        *,
        tied: bool,
        transform: nn.Module | None = None,
        bias: bool = False,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.transform = transform
        self.softcap = softcap
        # The tuple keeps the embedding from being a child module of the head, so that its weight has only one name.
        self._embedding = (embedding,)
        self.output_weight = None if tied else nn.Parameter(torch.empty_like(embedding.weight))
        self.output_bias = nn.Parameter(torch.zeros(embedding.num_embeddings)) if bias else None

    @property
    def tied(self) -> bool:
        """Whether the projection shares the weight of the token embedding."""
        return self.output_weight is None

    def untie(self) -> None:
        """Give the head its own weight, a copy of the embedding's."""
        if self.output_weight is None:
            self.output_weight = nn.Parameter(self._embedding[0].weight.detach().clone())

    def features(self, hidden: Tensor) -> Tensor:
        """Return the input of the projection by ``weight()``, (..., D) -> (..., D)."""
        return hidden if self.transform is None else self.transform(hidden)

    def weight(self) -> Tensor:
        """Return the projection (V, D), or the rows of this rank."""
        return self._embedding[0].weight if self.output_weight is None else self.output_weight

    def bias(self) -> Tensor | None:
        """Return the bias (V,), or the rows of this rank, or None."""
        return self.output_bias

    def forward(self, hidden: Tensor, batch: Mapping[str, Tensor] | None = None) -> Tensor:
        features = self.features(hidden)
        if self.vocab is not None:
            features = copy_to_tensor_parallel(features, self.vocab.group)
        scores = F.linear(features, self.weight(), self.output_bias)
        if self.vocab is not None:
            scores = self.vocab.gather(scores)
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)


class SequenceHead(nn.Module):
    """Scores per row, (B, T, D) -> (B, C), or per document of packed rows, (N, C).

    Args:
        hidden_size: D.
        num_labels: C.
        pool: ``first`` token, ``mean`` over real tokens, ``last`` real token, the mean over all tokens but the first
            (``patches`` of an image), or the mean of the first two (``pair``: class and distillation token).
        transform: applied to the pooled vector.
        bias: whether the classifier has a bias.
        dropout: dropout before the classifier.
        dropout_first: apply dropout before the transform as well (RoBERTa).
        pad_id: the id of padding, which ``last`` passes over, also where it is a token of the text, as in transformers.

    Attributes:
        reads_padding: ``last`` is the last token of a text, whatever its id: so earlier versions trained their models.
        unit: what a score of 1 in memory stands for, a power of two; see ``set_unit``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_labels: int,
        *,
        pool: str,
        transform: nn.Module | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        dropout_first: bool = False,
        pad_id: int | None = None,
    ) -> None:
        super().__init__()
        self.pool, self.pad_id = pool, pad_id
        self.dropout, self.dropout_first = dropout, dropout_first
        self.transform = transform
        self.classifier = nn.Linear(hidden_size, num_labels, bias=bias)
        self.unit = 1.0
        self.reads_padding = False

    @torch.no_grad()
    def set_unit(self, size: float, *, rescale: bool) -> None:
        """Let the weights in memory be those of the file divided by a power of two, so that the scores are about 1.

        An optimizer changes every weight by about the learning rate, so scores in thousands would not be reached, and
        scores of thousandths would be passed. By a power of two nothing is rounded: the file and the scores stay the
        same, bit by bit.

        Args:
            size: usual size of a score; its nearest power of two is the unit.
            rescale: the weights are those of the file, and not new ones.
        """
        unit = 2.0 ** round(math.log2(size))
        for parameter in self.classifier.parameters() if rescale else ():
            if not parameter.is_meta:
                parameter.mul_(self.unit / unit)
        self.unit = unit

    def forward(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        if "document_ids" in batch and "first_index" not in batch:
            raise ModelError(
                "A sequence-classification head gives one answer per document, but these rows are packed with several "
                "documents (document_ids). Add the first and last token of each document to the batch (first_index, "
                "last_index), or put one document in each row."
            )
        pooled = self._pool(hidden, batch)
        if self.dropout_first:
            pooled = dropout(pooled, self.dropout, self.training)
        if self.transform is not None:
            pooled = self.transform(pooled)
        pooled = dropout(pooled, self.dropout, self.training)
        if self.classifier.out_features > 1:
            scores: Tensor = self.classifier(pooled)
            return scores
        # A number may be far from 0 and still matter in its last digits, such as a year: it is not rounded to 8 bits.
        with torch.autocast(pooled.device.type, enabled=False):
            scores = self.classifier(pooled.to(self.classifier.weight.dtype)).float()
        return scores * self.unit if self.unit != 1.0 else scores

    @property
    def lead(self) -> int:
        """How many tokens at the start of a row are all that is pooled; 0 if others may be."""
        return {"first": 1, "pair": 2}.get(self.pool, 0)

    def _pool(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Pool (B, T, D) -> (B, D), or (N, D) for the N documents of packed rows."""
        kept = batch.get("keep_index")
        if kept is not None and kept.ndim == 1:  # the backbone has computed the pooled tokens only
            return hidden
        if "first_index" in batch:
            return pool_documents(hidden, batch, self.pool)
        if self.pool == "first":
            return hidden[:, 0]
        if self.pool == "patches":
            return hidden[:, 1:].mean(1)
        if self.pool == "pair":
            return hidden[:, :2].mean(1)
        real = batch.get("attention_mask")
        if self.pool == "mean":
            if real is None:
                return hidden.mean(1)
            weight = real.to(hidden.dtype).unsqueeze(-1)
            return (hidden * weight).sum(1) / weight.sum(1)
        if self.pad_id is not None and (real is None or not self.reads_padding):
            text = batch["input_ids"] != self.pad_id
            real = text if real is None else real.bool() & text
        if real is None:
            return hidden[:, -1]
        columns = torch.arange(hidden.shape[1], device=hidden.device)
        last = torch.where(real.bool(), columns, 0).argmax(1)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]


def pool_documents(hidden: Tensor, batch: Mapping[str, Tensor], pool: str) -> Tensor:
    """Return one vector for each document of packed rows, (B, T, D) -> (N, D).

    Args:
        hidden: hidden states of the backbone.
        batch: has ``first_index`` and ``last_index`` (N,), the first and last token of each document in the flattened
            rows.
        pool: ``first``, ``last``, or over the tokens ``mean``, ``mean_sqrt_len_tokens``, ``weightedmean`` (weighted by
            position, from 1) or ``max``.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    first, last = batch["first_index"], batch["last_index"]
    if pool in ("first", "last"):
        return flat[first if pool == "first" else last]
    lengths = last - first + 1
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=flat.device), lengths)
    begin = torch.cumsum(lengths, 0) - lengths
    place = first[owner] + torch.arange(len(owner), device=flat.device) - begin[owner]
    if pool == "max":
        largest = flat.new_full((len(lengths), flat.shape[-1]), -torch.inf)
        places = owner[:, None].expand(-1, flat.shape[-1])
        return largest.scatter_reduce(0, places, flat[place], "amax")
    weight = lengths.new_ones(len(owner)) if pool != "weightedmean" else place - first[owner] + 1
    weight = weight.to(flat.dtype)
    sums = flat.new_zeros(len(lengths), flat.shape[-1])
    sums = sums.index_add(0, owner, flat[place] * weight[:, None])
    total = weight.new_zeros(len(lengths)).index_add(0, owner, weight)
    return sums / (total.sqrt() if pool == "mean_sqrt_len_tokens" else total)[:, None]


class TokenHead(nn.Module):
    """Scores per token, (B, T, D) -> (B, T, C); for question answering C = 2, the start and end scores of spans."""

    def __init__(
        self,
        hidden_size: int,
        num_labels: int,
        *,
        transform: nn.Module | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.transform = transform
        self.classifier = nn.Linear(hidden_size, num_labels)

    def forward(self, hidden: Tensor, batch: Mapping[str, Tensor] | None = None) -> Tensor:
        if self.transform is not None:
            hidden = self.transform(hidden)
        scores: Tensor = self.classifier(dropout(hidden, self.dropout, self.training))
        return scores


def decoder_head(
    config: Any, embedding: nn.Embedding, kind: str, num_labels: int
) -> LanguageHead | SequenceHead | TokenHead:
    """Return the head that decoders have in transformers: a projection, or a classifier of the last or every token."""
    if kind == "causal-lm":
        return LanguageHead(embedding, tied=config.tie_embeddings)
    if kind == "sequence-classification":
        return SequenceHead(
            config.hidden_size, num_labels, pool="last", bias=False, pad_id=config.pad_id
        )
    if kind == "question-answering":
        return TokenHead(config.hidden_size, 2)
    dropout = 0.1 if config.classifier_dropout is None else config.classifier_dropout
    return TokenHead(config.hidden_size, num_labels, dropout=dropout)


def pretraining_head(architectures: Mapping[str | None, str], *, causal: bool) -> str | None:
    """Return the kind of head that a family is pre-trained with, or None if it has no such head."""
    kinds = ("causal-lm" if causal else "masked-lm", "masked-image")
    return next((kind for kind in kinds if kind in architectures), None)


def kind_named_by(
    config: Mapping[str, Any], architectures: Mapping[str | None, str], *, causal: bool
) -> str | None:
    """Return the kind of head that ``architectures`` names, or that of pre-training if the key is absent.

    None is the body alone; it is also returned if the named head is not implemented.
    """
    names = config.get("architectures")
    if not names:
        return pretraining_head(architectures, causal=causal)
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise ConfigError(
            f"config.json: 'architectures' is {names!r}; it must be a list of class names."
        )
    for own, name in architectures.items():
        if name == names[0]:
            return own
    kind = kind_of_class(names[0])
    return kind if kind in architectures else None


def kind_of_class(name: str) -> str | None:
    """Return the kind of head that the name of a class in transformers ends with; None without one."""
    return next((kind for ending, kind in ARCHITECTURES.items() if name.endswith(ending)), None)


def labels_named_by(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the class names of ``id2label``, or ``num_labels`` generated ones."""
    table = config.get("id2label")
    if isinstance(table, Mapping) and table:
        try:
            pairs = sorted((int(index), str(label)) for index, label in table.items())
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"config.json: a key of 'id2label' is not a number ({error})."
            ) from error
        if [index for index, _ in pairs] != list(range(len(pairs))):
            raise ConfigError(
                "config.json: the keys of 'id2label' must be 0, 1, 2, ... without gaps."
            )
        return tuple(label for _, label in pairs)
    count = config.get("num_labels", 2)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 1 << 20:
        raise ConfigError(
            f"config.json: 'num_labels' is {count!r}; it must be a positive whole number."
        )
    return tuple(f"LABEL_{i}" for i in range(count))
