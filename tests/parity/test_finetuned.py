"""A fine-tuned model in transformers: it opens without complaint, knows its labels, and answers the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import pretrain
from finetuning.conftest import ANIMALS, QUICK, model_of, rows_of
from pretrain.data.tables import read_table
from pretrain.errors import DataError

FAMILIES = ("bert", "roberta", "modernbert", "gpt2", "llama", "qwen3")
TEXTS = ["the red cat", "a dog", "and the old sly fox looked at the box on the log", "cat"]
PAIRS = ["on the mat", "the big box and the red log sat", "a", "the cat"]


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def tune(model: Any, rows: Any, out: Path, task: str = "classification", **given: Any) -> Any:
    return pretrain.finetune(
        model, rows, task, **({**QUICK, "out": out, "limit": "4 steps"} | given)
    )


def opened(path: Path) -> Any:
    """The model and the tokenizer of a directory, as a user opens them."""
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        path, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], (kind, info[kind])
    return model.eval(), transformers.AutoTokenizer.from_pretrained(path)


def theirs(path: Path, pairs: Any = None) -> torch.Tensor:
    model, tokenizer = opened(path)
    with torch.no_grad():
        return model(**tokenizer(TEXTS, pairs, padding=True, return_tensors="pt")).logits.float()


def start(family: str) -> Any:
    more = {"num_kv_heads": 1} if family in ("llama", "qwen3") else {}
    return model_of(family, initializer_range=0.3, **more)


@pytest.mark.parametrize("paired", [False, True], ids=["texts", "pairs"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_answers_are_the_same(family: str, paired: bool, tmp_path: Path) -> None:
    rows = [{**r, **({"pair": "the big log"} if paired else {})} for r in rows_of(24)]
    result = tune(start(family), rows, tmp_path / "run")
    path = result.save(tmp_path / "saved")
    given = [
        {"text": t, "pair": p} if paired else {"text": t} for t, p in zip(TEXTS, PAIRS, strict=True)
    ]
    table = read_table(given)
    chances = theirs(path, PAIRS if paired else None).softmax(-1)
    assert chances.std(0).max() > 1e-4, "texts must be told apart, or nothing is compared"
    config = opened(path)[0].config
    assert config.id2label == dict(enumerate(ANIMALS)) and config.label2id["fox"] == 2
    assert config.problem_type == "single_label_classification"
    for found, wanted in zip(result.task.predict(table), chances, strict=True):
        assert found["label"] == ANIMALS[int(wanted.argmax())]
        assert found["score"] == pytest.approx(float(wanted.max()), abs=1e-5)
    # The checkpoint of the run itself is such a directory, too.
    torch.testing.assert_close(
        theirs(result.run.best, PAIRS if paired else None).softmax(-1), chances
    )


def test_several_labels(tmp_path: Path) -> None:
    rows = [
        {"text": r["text"], "label": [r["label"], *["red"] * ("red" in r["text"])]}
        for r in rows_of(24)
    ]
    result = tune(start("bert"), rows, tmp_path / "run")
    path = result.save(tmp_path / "saved")
    assert opened(path)[0].config.problem_type == "multi_label_classification"
    chances = theirs(path).sigmoid()
    result.task.threshold = 0.0
    table = read_table([{"text": t} for t in TEXTS])
    for found, wanted in zip(result.task.predict(table), chances, strict=True):
        assert found["score"] == pytest.approx(wanted.tolist(), abs=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_regression(family: str, tmp_path: Path) -> None:
    rows = [{"text": r["text"], "label": 40.0 + len(r["text"])} for r in rows_of(24)]
    result = tune(start(family), rows, tmp_path / "run", "regression")
    path = result.save(tmp_path / "saved")
    config = opened(path)[0].config
    assert config.problem_type == "regression" and config.num_labels == 1
    table = read_table([{"text": t} for t in TEXTS])
    said = [found["score"] for found in result.task.predict(table)]
    assert said == pytest.approx(theirs(path).squeeze(-1).tolist(), abs=1e-4)


def saved_by_transformers(path: Path, labels: tuple[str, ...]) -> Path:
    """A classifier that transformers wrote."""
    ours = model_of().save(path.with_name("ours"))
    config = transformers.AutoConfig.from_pretrained(
        ours, id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(ours).save_pretrained(path)
    return path


def test_a_classifier_of_theirs_with_the_same_labels_is_kept(tmp_path: Path, capfd: Any) -> None:
    path = saved_by_transformers(tmp_path / "theirs", ANIMALS)
    before = theirs(path)
    result = tune(str(path), rows_of(24), tmp_path / "run", lr=1e-12, limit="1 steps", quiet=False)
    assert "newly initialised: none" in "".join(capfd.readouterr())
    torch.testing.assert_close(theirs(result.save(tmp_path / "saved")), before, rtol=0, atol=1e-4)


def test_a_classifier_of_theirs_with_other_labels_gets_a_new_last_layer(
    tmp_path: Path, capfd: Any
) -> None:
    path = saved_by_transformers(tmp_path / "theirs", ("good", "bad", "ugly", "other"))
    options: dict[str, Any] = {"lr": 1e-12, "limit": "1 steps", "quiet": False}
    with pytest.raises(
        DataError, match=r"'cat' is not among the classes of the checkpoint.*labels=\["
    ):
        tune(str(path), rows_of(24), tmp_path / "refused", **options)
    result = tune(str(path), rows_of(24), tmp_path / "run", labels=list(ANIMALS), **options)
    said = "".join(capfd.readouterr())
    assert (
        "newly initialised: head.classifier.bias, head.classifier.weight" in said
        and "head.transform" not in said
    )
    assert result.labels == ANIMALS and theirs(result.save(tmp_path / "saved")).shape == (4, 3)
    old, new = (
        opened(path)[0].bert.pooler.dense.weight,
        opened(tmp_path / "saved")[0].bert.pooler.dense.weight,
    )
    torch.testing.assert_close(old, new, rtol=0, atol=1e-6)


def test_a_decoder_without_padding_is_batched_by_transformers(tmp_path: Path) -> None:
    """Its id for the end of a text stands in, as transformers asks for one."""
    model = start("gpt2")
    path = Path(model.save(tmp_path / "start"))
    again = pretrain.load(path, quiet=True)
    again.tokenizer.roles.pop("pad", None)
    assert again.tokenizer.pad_id is None
    result = tune(again, rows_of(24), tmp_path / "run")
    saved = result.save(tmp_path / "saved")
    chances = theirs(saved).softmax(-1)
    table = read_table([{"text": t} for t in TEXTS])
    for found, wanted in zip(result.task.predict(table), chances, strict=True):
        assert found["score"] == pytest.approx(float(wanted.max()), abs=1e-5)
