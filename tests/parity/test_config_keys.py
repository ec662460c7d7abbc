"""Spellings and keys of config.json: what transformers reads, ignores or only warns of gives the same logits here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from parity.cases import CASES, batch_of, build_theirs, relative, theirs_forward
from pretrain.checkpoint import load

ORIGINAL = "original_max_position_embeddings"
YARN = {"factor": 4.0, "beta_fast": 16}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHORT, LONG = [1.0 + 0.1 * i for i in range(8)], [1.0 + i for i in range(8)]
LISTS = {"short_factor": SHORT, "long_factor": LONG}
# Rotary scalings: type, its numbers, and the keys beside the mapping.
SCALINGS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("linear", {"factor": 3}, {}),
    ("linear", {"factor": 2.0, ORIGINAL: 16}, {}),
    ("dynamic", {"factor": 2.0, "alpha": 1000.0}, {}),
    ("yarn", YARN, {ORIGINAL: 16}),
    ("yarn", YARN | {ORIGINAL: 32}, {ORIGINAL: 16}),
    ("yarn", YARN | {ORIGINAL: 32, "finetuned": True, "mscale": 1.0, "mscale_all_dim": 0}, {}),
    ("yarn", YARN | {"truncate": False, "attention_factor": 1.3}, {}),
    ("yarn", {"factor": None, ORIGINAL: 16}, {}),
    ("llama3", LLAMA3, {ORIGINAL: 16}),
    ("llama3", LLAMA3, {}),
    ("longrope", LISTS | {ORIGINAL: 16}, {}),
    ("longrope", LISTS, {ORIGINAL: 100}),
    ("longrope", LISTS | {"factor": 4.0, "attention_factor": 1.1}, {ORIGINAL: 16}),
]
# Rows longer than max_position_embeddings (64) where the scaling lengthens the model.
LONGER = {"linear": 120, "dynamic": 120, "yarn": 64}
# Keys beside the usual ones, and a word of the line that is printed where there is something to say.
KEYS: list[tuple[str, dict[str, Any], str]] = [
    ("llama/causal-lm", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama/causal-lm", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ("llama/causal-lm", {"pretraining_tp": 2, "sliding_window": 4, "eos_token_id": []}, ""),
    ("mistral/causal-lm", {"layer_types": ["full_attention", "sliding_attention"]}, ""),
    ("qwen2/causal-lm", {"sliding_window": None, "layer_types": None}, ""),
    ("qwen3/causal-lm", {"use_sliding_window": False, "sliding_window": 4}, ""),
    ("bert/masked-lm", {"hidden_act": "gelu_python", "is_encoder_decoder": True}, ""),
    ("bert/masked-lm", {"hidden_act": "gelu_fast", "tie_encoder_decoder": True}, ""),
    ("bert/masked-lm", {"hidden_act": "mish", "pruned_heads": {"0": [1]}}, "pruned_heads"),
    ("bert/none", {"architectures": ["BertForMultipleChoice"]}, "BertForMultipleChoice"),
    ("bert/masked-lm", {"architectures": "BertForMaskedLM"}, ""),
    ("gpt2/causal-lm", {"reorder_and_upcast_attn": True, "n_ctx": 9, "is_decoder": True}, ""),
    ("modernbert/masked-lm", {"embedding_dropout": 0.1, "mlp_dropout": 0.2}, "mlp_dropout"),
    ("modernbert/masked-lm", {"global_attn_every_n_layers": 0, "sparse_prediction": True}, ""),
    ("modernbert/masked-lm", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type"),
    (
        "modernbert/masked-lm",
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False, ORIGINAL: 16}},
        "",
    ),
]


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def check(
    label: str, change: dict[str, Any], drop: list[str], folder: Path, tokens: int = 20
) -> Any:
    """Both open one directory; the logits are equal, and again after ours has saved it."""
    case = next(c for c in CASES if c.label == label)
    build_theirs(case).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in drop} | change
    (folder / "config.json").write_text(json.dumps(config))
    theirs = getattr(transformers, case.architecture).from_pretrained(folder).eval()
    ours, batch = load(folder), batch_of(case, tokens=tokens)
    ours.save(folder / "saved")
    again = load(folder / "saved", quiet=True)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        wanted = theirs_forward(theirs, batch)[real]
        assert relative(ours(batch)[real], wanted) <= 1e-5
        assert torch.equal(again(batch), ours(batch))
    return ours


@pytest.mark.parametrize(("kind", "numbers", "beside"), SCALINGS, ids=str)
def test_every_spelling_of_a_rotary_scaling(
    kind: str, numbers: dict[str, Any], beside: dict[str, Any], tmp_path: Path
):
    """In transformers 4 ``rope_scaling`` stands beside ``rope_theta``, in 5 all is in ``rope_parameters``."""
    tokens = LONGER.get(kind, 40)
    old = {"rope_scaling": {"type": kind} | numbers, "rope_theta": 1e3} | beside
    new = {"rope_parameters": {"rope_type": kind, "rope_theta": 1e3} | numbers} | beside
    check("llama/causal-lm", old, ["rope_parameters"], tmp_path / "old", tokens)
    check("qwen2/causal-lm", new, [], tmp_path / "new", tokens)
    # rope_scaling goes before rope_parameters where a file has both.
    check("mistral/causal-lm", old, [], tmp_path / "both", tokens)


@pytest.mark.parametrize(("label", "change", "word"), KEYS, ids=str)
def test_keys_that_change_no_output_are_accepted(
    label: str, change: dict[str, Any], word: str, tmp_path: Path, capsys: Any
):
    drop = ["rope_parameters"] if "rope_scaling" in change else []
    check(label, change, drop, tmp_path)
    printed = capsys.readouterr().err
    assert (word in printed) if word else ("without effect" not in printed)


def test_gpt2_takes_the_general_names_of_its_sizes(tmp_path: Path):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    drop = ["n_embd", "n_head", "n_layer", "n_positions"]
    check("gpt2/causal-lm", sizes | {"max_position_embeddings": 64}, drop, tmp_path)


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "linear", "factor": 2.5}, 160),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, ORIGINAL: 16}, 64),
        ({"rope_type": "yarn", "factor": 8.0, ORIGINAL: 16}, 128),
        ({"rope_type": "llama3", ORIGINAL: 16} | LLAMA3, 64),
        ({"rope_type": "longrope", ORIGINAL: 16} | LISTS, 64),
        ({"rope_type": "linear", "factor": 1e30}, 1 << 24),
        ({"rope_type": "default"}, 64),
    ],
    ids=str,
)
def test_a_scaling_lengthens_the_model(rope: dict[str, Any], positions: int):
    """``factor`` times the length before scaling, which for YaRN has a key of its own."""
    from pretrain.models.base import Model

    config = dict(next(c for c in CASES if c.label == "llama/causal-lm").options)
    model = Model.from_hf_config(config | {"model_type": "llama", "rope_parameters": rope})
    assert model.backbone.max_length == positions
