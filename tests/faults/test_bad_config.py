"""Settings files that are broken, hostile or absurd: one clear error each, quickly, and before memory is taken."""

from __future__ import annotations

import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import RunConfig
from pretrain.config.strict_yaml import parse
from pretrain.errors import ConfigError, PretrainError

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)
HOSTILE = {
    "billion_laughs": (BOMB, "anchors"),
    "alias_to_itself": ("a: &x [*x]\n", "anchors"),
    "merge_key": ("<<: {optim: {lr: 1}}\n", "'<<' is not a setting"),
    "python_object": ("data: !!python/object/apply:os.system ['echo hi']\n", "tag"),
    "python_name": ("data: !!python/name:os.system\n", "tag"),
    "custom_tag": ("data: !include /etc/passwd\n", "tag"),
    "binary_tag": ("data: !!binary aGVsbG8=\n", "tag"),
    "str_tag": ("data: !!str hello\n", "tag"),
    "tag_directive": ("%TAG ! tag:x.org,2000:\n---\ndata: 1\n", "TAG"),
    "two_documents": ("data: {}\n---\noptim: {}\n", "one document"),
    "duplicate_section": ("optim: {lr: 1}\noptim: {lr: 2}\n", "given twice"),
    "duplicate_key": ("optim:\n  lr: 1\n  lr: 2\n", "given twice"),
    "deep": ("data: " + "[" * 5000 + "]" * 5000, "deeper"),
    "deep_mapping": ("".join(" " * i + f"k{i}:\n" for i in range(40)), "deeper"),
    "huge_number": ("train: {seed: " + "9" * 100_000 + "}\n", "digits"),
    "complex_key": ("? [a, b]\n: 1\n", "key"),
    "null_key": ("~: 1\n", "key"),
    "tab": ("optim:\n\tlr: 1\n", "YAML"),
    "unclosed": ("optim: {lr: 1\n", "YAML"),
    "bare_list": ("- a\n- b\n", "sections"),
    "bare_word": ("hello\n", "sections"),
    "not_yaml": ("{'a': 1,, }", "YAML"),
    "control": ("optim: \x07\n", "YAML"),
    "auto_map": ("auto_map: {AutoModel: evil.Model}\n", "'auto_map' is not a setting"),
    "attn": ("model: {_attn_implementation: evil/kernel}\n", "model._attn_implementation"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_once(name: str, tmp_path: Path) -> None:
    text, part = HOSTILE[name]
    path = tmp_path / "c.yaml"
    path.write_text(text)
    tracemalloc.start()
    start = time.monotonic()
    try:
        with pytest.raises(ConfigError) as caught:
            RunConfig.load(path)
        assert part in str(caught.value), str(caught.value)
        assert len(str(caught.value)) < 600
        assert time.monotonic() - start < 1.0 and tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_empty_file_is_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for text in ("", "# nothing\n", "---\n", "optim:\n"):
        path.write_text(text)
        assert RunConfig.load(path) == RunConfig()


def test_files_that_are_no_files(tmp_path: Path) -> None:
    def refuse(path: Path, part: str) -> None:
        with pytest.raises(ConfigError, match=part):
            RunConfig.load(path)

    (tmp_path / "gpt-small.yaml").write_text("")
    refuse(tmp_path / "gpt-smal.yaml", r"no config file .*Did you mean 'gpt-small.yaml'")
    refuse(tmp_path / "no" / "where.yaml", "no config file")
    refuse(tmp_path, "directory")
    refuse(Path("/dev/zero"), "not a regular file")
    os.mkfifo(tmp_path / "pipe")
    refuse(tmp_path / "pipe", "not a regular file")
    (tmp_path / "latin").write_bytes(b"data:\n  train: caf\xe9\n")
    refuse(tmp_path / "latin", "not UTF-8.*byte 18")
    (tmp_path / "large").write_bytes(b"#" * (1 << 20) + b"\n")
    refuse(tmp_path / "large", "1,048,577 bytes")
    (tmp_path / "nul").write_bytes(b"data: \x00\n")
    refuse(tmp_path / "nul", "YAML")
    for wrong in (3, [1], b"x", RunConfig):
        with pytest.raises(ConfigError, match="YAML file or a dict"):
            RunConfig.load(wrong)  # type: ignore[arg-type]


def test_yaml_numbers() -> None:
    """YAML 1.2: what looks like a number is one, and nothing else is."""
    expected: dict[str, Any] = {
        "2e-5": 2e-5,
        "1E9": 1e9,
        "1e9": 1e9,
        ".5": 0.5,
        "5.": 5.0,
        "-1.5e+3": -1500.0,
        "6e-4": 6e-4,
        "010": 10,
        "0o10": 8,
        "0x1F": 31,
        "+3": 3,
        "-0": 0,
        "12:30:45": "12:30:45",
        "12:30": "12:30",
        "1_000": "1_000",
        "0b11": "0b11",
        "1e": "1e",
        "e5": "e5",
        "1.2.3": "1.2.3",
        "on": "on",
        "off": "off",
        "yes": "yes",
        "no": "no",
        "y": "y",
        "True": True,
        "FALSE": False,
        "true": True,
        "tRUE": "tRUE",
        "null": None,
        "~": None,
        "2024-01-01": "2024-01-01",
        "'010'": "010",
        '"2e-5"': "2e-5",
        "=": "=",
        "NaN": "NaN",
        "-.inf": float("-inf"),
    }
    for text, value in expected.items():
        found = parse(f"key: {text}")[0]["key"]
        assert found == value and type(found) is type(value), (text, found)
    assert parse("key: .nan")[0]["key"] != parse("key: .nan")[0]["key"]


ABSURD = [
    {"hidden_size": 1 << 31},
    {"vocab_size": 1 << 40},
    {"num_layers": 10**9},
    {"hidden_size": 0},
    {"hidden_size": -64},
    {"num_heads": 0},
    {"num_layers": 2.5},
    {"hidden_size": 100_000, "num_heads": 1000, "num_layers": 4000},
    {"max_positions": 1 << 40},
    {"hidden_siz": 64},
]


@pytest.mark.parametrize("overrides", ABSURD, ids=str)
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "bert"])
def test_absurd_sizes_are_refused_before_memory_is_taken(
    family: str, overrides: dict[str, Any]
) -> None:
    from pretrain.models import build, family_class

    def from_settings() -> None:
        model = {"family": family, "size": "tiny", "overrides": overrides}
        config = RunConfig.load({"model": model}).model
        build(config.family, config.size, **config.overrides)

    family_class(family)  # what the import takes is not counted
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError) as caught:
            from_settings()
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()
    assert any(key in str(caught.value) for key in overrides) or "parameters" in str(caught.value)


WORDS = st.sampled_from(
    ["optim", "lr", "train", "limit", "data", "betas", "model", "overrides", "objective", "x"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(WORDS, VALUES, max_size=4))
def test_random_settings_give_a_config_or_a_named_error(raw: dict[str, Any]) -> None:
    message = ""
    try:
        config = RunConfig.load(raw)
        assert RunConfig.load(config) == config
    except PretrainError as found:
        message = str(found)
    assert len(message) < 1000
