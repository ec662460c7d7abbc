"""GGUF files hold what the model holds: read back by the package gguf, by transformers and by llama.cpp itself."""

from __future__ import annotations

import copy
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, normalizers, pre_tokenizers

import pretrain
import tiny
from pretrain.data.tokenizer import Tokenizer, train_from_texts
from pretrain.errors import ConfigError, ModelError, PretrainError, TokenizerError
from pretrain.exporting.gguf_tokenizer import SPLITTINGS, splitting_of
from pretrain.models import build
from pretrain.models.base import Model

gguf = pytest.importorskip("gguf")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": 64, "intermediate_size": 48,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"num_kv_heads": 2, "head_dim": 16, "tie_embeddings": True},
    "mistral": {"num_kv_heads": 2},
    "qwen2": {"num_kv_heads": 2},
    "qwen3": {"num_kv_heads": 2, "head_dim": 16, "rope": {"rope_theta": 500.0}},
}


@cache
def words() -> Tokenizer:
    found = train_from_texts(tiny.TEXTS * 3, "bpe", vocab_size=400)
    found.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return found


def made(family: str, **options: Any) -> Model:
    """A model with a row of the vocabulary too many, and weights large enough that its answers differ."""
    sizes = {**SIZES, **OPTIONS[family], "vocab_size": len(words()) + 1, "initializer_range": 0.3}
    ids = {"pad_id": words().pad_id, "bos_id": words().bos_id, "eos_id": words().eos_id}
    model = build(family, None, tokenizer=words(), seed=3, **ids, **(sizes | options))
    return model.eval()


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metadata, tensors) as the package gguf reads them."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


@pytest.mark.parametrize("family", OPTIONS)
def test_transformers_reads_the_same_model(family: str, tmp_path: Path) -> None:
    model = made(family)
    path = model.export("gguf", tmp_path / "out", dtype="f32")
    assert [path] == list((tmp_path / "out").iterdir())
    known: dict[str, Any] = {}
    if family in ("gpt2", "qwen3"):  # transformers does not read their widths from the metadata
        config = model.hf_config() | {"vocab_size": len(words())}
        known["config"] = transformers.AutoConfig.for_model(**config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, **known
    )
    ids = torch.randint(5, len(words()), (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            theirs.eval()(ids).logits,
            model({"input_ids": ids})[..., : len(words())],
            atol=1e-4,
            rtol=1e-4,
        )


def test_names_and_metadata_are_those_of_llama_cpp(tmp_path: Path) -> None:
    for family in OPTIONS:
        fields, tensors = read(made(family).export("gguf", tmp_path / family))
        arch = {"mistral": "llama"}.get(family, family)
        number = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
        parts = gguf.MODEL_TENSORS[number]
        known = {gguf.TENSOR_NAMES[kind].format(bid=i) for i in (0, 1) for kind in parts}
        assert {name.rpartition(".")[0] for name in tensors} <= known, family
        assert fields["general.architecture"] == arch and fields["general.file_type"] == 1
        assert fields[f"{arch}.block_count"] == 2 and fields[f"{arch}.context_length"] == 64
        kinds = {tensor.tensor_type.name for tensor in tensors.values() if len(tensor.shape) > 1}
        assert (
            kinds - {"F32"} == {"F16"} and tensors["output_norm.weight"].tensor_type.name == "F32"
        )
    assert fields["qwen3.attention.key_length"] == 16 and fields["qwen3.rope.freq_base"] == 500.0
    assert fields["qwen3.attention.head_count_kv"] == 2


def test_the_tokenizer(tmp_path: Path) -> None:
    fields, tensors = read(made("llama").export("gguf", tmp_path / "out"))
    own = {key.removeprefix("tokenizer."): fields[key] for key in fields if "tokenizer" in key}
    assert (own["ggml.model"], own["ggml.pre"]) == ("gpt2", "gpt-2")
    assert {name: i for i, name in enumerate(own["ggml.tokens"])} == words().vocab
    assert tensors["token_embd.weight"].shape.tolist() == [32, len(words())]  # the last row is none
    merges = json.loads(words().backend.to_str())["model"]["merges"]
    assert [merge.split(" ") for merge in own["ggml.merges"]] == [list(pair) for pair in merges]
    control = [i for i, kind in enumerate(own["ggml.token_type"]) if kind == 3]
    assert set(control) == words().special_ids and len(own["ggml.token_type"]) == len(words())
    ids = {role: own[f"ggml.{role}_token_id"] for role in ("bos", "eos", "padding", "unknown")}
    assert list(ids.values()) == [words().bos_id, words().eos_id, words().pad_id, words().unk_id]
    assert own["ggml.add_bos_token"] is True and own["ggml.add_eos_token"] is False
    assert own["chat_template"] == words().chat_template and "chat_templates" not in own


def test_named_templates(tmp_path: Path) -> None:
    model = made("llama")
    assert model.tokenizer is not None
    model.processor = copy.copy(model.tokenizer)
    model.processor.named_templates = {"tool_use": "{{ tools }}", "r\u00e4g-1": "{{ documents }}"}
    fields, _ = read(model.export("gguf", tmp_path / "out"))
    assert sorted(fields["tokenizer.chat_templates"]) == ["r_g_1", "tool_use"]
    assert fields["tokenizer.chat_template.tool_use"] == "{{ tools }}"
    assert fields["tokenizer.chat_template.r_g_1"] == "{{ documents }}"
    assert fields["tokenizer.chat_template"] == words().chat_template


@pytest.mark.parametrize("said", ["</s>", None, 10**6, [-1, 7.0, True], [9, "</s>"]])
def test_ends_of_a_text_are_those_of_generate(said: Any, tmp_path: Path) -> None:
    model = made("gpt2")
    model.generation_config["eos_token_id"] = said  # of a file that anyone may have written
    fields, _ = read(model.export("gguf", tmp_path / "out"))
    first = 9 if isinstance(said, list) and 9 in said else words().eos_id
    assert fields["tokenizer.ggml.eos_token_id"] == first
    assert fields.get("tokenizer.ggml.eot_token_id", first) in (first, words().eos_id)


def test_types_of_numbers(tmp_path: Path, capfd: Any) -> None:
    model = made("qwen2")
    _, whole = read(model.export("gguf", tmp_path / "f32", dtype="f32"))
    for dtype in ("f16", "bf16", "q8_0"):
        fields, tensors = read(model.export("gguf", tmp_path / dtype, dtype=dtype))
        assert fields["general.file_type"] == {"f16": 1, "bf16": 32, "q8_0": 7}[dtype]
        for name, tensor in tensors.items():
            exact, kind = whole[name].data, tensor.tensor_type
            if exact.ndim == 1:
                assert kind.name == "F32" and (tensor.data == exact).all()
                continue
            assert kind.name == (
                "F16" if dtype == "q8_0" and exact.shape[1] % 32 else dtype.upper()
            )
            assert (tensor.data == gguf.quants.quantize(exact, kind)).all(), (name, dtype)
    assert "2 matrices with rows that are no multiple of 32 are f16" in capfd.readouterr().err
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"  # 48 columns


@pytest.mark.parametrize(("dtype", "weight"), [("f16", 1e5), ("q8_0", 1e7), ("bf16", 3.4e38)])
def test_weights_too_large_for_the_type_leave_nothing_behind(
    dtype: str, weight: float, tmp_path: Path
) -> None:
    model = made("llama")
    with torch.no_grad():
        model.backbone.get_parameter("token_embedding.weight")[0, 0] = weight
    with pytest.raises(ConfigError, match=f"too large for {dtype}.*f32"):
        model.export("gguf", tmp_path / "out", dtype=dtype)
    assert not os.listdir(tmp_path)
    model.export("gguf", tmp_path / "out", dtype="f32")


def test_llama3_scaling_becomes_divisors(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    _, tensors = read(made("llama", rope=rope).export("gguf", tmp_path / "out"))
    factors = tensors["rope_freqs.weight"].data
    assert factors.shape == (8,) and factors[-1] == pytest.approx(8.0)
    assert factors[0] == pytest.approx(8.0 / (1 + 7 * (16 / (2 * np.pi) - 1) / 3))  # interpolated
    fields, _ = read(
        made("qwen3", rope={"rope_type": "linear", "factor": 4.0}).export("gguf", tmp_path / "lin")
    )
    assert fields["qwen3.rope.scaling.type"] == "linear"
    assert fields["qwen3.rope.scaling.factor"] == 4.0


# ------------------------------------------------------------------------------------------------ splitting

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_by(*parts: Any, ignore_merges: bool = False, **rules: Any) -> Tokenizer:
    """The tokenizer of the tests with another splitting."""
    stored = json.loads(words().backend.to_str())
    stored["model"] |= {"ignore_merges": ignore_merges, **rules}
    backend = tokenizers.Tokenizer.from_str(json.dumps(stored))
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(parts))
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def pattern(text: str) -> Any:
    return pre_tokenizers.Split(tokenizers.Regex(text), "isolated")


LETTERS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def test_the_splitting_gets_the_name_that_llama_cpp_has_for_it() -> None:
    assert splitting_of(words()) == "gpt-2"
    assert splitting_of(split_by(pattern(LLAMA3), LETTERS, ignore_merges=True)) == "llama-bpe"
    assert splitting_of(split_by(pattern(LLAMA3), LETTERS)) == "dbrx"
    assert splitting_of(split_by(pattern(LLAMA3.replace("{1,3}", "")), LETTERS)) == "qwen2"
    assert splitting_of(split_by(pre_tokenizers.Digits(True), GPT2)) == "smollm"
    assert set(SPLITTINGS) == {"gpt-2", "llama-bpe", "dbrx", "qwen2", "smollm"}


@pytest.mark.parametrize(
    "parts",
    [
        (pattern(r"\S+|\s+"), LETTERS),
        (pre_tokenizers.ByteLevel(add_prefix_space=True),),
        (pattern(LLAMA3.replace("{1,3}", "{1,2}")), LETTERS),
        (pre_tokenizers.Whitespace(), LETTERS),
    ],
)
def test_a_splitting_without_a_name_is_refused(parts: Any, tmp_path: Path) -> None:
    model = made("gpt2")
    model.tokenizer = split_by(*parts)
    with pytest.raises(TokenizerError, match="none of the ways of llama"):
        model.export("gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rules_that_llama_cpp_has_not(tmp_path: Path, capfd: Any) -> None:
    def export(tokenizer: Tokenizer | None, out: str = "out") -> Path:
        model = made("gpt2")
        model.tokenizer = tokenizer
        return model.export("gguf", tmp_path / out)

    for kind in ("wordpiece", "char"):
        with pytest.raises(TokenizerError, match=f"byte-level BPE.*{kind}"):
            export(train_from_texts(tiny.TEXTS, kind, vocab_size=90))
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        export(None)
    with pytest.raises(TokenizerError, match="dropout"):
        export(split_by(GPT2, dropout=0.1))
    for normalizer, fails in ((normalizers.Lowercase(), True), (normalizers.NFC(), False)):
        changed = split_by(GPT2)
        changed.backend.normalizer = normalizer
        if fails:
            with pytest.raises(TokenizerError, match="Lowercase"):
                export(changed)
    assert not os.listdir(tmp_path)
    export(changed, "nfc")
    assert "NFC" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("mistral", {"sliding_window": 8}, "sliding window"),
        ("qwen3", {"attention_bias": True}, "biases"),
        ("qwen2", {"head_dim": 16}, "heads that do not divide"),
        ("llama", {"activation": "gelu"}, "activation gelu"),
        ("gpt2", {"activation": "relu"}, "activation relu"),
        ("llama", {"rope": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling dynamic"),
        ("gpt2", {"head": "sequence-classification"}, "Export it to onnx"),
    ],
)
def test_what_llama_cpp_would_compute_differently(
    family: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        made(family, **options).export("gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_families_are_refused_by_name(tmp_path: Path) -> None:
    bert = build("bert", None, tokenizer=tiny.tokenizer(), **SIZES)
    with pytest.raises(ModelError, match=r"bert model .*gpt2, llama, mistral, qwen2, qwen3"):
        bert.export("gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ llama.cpp


def continued(path: Path, prompt: str, count: int) -> list[int]:
    """The ids with which llama.cpp continues a text greedily, by whichever of its two bindings is installed."""
    try:
        import llama_cpp
    except ImportError:
        x = pytest.importorskip("xllamacpp", reason="neither llama_cpp nor xllamacpp is installed")
        params = x.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), 64, 1, False
        request = {"prompt": prompt, "n_predict": count, "temperature": 0, "logprobs": 1}
        answer = x.Server(params).handle_completions({**request, "ignore_eos": True})
        # Bytes of one character are reported together, under the first of their tokens.
        return [item["id"] for item in answer["choices"][0]["logprobs"]["content"]]
    model = llama_cpp.Llama(str(path), n_ctx=64, verbose=False)
    ids = model.tokenize(prompt.encode(), special=True)
    assert ids == words().frame_prompts([prompt])[0]
    stream = model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
    return [next(stream) for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("family", OPTIONS)
def test_llama_cpp_continues_with_the_same_tokens(family: str, tmp_path: Path) -> None:
    model = learned(family)
    path = model.export("gguf", tmp_path / "out", dtype="f32")
    for prompt in ("the red cat", "the old dog  sat on", "the"):
        ids = torch.tensor(words().frame_prompts([prompt]))
        ours = model.generate(ids, max_new_tokens=12, temperature=0)[0, ids.shape[1] :].tolist()
        theirs = continued(path, prompt, 12)
        assert theirs[: len(ours)] == ours[: len(theirs)] and len(theirs) > 5, (family, prompt)


def learned(family: str) -> Model:
    """A model that has learned the sentences, so that its tokens are whole words and its choices clear."""
    model = made(family, initializer_range=0.05).train()
    rows = torch.tensor([words().frame(ids)[:12] for ids in words().encode_batch(tiny.TEXTS)])
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(60):
        scores = model({"input_ids": rows})[:, :-1]
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_a_run_is_exported_by_the_command(tmp_path: Path, capsys: Any) -> None:
    from pretrain.cli.main import main

    made("gpt2").save(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), "--to", "gguf", "--dtype", "q8_0"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "model-gguf" / "model-q8_0.gguf" and path.is_file()
    assert main(["export", str(tmp_path / "model"), "--to", "gguf"]) == 2  # it is there already
    assert "is not empty" in capsys.readouterr().err
    with pytest.raises(PretrainError, match="q8_0"):
        pretrain.export(tmp_path / "model", "gguf", tmp_path / "x", dtype="q8")
