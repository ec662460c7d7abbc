"""Where a run starts: what a head keeps of a file, what is new, and the other arm without any of it."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from finetuning.conftest import ANIMALS, model_of
from pretrain.checkpoint import load
from pretrain.data.tokenizer_build import KNOWN
from pretrain.errors import ConfigError, PretrainError
from pretrain.finetuning.start import automatic_lr, freeze, starting_model
from pretrain.objectives import task_class
from pretrain.objectives.embedding import Embedding
from pretrain.objectives.token_classification import TokenClassification

TASK = task_class("classification")


def weights(model: Any, part: str = "") -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith(part)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_the_body_is_kept_and_the_head_is_drawn_from_the_seed(checkpoint: str) -> None:
    first, again, other = (
        starting_model(checkpoint, TASK, ANIMALS, seed=s, quiet=True) for s in (0, 0, 1)
    )
    assert same(weights(first), weights(again))
    assert same(weights(first, "backbone."), weights(other, "backbone."))
    assert not same(weights(first, "head."), weights(other, "head."))
    assert first.labels == ANIMALS and "head.classifier.weight" in first.fresh


def test_scratch_has_the_same_shape_and_nothing_of_the_file(checkpoint: str) -> None:
    kept = starting_model(checkpoint, TASK, ANIMALS, quiet=True)
    new = starting_model(checkpoint, TASK, ANIMALS, seed=5, scratch=True, quiet=True)
    before, after = weights(kept), weights(new)
    assert {n: v.shape for n, v in before.items()} == {n: v.shape for n, v in after.items()}
    for name, value in after.items():
        if value.ndim > 1:
            assert not torch.equal(value, before[name]), name
    assert new.fresh == frozenset(after) and new.tokenizer is not None


@pytest.mark.parametrize(
    ("labels", "kept"),
    [(ANIMALS, True), (("cat", "dog"), False), (("cat", "dog", "owl"), False), (("fox", "dog", "cat"), False)],
)  # fmt: skip
def test_a_classifier_is_kept_where_its_labels_are_the_same(
    labels: tuple[str, ...], kept: bool, tmp_path: Path, capfd: Any
) -> None:
    model = model_of(head="sequence-classification", labels=ANIMALS, seed=5)
    path = model.save(tmp_path / "a")
    for source in (str(path), model):
        found = starting_model(source, TASK, labels)
        said = "".join(capfd.readouterr())
        assert found.labels == labels and found.head.classifier.out_features == len(labels)
        equal = (
            found.head.classifier.weight.shape == model.head.classifier.weight.shape
            and torch.equal(found.head.classifier.weight, model.head.classifier.weight)
        )
        assert equal == kept
        assert torch.equal(found.head.transform.dense.weight, model.head.transform.dense.weight)
        assert ("newly initialised: none" in said) == kept
        assert kept or "newly initialised: head.classifier.bias, head.classifier.weight" in said


def test_made_up_names_are_renamed(tmp_path: Path) -> None:
    model = model_of(head="sequence-classification", labels=["LABEL_0", "LABEL_1", "LABEL_2"])
    found = starting_model(str(model.save(tmp_path / "a")), TASK, ANIMALS, quiet=True)
    assert found.labels == ANIMALS
    assert torch.equal(found.head.classifier.weight, model.head.classifier.weight)


@pytest.mark.parametrize(
    ("head", "scratch", "reads"),
    [("causal-lm", False, False), (None, False, False), ("sequence-classification", False, True),
     ("sequence-classification", True, False)],
)  # fmt: skip
def test_a_new_head_passes_over_padding_whatever_the_last_task_did(
    head: str | None, scratch: bool, reads: bool, tmp_path: Path
) -> None:
    """As in transformers, also with two classes, which need no other last layer; kept weights go on as they began."""
    labels = ("LABEL_0", "LABEL_1") if head == "sequence-classification" else None
    model = model_of("gpt2", head=head, labels=labels)
    model.extra_config["pretrain"] = {"objective": {"name": "Chat", "task": "chat"}}
    path = str(model.save(tmp_path / "a"))
    found = starting_model(path, TASK, ("a", "b"), scratch=scratch, quiet=True)
    assert found.head.reads_padding is reads
    opened = load(path, head="sequence-classification", quiet=True)
    assert opened.head.reads_padding is (labels is not None)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_a_decoder_gets_an_id_for_padding(family: str, tmp_path: Path) -> None:
    more = {} if family == "gpt2" else {"num_kv_heads": 1}
    path = model_of(family, **more).save(tmp_path / "a")
    found = starting_model(str(path), TASK, ANIMALS, quiet=True)
    assert (
        found.backbone.config.pad_id is not None
        and found.head.pad_id == found.backbone.config.pad_id
    )
    assert found.tokenizer.pad_id == found.backbone.config.pad_id


@pytest.mark.parametrize("stated", [None, int(1e30), 16])
def test_a_length_is_stated_for_other_libraries(stated: int | None) -> None:
    """Pipelines of transformers do not cut long texts without it, and fail on them."""
    model = model_of()
    model.tokenizer = copy.deepcopy(model.tokenizer)
    if stated is not None:
        model.tokenizer.config["model_max_length"] = stated
    found = starting_model(model, TASK, ANIMALS, quiet=True)
    length = 16 if stated == 16 else found.backbone.max_length
    assert found.tokenizer.config["model_max_length"] == length
    assert model.tokenizer.config.get("model_max_length") == stated  # the source is left as it is


def test_padding_is_a_token_that_the_tokenizer_states() -> None:
    """An ordinary token that is spelt like one would be encoded otherwise if it were saved as special."""
    model = model_of("gpt2", pad_id=None)
    model.tokenizer = copy.copy(model.tokenizer)
    model.tokenizer.roles = dict(model.tokenizer.roles)
    model.tokenizer._guessed = {"pad": model.tokenizer.roles["pad"]}
    found = starting_model(model, TASK, ANIMALS, quiet=True)
    assert found.backbone.config.pad_id == found.tokenizer.pad_id == found.tokenizer.eos_id
    assert found.tokenizer.stated_roles["pad"] == found.tokenizer.roles["eos"]


@pytest.mark.parametrize("pad_id", [None, 2])
@pytest.mark.parametrize("task", [Embedding, TokenClassification, TASK])
def test_texts_are_padded_by_what_opens_the_saved_model(
    task: Any, pad_id: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where neither its tokenizer nor its configuration says by what; runs and prepared data go on."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setitem(KNOWN, "pad", [])  # as if no token were spelt so
    model = model_of("gpt2", pad_id=pad_id)
    tokenizer = copy.copy(model.tokenizer)
    tokenizer.roles = {r: name for r, name in tokenizer.roles.items() if r != "pad"}
    tokenizer.config = {k: v for k, v in tokenizer.config.items() if "pad" not in k}
    model.tokenizer, before = tokenizer, tokenizer.fingerprint
    labels = None if task is Embedding else ANIMALS
    found = starting_model(model, task, labels, quiet=True)
    if task is TokenClassification:
        found = task(found).model
    found.save(tmp_path / "a")
    pad = transformers.AutoTokenizer.from_pretrained(tmp_path / "a").pad_token_id
    assert pad == (tokenizer.eos_id if pad_id is None else pad_id)
    again = load(tmp_path / "a", quiet=True).tokenizer
    assert again.fingerprint == found.tokenizer.fingerprint
    assert again.named_tokens == found.tokenizer.named_tokens
    if task is Embedding:
        assert found.tokenizer.fingerprint == before and tokenizer.padding is None
        again.save(tmp_path / "b")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_is_frozen_is_counted(checkpoint: str) -> None:
    for what, part in (("backbone", "backbone."), ("", "nothing")):
        model = starting_model(checkpoint, TASK, ANIMALS, quiet=True)
        assert freeze(model, what) == sum(v.numel() for v in weights(model, part).values())
    counts = []
    for what in ("embeddings", 1, "2"):
        model = starting_model(checkpoint, TASK, ANIMALS, quiet=True)
        counts.append(freeze(model, what))
    assert 0 < counts[0] < counts[1] < counts[2]
    for wrong in (3, "all", -1, 1.5, True):
        with pytest.raises(ConfigError, match="freeze"):
            freeze(starting_model(checkpoint, TASK, ANIMALS, quiet=True), wrong)


def test_the_automatic_rate_falls_with_width_and_depth() -> None:
    def lr(size: int, layers: int, **options: Any) -> float:
        config = SimpleNamespace(hidden_size=size)
        backbone: Any = SimpleNamespace(config=config, blocks=lambda: [None] * layers)
        return automatic_lr(SimpleNamespace(backbone=backbone), **options)  # type: ignore[arg-type]

    sizes = [(64, 1), (128, 2), (256, 4), (384, 6), (768, 12), (1024, 24)]
    rates = [lr(*size) for size in sizes]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == len(rates)
    # What the papers of BERT and ELECTRA use.
    assert (
        2e-5 <= lr(768, 12) <= 5e-5 and 1e-5 <= lr(1024, 24) <= 5e-5 and 1e-4 < lr(256, 12) < 4e-4
    )
    assert lr(128, 2) == 1.3e-3 and lr(128, 6) == 7.5e-4
    assert lr(16, 1) == lr(32, 1) and lr(4096, 32) == lr(8192, 80), "a rate without a bound"
    assert lr(768, 12, adapter=True) == pytest.approx(10 * lr(768, 12), rel=0.05)
    assert lr(64, 4, adapter=True) == lr(128, 2, adapter=True) == 4e-3
    model = model_of(hidden_size=256, num_layers=2)
    assert automatic_lr(model) == lr(256, 2)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="int"):
        starting_model(5, TASK, ANIMALS)
    with pytest.raises(PretrainError, match="nowhere"):
        starting_model(tmp_path / "nowhere", TASK, ANIMALS)
    model = model_of("gpt2", pad_id=None)
    model.tokenizer = None
    with pytest.raises(PretrainError, match="tokenizer"):
        starting_model(model, TASK, ANIMALS)
    assert tiny.tokenizer().pad_id is not None, "the shared tokenizer was changed"
