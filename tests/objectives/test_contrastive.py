"""Contrastive learning: losses against plain formulas, chunks, ranks, the bound of the scale, and the contract."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import pretrain
from contract import check_objective_learns, check_objective_resumes, check_sums
from distributed.torchrun import launch
from pretrain import RowSource, train_tokenizer
from pretrain.config import OptimConfig, ParallelConfig, TrainConfig
from pretrain.data.images import ImageProcessor
from pretrain.data.images.pairs import PairProcessor
from pretrain.errors import ConfigError, DataError, ModelError
from pretrain.models import build
from pretrain.objectives import build_objective, contrastive, objective_for
from pretrain.objectives.contrastive import Contrastive, SigmoidContrastive
from pretrain.training.trainer import Hook, Trainer

HERE = Path(__file__).parent
TINY: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "max_positions": 8,
    "image_size": 8,
    "patch_size": 4,
    "eos_id": 4,
    "pad_id": 1,
}
FAMILIES = {"Contrastive": "clip", "SigmoidContrastive": "siglip"}
KINDS = sorted(FAMILIES)


def objective(kind: str = "Contrastive", **options: Any) -> Contrastive:
    model = build(FAMILIES[kind], **{**TINY, **options})
    found = build_objective(kind, {}, model)
    assert isinstance(found, Contrastive)
    return found


def rows(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Images of a bright patch, and texts of two to five tokens that tell its colour and place."""
    rng, found = np.random.default_rng(seed), []
    for i in range(count):
        image = rng.normal(0, 0.1, (3, 8, 8)).astype(np.float32)
        image[i % 3, 4 * (i // 3 % 2) : 4 * (i // 3 % 2) + 4] += 2
        text = [10 + i % 3, 20 + i // 3 % 2, *rng.integers(30, 38, i % 4), 4]
        found.append({"pixel_values": image, "input_ids": np.array(text)})
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind: str, tmp_path: Path) -> None:
    check_sums(objective(kind), rows(8))
    check_objective_learns(lambda: objective(kind), rows(8), tmp_path / "learn")
    check_objective_resumes(lambda: objective(kind), rows(16), tmp_path)


def plain_loss(goal: Contrastive, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    images, texts = goal.towers.vectors(batch)
    scores = goal.towers.scores(images, texts)
    if isinstance(goal, SigmoidContrastive):
        signs = 2 * torch.eye(len(scores)) - 1
        return -F.logsigmoid(signs * scores).sum()
    target = torch.arange(len(scores))
    both = [F.cross_entropy(x, target, reduction="sum") for x in (scores, scores.T)]
    return (both[0] + both[1]) / 2


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 11), st.integers(1, 12), st.sampled_from(KINDS))
def test_chunks_give_the_loss_and_the_gradients_of_the_plain_formula(
    count: int, chunk: int, kind: str
) -> None:
    goal = objective(kind)
    batch = goal.collate(rows(count), [])
    plain = plain_loss(goal, batch)
    plain.backward()
    wanted = {name: p.grad.clone() for name, p in goal.named_parameters()}
    goal.zero_grad()
    before, contrastive._CHUNK = contrastive._CHUNK, chunk
    try:
        loss = goal(batch)
        loss.total.backward()
    finally:
        contrastive._CHUNK = before
    torch.testing.assert_close(loss.total, plain, rtol=1e-5, atol=1e-5)
    assert int(loss.count) == count
    for name, p in goal.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-5)


def kept_bytes(goal: Contrastive, pairs: int) -> int:
    """Bytes of the tensors that are kept for the backward pass."""
    vectors = F.normalize(torch.randn(pairs, 16), dim=-1).requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        goal.compare(vectors, vectors, vectors, vectors, 0)
    return sum(kept.values())


@pytest.mark.parametrize("kind", KINDS)
def test_memory_grows_linearly_with_the_batch(kind: str) -> None:
    goal = objective(kind)
    small, large = kept_bytes(goal, 1024), kept_bytes(goal, 4096)
    assert large < 5 * small
    assert large < 4096 * 4096 * 4 / 20  # a twentieth of the matrix of scores


@pytest.mark.parametrize("kind", [KINDS[0], pytest.param(KINDS[1], marks=pytest.mark.slow)])
def test_ranks_give_the_loss_and_the_gradients_of_one_process(kind: str, tmp_path: Path) -> None:
    worker = HERE / "contrastive_worker.py"
    launch(worker, 2, str(tmp_path / "sums.pt"), kind)
    found = torch.load(tmp_path / "sums.pt")
    goal = objective(kind).train()
    loss = goal(goal.collate(rows(8), []))
    loss.total.backward()
    assert int(found["count"]) == int(loss.count) == 8
    torch.testing.assert_close(found["total"], loss.total.detach(), rtol=1e-6, atol=1e-6)
    for name, p in goal.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)
    run = trainer(objective(kind), tmp_path / "one", 4).fit()
    losses = torch.tensor([r["loss"] for r in run.history if "grad_norm" in r])
    assert len(losses) == 4 and losses[-1] < losses[0]
    for strategy in ("ddp", "fsdp"):
        torch.testing.assert_close(found[strategy], losses, rtol=1e-4, atol=1e-6)


def trainer(
    goal: Contrastive,
    out: Path,
    limit: int,
    hooks: Any = (),
    strategy: Any = "auto",
    **options: Any,
) -> Trainer:
    return Trainer(
        goal,
        rows(16),
        optim=OptimConfig(lr=5e-2, schedule="constant", warmup=0.0),
        train=TrainConfig(
            out=str(out), limit=f"{limit} steps", batch_rows=8, precision="fp32", **options
        ),
        parallel=ParallelConfig(device="cpu", threads=1, strategy=strategy),
        hooks=hooks,
        quiet=True,
    )


def test_the_scale_stays_at_100_or_less(tmp_path: Path) -> None:
    goal, seen = objective(logit_scale_init_value=math.log(200.0)), []
    scale = goal.towers.logit_scale
    record = Hook(lambda record: seen.append(float(scale.detach())))
    trainer(goal, tmp_path / "run", 3, [record]).fit()
    # An optimizer step changes it by 0.05 at most, so it was bounded, and not trained down from 200.
    assert seen[0] == pytest.approx(math.log(100)) and max(seen) <= math.log(100) + 1e-6


def test_a_run_is_saved_with_both_processors_loaded_and_evaluated(tmp_path: Path) -> None:
    corpus = tmp_path / "texts.txt"
    corpus.write_text("red left\nblue right\ngreen left\n", encoding="utf-8")
    tokenizer = train_tokenizer(corpus, "char")
    examples = [
        {**row, "input_ids": np.array([*row["input_ids"][:1] % 5 + 5, 3])} for row in rows(24)
    ]
    processor = PairProcessor(
        tokenizer, ImageProcessor(size=8, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    )
    source = RowSource(examples[8:], examples[:8], processor=processor)
    run = pretrain.train(
        rows=source,
        model={"family": "clip", "overrides": {**TINY, "vocab_size": len(tokenizer), "eos_id": 3}},
        objective={"class_path": "Contrastive"},
        train={"out": str(tmp_path / "run"), "limit": "3 steps", "batch_rows": 8},
        parallel={"device": "cpu"},
    )
    assert 0 <= run.metrics["image_to_text"] <= 1
    model = pretrain.load(tmp_path / "run", quiet=True)
    assert isinstance(model.processor, PairProcessor)
    assert model.processor.fingerprint == processor.fingerprint
    assert model.tokenizer is model.processor.tokenizer
    found = pretrain.evaluate(tmp_path / "run", source, objective="Contrastive", batch_rows=8)
    assert found["loss"] == pytest.approx(run.metrics["loss"], rel=1e-5)


def test_no_objective_is_guessed_for_a_model_without_a_head() -> None:
    assert objective_for(None) is None and objective_for("masked-image") == "MaskedImage"


def test_accumulation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="micro_rows"):
        trainer(objective(), tmp_path / "run", 2, micro_rows=4).fit()


def test_retrieval_is_measured_over_all_held_out_rows() -> None:
    goal = objective().eval()
    with torch.no_grad():
        parts = [goal(goal.collate(rows(12)[i : i + 4], [])) for i in (0, 4, 8)]
        whole = goal.collate(rows(12), [])
        images, texts = goal.towers.vectors(whole)
    metrics = {key: [v for part in parts for v in part.metrics[key]] for key in ("images", "texts")}
    found = goal.summarize(sum(float(p.total) for p in parts), 12, metrics, {})
    scores = images @ texts.T
    target = torch.arange(12)
    assert found["image_to_text"] == pytest.approx(
        float((scores.argmax(1) == target).float().mean())
    )
    assert found["text_to_image"] == pytest.approx(
        float((scores.argmax(0) == target).float().mean())
    )
    same = {"images": [torch.ones(3)] * 4, "texts": [torch.ones(1, 3)] * 4}
    assert goal.summarize(1.0, 4, same, {})["image_to_text"] == 0  # equal vectors find nothing


def test_one_of_several_texts_is_enough_and_each_must_find_its_image() -> None:
    images = F.normalize(torch.eye(7), dim=-1)
    texts = [images[i : i + 1] for i in range(7)]
    texts[0] = torch.stack([images[1], images[0]])  # the first of two belongs to another image
    assert contrastive.recalls(images, texts) == pytest.approx(
        # For image 1 the wrong text of image 0 ties with its own.
        {
            "image_to_text": 6 / 7,
            "image_to_text@5": 1.0,
            "text_to_image": 7 / 8,
            "text_to_image@5": 7 / 8,
        }
    )
    far = [torch.roll(images, 1, 0)[i : i + 1] for i in range(7)]
    assert contrastive.recalls(images, far)["text_to_image@5"] == 0


def test_a_text_that_several_images_have_is_found_by_each_of_them() -> None:
    """It counted as wrong for all of them, so that a perfect model of few captions had the figure 0."""
    images = F.normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]), dim=-1)
    kinds = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts, ids = [kinds[k // 2][None] for k in range(4)], [torch.tensor([k // 2]) for k in range(4)]
    assert contrastive.recalls(images, texts, ids) == dict.fromkeys(
        ("image_to_text", "image_to_text@5", "text_to_image", "text_to_image@5"), 1.0
    )
    assert contrastive.recalls(images, texts)["image_to_text"] == 0
    swapped = contrastive.recalls(images, texts[2:] + texts[:2], ids[2:] + ids[:2])
    assert swapped["image_to_text"] == swapped["text_to_image"] == 0
    several = [torch.cat([kinds[:1], kinds[1:]]), texts[1], texts[2], texts[3]]
    found = contrastive.recalls(images, several, [torch.tensor([0, 1]), *ids[1:]])
    assert found["image_to_text"] == 1 and found["text_to_image"] == 1
    # The copies of one wrong text take one of the five places.
    one = torch.eye(2)
    copies = contrastive.recalls(
        F.normalize(torch.tensor([[0.6, 0.8], *[[0.0, 1]] * 6]), dim=-1),
        [one[:1], *[one[1:]] * 6],
        [torch.tensor([0]), *[torch.tensor([1])] * 6],
    )
    assert copies["image_to_text"] == 6 / 7 and copies["image_to_text@5"] == 1
    # Texts of one vector that are not alike, as unknown characters make them, still count as wrong.
    blind = contrastive.recalls(images, [kinds[0][None]] * 4, [torch.tensor([k]) for k in range(4)])
    assert blind["image_to_text"] == 0
    row = {**rows(1)[0], "text_ids": np.array([7])}
    further = {**row, "input_ids": np.array([10, 4, 11, 4]), "lengths": np.array([2, 2])}
    batch = objective().collate(
        [row, {**further, "text_ids": np.array([8, 7])}], [], evaluation=True
    )
    assert batch["text_ids"].tolist() == [7, 8, 7]
    with torch.no_grad():
        metrics = objective().eval()(batch).metrics
    assert [ids.tolist() for ids in metrics["text_ids"]] == [[7], [8, 7]]


def test_a_run_of_an_earlier_version_has_other_figures_only_where_texts_repeat() -> None:
    goal, several = objective(), [{"text_ids": np.array([7, 8])}, {"text_ids": np.array([9])}]
    for record, changed in ((goal.record(), False), ({"name": "Contrastive"}, True)):
        goal.continue_from(record)
        assert goal.figures_changed([*several, several[0]]) == changed
        assert not goal.figures_changed(several) and not goal.figures_changed(rows(2))


def test_training_draws_one_of_several_texts_and_evaluation_takes_all() -> None:
    several = np.array([10, 20, 4, 11, 21, 22, 4])
    row = {**rows(1)[0], "input_ids": several, "lengths": np.array([3, 4])}
    goal = objective()
    drawn = [
        goal.collate([row], [np.random.default_rng(seed)])["input_ids"][0].tolist()
        for seed in range(8)
    ]
    assert {tuple(ids) for ids in drawn} == {(10, 20, 4), (11, 21, 22, 4)}
    batch = goal.collate([rows(1)[0], row], [], evaluation=True)
    assert batch["input_ids"].tolist()[1:] == [[10, 20, 4, 1], [11, 21, 22, 4]]
    assert batch["owners"].tolist() == [1]
    with torch.no_grad():
        loss = goal.eval()(batch)
    assert int(loss.count) == 2
    assert [len(texts) for texts in loss.metrics["texts"]] == [1, 2]


def test_smoothed_targets_are_those_of_the_plain_formula() -> None:
    model = build("clip", **TINY)
    goal = build_objective("Contrastive", {"label_smoothing": 0.2}, model)
    assert isinstance(goal, Contrastive)
    batch = goal.collate(rows(6), [])
    images, texts = goal.towers.vectors(batch)
    scores, target = goal.towers.scores(images, texts), torch.arange(6)
    wanted = sum(F.cross_entropy(x, target, label_smoothing=0.2) for x in (scores, scores.T)) * 3
    torch.testing.assert_close(goal.train()(batch).total, wanted)
    assert float(goal.eval()(batch).total.detach()) != pytest.approx(float(wanted.detach()))
    with pytest.raises(ConfigError, match="label_smoothing is 1"):
        build_objective("Contrastive", {"label_smoothing": 1.0}, model)


def test_texts_are_padded_on_the_right_and_too_long_ones_named() -> None:
    batch = objective().collate(rows(4), [])
    assert batch["input_ids"].tolist()[0] == [10, 20, 4, 1, 1, 1]
    assert batch["attention_mask"].sum(1).tolist() == [3, 4, 5, 6]
    long = [{**rows(1)[0], "input_ids": np.full(9, 4)}]
    with pytest.raises(DataError, match="9 tokens is longer than the 8 positions"):
        objective().collate(long, [])


@pytest.mark.parametrize("pad_id", [1, 4])
def test_a_text_without_its_end_is_named(pad_id: int) -> None:
    """Also if padding has the id of the end, and before the texts reach an accelerator."""
    cut = [{**row, "input_ids": np.array([10, 11])} for row in rows(1)]
    with pytest.raises(DataError, match=r"1 of 3 texts have no end .* \[10, 11\]"):
        objective(pad_id=pad_id).collate([*rows(2), *cut], [])
    assert "input_ids" in objective("SigmoidContrastive").collate(cut, [])


def test_a_model_that_reads_padding_needs_its_id() -> None:
    with pytest.raises(ModelError, match=r"no pad_id.*model\.overrides\.pad_id"):
        objective("SigmoidContrastive", pad_id=None)
    objective(pad_id=None)  # its texts are read at their end


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_computed_in_fp32_under_autocast(kind: str) -> None:
    towers = objective(kind).towers.eval()
    images, texts = (F.normalize(torch.randn(64, 16), dim=-1) for _ in range(2))
    with torch.no_grad():
        towers.logit_scale.fill_(math.log(100.0))
        wanted = towers.scores(images, texts)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(towers.scores(images, texts), wanted)


def test_texts_of_siglip_are_padded_to_their_positions() -> None:
    """The last position is the vector of a text, and the padding is read like any token."""
    batch = objective("SigmoidContrastive").collate(rows(2), [])
    assert batch["input_ids"].tolist()[0] == [10, 20, 4, 1, 1, 1, 1, 1]
    assert "attention_mask" not in batch


def test_the_first_sigmoid_loss_is_that_of_the_bias() -> None:
    """At -10 each of the pairs costs about 10 nats, and the other decisions almost nothing."""
    goal = objective("SigmoidContrastive")
    with torch.no_grad():
        goal.towers.logit_scale.fill_(-20.0)
        loss = goal(goal.collate(rows(8), []))
    assert float(loss.total / loss.count) == pytest.approx(10.0, abs=1e-2)


def test_other_models_are_refused() -> None:
    with pytest.raises(ModelError, match="Build the family clip"):
        Contrastive(build("gpt2", vocab_size=40, num_layers=1, hidden_size=16, num_heads=2))
    with pytest.raises(ModelError, match="Build the family siglip"):
        SigmoidContrastive(build("clip", **TINY))


@pytest.mark.parametrize("kind", KINDS)
def test_jitter_reaches_the_images_and_is_recorded(kind: str) -> None:
    goal = build_objective(kind, {"jitter": 0.3}, build(FAMILIES[kind], **TINY))
    assert goal.augmentation.jitter == goal.record()["jitter"] == 0.3
