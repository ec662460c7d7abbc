"""One of several processes that share a model by tensor parallelism, held against the whole model; see the test.

Run by torchrun as ``tp_worker.py FOLDER``: every process writes the figures of all cases to FOLDER/RANK.json.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from pretrain.data.loader import row_rngs
from pretrain.distributed.tensor_parallel import reduce_partial_gradients, shard_model
from pretrain.errors import ModelError
from pretrain.lora import LoraConfig, apply_lora
from pretrain.models import build
from pretrain.models.base import Model
from pretrain.nn import loss as loss_module
from pretrain.nn.attention import AttentionMask
from pretrain.nn.block import Block, BlockConfig
from pretrain.nn.layout import piece
from pretrain.nn.loss import chunked_cross_entropy
from pretrain.nn.tensor_parallel import (
    Group,
    VocabShard,
    all_reduce,
    copy_to_tensor_parallel,
    gather_from_tensor_parallel,
    reduce_from_tensor_parallel,
)
from pretrain.objectives import build_objective, likelihood
from tiny import Rows, tokenizer

VOCAB = 91  # odd, so that no process number divides it
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"num_kv_heads": 2, "attention_bias": True, "mlp_bias": True},
    "mistral": {"num_kv_heads": 2, "sliding_window": 4},
    "qwen2": {"num_kv_heads": 2, "tie_embeddings": True},
    "qwen3": {"num_kv_heads": 2, "head_dim": 12},
    "bert": {"tie_embeddings": False},
    "roberta": {},
    "modernbert": {"attention_bias": True, "norm_bias": True, "local_attention": 6},
}
CAUSAL = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
Figures = dict[str, float]


def group() -> Group:
    return Group(dist.group.WORLD, dist.get_rank(), dist.get_world_size())


def noisy(model: Model, size: float = 0.1) -> Model:
    """Move every parameter, so that a bias counted twice, or an adapter that is left out, is seen."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def made(family: str, *, head: str | None = None, noise: float = 0.1, **options: Any) -> Model:
    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 64,
        "max_positions": 40,
        "vocab_size": VOCAB,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    settings |= FAMILIES[family] | options
    if head is not None:
        settings["head"] = head
    return noisy(build(family, None, seed=0, tokenizer=tokenizer(), **settings), noise)


def batch_for(family: str) -> tuple[str, list[Any], dict[str, Tensor]]:
    kind = "NextToken" if family in CAUSAL else "MaskedLM"
    rows = Rows(8, length=24)
    objective = build_objective(kind, {}, made(family))
    return kind, rows, objective.collate(rows, row_rngs(0, "collate", 0, len(rows)))


def gradients(model: Model) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def held_against(whole: Model, cut: Model) -> Figures:
    """How far the gradients of the cut model are from their parts of the whole ones, and from each other's."""
    wanted, found = gradients(whole), gradients(cut)
    assert set(wanted) == set(found), set(wanted) ^ set(found)
    reduce_partial_gradients(found, cut.tp)
    total = torch.stack([g.norm() for g in wanted.values()]).norm()
    worst, apart, where = 0.0, 0.0, ""
    for name, full in wanted.items():
        assert found[name].dtype == full.dtype
        part = cut.tp.take(name, full)
        assert found[name].shape == part.shape, name
        # Some gradients vanish by symmetry (the bias of keys): what is left of them is rounding.
        far = float((found[name] - part).norm() / full.norm().clamp_min(1e-3 * total))
        if far > worst:
            worst, where = far, name
        if name not in cut.tp.cuts:
            most = all_reduce(found[name], cut.tp.group, largest=True)
            least = -all_reduce(-found[name], cut.tp.group, largest=True)
            apart = max(apart, float((most - least).abs().max()))
    return {"gradient": worst, "apart": apart, "worst": where}  # type: ignore[dict-item]


def far(found: Tensor, wanted: Tensor) -> float:
    return float(
        (found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
    )


def compared(whole: Model, cut: Model, run: Callable[[Model], Tensor]) -> Figures:
    """Loss and gradients of both."""
    wanted = run(whole)
    wanted.backward()
    found = run(cut)
    found.backward()
    return {"loss": far(found.detach(), wanted.detach())} | held_against(whole, cut)


def pair(model: Model) -> tuple[Model, Model]:
    cut = copy.deepcopy(model)
    shard_model(cut, group())
    return model, cut


def family_case(family: str) -> Figures:
    kind, _, batch = batch_for(family)
    whole, cut = pair(made(family))
    hits = []

    def run(model: Model) -> Tensor:
        loss = build_objective(kind, {}, model).train()(batch)
        hits.append(float(loss.metrics["accuracy"]))
        return loss.total

    figures = compared(whole, cut, run)
    figures["accuracy"] = abs(hits[0] - hits[1])
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "target_index")}
    with torch.no_grad():
        a, b = whole.eval()(inputs), cut.eval()(inputs)
    assert a.shape == b.shape
    figures["logits"] = far(b, a)
    if family in CAUSAL:
        prompts = [[5, 6, 7], [9, 20, 11, 40, 31]]
        options: dict[str, Any] = {"max_new_tokens": 12}
        figures["generated"] = float(
            whole.generate(prompts, **options) != cut.generate(prompts, **options)
        )
    return figures


def checkpointed() -> Figures:
    kind, _, batch = batch_for("qwen3")
    whole, cut = pair(made("qwen3"))
    cut.backbone.set_activation_checkpointing("full")
    return compared(whole, cut, lambda m: build_objective(kind, {}, m).train()(batch).total)


def compiled() -> Figures:
    kind, _, batch = batch_for("qwen3")
    whole, cut = pair(made("qwen3"))
    for block in cut.backbone.blocks():
        block.compile(backend="aot_eager", fullgraph=True)
    return compared(whole, cut, lambda m: build_objective(kind, {}, m).train()(batch).total)


def dropout() -> Figures:
    """Chance is the same on all processes outside of the heads, so whole parameters stay alike."""
    kind, _, batch = batch_for("bert")
    _, cut = pair(made("bert", dropout=0.2, attention_dropout=0.2))
    torch.manual_seed(3)
    build_objective(kind, {}, cut).train()(batch).total.backward()
    return {"apart": held_against(cut_to_whole(cut), cut)["apart"]}


def cut_to_whole(cut: Model) -> Model:
    """A stand-in whose gradients have the full shapes."""
    whole = made("bert", dropout=0.2)
    for parameter in whole.parameters():
        parameter.grad = torch.ones_like(parameter)
    return whole


def adapter(family: str, dora: bool, drop: float = 0.0) -> Figures:
    kind, _, batch = batch_for(family)
    model = apply_lora(made(family), LoraConfig(r=3, dora=dora, dropout=drop))
    noisy(model)
    whole, cut = pair(model)
    assert [p.requires_grad for p in whole.parameters()] == [
        p.requires_grad for p in cut.parameters()
    ]
    figures = compared(
        whole, cut, lambda m: build_objective(kind, {}, m).train(not drop)(batch).total
    )
    if drop:
        torch.manual_seed(1)
        cut.zero_grad()
        build_objective(kind, {}, cut).train()(batch).total.backward()
        figures["apart"] = max(figures["apart"], held_against(whole, cut)["apart"])
    return figures


def bf16() -> Figures:
    """Half precision may be as far from fp32 as it is without tensor parallelism, and half as far again."""
    kind, _, batch = batch_for("qwen3")
    model = made("qwen3")
    exact, (whole, cut) = copy.deepcopy(model), pair(model)
    build_objective(kind, {}, exact).train()(batch).total.backward()
    for m in (whole, cut):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = build_objective(kind, {}, m).train()(batch).total
        loss.backward()
    usual = max(
        far(p.grad, q.grad)
        for p, q in zip(whole.parameters(), exact.parameters(), strict=True)
        if p.grad is not None
    )
    found = held_against(exact, cut)
    return {"ratio": found["gradient"] / usual, "apart": found["apart"]}


def classifier() -> Figures:
    _, rows, _ = batch_for("bert")
    ids = torch.stack([torch.from_numpy(row["input_ids"]) for row in rows])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    target = torch.arange(len(rows)) % 3
    whole, cut = pair(made("bert", head="sequence-classification", labels=["a", "b", "c"]))
    return compared(whole, cut, lambda m: F.cross_entropy(m.train()(batch), target))


IMAGES: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "image_size": 8,
    "patch_size": 4, "num_channels": 3,
}  # fmt: skip


def images(family: str, **options: Any) -> Figures:
    """Families without a vocabulary."""
    options = {"head": "image-classification", "labels": ["a", "b", "c"], **IMAGES, **options}
    model = build(family, **options)
    pixels = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    whole, cut = pair(noisy(model))
    target = torch.arange(6) % 3
    return compared(whole, cut, lambda m: F.cross_entropy(m({"pixel_values": pixels}), target))


def towers(family: str, objective: str) -> Figures:
    """Both towers, the one of images wider than that of texts."""
    wider = {"vision_hidden_size": 48, "vision_num_heads": 6, "vision_intermediate_size": 80}
    options = IMAGES | wider | {"vocab_size": VOCAB, "max_positions": 12, "eos_id": 4, "pad_id": 1}
    generator = torch.Generator().manual_seed(2)
    rows = [
        {
            "pixel_values": torch.randn(3, 8, 8, generator=generator).numpy(),
            "input_ids": torch.tensor([5 + k, 40 + k, 90 - k, 4]).numpy(),
        }
        for k in range(6)
    ]
    # Noise of 0.1 would be most of the score of SigLIP, whose scale and bias are parameters.
    whole, cut = pair(noisy(build(family, **options), 0.05))
    batch = build_objective(objective, {}, whole).collate(rows, row_rngs(0, "collate", 0, 6))
    return compared(whole, cut, lambda m: build_objective(objective, {}, m).train()(batch).total)


def whole_logits() -> Figures:
    """A loss on the gathered logits, for who does not go through the chunked one."""
    _, _, batch = batch_for("roberta")
    inputs = {"input_ids": batch["input_ids"]}
    target = torch.arange(batch["input_ids"].numel()) % VOCAB
    whole, cut = pair(made("roberta"))
    return compared(whole, cut, lambda m: F.cross_entropy(m.train()(inputs).flatten(0, 1), target))


def single_targets() -> Figures:
    _, _, batch = batch_for("qwen2")
    whole, cut = pair(made("qwen2"))
    weights = torch.linspace(-1, 1, int((batch["labels"] != -100).sum()))
    return compared(
        whole, cut, lambda m: (likelihood.target_log_probs(m.train(), batch) * weights).sum()
    )


def ties() -> Figures:
    """Equal rows of the vocabulary on two processes: only the lower id is right, as in argmax; NaN is ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator) for n in (70, VOCAB))
    bias = torch.randn(VOCAB, generator=generator)
    weight[80], bias[80] = weight[3], bias[3]
    hidden[:40] = 4 * weight[3]
    labels = torch.randint(VOCAB, (70,), generator=generator)
    labels[:20], labels[20:40], labels[40:50] = 3, 80, -100
    with torch.no_grad():
        hidden[45] = float("nan")
    vocab = VocabShard(group(), VOCAB)
    start, length = vocab.start, vocab.sizes[vocab.group.rank]
    results = []
    for shard in (None, vocab):
        h, w, b = (x.clone().requires_grad_() for x in (hidden, weight, bias))
        used = (w, b) if shard is None else (w[start : start + length], b[start : start + length])
        total, hits = chunked_cross_entropy(
            h, used[0], labels, bias=used[1], softcap=9.0, vocab=shard
        )
        (2 * total).backward()
        results.append((total, hits, h.grad, w.grad[start : start + length]))
    (a, m, p, u), (b2, n, q, v) = results
    assert 20 <= int(m) < 40  # the rows labelled 3, none of those labelled 80
    return {
        "loss": far(b2, a),
        "accuracy": float((m - n).abs()),
        "gradient": max(far(q, p), far(v, u)),
    }


def cross_attention() -> Figures:
    """A block that also reads a context, cut after its own plan."""
    config = BlockConfig(32, 4, 64, cross_attention=True, bias=True)
    torch.manual_seed(0)
    whole, mine = Block(config), group()
    cut = copy.deepcopy(whole)
    dims = {"column": {"weight": 0, "bias": 0}, "row": {"weight": 1}}
    for path, kind in Block.tensor_parallel.items():
        layer: Any = dict(cut.named_modules()).get(path)
        if layer is None:
            continue
        cut.get_submodule(path.rpartition(".")[0]).parallel = mine
        for leaf, dim in dims.get(kind, {}).items():
            p = getattr(layer, leaf)
            p.data = p.data.narrow(dim, *piece(p.shape[dim], mine.size, mine.rank)).clone()
    x, context = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    found = []
    for block in (whole, cut):
        a, b = x.clone().requires_grad_(), context.clone().requires_grad_()
        out = block(a, mask=AttentionMask(causal=True), context=b)
        (out * out).sum().backward()
        found.append((out.detach(), a.grad, b.grad))
    return {
        name: far(b, a) for name, a, b in zip(("loss", "gradient", "context"), *found, strict=True)
    }


def collectives() -> Figures:
    """Forward and backward of each by hand."""
    mine = group()
    rank, size = mine.rank, mine.size
    x = torch.full((2, 3), float(rank + 1), requires_grad=True)
    total = size * (size + 1) / 2
    reduce_from_tensor_parallel(x, mine).sum().backward()
    wrong = float(
        (x.grad - 1).abs().max()
        + (reduce_from_tensor_parallel(x.detach(), mine) - total).abs().max()
    )
    x.grad = None
    (copy_to_tensor_parallel(x, mine) * (rank + 1)).sum().backward()
    wrong += float((x.grad - total).abs().max())
    sizes = [3, *[2] * (size - 1)]
    piece_ = torch.full((2, sizes[rank]), float(rank), requires_grad=True)
    joined = gather_from_tensor_parallel(piece_, mine, 1, sizes)
    wanted = torch.cat([torch.full((2, n), float(r)) for r, n in enumerate(sizes)], 1)
    (joined * torch.arange(sum(sizes))).sum().backward()
    own = torch.arange(sum(sizes)).split(sizes)[rank].expand(2, -1)
    wrong += float((joined.detach() - wanted).abs().max() + (piece_.grad - own).abs().max())
    half = torch.tensor([256.0, 1.0], dtype=torch.bfloat16)
    wrong += float(all_reduce(half, mine).dtype != torch.bfloat16)
    return {"wrong": wrong}


def foreign_id() -> Figures:
    """An id that does not exist is named on all processes alike: none waits for another."""
    _, cut = pair(made("gpt2"))
    try:
        cut({"input_ids": torch.tensor([[3, VOCAB]])})
    except ModelError as error:
        return {"named": float(f"0 to {VOCAB - 1}" in str(error))}
    return {"named": 0.0}


CASES: dict[str, Callable[[], Figures]] = {
    "collectives": collectives,
    **{family: (lambda family=family: family_case(family)) for family in FAMILIES},
    "checkpointed": checkpointed,
    "compiled": compiled,
    "dropout": dropout,
    "lora_gpt2": lambda: adapter("gpt2", False),
    "lora_qwen3": lambda: adapter("qwen3", False, 0.1),
    "lora_modernbert": lambda: adapter("modernbert", False),
    "dora_gpt2": lambda: adapter("gpt2", True),
    "dora_qwen2": lambda: adapter("qwen2", True, 0.1),
    "bf16": bf16,
    "classifier": classifier,
    "images": lambda: images("vit"),
    "scaled_images": lambda: images("dinov2", intermediate_size=None, use_swiglu_ffn=True),
    "clip": lambda: towers("clip", "Contrastive"),
    "siglip": lambda: towers("siglip", "SigmoidContrastive"),
    "whole_logits": whole_logits,
    "single_targets": single_targets,
    "ties": ties,
    "cross_attention": cross_attention,
    "foreign_id": foreign_id,
}
# With four processes: the heads of keys and values must suffice.
FOUR = ("collectives", "gpt2", "bert", "lora_gpt2", "ties", "whole_logits")


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    # Several chunks and pieces, whose size would differ between processes if each took its own rows for it.
    loss_module.WIDE["cpu"] = likelihood._LOGITS = 46 * 45
    loss_module.CHUNK_BYTES["cpu"], loss_module.CHUNK_ROWS = 4 * 46 * 45, 1
    names = FOUR if dist.get_world_size() == 4 else CASES
    out = Path(sys.argv[1]) / f"{dist.get_rank()}.json"
    out.write_text(json.dumps({name: CASES[name]() for name in names}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
