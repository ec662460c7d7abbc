"""The contract of ``tests/contract.py`` for every family and head, and what is special about each."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

import tiny
from contract import TEXT_FAMILIES, batch_for, check_model
from pretrain import load
from pretrain.checkpoint import save_model
from pretrain.errors import CheckpointError, ConfigError, ModelError
from pretrain.lora import LoraConfig, apply_lora, save_adapter
from pretrain.models import build, family_class
from pretrain.models.backbone import Backbone
from pretrain.models.base import Model
from pretrain.models.qwen import Qwen3, Qwen3Config
from pretrain.models.state import untie
from pretrain.nn.attention import KVCache

TINY = {
    "vocab_size": 61,
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "max_positions": 40,
    "pad_id": 1,
}
HEADS = [(family, kind) for family in TEXT_FAMILIES for kind in family_class(family).architectures]
VARIANTS = ("mistral", "qwen2", "qwen3")  # of the code of llama, whose heads are checked once each


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param(
            *case, marks=[pytest.mark.slow] * (case[0] in VARIANTS and case[1] != "causal-lm")
        )
        for case in HEADS
    ],
)
def test_contract(family: str, kind: str | None):
    outputs = {"causal-lm": 61, "masked-lm": 61, "question-answering": 2, None: 32}.get(kind, 3)
    extra = {"type_vocab_size": 1} if family == "bert" else {}

    def make(seed: int) -> Model:
        return build(family, head=kind, seed=seed, labels=("a", "b", "c"), **TINY, **extra)

    check_model(make, outputs)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_zero_init_outputs_makes_identity_blocks(family: str):
    model = build(family, zero_init_outputs=True, **TINY)
    for name, value in model.named_parameters():
        if name.endswith(("attention.output.weight", "mlp.down.weight")):
            assert not value.any()
    x = torch.randn(1, 5, 32)
    if family not in ("bert", "roberta"):
        assert torch.equal(model.backbone.blocks()[1](x, mask=None), x)


def test_gpt2_scales_residual_outputs():
    model = build("gpt2", vocab_size=61, num_layers=8, hidden_size=128)
    weight = model.backbone.layers[0].attention.output.weight
    assert float(weight.detach().std()) == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
    assert float(model.backbone.layers[0].attention.query.weight.detach().std()) == pytest.approx(
        0.02, rel=0.05
    )


def test_bert_and_modernbert_truncate():
    for family in ("bert", "modernbert"):
        model = build(family, **TINY)
        assert float(model.backbone.token_embedding.weight.detach().abs().max()) <= 0.04 + 1e-6


def test_padding_row_starts_at_zero():
    assert not build("bert", **TINY).backbone.token_embedding.weight[1].any()


def test_expected_first_loss_is_that_of_a_uniform_guess():
    for family in TEXT_FAMILIES:
        model = build(family, **TINY).eval()
        batch = batch_for(model)
        loss = torch.nn.functional.cross_entropy(model(batch).flatten(0, 1), torch.arange(48) % 61)
        assert float(loss.detach()) == pytest.approx(math.log(61), abs=0.15)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_too_long_a_row_names_both_numbers(family: str):
    model = build(family, **TINY)
    most = model.backbone.max_length
    assert most == (38 if family == "roberta" else 40)
    model({"input_ids": torch.full((1, most), 5)})
    with pytest.raises(ModelError, match=rf"{most + 1} tokens.*{most} positions"):
        model({"input_ids": torch.full((1, most + 1), 5)})
    with pytest.raises(ModelError, match="position_ids reach"):
        model({"input_ids": torch.full((1, 3), 5), "position_ids": torch.tensor([[0, 1, most]])})


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_unknown_id_is_named(family: str):
    with pytest.raises(ModelError, match=r"has ids from 5 to 61, .* ids 0 to 60"):
        build(family, **TINY)({"input_ids": torch.tensor([[5, 61]])})


def test_a_mask_of_the_wrong_width_is_refused():
    model = build("llama", **TINY)
    with pytest.raises(
        ModelError,
        match=r"attention_mask has the shape \(1, 4\); it must have two dimensions and 5 columns",
    ):
        model(
            {
                "input_ids": torch.full((1, 5), 5),
                "attention_mask": torch.ones(1, 4, dtype=torch.long),
            }
        )


def test_encoders_have_no_cache_and_decoders_respect_its_size():
    with pytest.raises(ModelError, match="no key-value cache"):
        build("bert", **TINY)({"input_ids": torch.full((1, 3), 5)}, cache=KVCache(8))
    with pytest.raises(ModelError, match="room for 4 tokens, but 5 are needed"):
        build("gpt2", **TINY)({"input_ids": torch.full((1, 5), 5)}, cache=KVCache(4))


def test_rotary_tables_survive_inference_mode():
    model = build("llama", **TINY)
    batch = {"input_ids": torch.full((1, 5), 5)}
    with torch.inference_mode():
        model(batch)
    model(batch).sum().backward()


def test_bf16_autocast_keeps_the_head_and_attention_low():
    for family in ("gpt2", "qwen3", "bert", "modernbert"):
        model = build(family, **TINY)
        seen = {}
        block = model.backbone.blocks()[1]
        for name in ("attention.query", "mlp.up"):
            block.get_submodule(name).register_forward_hook(
                lambda m, args, out, name=name, seen=seen: seen.update(
                    {name: (args[0].dtype, out.dtype)}
                )
            )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(batch_for(model))
        assert out.dtype == torch.bfloat16
        assert set(seen.values()) == {(torch.bfloat16, torch.bfloat16)}
        out.float().logsumexp(-1).sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_blocks_compile_without_a_graph_break(packed: bool):
    model = build("qwen3", **TINY)
    batch = {"input_ids": torch.arange(80).reshape(2, 40) % 61}
    if packed:
        batch["document_ids"] = torch.arange(40).expand(2, 40) // 7 + 1
    wanted = model(batch)
    for block in model.backbone.blocks():
        block.compile(backend="aot_eager", fullgraph=True)
    found = model(batch)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_depth_order_of_blocks_and_embeddings():
    model = build("llama", **TINY)
    assert model.backbone.blocks() == list(model.backbone.layers)
    assert model.backbone.embeddings() == [model.backbone.token_embedding]
    assert model.num_parameters() - model.num_parameters(embeddings=False) == 61 * 32


def test_repr_is_short_and_html_is_escaped():
    model = build("qwen3", **TINY)
    assert "qwen3" in repr(model) and "float32" in repr(model) and len(repr(model)) < 400
    assert model._repr_html_().startswith("<table>")


def test_size_names_and_your_own_class():
    model = build("llama", "tiny", vocab_size=61, num_layers=1)
    assert (model.backbone.config.num_layers, model.backbone.config.hidden_size) == (1, 128)
    assert build(f"{__name__}:Mine", **TINY).backbone.model_type == "qwen3"
    with pytest.raises(ConfigError, match="Did you mean 'llama'"):
        build("lama")
    with pytest.raises(ConfigError, match="Did you mean 'small'"):
        build("llama", "smal")
    with pytest.raises(ConfigError, match="Did you mean 'hidden_size'"):
        build("llama", hiden_size=3)
    with pytest.raises(ModelError, match="has no masked-lm head"):
        build("llama", "tiny", head="masked-lm")
    with pytest.raises(ModelError, match="Did you mean 'causal-lm'"):
        build("llama", "tiny", head="causal-ml")


class Mine(Qwen3):
    """A family of one's own."""

    config_class = Qwen3Config


def test_every_family_is_a_backbone():
    for family in TEXT_FAMILIES:
        cls = family_class(family)
        assert issubclass(cls, Backbone) and cls.model_type == family


class TestLoading:
    def test_missing_body_tensor_is_an_error(self):
        model = build("gpt2", **TINY)
        state = model.disk_state()
        del state["transformer.h.1.mlp.c_fc.weight"]
        with pytest.raises(CheckpointError, match=r"lack transformer\.h\.1\.mlp\.c_fc\.weight"):
            model.load_disk_state(state)

    @pytest.mark.parametrize("family", TEXT_FAMILIES)
    def test_tensors_of_the_caller_stay_apart_unless_they_are_handed_over(self, family):
        source = build(family, **TINY)
        kept = source.disk_state()
        places = {tensor.data_ptr() for tensor in kept.values()}
        for filled, adopt in itertools.product((False, True), repeat=2):
            target = Model.from_hf_config(source.hf_config(), source.head_kind)
            if filled:
                target.materialize(1)
            target.load_disk_state(kept, adopt=adopt)
            shared = places & {tensor.data_ptr() for tensor in target.parameters()}
            assert bool(shared) is (adopt and not filled)
            assert all(p.is_contiguous() for p in target.parameters())
            for name, tensor in target.disk_state().items():
                assert torch.equal(tensor, kept[name])

    def test_missing_head_is_named_and_fresh(self):
        source = build("bert", **TINY)
        target = Model.from_hf_config(source.hf_config(), head="sequence-classification")
        report = target.load_disk_state(source.disk_state(), seed=5)
        assert sorted(report.missing) == [
            "bert.pooler.dense.bias",
            "bert.pooler.dense.weight",
            "classifier.bias",
            "classifier.weight",
        ]
        assert all("cls.predictions" in name for name in report.unexpected) and report.unexpected
        assert "new and untrained" in str(report) and "not used" in str(report)
        again = Model.from_hf_config(source.hf_config(), head="sequence-classification")
        again.load_disk_state(source.disk_state(), seed=5)
        assert torch.equal(again.head.classifier.weight, target.head.classifier.weight)
        assert float(target.head.classifier.weight.detach().std()) > 0

    def test_wrong_shape_names_the_tensor(self):
        state = build("llama", **TINY).disk_state()
        target = build("llama", **{**TINY, "vocab_size": 62})
        with pytest.raises(
            CheckpointError, match=r"embed_tokens\.weight' has the shape \(61, 32\).*\(62, 32\)"
        ):
            target.load_disk_state(state)

    def test_integer_weights_are_refused(self):
        model = build("llama", **TINY)
        state = model.disk_state()
        state["model.norm.weight"] = torch.ones(32, dtype=torch.int64)
        with pytest.raises(CheckpointError, match="floating-point"):
            model.load_disk_state(state)

    def test_old_bert_names(self):
        model = build("bert", **TINY).eval()
        old = {}
        for name, value in model.disk_state().items():
            if name.endswith("LayerNorm.weight"):
                name = name.removesuffix("weight") + "gamma"
            elif name.endswith("LayerNorm.bias"):
                name = name.removesuffix("bias") + "beta"
            old[name] = value
        old["bert.embeddings.position_ids"] = torch.arange(40)[None]
        old["cls.predictions.decoder.weight"] = old[
            "bert.embeddings.word_embeddings.weight"
        ].clone()
        old["cls.predictions.decoder.bias"] = old.pop("cls.predictions.bias")
        target = Model.from_hf_config(model.hf_config())
        report = target.load_disk_state(old)
        assert not report.missing and not report.unexpected
        assert report.ignored == ["bert.embeddings.position_ids"] and len(report.tied) == 2
        batch = batch_for(model)
        assert torch.equal(model(batch), target.eval()(batch))

    @pytest.mark.parametrize(
        ("family", "first", "second"),
        [
            ("bert", "cls.predictions.bias", "cls.predictions.decoder.bias"),
            ("roberta", "lm_head.bias", "lm_head.decoder.bias"),
        ],
    )
    @pytest.mark.parametrize("tied", [True, False])
    def test_the_bias_of_the_decoder_is_computed_with(self, family, first, second, tied):
        """As in transformers, which keeps both where a file has both."""
        model = build(family, **TINY, tie_embeddings=tied)
        state = model.disk_state()
        wanted = state[second if second in state else first] + 1
        for names in ((first, second), (second, first)):
            both = {name: value for name, value in state.items() if name not in names}
            both |= {name: wanted if name == second else wanted - 1 for name in names}
            target = Model.from_hf_config(model.hf_config())
            report = target.load_disk_state(both)
            assert torch.equal(target.head.output_bias, wanted)
            assert not report.missing and not report.unexpected and report.tied

    def test_hub_gpt2_without_prefix_and_with_buffers(self):
        model = build("gpt2", **TINY)
        hub = {
            name.removeprefix("transformer."): value for name, value in model.disk_state().items()
        }
        hub["h.0.attn.bias"] = torch.ones(1, 1, 40, 40).tril()
        report = build("gpt2", seed=9, **TINY).load_disk_state(hub)
        assert not report.missing and not report.unexpected and report.ignored == ["h.0.attn.bias"]

    @pytest.mark.parametrize("family", ["gpt2", "modernbert"])
    @pytest.mark.parametrize(
        "front", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
    )
    def test_names_of_wrapped_models(self, family, front):
        """Torch puts the names of its wrappers before all names, or between their parts."""
        model = build(family, **TINY)
        wrapped = {
            front
            + name.replace(".0.", ".0._fsdp_wrapped_module._checkpoint_wrapped_module."): value
            for name, value in model.disk_state().items()
        }
        target = build(family, seed=9, **TINY)
        report = target.load_disk_state(wrapped)
        assert not report.missing and not report.unexpected
        assert all(torch.equal(v, model.disk_state()[k]) for k, v in target.disk_state().items())
        wrapped[next(iter(model.disk_state()))] = next(iter(wrapped.values()))
        with pytest.raises(CheckpointError, match="two names of one tensor|has no place for"):
            build(family, **TINY).load_disk_state(wrapped)

    @pytest.mark.parametrize(("before", "own"), [("", "module."), ("attn.", "attn._orig_mod.")])
    def test_own_names_with_that_of_a_wrapper_stay(self, tmp_path, before, own):
        """A family of one's own may call its parts like a wrapper does, or compile one of them."""

        class Own(family_class("gpt2")):
            model_type = "own"

            def prefix_of(self, kind):
                return ""

            def names(self):
                return [
                    replace(rule, disk=rule.disk.replace(before, own, 1))
                    for rule in super().names()
                ]

            def head_names(self, kind, tied):
                return [
                    replace(rule, disk=rule.disk.replace(before, own, 1))
                    for rule in super().head_names(kind, tied)
                ]

        model = Model.build(Own, build("gpt2", **TINY).backbone.config, head="causal-lm")
        untie(model.materialize(3))
        assert "module.lm_head.weight" in model.disk_state() or not own.startswith("module")
        save_model(model, tmp_path / "base")
        again = load(tmp_path / "base", family=Own, quiet=True)
        assert all(torch.equal(v, again.disk_state()[k]) for k, v in model.disk_state().items())
        adapted = apply_lora(again, LoraConfig(r=2, targets=("c_attn",)))
        save_adapter(adapted, tmp_path / "adapter")
        state = load(tmp_path / "adapter", quiet=True).state_dict()
        assert all(torch.equal(value, state[name]) for name, value in adapted.state_dict().items())

    def test_the_names_in_a_file_of_others_are_shown(self):
        model = build("gpt2", **TINY)
        state = {f"encoder.{name}": value for name, value in model.disk_state().items()}
        with pytest.raises(
            CheckpointError, match=r"lack transformer\.wte.*hold encoder\.transformer"
        ):
            model.load_disk_state(state)

    def test_two_spellings_of_one_tensor_are_refused(self):
        model = build("gpt2", **TINY)
        state = model.disk_state()
        state["wte.weight"] = state["transformer.wte.weight"]
        with pytest.raises(CheckpointError, match="two names of one tensor"):
            model.load_disk_state(state)

    def test_disk_state_is_a_copy_and_tied_once(self):
        model = build("gpt2", **TINY)
        state = model.disk_state()
        assert "lm_head.weight" not in state
        assert all(v.is_contiguous() and v.dtype == torch.float32 for v in state.values())
        state["transformer.wte.weight"].zero_()
        assert model.backbone.token_embedding.weight.any()

    @pytest.mark.parametrize("family", TEXT_FAMILIES)
    def test_disk_view_shares_memory_where_it_can(self, family):
        model = build(family, **TINY)
        view, state = model.disk_view(), model.disk_state()
        assert list(view) == list(state)
        shared = {p.untyped_storage().data_ptr() for p in model.parameters()}
        fused = {entry.disk for entry in model.entries() if len(entry.memory) > 1}
        for name, tensor in view.items():
            assert torch.equal(tensor, state[name])
            like = view.layout[name]
            assert like.is_meta and like.shape == tensor.shape and like.dtype == tensor.dtype
            assert (tensor.untyped_storage().data_ptr() in shared) == (name not in fused)

    def test_a_forgotten_name_is_an_error(self):
        model = build("gpt2", **TINY)
        model.backbone.extra = torch.nn.Linear(2, 2)
        with pytest.raises(ModelError, match="no name on disk for backbone.extra"):
            model.disk_state()


def test_roberta_takes_no_tokenizer_with_another_id_of_padding():
    words = tiny.tokenizer()
    sizes = TINY | {"vocab_size": len(words), "pad_id": 1}
    assert words.pad_id != 1
    with pytest.raises(ModelError, match=r"counts its positions from .* which is 1 .*tokenizer="):
        build("roberta", **sizes).tokenizer = words
    build("bert", **sizes).tokenizer = words
    del sizes["pad_id"]
    model = build("roberta", tokenizer=words, **sizes)
    model.tokenizer = words
    assert model.backbone.config.pad_id == words.pad_id
    published = build("roberta", **sizes, pad_id=1)
    published.processor = words  # as a directory is opened, whatever id its tokenizer pads with
    published.tokenizer = words
