"""Adapters: what is trained and what is not, the directory and back, merging, resuming, and files of strangers."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from contract import TEXT_FAMILIES
from pretrain.checkpoint import inspect, latest, load, save_model, verify
from pretrain.cli import main as cli
from pretrain.errors import CheckpointCorrupt, CheckpointError, ConfigError, ModelError
from pretrain.evaluation import evaluate
from pretrain.lora import LoraConfig, apply_lora, load_adapter, merge, save_adapter, unload
from pretrain.lora.layer import LoraLinear
from pretrain.lora.peft_format import from_peft
from pretrain.models import build
from pretrain.models.base import Model
from pretrain.training.trainer import Hook
from tiny import Rows, losses, objective, tokenizer, trainer

SIZES = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "max_positions": 32, "vocab_size": 40}
HEADS = ("lm", "sequence-classification", "token-classification", "question-answering", None)
# The linear layers of a block by family, as they are called on disk.
LINEAR = {
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    "bert": {
        *(f"attention.self.{name}" for name in ("query", "key", "value")),
        *("attention.output.dense", "intermediate.dense", "output.dense"),
    },
    "modernbert": {"attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"},
    "llama": {
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    },
}
LINEAR |= {
    "roberta": LINEAR["bert"],
    **dict.fromkeys(("mistral", "qwen2", "qwen3"), LINEAR["llama"]),
}
IDS = torch.tensor([[7, 8, 9, 10, 11, 12], [9, 9, 30, 22, 5, 6]])
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def tiny(family: str = "gpt2", head: str | None = "lm", seed: int = 0, **options: Any) -> Model:
    kind = "auto" if head == "lm" else head
    labels = ("no", "maybe", "yes") if head in HEADS[1:3] else None
    return build(family, head=kind, labels=labels, seed=seed, **(SIZES | options)).eval()


def shake(model: Model, seed: int = 0, size: float = 0.1) -> Model:
    """Random values in everything that is trained, so that no term hides behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(family: str = "gpt2", head: str | None = "lm", **options: Any) -> Model:
    return shake(apply_lora(tiny(family, head), LoraConfig(r=4, **options)))


def on_disk(tmp_path: Path, family: str = "gpt2", **options: Any) -> Model:
    """An adapter saved in tmp_path/adapter, whose base lies in tmp_path/base."""
    save_model(tiny(family), tmp_path / "base")
    model = shake(apply_lora(load(tmp_path / "base", quiet=True), LoraConfig(r=4, **options)))
    save_adapter(model, tmp_path / "adapter")
    return model


def same_state(one: Model, two: Model) -> None:
    mine, theirs = one.state_dict(), two.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def plain(directory: Path) -> Path:
    """Without manifest and pretrain.json the directory is one that peft could have written."""
    (directory / "manifest.json").unlink()
    (directory / "pretrain.json").unlink()
    return directory


# ------------------------------------------------------------------------------------------------ attaching


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_every_family_has_default_targets_and_starts_unchanged(family: str) -> None:
    """All linear layers of the blocks, exactly; what the model computes does not change until it is trained."""
    for dora in (False, True):
        model = tiny(family)
        before = model(BATCH)
        apply_lora(model, LoraConfig(r=4, dora=dora))
        found = {site.bare.split(".", 2)[2] for site, _, _ in model.adapter.sites.values()}
        found = {
            name.removeprefix("0.").removeprefix("1.") for name in found
        }  # bert: encoder.layer.N
        assert found == LINEAR[family]
        assert len(model.adapter.sites) == 2 * len(LINEAR[family])
        torch.testing.assert_close(model(BATCH), before, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
@pytest.mark.parametrize("head", HEADS)
def test_what_is_trained(family: str, head: str | None) -> None:
    """The adapter and a task's whole head, nothing else; a language-model head is frozen."""
    model = apply_lora(tiny(family, head), LoraConfig(r=4, dora=True))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapter = {name for name in trained if ".lora_" in name}
    new_head = {name for name, _ in model.named_parameters() if name.startswith("head.")}
    assert trained - adapter == (new_head if head not in ("lm", None) else set())
    layers = [m for m in model.modules() if isinstance(m, LoraLinear)]
    assert len(adapter) == 2 * len(layers) + len(model.adapter.sites)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("mode", ["off", "full"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "modernbert"])
def test_a_gradient_reaches_every_trainable_tensor(family: str, mode: str, dora: bool) -> None:
    """With B at zero A has none; with random values all have one, under activation checkpointing too."""
    model = adapted(family, "sequence-classification", dora=dora, dropout=0.1).train()
    model.backbone.set_activation_checkpointing(mode)
    model(BATCH).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_dora_treats_the_norm_as_a_constant() -> None:
    """The gradient is that of m / c (W + s B A) x with c held fixed (section 4.3 of the paper)."""
    torch.manual_seed(0)
    layer = LoraLinear(torch.nn.Linear(5, 7), 3, 0.5, dora=True)
    with torch.no_grad():
        for parameter in (layer.lora_A, layer.lora_B, layer.lora_magnitude):
            parameter.add_(0.3 * torch.randn(parameter.shape))
    x = torch.randn(4, 5)
    layer(x).square().sum().backward()
    a, b, m = (
        p.detach().double().requires_grad_()
        for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude)
    )
    total = layer.weight.detach().double() + 0.5 * b @ a
    rows = total.detach().norm(dim=1)
    y = x.double() @ (m[:, None] / rows[:, None] * total).T + layer.bias.detach().double()
    y.square().sum().backward()
    for mine, wanted in ((layer.lora_A, a), (layer.lora_B, b), (layer.lora_magnitude, m)):
        torch.testing.assert_close(mine.grad, wanted.grad.float(), atol=1e-4, rtol=1e-4)


def test_a_depends_on_seed_and_name_alone() -> None:
    first = apply_lora(tiny(), LoraConfig(r=4), seed=3)
    torch.manual_seed(9)
    again = apply_lora(tiny(), LoraConfig(r=4, targets=("c_attn",)), seed=3)
    other = apply_lora(tiny(), LoraConfig(r=4), seed=4)
    name = "backbone.layers.0.attention.query.lora_A"
    values = [dict(m.named_parameters())[name] for m in (first, again, other)]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    assert values[0].abs().max() <= 1 / math.sqrt(16) and values[0].std() > 0.5 / math.sqrt(3 * 16)


@given(
    r=st.integers(1, 64),
    alpha=st.one_of(st.none(), st.floats(0.01, 1e3)),
    rslora=st.booleans(),
)
def test_the_scale(r: int, alpha: float | None, rslora: bool) -> None:
    config = LoraConfig(r=r, alpha=alpha, rslora=rslora)
    layer = LoraLinear(torch.nn.Linear(2, 2), r, config.scale(r, config.full_alpha))
    if alpha is None:
        assert layer.scale == pytest.approx(16 / math.sqrt(r) if rslora else 2)
    else:
        assert layer.scale == pytest.approx(alpha / (math.sqrt(r) if rslora else r))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "rank r"),
        ({"r": True}, "rank r"),
        ({"alpha": -1}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"targets": "q_proj"}, "list of module names"),
        ({"targets": ()}, "empty"),
        ({"targets": ("(a+)+",)}, "letters, digits"),
        ({"dora": 1}, "true or false"),
        ({"modules_to_save": (1,)}, "list of module names"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**options)


def test_targets_and_whole_modules_by_name() -> None:
    model = apply_lora(tiny("llama"), LoraConfig(r=2, targets=("q_proj", "mlp.down_proj")))
    assert {name.rsplit(".", 1)[1] for name in model.adapter.sites} == {"q_proj", "down_proj"}
    model = apply_lora(
        tiny("llama"), LoraConfig(r=2, modules_to_save=("q_proj", "input_layernorm"))
    )
    assert not any(name.endswith("q_proj") for name in model.adapter.sites)
    assert (
        sum(
            name.endswith(("q_proj.weight", "input_layernorm.weight"))
            for name in model.adapter.full
        )
        == 4
    )
    with pytest.raises(ConfigError, match="'q_proj'"):
        apply_lora(tiny("llama"), LoraConfig(targets=("q_prj",)))
    with pytest.raises(ConfigError, match="'lm_head'"):
        apply_lora(tiny("llama", tie_embeddings=False), LoraConfig(modules_to_save=("lm_haed",)))
    with pytest.raises(ConfigError, match="one matrix"):
        apply_lora(tiny("gpt2"), LoraConfig(modules_to_save=("wte",)))
    with pytest.raises(ModelError, match="has an adapter"):
        apply_lora(adapted())
    with pytest.raises(ModelError, match="row of zeros"):
        apply_lora(tiny("gpt2", zero_init_outputs=True), LoraConfig(dora=True))


@pytest.mark.parametrize("dora", [False, True])
def test_half_precision_compute_and_copies(dora: bool) -> None:
    """Under autocast the adapter computes in bfloat16 and its gradients stay fp32; a deep copy stands on its own."""
    model = adapted("gpt2", dora=dora)
    expected = model(BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(BATCH)
    found.float().square().sum().backward()
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name.endswith("lora_A"):
                parameter.zero_()
    assert torch.equal(model(BATCH), expected) and not torch.equal(twin(BATCH), expected)


# ------------------------------------------------------------------------------------------------ the directory


# DoRA on the families that are built most unlike one another; the others share their code with one of them.
DORA = ("gpt2", "llama", "bert", "modernbert")


@pytest.mark.parametrize(
    ("family", "dora"),
    [
        pytest.param(family, dora, marks=[pytest.mark.slow] * (dora and family not in DORA))
        for family in TEXT_FAMILIES
        for dora in (False, True)
    ],
)
def test_round_trip_with_a_new_head(tmp_path: Path, family: str, dora: bool) -> None:
    """The head on a language model's weights comes back with the adapter, and merging changes nothing."""
    save_model(tiny(family), tmp_path / "base")
    for head in HEADS[1:]:
        model = load(tmp_path / "base", head=head or "none", quiet=True)
        shake(apply_lora(model, LoraConfig(r=4, dora=dora)))
        path = save_adapter(model, tmp_path / str(head))
        verify(path)
        assert not (path / "model.safetensors").exists()
        again = load(path, quiet=True)
        same_state(model, again)
        assert again.fresh == frozenset() and again.labels == model.labels
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trained == [n for n, p in again.named_parameters() if p.requires_grad]
        expected = model(BATCH)
        assert torch.equal(again(BATCH), expected)
        merged = merge(again)
        assert merged is again and merged.adapter is None
        assert merged.merge_gap is not None and merged.merge_gap < 1e-5
        torch.testing.assert_close(merged(BATCH), expected, atol=1e-5, rtol=0)
        assert all(p.requires_grad for p in merged.parameters())
        assert not any(isinstance(m, LoraLinear) for m in merged.modules())
        same_state(load(save_model(merged, tmp_path / f"merged {head}"), quiet=True), merged)


@given(
    targets=st.lists(
        st.sampled_from(["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]), min_size=1, unique=True
    ),
    r=st.integers(1, 9),
    alpha=st.integers(1, 40),
    dora=st.booleans(),
    rslora=st.booleans(),
)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_settings_come_back(tmp_path_factory: Any, targets: list[str], **options: Any) -> None:
    folder = tmp_path_factory.mktemp("any")
    model = apply_lora(tiny(), LoraConfig(targets=tuple(targets), dropout=0.25, **options))
    save_adapter(shake(model), folder / "a")
    again = load_adapter(folder / "a", base=tiny())
    same_state(model, again)
    assert again.adapter.sites == model.adapter.sites
    for name in ("r", "full_alpha", "dora", "rslora", "dropout"):
        assert getattr(again.adapter.config, name) == getattr(model.adapter.config, name)
    assert torch.equal(model(BATCH), again(BATCH))


def test_a_trained_vocabulary_head_is_untied_and_comes_back(tmp_path: Path) -> None:
    save_model(tiny("gpt2"), tmp_path / "base")
    model = load(tmp_path / "base", quiet=True)
    shake(apply_lora(model, LoraConfig(r=2, modules_to_save=("lm_head",))))
    again = load(save_adapter(model, tmp_path / "a"), quiet=True)
    same_state(model, again)
    assert "base_model.model.lm_head.weight" in load_file(
        tmp_path / "a" / "adapter_model.safetensors"
    )


def test_the_adapter_is_small_and_named(tmp_path: Path) -> None:
    model = on_disk(tmp_path)
    path = tmp_path / "adapter"
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert config["task_type"] == "CAUSAL_LM" and config["fan_in_fan_out"] is True
    found = inspect(path)
    assert found["adapter"] == "LORA, rank 4" and found["base"] == str(tmp_path / "base")
    assert found["manifest"] == "holds" and found["family"] == "gpt2"
    assert found["parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found["trainable_parameters"] == found["parameters"]
    assert found["total_parameters"] == model.num_parameters()
    assert "LoRA r=4" in repr(model)
    again = load(path, quiet=True)
    unload(again)
    same_state(again, load(tmp_path / "base", quiet=True))
    assert torch.equal(again(BATCH), load(tmp_path / "base", quiet=True)(BATCH))


def test_a_base_beside_the_adapter_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative name is looked for from here and from above the adapter."""
    on_disk(tmp_path)
    plain(tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="base")
    assert load(tmp_path / "adapter", quiet=True).source == str(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    assert load("adapter", quiet=True).source == "base"
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="some/other")
    with pytest.raises(CheckpointError, match=r"some/other.*base="):
        load(tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match="does not name the base"):
        load(tmp_path / "adapter")
    assert load("adapter", base="base", quiet=True).adapter is not None


def test_a_base_named_from_here_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its absolute path, and by the end of it where both were moved."""
    monkeypatch.chdir(tmp_path)
    save_model(tiny("gpt2"), Path("home/base"))
    model = shake(apply_lora(load("home/base", quiet=True), LoraConfig(r=4)))
    save_adapter(model, "home/adapter")
    config = json.loads(Path("home/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "home" / "base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    same_state(load("../home/adapter", quiet=True), model)
    (tmp_path / "home").rename(tmp_path / "moved")
    same_state(load("../moved/adapter", quiet=True), model)


@pytest.mark.parametrize("in_file", [True, False])
def test_an_adapter_of_peft_is_used_with_what_its_base_has(tmp_path: Path, in_file: bool) -> None:
    """Peft writes neither tokenizer nor generation settings; the merged model and evaluation have them too."""
    base = tiny("llama", vocab_size=len(tokenizer()))
    base.tokenizer = tokenizer()
    rules = {"repetition_penalty": 1.7, "eos_token_id": [3, 5]}
    base.generation_config = dict(rules)
    save_model(base, tmp_path / "base")
    if not in_file:  # as in older directories
        (tmp_path / "base" / "manifest.json").unlink()
        (tmp_path / "base" / "generation_config.json").unlink()
        edit(tmp_path / "base" / "config.json", **rules)
    save_adapter(
        shake(apply_lora(load(tmp_path / "base", quiet=True), LoraConfig(r=2))), tmp_path / "a"
    )
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "a" / name).unlink()
    plain(tmp_path / "a")
    model = load(tmp_path / "a", quiet=True)
    save_model(merge(model), tmp_path / "whole")
    for found in (model, load(tmp_path / "whole", quiet=True)):
        assert rules.items() <= found.generation_config.items()
        assert found.tokenizer is not None
        assert found.tokenizer.fingerprint == tokenizer().fingerprint
    assert load(tmp_path / "a", tokenizer=False, quiet=True).tokenizer is None
    (tmp_path / "text.txt").write_text("the red cat sat on the mat " * 9)
    assert evaluate(tmp_path / "a", tmp_path / "text.txt")["loss"] > 0


@pytest.mark.parametrize("damage", ["rules", "file", "ids"])
def test_an_adapter_does_without_what_its_base_has_damaged(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the adapter has itself is not read from the base; what it lacks is left out, with a line."""
    folder = tmp_path / "base"
    base = tiny(vocab_size=len(tokenizer()))
    base.tokenizer = tokenizer()
    base.generation_config = {"eos_token_id": 3}
    base.save(folder)
    for name in ("own", "peft"):
        save_adapter(shake(apply_lora(load(folder, quiet=True), LoraConfig(r=4))), tmp_path / name)
    plain(tmp_path / "peft")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "peft" / name).unlink(missing_ok=True)
    (folder / "manifest.json").unlink()
    file = folder / ("generation_config.json" if damage == "rules" else "tokenizer.json")
    stored = json.loads(file.read_text())
    more = {"id": len(base.tokenizer), "content": "<x>", "special": True, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False}  # fmt: skip
    file.write_text(
        json.dumps({**stored, "added_tokens": [*stored["added_tokens"], more]})
        if damage == "ids"
        else "{"
    )
    capsys.readouterr()
    own = load(tmp_path / "own", base=folder, quiet=True)
    assert own.tokenizer is not None and own.generation_config["eos_token_id"] == 3
    assert "opened without" not in capsys.readouterr().err
    found = load(tmp_path / "peft", base=folder, quiet=True)
    assert (found.tokenizer is None) is (damage != "rules")
    assert (not found.generation_config) is (damage == "rules")
    assert f"{tmp_path / 'peft'} is opened without" in capsys.readouterr().err


@pytest.mark.parametrize("dora", [False, True])
def test_merging_writes_a_whole_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dora: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    model = on_disk(tmp_path, dora=dora).eval()
    words = ["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "whole")]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "whole") and "outputs differ by at most" in said.err
    assert not list((tmp_path / "whole").glob("adapter*"))
    assert "library_name: transformers" in (tmp_path / "whole" / "README.md").read_text()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    with torch.no_grad():
        assert (theirs(**BATCH).logits - model(BATCH)).abs().max() < 1e-4
    assert inspect(tmp_path / "whole")["parameters"] == load(tmp_path / "base").num_parameters()
    assert cli.main(["merge", str(tmp_path / "base"), "--out", str(tmp_path / "x")]) == 2


@pytest.mark.parametrize("place", ["base", "adapter"])
@pytest.mark.parametrize("given", [False, True])
def test_merging_does_not_replace_what_the_adapter_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, given: bool
) -> None:
    """On a merged base, an adapter of peft would be added a second time without a word; also where --base is a copy."""
    expected = on_disk(tmp_path).eval()(BATCH)
    plain(tmp_path / "adapter")
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    words = ["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / place)]
    assert cli.main(words + ["--base", str(tmp_path / "copy")] * given) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / place} {'is the base' if place == 'base' else 'holds'}" in said
    assert "--out DIR" in said
    again = load(tmp_path / "adapter", quiet=True)
    torch.testing.assert_close(again(BATCH), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("theirs", [False, True])
def test_a_merged_model_keeps_the_terms_of_its_base_and_not_its_card(
    tmp_path: Path, theirs: bool
) -> None:
    """Whether the adapter is in memory, was saved here, or by peft."""
    save_model(tiny(), tmp_path / "base")
    (tmp_path / "base" / "manifest.json").unlink()
    card = "---\nlicense: cc-by-nc-4.0\nlanguage: de\n---\n# Theirs\n"
    (tmp_path / "base" / "README.md").write_text(card)
    model = shake(apply_lora(load(tmp_path / "base", quiet=True), LoraConfig(r=4)))
    save_adapter(model, tmp_path / "adapter")
    if theirs:
        (plain(tmp_path / "adapter") / "README.md").unlink()
    without = unload(apply_lora(load(tmp_path / "base", quiet=True), LoraConfig(r=4)))
    assert (save_model(without, tmp_path / "again") / "README.md").read_text() == card
    save_model(merge(model), tmp_path / "1")
    save_model(merge(load(tmp_path / "adapter", quiet=True)), tmp_path / "2")
    for name in ("1", "2") if theirs else ("1", "2", "adapter"):
        text = (tmp_path / name / "README.md").read_text()
        assert "license: cc-by-nc-4.0\nlanguage: de\n" in text
        assert "Theirs" not in text and "Trained with" not in text


def test_another_head_on_a_stored_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter of the body is used, the stored head is left out and counted aloud."""
    save_model(tiny("bert"), tmp_path / "base")
    model = load(tmp_path / "base", head="sequence-classification", quiet=True)
    shake(apply_lora(model, LoraConfig(r=4)))
    save_adapter(model, tmp_path / "a")
    body = load(tmp_path / "a", head="none")
    assert "not used" in capsys.readouterr().err
    assert torch.equal(body(BATCH), model.backbone(BATCH))
    assert "library_name: peft" in (tmp_path / "a" / "README.md").read_text()
    other = load(tmp_path / "a", head="question-answering")
    assert "head.classifier.weight" in capsys.readouterr().err  # fresh, and said so
    assert "head.classifier.weight" in other.fresh
    assert all(p.requires_grad for p in other.head.parameters())
    same_state(load(save_adapter(other, tmp_path / "b"), quiet=True), other)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("foreign", [False, True])
def test_another_base_is_refused(tmp_path: Path, foreign: bool) -> None:
    on_disk(tmp_path)
    path = tmp_path / "adapter"
    if foreign:
        plain(path)
    others = {
        "wide": tiny(hidden_size=32),
        "deep": tiny(num_layers=1),
        "llama": tiny("llama"),
        "bert": tiny("bert"),
    }
    for name, other in others.items():
        save_model(other, tmp_path / name)
        with pytest.raises(CheckpointError, match="another base"):
            load(path, base=tmp_path / name)
        with pytest.raises(CheckpointError, match="another base"):
            load_adapter(path, base=other)
    with pytest.raises(CheckpointError, match="adapter itself"):
        load(path, base=adapted())
    with pytest.raises(CheckpointError, match="no adapter"):
        load(tmp_path / "base", base=tmp_path / "base")


def test_a_base_with_other_weights_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused where the adapter's file led there, and said aloud where the user did."""
    model = on_disk(tmp_path)
    save_model(tiny(seed=5), tmp_path / "base")
    with pytest.raises(CheckpointError, match="other weights"):
        load(tmp_path / "adapter")
    again = load(tmp_path / "adapter", base=tmp_path / "base")
    assert "other weights" in capsys.readouterr().err
    assert torch.equal(
        model.state_dict()["backbone.layers.0.mlp.up.lora_A"],
        again.state_dict()["backbone.layers.0.mlp.up.lora_A"],
    )


def test_the_base_is_never_overwritten(tmp_path: Path) -> None:
    model = on_disk(tmp_path)
    with pytest.raises(CheckpointError, match="base of this adapter"):
        save_adapter(model, tmp_path / "base")
    load(tmp_path / "base", quiet=True)
    with pytest.raises(ModelError, match="no adapter"):
        save_adapter(tiny(), tmp_path / "x")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    on_disk(folder)
    return folder


@given(
    foreign=st.booleans(),
    name=st.sampled_from(["adapter_model.safetensors", "adapter_config.json"]),
    share=st.floats(0, 1, exclude_max=True),
    bit=st.one_of(st.none(), st.integers(0, 7)),
)
@settings(max_examples=60, deadline=None)
def test_a_damaged_adapter_is_refused(
    saved: Path, foreign: bool, name: str, share: float, bit: int | None
) -> None:
    """Cut (no bit) or with a bit flipped: always seen with a manifest; a stranger's is an error of ours or opens."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copytree(saved / "adapter", Path(folder) / "adapter"))
        if foreign:
            plain(path)
        content = bytearray((path / name).read_bytes())
        place = int(share * len(content))
        if bit is None:
            content = content[:place]
        else:
            content[place] ^= 1 << bit
        (path / name).write_bytes(bytes(content))
        if not foreign:
            with pytest.raises(CheckpointCorrupt):
                load(path)
        elif bit is None and name != "adapter_config.json":
            with pytest.raises(CheckpointError):
                load(path, base=saved / "base")
        else:
            with contextlib.suppress(CheckpointError):
                load(path, base=saved / "base", quiet=True)


@pytest.mark.parametrize(
    "narrowed", [{}, {"layers_to_transform": [0]}, {"target_modules": ".*c_attn"}]
)
def test_matrices_that_the_file_of_an_adapter_lacks_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], narrowed: dict[str, Any]
) -> None:
    """Peft warns of them, too; settings that choose among the layers do not tell."""
    on_disk(tmp_path)
    path = plain(tmp_path / "adapter")
    load(path, quiet=True)
    assert "holds no tensors" not in capsys.readouterr().err
    file = path / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if ".h.1." not in name}, file)
    edit(path / "adapter_config.json", **narrowed)
    load(path, quiet=True)
    said = capsys.readouterr().err
    assert ("holds no tensors for 4 matrices" in said) is (not narrowed)
    assert ("transformer.h.1.attn.c_attn" in said) is (not narrowed)


@pytest.mark.parametrize(("family", "name"), [("llama", "q_proj"), ("vit", "query")])
def test_matrices_that_are_fully_trained_are_not_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, name: str
) -> None:
    """Also where peft has another name for them than the files of the base."""
    sizes = {"image_size": 8, "patch_size": 4, "intermediate_size": 32}
    options = sizes if family == "vit" else {}
    options |= {"num_layers": 2, "hidden_size": 16, "num_heads": 2}
    save_model(build(family, head=None, **options), tmp_path / "base")
    base = load(tmp_path / "base", quiet=True)
    saved = next(entry.disk for entry in base.entries() if entry.disk.endswith(f"{name}.weight"))
    config = LoraConfig(r=2, modules_to_save=(saved.removesuffix(".weight"),))
    save_adapter(apply_lora(base, config), tmp_path / "adapter")
    load(plain(tmp_path / "adapter"))
    said = capsys.readouterr().err
    assert "of the adapter" in said and "holds no tensors" not in said


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("front", ["", "module.", "_orig_mod."])
def test_names_of_a_state_dict_are_read(tmp_path: Path, front: str, dora: bool) -> None:
    """The model that peft trains has its adapters by name, and torch may have wrapped it."""
    expected = on_disk(tmp_path, dora=dora).eval()(BATCH)
    file = plain(tmp_path / "adapter") / "adapter_model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        name = name.removesuffix(".weight").replace(".h.0.", ".h.0._orig_mod.")
        tensors[f"{front}{name}.default" + ".weight" * ("magnitude" not in name)] = tensor
    save_file(tensors, file)
    model = load(tmp_path / "adapter", quiet=True)
    torch.testing.assert_close(model(BATCH), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["default", "french"])
def test_the_head_in_a_state_dict_has_its_classes(tmp_path: Path, name: str) -> None:
    """Their number is that of the rows, whatever the names of adapter and wrapper are."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    save_model(tiny("llama"), tmp_path / "base")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=5
    )
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    adapted = peft.get_peft_model(theirs, settings, adapter_name=name)
    adapted.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / ("" if name == "default" else name)
    kept = {k: v for k, v in adapted.state_dict().items() if "lora" in k or "modules_to_save" in k}
    save_file({f"module.{k}": v for k, v in kept.items()}, path / "adapter_model.safetensors")
    ours = load(path, base=tmp_path / "base", quiet=True)
    assert len(ours.labels or ()) == 5
    torch.testing.assert_close(
        ours.disk_state()["score.weight"],
        kept[f"base_model.model.score.modules_to_save.{name}.weight"],
    )


@pytest.mark.parametrize("second", ["other.", ""])
def test_several_adapters_in_one_file_are_refused(tmp_path: Path, second: str) -> None:
    """Those on other matrices would be added to the one that adapter_config.json describes."""
    on_disk(tmp_path)
    file = plain(tmp_path / "adapter") / "adapter_model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        adapter = second if ".h.1." in name else "first."
        tensors[name.removesuffix("weight") + adapter + "weight"] = tensor
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="several adapters: .*first.*selected_adapters"):
        load(tmp_path / "adapter")


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_with_resized_embeddings(tmp_path: Path, tied: bool) -> None:
    """Peft saves them up to three times where they are in ``modules_to_save``; the base has to be resized first."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    save_model(tiny("llama", tie_embeddings=tied), tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    rows = theirs.config.vocab_size + 3
    theirs.resize_token_embeddings(rows)
    theirs.save_pretrained(tmp_path / "resized")
    wanted = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=wanted, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(theirs, settings).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("original_module" in name for name in names)
    advice = rf"has {rows} rows.*resize_token_embeddings\({rows}\)"
    with pytest.raises(CheckpointError, match=advice):
        load(tmp_path / "adapter", base=tmp_path / "base")
    ours = load(tmp_path / "adapter", base=tmp_path / "resized", quiet=True)
    trained = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert inspect(tmp_path / "adapter")["trainable_parameters"] == trained
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "resized")
    reopened = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(BATCH), reopened(**BATCH).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "fix"),
    [
        ("P_TUNING", "use it with peft"),
        ("CARTRIDGE", "use it with peft"),
        ("IA3", "Merge the adapter"),
    ],
)
def test_the_kind_of_another_adapter_is_named_first(kind: str, fix: str) -> None:
    """Keys of its own are no cause, and what only changes the input has no merged form."""
    with pytest.raises(CheckpointError, match=f"'peft_type' is '{kind}'.*{fix}"):
        from_peft({"feedforward_modules": ["c_proj"], "peft_type": kind}, "adapter_config.json")


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    on_disk(tmp_path, dora=True)
    path = plain(tmp_path / "adapter")
    file = path / "adapter_model.safetensors"
    good = load_file(file)

    def refused(message: str, name: str, tensor: torch.Tensor | None) -> None:
        tensors = {**good, f"base_model.model.{name}": tensor}
        save_file({k: v for k, v in tensors.items() if v is not None}, file)
        with pytest.raises(CheckpointError, match=message):
            load(path)

    site = "transformer.h.0.attn.c_attn"
    refused("lacks .*lora_B", f"{site}.lora_B.weight", None)
    refused("lacks .*magnitude", f"{site}.lora_magnitude_vector", None)
    refused("no counterpart", f"{site}.lora_A.weight", None)
    refused("shape", f"{site}.lora_B.weight", torch.zeros(47, 4))
    refused("shape", f"{site}.lora_A.weight", torch.zeros(4, 17))
    refused("rank 5", f"{site}.lora_A.weight", torch.zeros(5, 16))
    refused("NaN", f"{site}.lora_A.weight", torch.full((4, 16), math.nan))
    refused("floats", f"{site}.lora_A.weight", torch.zeros(4, 16, dtype=torch.int32))
    refused("no linear layer of that", "transformer.wxe.lora_A.weight", torch.zeros(4, 16))
    for name in ("transformer.wte.lora_A.weight", "transformer.wpe.lora_embedding_A"):
        refused("embeddings .* not implemented", name, torch.zeros(4, 16))
    refused("the vocabulary head, .* not implemented", "lm_head.lora_A.weight", torch.zeros(4, 16))
    refused("does not exist in", "score.weight", torch.zeros(3, 16))
    save_file({"transformer.h.0.lora_A.weight": torch.zeros(4, 16)}, file)
    with pytest.raises(CheckpointError, match="does not begin"):
        load(path)
    old = {k + ".weight" * k.endswith("vector"): v for k, v in good.items()}
    save_file(old, file)  # how peft before 0.12 spelled it
    assert load(path, quiet=True).adapter.config.dora


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"something_new": {"on": True}}, "something_new"),
        ({"r": "4"}, "rank r"),
        ({"r": 8}, "rank 4"),
        ({"lora_alpha": None}, None),
        ({"lora_alpha": 1e400}, "finite"),
        ({"rank_pattern": {"(a+)+$": 2}}, "pattern"),
        ({"alpha_pattern": {"c_attn": -1}}, "positive"),
        ({"alpha_pattern": [1]}, "mapping"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type"),
        ({"modules_to_save": "score"}, "list"),
        ({"base_model_name_or_path": 7}, "text"),
        ({"target_modules": "(.*)+x"}, None),
        (
            {
                "something_new": None,
                "another": False,
                "third": [],
                "megatron_core": "megatron.core",
            },
            None,
        ),
        ({"lora_dropout": 2}, "dropout"),
    ],
)
def test_settings_of_strangers(
    tmp_path: Path, changes: dict[str, Any], message: str | None
) -> None:
    """What changes the result and is not implemented is refused by name; the rest is let pass."""
    on_disk(tmp_path)
    path = plain(tmp_path / "adapter")
    text = json.dumps(json.loads((path / "adapter_config.json").read_text()) | changes)
    (path / "adapter_config.json").write_text(text.replace("Infinity", "1e400"))
    if message is None:
        assert load(path, quiet=True).adapter is not None
    else:
        with pytest.raises(CheckpointError, match=message):
            load(path)


@given(
    content=st.dictionaries(
        st.sampled_from(
            [
                "peft_type",
                "r",
                "lora_alpha",
                "use_dora",
                "rank_pattern",
                "modules_to_save",
                "task_type",
                "x",
            ]
        ),
        st.recursive(
            st.one_of(
                st.none(),
                st.booleans(),
                st.integers(),
                st.floats(),
                st.text(max_size=5),
                st.just("LORA"),
            ),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
            ),
            max_leaves=5,
        ),
    )
)
@settings(max_examples=300, deadline=None)
def test_any_json_is_settings_or_an_error_of_ours(content: dict[str, Any]) -> None:
    try:
        found = from_peft(content, "adapter_config.json")
    except CheckpointError:
        return
    assert content["peft_type"] == "LORA" and found.lora.r >= 1


# ------------------------------------------------------------------------------------------------ training


class Crash(Exception):
    """What a test throws into the middle of a run."""


def _run(
    out: Path,
    crash_after: int | None = None,
    *,
    kind: str = "NextToken",
    dora: bool = False,
    **options: Any,
) -> Model:
    def strike(record: Any) -> None:
        if record["step"] == crash_after:
            raise Crash

    goal = objective(kind)
    apply_lora(goal.model, LoraConfig(r=4, dora=dora, dropout=0.1))
    settings: dict[str, Any] = {
        "limit": "9 steps",
        "save_every": "2 steps",
        "eval_every": "4 steps",
    }
    trainer(
        out, goal, Rows(10), eval_rows=Rows(3, seed=4), hooks=[Hook(strike)], **(settings | options)
    ).fit()
    return goal.model


@pytest.mark.parametrize(
    ("kind", "dora", "optim"),
    [
        pytest.param("NextToken", False, {}, marks=pytest.mark.slow),
        ("NextToken", True, {"name": "muon"}),
        pytest.param("MaskedLM", True, {"ema": 0.9}, marks=pytest.mark.slow),
    ],
)
def test_resume_is_bit_exact(tmp_path: Path, kind: str, dora: bool, optim: dict[str, Any]) -> None:
    """Crashes after steps 3 and 7: log, adapter file and every weight equal those of the run that was left alone."""
    options: dict[str, Any] = {"kind": kind, "dora": dora, "optim": optim}
    whole = _run(tmp_path / "whole", **options)
    for crash in (3, 7):
        with pytest.raises(Crash):
            _run(tmp_path / "cut", crash, **options)
    cut = _run(tmp_path / "cut", **options)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    same_state(whole, cut)
    first, second = latest(tmp_path / "whole"), latest(tmp_path / "cut")
    assert first is not None and second is not None
    for name in ("adapter_model.safetensors", "training/optimizer.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert inspect(first)["resumable"] and not (first / "model.safetensors").exists()


def test_frozen_weights_stay_and_trained_ones_move(tmp_path: Path) -> None:
    untouched = objective("NextToken").model
    model = _run(tmp_path / "run", limit="3 steps")
    before = dict(untouched.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            start = 0.0 if name.endswith("lora_B") else None
            assert start is None or parameter.abs().max() > start, name
        else:
            assert torch.equal(parameter, before[name]), name
    again = load(tmp_path / "run", base=untouched, quiet=True)
    same_state(model, again)
    assert again.tokenizer is not None and again.tokenizer.vocab_size == tokenizer().vocab_size


def test_a_run_goes_on_only_with_the_same_adapter(tmp_path: Path) -> None:
    _run(tmp_path / "run", limit="4 steps")
    for change in (
        {"r": 2},
        {"r": 4, "alpha": 3},
        {"r": 4, "dora": True},
        {"r": 4, "targets": ("c_attn",)},
    ):
        goal = objective("NextToken")
        apply_lora(goal.model, LoraConfig(**change))
        with pytest.raises(CheckpointError):
            trainer(tmp_path / "run", goal, Rows(10), limit="8 steps").fit()
    other = objective("NextToken", seed=3)
    with torch.no_grad():
        other.model.backbone.layers[0].mlp.up.weight.add_(1)
    apply_lora(other.model, LoraConfig(r=4, dropout=0.1))
    with pytest.raises(CheckpointError, match="another base"):
        trainer(tmp_path / "run", other, Rows(10), limit="8 steps").fit()
