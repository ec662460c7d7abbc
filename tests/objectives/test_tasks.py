"""Packing of examples: every token once and in order, and the same outputs as one example at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from pretrain.data.tables import read_table
from pretrain.data.task_rows import TaskRows
from pretrain.errors import DataError, ModelError
from pretrain.models import build
from pretrain.models.base import Model
from pretrain.objectives.classification import Classification
from pretrain.objectives.language_modelling import LanguageModelling
from pretrain.objectives.tasks import _PACKED_TOKENS, balanced, pack_examples, read_texts

LENGTHS = st.lists(st.integers(1, 700), min_size=1, max_size=24)


def example(length: int, number: int, segments: bool = True) -> dict[str, Any]:
    rng = np.random.default_rng([length, number])
    made = {"input_ids": rng.integers(5, 60, length), "labels": rng.integers(0, 9, length)}
    if segments:
        made["token_type_ids"] = (np.arange(length) > length // 2).astype(np.int64)
    return made


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.booleans())
def test_every_example_stands_once_and_in_order(lengths: list[int], pack: bool) -> None:
    examples = [example(length, i) for i, length in enumerate(lengths)]
    batch = pack_examples(examples, token_keys={"labels": -100}, pad_id=3, pack=pack)
    width = batch["input_ids"].shape[1]
    assert all(batch[k].shape == batch["input_ids"].shape for k in batch if "index" not in k)
    used = torch.zeros(batch["input_ids"].numel(), dtype=torch.bool)
    ids = batch["document_ids"].flatten()
    for i, one in enumerate(examples):
        first, last = int(batch["first_index"][i]), int(batch["last_index"][i])
        assert last - first + 1 == lengths[i] and first // width == last // width
        assert not used[first : last + 1].any()
        used[first : last + 1] = True
        for key in ("input_ids", "labels", "token_type_ids"):
            assert batch[key].flatten()[first : last + 1].tolist() == one[key].tolist()
        assert batch["position_ids"].flatten()[first : last + 1].tolist() == list(range(lengths[i]))
        row = batch["document_ids"][first // width]
        mine = ids[first]
        assert mine > 0 and int((row == mine).sum()) == lengths[i]
    assert torch.equal(used, ids != 0)
    assert (batch["input_ids"].flatten()[~used] == 3).all()
    assert (batch["labels"].flatten()[~used] == -100).all()
    if not pack:
        assert len(batch["input_ids"]) == len(lengths)


@settings(max_examples=100, deadline=None)
@given(LENGTHS)
def test_rows_are_about_equally_full(lengths: list[int]) -> None:
    rows = balanced(lengths, _PACKED_TOKENS)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in row) for row in rows]
    # The emptiest row is filled first, so no row exceeds another by more than one item.
    assert max(loads) - min(loads) <= max(lengths)
    assert len(rows) <= max(1, -(-sum(lengths) // _PACKED_TOKENS))


def model_of(family: str, **options: Any) -> Any:
    more = {} if family in ("llama", "qwen3", "modernbert") else {"dropout": 0.0}
    more |= {"num_kv_heads": 1} if family in ("llama", "qwen3") else {}
    return build(
        family, None, tokenizer=tiny.tokenizer(), head="sequence-classification", labels=["a", "b", "c"],
        **{"num_layers": 3, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "max_positions": 40}
        | {"initializer_range": 0.3} | more | options,
    ).eval()  # fmt: skip


@pytest.mark.parametrize(
    ("family", "pool"),
    [*((f, "") for f in ("gpt2", "llama", "qwen3", "bert", "roberta")), ("modernbert", "cls"), ("modernbert", "mean")],
)  # fmt: skip
@pytest.mark.parametrize("few", [False, True])
def test_packed_is_unpacked_is_alone(family: str, pool: str, few: bool) -> None:
    """Also in rows that are longer than the model has positions."""
    more: dict[str, Any] = {"classifier_pooling": pool} if pool else {}
    if family == "modernbert":
        more["local_attention"] = 8
    model = model_of(family, **more)
    count = 4 if few else 60
    rng = np.random.default_rng(1)
    examples = [
        example(int(n), i, family == "bert") for i, n in enumerate(rng.integers(2, 38, count))
    ]
    packed = pack_examples(examples, pad_id=model.backbone.config.pad_id or 0)
    unpacked = pack_examples(examples, pad_id=model.backbone.config.pad_id or 0, pack=False)
    assert packed["input_ids"].shape[1] > 40 and unpacked["input_ids"].shape[1] <= 40
    with torch.no_grad():
        together, apart = model(packed), model(unpacked)
        alone = torch.cat([model(pack_examples([one])) for one in examples])
        plain = torch.cat(
            [
                model({k: torch.from_numpy(v)[None] for k, v in one.items() if k != "labels"})
                for one in examples
            ]
        )
    assert together.shape == (count, 3)
    assert together.std(0).max() > 1e-3, "the texts must be told apart, or nothing is compared"
    for other in (apart, alone, plain):
        torch.testing.assert_close(together, other, rtol=0, atol=1e-5)


def test_a_task_says_what_its_model_lacks() -> None:
    with pytest.raises(ModelError, match="head"):
        Classification(tiny.objective("MaskedLM").model)
    model = model_of("bert")
    for length in (2, 41):
        with pytest.raises(DataError, match="max_length"):
            Classification(model, max_length=length)
    model.tokenizer = None
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Classification(model)


@pytest.mark.parametrize("earlier", [False, True])
def test_a_pad_that_ends_a_text_is_passed_over(earlier: bool) -> None:
    """As in transformers, in rows of any form; models that earlier versions trained read it, and go on with that."""
    sizes = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "max_positions": 32, "pad_id": 3}
    vocab, kind = len(tiny.tokenizer()), "sequence-classification"
    made = build("llama", head=kind, labels=("a", "b"), vocab_size=vocab, **sizes)
    config = made.hf_config()
    record: dict[str, Any] = {"name": "Classification", "task": "classification"}
    record |= {} if earlier else {"skips_padding": True}
    model = Model.from_hf_config({**config, "pretrain": {"objective": record}}).materialize().eval()
    model.tokenizer = tiny.tokenizer()
    task = Classification(model)
    texts = [[7, 8, 3, 3], [9, 3, 10], [3, 3]]
    batch = task.pack_batch([{"input_ids": np.array(ids)} for ids in texts], pooled=True)
    found = (batch["keep_index"] - batch["first_index"]).tolist()
    assert found == ([3, 2, 1] if earlier else [1, 2, 0])
    assert ("skips_padding" in task.describe()) is not earlier
    with torch.no_grad():
        packed = model(batch)
        for ids, scores in zip(texts, packed, strict=True):
            row = torch.tensor([ids])
            for masked in ({}, {"attention_mask": torch.ones_like(row)}):
                if masked or not earlier:
                    torch.testing.assert_close(model({"input_ids": row, **masked})[0], scores)
    other = Model.from_hf_config(config).materialize()
    other.tokenizer = tiny.tokenizer()
    again = Classification(other)
    again.continue_from(record)
    assert again.model.head.reads_padding is earlier


def test_special_tokens_that_are_typed_are_remarked_on() -> None:
    """A token of one or two characters, which pads in some directories, is none of them."""
    table = read_table([{"text": "a red cat"}, {"text": "a [SEP] dog!"}, {"text": "[MASK]"}])
    for kind, head in (
        (Classification, "sequence-classification"),
        (LanguageModelling, "causal-lm"),
    ):
        size = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "max_positions": 32}
        labels = None if head == "causal-lm" else ("a", "b")
        model = build("gpt2", head=head, labels=labels, tokenizer=tiny.tokenizer(), **size)
        rows = kind(model).encode(table, targets=False)
        assert [(places, "'[SEP]'" in text) for text, places in rows.remarks.items()] == [
            ([1, 2], True)
        ]
        assert all(("task chat" in text) == (head == "causal-lm") for text in rows.remarks)


def test_each_of_many_special_tokens_is_found() -> None:
    """Vocabularies have hundreds of reserved ones, in several spellings."""
    many = ["<s>", "</s>", "[INST]", "<|im_start|>"]
    many += [f"[unused{i}]" for i in range(90)] + [f"<unused{i}>" for i in range(300)]
    texts = [f"a {name} b" for name in many] + ["<unused>", "[unused90]", "<s", "a"]
    rows, table = TaskRows(), read_table([{"text": text} for text in texts])
    read_texts(table, ["text"], rows, SimpleNamespace(typed_names=many))  # type: ignore[arg-type]
    found = [i for places in rows.remarks.values() for i in places]
    assert found == [*range(len(many))]
