"""Fine-tuning tasks and adapters on meshes: the curve and the figures of one device, and a checkpoint that opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import pretrain
import tiny
from distributed.cluster import merged, once
from distributed.torchrun import launch
from pretrain.data.tokenizer import train_from_texts
from pretrain.models import build

HERE = Path(__file__).parent
MESHES = ("DDP 2", "FSDP2 2", "TP 2")
ADAPTED = ("lora", "dora", "sweep", "chat", "resumed")
CASES = (
    *("classification", "regression", "language", "tokens", "questions", "preference"),
    *ADAPTED,
)
COUPLED = ("pairs", "both ways", "scored")
QUICK = ("classification", "pairs")  # and "resumed", which is "lora" cut in two


def slow_but(names: tuple[str, ...]) -> list[Any]:
    """The names as parameters, those that only -m slow runs marked so."""
    marks = {name: () if name in (*QUICK, "resumed") else (pytest.mark.slow,) for name in names}
    return [pytest.param(name, marks=mark) for name, mark in marks.items()]


def _tuned(folder: Path, cases: tuple[str, ...]) -> None:
    words = ["User: Assistant: who is it and looked at red old big sly no", *tiny.TEXTS]
    talk = train_from_texts(words, "bpe", vocab_size=330)
    for name, tokenizer in (("gpt2", tiny.tokenizer()), ("bert", tiny.tokenizer()), ("talk", talk)):
        model = build(
            name if name != "talk" else "llama",
            None,
            tokenizer=tokenizer,
            num_layers=2,
            hidden_size=32,
            num_heads=4,
            intermediate_size=48,
            max_positions=64 if name == "talk" else 32,
            dropout=0.0,
            attention_dropout=0.0,
        )
        model.save(folder / name)
    parts = [folder / "1.json", folder / "2.json", folder / "4.json"]
    for size, part in zip((1, 2, 4), parts, strict=True):
        launch(HERE / "tuning.py", size, str(part), str(folder), *cases)
    merged(folder, parts)


@pytest.fixture
def seen(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the quick cases gave, or, for a slow test, all of them."""
    slow = request.node.get_closest_marker("slow") is not None
    name, cases = ("tuning-all", ()) if slow else ("tuning", QUICK)
    found: dict[str, Any] = once(tmp_path_factory, name, lambda folder: _tuned(folder, cases))
    return found


@pytest.mark.parametrize("case", slow_but(CASES))
@pytest.mark.parametrize("mesh", MESHES)
def test_tasks_and_adapters_run_on_every_mesh(seen: dict[str, Any], mesh: str, case: str) -> None:
    one, other = seen[f"1|{case}"], seen[f"{mesh}|{case}"]
    assert len(other["losses"]) > 1
    assert other["losses"] == pytest.approx(one["losses"], rel=2e-6)
    assert other["metrics"] == pytest.approx(one["metrics"], rel=1e-4, abs=1e-6)
    assert other.get("rate") == one.get("rate")
    opened = pretrain.load(other["checkpoint"])
    assert (opened.adapter is not None) == (case in ADAPTED)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lora in bf16", "dora in bf16"])
@pytest.mark.parametrize("mesh", MESHES)
def test_adapters_in_half_precision_have_the_curve_of_one_device(
    seen: dict[str, Any], mesh: str, case: str
) -> None:
    """Within the rounding of bf16, in which FSDP2 also gathers LoRA, and not DoRA."""
    one, other = seen[f"1|{case}"], seen[f"{mesh}|{case}"]
    assert len(other["losses"]) == 8 and len(set(other["losses"])) == 8
    assert other["losses"] == pytest.approx(one["losses"], rel=1e-3)
    assert other["losses"] != seen["1|" + case.split()[0]]["losses"]
    assert other["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], rel=1e-3)


@pytest.mark.parametrize("case", slow_but(COUPLED))
@pytest.mark.parametrize(
    "mesh",
    [*MESHES, "FSDP2 x TP 4", pytest.param("2 copies x TP 4", marks=pytest.mark.slow)],
)
def test_rows_are_compared_with_those_of_all_processes(
    seen: dict[str, Any], mesh: str, case: str
) -> None:
    """The loss is that of the whole batch, whoever holds its rows: so is its gradient, or later steps would differ."""
    one, other = seen[f"1|{case}"], seen[f"{mesh}|{case}"]
    assert other["losses"] == pytest.approx(one["losses"], rel=5e-6, abs=1e-6)
    assert other["losses"][-1] < other["losses"][0]
    assert other["metrics"] == pytest.approx(one["metrics"], rel=1e-4, abs=1e-6)


def test_hosts_with_unequal_memory_choose_one_mesh(seen: dict[str, Any]) -> None:
    """Each by itself would copy the model or cut it, and they would wait for each other for ever."""
    one, other = seen["1|classification"], seen["unequal hosts"]
    assert other["losses"] == pytest.approx(one["losses"], rel=2e-6)


def test_a_loss_that_forgets_the_rows_of_others_is_refused(seen: dict[str, Any]) -> None:
    assert "Forgetful" in seen["forgetful"] and "whole_batch" in seen["forgetful"]
