"""What is the name of a model on the Hub, and what is a path."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.utils.hub_names import HubName, hub_hint, hub_name

_PART = st.text("abzAZ09_", min_size=1, max_size=9)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("org/name", HubName("org/name", path="org/name")),
        ("org/name@v1.0", HubName("org/name", "v1.0", path="org/name@v1.0")),
        ("hub:org/name", HubName("org/name")),
        ("hub:gpt2@refs/pr/1", HubName("gpt2", "refs/pr/1")),
        ("gpt2", None),
        ("runs/a/checkpoint-5", None),
        ("./org/name", None),
        ("/org/name", None),
        ("../name", None),
        ("org/..", None),
        ("hub:org/name@../../x", None),
        ("a model", None),
        ("", None),
    ],
)
def test_names_and_paths(text, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name(text) == found


def test_what_exists_is_a_path_and_so_is_what_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    assert hub_name("org/name") is None  # a mistyped path asks no network
    assert "hub:org/name" in hub_hint("org/name")
    assert hub_name("hub:org/name") == HubName("org/name")
    (tmp_path / "other").symlink_to(tmp_path / "nowhere")
    (tmp_path / "dir@v1").mkdir()
    assert hub_hint("/x/y") == hub_hint("hub:x/y") == ""


@given(_PART, _PART, st.none() | st.text("0123456789abcdef", min_size=40, max_size=40))
def test_a_spelled_name_is_read_back(owner, name, revision):
    made = HubName(f"{owner}/{name}", revision)
    assert hub_name(str(made)) == made
