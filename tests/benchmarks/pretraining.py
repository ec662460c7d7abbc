"""Rows 1, 2 and 11: steps of pre-training decoders and masked language models beside peers, and their growth."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.config import OptimConfig
from pretrain.data.loader import row_rngs
from pretrain.data.packing import pack
from pretrain.models import build
from pretrain.nn.loss import IGNORE
from pretrain.objectives import build_objective
from pretrain.objectives.base import Objective
from pretrain.training.optim import build_optimizers
from pretrain.training.precision import choose_precision

from . import script
from .harness import (
    BETAS,
    BF16,
    DECAY,
    EPS,
    FP32,
    Case,
    Contender,
    Settings,
    Stepper,
    Tolerance,
    Work,
    timed,
)

Made = tuple[Callable[[], float], Work]
LR = 1e-3
NORM_EPS = 1e-12


@dataclass(frozen=True)
class Shape:
    """Of a model and its batch; V is ``vocab``."""

    layers: int
    width: int
    heads: int
    length: int
    rows: int
    vocab: int

    def __str__(self) -> str:
        return f"L{self.layers} d{self.width} T{self.length} B{self.rows} V{self.vocab}"

    def model(self, family: str) -> Any:
        """A fresh model of ours without dropout."""
        # x-transformers normalises without an epsilon, which the small fresh embeddings would notice.
        more = (
            {"norm_eps": NORM_EPS}
            if family == "llama"
            else {"dropout": 0.0, "attention_dropout": 0.0}
        )
        return build(
            family, None, vocab_size=self.vocab, num_layers=self.layers, hidden_size=self.width,
            num_heads=self.heads, max_positions=self.length, **more,
        )  # fmt: skip


DECODERS = {
    "cpu": Shape(6, 256, 4, 256, 4, 8192),
    "cuda": Shape(12, 768, 12, 1024, 32, 50304),
    "cuda long": Shape(16, 2048, 32, 2048, 8, 50304),
    "tiny": Shape(2, 64, 2, 16, 2, 96),
}
# The rows of an encoder are documents; a step reads as many.
ENCODERS = {
    "cpu": Shape(4, 256, 4, 256, 12, 8192),
    "cuda": Shape(12, 768, 12, 512, 128, 30522),
    "tiny": Shape(2, 64, 2, 16, 4, 96),
}


class Vocabulary:
    """As many tokens as the vocabulary, of which the first five are special."""

    pad_id, mask_id, special_ids = 0, 4, frozenset(range(5))

    def __init__(self, size: int) -> None:
        self.size, self.continues = size, np.zeros(size, bool)

    def __len__(self) -> int:
        return self.size


def shape_of(table: dict[str, Shape], settings: Settings) -> Shape:
    return table["tiny" if settings.tiny else settings.device.type]


def arithmetic(settings: Settings) -> tuple[torch.dtype, Tolerance, str]:
    """The number type that ours chooses by itself on this device, for everybody."""
    precision = choose_precision("auto", settings.device)
    return precision.dtype, FP32 if precision.dtype is torch.float32 else BF16, precision.name


def document_rows(shape: Shape, mean: int | None, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Full rows of documents of lognormal length, or of one document each."""
    rng, rows, t = np.random.default_rng(seed), [], shape.length
    for _ in range(shape.rows):
        documents, positions = np.zeros(t, np.int64), np.zeros(t, np.int64)
        at, number = 0, 1
        while at < t:
            drawn = t if mean is None else int(np.clip(rng.lognormal(math.log(mean), 0.8), 4, t))
            size = min(t - at, drawn)
            documents[at : at + size], positions[at : at + size] = number, np.arange(size)
            at, number = at + size, number + 1
        ids = rng.integers(5, shape.vocab, t)
        rows.append({"input_ids": ids, "document_ids": documents, "position_ids": positions})
    return rows


def our_objective(model: Any, kind: str, device: torch.device, **options: Any) -> Objective:
    model.tokenizer = Vocabulary(model.backbone.vocab_size)
    return build_objective(kind, options, model).to(device).train()


def our_stepper(
    objective: Objective, batches: Sequence[Any], dtype: torch.dtype, device: torch.device
) -> Stepper:
    counts = [float(objective.count(batch)) for batch in batches]
    optim = OptimConfig(lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    optimizers = build_optimizers(objective, optim, objective.model.backbone.blocks(), device)
    moved = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
    pairs = list(zip(moved, counts, strict=True))
    loss = lambda pair: objective(pair[0]).total / pair[1]  # noqa: E731
    return Stepper(objective, loss, [[pair] for pair in pairs], dtype, device, optimizers, counts)


class Decoders:
    """Contenders that train one decoder on one batch.

    Args:
        settings: of the run.
        shape: of model and batch.
        family: gpt2 or llama.
        mean: mean length of the documents in a row; None for one document in each.
    """

    def __init__(
        self, settings: Settings, shape: Shape, family: str, mean: int | None = None
    ) -> None:
        self.settings, self.shape, self.family, self.packed = (
            settings,
            shape,
            family,
            mean is not None,
        )
        self.dtype, self.within, self.type_name = arithmetic(settings)
        torch.manual_seed(0)
        first = shape.model(family)
        self.tensors = {name: tensor.clone() for name, tensor in first.disk_state().items()}
        self.folder = tempfile.TemporaryDirectory()
        first.save(self.folder.name)
        self.rows = document_rows(shape, mean)
        self.tokens = shape.rows * shape.length
        device = settings.device
        self.ids, self.documents, self.positions = (
            torch.from_numpy(np.stack([row[key] for row in self.rows])).to(device)
            for key in ("input_ids", "document_ids", "position_ids")
        )
        self.labels = torch.full_like(self.ids, IGNORE)
        same = self.documents[:, 1:] == self.documents[:, :-1]
        self.labels[:, :-1] = torch.where(same, self.ids[:, 1:], IGNORE)

    def made(self, stepper: Stepper) -> Made:
        work = stepper.check(self.tokens)
        return timed(stepper.all, self.settings), work

    def step(self, module: nn.Module, loss: Callable[[Any], Tensor]) -> Made:
        return self.made(Stepper(module, loss, [[None]], self.dtype, self.settings.device))

    def ours(self, *, compiled: bool = False) -> Made:
        model = self.shape.model(self.family)
        model.load_disk_state(self.tensors)
        objective = our_objective(model, "NextToken", self.settings.device)
        if compiled:
            model.backbone.compile_blocks(**self.settings.compiler)
        batch = objective.collate(self.rows, row_rngs(0, "collate", 0, len(self.rows)))
        return self.made(our_stepper(objective, [batch], self.dtype, self.settings.device))

    def transformers(self, *, compiled: bool = False) -> Made:
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(
            self.folder.name, attn_implementation="sdpa", dtype=torch.float32
        )
        model.to(self.settings.device).train()
        if compiled:
            model.compile(**self.settings.compiler)
        mask = torch.ones_like(self.ids)
        return self.step(
            model, lambda _: model(input_ids=self.ids, attention_mask=mask, labels=self.ids).loss
        )

    def script(self, attention: str = "causal", *, compiled: bool = False) -> Made:
        shape = self.shape
        net = script.Script(shape.layers, shape.width, shape.heads, shape.length, shape.vocab)
        net.read(self.tensors)
        net.to(self.settings.device)
        if attention == "dense":
            same = self.documents[:, None, :, None] == self.documents[:, None, None, :]
            attend = script.masked(same & torch.ones_like(same[0, 0]).tril())
        else:
            attend = script.causal if attention == "causal" else script.by_document(self.documents)
        if compiled:
            net.compile(**self.settings.compiler)
        return self.step(net, lambda _: net(self.ids, self.labels, self.positions, attend))

    def litgpt(self) -> Made:
        import litgpt
        from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
        from litgpt.utils import chunked_cross_entropy

        shape, held = self.shape, self.tensors
        config = litgpt.Config(
            n_layer=shape.layers, n_embd=shape.width, n_head=shape.heads, block_size=shape.length,
            padded_vocab_size=shape.vocab, vocab_size=shape.vocab, rotary_percentage=1.0, bias=False,
            parallel_residual=False, norm_class_name="RMSNorm", norm_eps=NORM_EPS, mlp_class_name="LLaMAMLP",
            intermediate_size=held["model.layers.0.mlp.gate_proj.weight"].shape[0],
        )  # fmt: skip
        net = litgpt.GPT(config)
        state: dict[str, Tensor] = {}
        copy_weights_hf_llama(config, {}, state, dict(held))
        net.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
        net.to(self.settings.device)
        return self.step(net, lambda _: chunked_cross_entropy(net(self.ids), self.labels))

    def x_transformers(self, *, flash: bool) -> Made:
        from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

        shape, held = self.shape, self.tensors
        wide, head = (
            held["model.layers.0.mlp.gate_proj.weight"].shape[0],
            shape.width // shape.heads,
        )
        net = TransformerWrapper(
            num_tokens=shape.vocab, max_seq_len=shape.length, use_abs_pos_emb=False,
            attn_layers=Decoder(
                dim=shape.width, depth=shape.layers, heads=shape.heads, attn_dim_head=head,
                rotary_pos_emb=True, rotary_emb_dim=head, use_rmsnorm=True, ff_glu=True, ff_swish=True,
                ff_no_bias=True, ff_mult=wide / shape.width, attn_flash=flash,
            ),
        )  # fmt: skip
        state = net.state_dict()
        state |= {
            "token_emb.emb.weight": held["model.embed_tokens.weight"],
            "to_logits.weight": held["lm_head.weight"],
            "attn_layers.final_norm.g": held["model.norm.weight"] - 1,
        }
        # Gains are stored there without their one; rotation is of neighbours, and of halves in the directory.
        pairs = torch.arange(head).view(2, head // 2).T.flatten()
        turn = (torch.arange(shape.heads)[:, None] * head + pairs).flatten()
        for i in range(shape.layers):
            ours, attention, gated = (
                f"model.layers.{i}.",
                f"attn_layers.layers.{2 * i}.",
                f"attn_layers.layers.{2 * i + 1}.",
            )
            state |= {
                attention + "0.0.g": held[ours + "input_layernorm.weight"] - 1,
                attention + "1.to_q.weight": held[ours + "self_attn.q_proj.weight"][turn],
                attention + "1.to_k.weight": held[ours + "self_attn.k_proj.weight"][turn],
                attention + "1.to_v.weight": held[ours + "self_attn.v_proj.weight"],
                attention + "1.to_out.weight": held[ours + "self_attn.o_proj.weight"],
                gated + "0.0.g": held[ours + "post_attention_layernorm.weight"] - 1,
                gated + "1.ff.0.proj.weight": torch.cat(
                    [held[ours + "mlp.up_proj.weight"], held[ours + "mlp.gate_proj.weight"]]
                ),
                gated + "1.ff.0.proj.bias": torch.zeros(2 * wide),
                gated + "1.ff.2.weight": held[ours + "mlp.down_proj.weight"],
            }
        net.load_state_dict(state)
        for name, p in net.named_parameters():
            p.requires_grad_(
                not name.endswith("proj.bias")
            )  # the gate has one that nobody else has
        wrapped = AutoregressiveWrapper(net).to(self.settings.device)
        return self.step(wrapped, lambda _: wrapped(self.ids))


def decoder(settings: Settings) -> list[Callable[[], Case]]:
    """Row 1: eager, compiled, a Llama beside litgpt and x-transformers, and packed documents."""
    shapes = [shape_of(DECODERS, settings)]
    if settings.long and settings.device.type == "cuda":
        shapes.append(DECODERS["cuda long"])
    cuda = settings.device.type == "cuda"

    def eager(shape: Shape) -> Case:
        d = Decoders(settings, shape, "gpt2")
        return Case(
            f"GPT-2 {shape}, {d.type_name}, eager", f"{settings.unit} a step", within=d.within,
            bars={"best": 1.10, "default": 1.10},
            contenders=[
                Contender("pretrain", "ours", d.ours),
                Contender("transformers, sdpa", "best", d.transformers, "transformers"),
                Contender("60-line script", "best", d.script),
            ],
        )  # fmt: skip

    def compiled(shape: Shape) -> Case:
        d = Decoders(settings, shape, "gpt2")
        whole = functools.partial
        return Case(
            f"GPT-2 {shape}, {d.type_name}, compiled", f"{settings.unit} a step", within=d.within,
            bars={"best": 1.25 if cuda else 1.10, "60-line script, compiled": 1.05},
            contenders=[
                Contender("pretrain, compiled blocks", "ours", whole(d.ours, compiled=True)),
                Contender("pretrain, eager", "variant", d.ours),
                Contender("transformers, compiled", "best", whole(d.transformers, compiled=True), "transformers"),
                Contender("60-line script, compiled", "best", whole(d.script, compiled=True)),
            ],
        )  # fmt: skip

    def llama(shape: Shape) -> Case:
        d = Decoders(settings, shape, "llama")
        plain, flash = (functools.partial(d.x_transformers, flash=how) for how in (False, True))
        return Case(
            f"Llama {shape}, {d.type_name}, eager", f"{settings.unit} a step", within=d.within,
            bars={"best": 1.10, "default": 1.10},
            contenders=[
                Contender("pretrain", "ours", d.ours),
                Contender("transformers, sdpa", "best", d.transformers, "transformers"),
                Contender("litgpt", "default", d.litgpt, "litgpt"),
                Contender("x-transformers", "default", plain, "x_transformers"),
                Contender("x-transformers, attn_flash", "best", flash, "x_transformers"),
            ],
        )  # fmt: skip

    def packed(shape: Shape) -> Case:
        d = Decoders(settings, shape, "gpt2", mean=shape.length // 3)
        make = functools.partial(d.script, compiled=cuda)
        # Whoever does not mask documents computes something else; only its tokens are the same.
        contenders = [
            Contender(
                "pretrain, documents kept apart", "ours", functools.partial(d.ours, compiled=cuda)
            ),
            Contender(
                "60-line script, dense mask of documents", "best", functools.partial(make, "dense")
            ),
            Contender("60-line script, documents not kept apart", "floor", unchecked(make)),
        ]
        if cuda:
            contenders.append(
                Contender("60-line script, varlen_attn", "best", functools.partial(make, "varlen"))
            )
        return Case(
            f"GPT-2 {shape}, {d.type_name}, rows packed with documents" + ", compiled" * cuda,
            f"{settings.unit} a step", contenders, {"best": 1.05, "floor": 1.05}, d.within,
        )  # fmt: skip

    kinds = (eager, packed, llama, compiled)
    return [functools.partial(kind, shape) for shape in shapes for kind in kinds]


def unchecked(make: Callable[[], Made]) -> Callable[[], Made]:
    """Of what was done, compare tokens alone."""

    def run() -> Made:
        cost, work = make()
        return cost, replace(work, losses=(), update=None)

    return run


class Encoders:
    """Contenders that train one BERT on the same documents with the same masks, ``steps`` steps of ``shape.rows``.

    Args:
        settings: of the run.
        shape: of the model; its rows are documents.
        padding: share of a batch that is padding if its rows are padded to ``shape.length``.
    """

    def __init__(self, settings: Settings, shape: Shape, padding: float, steps: int = 2) -> None:
        self.settings, self.shape = settings, shape
        self.dtype, self.within, self.type_name = arithmetic(settings)
        torch.manual_seed(0)
        first = shape.model("bert")
        self.tensors = {name: tensor.clone() for name, tensor in first.disk_state().items()}
        self.folder = tempfile.TemporaryDirectory()
        first.save(self.folder.name)
        rng = np.random.default_rng(0)
        count = steps * shape.rows
        # The median that gives the wished mean after clipping, found by bisection on the same draws.
        draws, low, high = rng.lognormal(0.0, 0.8, count), 1.0, 4.0 * shape.length
        for _ in range(40):
            middle = (low + high) / 2
            lengths = np.clip(draws * middle, 4, shape.length).astype(np.int64)
            low, high = (
                (middle, high) if lengths.mean() < (1 - padding) * shape.length else (low, middle)
            )
        self.documents = []
        for size in lengths:
            ids = rng.integers(5, shape.vocab, size)
            chosen = rng.permutation(size)[: max(1, round(0.3 * size))]
            labels = np.full(size, IGNORE)
            labels[chosen] = ids[chosen]
            ids[chosen] = Vocabulary.mask_id
            self.documents.append((ids, labels))
        self.tokens = int(lengths.sum())

    def steps(self, order: Sequence[Sequence[int]] | None = None) -> list[list[list[int]]]:
        """Documents of each micro-batch of each step."""
        size = self.shape.rows
        order = order or [range(i, i + size) for i in range(0, len(self.documents), size)]
        accumulated = max(1, len(order) * size // len(self.documents))
        return [
            [list(one) for one in order[i : i + accumulated]]
            for i in range(0, len(order), accumulated)
        ]

    def made(self, stepper: Stepper) -> Made:
        work = stepper.check(self.tokens, 1)
        return timed(stepper.all, self.settings), work

    def ours(self) -> Made:
        """Packed into rows as pre-training packs them."""
        model = self.shape.model("bert")
        model.load_disk_state(self.tensors)
        objective = our_objective(model, "MaskedLM", self.settings.device)
        if self.settings.device.type == "cuda":
            model.backbone.compile_blocks(**self.settings.compiler)
        batches = [self.packed([self.documents[i] for i in step[0]]) for step in self.steps()]
        return self.made(our_stepper(objective, batches, self.dtype, self.settings.device))

    def packed(self, group: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Tensor]:
        """One batch of packed rows (B, T), shaped as `MaskedLM.collate` shapes it."""
        t = self.shape.length
        offsets = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in group])])
        packing = pack(offsets, t)
        ids, labels = (np.concatenate([pair[k] for pair in group]) for k in (0, 1))
        rows = len(packing.rows) - 1
        batch = {
            key: np.zeros((rows, t), np.int64)
            for key in ("input_ids", "document_ids", "position_ids")
        }
        batch["labels"] = np.full((rows, t), IGNORE)
        for row in range(rows):
            at = 0
            pieces = packing.segments[packing.rows[row] : packing.rows[row + 1]]
            for number, (first, size) in enumerate(pieces, 1):
                here = slice(at, at + size)
                batch["input_ids"][row, here] = ids[first : first + size]
                batch["labels"][row, here] = labels[first : first + size]
                batch["document_ids"][row, here] = number
                batch["position_ids"][row, here] = np.arange(size)
                at += size
        found = {key: torch.from_numpy(value) for key, value in batch.items()}
        found["target_index"] = torch.from_numpy(
            np.flatnonzero(batch["labels"].reshape(-1) != IGNORE)
        )
        return found

    def peer(
        self,
        order: Sequence[Sequence[int]] | None = None,
        *,
        full: bool = False,
        compiled: bool = False,
    ) -> Made:
        """transformers, padded to the longest row of a micro-batch, or to the row length."""
        import transformers

        model = transformers.AutoModelForMaskedLM.from_pretrained(
            self.folder.name, attn_implementation="sdpa", dtype=torch.float32
        )
        model.to(self.settings.device).train()
        if compiled:
            model.compile(**self.settings.compiler)
        batches = [[self.padded(micro, full) for micro in step] for step in self.steps(order)]
        # BERT there returns the mean of a micro-batch, whatever the number of items in the step.
        parts = [
            [(batch, float((batch["labels"] != IGNORE).sum())) for batch in step]
            for step in batches
        ]
        counts = [sum(count for _, count in step) for step in parts]
        weighed = [
            [(batch, count / whole) for batch, count in step]
            for step, whole in zip(parts, counts, strict=True)
        ]
        loss = lambda part: model(**part[0]).loss * part[1]  # noqa: E731
        device = self.settings.device
        return self.made(Stepper(model, loss, weighed, self.dtype, device, targets=counts))

    def padded(self, chosen: Sequence[int], full: bool) -> dict[str, Any]:
        """A micro-batch (B, T) as the padding collators of transformers make it."""
        group = [self.documents[i] for i in chosen]
        t = self.shape.length if full else max(len(ids) for ids, _ in group)
        batch = {
            "input_ids": np.zeros((len(group), t), np.int64),
            "attention_mask": np.zeros((len(group), t), np.int64),
            "labels": np.full((len(group), t), IGNORE),
        }
        for row, (ids, labels) in enumerate(group):
            batch["input_ids"][row, : len(ids)], batch["labels"][row, : len(ids)] = ids, labels
            batch["attention_mask"][row, : len(ids)] = 1
        return {
            key: torch.from_numpy(value).to(self.settings.device) for key, value in batch.items()
        }

    def sampled(self, strategy: str) -> Made:
        """In the order of a sampler of transformers; rebalanced steps are accumulated over four micro-batches."""
        from transformers import trainer_pt_utils

        lengths, size = [len(ids) for ids, _ in self.documents], self.shape.rows
        torch.manual_seed(0)
        if strategy == "group_by_length":
            found = [int(i) for i in trainer_pt_utils.LengthGroupedSampler(size, lengths=lengths)]
            return self.peer([found[i : i + size] for i in range(0, len(found), size)])
        sampler = trainer_pt_utils.BatchRebalanceSampler(lengths, size, 1, min(4, size))
        return self.peer(list(sampler))


def masked(settings: Settings) -> list[Callable[[], Case]]:
    """Row 2: masked language modelling on rows of variable length."""
    shape = shape_of(ENCODERS, settings)
    cuda = settings.device.type == "cuda"

    def case(padding: float) -> Case:
        e = Encoders(settings, shape, padding, steps=4 if cuda and not settings.tiny else 2)
        part = functools.partial
        grouped, rebalanced = part(e.sampled, "group_by_length"), part(e.sampled, "batch_rebalance")
        contenders = [
            Contender("pretrain, packed", "ours", e.ours),
            Contender("transformers, padded to the row", "default", part(e.peer, full=True), "transformers"),
            Contender("transformers, padded to the batch", "default", e.peer, "transformers"),
            Contender("transformers, group_by_length", "best", grouped, "transformers", True),
            Contender("transformers, batch_rebalance", "best", rebalanced, "transformers", True),
        ]  # fmt: skip
        if cuda or settings.long:
            make = part(e.peer, full=True, compiled=True)
            contenders.append(
                Contender("transformers, padded to the row, compiled", "best", make, "transformers")
            )
        return Case(
            f"BERT {shape}, {e.type_name}, 30 % masked, {padding:.0%} padding if padded", f"{settings.unit} a pass",
            contenders, {"transformers, padded to the row": 2.5, "best": 1.3}, e.within,
        )  # fmt: skip

    return [functools.partial(case, padding) for padding in (0.5, 0.66)]


GROWTH = {  # what grows: (field of the shape, its values)
    "row length": ("length", (128, 256, 512, 1024)),
    "width": ("width", (128, 256, 384, 512)),
    "layers": ("layers", (2, 4, 8, 12)),
    "vocabulary": ("vocab", (1024, 4096, 16384, 65536)),
}


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Exponent of the power law fitted by least squares."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def growth(settings: Settings) -> list[Callable[[], Case]]:
    """Row 11: exponents of the time of a step beside those of its floating-point operations."""
    base = (
        DECODERS["tiny"]
        if settings.tiny
        else replace(DECODERS["cpu"], layers=4, vocab=2048, rows=2)
    )
    if settings.device.type == "cuda":
        base = base if settings.tiny else replace(DECODERS["cuda"], rows=8)

    def case(name: str) -> Case:
        key, values = GROWTH[name]
        if settings.tiny:
            values = (2, 4) if key == "layers" else (64, 128)
        # The heads keep their size, so that a wider model has more of them.
        size = base.width // base.heads
        shapes = [replace(base, **{key: value}) for value in values]
        shapes = [replace(one, heads=max(1, one.width // size)) for one in shapes]
        _, within, type_name = arithmetic(settings)
        points: dict[str, list[list[float]]] = {"pretrain": [], "transformers": []}

        def slopes(who: str) -> Made:
            contenders = [Decoders(settings, shape, "gpt2") for shape in shapes]
            runs, last = [], Work(0)
            for d in contenders:
                run, last = d.ours() if who == "pretrain" else d.transformers()
                runs.append(run)

            def measure() -> float:
                taken = [min(run(), run()) for run in runs]
                points[who].append(taken)
                return slope(values, taken)

            return measure, last

        def analytic() -> Made:
            costs = []
            for shape in shapes:
                objective = our_objective(shape.model("gpt2"), "NextToken", torch.device("cpu"))
                tokens = shape.rows * shape.length
                costs.append(objective.flops(tokens, tokens - shape.rows, shape.length))
            points["operations"] = [costs]
            exponent = slope(values, costs)
            return lambda: exponent, Work(shapes[-1].rows * shapes[-1].length)

        return Case(
            f"GPT-2 {base}, {type_name}: {name} {values[0]} to {values[-1]}", "exponent of the time of a step",
            [
                Contender("pretrain", "ours", functools.partial(slopes, "pretrain")),
                Contender("analytic cost", "floor", analytic),
                Contender("transformers, sdpa", "default", functools.partial(slopes, "transformers"), "transformers"),
            ],
            {"floor": 1 / 1.05}, within, rounds=(2, 4), extra=lambda: {"x": [name, *values], "points": points},
        )  # fmt: skip

    return [functools.partial(case, name) for name in GROWTH]
