"""Adapters against peft, fp32, random weights: ours opens there, theirs opens here, with equal logits and gradients."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from parity.cases import CASES, Case, batch_of, build_theirs, theirs_forward
from pretrain.checkpoint import load, save_model
from pretrain.data.tokenizer import train_from_texts
from pretrain.lora import LoraConfig, apply_lora, load_adapter, merge, save_adapter
from pretrain.lora.peft_format import _pattern_value, from_peft
from pretrain.models import build
from pretrain.nn import kernels

peft = pytest.importorskip("peft")
TOLERANCE = 1e-5
TASKS = {
    "causal-lm": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
    "none": "FEATURE_EXTRACTION",
}
PLAIN = {case.label: case for case in CASES if case.label.count("/") == 1}
# Every family with its language model and a classifier; all heads of those that are built most unlike one another.
SHOWN = [
    case
    for case in PLAIN.values()
    if case.head in ("causal-lm", "masked-lm", "sequence-classification")
    or case.family in ("gpt2", "bert", "modernbert")
]
# Their classifiers, too, are of the code of llama, and left to the slow tests.
VARIANTS = ("mistral", "qwen2", "qwen3")
SHOWN = [
    pytest.param(case, id=case.label, marks=[pytest.mark.slow] * late)
    for case in SHOWN
    for late in [case.family in VARIANTS and case.head == "sequence-classification"]
]


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    """peft and transformers warn of keys that they miss; nothing of the kind may pass. Deprecations are their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def shake(module: Any, seed: int = 0) -> Any:
    """Random values in everything that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module


def real(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The logits of real tokens, or of rows."""
    mask = batch["attention_mask"].bool()
    return logits if logits.shape[:2] != mask.shape else logits[mask]


def gap(theirs: Any, ours: Any, batch: dict[str, Tensor]) -> float:
    with torch.no_grad():
        inner = theirs.base_model.model if isinstance(theirs, peft.PeftModel) else theirs
        a = real(theirs_forward(inner, batch), batch)
        b = real(ours(batch), batch)
    return float((a - b).abs().max())


def their_class(case: Case) -> Any:
    return getattr(transformers, case.architecture)


@pytest.mark.parametrize("case", SHOWN)
def test_ours_opens_there(case: Case, tmp_path: Path, record_property: Any) -> None:
    """The directory of a new head on a base: logits of peft, with head, before and after merging, here and there."""
    build_theirs(case).save_pretrained(tmp_path / "base")
    for dora in (False, True):
        model = load(tmp_path / "base", quiet=True)
        shake(apply_lora(model, LoraConfig(r=4, dora=dora, dropout=0.1))).eval()
        path = save_adapter(model, tmp_path / f"adapter-{dora}")
        theirs = their_class(case).from_pretrained(tmp_path / "base")
        theirs = peft.PeftModel.from_pretrained(theirs, path).eval()
        batch = batch_of(case)
        found = gap(theirs, model, batch)
        record_property(f"dora={dora}", found)
        print(f"{case.label} {'DoRA' if dora else 'LoRA'} ours in peft {found:.1e}")
        assert found < TOLERANCE
        merged = merge(model)
        assert merged.merge_gap is not None and merged.merge_gap < TOLERANCE
        assert gap(theirs.merge_and_unload(), merged, batch) < TOLERANCE


@pytest.mark.parametrize("targets", ["default", pytest.param("all-linear", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", SHOWN)
def test_theirs_opens_here(case: Case, targets: str, tmp_path: Path) -> None:
    """What ``get_peft_model`` made and saved; its default targets, and every linear layer it would take."""
    if targets == "default" and case.family == "modernbert":
        pytest.skip("peft has no default targets for it")
    if targets == "all-linear" and (
        case.head in ("token-classification", "question-answering")
        or (case.family, case.head) == ("bert", "none")  # adapts a pooler that nobody reads
    ):
        pytest.skip("peft fails to make it")
    for dora in (False, True):
        theirs = build_theirs(case)
        theirs.save_pretrained(tmp_path / "base")
        settings = peft.LoraConfig(
            task_type=TASKS.get(case.head),
            r=4,
            lora_alpha=7,
            use_dora=dora,
            target_modules=None if targets == "default" else targets,
            fan_in_fan_out=case.family == "gpt2",
        )
        theirs = shake(peft.get_peft_model(theirs, settings)).eval()
        path = tmp_path / f"adapter-{dora}"
        theirs.save_pretrained(path)
        ours = load_adapter(path, base=tmp_path / "base")
        batch = batch_of(case)
        found = gap(theirs, ours, batch)
        print(f"{case.label} {'DoRA' if dora else 'LoRA'} {targets} of peft here {found:.1e}")
        assert found < TOLERANCE
        again = save_adapter(ours, tmp_path / f"again-{dora}")
        back = their_class(case).from_pretrained(tmp_path / "base")
        back = peft.PeftModel.from_pretrained(back, again).eval()
        assert gap(back, ours, batch) < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"q_proj": 32}},
        {"layers_to_transform": [1]},
        {"alpha_pattern": {"^model.layers.0.self_attn.v_proj": 64, "v_proj": 32}},
        {"modules_to_save": ["lm_head", "norm"]},
        {"target_modules": r".*\.(q|v)_proj", "init_lora_weights": "gaussian"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_their_settings(options: dict[str, Any], tmp_path: Path) -> None:
    """Settings that change the result or the choice of modules: read, applied, and written back."""
    case = PLAIN["llama/causal-lm"]
    theirs = build_theirs(case)
    theirs.save_pretrained(tmp_path / "base")
    all_linear = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    settings = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": all_linear} | options
    theirs = shake(peft.get_peft_model(theirs, peft.LoraConfig(**settings))).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(tmp_path / "adapter", base=tmp_path / "base")
    batch = batch_of(case)
    assert gap(theirs, ours, batch) < TOLERANCE
    assert (ours(batch) - load(tmp_path / "base", quiet=True)(batch)).abs().max() > 1e-3
    again = save_adapter(ours, tmp_path / "again")
    back = peft.PeftModel.from_pretrained(
        their_class(case).from_pretrained(tmp_path / "base"), again
    )
    assert gap(back.eval(), ours, batch) < TOLERANCE


@given(
    st.lists(
        st.sampled_from(
            ["q_proj", "_proj", "attn.q_proj", "self_attn.q_proj", "h.1.attn.q_proj", "h.1"]
        )
    ),
    st.sampled_from(["h.1.attn.q_proj", "x.h.1.attn.q_proj", "h.1.self_attn.q_proj", "q_proj"]),
    st.booleans(),
)
def test_patterns_fit_the_modules_that_peft_finds(
    names: list[str], module: str, full: bool
) -> None:
    from peft.utils.other import get_pattern_key

    pattern = {"^" * (full and k % 2 == 0) + name: float(k + 1) for k, name in enumerate(names)}
    content = {"peft_type": "LORA", "alpha_pattern": pattern}
    found = _pattern_value(from_peft(content, "file").alphas, module, 0.0)
    assert found == pattern.get(get_pattern_key(list(pattern), module), 0.0)


@pytest.mark.parametrize(
    ("label", "saved"),
    [
        ("llama/causal-lm/tied", ["embed_tokens"]),
        ("llama/causal-lm/tied", ["embed_tokens", "lm_head"]),
        ("gpt2/causal-lm", ["wte"]),
        ("gpt2/causal-lm", ["lm_head"]),
        ("bert/masked-lm", ["word_embeddings"]),
        ("bert/masked-lm", ["cls"]),
        ("bert/masked-lm", ["decoder"]),
        ("roberta/masked-lm", ["lm_head"]),
        ("modernbert/masked-lm", ["tok_embeddings"]),
    ],
)
def test_a_copy_of_a_tied_matrix(label: str, saved: list[str], tmp_path: Path) -> None:
    """peft trains the embedding or the head alone, and the other keeps the matrix of the base; merged, too."""
    case = next(case for case in CASES if case.label == label)
    theirs = build_theirs(case)
    assert theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight
    theirs.save_pretrained(tmp_path / "base")
    warnings.filterwarnings("ignore", ".*tie_word_embeddings=True", UserWarning)  # what is tested
    settings = peft.LoraConfig(
        task_type=TASKS.get(case.head), r=4, target_modules="all-linear", modules_to_save=saved,
        fan_in_fan_out=case.family == "gpt2",
    )  # fmt: skip
    theirs = shake(peft.get_peft_model(theirs, settings)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours, batch = load_adapter(tmp_path / "adapter", base=tmp_path / "base"), batch_of(case)
    assert gap(theirs, ours, batch) < TOLERANCE
    again = load_adapter(save_adapter(ours, tmp_path / "again"), base=tmp_path / "base")
    assert gap(theirs, again, batch) < TOLERANCE
    base = their_class(case).from_pretrained(tmp_path / "base")
    there = peft.PeftModel.from_pretrained(base, tmp_path / "again").eval()
    assert gap(there, again, batch) < TOLERANCE
    save_model(merge(again), tmp_path / "merged")
    assert gap(theirs, load(tmp_path / "merged", quiet=True), batch) < TOLERANCE
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert merged["tie_word_embeddings"] is False
    back = their_class(case).from_pretrained(tmp_path / "merged").eval()
    assert gap(back, again, batch) < TOLERANCE


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_and_dropout(
    dora: bool, dropout: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training the same masks are drawn in the same order, so outputs and gradients are those of peft."""
    case = PLAIN["llama/sequence-classification"]
    theirs = build_theirs(case)
    theirs.save_pretrained(tmp_path / "base")
    ours = load(tmp_path / "base", quiet=True)
    path = save_adapter(
        shake(apply_lora(ours, LoraConfig(r=4, dora=dora, dropout=dropout))), tmp_path / "adapter"
    )
    theirs = peft.PeftModel.from_pretrained(theirs, path, is_trainable=True).train()
    ours.train()
    batch = batch_of(case)
    torch.manual_seed(0)
    with monkeypatch.context() as within:
        # Ours draws other bits.
        within.setattr(
            torch.nn.functional, "dropout", lambda x, p, on, _: kernels.dropout(x, p, on)
        )
        a = theirs_forward(theirs.base_model, batch)
    torch.manual_seed(0)
    b = ours(batch)
    assert (a - b).abs().max() < TOLERANCE
    a.square().sum().backward()
    b.square().sum().backward()
    wanted = {
        name.replace(".default", "").replace("modules_to_save.", ""): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    compared = 0
    for module, (site, _, _) in ours.adapter.sites.items():
        layer = ours.get_submodule(site.layers[0])
        pairs = {"lora_A.weight": layer.lora_A, "lora_B.weight": layer.lora_B}
        if dora:
            pairs["lora_magnitude_vector.weight"] = layer.lora_magnitude
        for leaf, parameter in pairs.items():
            grad = wanted[f"base_model.model.{module}.{leaf}"]
            assert parameter.grad is not None and grad is not None
            scale = max(float(grad.abs().max()), 1e-3)
            assert (parameter.grad - grad).abs().max() < 1e-4 * scale, (module, leaf)
            compared += 1
    assert compared == len(ours.adapter.sites) * (3 if dora else 2)
    assert compared + 1 == len(wanted)  # and the head


def test_auto_classes_find_base_and_tokenizer(tmp_path: Path) -> None:
    """peft's and transformers' own loaders need the directory of the adapter alone."""
    tokenizer = train_from_texts(["pack my box with five dozen liquor jugs"], "char")
    sizes = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "max_positions": 32}
    save_model(build("gpt2", tokenizer=tokenizer, **sizes), tmp_path / "base")
    model = shake(apply_lora(load(tmp_path / "base", quiet=True), LoraConfig(r=4)))
    path = save_adapter(model, tmp_path / "adapter")
    ids = torch.tensor([tokenizer.encode("five jugs")])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(path).eval()
    assert gap(theirs, model, batch) < TOLERANCE
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    assert gap(theirs, model, batch) < TOLERANCE
    assert (
        transformers.AutoTokenizer.from_pretrained(path)("five jugs", add_special_tokens=False)[
            "input_ids"
        ]
        == ids[0].tolist()
    )


def test_peft_finds_the_base_of_any_head_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base that was named by a relative path; a masked-language model has no task of PEFT's."""
    monkeypatch.chdir(tmp_path)
    case = PLAIN["bert/masked-lm"]
    build_theirs(case).save_pretrained("base")
    model = shake(apply_lora(load("base", quiet=True), LoraConfig(r=4)))
    path = save_adapter(model, "adapter").absolute()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    theirs = peft.AutoPeftModel.from_pretrained(path).eval()
    assert gap(theirs, model, batch_of(case)) < TOLERANCE


@pytest.mark.parametrize("family", ["bert", "modernbert", "roberta", "llama"])
def test_a_classifier_on_a_language_model(family: str, tmp_path: Path) -> None:
    """The base has no such head: pooler, dense layer and classifier all travel with the adapter."""
    lm = "masked-lm" if f"{family}/masked-lm" in PLAIN else "causal-lm"
    build_theirs(PLAIN[f"{family}/{lm}"]).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base", head="sequence-classification", quiet=True)
    shake(apply_lora(model, LoraConfig(r=4)))
    path = save_adapter(model, tmp_path / "adapter")
    case = PLAIN[f"{family}/sequence-classification"]
    torch.manual_seed(99)
    theirs = their_class(case).from_pretrained(tmp_path / "base", num_labels=3)
    theirs = peft.PeftModel.from_pretrained(theirs, path).eval()
    batch = batch_of(case)
    assert gap(theirs, model, batch) < TOLERANCE
    assert gap(theirs, load(path, quiet=True), batch) < TOLERANCE


def test_our_file_says_what_theirs_would(tmp_path: Path) -> None:
    """Tensor names, shapes and the keys of the settings are a subset of what peft writes for the same adapter."""
    from safetensors.torch import load_file

    for family in ("gpt2", "modernbert"):
        lm = "masked-lm" if family == "modernbert" else "causal-lm"
        theirs = build_theirs(PLAIN[f"{family}/{lm}"])
        theirs.save_pretrained(tmp_path / family)
        model = apply_lora(load(tmp_path / family, quiet=True), LoraConfig(r=4, dora=True))
        ours = save_adapter(model, tmp_path / f"{family}-ours")
        config = json.loads((ours / "adapter_config.json").read_text())
        settings = peft.LoraConfig(r=4, use_dora=True, target_modules="all-linear")
        settings.fan_in_fan_out = family == "gpt2"
        peft.get_peft_model(theirs, settings).save_pretrained(tmp_path / f"{family}-theirs")
        written = json.loads((tmp_path / f"{family}-theirs" / "adapter_config.json").read_text())
        assert set(config) <= set(written)
        files = [
            load_file(path / "adapter_model.safetensors")
            for path in (ours, tmp_path / f"{family}-theirs")
        ]
        shapes = [{name: tensor.shape for name, tensor in file.items()} for file in files]
        # "all-linear" there takes the dense layer of the masked-language head too.
        extra = {name for name in shapes[1] if ".head." in name}
        assert shapes[0] == {k: v for k, v in shapes[1].items() if k not in extra}
