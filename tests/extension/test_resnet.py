"""A family that is no transformer and has running statistics: they are initialised, saved, loaded and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pretrain
import pretrain.models
from distributed.torchrun import launch
from extension import resnet
from pretrain.errors import CheckpointError, ConfigError, TrainingError
from pretrain.models import build
from pretrain.nn.buffers import parameters_on_meta, persistent_buffers
from pretrain.training.trainer import Hook

KINDS = ("running_mean", "running_var", "num_batches_tracked")


def tiny(**options: Any) -> Any:
    return build("extension.resnet:ResNet", head="sequence-classification", labels=2, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("resnet") / "run"
    resnet.trainer(out, ema=0.5).fit()
    return out


def test_buffers_begin_as_their_modules_initialise_them() -> None:
    model = tiny()
    for name, value in model.named_buffers():
        wanted = 0.5 if name.endswith("scale") else float(name.endswith("running_var"))
        assert bool((value == wanted).all()), name
    for value in model.buffers():
        value.fill_(7)
    model.init_weights(1)
    assert all(float(value.max()) <= 1.0 for value in model.buffers())


def test_files_hold_buffers_under_the_names_of_hugging_face(run: Path) -> None:
    with safe_open(run / "checkpoint-6" / "model.safetensors", "pt") as file:
        names = file.keys()
        stored = {key: file.get_tensor(key) for key in names}
    norms = ["resnet.embedder.normalization", "classifier.0"]
    norms += [f"resnet.encoder.layers.{n}.layer.{i}.normalization" for n in (0, 1) for i in (0, 1)]
    for norm in norms:
        assert {f"{norm}.{leaf}" for leaf in ("weight", "bias", *KINDS)} <= stored.keys()
        assert stored[f"{norm}.num_batches_tracked"] == 12  # two micro-batches in each of six steps
        assert stored[f"{norm}.num_batches_tracked"].dtype == torch.int64
        assert stored[f"{norm}.running_var"].dtype == torch.float32
        assert bool((stored[f"{norm}.running_mean"] != 0).any())
    assert not [key for key in stored if "scale" in key]


def test_loading_gives_every_buffer_back(run: Path) -> None:
    task = resnet.trainer(run, ema=0.5)
    task.fit()  # nothing is left to do, so that it holds what was trained
    found = pretrain.load(run, quiet=True)
    mine, stored = task.objective.model.state_dict(), found.state_dict()
    assert mine.keys() == stored.keys()
    for name, value in persistent_buffers(found).items():
        assert torch.equal(value, mine[name]), name
    batch = task.objective.collate(resnet.images(8), [])
    assert bool(torch.isfinite(found(batch)).all())


def test_a_file_without_a_buffer_is_refused(run: Path, tmp_path: Path) -> None:
    model = pretrain.load(run, quiet=True)
    model.save(tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    (tmp_path / "saved" / "manifest.json").unlink(missing_ok=True)
    tensors = load_file(file)
    lost = "resnet.encoder.layers.1.layer.0.normalization.running_var"
    save_file({k: v for k, v in tensors.items() if k != lost}, file)
    with pytest.raises(CheckpointError, match=f"lack {lost}"):
        pretrain.load(tmp_path / "saved")
    count = "classifier.0.num_batches_tracked"
    save_file(tensors | {count: tensors[count].float()}, file)
    with pytest.raises(CheckpointError, match=r"must be torch\.int64"):
        pretrain.load(tmp_path / "saved")


@pytest.mark.parametrize("options", [{}, {"ema": 0.5}])
def test_resuming_is_bit_exact(options: dict[str, Any], tmp_path: Path) -> None:
    resnet.trainer(tmp_path / "whole", **options).fit()
    resnet.trainer(tmp_path / "cut", limit=3, **options).fit()
    resnet.trainer(tmp_path / "cut", **options).fit()
    for file in ("model.safetensors", "training/optimizer.safetensors"):
        one, two = (tmp_path / name / "checkpoint-6" / file for name in ("whole", "cut"))
        assert one.read_bytes() == two.read_bytes()


def test_a_skipped_step_leaves_the_buffers_alone(tmp_path: Path) -> None:
    task = resnet.trainer(tmp_path / "run", limit=2)
    seen: list[bool] = []
    task.hooks = [Hook(lambda record: seen.append(record["skipped"]))]
    inner = task.objective.forward

    def forward(batch: dict[str, Any]) -> Any:
        if task.state.step == 1 and task.objective.training:
            batch["pixel_values"] = batch["pixel_values"] * float("inf")
        return inner(batch)

    task.objective.forward = forward  # type: ignore[method-assign]
    task.fit()
    assert seen == [False, True]
    assert int(task.objective.model.backbone.stem_norm.num_batches_tracked) == 2
    assert all(bool(torch.isfinite(b).all()) for b in task.objective.buffers())


def test_bf16_keeps_the_statistics_in_fp32(tmp_path: Path) -> None:
    task = resnet.trainer(tmp_path / "run", limit=2, precision="bf16")
    task.fit()
    norm = task.objective.model.backbone.stem_norm
    assert norm.running_mean.dtype == torch.float32 and bool((norm.running_mean != 0).any())


@pytest.mark.parametrize(("strategy", "precision"), [("ddp", "fp32"), ("fsdp", "bf16")])
def test_all_ranks_have_the_same_statistics(strategy: str, precision: str, tmp_path: Path) -> None:
    launch(Path(resnet.__file__), 2, str(tmp_path), strategy, precision)
    one, two = (torch.load(tmp_path / f"{strategy}-{rank}.pt") for rank in range(2))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    resumed = resnet.trainer(
        tmp_path / strategy, limit=8
    )  # by one process, which knows the family from here on
    found = persistent_buffers(pretrain.load(tmp_path / strategy, quiet=True))
    assert all(torch.equal(value, one[f"model.{name}"]) for name, value in found.items())
    assert int(found["head.norm.num_batches_tracked"]) == 6
    assert resumed.fit().step == 8


def test_what_cannot_be_right_is_refused(tmp_path: Path) -> None:
    task = resnet.trainer(tmp_path / "run")
    task.parallel.reproducible = True
    with pytest.raises(ConfigError, match="statistic over the rows of one process"):
        task.fit()
    with pytest.raises(ConfigError, match=r"update .*running_mean twice"):
        tiny().backbone.set_activation_checkpointing("full")


def test_the_size_of_a_micro_batch_is_kept(tmp_path: Path) -> None:
    """Each micro-batch has statistics of its own."""
    resnet.trainer(tmp_path, limit=2).fit()
    with pytest.raises(TrainingError, match=r"train\.micro_rows 4 and this run has 8"):
        resnet.trainer(tmp_path, limit=4, micro_rows=8).fit()
    assert "micro_rows" not in resnet.trainer(tmp_path).less_memory()
    assert resnet.trainer(tmp_path, limit=4).fit().step == 4


def test_parameters_on_meta_keep_ties_and_leave_other_threads_alone() -> None:
    with parameters_on_meta():
        weight = torch.nn.Parameter(torch.ones(2, 2))
        one, two = torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)
        one.weight = two.extra = weight
    assert one.weight is two.extra and one.weight.is_meta and two.weight.is_meta
    assert two.running_var.tolist() == [1.0, 1.0]
    assert not torch.nn.Linear(2, 2).weight.is_meta
