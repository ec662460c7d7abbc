"""Ours against transformers: logits, gradients and files in both directions, for every family and head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from parity.cases import (
    CASES,
    LLAMA,
    VOCAB,
    Case,
    batch_of,
    build_theirs,
    compare,
    open_ours,
    save_ours,
    theirs_forward,
)
from pretrain.models import build
from pretrain.models.base import Model
from pretrain.nn.attention import KVCache

TOLERANCE = 1e-5
DECODERS = [c for c in CASES if c.head == "causal-lm" and "dynamic" not in c.label]


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_logits_gradients_and_files(case: Case, tmp_path: Path):
    theirs = build_theirs(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, report = open_ours(tmp_path / "theirs")
    assert report.missing == []
    # BertModel alone has a pooler, which belongs to our classifier.
    assert [name for name in report.unexpected if "pooler" not in name] == []
    batch = batch_of(case)
    logits, gradients = compare(theirs, ours, batch)
    assert logits <= TOLERANCE
    assert gradients <= TOLERANCE

    save_ours(ours, tmp_path / "ours")
    architecture = getattr(transformers, case.architecture)
    again, info = architecture.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert [k for k in info["missing_keys"] if "pooler" not in k] == []
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        assert torch.equal(theirs_forward(again.eval(), batch), theirs_forward(theirs, batch))
    ignored = {
        "transformers_version",
        "_name_or_path",
        "max_window_layers",
    }  # layer_types says the same
    before, after = theirs.config.to_dict(), again.config.to_dict()
    for key in set(before) - ignored:
        assert before[key] == after.get(key) or (key == "n_inner" and before[key] is None), key


@pytest.mark.parametrize("case", DECODERS, ids=lambda c: c.label)
def test_cache_equals_full_forward(case: Case, tmp_path: Path):
    theirs = build_theirs(case)
    theirs.save_pretrained(tmp_path)
    ours, _ = open_ours(tmp_path)
    ids = batch_of(case, rows=2, tokens=14)["input_ids"].clamp_min(4)
    with torch.no_grad():
        full = theirs(input_ids=ids).logits
        cache = KVCache(14)
        parts = [
            ours({"input_ids": ids[:, :6]}, cache=cache),
            ours({"input_ids": ids[:, 6:9]}, cache=cache),
        ]
        parts += [ours({"input_ids": ids[:, i : i + 1]}, cache=cache) for i in range(9, 14)]
    assert cache.length == 14
    torch.testing.assert_close(
        torch.cat(parts, 1), full, rtol=1e-5, atol=1e-5 * float(full.abs().max())
    )


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_left_padding_with_cache(family: str, tmp_path: Path):
    case = next(c for c in CASES if c.label == f"{family}/causal-lm")
    build_theirs(case).save_pretrained(tmp_path)
    ours, _ = open_ours(tmp_path)
    ids = torch.randint(4, VOCAB, (1, 9), generator=torch.Generator().manual_seed(0))
    padded = torch.cat((torch.ones(1, 4, dtype=torch.long), ids), 1)
    mask = torch.cat((torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 9, dtype=torch.long)), 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        alone = ours({"input_ids": ids})
        cache = KVCache(13)
        first = {
            "input_ids": padded[:, :8],
            "attention_mask": mask[:, :8],
            "position_ids": positions[:, :8],
        }
        parts = [ours(first, cache=cache)[:, 4:]]
        for i in range(8, 13):
            step = {"attention_mask": mask[:, : i + 1], "position_ids": positions[:, i : i + 1]}
            parts.append(ours({"input_ids": padded[:, i : i + 1], **step}, cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), alone, rtol=1e-4, atol=1e-5)


# Dynamic scaling looks at the longest position of the row, so there a document depends on its neighbours' lengths.
PACKABLE = [c for c in CASES if c.head.endswith("-lm") and "dynamic" not in c.label]


@pytest.mark.parametrize("case", PACKABLE, ids=lambda c: c.label)
def test_packed_rows_equal_separate_documents(case: Case, tmp_path: Path):
    build_theirs(case).save_pretrained(tmp_path)
    ours, _ = open_ours(tmp_path)
    ids = torch.randint(4, VOCAB, (1, 18), generator=torch.Generator().manual_seed(0))
    lengths = [7, 3, 5, 3]
    documents = torch.repeat_interleave(torch.tensor([1, 2, 3, 0]), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = {"input_ids": ids, "document_ids": documents, "position_ids": positions}
    with torch.no_grad():
        together = ours(packed)
        derived = ours({"input_ids": ids, "document_ids": documents})
        start = 0
        for length in lengths[:3]:
            alone = ours({"input_ids": ids[:, start : start + length]})
            torch.testing.assert_close(
                together[:, start : start + length], alone, rtol=1e-5, atol=2e-5
            )
            start += length
    torch.testing.assert_close(derived[:, :15], together[:, :15])
    changed = ids.clone()
    changed[0, 8] = (ids[0, 8] + 1 - 4) % (VOCAB - 4) + 4
    with torch.no_grad():
        other = ours({**packed, "input_ids": changed})
    assert torch.equal(other[:, :7], together[:, :7])
    assert torch.equal(other[:, 10:15], together[:, 10:15])
    assert not torch.equal(other[:, 7:10], together[:, 7:10])


def test_the_good_recipe_opens_as_qwen3(tmp_path: Path):
    model = build(
        "qwen3",
        "tiny",
        vocab_size=VOCAB,
        activation="relu2",
        tie_embeddings=True,
        zero_init_outputs=True,
    )
    save_ours(model, tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert type(theirs).__name__ == "Qwen3ForCausalLM" and theirs.config.hidden_act == "relu2"
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.randint(0, VOCAB, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(ids).logits, model({"input_ids": ids}), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "mistral", "qwen2", "qwen3", "bert", "roberta", "modernbert"]
)
def test_fresh_models_open_in_transformers(family: str, tmp_path: Path):
    model = build(family, "tiny", vocab_size=VOCAB, pad_id=1).eval()
    save_ours(model, tmp_path)
    auto = (
        transformers.AutoModelForCausalLM
        if model.backbone.causal
        else transformers.AutoModelForMaskedLM
    )
    theirs, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.randint(4, VOCAB, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(ids).logits, model({"input_ids": ids}), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("label", ["gpt2/none", "llama/none", "bert/none", "modernbert/none"])
def test_base_only_files_open_with_any_head(label: str, tmp_path: Path):
    case = next(c for c in CASES if c.label == label)
    theirs = build_theirs(case)
    theirs.save_pretrained(tmp_path)
    import json

    from safetensors.torch import load_file

    config = json.loads((tmp_path / "config.json").read_text())
    model = Model.from_hf_config(config, head="token-classification")
    report = model.load_disk_state(load_file(tmp_path / "model.safetensors"))
    assert report.missing and all(
        "classifier" in n or "score" in n or "head" in n for n in report.missing
    )
    batch = batch_of(case)
    with torch.no_grad():
        hidden = model.eval().backbone(batch)[batch["attention_mask"].bool()]
        wanted = theirs(**batch).last_hidden_state[batch["attention_mask"].bool()]
    torch.testing.assert_close(hidden, wanted, rtol=1e-5, atol=2e-5)


def test_v4_spellings_of_config(tmp_path: Path):
    """rope_theta and rope_scaling instead of rope_parameters; two thetas for modernbert; torch_dtype."""
    import json

    scaling = {"type": "linear", "factor": 2.0}
    for label, drop, add in (
        (
            "llama/causal-lm",
            ["rope_parameters", "dtype"],
            {"rope_theta": 5e3, "rope_scaling": scaling},
        ),
        (
            "modernbert/masked-lm",
            ["rope_parameters", "layer_types", "dtype"],
            {"global_rope_theta": 5e3, "local_rope_theta": 3e3, "global_attn_every_n_layers": 2},
        ),
    ):
        case = next(c for c in CASES if c.label == label)
        folder = tmp_path / case.family
        build_theirs(case).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config = (
            {k: v for k, v in config.items() if k not in drop} | add | {"torch_dtype": "float32"}
        )
        (folder / "config.json").write_text(json.dumps(config))
        theirs = getattr(transformers, case.architecture).from_pretrained(folder).eval()
        ours, _ = open_ours(folder)
        logits, gradients = compare(theirs, ours, batch_of(case))
        assert max(logits, gradients) <= TOLERANCE


def test_tying_is_decided_by_the_file(tmp_path: Path):
    """Flag true and another head on disk: the head is kept, as transformers does."""
    import json

    from safetensors.torch import load_file, save_file

    case = Case(
        "llama/causal-lm", "Llama", "LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}
    )
    build_theirs(case).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    copy = state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
    model = Model.from_hf_config(json.loads((tmp_path / "config.json").read_text()))
    report = model.load_disk_state(copy)
    assert report.tied == ["lm_head.weight"] and model.head.tied
    save_file(
        state | {"lm_head.weight": torch.randn(VOCAB, 64)},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    ours, report = open_ours(tmp_path)
    assert report.untied == ["lm_head.weight"] and not ours.head.tied
    assert ours.hf_config()["tie_word_embeddings"] is False
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert compare(theirs, ours, batch_of(case))[0] <= TOLERANCE
