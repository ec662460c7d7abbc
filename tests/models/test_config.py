"""Configs from strangers: absurd sizes, wrong types, code, unsupported features."""

from __future__ import annotations

import math
import time
import tracemalloc
from typing import Any

import pytest

from contract import TEXT_FAMILIES
from pretrain.errors import ConfigError
from pretrain.models import build, family_class
from pretrain.models.base import Model
from pretrain.models.config import SIZES, BackboneConfig, ConfigReader
from pretrain.models.llama import LlamaConfig

ABSURD = [
    {"hidden_size": 2**31},
    {"vocab_size": 2**40},
    {"vocab_size": 2**24, "hidden_size": 2**17},
    {"num_layers": 10**9},
    {"num_layers": 4096, "hidden_size": 65536, "num_heads": 64},
    {"intermediate_size": 2**60},
    {"max_positions": 2**62},
    {"num_layers": 0},
    {"hidden_size": -64},
    {"num_heads": 0},
    {"num_kv_heads": 0},
    {"num_kv_heads": 5},
    {"num_heads": 7},
    {"hidden_size": 768.0},
    {"hidden_size": True},
    {"hidden_size": "768"},
    {"hidden_size": math.nan},
    {"norm_eps": math.nan},
    {"norm_eps": math.inf},
    {"norm_eps": -1e-5},
    {"dropout": 1.0},
    {"initializer_range": "0.02"},
    {"activation": "gellu"},
    {"tie_embeddings": 1},
    {"pad_id": -1},
    {"eos_id": 32000},
    {"head_dim": 10**6},
]
HF_KEYS = {
    "hidden_size": ("n_embd", "hidden_size"),
    "num_layers": ("n_layer", "num_hidden_layers"),
    "num_heads": ("n_head", "num_attention_heads"),
    "max_positions": ("n_positions", "max_position_embeddings"),
    "intermediate_size": ("n_inner", "intermediate_size"),
    "vocab_size": ("vocab_size", "vocab_size"),
}


@pytest.mark.parametrize("change", ABSURD, ids=str)
def test_absurd_values_are_refused_at_once(change: dict):
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(ConfigError):
        BackboneConfig(**{"vocab_size": 32000, **change})
    assert time.perf_counter() - start < 0.1
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("family", TEXT_FAMILIES)
@pytest.mark.parametrize("change", [c for c in ABSURD if set(c) <= set(HF_KEYS)], ids=str)
def test_absurd_config_json_is_refused_at_once(family: str, change: dict):
    config = build(family, "tiny", vocab_size=61, pad_id=1).hf_config()
    Model.from_hf_config(config)
    config |= {HF_KEYS[key][family != "gpt2"]: value for key, value in change.items()}
    start = time.perf_counter()
    with pytest.raises(ConfigError):
        Model.from_hf_config(config)
    assert time.perf_counter() - start < 0.1


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_code_in_a_config_is_dropped(family: str):
    config = build(family, "tiny", vocab_size=61, pad_id=1).hf_config()
    config |= {
        "auto_map": {"AutoModel": "evil--modeling.Evil"},
        "_attn_implementation": "evil/kernel",
        "_attn_implementation_internal": "evil/kernel",
        "attn_implementation": "evil/kernel",
        "trust_remote_code": True,
        "_name_or_path": "/home/someone",
        "vocab_file": "evil.txt",
        "custom_pipelines": {"x": {"impl": "evil.py"}},
        "task_specific_params": {"x": {"auto_map": 1, "keep": 2}},
    }
    model = Model.from_hf_config(config)
    written = str(model.hf_config())
    model.extra_config |= {"auto_map": "evil", "merges_file": "evil", "_commit": "evil"}
    written += str(model.hf_config())
    for word in ("evil", "auto_map", "attn_implementation'", "trust_remote_code", "someone"):
        assert word not in written
    assert model.hf_config()["task_specific_params"] == {"x": {"keep": 2}}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("gpt2", {"is_causal": False}, "is_causal"),
        ("llama", {"is_causal": False}, "is_causal"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("bert", {"is_decoder": True}, "is_decoder"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "needs '(short|long)_factor'"),
        ("llama", {"rope_parameters": {"rope_type": "proportional"}}, "'proportional' is not supp"),
        ("llama", {"rope_scaling": {"type": "su", "factor": 2.0}}, "'su' is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "needs 'factor'"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "positive finite"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ("llama", {"hidden_act": "laplace"}, "unknown"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"num_hidden_layers": None}, "lacks 'num_hidden_layers'"),
        (
            "qwen3",
            {"layer_types": ["full_attention", "chunked_attention"], "use_sliding_window": True},
            "layer_types",
        ),
        ("modernbert", {"layer_types": ["full_attention"]}, "layer_types"),
        ("modernbert", {"classifier_pooling": "max"}, "classifier_pooling"),
        ("llama", {"architectures": {"a": 1}}, "list of class names"),
        ("llama", {"model_type": "evil:Thing"}, "no model family"),
        ("llama", {"model_type": "os:system"}, "no model family"),
        ("llama", {"model_type": None}, "no 'model_type'"),
        (
            "bert",
            {"architectures": ["BertForTokenClassification"], "id2label": {"0": "a", "2": "b"}},
            "id2label",
        ),
        (
            "bert",
            {"architectures": ["BertForTokenClassification"], "id2label": {"x": "a"}},
            "id2label",
        ),
    ],
)
def test_what_is_not_implemented_is_an_error(family: str, change: dict, message: str):
    config = build(family, "tiny", vocab_size=61, pad_id=1).hf_config() | change
    with pytest.raises(ConfigError, match=message):
        Model.from_hf_config(config)


def test_unknown_harmless_keys_are_kept():
    config = build("llama", "tiny", vocab_size=61).hf_config() | {
        "pretrain": {"step": 3},
        "my_key": [1, 2],
    }
    model = Model.from_hf_config(config)
    assert model.extra_config["pretrain"] == {"step": 3}
    assert model.hf_config()["my_key"] == [1, 2]


def test_ids_outside_the_vocabulary_are_dropped_from_files():
    config = build("gpt2", "tiny", vocab_size=61).hf_config() | {
        "eos_token_id": 50256,
        "bos_token_id": -1,
    }
    assert Model.from_hf_config(config).backbone.config.eos_id is None


def test_a_list_of_end_tokens_is_kept_for_generation():
    config = build("llama", "tiny", vocab_size=61).hf_config() | {"eos_token_id": [7, 9]}
    model = Model.from_hf_config(config)
    assert model.backbone.config.eos_id == 7 and model.generation_config["eos_token_id"] == [7, 9]


def test_one_dial_sets_width_depth_and_heads():
    for name, (layers, hidden, heads) in SIZES.items():
        config = BackboneConfig.from_size(name, vocab_size=100)
        assert (config.num_layers, config.hidden_size, config.num_heads) == (layers, hidden, heads)
        assert config.head_dim == 64
    assert BackboneConfig.from_size("base", hidden_size=512, vocab_size=9).num_heads == 8


def test_parameter_count_is_close_to_the_truth():
    for family in TEXT_FAMILIES:
        model = build(family, "mini", vocab_size=1000, pad_id=1)
        assert model.backbone.config.parameter_count() == pytest.approx(
            model.num_parameters(), rel=0.06
        )


def test_reader_names_the_key():
    reader = ConfigReader({"a": "x", "b": True, "c": [1]}, "llama")
    with pytest.raises(ConfigError, match="'a' is 'x'; it must be a whole number"):
        reader.integer("a")
    with pytest.raises(ConfigError, match="'b' is True; it must be a number"):
        reader.number("b")
    with pytest.raises(ConfigError, match="'c' is \\[1\\]; it must be a list of texts"):
        reader.strings("c")


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_fields_that_config_json_cannot_say_are_refused(family: str):
    with pytest.raises(ConfigError, match="mlp_bias cannot be set"):
        family_class(family).config_class.from_size("tiny", mlp_bias=True)


@pytest.mark.parametrize(
    "fields", [{"sliding_window": 4}, {"sliding_window": 4, "layer_types": ("sliding_attention",)}]
)
def test_a_field_that_the_files_of_a_family_cannot_hold_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"cannot be set for llama.*mistral \(sliding_window\)"):
        LlamaConfig(hidden_size=16, num_heads=2, num_layers=1, **fields)
