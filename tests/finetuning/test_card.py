"""Model cards of fine-tuned models: their code runs, and their metadata are those that the Hub accepts."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
import yaml

import pretrain
from finetuning.conftest import QUICK, model_of, rows_of, texts
from pretrain.checkpoint.licences import card_terms, licence_fields
from pretrain.checkpoint.model_card import base_model
from pretrain.data.tables import Table
from pretrain.finetuning.card import example_input
from pretrain.objectives.audio_classification import AudioClassification
from pretrain.objectives.captioning import Captioning
from pretrain.objectives.classification import Classification
from pretrain.objectives.object_detection import ObjectDetection

transformers.logging.set_verbosity_error()
TEXTS = [text for text, _ in texts(40)]
TURNS = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def conversation(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": text[:9]}]


ROWS: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "classification": ("bert", rows_of(40), {}),
    "classification of pairs": ("bert", [{**row, "pair": "a red box"} for row in rows_of(40)], {}),
    "regression": ("bert", [{"text": t, "label": len(t) / 9} for t in TEXTS], {}),
    "token-classification": (
        "bert",
        [{"tokens": t.split(), "label": ["O"] * (len(t.split()) - 1) + ["B-X"]} for t in TEXTS],
        {},
    ),
    "question-answering": (
        "bert",
        [{"question": "who?", "context": t, "answers": t.split()[0]} for t in TEXTS],
        {},
    ),
    "chat": ("gpt2", [{"messages": conversation(t)} for t in TEXTS], {"chat_template": TURNS}),
    "preference": (
        "gpt2",
        [{"prompt": t, "chosen": "the cat", "rejected": "the dog"} for t in TEXTS],
        {"chat_template": TURNS},
    ),
    "language-modelling": ("gpt2", [{"text": t} for t in TEXTS], {}),
    "language-modelling of an encoder": ("bert", [{"text": t} for t in TEXTS], {}),
    "embedding": ("bert", [{"anchor": t, "positive": t[4:]} for t in TEXTS], {}),
}


def run_code(card: str, place: Path) -> list[str]:
    """Execute every Python block of a card where the model lies, and return the blocks."""
    blocks = re.findall(r"```python\n(.*?)```", card, re.S)
    for block in blocks:
        exec(compile(block.replace("path/to/this/directory", str(place)), "README.md", "exec"), {})
    return blocks


@pytest.mark.parametrize("name", ROWS)
def test_the_code_of_the_card_runs(name: str, tmp_path: Path) -> None:
    family, rows, options = ROWS[name]
    start = model_of(family).save(tmp_path / "start")
    task = name.partition(" ")[0]
    found = pretrain.finetune(str(start), rows, task, out=tmp_path / "run", **{**QUICK, **options})
    card = (tmp_path / "run" / "model" / "README.md").read_text("utf-8")
    blocks = run_code(card, tmp_path / "run" / "model")
    assert blocks and '"..."' not in card and "base_model" not in card
    row = found.data.valid.row(0)
    words = re.findall(r"[a-z]{3,}", str(row.get("messages", [row])[0]))
    assert any(word in blocks[0] for word in words if word not in ("role", "user", "content"))


@pytest.mark.parametrize("family", ["gpt2", "bert", "bert without a head"])
def test_the_code_of_a_card_of_pre_training_runs(family: str, tmp_path: Path) -> None:
    name, bare, _ = family.partition(" ")
    place = model_of(name, **({"head": None} if bare else {})).save(tmp_path / "model")
    assert len(run_code((place / "README.md").read_text(), place)) == 1


@pytest.mark.parametrize(
    ("task", "columns", "wanted"),
    [
        (ObjectDetection, ("image", "boxes", "label", "image_size"), '"photo.jpg"'),
        (AudioClassification, ("audio", "sampling_rate", "label"), '"recording.wav"'),
        (Captioning, ("image", "question", "text"), '{"image": "photo.jpg", "question": "x"}'),
        (Captioning, ("image", "text"), '"photo.jpg"'),
        (Classification, ("text", "pair", "label"), '{"text": "x", "pair": "x"}'),
    ],
)
def test_the_example_asks_for_what_an_answer_needs(
    task: Any, columns: tuple[str, ...], wanted: str
) -> None:
    table = Table("rows", {name: ["x"] for name in columns})
    data = SimpleNamespace(train=table, valid=table)
    result: Any = SimpleNamespace(task=task.__new__(task), data=data)
    assert example_input(result) == wanted


def test_only_a_name_of_the_hub_is_a_base_model() -> None:
    for path in ("", "a model", "runs/books-bert", "runs/x/checkpoint-4", "/home/me/bert", "bert"):
        assert base_model(path) is None
    assert base_model("hub:org/bert@abc123") == "org/bert"
    assert base_model("hub:bert-base-uncased@abc123") == "bert-base-uncased"
    cached = "/cache/models--google--bert_uncased_L-2/snapshots/30b0"
    assert base_model(cached) == "google/bert_uncased_L-2"


def test_a_licence_that_the_hub_does_not_list_is_other() -> None:
    assert licence_fields({"license": "MIT"}) == {"license": "mit"}
    assert licence_fields({"license": "PSF-2.0"}) == {
        "license": "other",
        "license_name": "psf-2.0",
        "license_link": "https://docs.python.org/3/license.html",
    }
    own = {"license": "other", "license_name": "own-1", "license_link": "https://own.org"}
    assert licence_fields(own) == own and licence_fields({}) == licence_fields({"license": 3}) == {}


def test_the_card_of_the_built_in_text_is_accepted_by_the_hub(hub: Any) -> None:
    model = model_of("gpt2")
    model.extra_config["pretrain"] = {
        "sources": [{"name": "python", "licence": "PSF-2.0"}],
        "parent": "hub:org/base@abc123",
    }
    model.push_to_hub("org/gpt2")
    repository = hub.repositories["org/gpt2"]
    card = repository.commits[repository.refs["main"]]["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "org/base"
    assert card_terms(card)["license_name"] == "psf-2.0" and "| python | PSF-2.0 |" in card
    assert 'pretrain.load("org/gpt2")' in card


def test_terms_are_read_from_any_card() -> None:
    assert card_terms("---\r\nlicense: mit\r\nlanguage: [en, de]\r\n---\r\n# x") == {
        "license": "mit",
        "language": ["en", "de"],
    }
    for card in ("", "# x", "---\n- a\n---\n", "---\nlicense: &a mit\nother: *a\n---\n", "---\nx"):
        assert card_terms(card) == {}
    assert card_terms("---\nlicense: [mit]\nlanguage: [1]\nlicense_link: 'a\x07'\n---\n") == {}


def test_licence_and_languages_of_the_base_are_carried_on(hub: Any, tmp_path: Path) -> None:
    source = model_of().save(tmp_path / "source")
    about = (
        "license: other\nlicense_name: own-1\nlicense_link: LICENSE.txt\nlanguage:\n- en\n- de\n"
    )
    (source / "README.md").write_text(f"---\n{about}---\n# The base\n")
    (source / "manifest.json").unlink()
    commit = hub.add("org/bert", source)
    clf = pretrain.finetune("org/bert", rows_of(40), "classification", out="clf", **QUICK)
    head = yaml.safe_load(Path("clf/model/README.md").read_text().split("---\n")[1])
    assert head["base_model"] == "org/bert" and head["language"] == ["en", "de"]
    link = f"https://huggingface.co/org/bert/blob/{commit}/LICENSE.txt"
    assert (head["license"], head["license_name"], head["license_link"]) == ("other", "own-1", link)
    assert clf.model.extra_config["pretrain"]["license_link"] == link
    # And through a second run, which starts from a directory of this machine.
    pretrain.finetune("clf", rows_of(40, seed=1), "classification", out="again", **QUICK)
    head = yaml.safe_load(Path("again/model/README.md").read_text().split("---\n")[1])
    assert head["license_link"] == link and "base_model" not in head
    assert clf.push_to_hub("org/clf").startswith(hub.url)
