"""Parameter groups, Muon against torch's own, and moments by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pretrain.config import OptimConfig
from pretrain.errors import CheckpointError, ConfigError
from pretrain.models import build, family_class
from pretrain.objectives import Objective
from pretrain.training import optim, update_rules
from pretrain.training.optim import build_optimizers, resolve_lr
from pretrain.training.update_rules import EagerAdamW, Muon, orthogonalize

CPU = torch.device("cpu")
QUINTIC = (3.4445, -4.7750, 2.0315)  # of Jordan et al., 2024, and of torch.optim.Muon


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8))
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embed(x)))


def _net() -> _Net:
    torch.manual_seed(0)
    return _Net()


def _step(net: _Net, optimizers: object, seed: int) -> None:
    x = torch.randint(0, 11, (5, 7), generator=torch.Generator().manual_seed(seed))
    nn.functional.cross_entropy(net(x).flatten(0, 1), x.flatten()).backward()
    optimizers.step()  # type: ignore[attr-defined]
    optimizers.zero_grad()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("width", "lr"),
    # The published rates of GPT-3 stand beside those of its widths.
    [(16, 3.75e-3), (256, 9.4e-4), (768, 6e-4), (1024, 3e-4), (2048, 2e-4), (4096, 1.2e-4)],
)
def test_the_automatic_rate_is_that_of_the_width(width: int, lr: float) -> None:
    heads = {"num_layers": 1, "num_heads": 2, "intermediate_size": 8, "vocab_size": 16}
    with torch.device("meta"):
        goal = Objective(build("gpt2", None, hidden_size=width, max_positions=8, **heads))
    found, reason = resolve_lr(OptimConfig(lr="auto", eps=1e-6), goal)
    assert found.eps == 1e-6 and f"width {width}" in reason
    assert found.lr == pytest.approx(lr, rel=0.02 if width < 768 else 0.31)
    muon, reason = resolve_lr(OptimConfig(lr="auto", name="muon"), goal)
    assert (muon.lr, muon.muon_lr) == (3e-3, OptimConfig.muon_lr) and "Muon" in reason
    given = OptimConfig(lr=0.3)
    assert resolve_lr(given, goal) == (given, "")


def test_decay_is_off_for_norms_biases_and_embeddings() -> None:
    net = _net()
    opt = build_optimizers(
        net, OptimConfig(lr=1e-3, weight_decay=0.1), [net.block], CPU
    ).optimizers[0]
    decay = {id(p): g["weight_decay"] for g in opt.param_groups for p in g["params"]}
    for name, p in net.named_parameters():
        want = 0.1 if name in ("block.0.weight", "block.2.weight", "head.weight") else 0.0
        assert decay[id(p)] == want, name


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize(
    "family",
    [
        "vit",
        "vit_mae",
        "dinov2",
        "clip",
        "siglip",
        "git",
        "audio-spectrogram-transformer",
        "resnet",
        "bert",
    ],
)
def test_tables_positions_and_tokens_do_not_decay(family: str, name: str) -> None:
    text = {} if family_class(family).processor_class else {"vocab_size": 32}
    with torch.device("meta"):
        model = build(family, "tiny", **text)
    config = OptimConfig(lr=1e-3, name=name, weight_decay=0.1)
    found = build_optimizers(model, config, model.backbone.blocks(), torch.device("meta"))
    groups = [group for opt in found.optimizers for group in opt.param_groups]
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    parts = ("embedding.weight", "position", "token", "probe", "norm", "scale", "bias", "lambda")
    for key, p in model.named_parameters():
        added = any(part in key for part in parts) and "projection" not in key
        still = p.ndim < 2 or added
        assert decay[p] == (0.0 if still else 0.1), key


def test_own_parameters_are_weights_by_their_name() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places, self.weight_in = (nn.Parameter(torch.ones(4, 8)) for _ in range(2))
            self.norm = nn.LayerNorm((4, 8))

    block = Mixed()
    adamw, muon = build_optimizers(
        block, OptimConfig(lr=1e-3, name="muon"), [block], CPU
    ).optimizers
    assert [p for g in muon.param_groups for p in g["params"]] == [block.weight_in]
    assert not any(g["weight_decay"] for g in adamw.param_groups)
    linear, bag = nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.EmbeddingBag(4, 8)
    parts = {linear.parametrizations.weight.original0, linear.parametrizations.weight.original1}
    assert optim.weights_of(nn.Sequential(linear, bag)) == parts


def test_tied_matrix_is_stepped_once_and_not_decayed() -> None:
    net = _net()
    net.head.weight = net.embed.weight
    opt = build_optimizers(net, OptimConfig(lr=1e-3), [net.block], CPU).optimizers[0]
    found = [p for g in opt.param_groups for p in g["params"] if p is net.embed.weight]
    assert len(found) == 1
    group = next(g for g in opt.param_groups if any(p is net.embed.weight for p in g["params"]))
    assert group["weight_decay"] == 0.0


def test_muon_takes_the_matrices_of_the_blocks_alone() -> None:
    net = _net()
    adamw, muon = build_optimizers(
        net, OptimConfig(lr=1e-3, name="muon"), [net.block], CPU
    ).optimizers
    assert isinstance(muon, Muon)
    mine = [p for g in muon.param_groups for p in g["params"]]
    assert {id(p) for p in mine} == {id(net.block[0].weight), id(net.block[2].weight)}
    both = len(mine) + sum(len(g["params"]) for g in adamw.param_groups)
    assert both == len(list(net.parameters()))


def test_adamw_is_that_of_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    groups = [EagerAdamW, torch.optim.AdamW]
    optimizers = [
        made(
            [{"params": [net.weight], "weight_decay": 0.1}, {"params": [net.bias]}],
            lr=0.01,
            fused=True,
        )
        for made, net in zip(groups, (ours, theirs), strict=True)
    ]
    for _ in range(3):
        x = torch.randn(4, 5)
        for net, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)
    assert optimizers[0].state_dict().keys() == optimizers[1].state_dict().keys()


def test_muon_equals_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its coefficients the same as torch.optim.Muon (whose iteration always runs in bf16)."""
    monkeypatch.setattr(update_rules, "_POLAR_EXPRESS", (QUINTIC,) * 5)
    monkeypatch.setattr(update_rules, "_MARGIN", 1.0)
    torch.manual_seed(0)
    a = [
        nn.Parameter(torch.randn(16, 8)),
        nn.Parameter(torch.randn(16, 8)),
        nn.Parameter(torch.randn(4, 12)),
    ]
    b = [nn.Parameter(p.detach().clone()) for p in a]
    ours = Muon(a, lr=0.02, momentum=0.95, weight_decay=0.1)
    theirs = torch.optim.Muon(b, lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="original")
    for seed in range(4):
        torch.manual_seed(seed)
        for p, q in zip(a, b, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        before = [p.detach().clone() for p in a]
        ours.step()
        theirs.step()
        for p, q, old in zip(a, b, before, strict=True):
            gap = (p - q).norm() / (q - old).norm()
            assert gap < 0.05, f"updates differ by {gap:.1%}"
            with torch.no_grad():
                p.copy_(q)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8, 32), (2, 32, 8)])
def test_orthogonalize_pushes_singular_values_to_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert values.max() < 1.15 and values.min() > 0.7


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_cautious_decay_shrinks_only_where_update_and_weight_agree(name: str) -> None:
    """Weights move as without decay, and where this brings them nearer to zero they decay too."""
    nets = {}
    for decay in (0.0, 0.5):
        torch.manual_seed(1)
        nets[decay] = net = _net()
        config = OptimConfig(lr=1e-3, name=name, weight_decay=decay, cautious=True)  # type: ignore[arg-type]
        before = net.block[0].weight.detach().clone()
        _step(net, build_optimizers(net, config, [net.block], CPU), 0)
    plain, decayed = (nets[decay].block[0].weight.detach() for decay in (0.0, 0.5))
    lr = config.muon_lr if name == "muon" else config.lr
    agree = (before - plain) * before > 0
    share = torch.where(agree, lr * 0.5, 0.0)
    assert agree.any() and not agree.all()
    assert torch.allclose(decayed, plain - share * before, atol=1e-6, rtol=0)
    assert torch.equal(nets[0.0].embed.weight, nets[0.5].embed.weight)


def test_orthogonalize_is_nearer_to_orthogonal_than_the_quintic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(128, 128))
    matrices = torch.stack([torch.randn(128, 128), u @ torch.diag(torch.logspace(0, -3, 128)) @ v])

    def gaps() -> torch.Tensor:
        return (torch.linalg.svdvals(orthogonalize(matrices)) - 1).square().mean(-1).sqrt()

    ours = gaps()
    monkeypatch.setattr(update_rules, "_POLAR_EXPRESS", (QUINTIC,) * 5)
    monkeypatch.setattr(update_rules, "_MARGIN", 1.0)
    assert (ours < 0.7 * gaps()).all() and ours.max() < 0.3


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_by_name_survives_another_parameter_order(name: str) -> None:
    net = _net()
    config = OptimConfig(name=name, lr=1e-2)  # type: ignore[arg-type]
    first = build_optimizers(net, config, [net.block], CPU)
    _step(net, first, 0)
    state = {key: value.clone() for key, value in first.state().items()}
    weights = {key: value.clone() for key, value in net.state_dict().items()}

    class Shuffled(_Net):
        def named_parameters(self, *args: object, **kwargs: object):  # type: ignore[no-untyped-def]
            return reversed(list(super().named_parameters()))

    torch.manual_seed(1)
    other = Shuffled()
    other.load_state_dict(weights)
    second = build_optimizers(other, config, [other.block], CPU)
    second.load(state)
    for seed in (1, 2):
        _step(net, first, seed)
        _step(other, second, seed)
    for key, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_state_of_another_model_is_refused() -> None:
    net = _net()
    optimizers = build_optimizers(net, OptimConfig(lr=1e-3), [net.block], CPU)
    _step(net, optimizers, 0)
    state = dict(optimizers.state())
    with pytest.raises(CheckpointError, match="no such parameter"):
        optimizers.load({"exp_avg/nowhere": torch.zeros(1)})
    wrong = state | {"exp_avg/head.weight": torch.zeros(3, 3)}
    with pytest.raises(CheckpointError, match="shape"):
        optimizers.load(wrong)
    fresh = build_optimizers(_net_copy := _net(), OptimConfig(lr=1e-3), [_net_copy.block], CPU)
    short = {key: value for key, value in state.items() if not key.endswith("head.weight")}
    with pytest.raises(CheckpointError, match="lacks the moments"):
        fresh.load(short)


def test_unknown_optimizer_and_nothing_trainable() -> None:
    net = _net()
    config = OptimConfig(lr=1e-3)
    config.name = "adamv"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="adamw"):
        build_optimizers(net, config, [net.block], CPU)
    net.requires_grad_(False)
    with pytest.raises(ConfigError, match="frozen"):
        build_optimizers(net, OptimConfig(lr=1e-3), [net.block], CPU)
