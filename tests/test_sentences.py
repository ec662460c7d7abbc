"""Directories of sentence-transformers: the files beside the model decide what ``embed`` returns, and are written."""

from __future__ import annotations

import copy
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import normalizers
from torch.nn import functional as F

import tiny
from pretrain.checkpoint import load
from pretrain.checkpoint.manifest import verify
from pretrain.data.tables import read_table
from pretrain.errors import CheckpointCorrupt, CheckpointError, ConfigError, ModelError
from pretrain.models import build
from pretrain.models.base import Model
from pretrain.models.sentences import POOLINGS, SentenceSettings
from pretrain.objectives.embedding import Embedding
from pretrain.utils import files as files_module

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TEXTS = ["the red cat sat on the mat", "a dog", "the old fox looked at the log and sat on the box"]
MODULE = "sentence_transformers.models."


@cache
def made(family: str) -> Model:
    sizes: dict[str, Any] = {"num_layers": 2, "hidden_size": 16, "num_heads": 2}
    return build(
        family, None, tokenizer=tiny.tokenizer(), head=None, seed=4, max_positions=48, initializer_range=0.4,
        **sizes,
    )  # fmt: skip


def directory(folder: Path, family: str = "bert", **files: Any) -> Path:
    """A model as transformers has it, with the files of sentence-transformers beside it and no manifest."""
    made(family).save(folder)
    (folder / "manifest.json").unlink()
    modules = ["Transformer", "Pooling", *files.pop("more", [])]
    paths = ["", "1_Pooling", "2_Normalize", "3_More"]
    listed = [
        {"idx": i, "name": str(i), "path": paths[i], "type": MODULE + kind}
        for i, kind in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(files.pop("pooling", {})))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def reference(folder: Path, texts: list[str], mode: str, *, limit: int = 48, skip: int = 0) -> Any:
    """Pooling by hand over what transformers computes for each text alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    rows = []
    for text in texts:
        batch = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state[0].numpy()
        kept = hidden[skip:]
        places = np.arange(skip + 1, len(hidden) + 1)[:, None]
        rows.append(
            {
                "cls": lambda kept=kept: kept[0],
                "max": lambda kept=kept: kept.max(0),
                "mean": lambda kept=kept: kept.mean(0),
                "mean_sqrt_len_tokens": lambda kept=kept: kept.sum(0) / len(kept) ** 0.5,
                "weightedmean": lambda kept=kept, places=places: (
                    (kept * places).sum(0) / places.sum()
                ),
                "lasttoken": lambda kept=kept: kept[-1],
            }[mode]()
        )
    return torch.from_numpy(np.stack(rows)).float()


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", POOLINGS)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_pooling_and_normalisation_come_from_the_directory(
    mode: str, family: str, tmp_path: Path
) -> None:
    old = {key: name == mode for name, key in POOLINGS.items()}
    folder = directory(tmp_path / "old", family, pooling=old, more=["Normalize"])
    model, wanted = load(folder, quiet=True), reference(folder, TEXTS, mode)
    close(model.embed(TEXTS), F.normalize(wanted, dim=-1))
    close(torch.cat([model.embed(text) for text in TEXTS]), model.embed(TEXTS, batch_size=2))
    close(model.embed(TEXTS, normalize=False), wanted)
    close(model.embed(TEXTS, pooling="mean", normalize=False), reference(folder, TEXTS, "mean"))
    new = directory(tmp_path / "new", family, pooling={"pooling_mode": mode})
    close(load(new, quiet=True).embed(TEXTS), wanted)
    # What was opened is written again, verified, and opens to the same vectors.
    model.save(tmp_path / "saved")
    verify(tmp_path / "saved")
    again = load(tmp_path / "saved", quiet=True)
    assert again.sentences == model.sentences or again.sentences.pooling == (mode,)
    close(again.embed(TEXTS), model.embed(TEXTS))


def test_a_model_is_saved_over_itself_and_over_nothing_of_others(tmp_path: Path) -> None:
    model = copy.deepcopy(made("bert"))
    model.sentences = SentenceSettings(pooling=("mean",), normalize=True)
    saved = model.save(tmp_path / "saved")
    assert (saved / "1_Pooling" / "config.json").exists() and (saved / "modules.json").exists()
    model.save(saved)
    (saved / "1_Pooling" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="1_Pooling/notes.txt"):
        model.save(saved)


def test_several_poolings_are_joined_and_none_is_the_mean(tmp_path: Path) -> None:
    both = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    folder = directory(tmp_path / "both", pooling=both)
    parts = [reference(folder, TEXTS, mode) for mode in ("cls", "mean")]
    close(load(folder, quiet=True).embed(TEXTS), torch.cat(parts, dim=-1))
    folder = directory(tmp_path / "list", pooling={"pooling_mode": ["mean", "cls"]})
    close(load(folder, quiet=True).embed(TEXTS), torch.cat(parts[::-1], dim=-1))
    # The older flags cannot say this order, which is kept all the same.
    load(folder, quiet=True).save(tmp_path / "saved")
    close(load(tmp_path / "saved", quiet=True).embed(TEXTS), torch.cat(parts[::-1], dim=-1))
    close(load(directory(tmp_path / "none"), quiet=True).embed(TEXTS), parts[1])
    plain = made("bert").embed(TEXTS)
    close(plain, parts[1])


def test_length_case_and_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = {"prompts": {"query": "the big dog: ", "empty": ""}, "default_prompt_name": "query"}
    folder = directory(
        tmp_path / "m",
        pooling={"pooling_mode_mean_tokens": True, "include_prompt": False},
        sentence_bert_config={"max_seq_length": 9, "do_lower_case": True},
        config_sentence_transformers=prompts,
    )
    model = load(folder, quiet=True)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)("the big dog: ")["input_ids"]
    lowered = [("the big dog: " + text).lower() for text in ("A CAT", "a dog on the mat")]
    wanted = reference(folder, lowered, "mean", limit=9, skip=len(tokens) - 1)
    close(model.embed(["A CAT", "a dog on the mat"]), wanted)
    assert "more than 9 tokens" in capsys.readouterr().err
    close(model.embed("A CAT", prompt_name="empty"), reference(folder, ["a cat"], "mean"))
    close(model.embed("A CAT", prompt=""), reference(folder, ["a cat"], "mean"))
    # sentence-transformers gives every model a query and a document, empty where the directory has none.
    close(model.embed("A CAT", prompt_name="document"), reference(folder, ["a cat"], "mean"))
    with pytest.raises(ConfigError, match=r"no prompt 'querry'.*query, document, empty"):
        model.embed("a", prompt_name="querry")
    model.save(tmp_path / "saved")
    again = load(tmp_path / "saved", quiet=True)
    assert again.sentences.config["prompts"] == prompts["prompts"]
    # The Lowercase of tokenizers, which sentence-transformers uses, knows no sigma at the end of a word.
    for text in ("A CAT", "ΟΔΟΣ Σ", "İÀẞ ǅ"):
        assert again.sentences.cased(text) == normalizers.Lowercase().normalize_str(text)
    close(again.embed("A CAT"), model.embed("A CAT"))


@pytest.mark.parametrize("more", [[], ["Normalize"]])
def test_vectors_are_cut_after_the_normalisation_of_the_directory(
    more: list[str], tmp_path: Path
) -> None:
    folder = directory(
        tmp_path / "m",
        pooling={"pooling_mode": ["max", "mean"]},
        more=more,
        config_sentence_transformers={"truncate_dim": 6},
    )
    model = load(folder, quiet=True)
    whole = torch.cat([reference(folder, TEXTS, mode) for mode in ("max", "mean")], dim=-1)
    wanted = (F.normalize(whole, dim=-1) if more else whole)[:, :6]
    close(model.embed(TEXTS), wanted)
    close(model.embed(TEXTS, normalize=False), whole[:, :6])
    close(model.embed(TEXTS, normalize=True), F.normalize(wanted, dim=-1))
    model.save(tmp_path / "saved")
    close(load(tmp_path / "saved", quiet=True).embed(TEXTS), wanted)
    table = read_table([{"anchor": text, "positive": text} for text in TEXTS])
    answers = [answer["embedding"] for answer in Embedding(model).predict(table)]
    close(torch.tensor(answers), wanted)


def test_the_older_layout_is_refused_by_name(tmp_path: Path) -> None:
    folder = directory(tmp_path / "m")
    (folder / "0_Transformer").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(folder / "0_Transformer" / name)
    with pytest.raises(CheckpointError, match=r"older layout.*save_pretrained"):
        load(folder)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"more": ["Dense"]}, "Dense"),
        ({"more": ["Normalize", "Dense"]}, "Dense"),
        ({"more": ["LayerNorm", "Normalize"]}, "LayerNorm"),
        ({"pooling": {"pooling_mode": "attention"}}, "attention"),
        ({"config_sentence_transformers": {"truncate_dim": "8"}}, "truncate_dim '8'"),
        ({"modules": [{"type": MODULE + "Transformer", "path": ""}]}, "Transformer"),
        ({"modules": []}, "modules none"),
        (
            {
                "modules": [
                    {"type": "custom_st.Transformer", "path": ""},
                    {"type": MODULE + "Pooling", "path": "1_Pooling"},
                ]
            },
            r"custom_st\.Transformer",
        ),
        (
            {"sentence_bert_config": {"tokenizer_args": {"truncation_side": "left"}}},
            "truncation_side='left'",
        ),
        ({"sentence_bert_config": {"processor_kwargs": {"add_eos_token": True}}}, "add_eos_token"),
        ({"sentence_bert_config": {"config_args": {"rope_theta": 9.0}}}, "rope_theta"),
        (
            {"sentence_xlnet_config": {"transformer_task": "fill-mask"}},
            "transformer_task='fill-mask'",
        ),
        (
            {"sentence_bert_config": {"processing_kwargs": {"text": {"max_length": 4}}}},
            "processing_kwargs",
        ),
        (
            {"sentence_bert_config": {"modality_config": {"message": {"method": "forward"}}}},
            "modality_config",
        ),
        (
            {
                "modules": [
                    {"type": MODULE + "Transformer", "path": ""},
                    {"type": MODULE + "Pooling", "path": "../other"},
                ]
            },
            "other",
        ),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused_by_name(
    files: dict[str, Any],
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = directory(tmp_path / "m", **files)
    model = load(folder, quiet=True)
    with pytest.raises(ModelError, match=named):
        model.embed(TEXTS)
    with pytest.raises(ConfigError, match=named):
        Embedding(model)
    close(model.embed(TEXTS, pooling="mean"), reference(folder, TEXTS, "mean"))
    capsys.readouterr()
    monkeypatch.setattr(files_module, "_PRINTED", set())
    model.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "modules.json").exists()
    said = capsys.readouterr().err
    assert "left out of what is saved" in said and re.search(named, said)


def test_damage_is_named(tmp_path: Path) -> None:
    folder = directory(tmp_path / "m", modules={"a": 1})
    with pytest.raises(CheckpointCorrupt, match=r"modules\.json"):
        load(folder, quiet=True)
    model = load(directory(tmp_path / "n", pooling={"pooling_mode_cls_token": True}), quiet=True)
    saved = model.save(tmp_path / "saved")
    config = saved / "1_Pooling" / "config.json"
    config.write_text(config.read_text().replace("true", "null", 1))
    with pytest.raises(CheckpointCorrupt, match="1_Pooling"):
        load(saved, quiet=True)


@pytest.mark.parametrize(
    "mode", ["mean", "lasttoken", "weightedmean", "max", "mean_sqrt_len_tokens"]
)
def test_the_task_writes_what_it_trained(mode: str, tmp_path: Path) -> None:
    model = build(
        "llama", None, tokenizer=tiny.tokenizer(), num_layers=2, hidden_size=16, num_heads=2, max_positions=48
    )  # fmt: skip
    task = Embedding(model, pooling=mode, normalize=True, max_length=20)
    table = read_table([{"anchor": text, "positive": text[::-1]} for text in TEXTS])
    found = torch.tensor([answer["embedding"] for answer in task.predict(table)])
    saved = model.save(tmp_path / "m")
    again = load(saved, quiet=True)
    assert again.sentences.normalize and again.sentences.max_length == 20
    close(again.embed(TEXTS), found)
    close(found, F.normalize(reference(saved, TEXTS, mode), dim=-1))
    # A task on top of it goes on as the directory says.
    assert Embedding(again).sentences.pooling == (mode,) and Embedding(again).max_length == 20


def test_sentence_transformers_opens_what_is_written(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    model = build(
        "bert", None, tokenizer=tiny.tokenizer(), num_layers=2, hidden_size=16, num_heads=2
    )
    Embedding(model, pooling="cls", normalize=True, max_length=20)
    theirs = library.SentenceTransformer(str(model.save(tmp_path / "m")), device="cpu")
    assert theirs.max_seq_length == 20
    close(torch.from_numpy(theirs.encode(TEXTS)), model.embed(TEXTS))


@pytest.mark.parametrize("more", [[], ["Normalize"]])
def test_sentence_transformers_has_the_same_vectors(more: list[str], tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    folder = directory(
        tmp_path / "m",
        pooling={"pooling_mode": ["mean", "cls"], "embedding_dimension": 16},
        more=more,
        config_sentence_transformers={"truncate_dim": 20},
    )
    model = load(folder, quiet=True)
    for path in (folder, model.save(tmp_path / "saved")):
        theirs = library.SentenceTransformer(str(path), device="cpu")
        close(torch.from_numpy(theirs.encode(TEXTS)), model.embed(TEXTS))
        scaled = theirs.encode(TEXTS, normalize_embeddings=True)
        close(torch.from_numpy(scaled), model.embed(TEXTS, normalize=True))


@pytest.mark.parametrize(
    "files",
    [
        {"sentence_distilbert_config": {"max_seq_length": 5}},
        {"sentence_xlm-roberta_config": {"max_seq_length": 5, "do_lower_case": True}},
        {
            "sentence_roberta_config": {"max_seq_length": 5},
            "sentence_albert_config": {"max_seq_length": 7},
        },
        {"sentence_bert_config": {"max_seq_length": 9, "tokenizer_args": {"model_max_length": 5}}},
        {
            "sentence_bert_config": {
                "max_seq_length": 5,
                "tokenizer_args": {"use_fast": True},
                "model_args": {"attn_implementation": "eager", "add_pooling_layer": False},
                "config_args": {"trust_remote_code": True},
            }
        },
        {
            "sentence_bert_config": {
                "max_seq_length": 5,
                "tokenizer_args": {"truncation_side": "right"},
                "config_args": {"output_hidden_states": False, "output_attentions": False},
                "processing_kwargs": {"chat_template": {"add_generation_prompt": True}},
            }
        },
        {
            "sentence_bert_config": {
                "max_seq_length": 5,
                "modality_config": {
                    "text": {"method": "forward", "method_output_name": ["last_hidden_state"]}
                },
                "module_output_name": "token_embeddings",
            }
        },
    ],
    ids=str,
)
def test_settings_of_the_transformer_are_read_under_every_name(
    files: dict[str, Any], tmp_path: Path
) -> None:
    library = pytest.importorskip("sentence_transformers")
    folder = directory(
        tmp_path / "m", pooling={"pooling_mode": "mean", "embedding_dimension": 16}, **files
    )
    theirs = library.SentenceTransformer(str(folder), device="cpu")
    close(torch.from_numpy(theirs.encode(TEXTS)), load(folder, quiet=True).embed(TEXTS))
