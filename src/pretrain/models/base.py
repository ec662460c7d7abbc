"""``Model``: a backbone, a head and a tokenizer.

The families subclass ``Backbone``, one module each. ``Model`` is independent of the family: it maps its parameters to
the tensor names of Hugging Face's files (through the family's name table), initialises, counts and describes itself.

Letters: B rows, T tokens, D hidden, V vocabulary, C classes.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pretrain.errors import ConfigError, ModelError, did_you_mean
from pretrain.hub import ModelMethods
from pretrain.models import FAMILIES, family_class, state
from pretrain.models.backbone import Backbone, Batch
from pretrain.models.config import (
    GENERATION_KEYS,
    SIZES,
    BackboneConfig,
    ConfigReader,
    drop_code,
)
from pretrain.models.heads import HEAD_KINDS, LABELLED, SequenceHead, kind_named_by, labels_named_by
from pretrain.models.names import LoadReport, Name
from pretrain.nn.buffers import parameters_on_meta
from pretrain.nn.device import local

if TYPE_CHECKING:
    from pretrain.data.tokenizer import Tokenizer
    from pretrain.models.sentences import SentenceSettings

__all__ = [
    "HEAD_KINDS",
    "SIZES",
    "Backbone",
    "BackboneConfig",
    "Batch",
    "LoadReport",
    "Model",
    "Name",
    "check_head",
]


def check_head(backbone_class: type[Backbone], head: str | None) -> None:
    """Check that a family has a head.

    Raises:
        ModelError: it has no such head.
    """
    if head is not None and head not in HEAD_KINDS:
        raise ModelError(f"There is no head {head!r}." + did_you_mean(head, HEAD_KINDS))
    if head not in backbone_class.architectures:
        known = [str(kind) for kind in backbone_class.architectures if kind is not None]
        families = {name: family_class(name) for name in FAMILIES}
        fit = [
            name
            for name, family in families.items()
            if head in family.architectures and family.unit_name == backbone_class.unit_name
        ]
        raise ModelError(
            f"A {backbone_class.model_type} model has no {head} head. Its heads: {', '.join(known)}."
            + f" Families with that head: {', '.join(fit)}." * bool(fit)
        )


def _successor_named_by(config: Mapping[str, Any], family: type[Backbone]) -> str | None:
    """Return the kind of head of the successor whose body the file names, such as an image tower; None without."""
    named = config.get("architectures") or ()
    for kind, path in family.successors.items():
        body = family_class(path).architectures.get(None)
        if body in named and body != family.architectures.get(None):
            return kind
    return None


def _keys_of(backbone_class: type[Backbone]) -> set[str]:
    """Keys of config.json that a family reads."""
    return {key.name for key in backbone_class.hf_keys.values()}


class Model(ModelMethods, nn.Module):
    """Backbone, head and tokenizer; returned by ``pretrain.load``.

    Args:
        backbone: the backbone of a family.
        head: the head; with None the model returns the backbone's (B, T, D).
        head_kind: one of ``HEAD_KINDS``, or None.
        tokenizer: used by ``generate``, ``fill_mask`` and ``embed``; ``forward`` works without it.
        labels: names of the classes of a classification head.

    Attributes:
        processor: what turns raw inputs into batches: a tokenizer, an image processor, or one for pairs that has a
            ``tokenizer``. Its ``save(directory)`` writes its files beside the weights, and the family's
            ``processor_class`` reads them; its ``fingerprint`` tells two apart.
        generation_config: content of generation_config.json.
        extra_config: unused keys of config.json, kept for the next save; this package's own block is ``pretrain``.
        sentences: settings of ``embed`` from the files of a sentence-transformers directory, or None.
        remarks: keys of config.json that were read and have no effect; ``load`` prints them.
        fresh: parameters that were not loaded from a file, such as a new head on a pre-trained body.
        source: directory that the weights were read from, as the caller spelled it; None for a model built here.
        files_hash: hash of the weight files that it was opened from, which their manifest records; None without one.
        adapter: the adapter added by ``pretrain.lora.apply_lora``, or None.
        card: README.md for directories that the model is saved to; None generates one from config.json.
        merge_gap: largest difference in the outputs caused by the last ``merge``, or None.
        tp: how the parameters are split by tensor parallelism (``pretrain.distributed.tensor_parallel``), or None.
        layout: which part of every parameter this rank holds (``pretrain.nn.layout``); None if it holds all of them.
        computes_on: device of the computation if the parameters are offloaded to another one (``cpu_offload``); None
            if it is the device of the parameters.
        start: function that fills a model on the meta device with weights after it has been sharded.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module | None = None,
        *,
        head_kind: str | None = None,
        tokenizer: Tokenizer | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.head_kind = head_kind
        self.processor: Any = tokenizer
        self.labels = None if labels is None else tuple(labels)
        self.generation_config: dict[str, Any] = {}
        self.extra_config: dict[str, Any] = {}
        self.sentences: SentenceSettings | None = None
        self.remarks: tuple[str, ...] = ()
        self.fresh: frozenset[str] = frozenset()
        self.source: str | None = None
        self.files_hash: str | None = None
        self.adapter: Any = None
        self.merge_gap: float | None = None
        self.card: str | None = None
        self.tp: Any = None
        self.layout: Any = None
        self.computes_on: torch.device | None = None
        self.start: Callable[[Model], object] | None = None
        self._refuse_unsaved_state()

    def _refuse_unsaved_state(self) -> None:
        """Refuse state that no file would hold, and buffers whose values are not known yet."""
        tensors = [*self.named_parameters(remove_duplicate=False), *self.named_buffers()]
        if lost := sorted(self.state_dict().keys() - {name for name, _ in tensors}):
            raise ModelError(
                f"{type(self.backbone).__name__} has the extra state {lost[0]!r}. Files hold parameters and buffers "
                "only, so it would be lost. Register it as a buffer."
            )
        if empty := [name for name, buffer in self.named_buffers() if buffer.is_meta]:
            raise ModelError(
                f"The buffer {empty[0]!r} of {type(self.backbone).__name__} is computed from parameters, which have no "
                "values yet when the model is constructed. Compute it from the config, or in forward()."
            )

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The processor if it is a tokenizer, or the tokenizer that it contains; None without one."""
        held: Any = self.processor
        return held if hasattr(held, "pad_id") else getattr(held, "tokenizer", None)

    @tokenizer.setter
    def tokenizer(self, value: Tokenizer | None) -> None:
        """Make a tokenizer the processor.

        Raises:
            ModelError: the family counts its positions from the id of padding, and the tokenizer has another one.
        """
        pad, before = self.backbone.config.pad_id, self.tokenizer
        known = (None, pad) if before is None else (None, pad, before.pad_id)  # as published
        if value is not None and self.backbone.positions_from_pad and value.pad_id not in known:
            raise ModelError(
                f"{self.backbone.model_type} counts its positions from the id of padding, which is {pad} in this model "
                f"and {value.pad_id} in the tokenizer, where {pad} is another token. Build the model with its "
                "tokenizer: pretrain.build(..., tokenizer=...)."
            )
        self.processor = value

    @property
    def device(self) -> torch.device:
        """Device on which inputs must be."""
        return self.computes_on or next(self.parameters()).device

    @classmethod
    def build(
        cls,
        backbone_class: type[Backbone],
        config: BackboneConfig,
        *,
        head: str | None,
        labels: Sequence[str] | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> Model:
        """Build a model whose parameters are on the meta device, without memory; ``materialize`` or loading fills them.

        Raises:
            ModelError: the family has no such head.
        """
        check_head(backbone_class, head)
        if head in LABELLED and labels is None:
            labels = ("LABEL_0", "LABEL_1")
        with parameters_on_meta():
            backbone = backbone_class(config)
            module = None if head is None else backbone.build_head(head, len(labels or ()) or 2)
        return cls(backbone, module, head_kind=head, tokenizer=tokenizer, labels=labels)

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], head: str | None = None) -> Model:
        """Build a model on the meta device from the content of a config.json.

        Args:
            config: the parsed file.
            head: replaces the head that ``architectures`` names; ``"none"`` for the backbone alone.

        Raises:
            ConfigError: an unknown family, a missing or mistyped key, sizes out of bounds, or an unsupported feature.
        """
        family = config.get("model_type")
        if not isinstance(family, str):
            raise ConfigError(
                "config.json has no 'model_type'. Is it the config of a Hugging Face model?"
            )
        backbone_class = family_class(family, path_allowed=False)
        known, causal = backbone_class.architectures, backbone_class.causal
        wanted = kind_named_by(config, known, causal=causal) if head in (None, "none") else head
        if wanted is None:
            wanted = _successor_named_by(config, backbone_class)
        if wanted is not None and wanted in backbone_class.successors:
            former, backbone_class = backbone_class, family_class(backbone_class.successors[wanted])
            family, gone = backbone_class.model_type, _keys_of(former) - _keys_of(backbone_class)
            config = {key: value for key, value in config.items() if key not in gone}
        reader = ConfigReader(config, family)
        settings = backbone_class.config_from_hf(reader)
        kind = (
            None
            if head == "none"
            else head
            or kind_named_by(config, backbone_class.architectures, causal=backbone_class.causal)
        )
        labels = labels_named_by(config) if kind in LABELLED else None
        model = cls.build(backbone_class, settings, head=kind, labels=labels)
        model.extra_config = reader.rest()
        block = model.extra_config.get("pretrain")
        trained = block.get("objective") if isinstance(block, Mapping) else None
        if isinstance(model.head, SequenceHead) and isinstance(trained, Mapping):
            of_head = kind == kind_named_by(
                config, backbone_class.architectures, causal=backbone_class.causal
            )
            model.head.reads_padding = (
                of_head and "task" in trained and "skips_padding" not in trained
            )
        model.remarks = tuple(reader.remarks)
        named = config.get("architectures") or [backbone_class.architectures.get(kind)]
        if head is None and kind is None and named != [backbone_class.architectures.get(None)]:
            model.remarks += (f"architectures {named} (that head is not implemented)",)
        # Older directories keep the generation settings here; generation_config.json, if there is one, replaces them.
        model.generation_config = {
            key: config[key] for key in GENERATION_KEYS if config.get(key) is not None
        }
        ends = config.get("eos_token_id")
        if isinstance(ends, list):
            model.generation_config["eos_token_id"] = [end for end in ends if type(end) is int]
        return model

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What config.json records of the making of the model, in this package's own block; empty if there is none."""
        block = self.extra_config.get("pretrain")
        return block if isinstance(block, Mapping) else {}

    def end_ids(self, given: Any = None) -> list[int]:
        """Return the ids that end a text: those given, or else the checkpoint's, or else the tokenizer's eos."""
        tokenizer = self.tokenizer
        for found in (
            given,
            self.generation_config.get("eos_token_id"),
            self.backbone.config.eos_id,
            None if tokenizer is None else tokenizer.eos_id,
        ):
            # generation_config.json is untrusted input: values that are not ids are skipped.
            ids = found if isinstance(found, list | tuple) else [found]
            if ids := [i for i in ids if type(i) is int]:
                return [i for i in ids if 0 <= i < self.backbone.vocab_size]
        return []

    def materialize(self, seed: int = 0, device: str | torch.device = "cpu") -> Model:
        """Allocate memory for the parameters, initialise them and return the model."""

        def allocate(old: Tensor) -> Tensor:
            return torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=device)

        self._apply(allocate)  # type: ignore[no-untyped-call]  # `to_empty` does the same, and imports sympy
        self.init_weights(seed)
        return self

    @torch.no_grad()
    def init_weights(self, seed: int = 0, names: Collection[str] | None = None) -> None:
        """Initialise the parameters as the family's paper does, and the buffers as their modules do.

        Each tensor is drawn with a generator seeded by ``seed`` and the parameter name. The result does not depend on
        torch's global generator, the device, the other tensors or the sharding: every rank draws the full tensors, one
        at a time, and keeps its own part.

        Args:
            seed: seed of all draws.
            names: initialise only these parameters and buffers.
        """
        self.reset_buffers(names)
        for name, parameter in self.named_parameters():
            if names is None or name in names:
                layout = self.layout
                shape = parameter.shape if layout is None else layout.shapes[name]
                value = torch.empty(shape, dtype=torch.float32, device="cpu")
                self.init_parameter(name, value, seed)
                if layout is not None:
                    value = value[layout.region(name).slices()]
                local(parameter).copy_(value)

    def init_parameter(self, name: str, value: Tensor, seed: int) -> None:
        """Initialise one fp32 CPU tensor as the family does, and then as the head does, if it says how."""
        self.backbone.init_parameter(name, value, seed)
        head: Any = self.head
        if name.startswith("head.") and hasattr(head, "init_parameter"):
            head.init_parameter(name.removeprefix("head."), value)

    @torch.no_grad()
    def reset_buffers(self, names: Collection[str] | None = None) -> None:
        """Give all buffers, or those named, the values that their modules have after construction."""
        buffers = {n: b for n, b in self.named_buffers() if names is None or n in names}
        if not buffers:
            return
        family, config = type(self.backbone), self.backbone.config
        new = Model.build(family, config, head=self.head_kind, labels=self.labels)
        for name, value in new.named_buffers():
            if name in buffers:
                buffers[name].copy_(value)

    def forward(self, batch: Batch, *, cache: Any = None) -> Tensor:
        """Return logits: (B, T, V) over the vocabulary, (B, C) per row, (B, T, C) per token; (B, T, D) if no head."""
        hidden: Tensor = self.backbone(batch, cache=cache)
        if self.head is None:
            return hidden
        logits: Tensor = self.head(hidden, batch)
        return logits

    # ------------------------------------------------------------------ names on disk

    entries = state.entries_of
    disk_state = state.disk_state
    disk_view = state.disk_view
    load_disk_state = state.load_disk_state

    def hf_config(self) -> dict[str, Any]:
        """Return the content of config.json, with the keys of transformers 4 and 5."""
        config = {**drop_code(self.extra_config), **self.backbone.to_hf_config()}
        config["model_type"] = self.backbone.model_type
        config["architectures"] = [self.backbone.architectures[self.head_kind]]
        config["dtype"] = config["torch_dtype"] = "float32"
        if self.labels is not None:
            config.pop("num_labels", None)
            config["id2label"] = {str(i): label for i, label in enumerate(self.labels)}
            config["label2id"] = {label: i for i, label in enumerate(self.labels)}
        return config

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Return the number of parameters, tied ones counted once; ``embeddings=False`` leaves out the embeddings."""
        total = sum(p.numel() for p in self.parameters())
        if not embeddings:
            total -= sum(
                p.numel() for module in self.backbone.embeddings() for p in module.parameters()
            )
        return total

    def depths(self) -> dict[str, int]:
        """Return the depth of every parameter: 0 for embeddings, i + 1 for block i, blocks + 1 after the last block.

        A head tied to the embeddings has their depth.
        """
        blocks = self.backbone.blocks()
        found = {id(p): i + 1 for i, block in enumerate(blocks) for p in block.parameters()}
        found |= {id(p): 0 for module in self.backbone.embeddings() for p in module.parameters()}
        return {name: found.get(id(p), len(blocks) + 1) for name, p in self.named_parameters()}

    def summary(self) -> dict[str, str]:
        """Return family, head, sizes, parameters, memory and dtype, as shown in a notebook."""
        config = self.backbone.config
        parameters = list(self.parameters())
        memory = sum(p.numel() * p.element_size() for p in parameters) / 2**20
        types = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
        devices = sorted({str(p.device) for p in parameters})
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        adapter = {} if self.adapter is None else {"adapter": f"{self.adapter}, trains {trained:,}"}
        text = {
            "vocabulary": f"{config.vocab_size:,}",
            "positions": f"{self.backbone.max_length:,}",
        }
        return {
            "family": self.backbone.model_type,
            "head": self.head_kind or "none",
            "layers x hidden x heads": f"{config.num_layers} x {config.hidden_size} x {config.num_heads}",
            **{key: value for key, value in text.items() if value != "0"},
            "parameters": f"{self.num_parameters():,}",
            "memory": f"{memory:,.1f} MiB",
            "dtype": f"{', '.join(types)} on {', '.join(devices)}",
        } | adapter

    def __repr__(self) -> str:
        return (
            "Model(" + ", ".join(f"{key}: {value}" for key, value in self.summary().items()) + ")"
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>"
            for k, v in self.summary().items()
        )
        return f"<table>{rows}</table>"
