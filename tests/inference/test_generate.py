"""Generation, mask filling and embedding, with transformers as the outside truth."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Any

import pytest
import torch

import tiny
from pretrain.data.tokenizer import train_from_texts
from pretrain.errors import ConfigError, ModelError
from pretrain.inference.generate import embed, fill_mask, generate
from pretrain.inference.sampling import Sampler, banned, filter_scores, penalize
from pretrain.models import build
from pretrain.models.base import Model
from pretrain.nn.attention import KVCache

transformers = pytest.importorskip("transformers")

VOCAB = 61
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
ROPE = {"num_key_value_heads": 2, "max_position_embeddings": 64}
HF: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "llama": ("LlamaConfig", SMALL | ROPE),
    "mistral": ("MistralConfig", SMALL | ROPE | {"sliding_window": 5, "head_dim": 8}),
    "qwen2": ("Qwen2Config", SMALL | ROPE),
    "qwen3": ("Qwen3Config", SMALL | ROPE | {"head_dim": 8}),
}
# Unequal lengths, so that the batch is padded on the left.
PROMPTS = [[7, 3, 50, 12, 8], [4], [9, 9, 31, 2, 44, 45, 20, 6]]
NEW = 14


@cache
def pair(family: str) -> tuple[Any, Model]:
    """A random model of transformers and ours with its weights; eos is a token that does come up."""
    name, sizes = HF[family]
    config = getattr(transformers, name)(
        vocab_size=VOCAB,
        eos_token_id=5,
        bos_token_id=1,
        pad_token_id=0,
        initializer_range=0.6,
        **sizes,
    )
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    ours = Model.from_hf_config(config.to_dict() | {"architectures": [type(theirs).__name__]})
    state = {k: v.detach().clone() for k, v in theirs.state_dict().items() if "rotary" not in k}
    ours.load_disk_state(state)
    return theirs, ours.eval()


def reference(
    theirs: Any, prompts: list[list[int]], end: int = 5, **options: Any
) -> list[list[int]]:
    """What transformers generates from a left-padded batch, without padding."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    options |= {"eos_token_id": end, "max_new_tokens": NEW, "do_sample": False}
    out = theirs.generate(ids, attention_mask=mask, **options)
    found = []
    for prompt, row in zip(prompts, out[:, width:].tolist(), strict=True):
        row = row[: row.index(end) + 1] if end in row else row
        found.append(prompt + row)
    return found


# --------------------------------------------------------------------------------- against transformers


@pytest.mark.parametrize("family", HF)
def test_greedy_equals_transformers_alone_and_in_a_padded_batch(family: str) -> None:
    theirs, ours = pair(family)
    expected = [reference(theirs, [p])[0] for p in PROMPTS]
    assert reference(theirs, PROMPTS) == expected
    assert generate(ours, PROMPTS, max_new_tokens=NEW) == expected
    for prompt, text in zip(PROMPTS, expected, strict=True):
        assert generate(ours, prompt, max_new_tokens=NEW) == text
    # Once more with a token that does come up as the end: the rows of the batch end at different times.
    end = expected[2][len(PROMPTS[2]) + 1]
    ours.generation_config["eos_token_id"] = end
    try:
        found = generate(ours, PROMPTS, max_new_tokens=NEW)
    finally:
        ours.generation_config.clear()
    assert found == reference(theirs, PROMPTS, end=end)
    assert len(found[2]) <= len(PROMPTS[2]) + 2 and found[2][-1] == end


@pytest.mark.parametrize("family", HF)
def test_repetition_penalty_equals_transformers(family: str) -> None:
    theirs, ours = pair(family)
    expected = [reference(theirs, [p], repetition_penalty=1.4)[0] for p in PROMPTS]
    assert generate(ours, PROMPTS, max_new_tokens=NEW, repetition_penalty=1.4) == expected


@pytest.mark.parametrize("family", HF)
def test_the_cache_changes_nothing(family: str) -> None:
    _, ours = pair(family)
    for options in ({}, {"top_k": 9, "seed": 3}):
        cached = generate(ours, PROMPTS, max_new_tokens=NEW, **options)
        assert generate(ours, PROMPTS, max_new_tokens=NEW, use_cache=False, **options) == cached
    ids = torch.tensor([PROMPTS[2]])
    cache = KVCache(16)
    with torch.no_grad():
        steps = [ours({"input_ids": ids[:, :3]}, cache=cache)]
        steps += [ours({"input_ids": ids[:, i : i + 1]}, cache=cache) for i in range(3, 8)]
        whole = ours({"input_ids": ids})
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_filters_equal_those_of_transformers(seed: int) -> None:
    from transformers.generation import logits_process as hf

    scores = torch.randn(5, 200, generator=torch.Generator().manual_seed(seed)) * 3
    ids = torch.randint(0, 200, (5, 30), generator=torch.Generator().manual_seed(seed))
    seen = torch.zeros(5, 200, dtype=torch.bool).scatter_(1, ids, True)
    cases: list[tuple[Any, torch.Tensor]] = [
        (hf.RepetitionPenaltyLogitsProcessor(1.3), penalize(scores, seen, 1.3)),
        (hf.RepetitionPenaltyLogitsProcessor(0.8), penalize(scores, seen, 0.8)),
        (hf.TemperatureLogitsWarper(0.7), filter_scores(scores, temperature=0.7)),
    ]
    cases += [(hf.TopKLogitsWarper(k), filter_scores(scores, top_k=k)) for k in (1, 2, 17, 500)]
    cases += [
        (hf.TopPLogitsWarper(p), filter_scores(scores, top_p=p)) for p in (0.01, 0.3, 0.9, 1.0)
    ]
    cases += [(hf.MinPLogitsWarper(p), filter_scores(scores, min_p=p)) for p in (0.01, 0.2, 1.0)]
    for theirs, ours in cases:
        torch.testing.assert_close(theirs(ids, scores).softmax(-1), ours.softmax(-1))
    together = hf.MinPLogitsWarper(0.05)(
        ids, hf.TopPLogitsWarper(0.8)(ids, hf.TopKLogitsWarper(20)(ids, scores / 1.5))
    )
    ours = filter_scores(scores, temperature=1.5, top_k=20, top_p=0.8, min_p=0.05)
    torch.testing.assert_close(together.softmax(-1), ours.softmax(-1))


def test_top_k_keeps_ties_and_one_token_always_stays() -> None:
    tied = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    assert filter_scores(tied, top_k=2).isfinite().sum() == 3
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert filter_scores(torch.tensor([[0.0, 3.0, 1.0]]), **options).isfinite().sum() == 1  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------- sampling


def test_draws_have_the_distribution_of_the_model() -> None:
    _, ours = pair("gpt2")
    with torch.no_grad():
        exact = (ours({"input_ids": torch.tensor([[7, 3]])})[0, -1] / 2).softmax(-1)
    drawn = generate(ours, [[7, 3]] * 4000, max_new_tokens=1, temperature=2.0, seed=1)
    counts = torch.bincount(torch.tensor([row[-1] for row in drawn]), minlength=VOCAB) / 4000
    assert (counts - exact).abs().max() < 0.03


def test_the_seed_decides_and_the_global_generator_is_untouched() -> None:
    _, ours = pair("llama")
    before = torch.get_rng_state()
    first = generate(ours, PROMPTS, max_new_tokens=NEW, seed=7)
    assert generate(ours, PROMPTS, max_new_tokens=NEW, seed=7) == first
    assert generate(ours, PROMPTS, max_new_tokens=NEW, seed=8) != first
    generate(ours, PROMPTS, max_new_tokens=NEW, temperature=1.0)
    assert torch.equal(before, torch.get_rng_state())


def test_chance_is_off_unless_something_asks_for_it() -> None:
    for options in ({}, {"repetition_penalty": 1.2}, {"temperature": 0.0, "seed": 0}):
        assert Sampler(**options).effective_temperature == 0.0, options
    for options in ({"seed": 0}, {"top_k": 5}, {"top_p": 0.9}):
        assert Sampler(**options).effective_temperature == 1.0, options
    assert Sampler(temperature=0.4).effective_temperature == 0.4


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -1.0),
        ("temperature", 1e-40),
        ("temperature", 9e-4),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("top_k", 0),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", "1.2"),
        ("seed", -1),
        ("seed", True),
        ("max_new_tokens", -1),
        ("max_new_tokens", 1.5),
    ],
)
def test_options_out_of_range_are_named(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=option):
        generate(pair("gpt2")[1], [1, 2], **{option: value})


# ------------------------------------------------------------------------------------------------ text


@cache
def talker(**overrides: Any) -> Model:
    """A random causal model with the word-piece tokenizer of the tiny tests."""
    return build(
        "llama", "tiny", tokenizer=tiny.tokenizer(), seed=1, num_layers=2, hidden_size=32, num_heads=4,
        max_positions=48, initializer_range=0.5, **overrides,
    )  # fmt: skip


def test_text_in_text_out_alone_and_in_a_batch() -> None:
    texts = ["the red cat", "the old dog sat on the mat", "a"]
    found = generate(talker(), texts, max_new_tokens=9)
    assert [generate(talker(), text, max_new_tokens=9) for text in texts] == found
    assert all(
        text.startswith(prompt) and len(text) > len(prompt)
        for prompt, text in zip(texts, found, strict=True)
    )


def test_prompts_begin_as_documents_and_stay_open() -> None:
    """Text is framed with the bos of the tokenizer and no eos."""
    tokenizer = tiny.tokenizer()
    ids = [*tokenizer.prefix, *tokenizer.encode("the red cat")]
    assert ids[0] == tokenizer.bos_id
    whole = generate(talker(), ids, max_new_tokens=6)
    assert tokenizer.decode(whole) == generate(talker(), "the red cat", max_new_tokens=6)


def test_forms_of_prompts() -> None:
    _, ours = pair("gpt2")
    one = generate(ours, PROMPTS[0], max_new_tokens=4)
    assert isinstance(one, list) and isinstance(one[0], int)
    row = generate(ours, torch.tensor(PROMPTS[0]), max_new_tokens=4)
    assert row.tolist() == one
    table = generate(ours, torch.tensor([PROMPTS[0], PROMPTS[0][::-1]]), max_new_tokens=4)
    assert table.shape[0] == 2 and table[0, : len(one)].tolist() == one
    assert generate(ours, [PROMPTS[0]], max_new_tokens=0) == [PROMPTS[0]]
    assert generate(ours, (tuple(PROMPTS[0]), torch.tensor(PROMPTS[0])), max_new_tokens=0) == [
        PROMPTS[0],
        PROMPTS[0],
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        5,
        3.5,
        None,
        b"text",
        [],
        [[]],
        [True, False],
        [1, "a"],
        [1.5],
        ["a", 1],
        [["a"]],
        [[1.5]],
        [[1, None]],
        [[True]],
        [b"text"],
        {1: 2}.values(),
        torch.ones(2, 2, 2).long(),
        torch.ones(3),
        torch.ones(3).bool(),
        torch.tensor(3),
        [torch.ones(3)],
        [torch.ones(2, 2).long()],
    ],
    ids=repr,
)
def test_what_is_no_prompt_is_named(wrong: Any) -> None:
    if type(wrong).__name__ == "dict_values":  # any iterable of ids will do
        assert generate(pair("gpt2")[1], wrong, max_new_tokens=0) == [2]
        return
    with pytest.raises(ModelError, match="Prompt"):
        generate(pair("gpt2")[1], wrong, max_new_tokens=0)


def test_what_is_no_text_is_named() -> None:
    for wrong in (5, None, [1], ["a", None], b"a", [["a"]]):
        with pytest.raises(ModelError, match="list of texts"):
            embed(talker(), wrong)  # type: ignore[arg-type]


def test_the_coldest_temperature_still_draws() -> None:
    _, ours = pair("gpt2")
    greedy = generate(ours, PROMPTS[0], max_new_tokens=4, temperature=0)
    assert generate(ours, PROMPTS[0], max_new_tokens=4, temperature=1e-3, seed=0) == greedy


def test_special_tokens_and_empty_rows_are_never_drawn() -> None:
    """The vocabulary is larger than the tokenizer, and pad, mask and bos are no text."""
    tokenizer = tiny.tokenizer()
    model = build(
        "gpt2", "tiny", tokenizer=tokenizer, vocab_size=len(tokenizer) + 70, max_positions=48
    )
    drawn = generate(model, [[7, 8]] * 200, max_new_tokens=8, temperature=5.0, seed=0)
    assert max(max(row) for row in drawn) < len(tokenizer)
    added = banned(100, 90, [3], torch.device("cpu"))
    assert added is not None and added[3] == -math.inf and added[95] == -math.inf and added[4] == 0
    seen: list[str] = []
    for seed in range(20):
        text = generate(model, "the", max_new_tokens=20, temperature=5.0, seed=seed)
        seen.append(text)
    names = [tokenizer.roles[role] for role in ("pad", "mask", "bos")]
    assert not any(name in text for name in names for text in seen)


def test_stop_texts_cut_also_inside_a_token() -> None:
    model = talker()
    whole = generate(model, "the red cat", max_new_tokens=12)
    added = whole[len("the red cat") :]
    for start in (3, 7, len(added) - 4):
        stop = added[start : start + 3]
        cut = generate(model, "the red cat", max_new_tokens=12, stop=["never there", stop])
        assert cut == "the red cat" + added[: added.index(stop)]
    both = generate(model, ["the red cat", "a dog"], max_new_tokens=12, stop=added[3:6])
    assert both[0] == "the red cat" + added[: added.index(added[3:6])]
    assert both[1] == generate(model, "a dog", max_new_tokens=12, stop=added[3:6])


def test_stops_at_any_of_several_ends() -> None:
    _, ours = pair("gpt2")
    plain = generate(ours, PROMPTS[0], max_new_tokens=NEW)
    third = plain[len(PROMPTS[0]) + 2]
    ours.generation_config["eos_token_id"] = [5, third]
    try:
        cut = generate(ours, PROMPTS[0], max_new_tokens=NEW)
    finally:
        ours.generation_config.clear()
    assert cut == plain[: plain.index(third, len(PROMPTS[0])) + 1]


@pytest.mark.parametrize("ends", ["</s>", {"id": 5}, [None], [[5]], [True, 2.5], 1e400, []])
def test_ends_that_are_no_ids_are_passed_over(ends: Any) -> None:
    model = talker()
    plain = generate(model, "the red cat", max_new_tokens=6)
    model.generation_config["eos_token_id"] = ends
    try:
        assert generate(model, "the red cat", max_new_tokens=6) == plain
        model.generation_config["eos_token_id"] = [None, 7, "x", 10**9]
        assert model.end_ids() == [7]
    finally:
        model.generation_config.clear()


def test_positions_end_with_one_counted_line(capsys: pytest.CaptureFixture[str]) -> None:
    _, ours = pair("gpt2")
    prompts = [[7] * 60, [8, 9], [7] * 64]
    found = generate(ours, prompts, max_new_tokens=100)
    said = capsys.readouterr().err
    assert re.fullmatch(r"[1-3] of 3 texts ended early: the model has 64 positions.\n", said)
    assert max(map(len, found)) <= 64 and found[2] == prompts[2]
    assert found == [generate(ours, p, max_new_tokens=100) for p in prompts]


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ([7] * 65, "64 positions"),
        ([1, 61], "61"),
        ([-1, 2], "-1"),
        ([[1], []], "Prompt 1 is empty"),
    ],
)
def test_impossible_prompts_are_named(prompt: Any, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        generate(pair("gpt2")[1], prompt)


def test_what_a_model_cannot_do_is_said() -> None:
    with pytest.raises(ModelError, match="tokenizer"):
        generate(pair("gpt2")[1], "text")
    with pytest.raises(ModelError, match="tokenizer"):
        generate(pair("gpt2")[1], [1], stop="x")
    with pytest.raises(ModelError, match="fill_mask"):
        generate(build("bert", "tiny", vocab_size=50), [1, 2])
    with pytest.raises(ModelError, match="generate"):
        fill_mask(talker(), "the [MASK]")
    broken = build("gpt2", "tiny", vocab_size=50)
    with torch.no_grad():
        broken.backbone.embeddings()[0].weight.fill_(math.nan)
    with pytest.raises(ModelError, match="not finite"):
        generate(broken, [1, 2])


def test_modes_are_restored_and_training_goes_on() -> None:
    model = build("llama", "tiny", vocab_size=50, max_positions=32)
    model.train()
    model.backbone.layers[0].eval()
    generate(model, [1, 2, 3], max_new_tokens=3)
    assert (
        model.training
        and not model.backbone.layers[0].training
        and model.backbone.layers[1].training
    )
    model({"input_ids": torch.tensor([[1, 2, 3, 4]])}).sum().backward()


# ------------------------------------------------------------------------------------ masks and vectors


@cache
def bert(family: str = "bert") -> Model:
    return build(
        family, "tiny", tokenizer=tiny.tokenizer(), seed=2, num_layers=2, hidden_size=32, num_heads=4,
        max_positions=48, initializer_range=0.3,
    )  # fmt: skip


def test_fill_mask_equals_the_pipeline_of_transformers(tmp_path: Any) -> None:
    model = bert()
    tiny.tokenizer().save(tmp_path)
    config = transformers.BertConfig(
        **{k: v for k, v in model.hf_config().items() if "dtype" not in k}
    )
    theirs = transformers.BertForMaskedLM(config).eval()
    missing = theirs.load_state_dict(model.disk_state(), strict=False)
    assert not missing.unexpected_keys
    theirs.tie_weights()
    pipe = transformers.FillMaskPipeline(
        model=theirs, tokenizer=transformers.AutoTokenizer.from_pretrained(tmp_path), device="cpu"
    )
    for text in ("the [MASK] cat sat", "the [MASK] cat [MASK] on"):
        expected, found = pipe(text, top_k=4), fill_mask(model, text, top_k=4)
        if text.count("[MASK]") == 1:
            expected, found = [expected], [found]
        for a, b in zip(expected, found, strict=True):
            assert [x["token"] for x in a] == [x["token_id"] for x in b]
            assert [x["score"] for x in a] == pytest.approx([x["score"] for x in b], rel=1e-4)
            assert [x["token_str"] for x in a] == [x["token"] for x in b]
            if len(found) == 1:
                assert [x["sequence"] for x in a] == [x["sequence"] for x in b]


def test_fill_mask_reads_every_spelling_of_the_mask() -> None:
    own = tiny.tokenizer().roles["mask"]
    answers = [fill_mask(bert(), f"the {mask} cat sat") for mask in (own, "[MASK]", "<mask>")]
    assert answers[0] == answers[1] == answers[2] and len(answers[0]) == 5
    assert fill_mask(bert(), ["the [MASK]", "a [MASK] b"])[0] == fill_mask(bert(), "the [MASK]")
    with pytest.raises(ModelError, match="no mask"):
        fill_mask(bert(), "nothing to fill")
    with pytest.raises(ConfigError, match="top_k"):
        fill_mask(bert(), "the [MASK]", top_k=0)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_vectors_do_not_depend_on_neighbours(family: str, pooling: Any) -> None:
    model = bert() if family == "bert" else talker()
    texts = ["the red cat sat on the mat and looked", "a", "the old dog", "fox fox fox fox"]
    if family == "llama" and pooling == "first":
        with pytest.raises(ModelError, match="first token"):
            embed(model, texts, pooling=pooling)
        return
    together = embed(model, texts, pooling=pooling, batch_size=3)
    alone = torch.cat([embed(model, text, pooling=pooling) for text in texts])
    assert together.shape == (4, 32)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_mean_is_over_real_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = bert(), tiny.tokenizer()
    ids = tokenizer.frame(tokenizer.encode("the old dog"))
    with torch.no_grad():
        exact = model.eval().backbone({"input_ids": torch.tensor([ids])}).mean(1)
    torch.testing.assert_close(
        embed(model, ["the old dog", "the " * 20])[:1], exact, rtol=1e-5, atol=1e-5
    )
    assert embed(model, "a dog", normalize=True).norm().item() == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="pooling"):
        embed(model, "a", pooling="mex")
    capsys.readouterr()
    embed(model, ["the " * 200, "a"])
    assert capsys.readouterr().err.startswith("1 of 2 texts")


def test_a_mask_stands_for_a_word_with_its_blank() -> None:
    """Byte-level words begin with a blank; a mask that left it behind would be seen nowhere in training."""
    tokenizer = train_from_texts(tiny.TEXTS, "bpe", vocab_size=300)
    assert tokenizer.mask_id is not None
    model = build("bert", "tiny", tokenizer=tokenizer, num_layers=1, hidden_size=16, num_heads=2)
    ids = tokenizer.encode("the red <mask> sat")
    assert ids[2:] == [tokenizer.mask_id, *tokenizer.encode(" sat")]
    word = tokenizer.encode(" cat")
    found = fill_mask(model, "the red [MASK] sat", top_k=len(tokenizer))
    sequence = next(item["sequence"] for item in found if item["token_id"] == word[0])
    assert sequence == "the red cat sat"


def test_compiled_blocks_make_no_graph_for_every_length() -> None:
    """The compiler would meet another shape and another cache at each step, and give up after eight."""
    from torch._dynamo.utils import counters

    from tiny import objective

    model = objective().model
    plain = model.generate("a", max_new_tokens=20)
    model.backbone.compile_blocks(backend="eager")
    counters.clear()
    assert model.generate("a", max_new_tokens=20) == plain
    assert not counters["frames"]
    model.backbone({"input_ids": torch.zeros(1, 4, dtype=torch.long)})
    assert counters["frames"]["ok"] > 0, "the blocks are not compiled at all"
    model.backbone.plain_blocks()
