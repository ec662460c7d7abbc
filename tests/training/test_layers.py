"""Layer-wise learning rates, gradual unfreezing and L2-SP: exact on every parameter, and exact when resumed."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import OptimConfig
from pretrain.errors import TrainingError
from pretrain.models import build
from pretrain.objectives import Objective
from pretrain.training.layers import Layers
from pretrain.training.optim import build_optimizers
from pretrain.training.trainer import Hook
from tiny import Rows, losses, objective, tokenizer, trainer

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 32,
    "max_positions": 32,
}
# What a parameter's own name says about where it is.
EMBEDDING = re.compile(r"\b(token|position|segment)_embedding|\bembedding_norm")
BLOCK = re.compile(r"\blayers\.(\d+)\.")


class Crash(Exception):
    """The process dies here."""


def _depth(name: str) -> int:
    if EMBEDDING.search(name):
        return 0
    found = BLOCK.search(name)
    return int(found[1]) + 1 if found else SIZES["num_layers"] + 1


def _weights(goal: Objective) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in goal.named_parameters()}


@pytest.mark.parametrize("family", ["gpt2", "bert", "modernbert"])
@pytest.mark.parametrize("head", ["sequence-classification", "token-classification"])
def test_depths_follow_the_names(family: str, head: str) -> None:
    model = build(family, None, head=head, tokenizer=tokenizer(), **SIZES)
    depths = model.depths()
    assert depths == {name: _depth(name) for name, _ in model.named_parameters()}
    assert set(depths.values()) == {0, 1, 2, 3, 4}
    assert all(depth == 4 for name, depth in depths.items() if name.startswith("head."))


@pytest.mark.parametrize("name", ["adamw", "muon"])
@given(decay=st.floats(0.1, 1.0))
@settings(max_examples=10, deadline=None)
def test_every_parameter_has_the_rate_of_its_depth(name: str, decay: float) -> None:
    goal = Objective(build("bert", None, tokenizer=tokenizer(), **SIZES))
    goal.extra = torch.nn.Linear(2, 2)  # an objective's own weights learn like a head
    config = OptimConfig(lr=1e-3, name=name, layer_decay=decay)  # type: ignore[arg-type]
    layers = Layers(goal, config)
    optimizers = build_optimizers(
        goal, config, goal.model.backbone.blocks(), CPU, scales=layers.scales
    )
    optimizers.set_factor(0.5)
    names = {p: key for key, p in goal.named_parameters()}
    seen = set()
    for opt, peak in zip(optimizers.optimizers, (config.lr, config.muon_lr), strict=False):
        for group in opt.param_groups:
            for p in group["params"]:
                want = 0.5 * peak * decay ** (4 - _depth(names[p]))
                assert group["lr"] == pytest.approx(want, rel=1e-12), names[p]
                seen.add(names[p])
    assert seen == set(names.values())


def test_the_first_update_is_the_rate_of_the_layer(tmp_path: Path) -> None:
    """The first step of AdamW is the sign of the gradient times the rate, in every layer its own."""
    goal = objective("MaskedLM")
    before = _weights(goal)
    optim = {"layer_decay": 0.5, "weight_decay": 0.0, "schedule": "constant", "warmup": 0.0}
    trainer(tmp_path, goal, Rows(8), optim=optim | {"eps": 1e-30}, limit="1 steps").fit()
    depths = goal.model.depths()
    for name, p in goal.named_parameters():
        moved = float((p.detach() - before[name]).abs().max())
        want = 1e-2 * 0.5 ** (3 - depths[name.removeprefix("model.")])
        # A bias of the keys shifts all scores of a row alike: its gradient is rounding.
        assert moved == pytest.approx(want, rel=1e-3), name


@given(
    share=st.floats(0.0, 1.0), total=st.integers(1, 400), decay=st.sampled_from(["gpt2", "bert"])
)
@settings(max_examples=60, deadline=None)
def test_the_schedule_falls_and_follows_the_formula(share: float, total: int, decay: str) -> None:
    layers = _layers(decay, share)
    before = layers.top
    for step in range(total + 1):
        lowest = layers.lowest_unfrozen(step, total)
        assert 0 <= lowest <= before
        for depth in range(layers.top + 1):
            begins = math.floor(share * total * (layers.top - depth) / layers.top)
            assert (depth >= lowest) == (step >= begins)
        before = lowest
    assert before == 0


_MADE: dict[str, Objective] = {}


def _layers(family: str, share: float) -> Layers:
    if family not in _MADE:
        _MADE[family] = Objective(build(family, None, tokenizer=tokenizer(), **SIZES))
    return Layers(_MADE[family], OptimConfig(unfreeze=share))


def test_layers_are_released_from_the_top(tmp_path: Path) -> None:
    """A tensor moves for the first time in the step in which its depth is released, not before."""
    goal = objective("MaskedLM")
    start, moved = _weights(goal), {}

    def look(record: Any) -> None:
        for name, p in goal.named_parameters():
            if name not in moved and not torch.equal(p, start[name]):
                moved[name] = record["step"] - 1

    optim = {"unfreeze": 0.75, "schedule": "constant", "warmup": 0.0}
    run = trainer(tmp_path, goal, Rows(8), optim=optim, hooks=[Hook(look)], limit="12 steps")
    run.fit()
    depths = goal.model.depths()
    # 9 steps over the depths 3 (head), 2, 1 (blocks), 0 (embeddings).
    want = {name: 3 * (3 - depths[name.removeprefix("model.")]) for name in start}
    assert moved == want
    assert all(p.requires_grad for p in goal.parameters())


@pytest.mark.parametrize("optim", [{}, {"unfreeze": 0.5}, {"layer_decay": 0.5}, {"l2_sp": 0.1}])
def test_what_was_frozen_never_moves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], optim: dict[str, Any]
) -> None:
    goal = objective("MaskedLM")
    for part in (goal.model.backbone.layers[0], *goal.model.backbone.embeddings()):
        part.requires_grad_(False)
    frozen = {name for name, p in goal.named_parameters() if not p.requires_grad}
    start = _weights(goal)
    trainer(tmp_path, goal, Rows(8), optim=optim).fit()
    for name, p in goal.named_parameters():
        assert torch.equal(p, start[name]) == (name in frozen), name
        assert p.requires_grad == (name not in frozen)
    assert "no gradient reaches" not in capsys.readouterr().err


def test_unfreezing_with_nothing_to_train_at_the_top(tmp_path: Path) -> None:
    """Weights in the middle alone are trainable (as with adapters): they learn from the first step."""
    goal = objective()
    goal.requires_grad_(False)
    middle = goal.model.backbone.layers[0].mlp
    middle.requires_grad_(True)
    start = _weights(goal)
    trainer(tmp_path, goal, Rows(8), optim={"unfreeze": 1.0}, limit="1 steps").fit()
    for name, p in goal.named_parameters():
        assert torch.equal(p, start[name]) == ("layers.0.mlp." not in name), name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_huge_pull_keeps_the_weights_where_they_were(tmp_path: Path, name: str) -> None:
    goal = objective("MaskedLM")
    fresh = {key for key, _ in goal.model.named_parameters() if key.startswith("head.")}
    goal.model.fresh = frozenset(fresh)
    start = _weights(goal)
    optim = {"l2_sp": 1e9, "name": name, "schedule": "constant"}
    trainer(tmp_path, goal, Rows(8), optim=optim).fit()
    for key, p in goal.named_parameters():
        new = key.removeprefix("model.") in fresh
        assert torch.equal(p, start[key]) != new, key


def test_the_pull_takes_the_place_of_decay_and_follows_the_formula(tmp_path: Path) -> None:
    """One step by hand: Adam's update, then lr * l2_sp of the way back, in plain arithmetic."""
    results = []
    for l2_sp in (0.0, 7.0):
        goal = objective("MaskedLM")
        start = _weights(goal)
        optim = {"l2_sp": l2_sp, "weight_decay": 0.0 if l2_sp == 0 else 0.5, "schedule": "constant"}
        trainer(tmp_path / str(l2_sp), goal, Rows(8), optim=optim, limit="1 steps").fit()
        results.append(_weights(goal))
    plain, pulled = results
    for key, value in plain.items():
        want = value + 1e-2 * 7.0 * (start[key] - value)
        torch.testing.assert_close(pulled[key], want, rtol=1e-6, atol=1e-8)


SETTINGS = [
    {"layer_decay": 0.6},
    {"unfreeze": 0.7},
    {"l2_sp": 3.0},
    {"layer_decay": 0.8, "unfreeze": 0.9, "l2_sp": 0.5, "ema": 0.5, "name": "muon"},
]


@pytest.mark.parametrize(
    ("optim", "crash"),
    [
        pytest.param(SETTINGS[0], 5, marks=pytest.mark.slow),
        (SETTINGS[1], 5),
        pytest.param(SETTINGS[2], 4, marks=pytest.mark.slow),
        (SETTINGS[3], 2),  # all of them together
    ],
)
def test_interrupted_is_uninterrupted(tmp_path: Path, optim: dict[str, Any], crash: int) -> None:
    options: dict[str, Any] = {"optim": optim, "save_every": "2 steps", "limit": "7 steps"}

    def fail(record: Any) -> None:
        if record["step"] == crash:
            raise Crash

    def make() -> Objective:
        goal = objective("MaskedLM", dropout=0.1)
        goal.model.fresh = frozenset({"head.transform.dense.weight"})
        return goal

    whole = make()
    task = trainer(tmp_path / "whole", whole, Rows(8), **options)
    task.fit()
    with pytest.raises(Crash):
        trainer(tmp_path / "cut", make(), Rows(8), hooks=[Hook(fail)], **options).fit()
    again = make()
    # An anchor is where the run started, which what it is resumed with need not be.
    with torch.no_grad():
        for p in again.parameters():
            p.add_(1.0)
    other = trainer(tmp_path / "cut", again, Rows(8), **options)
    other.fit()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for (name, a), (_, b) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    mine, theirs = task.setup.optimizers.state(), other.setup.optimizers.state()
    assert mine.keys() == theirs.keys()
    assert any(key.startswith("anchor/") for key in mine) == ("l2_sp" in optim)
    assert all(torch.equal(value, theirs[key]) for key, value in mine.items())


def test_anchors_cannot_be_made_up_later(tmp_path: Path) -> None:
    trainer(tmp_path, objective(), Rows(8), limit="2 steps").fit()
    with pytest.raises(TrainingError, match=r"optim.l2_sp 0.0 and this run has 0.1"):
        trainer(tmp_path, objective(), Rows(8), optim={"l2_sp": 0.1}, limit="4 steps").fit()


def test_a_longer_limit_freezes_nothing_again(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optim": {"unfreeze": 1.0, "schedule": "constant"}}
    trainer(tmp_path, objective("MaskedLM"), Rows(8), limit="8 steps", **options).fit()
    goal = objective("MaskedLM")
    longer = trainer(tmp_path, goal, Rows(8), limit="40 steps", **options)
    states = []
    longer.hooks = [Hook(lambda _: states.append([p.requires_grad for p in goal.parameters()]))]
    longer.fit()
    # Step 8 of 40 alone would release the head only; the first run had come down to depth 1.
    layers = longer.setup.layers
    assert layers.lowest_unfrozen(8, 40) == 3 and layers.lowest_unfrozen(7, 8) == 1
    assert longer.state.unfrozen_from == 1
    assert states == [[depth >= 1 for depth in goal.model.depths().values()]] * len(states)
