"""``Backbone``, the base class of the families: embedding look-up, positions, the loop over blocks, initialisation.

A family subclasses it in one module, with its config, its embeddings and ``forward``, its heads and its names on disk.
Letters: B rows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pretrain.errors import ConfigError, ModelError
from pretrain.models.config import BackboneConfig, ConfigReader, Key, written_keys
from pretrain.models.names import Name
from pretrain.nn.attention import AttentionMask, KVCache
from pretrain.nn.block import Block, run_block
from pretrain.nn.buffers import changing_buffers
from pretrain.nn.kernels import dropout
from pretrain.nn.norm import compute_dtype
from pretrain.nn.positions import Rope, document_positions
from pretrain.nn.tensor_parallel import VocabShard

__all__ = ["Backbone", "Batch", "ModelStats", "named_generator"]

_TF32 = "TensorFloat32 tensor cores|Please use the new API settings to control TF32"

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class ModelStats:
    """Widths of a backbone from which the memory of a run is estimated.

    Attributes:
        hidden, layers, intermediate: D, number of blocks, width of the feed-forward layer.
        heads: query heads of a block; 0 without attention.
        query, key_value: total width of the query heads, and of the key heads; 0 means D.
        gated: the feed-forward layer has two input projections.
        vocabulary: V, the classes of a head over the vocabulary; 0 without one.
        kept: bytes per unit that one block keeps for the backward pass, where the widths do not tell it (convolutions);
            None computes it as for a transformer.
    """

    hidden: int
    layers: int
    intermediate: int
    heads: int = 0
    query: int = 0
    key_value: int = 0
    gated: bool = False
    vocabulary: int = 0
    kept: float | None = None


def named_generator(seed: int, name: str) -> torch.Generator:
    """Return the generator of the initial values of a parameter, seeded by a seed and its name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Backbone(nn.Module):
    """Base class of the models without a head: a batch, such as token ids (B, T) -> hidden states (B, T, D).

    A family whose input is not text says in ``units`` what a batch costs, in ``unit_name`` what it counts, and in
    ``id_limits`` that it has no ids; its config sets ``vocab_size`` and ``max_positions`` to 0.

    Class attributes of a family:
        model_type: name of the family in config.json.
        config_class: configuration class.
        causal: a token attends to no later token.
        positions_from_pad: positions are counted from the id of padding, which a tokenizer must share.
        prefix: prefix of the body's tensors in a file with a head; ``prefixes`` lists others that are accepted.
        projection: name on disk of the vocabulary projection, of which a file with a tied head may hold a copy.
        hf_keys: field of the configuration -> its key in config.json, for reading and writing; if it is empty, every
            field has its own name there.
        architectures: head kind (None is the body alone) -> class name in config.json; lists the available heads.
        successors: head kind -> family that has this head on the same body, under the same names on disk; a model of
            this family that is opened with the head becomes one of that family.
        residual_scale: divide the initial standard deviation of output projections by sqrt(2 L), as in GPT-2.
        modules_of_peft: name of a module in files, without prefix -> its name in the memory of transformers 5, by which
            the files of peft call it, where the two differ.
        processor_class: reads the processor of a saved model (``from_directory``); None for a tokenizer.
        padded: whether texts are padded to all positions, and the padding is read like any token.
        default_task: the task that a model without a head answers; None if there is none.
        unit_name: what ``units`` counts, in the plural, for messages: tokens, patches, nodes.
    """

    model_type: ClassVar[str]
    config_class: ClassVar[type[BackboneConfig]]
    causal: ClassVar[bool] = True
    positions_from_pad: ClassVar[bool] = False
    prefix: ClassVar[str] = "model."
    prefixes: ClassVar[tuple[str, ...]] = ()
    projection: ClassVar[str] = "lm_head.weight"
    hf_keys: ClassVar[Mapping[str, Key]] = {}
    architectures: ClassVar[Mapping[str | None, str]] = {}
    successors: ClassVar[Mapping[str, str]] = {}
    residual_scale: ClassVar[bool] = False
    modules_of_peft: ClassVar[Mapping[str, str]] = {}
    processor_class: ClassVar[Any] = None
    default_task: ClassVar[str | None] = None
    padded: ClassVar[bool] = False
    unit_name: ClassVar[str] = "tokens"
    position_embedding: Any  # of families with learned positions
    # The rows of the token embedding that this rank holds under tensor parallelism, or None.
    vocab: VocabShard | None = None

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config: Any = config  # the family's own configuration class
        self.compiled = False
        self.layers = nn.ModuleList()

    # ------------------------------------------------------------------ implemented by the family

    def forward(self, batch: Batch, *, cache: KVCache | None = None) -> Tensor:
        """Map (B, T) ids under ``input_ids`` to (B, T, D); with a cache, the ids follow the cached tokens."""
        raise NotImplementedError

    @classmethod
    def config_from_hf(cls, reader: ConfigReader) -> BackboneConfig:
        """Return the configuration of a config.json."""
        return cls.config_class(**cls.fields_from_hf(reader))

    @classmethod
    def fields_from_hf(cls, reader: ConfigReader) -> dict[str, Any]:
        """Return the fields that ``hf_keys`` names, or all; a family adds those of several keys, and refusals."""
        if not cls.hf_keys:
            return reader.own(cls.config_class)
        return reader.fields_of(cls.config_class, cls.hf_keys)

    def to_hf_config(self) -> dict[str, Any]:
        """Return the keys of config.json; a family adds those that are not in ``hf_keys``."""
        if not self.hf_keys:
            return asdict(self.config)
        return written_keys(self.config, self.hf_keys)

    def names(self) -> list[Name]:
        """Return the rules that map the backbone's parameters to names on disk; by default these are the same."""
        return [Name(name, (name,)) for name, _ in self.named_parameters()]

    def head_names(self, kind: str, tied: bool) -> list[Name]:
        """Return the rules for the parameters of a head; names in memory start with ``head.``."""
        raise NotImplementedError

    def copies(self, kind: str, *, tied: bool) -> dict[str, str]:
        """Return name on disk -> parameter for duplicates of a tensor in old files; only untied heads write them."""
        language = tied and kind in ("causal-lm", "masked-lm")
        return {self.projection: "backbone.token_embedding.weight"} if language else {}

    def build_head(self, kind: str, num_labels: int) -> nn.Module:
        """Return a head of the kind, uninitialised."""
        raise NotImplementedError

    @classmethod
    def default_processor(cls, config: Any) -> Any:
        """Return the processor of a new model that is given none: None, or one that fits the sizes of its config."""
        return None

    def embeddings(self) -> list[nn.Module]:
        """Return the modules before the first block: depth 0 of layer-wise learning rates."""
        raise NotImplementedError

    # ------------------------------------------------------------------ shared

    def blocks(self) -> list[nn.Module]:
        """Return the blocks from first to last: the units of sharding, activation checkpointing and compilation."""
        return list(self.layers)

    def units(self, batch: Batch) -> int:
        """Return what a batch costs, without padding, in ``unit_name``: by it limits, speed and FLOPs are counted.

        Raises:
            ModelError: the batch has no token ids, and the family does not say what its batches cost.
        """
        for key in ("document_ids", "attention_mask"):
            if key in batch:
                return int((batch[key] != 0).sum())
        if "input_ids" not in batch:
            raise ModelError(
                f"A batch with {', '.join(batch)} has no token ids to count. Give {type(self).__name__} a method "
                "units(batch) that returns, for example, the number of patches of all images, and set unit_name."
            )
        return batch["input_ids"].numel()

    def random_batch(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Return two rows of random inputs, by whose outputs two models are compared."""
        length = min(32, self.max_length)
        ids = torch.randint(self.vocab_size, (2, length), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def id_limits(self) -> dict[str, tuple[str, int]]:
        """Return batch key -> (name of the table, size) of the ids that are checked before they reach the model."""
        return {
            "input_ids": ("vocabulary", self.vocab_size),
            "labels": ("vocabulary", self.vocab_size),
            "position_ids": ("number of positions", self.max_length or 2**62),
        }

    def stats(self) -> ModelStats:
        """Return the widths from which memory is estimated."""
        config, blocks = self.config, self.blocks()
        width = config.head_dim or config.hidden_size // config.num_heads
        return ModelStats(
            hidden=config.hidden_size,
            layers=len(blocks),
            intermediate=config.intermediate_size or 4 * config.hidden_size,
            heads=config.num_heads,
            query=width * config.num_heads,
            key_value=width * (config.num_kv_heads or config.num_heads),
            gated=any(getattr(getattr(b, "mlp", None), "gate", None) is not None for b in blocks),
            vocabulary=self.vocab_size,
        )

    def flops_per_unit(self, weights: int, row_length: int) -> float:
        """Return the floating-point operations of forward and backward pass of the blocks, per unit.

        Six for each weight, and 12·D·T for attention in each layer: the full matrix is counted, causal or not, by
        convention (PaLM, appendix B, arXiv 2204.02311).

        Args:
            weights: number of elements in the matrices of all blocks, not only in the shard of this rank.
            row_length: units of a row, T.
        """
        stats = self.stats()
        return 6.0 * (weights + 2 * stats.layers * stats.hidden * row_length)

    def set_activation_checkpointing(self, mode: str) -> None:
        """Set the activation checkpointing of all blocks: ``off``, ``selective`` or ``full``, see ``Block``.

        Raises:
            ConfigError: a block of a custom family does not support it.
        """
        for block in self.blocks():
            if mode != "off" and (statistics := changing_buffers(block)):
                raise ConfigError(
                    f"parallel.activation_checkpointing={mode} computes a block twice, so the block of this "
                    f"{self.model_type} model would update {next(iter(statistics))} twice. Set "
                    "parallel.activation_checkpointing=off."
                )
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
        """Compile every block; all share one graph, which includes the recomputation of activation checkpointing."""
        # Products of fp32 run in full fp32 on purpose, and torch recommends TF32 at every compilation.
        warnings.filterwarnings("ignore", message=_TF32)
        for block in self.blocks():
            block.compile(**options)
        self.compiled = True

    def uncompiled(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which compiled blocks run eagerly.

        In generation, the shape of a growing text and the length of the key-value cache change at every step; the
        compiler would recompile for each of them until it reaches its limit.
        """
        return (
            torch.compiler.set_stance("force_eager") if self.compiled else contextlib.nullcontext()
        )

    def plain_blocks(self) -> None:
        """Undo ``set_activation_checkpointing`` and ``compile_blocks``."""
        self.set_activation_checkpointing("off")
        self.eager_blocks()

    def eager_blocks(self) -> None:
        """Undo ``compile_blocks``."""
        self.compiled = False
        for block in self.blocks():
            vars(block).pop("_compiled_call_impl", None)

    @property
    def max_length(self) -> int:
        """Maximum number of tokens in a row."""
        length: int = self.config.max_positions
        return length

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding."""
        size: int = self.config.vocab_size
        return size

    def prefix_of(self, kind: str | None) -> str:
        """Return the prefix of the body's tensors in a file with that head."""
        return "" if kind is None else self.prefix

    def refuse_cache(self, cache: KVCache | None, reason: str) -> None:
        """Raise ModelError if there is a key-value cache; the reason is a clause, such as "reads images, so it "."""
        if cache is not None:
            raise ModelError(
                f"A {self.model_type} model {reason}has no key-value cache. Leave cache out."
            )

    def span(self, batch: Batch, cache: KVCache | None) -> tuple[int, int]:
        """Return the first and last column (exclusive) of the new tokens.

        Raises:
            ModelError: ``input_ids`` is not two-dimensional, or a row is longer than the model's positions.
        """
        ids = batch["input_ids"]
        if ids.ndim != 2:
            raise ModelError(
                f"input_ids has the shape {tuple(ids.shape)}; it must be (rows, tokens)."
            )
        past = 0 if cache is None else cache.length
        stop = past + ids.shape[1]
        # Packed documents have their own positions, which ``positions`` checks.
        if stop > self.max_length and "position_ids" not in batch:
            raise ModelError(
                f"A row of {stop} tokens is longer than the {self.max_length} positions of this {self.model_type} "
                "model. Cut the rows, or build the model with a larger max_positions."
            )
        return past, stop

    def positions(self, batch: Batch, cache: KVCache | None) -> Tensor | None:
        """Return (B, T) positions if they are not 0, 1, 2, ...: ``position_ids``, or those that restart per document.

        Raises:
            ModelError: ``position_ids`` on a CPU exceed the positions of the model.
        """
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

    def embed_positions(self, batch: Batch, cache: KVCache | None) -> Tensor:
        """Return the learned embeddings of the positions of the new tokens, (1|B, T, D).

        Raises:
            ModelError: see ``span`` and ``positions``.
        """
        start, stop = self.span(batch, cache)
        positions, table = self.positions(batch, cache), self.position_embedding
        found: Tensor = table.weight[None, start:stop] if positions is None else table(positions)
        return found

    def look_up(self, embedding: nn.Embedding, ids: Tensor, what: str = "input_ids") -> Tensor:
        """Embed ids, (B, T) -> (B, T, D).

        Raises:
            ModelError: an id is out of range (checked on a CPU only; on a GPU a check would synchronise).
        """
        vocab = self.vocab
        try:
            if vocab is None or embedding is not self.token_embedding:
                found: Tensor = embedding(ids)
                return found
            # A look-up fails only on the rank whose shard is indexed out of range; all ranks must raise, or the others
            # would wait in the all-reduce for ever.
            if (
                ids.is_cpu
                and ids.numel()
                and not 0 <= int(ids.min()) <= int(ids.max()) < vocab.size
            ):
                raise IndexError
            return vocab.look_up(embedding.weight, ids, embedding.padding_idx)
        except IndexError as error:
            raise ModelError(
                f"{what} has ids from {int(ids.min())} to {int(ids.max())}, but this {self.model_type} model has the "
                f"ids 0 to {embedding.num_embeddings - 1}. The text was probably encoded with another tokenizer."
            ) from error

    def run(
        self,
        x: Tensor,
        masks: AttentionMask | Sequence[AttentionMask],
        ropes: Sequence[Rope | None] | None = None,
        cache: KVCache | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Run all blocks, (B, T, D) -> (B, T, D), with one mask for all, or one mask and one rotary table per block.

        ``keep`` names the tokens that the last block computes, whose states are the result: see ``Block``.
        """
        columns, layers = x.shape[1], len(self.layers)
        masks = [masks] * layers if isinstance(masks, AttentionMask) else masks
        ropes = [None] * layers if ropes is None else ropes
        if self.compiled and cache is None:
            # Masks and tables that all blocks share are computed before the first block: computing them inside of it
            # would give that block a graph of its own.
            width = self.config.head_dim or self.config.hidden_size // self.config.num_heads
            for mask, rope in zip(masks, ropes, strict=True):
                mask.prepare(columns, x.device, compute_dtype(x), width)
                if rope is not None:
                    rope.to(compute_dtype(x))
        for i, block in enumerate(self.layers):
            # Passed only if there is one, so that the blocks of a custom family need not accept it.
            cached: dict[str, Any] = {} if cache is None else {"cache": cache, "layer": i}
            last = keep if i == layers - 1 else None
            x = run_block(block, x, last, mask=masks[i], rope=ropes[i], **cached)
        if cache is not None:
            cache.advance(columns)
        return x

    def drop(self, x: Tensor) -> Tensor:
        """Apply dropout to the embeddings."""
        return dropout(x, self.config.dropout, self.training)

    def init_parameter(self, name: str, value: Tensor, seed: int) -> None:
        """Initialise one fp32 CPU tensor: norms with ones, biases with zeros, matrices from a (truncated) normal."""
        if value.ndim < 2:
            value.fill_(1.0 if name.endswith("weight") else 0.0)
            return
        std = self.init_std(name)
        generator = named_generator(seed, name)
        if std == 0.0:
            value.zero_()
        elif (cutoff := self.init_cutoff()) is None:
            value.normal_(0.0, std, generator=generator)
        else:
            nn.init.trunc_normal_(value, 0.0, std, -cutoff * std, cutoff * std, generator=generator)
        if (row := self.padding_row(name)) is not None:
            value[row] = 0.0

    def init_std(self, name: str) -> float:
        """Return the standard deviation of an initial matrix."""
        std: float = self.config.initializer_range
        if name.endswith(("attention.output.weight", "mlp.down.weight")):
            if self.config.zero_init_outputs:
                return 0.0
            if self.residual_scale:
                return std / math.sqrt(2 * self.config.num_layers)
        return std

    def init_cutoff(self) -> float | None:
        """Return the number of standard deviations at which initial matrices are truncated; None for no truncation."""
        return None

    def padding_row(self, name: str) -> int | None:
        """Return the padding row of an embedding, which starts at zero and gets no gradient from look-ups, or None."""
        for module_name, module in self.named_modules():
            if isinstance(module, nn.Embedding) and name == f"backbone.{module_name}.weight":
                return module.padding_idx
        return None
