"""Captions and questions: targets, figures, answers beside those of transformers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image

import pretrain
from contract import check_objective_resumes, check_row_randomness, check_sums
from pretrain.data.images.scenes import make_scenes, rows_of
from pretrain.data.loader import row_rngs
from pretrain.data.tokenizer import Tokenizer, train_from_texts
from pretrain.errors import ConfigError, DataError, ModelError
from pretrain.objectives.captioning import Captioning

SCENES = rows_of(make_scenes(24, 5))
SIZES = {
    "num_layers": 1, "hidden_size": 48, "num_heads": 2, "image_size": 24, "patch_size": 8,
    "max_positions": 24, "dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [f"{row['question']} {row['text']}" for row in SCENES]
    return train_from_texts(texts, "wordpiece", vocab_size=110)


def task(tokenizer: Tokenizer, **options: Any) -> Captioning:
    return Captioning(pretrain.build("git", tokenizer=tokenizer, **SIZES), **options)


def table(rows: list[dict[str, Any]]) -> Any:
    return Captioning.read(rows)


@pytest.fixture(scope="module")
def tuned(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that knows most of four rows by heart."""
    return pretrain.finetune(
        pretrain.build("git", tokenizer=tokenizer, **SIZES), SCENES[:4], valid=SCENES[4:8],
        task="captioning", limit="120 steps", batch_rows=4, lr=3e-3, device="cpu", quiet=True,
        out=tmp_path_factory.mktemp("captions") / "run", eval_every="120 steps",
    )  # fmt: skip


def test_the_contract_of_objectives(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = task(tokenizer).encode(table(SCENES))
    check_sums(task(tokenizer), rows)
    check_row_randomness(task(tokenizer, crop=0.8), rows)
    check_row_randomness(task(tokenizer, word_dropout=0.4), rows)
    check_objective_resumes(lambda: task(tokenizer, crop=0.8), rows, tmp_path)
    goal = task(tokenizer).train()
    loss = goal(goal.collate([rows[i] for i in range(8)], row_rngs(0, "collate", 0, 8)))
    loss.total.backward()
    assert all(p.grad is not None for p in goal.parameters())


def test_the_targets_are_the_text_and_its_end(tokenizer: Tokenizer) -> None:
    goal = task(tokenizer)
    rows = goal.encode(table(SCENES[:2]))
    batch = goal.collate([rows[0], rows[1]], row_rngs(0, "x", 0, 2))
    for row, ids, labels in zip(SCENES, batch["input_ids"], batch["labels"], strict=False):
        words = [
            tokenizer.frame_texts([row[name]], framed=False)[0].ids for name in ("question", "text")
        ]
        whole = [tokenizer.bos_id, *words[0], *words[1], tokenizer.eos_id]
        assert ids[: len(whole) - 1].tolist() == whole[:-1]
        known = labels[labels != -100].tolist()
        assert known == [*words[1], tokenizer.eos_id]
        assert labels[len(words[0])] == words[1][0]  # what follows the question
    plain = goal.encode(table([{"image": row["image"], "text": row["text"]} for row in SCENES]))
    assert (plain[0]["labels"] != -100).all()


def test_word_dropout_hides_texts_and_leaves_questions_and_targets(tokenizer: Tokenizer) -> None:
    rows = task(tokenizer).encode(table(SCENES))
    rngs = row_rngs(0, "x", 0, len(rows))
    plain = task(tokenizer).collate(list(rows), rngs)
    goal = task(tokenizer, word_dropout=0.4)
    changed = goal.collate(list(rows), row_rngs(0, "x", 0, len(rows)))
    assert torch.equal(plain["labels"], changed["labels"])
    may = torch.zeros_like(plain["input_ids"], dtype=torch.bool)
    may[:, 1:] = plain["labels"][:, :-1] != -100
    hidden = plain["input_ids"] != changed["input_ids"]
    assert not bool((hidden & ~may).any())
    assert bool((changed["input_ids"][hidden] == goal.pad_id).all())
    assert 0.3 < float(hidden.sum() / may.sum()) < 0.5
    whole = goal.collate(list(rows), row_rngs(0, "x", 0, len(rows)), evaluation=True)
    assert torch.equal(whole["input_ids"], plain["input_ids"])
    with pytest.raises(ConfigError, match="word_dropout"):
        task(tokenizer, word_dropout=1.0)


def test_rows_that_just_fit_are_not_cut(tokenizer: Tokenizer) -> None:
    goal, image = task(tokenizer, max_length=5), SCENES[0]["image"]
    one, two = "describe", "describe describe"
    assert [len(ids) for ids in goal._ids([two, one])] == [2, 1]
    asked = [("", f"{two} {two}"), ("", f"{two} {two} {two}"), (two, two), (f"{two} {one}", one)]
    asked += [(f"{two} {two}", one)]
    for question, text in asked:
        row = {"image": image, "text": text} | ({"question": question} if question else {})
        found = goal.encode(table([row]))
        needed = sum(len(ids) for ids in goal._ids([question, text])) + 2
        if question == f"{two} {two}":
            assert found.dropped and not found.cut and not len(found)
        else:
            assert bool(found.cut) == (needed > 6) and not found.dropped
            assert len(found[0]["input_ids"]) == min(needed, 6) - 1


def test_what_a_batch_costs_is_the_same_in_parts(tokenizer: Tokenizer) -> None:
    goal = task(tokenizer)
    rows = goal.encode(table([SCENES[0], {**SCENES[1], "text": SCENES[1]["text"] + " red" * 5}]))
    parts = [goal.units(goal.collate([row], row_rngs(0, "x", 0, 1))) for row in rows]
    whole = goal.units(goal.collate([rows[0], rows[1]], row_rngs(0, "x", 0, 2)))
    patches = goal.model.backbone.config.num_patches
    assert whole == sum(parts) == sum(len(row["input_ids"]) + patches for row in rows)


def test_exact_texts_are_counted_without_writing_them(
    tuned: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [{"image": row["image"], "question": row["question"]} for row in SCENES[:8]]
    answers = [found["answer"] for found in tuned.predict(asked)]
    exact = np.mean([a == row["text"] for a, row in zip(answers, SCENES[:8], strict=True)])
    assert 0.25 <= exact < 1
    found = pretrain.evaluate(tuned.run.path, SCENES[:8])
    assert found["exact_match"] == pytest.approx(float(exact))
    one = tuned.predict(asked[0])
    assert one["answer"] == answers[0]
    again = [found["answer"] for found in tuned.predict(asked[::-1])]
    assert again == answers[::-1]  # whichever questions are answered together
    capsys.readouterr()
    assert isinstance(tuned.predict(SCENES[0]["image"])["answer"], str)
    assert "was trained with question (what is asked about the image)" in capsys.readouterr().err
    alone = {key: SCENES[0][key] for key in ("image", "text")}
    for ask in (lambda: tuned.predict(alone), lambda: pretrain.evaluate(tuned.run.path, [alone])):
        with pytest.raises(DataError, match="no column for question"):
            ask()
    mistake = tuned.errors(3)[0]
    assert mistake["label"] != mistake["predicted"] and mistake["score"] is None
    assert mistake["beside"] in {row["question"] for row in SCENES}


def test_texts_that_are_never_written_are_not_exact(tokenizer: Tokenizer) -> None:
    goal, image = task(tokenizer, max_new_tokens=4).eval(), SCENES[0]["image"]
    two = "describe describe"
    texts = [two, f"{two} {two}", "☃", f"{two} ☃", two.title(), f" {two}", " ".join([two] * 3)]
    texts += ["describe " * 30]
    found = goal.encode(table([{"image": image, "text": text} for text in texts]))
    batch = goal.collate(list(found), row_rngs(0, "x", 0, len(texts)), evaluation=True)
    reference = batch["labels"][batch["labels"] != -100]
    head: Any = goal.model.head  # made to say the reference, whatever it reads
    head.forward = lambda hidden: torch.nn.functional.one_hot(reference, 110).float()
    metrics = goal(batch).metrics
    assert float(metrics["exact"]) == 2 and float(metrics["rows"]) == len(texts)
    (spelled, long) = found.remarks
    assert found.remarks[spelled] == [2, 3, 4, 5, 7] and found.remarks[long] == [6]
    cut = task(tokenizer).encode(table([{"image": image, "text": " ".join(["red"] * 20)}]))
    assert cut.cut == [0] and not cut.remarks and not cut[0]["writable"]


def test_transformers_opens_the_directory_and_writes_the_same(tuned: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tuned.save(tmp_path / "saved")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    names = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    opened = pretrain.load(tmp_path / "saved", quiet=True)
    for row in SCENES[:4]:
        pixels = opened.processor.images([row["image"]])["pixel_values"]
        question = names(row["question"], add_special_tokens=False).input_ids
        ids = torch.tensor([[names.cls_token_id, *question]])
        made = theirs.eval().generate(
            pixel_values=pixels, input_ids=ids, max_new_tokens=16, do_sample=False
        )
        text = names.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
        asked = {"image": row["image"], "question": row["question"]}
        assert opened.predict(asked)["answer"] == text != ""


def test_what_cannot_be_used_is_refused_or_counted(tokenizer: Tokenizer) -> None:
    with pytest.raises(ModelError, match="family git"):
        Captioning(pretrain.build("gpt2", "tiny", tokenizer=tokenizer))
    model = pretrain.build("git", tokenizer=tokenizer, **SIZES | {"image_size": 16})
    assert Captioning(model).processor.size == (16, 16)
    goal, image = task(tokenizer), SCENES[0]["image"]
    rows = [
        {"image": image, "question": "describe", "text": " "},
        {"image": image, "question": "describe " * 30, "text": "red"},
        {"image": image, "question": "describe", "text": "red " * 40},
    ]
    found = goal.encode(table(rows))
    assert found.dropped["empty text"] == [0] and len(found) == 1
    assert any("no room for a text" in reason for reason in found.dropped)
    assert found.cut == [2] and len(found[0]["input_ids"]) == 24
    with pytest.raises(DataError, match="not a text"):
        goal.encode(table([{"image": image, "text": 3}]))


def test_the_text_of_a_row_without_an_image_is_not_read(tokenizer: Tokenizer) -> None:
    rows = [SCENES[0], {**SCENES[1], "image": b"no picture", "text": 7}]
    found = task(tokenizer).encode(table(rows))
    assert len(found) == 1 and [1] in found.dropped.values()
    with pytest.raises(DataError, match="not a text"):
        task(tokenizer).encode(table([SCENES[0], {**SCENES[1], "text": 7}]))


def test_texts_in_files_beside_images(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line is a text; an image with several has a row for each."""
    for k, row in enumerate(SCENES[:6]):
        Image.fromarray(np.asarray(row["image"])).save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text(f"{row['text']}\n" + "red\n" * (k == 0))
    goal = task(tokenizer)
    found = goal.gathered(goal.read(tmp_path), {})
    assert list(found.columns["caption"]) == [
        SCENES[0]["text"],
        "red",
        *(r["text"] for r in SCENES[1:6]),
    ]
    assert "1 of 6 images have several texts" in capsys.readouterr().err
    result = pretrain.finetune(
        goal.model, tmp_path, task="captioning", valid=2 / 7, limit="1 steps", device="cpu", quiet=True,
        out=tmp_path / "run", batch_rows=2,
    )  # fmt: skip
    assert result.data.counts["train"] + result.data.counts["valid"] <= 7


def test_several_texts_of_a_cell_are_the_same_printed_as_held(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """A list in a cell of a CSV file, as pandas writes it, is read as retrieval reads it."""
    pandas = pytest.importorskip("pandas")
    texts = [["a cat", "it's red"], ["[1] a dog"], []]
    frame = pandas.DataFrame({"image": ["a.png", "b.png", "c.png"], "caption": texts})
    frame.to_csv(tmp_path / "a.csv", index=False)
    goal = task(tokenizer)
    for source in (frame, tmp_path / "a.csv"):
        found = goal.gathered(goal.read(source), {}).columns["caption"]
        assert found[:3] == ["a cat", "it's red", "[1] a dog"] and len(found) == 4
    plain = frame.assign(caption=["[a", "['a' b]", "c"])
    assert goal.gathered(goal.read(plain), {}).columns["caption"] == ["[a", "['a' b]", "c"]


@pytest.mark.parametrize("form", ["array", "list"])
def test_a_row_with_one_image_is_one_input(form: str, tuned: Any) -> None:
    image = np.asarray(SCENES[0]["image"])
    given = image if form == "array" else image.tolist()
    asked = {"image": given, "question": SCENES[0]["question"]}
    answer = tuned.predict(asked)
    assert answer == tuned.predict([asked])[0] == tuned.predict({**asked, "image": image})


def test_jitter_reaches_the_images(tokenizer: Tokenizer) -> None:
    assert task(tokenizer, jitter=0.25).augmentation.jitter == 0.25
