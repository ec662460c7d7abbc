"""generation_config.json: what transformers' greedy search obeys gives the same tokens here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

import tiny
from inference.test_generate import HF, PROMPTS, VOCAB, pair
from pretrain.checkpoint import load
from pretrain.errors import ConfigError
from pretrain.inference.settings import DEFAULT_NEW_TOKENS, Settings
from pretrain.models import build
from pretrain.models.base import Model
from pretrain.utils import files

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
NEW = 12


def theirs_greedy(theirs: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """Each prompt alone, without what follows the end."""
    return [
        theirs.generate(torch.tensor([p]), do_sample=False, **options)[0].tolist() for p in prompts
    ]


@pytest.fixture
def both(request: Any) -> Any:
    theirs, ours = pair(request.param)
    yield theirs, ours
    ours.generation_config.clear()
    theirs.generation_config = transformers.GenerationConfig.from_model_config(theirs.config)


def same(
    both: tuple[Any, Model], config: dict[str, Any], prompts: Any = PROMPTS
) -> list[list[int]]:
    """Both read the configuration; greedy tokens are equal, alone and in a padded batch."""
    theirs, ours = both
    config = {"eos_token_id": 5, "pad_token_id": 0, "max_new_tokens": NEW} | config
    theirs.generation_config = transformers.GenerationConfig(**json.loads(json.dumps(config)))
    ours.generation_config.clear()
    ours.generation_config.update(config)
    expected = theirs_greedy(theirs, prompts)
    assert ours.generate(prompts, do_sample=False) == expected
    assert ours.generate(prompts, do_sample=False, use_cache=False) == expected
    return expected


CONFIGS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 3, "repetition_penalty": 0.7},
    {"min_new_tokens": 6, "eos_token_id": list(range(5, 40))},
    {"min_length": 9, "eos_token_id": list(range(5, 40))},
    {"max_length": 11, "max_new_tokens": None},
    {"max_length": 11, "max_new_tokens": 3},
    {"eos_token_id": [5, 6, 7, 8, 9, 10, 11, 12]},
    {"forced_eos_token_id": 5},
    {"forced_eos_token_id": [5, 9], "max_length": 10, "max_new_tokens": None},
    {"forced_bos_token_id": 7, "begin_suppress_tokens": [3]},
    {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.8, "min_p": 0.1},
]


@pytest.mark.parametrize("both", ["gpt2", "qwen3"], indirect=True)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_greedy_tokens_equal_those_of_transformers(both: Any, config: dict[str, Any]) -> None:
    same(both, config)


@pytest.mark.parametrize("both", ["gpt2"], indirect=True)
def test_of_two_biases_of_one_sequence_the_last_counts(both: Any) -> None:
    likely = same(both, {})[0][len(PROMPTS[0])]
    changed = same(both, {"sequence_bias": [[[likely], 30.0], [[likely], -30.0]]}, PROMPTS[:1])
    assert changed[0][len(PROMPTS[0])] != likely


@pytest.mark.parametrize("both", ["llama"], indirect=True)
def test_forbidden_tokens_and_sequences_equal_transformers(both: Any) -> None:
    """The tokens that come without a rule are those that the rules forbid."""
    plain = [row[len(p) :] for row, p in zip(same(both, {}), PROMPTS, strict=True)]
    often = plain[0][1]
    for config in (
        {"suppress_tokens": [often, plain[1][0], 4000]},
        {"begin_suppress_tokens": [row[0] for row in plain]},
        {"begin_suppress_tokens": [plain[1][1]], "forced_bos_token_id": plain[1][0]},
        {"bad_words_ids": [[often], plain[0][:2], plain[2][1:4], [5]]},
        {"sequence_bias": [[[often], -4.0], [plain[1][:2], 9.0], [plain[2][:2], -30.0]]},
        {"bad_words_ids": [plain[0][:3]], "no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
    ):
        assert same(both, config) != [p + r for p, r in zip(PROMPTS, plain, strict=True)]


def test_settings_of_config_json_are_read_where_there_is_no_other_file(tmp_path: Path) -> None:
    theirs = pair("llama")[0]
    theirs.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    rules = {
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 2,
        "suppress_tokens": [42],
        "min_length": 7,
    }
    (tmp_path / "config.json").write_text(json.dumps(config | rules))
    ours = load(tmp_path, quiet=True)
    ours.save(tmp_path / "again")
    for folder in (tmp_path, tmp_path / "again"):
        opened = type(theirs).from_pretrained(folder).eval()
        for prompt in PROMPTS:
            (expected,) = theirs_greedy(opened, [prompt], max_new_tokens=NEW)
            assert ours.generate(prompt, max_new_tokens=NEW) == expected
    (tmp_path / "generation_config.json").write_text("{}")
    assert load(tmp_path, quiet=True).generation_config == {}


ids = st.integers(0, VOCAB - 1)


@settings(max_examples=15, deadline=None, phases=[Phase.generate])
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "repetition_penalty": st.floats(0.5, 3),
            "no_repeat_ngram_size": st.integers(0, 4),
            "suppress_tokens": st.lists(ids, max_size=9),
            "begin_suppress_tokens": st.lists(ids, max_size=9),
            "bad_words_ids": st.lists(
                st.lists(ids, min_size=1, max_size=3), min_size=1, max_size=9
            ),
            "min_new_tokens": st.integers(0, 9),
            "min_length": st.integers(0, 12),
            "forced_eos_token_id": ids,
            "forced_bos_token_id": ids,
            "eos_token_id": st.lists(ids, min_size=1, max_size=4),
        },
    ),
    st.sampled_from(["gpt2", "llama"]),
)
def test_any_mixture_of_rules_equals_transformers(config: dict[str, Any], family: str) -> None:
    forced = {config.get("forced_eos_token_id"), config.get("forced_bos_token_id")} - {None}
    assume(not forced & set(config.get("suppress_tokens", [])))  # both refuse it
    theirs, ours = pair(family)
    before = theirs.generation_config
    try:
        same((theirs, ours), config, [[7, 3, 50], [4]])
    finally:
        ours.generation_config.clear()
        theirs.generation_config = before


def test_an_argument_goes_before_the_file_and_the_file_before_the_default() -> None:
    model = build("gpt2", "tiny", vocab_size=VOCAB, max_positions=200)

    def read(stored: dict[str, Any], **given: Any) -> Settings:
        model.generation_config = stored
        return Settings.read(model, given)

    assert read({}).new_tokens == DEFAULT_NEW_TOKENS and read({}).sampler.effective_temperature == 0
    stored = {"max_new_tokens": 7, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2}
    stored |= {"suppress_tokens": [3], "stop_strings": ["x"]}
    found = read(stored)
    assert (found.new_tokens, found.sampler.repetition_penalty, found.rules.no_repeat) == (
        7,
        1.2,
        2,
    )
    assert found.rules.suppressed == (3,) and found.stop == ("x",)
    own = {"max_new_tokens": 3, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    found = read(stored, **own, suppress_tokens=[], stop_strings=())
    assert (found.new_tokens, found.rules.none, found.stop) == (3, True, ())
    assert found.sampler.repetition_penalty == 1.0
    assert read({"max_length": 9}).budget(4) == 5
    assert read({"max_length": 9}, max_new_tokens=30).budget(4) == 30
    with pytest.raises(ConfigError, match=r"max_length of generation_config\.json is 9"):
        read({"max_length": 9}).budget(9)
    with pytest.raises(ConfigError, match="and max_length is 3,"):
        read({"max_length": 9}, max_length=3).budget(9)


@pytest.mark.parametrize("ends", ["2", [2, "3"], 2.0, True])
def test_ends_of_the_caller_that_are_no_ids_are_refused(ends: Any) -> None:
    """Those of a file are skipped, for anyone may have written it."""
    model = build("gpt2", "tiny", vocab_size=VOCAB, max_positions=200)
    with pytest.raises(ConfigError, match="eos_token_id"):
        model.generate([1, 2], eos_token_id=ends, max_new_tokens=1)
    model.generation_config = {"eos_token_id": ends}
    assert len(model.generate([1, 2], max_new_tokens=1)) == 3
    with pytest.raises(ConfigError, match="stop must be"):
        model.generate([1, 2], stop=5)


def test_a_file_that_asks_for_chance_is_obeyed_unless_the_caller_says_otherwise() -> None:
    model = build("gpt2", "tiny", vocab_size=VOCAB, max_positions=200)

    def sampler(stored: dict[str, Any], **given: Any) -> tuple[Any, ...]:
        model.generation_config = stored
        found = Settings.read(model, given).sampler
        return (
            (found.effective_temperature, found.top_k, found.top_p, found.min_p)
            if found.effective_temperature
            else ()
        )

    file = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}
    assert sampler(file) == (0.6, 20, 0.9, None)
    assert sampler({"do_sample": True}) == (1.0, 50, None, None)
    assert sampler({"do_sample": True, "top_k": 0}) == (1.0, None, None, None)
    assert sampler(file, temperature=0) == sampler(file, do_sample=False) == ()
    assert sampler(file, top_k=3, temperature=1.5) == (1.5, 3, 0.9, None)
    # Without do_sample the numbers of the file wait until the caller asks for chance, as in transformers.
    numbers = {"temperature": 0.6, "top_p": 0.9}
    assert sampler(numbers) == ()
    assert sampler(numbers, seed=1) == sampler(numbers, do_sample=True) == (0.6, None, 0.9, None)
    texts = [model.generate([1, 2], seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("stored", "word"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"do_sample": True, "typical_p": 0.5}, "typical_p"),
        ({"encoder_repetition_penalty": 1.4}, "encoder_repetition_penalty"),
        ({"num_beams": 1, "typical_p": 0.5, "early_stopping": True, "length_penalty": 2.0}, ""),
        ({"use_cache": False, "output_scores": True, "cache_implementation": "hybrid"}, ""),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_named(
    stored: dict[str, Any],
    word: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(files, "_PRINTED", set())
    model = build("gpt2", "tiny", vocab_size=VOCAB, max_positions=64)
    model.generation_config = stored | {"max_new_tokens": 1}
    for _ in range(2):
        model.generate([1, 2])
    said = capsys.readouterr().err
    assert said.count("not implemented") == bool(word) and word in said


@pytest.mark.parametrize(
    "stored",
    [
        {"repetition_penalty": "1.2"},
        {"repetition_penalty": 0},
        {"do_sample": True, "temperature": -1.0},
        {"do_sample": True, "top_p": 3},
        {"do_sample": "yes"},
        {"no_repeat_ngram_size": -1},
        {"suppress_tokens": ["a"]},
        {"bad_words_ids": [[]]},
        {"bad_words_ids": [[VOCAB]]},
        {"bad_words_ids": 3},
        {"sequence_bias": [[1, 2]]},
        {"sequence_bias": 5},
        {"max_new_tokens": 1.5},
        {"stop_strings": [1]},
        {"suppress_tokens": [4, 5], "forced_eos_token_id": 5},
        {"forced_eos_token_id": {"a": 1}},
    ],
    ids=str,
)
def test_values_of_the_file_that_are_none_are_errors(stored: dict[str, Any]) -> None:
    model = build("gpt2", "tiny", vocab_size=VOCAB, max_positions=64)
    model.generation_config = stored
    with pytest.raises(ConfigError, match=next(k for k in reversed(stored))):
        model.generate([1, 2])


def test_an_unknown_option_is_named_with_its_nearest() -> None:
    with pytest.raises(ConfigError, match="no_repeat_ngram_size"):
        pair("gpt2")[1].generate([1, 2], no_repeat_ngram=2)


def test_the_file_is_read_from_the_directory_and_kept_by_save(tmp_path: Path) -> None:
    model = build("llama", "tiny", tokenizer=tiny.tokenizer(), max_positions=64, seed=3)
    model.generation_config = {"repetition_penalty": 1.5, "stop_strings": ["dog"]}
    again = load(model.save(tmp_path), quiet=True)
    text = again.generate("the red cat")
    assert text == again.generate("the red cat", repetition_penalty=1.5, stop="dog")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.generation_config.repetition_penalty == 1.5
    assert set(HF) >= {"gpt2", "llama", "qwen3"}


def test_all_ends_of_config_json_hold_where_the_other_file_names_none(tmp_path: Path) -> None:
    """One of them did, as for a single end."""
    pair("llama")[0].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": [5, 6]}))
    for content, ends in (({"max_new_tokens": 9}, [5, 6]), ({"eos_token_id": 7}, [7])):
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
        assert load(tmp_path, quiet=True).end_ids() == ends


@pytest.mark.parametrize("content", ["{", "[]", "version https://git-lfs.github.com/spec/v1"])
def test_a_broken_file_is_named_and_left(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As transformers does; no weight needs it."""
    theirs = pair("llama")[0]
    theirs.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    ours = load(tmp_path, quiet=True)
    said = capsys.readouterr().err
    assert said.count("generation_config.json is damaged") == 1
    assert "opened without these generation settings" in said
    prompt = PROMPTS[0]
    assert (
        ours.generate(prompt, max_new_tokens=NEW)
        == theirs_greedy(theirs, [prompt], max_new_tokens=NEW)[0]
    )
