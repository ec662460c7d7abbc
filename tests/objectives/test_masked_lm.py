"""Masking against the published rule: rate, 80/10/10, special tokens, whole words, fixed evaluation masks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.scripts import SCRIPTS, TOKENIZERS, documents, tokenizer
from pretrain.data.loader import Loader
from pretrain.data.tokenizer import train_from_texts
from pretrain.errors import ConfigError, DataError, ModelError, TokenizerError, TrainingError
from pretrain.models import build
from pretrain.objectives import build_objective
from pretrain.objectives.masked_lm import MaskedLM
from pretrain.training.feed import Feed

MASK, VOCAB = 4, 60


class _Words:
    """A tokenizer of 60 tokens: 0 to 4 are special, odd ids from 31 up continue a word."""

    mask_id = MASK
    special_ids = frozenset(range(5))
    continues = np.array([i > 30 and i % 2 == 1 for i in range(VOCAB)])

    def word_starts(self, ids: Any) -> Any:
        return (ids < 0) | ~self.continues[ids]

    def __len__(self) -> int:
        return VOCAB


def _model(tokenizer: Any = None, head: str = "masked-lm") -> Any:
    return SimpleNamespace(
        head_kind=head,
        tokenizer=tokenizer if tokenizer is not None else _Words(),
        backbone=SimpleNamespace(model_type="bert", vocab_size=VOCAB, id_limits=dict),
    )


def _row(rng: np.random.Generator, length: int, padding: int = 0) -> dict[str, np.ndarray]:
    ids = rng.integers(5, VOCAB, length)
    ids[0], ids[-1 - padding] = 2, 3
    documents = np.ones(length, dtype=np.int64)
    if padding:
        ids[-padding:], documents[-padding:] = 0, 0
    return {"input_ids": ids, "document_ids": documents, "position_ids": np.arange(length)}


def _rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


@given(
    length=st.integers(8, 200),
    padding=st.integers(0, 5),
    rate=st.sampled_from([0.15, 0.3, 0.5]),
    seed=st.integers(0, 500),
    whole=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_rules_of_masking(length: int, padding: int, rate: float, seed: int, whole: bool) -> None:
    objective = MaskedLM(_model(), rate=rate, whole_word=whole)
    row = _row(_rng(seed), length, padding)
    before = row["input_ids"].copy()
    batch = objective.collate([row], [_rng(seed + 1)])
    labels, ids = batch["labels"][0].numpy(), batch["input_ids"][0].numpy()
    targets = labels != -100
    assert np.array_equal(row["input_ids"], before), "the example itself was changed"
    assert np.array_equal(labels[targets], before[targets]), "labels are the original ids"
    assert np.array_equal(ids[~targets], before[~targets]), "other tokens are untouched"
    assert not targets[before < 5].any(), "a special token or padding became a target"
    assert not np.isin(ids[targets & (ids != MASK)], range(5)).any(), "a random id is special"
    candidates = int((before >= 5).sum())
    wanted = max(1.0, rate * candidates)
    assert targets.any()
    if whole:
        assert targets.sum() <= max(1, candidates / 2, 2 * wanted * (rate >= 0.5))
        words = np.cumsum(~_Words.continues[before] | (before < 5) | (np.roll(before, 1) < 5))
        for word in np.unique(words[before >= 5]):
            hidden = targets[words == word]
            longest = min(wanted, max(candidates / 2 - wanted, wanted / 4))
            assert len(hidden) > longest or hidden.all() or not hidden.any(), "a word was cut"
    elif candidates >= 17:
        assert int(targets.sum()) == round(wanted)
    else:
        assert abs(int(targets.sum()) - wanted) < 1
    assert np.array_equal(batch["target_index"].numpy(), np.flatnonzero(targets))


def test_eighty_ten_ten() -> None:
    objective = MaskedLM(_model(), rate=0.3)
    rows = [_row(_rng(i), 512) for i in range(40)]
    batch = objective.collate(rows, [_rng(1000 + i) for i in range(40)])
    labels, ids = batch["labels"].numpy(), batch["input_ids"].numpy()
    target = labels != -100
    share = {
        "mask": np.mean(ids[target] == MASK),
        "same": np.mean(ids[target] == labels[target]),
    }
    assert share["mask"] == pytest.approx(0.8, abs=0.02)
    # A random id equals the truth once in 55 draws, on top of the tenth that is kept.
    assert share["same"] == pytest.approx(0.1 + 0.1 / 55, abs=0.02)


@pytest.mark.parametrize("whole", [False, True])
def test_mask_depends_on_the_row_alone(whole: bool) -> None:
    """Same generator, same mask: whatever the neighbours, the batch and the global random state."""
    objective = MaskedLM(_model(), whole_word=whole)
    rows = [_row(_rng(i), 64) for i in range(6)]
    together = objective.collate(rows, [_rng(i) for i in range(6)])
    np.random.seed(0)
    for i, row in enumerate(rows):
        alone = objective.collate([row], [_rng(i)])
        assert np.array_equal(alone["input_ids"][0], together["input_ids"][i])
        assert np.array_equal(alone["labels"][0], together["labels"][i])


def test_evaluation_uses_its_own_rate() -> None:
    objective = MaskedLM(_model(), rate=0.5)
    row = _row(_rng(0), 402)
    training = objective.collate([row], [_rng(1)])
    held_out = objective.collate([row], [_rng(1)], evaluation=True)
    assert int(objective.count(training)) == 200 and int(objective.count(held_out)) == 60


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("length", [9, 12, 40])
def test_the_mean_is_the_rate_in_short_rows_too(length: int, whole: bool) -> None:
    objective = MaskedLM(_model(), rate=0.15, whole_word=whole)
    rows = [_row(_rng(i), length + 2) for i in range(600)]
    labels = objective.collate(rows, [_rng(i) for i in range(600)])["labels"]
    assert float((labels != -100).sum()) / (600 * length) == pytest.approx(0.15, abs=0.012)


def test_the_share_is_said_and_a_wrong_one_stops() -> None:
    rows = [_row(_rng(i), 100) for i in range(5)]
    (line,) = MaskedLM(_model(), whole_word=True).survey(rows)
    assert re.fullmatch(
        r"masks whole words: hides (29|30|31)\.\d% of the tokens \(rate 0.3\), in evaluations "
        r"1[456]\.\d% of the tokens \(eval_rate 0.15\)",
        line,
    )
    with pytest.raises(TrainingError, match=r"hides 33.3% .* rate asks for 15.0%: the rows have 3"):
        MaskedLM(_model(), rate=0.15).survey([_row(_rng(0), 5)])

    class _Everything(MaskedLM):
        def _choose(self, candidates: Any, *others: Any) -> Any:
            return candidates

    with pytest.raises(TrainingError, match=r"hides 100.0%.*correct the subclass"):
        _Everything(_model()).survey(rows)


def test_row_of_special_tokens_has_no_target() -> None:
    row = {"input_ids": np.array([2, 3, 0, 0]), "document_ids": np.array([1, 1, 0, 0])}
    batch = MaskedLM(_model()).collate([row], [_rng(0)])
    assert int(MaskedLM(_model()).count(batch)) == 0


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match="rate is 1[.]5"):
        MaskedLM(_model(), rate=1.5)
    with pytest.raises(ConfigError, match="sum to"):
        MaskedLM(_model(), mask_share=0.8, random_share=0.3)
    with pytest.raises(ModelError, match="NextToken"):
        MaskedLM(_model(head="causal-lm"))
    without = _Words()
    without.mask_id = None  # type: ignore[assignment]
    with pytest.raises(TokenizerError, match="mask token"):
        MaskedLM(_model(tokenizer=without))
    with pytest.raises(ConfigError, match="whole_word"):
        build_objective("MaskedLM", {"whole_words": True}, _model())
    with pytest.raises(
        ConfigError, match=r"objective.init_args.rate must be a number, found '0.3'"
    ):
        build_objective("MaskedLM", {"rate": "0.3"}, _model())
    with pytest.raises(ConfigError, match=r"whole_word must be .*, found 'no'"):
        build_objective("MaskedLM", {"whole_word": "no"}, _model())
    with pytest.raises(ConfigError, match="MaskedLM"):
        build_objective("MaskLM", {}, _model())


@given(
    script=st.sampled_from(sorted(SCRIPTS)),
    kind=st.sampled_from(TOKENIZERS),
    rate=st.sampled_from([0.1, 0.15, 0.2, 0.3, 0.4]),
    length=st.sampled_from([64, 128, 200]),
)
@example(script="han", kind="bpe", rate=0.15, length=128)
@example(script="thai", kind="bpe", rate=0.15, length=128)
@example(script="korean", kind="byte_fallback", rate=0.15, length=128)
@example(script="unwritten", kind="char", rate=0.4, length=64)
@settings(max_examples=25, deadline=None)
def test_whole_words_hide_the_share_asked_for_in_every_script(
    script: str, kind: str, rate: float, length: int
) -> None:
    made = tokenizer(kind, script)
    ids = np.concatenate([made.encode(text, special=False) for text in documents(script, 12)])
    rows = [ids[k : k + length] for k in range(0, len(ids) - length + 1, length)]
    rows = [{"input_ids": row} for row in (rows * 60)[:60]]
    objective = MaskedLM(_model(made), rate=rate, whole_word=True)
    labels = objective.collate(rows, [_rng(k) for k in range(len(rows))])["labels"].numpy()
    maskable = ~np.isin([row["input_ids"] for row in rows], list(made.special_ids))
    shares = (labels != -100).sum(1) / maskable.sum(1)
    assert (labels != -100).sum() / maskable.sum() == pytest.approx(rate, abs=0.03)
    assert shares.min() > 0 and shares.max() <= 0.5


def test_the_preview_shows_hidden_words_whole_with_what_the_brackets_mean() -> None:
    text = "the captain sailed the ship over the sea and the wind was strong"
    made = train_from_texts([text], "bpe", vocab_size=270)  # most words are several tokens
    model = build("bert", "tiny", tokenizer=made, head="masked-lm", seed=0)
    objective: Any = MaskedLM(model, eval_rate=0.3)
    row = {"input_ids": np.array(made.encode(text))}
    (shown,) = objective.preview([row], "", 0)
    passage, legend = shown.split("\n")
    assert legend == "([its word | the hidden word], or one word where the model is right)"
    hidden = re.findall(r"\[(?:[^|\]]* \| )?([^]]*)\]", passage)
    assert 1 <= len(hidden) <= 6 and set(hidden) <= set(text.split())
    plain = re.sub(r"\[(?:[^|\]]* \| )?([^]]*)\]", r"\1", passage)
    assert plain in text


def test_the_rate_falls_with_the_place_in_the_run_and_on_nothing_else() -> None:
    """Steps fetched in any order, by one rank or by two, have the same masks; the last ones are near the final rate."""
    objective = MaskedLM(_model(), rate=0.4, final_rate=0.1)
    rows = [_row(_rng(seed), 102) for seed in range(10)]

    def steps(share: tuple[int, int], order: Sequence[int]) -> dict[int, torch.Tensor]:
        feed = Feed(objective, Loader(rows, seed=1), batch_rows=4, micro_rows=2, share=share)
        feed.total_rows = 40
        return {k: torch.cat([b["labels"] for b in feed.step_at(4 * k)]) for k in order}

    whole, back = steps((0, 1), range(10)), steps((0, 1), [9, 3])
    assert all(torch.equal(back[k], whole[k]) for k in back)
    parts = [steps((rank, 2), range(10)) for rank in (0, 1)]
    assert all(torch.equal(torch.cat([p[k] for p in parts]), whole[k]) for k in range(10))
    # 100 of the 102 tokens of a row may be masked.
    hidden = [int((labels != -100).sum()) for labels in whole.values()]
    assert hidden == [4 * round(100 * (0.4 - 0.03 * k)) for k in range(10)]
    evaluated = objective.collate(rows[:1], [_rng(0)], evaluation=True)
    assert int((evaluated["labels"] != -100).sum()) == 15  # whatever the progress


def test_final_rate_is_checked_and_described() -> None:
    with pytest.raises(ConfigError, match="can only fall"):
        MaskedLM(_model(), rate=0.2, final_rate=0.3)
    with pytest.raises(ConfigError, match="final_rate is 0"):
        MaskedLM(_model(), final_rate=0.0)
    objective = MaskedLM(_model(), final_rate=0.15)
    assert objective.describe()["final_rate"] == 0.15
    assert "final_rate" not in MaskedLM(_model()).describe()
    rows = [_row(_rng(seed), 102) for seed in range(10)]
    with pytest.raises(ConfigError, match=r"train\.limit in steps, tokens or epochs"):
        objective.survey(rows)
    objective.progress = 0.0
    assert "falling to 0.15 over the run" in objective.survey(rows)[0]


def test_labels_of_the_rows_are_refused() -> None:
    goal = MaskedLM(_model())
    row = {"input_ids": np.arange(5, 13), "labels": np.full(8, -100)}
    with pytest.raises(DataError, match="makes the labels itself"):
        goal.collate([row], [np.random.default_rng(0)])
