"""Export to Hugging Face and sentence-transformers, and what every export refuses before it writes."""

from __future__ import annotations

import copy
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

import pretrain
import tiny
from pretrain.checkpoint import verify
from pretrain.data.tokenizer import Tokenizer, train_from_texts
from pretrain.errors import CheckpointError, ConfigError, ModelError
from pretrain.lora import apply_lora
from pretrain.models import build
from pretrain.models.base import Model

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
SIZES: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 16, "num_heads": 2, "max_positions": 32, "initializer_range": 0.3,
}  # fmt: skip
TEXTS = ["the red cat sat on the mat", "a dog"]


@cache
def words() -> Tokenizer:
    found = train_from_texts(tiny.TEXTS, "bpe", vocab_size=300)
    found.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return found


def decoder() -> Model:
    ids = {"bos_id": words().bos_id, "eos_id": words().eos_id, "pad_id": words().pad_id}
    return build("llama", None, tokenizer=words(), num_kv_heads=1, **ids, **SIZES).eval()


def encoder(**options: Any) -> Model:
    return build("bert", None, tokenizer=tiny.tokenizer(), **SIZES, **options).eval()


def test_a_run_becomes_a_plain_directory(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path / "run", tiny.objective(), tiny.Rows(8), limit="2 steps").fit()
    out = pretrain.export(run.path, "hf", tmp_path / "out")
    assert out == tmp_path / "out"
    verify(out)
    assert "training" not in os.listdir(out)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    ids = torch.tensor([[5, 6, 7]])
    ours = pretrain.load(run.path, quiet=True)({"input_ids": ids})
    torch.testing.assert_close(theirs(ids).logits, ours, atol=1e-5, rtol=1e-5)


def test_files_and_names_that_vllm_reads(tmp_path: Path) -> None:
    out = decoder().export("hf", tmp_path / "out")
    assert set(os.listdir(out)) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "README.md", "manifest.json",
    }  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert config["torch_dtype"] == config["dtype"] == "float32"
    wanted = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    wanted |= {"head_dim": 8, "vocab_size": words().vocab_size, "max_position_embeddings": 32}
    wanted |= {"eos_token_id": words().eos_id, "bos_token_id": words().bos_id, "hidden_act": "silu"}
    wanted |= {"tie_word_embeddings": False}
    assert {key: config[key] for key in wanted} == wanted
    settings = json.loads((out / "generation_config.json").read_text())
    assert settings["eos_token_id"] == words().eos_id
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    assert tokenizer["chat_template"] == words().chat_template
    assert (
        tokenizer["eos_token"] == "<eos>"
        and tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    )
    width, inner = 16, config["intermediate_size"]
    layer = {
        "self_attn.q_proj": [16, width], "self_attn.k_proj": [8, width], "self_attn.v_proj": [8, width],
        "self_attn.o_proj": [width, 16], "mlp.gate_proj": [inner, width], "mlp.up_proj": [inner, width],
        "mlp.down_proj": [width, inner], "input_layernorm": [width], "post_attention_layernorm": [width],
    }  # fmt: skip
    shapes = {
        f"model.layers.{i}.{name}.weight": shape for i in (0, 1) for name, shape in layer.items()
    }
    shapes |= {"model.embed_tokens.weight": [300, width], "model.norm.weight": [width]}
    shapes |= {"lm_head.weight": [300, width]}
    with safe_open(out / "model.safetensors", "pt") as opened:
        assert {key: opened.get_slice(key).get_shape() for key in opened.keys()} == shapes  # noqa: SIM118


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    base = pretrain.load(decoder().save(tmp_path / "base"), quiet=True)
    adapted = apply_lora(base)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.manual_seed(len(name))))
    ids = torch.tensor([[5, 6, 7]])
    wanted = adapted.eval()({"input_ids": ids})
    with pytest.raises(ModelError, match="merge_adapter"):
        adapted.export("hf", tmp_path / "refused")
    out = pretrain.export(adapted.save(tmp_path / "adapter"), "hf", tmp_path / "out")
    whole = pretrain.load(out, quiet=True)
    assert whole.adapter is None
    torch.testing.assert_close(whole({"input_ids": ids}), wanted, atol=1e-4, rtol=1e-4)


def test_sentence_transformers_get_the_body_and_its_pooling(tmp_path: Path) -> None:
    model = encoder()
    out = model.export("sentence-transformers", tmp_path / "out")
    verify(out)
    assert {"modules.json", "1_Pooling", "sentence_bert_config.json"} <= set(os.listdir(out))
    assert json.loads((out / "config.json").read_text())["architectures"] == ["BertModel"]
    assert json.loads((out / "sentence_bert_config.json").read_text())["max_seq_length"] == 32
    again = pretrain.load(out, quiet=True)
    torch.testing.assert_close(again.embed(TEXTS), model.embed(TEXTS), atol=0, rtol=0)
    assert model.head is not None and model.sentences is None  # the model itself stays as it was
    with pytest.raises(ModelError, match="no tokenizer"):
        build("bert", None, vocab_size=9, **SIZES).export("sentence-transformers", tmp_path / "no")


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken"])
@pytest.mark.parametrize("normalize", [False, True])
def test_sentence_transformers_gives_the_same_vectors(
    pooling: str, normalize: bool, tmp_path: Path
) -> None:
    library = pytest.importorskip("sentence_transformers")
    from pretrain.models.sentences import SentenceSettings

    model = encoder()
    model.sentences = SentenceSettings((pooling,), normalize=normalize)
    out = model.export("sentence-transformers", tmp_path / "out")
    theirs = library.SentenceTransformer(str(out), device="cpu").encode(
        TEXTS, convert_to_tensor=True
    )
    torch.testing.assert_close(theirs, model.embed(TEXTS), atol=1e-5, rtol=1e-5)


def test_sentence_transformers_pads_a_decoder_without_padding(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    model = build("gpt2", None, tokenizer=copy.copy(tiny.tokenizer()), pad_id=None, **SIZES)
    model.tokenizer.roles = {r: n for r, n in model.tokenizer.roles.items() if r != "pad"}
    model.tokenizer.config = {k: v for k, v in model.tokenizer.config.items() if "pad" not in k}
    out = model.export("sentence-transformers", tmp_path / "out")
    theirs = library.SentenceTransformer(str(out), device="cpu").encode(
        TEXTS, convert_to_tensor=True
    )
    torch.testing.assert_close(theirs, model.embed(TEXTS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("to", ["hf", "gguf", "onnx", "sentence-transformers"])
def test_a_directory_with_files_is_never_written_to(to: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty"):
        decoder().export(to, out)
    with pytest.raises(CheckpointError, match="not a directory"):
        decoder().export(to, tmp_path / "file")
    with pytest.raises(CheckpointError, match="File name too long"):
        decoder().export(to, tmp_path / ("x" * 300))
    assert os.listdir(out) == ["config.json"] and (tmp_path / "file").read_text() == "mine"


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    for to in ("hf", "gguf"):
        (tmp_path / to).mkdir()
        decoder().export(to, tmp_path / to)
        assert os.listdir(tmp_path / to)
    assert sorted(os.listdir(tmp_path)) == ["gguf", "hf"]


def test_what_is_misspelt_is_named_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'ggf'.*hf, gguf, onnx"):
        pretrain.export("nowhere", "ggf")
    with pytest.raises(ConfigError, match="dtype"):
        pretrain.export("nowhere", "hf", dtype="f16")
    with pytest.raises(ConfigError, match="out=DIR"):
        pretrain.export(decoder(), "hf")
    with pytest.raises(CheckpointError, match="nowhere"):
        pretrain.export(tmp_path / "nowhere", "hf")
    assert not os.listdir(tmp_path)
