"""Log-likelihoods against transformers' logits, and pseudo-log-likelihoods against masking by hand."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tiny
from pretrain.data.tokenizer import Tokenizer, train_from_texts
from pretrain.errors import ConfigError, ModelError
from pretrain.inference.likelihood import rows_without_end, score_continuations
from pretrain.models import build
from pretrain.models.base import Model

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "initializer_range": 0.4,
}
TEXTS = ["the red cat sat on the mat", "a dog", "the old fox looked at the log and sat on the box"]


@cache
def tokenizer() -> Tokenizer:
    return train_from_texts(tiny.TEXTS, "bpe", vocab_size=320)


@cache
def causal() -> Model:
    return build("gpt2", None, tokenizer=tokenizer(), seed=4, max_positions=48, **SIZES)


@cache
def masked() -> Model:
    return build("bert", None, tokenizer=tiny.tokenizer(), seed=4, max_positions=48, **SIZES)


def theirs(folder: Path, kind: Any) -> tuple[Any, Any]:
    return kind.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)


def test_causal_model_equals_transformers(tmp_path):
    causal().save(tmp_path)
    model, their = theirs(tmp_path, transformers.AutoModelForCausalLM)
    found = causal().log_likelihood(TEXTS)
    by_token = causal().log_likelihood(TEXTS, per_token=True)
    assert found.dtype == torch.float64 and found.shape == (3,)
    for text, total, tokens in zip(TEXTS, found, by_token, strict=True):
        ids = torch.tensor([their.encode(text)])
        assert ids[0, 0] == their.bos_token_id
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].log_softmax(-1)
        wanted = scores.gather(1, ids[0, 1:, None]).squeeze(1)
        torch.testing.assert_close(total.float(), wanted.sum(), atol=1e-4, rtol=0)
        assert [value for _, value in tokens] == pytest.approx(wanted.tolist(), abs=1e-4)
        assert "".join(token for token, _ in tokens) == text
    one = causal().log_likelihood(TEXTS[0], batch_rows=1)  # a text scores the same alone
    assert one.shape == (1,) and float(one) == pytest.approx(float(found[0]), abs=1e-4)


def test_masked_model_masks_one_token_after_the_other(tmp_path):
    masked().save(tmp_path)
    model, their = theirs(tmp_path, transformers.AutoModelForMaskedLM)
    found = masked().log_likelihood(TEXTS, batch_rows=3)
    for text, total in zip(TEXTS, found, strict=True):
        ids = their.encode(text)
        wanted = 0.0
        for place in range(1, len(ids) - 1):
            copy = torch.tensor([ids])
            copy[0, place] = their.mask_token_id
            with torch.no_grad():
                wanted += float(model(copy).logits[0, place].log_softmax(-1)[ids[place]])
        assert float(total) == pytest.approx(wanted, abs=1e-4)


def test_the_first_token_follows_the_token_that_begins_a_text():
    """Without bos it is eos; with neither it is not scored."""
    plain = train_from_texts(tiny.TEXTS, "bpe", vocab_size=320)
    row = tokenizer().encode(TEXTS[0])
    for roles, first in ((("bos", "eos"), "bos"), (("eos",), "eos"), ((), None)):
        own = Tokenizer(plain.plain, config={})
        own.roles = {role: plain.roles[role] for role in roles}
        own.backend.post_processor = None
        model = causal()
        before, model.tokenizer = model.tokenizer, own
        try:
            found = model.log_likelihood(TEXTS[0])
        finally:
            model.tokenizer = before
        ids = row if first is None else [tokenizer().vocab[plain.roles[first]], *row]
        wanted = score_continuations(model, [ids], [len(ids) - 1], 1)[0].total
        assert float(found) == pytest.approx(wanted, abs=1e-5)


def test_the_last_token_is_not_read():
    """A row may have one token more than the model has positions; greedy says whether it is what the model says."""
    ids = [1, *tokenizer().encode(TEXTS[2])]
    ids = (ids * 8)[:48]
    best = causal().generate([ids[:47]], max_new_tokens=1, temperature=0)[0][-1]
    full = [*ids[:47], best]
    said, other = score_continuations(causal(), [[*full, 5], full], [1, 1], 2)
    assert other.greedy and len(said.log_probs) == 1


def test_frames_are_left_open():
    assert rows_without_end(tiny.tokenizer(), ["the cat", ""]) == [
        [tiny.tokenizer().bos_id, *tiny.tokenizer().encode("the cat")], []
    ]  # fmt: skip


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ModelError, match="Text 1 has no token to score"):
        causal().log_likelihood(["the cat", ""])
    with pytest.raises(ModelError, match="Text 0 has no token to score"):
        masked().log_likelihood("")
    with pytest.raises(ModelError, match="has 48 positions"):
        causal().log_likelihood(" ".join(TEXTS * 9))
    with pytest.raises(ConfigError, match="batch_rows is 0"):
        causal().log_likelihood("the cat", batch_rows=0)
    headless = build("bert", None, tokenizer=tiny.tokenizer(), head=None, max_positions=48, **SIZES)
    with pytest.raises(ModelError, match="gives texts no likelihood"):
        headless.log_likelihood("the cat")
