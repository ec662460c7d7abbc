"""Named tokens of directories in forms that transformers refuses, or that older runs were begun from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conformance.directories import BERT_NAMES, bpe_json, vocab_txt
from pretrain.data.tokenizer import Tokenizer

NEOX: dict[str, Any] = {"tokenizer_class": "GPTNeoXTokenizer", "pad_token": None}


def test_a_null_name_keeps_its_role_where_the_token_is_special(tmp_path: Path) -> None:
    """Pythia in its published form: runs were begun with the role, which the fingerprint holds."""
    bpe_json(tmp_path, ("<|endoftext|>", "<|padding|>"), NEOX)
    found = Tokenizer.open(tmp_path)
    assert found.roles["pad"] == "<|padding|>" and "pad_token" not in found.class_tokens
    found.save(tmp_path / "again")
    assert Tokenizer.open(tmp_path / "again").fingerprint == found.fingerprint


def test_no_ordinary_word_takes_the_role_of_a_name_that_is_null(tmp_path: Path) -> None:
    vocab_txt(tmp_path, {"mask_token": None, "pad_token": None})
    found = Tokenizer.open(tmp_path)
    assert {"<mask>", "<pad>"} <= found.vocab.keys()
    assert not found.roles.keys() & {"mask", "pad"}
    assert not {"<mask>", "<pad>"} & set(found.special_names)


def test_wordpiece_has_its_unknown_token_where_all_names_are_null(tmp_path: Path) -> None:
    """Transformers fails on this directory."""
    vocab_txt(tmp_path, dict.fromkeys(BERT_NAMES))
    found = Tokenizer.open(tmp_path)
    assert found.encode("the[UNK]cat") == [found.vocab[name] for name in ("the", "[UNK]", "cat")]
