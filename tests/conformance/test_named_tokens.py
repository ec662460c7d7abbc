"""Named tokens of directories in forms that transformers refuses, or that older runs were begun from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from conformance.directories import (
    BERT_NAMES,
    FAST,
    _token,
    bert_json,
    bpe_json,
    corpus,
    vocab_txt,
    wordpiece,
    write,
)
from pretrain.data.tokenizer import Tokenizer, train_from_texts

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


def test_a_tokenizer_of_this_package_has_no_names_of_the_class_of_its_model(tmp_path: Path) -> None:
    made = train_from_texts(corpus(), "bpe", vocab_size=300)
    made.save(tmp_path)
    write(tmp_path, config__json={"model_type": "qwen2"})
    found = Tokenizer.open(tmp_path)
    assert found.fingerprint == made.fingerprint and not found.class_tokens


def test_a_special_token_of_another_spelling_keeps_its_role_beside_a_null(tmp_path: Path) -> None:
    """Runs were begun with it, and nothing else would end their texts."""
    made = train_from_texts(corpus(), "bpe", vocab_size=300)
    made.save(tmp_path)
    names = {"tokenizer_class": "GPT2Tokenizer", "bos_token": None, "eos_token": None}
    write(tmp_path, tokenizer_config__json=names)
    found = Tokenizer.open(tmp_path)
    assert {role: found.roles[role] for role in ("bos", "eos")} == {"bos": "<bos>", "eos": "<eos>"}


@pytest.mark.parametrize("file", ["tokenizer_config", "special_tokens_map"])
@pytest.mark.parametrize("placed", [True, False], ids=["with ids", "without"])
def test_listed_objects_without_a_type_are_special_and_saved_as_names(
    tmp_path: Path, file: str, placed: bool
) -> None:
    """Older releases wrote them; transformers 5 fails on them, but not on what is saved here."""
    marks: dict[str, Any] = {"additional_special_tokens": [_token("<|x|>"), _token("<|y|>")]}
    files = {"tokenizer_config__json": {**FAST, **BERT_NAMES}}
    files[f"{file}__json"] = files.get(f"{file}__json", {}) | marks
    if placed:
        files["added_tokens__json"] = {"<|x|>": len(wordpiece()), "<|y|>": len(wordpiece()) + 1}
    bert_json(tmp_path, **files)
    with pytest.raises(TypeError):
        transformers.AutoTokenizer.from_pretrained(tmp_path)
    found = Tokenizer.open(tmp_path)
    assert found.special_names[-2:] == ("<|x|>", "<|y|>")
    assert found.decode(found.encode("the <|x|> cat")) == "the cat"
    found.save(tmp_path / "again")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert theirs.all_special_tokens[-2:] == ["<|x|>", "<|y|>"] and len(theirs) == len(found)


def test_listed_objects_that_are_ordinary_are_saved_so_that_transformers_opens_them(
    tmp_path: Path,
) -> None:
    listed = [{"__type": "AddedToken", **_token("<|x|>")}]
    bert_json(tmp_path, {**FAST, **BERT_NAMES, "additional_special_tokens": listed})
    Tokenizer.open(tmp_path).save(tmp_path / "again")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert "<|x|>" not in theirs.all_special_tokens and len(theirs) == len(wordpiece()) + 1
