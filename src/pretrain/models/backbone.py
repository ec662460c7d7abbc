"""What every family shares: embedding look-up, positions, the run through the blocks, initialisation, head defaults.

A family subclasses ``Backbone`` in one file: its config, its embedding and forward, and its names on disk.
Letters: B rows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.errors import ConfigError, ModelError
from pretrain.models.config import BackboneConfig, ConfigReader
from pretrain.models.names import Name
from pretrain.nn.attention import AttentionMask, KVCache
from pretrain.nn.block import Block
from pretrain.nn.norm import compute_dtype
from pretrain.nn.positions import Rope, document_positions
from pretrain.nn.tensor_parallel import VocabShard

__all__ = ["Backbone", "Batch"]

_TF32 = "TensorFloat32 tensor cores|Please use the new API settings to control TF32"

Batch = Mapping[str, Tensor]


class Backbone(nn.Module):
    """Tokens to vectors.

    Class attributes of a family:
        model_type: its name in config.json.
        config_class: its configuration.
        causal: a token sees no later one.
        prefix: of the body's tensors in a file with a head; ``prefixes`` lists all that are accepted.
        architectures: head kind (None is the body alone) -> class name in config.json; the heads that exist.
        residual_scale: output projections start smaller by sqrt(2 L), as in GPT-2.
    """

    model_type: ClassVar[str]
    config_class: ClassVar[type[BackboneConfig]]
    causal: ClassVar[bool] = True
    prefix: ClassVar[str] = "model."
    prefixes: ClassVar[tuple[str, ...]] = ("model.", "transformer.")
    architectures: ClassVar[Mapping[str | None, str]] = {}
    residual_scale: ClassVar[bool] = False
    # The rows that this process holds of a token embedding that several share, or None.
    vocab: VocabShard | None = None

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config: Any = config  # the family's own configuration class
        self.compiled = False
        self.layers = nn.ModuleList()

    # ------------------------------------------------------------------ what a family writes

    def forward(self, batch: Batch, *, cache: KVCache | None = None) -> Tensor:
        """(B, T) ids under ``input_ids`` -> (B, T, D); with a cache, the ids are those behind the cached ones."""
        raise NotImplementedError

    @classmethod
    def config_from_hf(cls, reader: ConfigReader) -> BackboneConfig:
        """The configuration of a config.json."""
        raise NotImplementedError

    def to_hf_config(self) -> dict[str, Any]:
        """The keys of config.json; a family adds its own to these."""
        config = self.config
        return {
            "vocab_size": config.vocab_size,
            "initializer_range": config.initializer_range,
            "tie_word_embeddings": config.tie_embeddings,
            "pad_token_id": config.pad_id,
            "bos_token_id": config.bos_id,
            "eos_token_id": config.eos_id,
        }

    def names(self) -> list[Name]:
        """Rules from the backbone's parameters to names on disk."""
        raise NotImplementedError

    def head_names(self, kind: str, tied: bool) -> list[Name]:
        """The same for the parameters of a head; names in memory start with ``head.``."""
        raise NotImplementedError

    def copies(self, kind: str, *, tied: bool) -> dict[str, str]:
        """Names on disk under which old files repeat a tensor -> the parameter; written only by untied heads."""
        return {}

    def build_head(self, kind: str, num_labels: int) -> nn.Module:
        """A head of the kind, uninitialised."""
        raise NotImplementedError

    def embeddings(self) -> list[nn.Module]:
        """The modules before the first block: depth 0 of layer-wise learning rates."""
        raise NotImplementedError

    # ------------------------------------------------------------------ shared

    def blocks(self) -> list[nn.Module]:
        """The blocks from bottom to top: units of sharding, checkpointing and compilation."""
        return list(self.layers)

    def set_activation_checkpointing(self, mode: str) -> None:
        """Let training keep less of each block: ``off``, ``selective`` or ``full``, see ``Block``.

        Raises:
            ConfigError: a block of an own family does not know it.
        """
        for block in self.blocks():
            if isinstance(block, Block) and type(block).forward is Block.forward:
                block.activation_checkpointing = mode
            elif mode != "off":
                raise ConfigError(
                    f"parallel.activation_checkpointing={mode} works inside of pretrain.nn.block.Block, but the blocks "
                    f"of this {self.model_type} model are {type(block).__name__}, which has a forward of its own. "
                    "Derive the class from Block and name that method _forward, or set "
                    "parallel.activation_checkpointing=off."
                )

    def compile_blocks(self, **options: Any) -> None:
        """Compile block by block, which all share one graph; what is computed again is a part of it."""
        # fp32 is computed as fp32 here, and torch says with every compilation that it could be less.
        warnings.filterwarnings("ignore", message=_TF32)
        for block in self.blocks():
            block.compile(**options)
        self.compiled = True

    def uncompiled(self) -> contextlib.AbstractContextManager[Any]:
        """Within the context compiled blocks run as they were written.

        A text that grows has another shape at every step, and a cache that fills another content: for each of them the
        compiler would make a graph, until it gives up.
        """
        return (
            torch.compiler.set_stance("force_eager") if self.compiled else contextlib.nullcontext()
        )

    def plain_blocks(self) -> None:
        """Take ``set_activation_checkpointing`` and ``compile_blocks`` back."""
        self.set_activation_checkpointing("off")
        self.compiled = False
        for block in self.blocks():
            vars(block).pop("_compiled_call_impl", None)

    @property
    def max_length(self) -> int:
        """Tokens that a row may have."""
        length: int = self.config.max_positions
        return length

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding."""
        size: int = self.config.vocab_size
        return size

    def prefix_of(self, kind: str | None) -> str:
        """Prefix of the body's tensors in a file with that head."""
        return "" if kind is None else self.prefix

    def span(self, batch: Batch, cache: KVCache | None) -> tuple[int, int]:
        """First and last column (exclusive) of the new tokens.

        Raises:
            ModelError: the row is longer than the positions.
        """
        ids = batch["input_ids"]
        if ids.ndim != 2:
            raise ModelError(
                f"input_ids has the shape {tuple(ids.shape)}; it must be (rows, tokens)."
            )
        past = 0 if cache is None else cache.length
        stop = past + ids.shape[1]
        # Packed documents count their own positions, which are held against the table below.
        if stop > self.max_length and "position_ids" not in batch:
            raise ModelError(
                f"A row of {stop} tokens is longer than the {self.max_length} positions of this {self.model_type} "
                "model. Cut the rows, or build the model with a larger max_positions."
            )
        return past, stop

    def positions(self, batch: Batch, cache: KVCache | None) -> Tensor | None:
        """(B, T) positions that differ from 0, 1, 2, ...: given ones, or those that restart with each document."""
        given = batch.get("position_ids")
        if given is not None:
            if given.ndim == 1:
                given = given[None]
            if (
                given.is_cpu
                and given.numel()
                and not 0 <= int(given.min()) <= int(given.max()) < self.max_length
            ):
                raise ModelError(
                    f"position_ids reach from {int(given.min())} to {int(given.max())}, but this {self.model_type} "
                    f"model has the positions 0 to {self.max_length - 1}."
                )
            return given
        if "document_ids" in batch and cache is None:
            return document_positions(batch["document_ids"])
        return None

    def look_up(self, embedding: nn.Embedding, ids: Tensor, what: str = "input_ids") -> Tensor:
        """Embed ids, (B, T) -> (B, T, D), and name the id if it does not exist (on a CPU; a GPU is not asked)."""
        vocab = self.vocab
        try:
            if vocab is None or embedding is not self.token_embedding:
                found: Tensor = embedding(ids)
                return found
            # Each process misses other ids, and all must fail alike: those that went on would wait for ever.
            if (
                ids.is_cpu
                and ids.numel()
                and not 0 <= int(ids.min()) <= int(ids.max()) < vocab.size
            ):
                raise IndexError
            return vocab.look_up(embedding.weight, ids, embedding.padding_idx)
        except IndexError as error:
            raise ModelError(
                f"{what} holds {int(ids.min())} to {int(ids.max())}, but this {self.model_type} model has the ids 0 "
                f"to {embedding.num_embeddings - 1}. The text was probably encoded with another tokenizer."
            ) from error

    def run(
        self,
        x: Tensor,
        masks: Sequence[AttentionMask],
        ropes: Sequence[Rope | None],
        cache: KVCache | None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Through all blocks, (B, T, D) -> (B, T, D), with one mask and one rotation per block.

        With ``keep``, places in the flattened batch, the last block works for these alone, and the result is (N, D).
        """
        columns = x.shape[1]
        if self.compiled and cache is None:
            # What all blocks share is made before the first of them: a graph that makes it is another one.
            for mask, rope in zip(masks, ropes, strict=True):
                mask.prepare(columns, x.device, compute_dtype(x))
                if rope is not None:
                    rope.to(compute_dtype(x))
        for i, block in enumerate(self.layers):
            # Passed only where it is wanted: a family's own block need not know it.
            last: dict[str, Any] = (
                {"keep": keep} if keep is not None and i == len(self.layers) - 1 else {}
            )
            if cache is not None:
                last |= {"cache": cache, "layer": i}
            x = block(x, mask=masks[i], rope=ropes[i], **last)
        if cache is not None:
            cache.advance(columns)
        return x

    def drop(self, x: Tensor) -> Tensor:
        """Dropout on the embeddings."""
        return F.dropout(x, self.config.dropout) if self.training and self.config.dropout else x

    def set_attention_dropout(self) -> None:
        """Blocks know one dropout; families set that of the attention weights apart from it."""
        for block in self.layers:
            assert isinstance(block, Block)
            block.attention.dropout = self.config.attention_dropout

    def init_buffers(self) -> None:
        """Compute buffers, if a family has some: behind a meta device they are empty."""

    def init_parameter(self, name: str, value: Tensor, seed: int) -> None:
        """Fill one fp32 CPU tensor: norms with ones, biases with zeros, matrices from a (truncated) normal."""
        if value.ndim < 2:
            value.fill_(1.0 if name.endswith("weight") else 0.0)
            return
        std = self.init_std(name)
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        if std == 0.0:
            value.zero_()
        elif (cutoff := self.init_cutoff()) is None:
            value.normal_(0.0, std, generator=generator)
        else:
            nn.init.trunc_normal_(value, 0.0, std, -cutoff * std, cutoff * std, generator=generator)
        if (row := self.padding_row(name)) is not None:
            value[row] = 0.0

    def init_std(self, name: str) -> float:
        """Standard deviation of a fresh matrix."""
        std: float = self.config.initializer_range
        if name.endswith(("attention.output.weight", "mlp.down.weight")):
            if self.config.zero_init_outputs:
                return 0.0
            if self.residual_scale:
                return std / math.sqrt(2 * self.config.num_layers)
        return std

    def init_cutoff(self) -> float | None:
        """Fresh matrices are truncated at so many standard deviations; None is not at all."""
        return None

    def padding_row(self, name: str) -> int | None:
        """The row of an embedding that belongs to padding: it starts at zero and is not trained by look-ups."""
        for module_name, module in self.named_modules():
            if isinstance(module, nn.Embedding) and name == f"backbone.{module_name}.weight":
                return module.padding_idx
        return None
