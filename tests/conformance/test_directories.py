"""Every tokenizer directory gives the ids and the outputs that transformers gives, in every use.

Directories (families, with and without tokenizer.json, side files, frames) times uses; the models are tiny and random.
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import pretrain
from conformance.directories import CAUSAL, DIRECTORIES, build, model
from pretrain.data.chat import ChatTemplate
from pretrain.data.tables import read_table
from pretrain.data.task_rows import TaskEncoder
from pretrain.data.tokenizer import Tokenizer
from pretrain.inference.predict import task_of
from pretrain.training.evaluate import evaluate_rows
from pretrain.training.precision import choose_precision

TEXTS = [
    "The cat sat on a mat.",
    "schön über Schön, naïve café; Straße",
    "日本 東京!  two  blanks and\ttabs\n",
    "it's 1995, isn't it? goodbook good-book 12345",
    " leading blank, e\u0301 decomposed",
    "x",
]
# Characters that no vocabulary here has, and that tokenizers drop or read as bytes.
MARKED = ["यह हिन्दी में", "ภาษาไทยไม่มี ดี", "قال العَرَبِيَّةُ", "a cafe\u0301", "I ❤\ufe0f", "the cat \n"]
PAIRS = ["a dull film in Paris", "the dog", "rain fell", "it ran", "", "softly over green hills"]
LONG = "the cat sat on a mat and the dog ran after it while rain fell softly " * 2
ROOM = 16


class Case:
    """A directory as transformers and as this package open it."""

    def __init__(self, name: str) -> None:
        self.name, self.family = name, DIRECTORIES[name][0]
        self.causal = self.family in CAUSAL
        self.folder = Path(
            tempfile.mkdtemp(prefix="conformance-", dir=os.environ["PRETRAIN_CACHE"])
        )
        self.path = build(name, "language", self.folder / "language")
        self.theirs = transformers.AutoTokenizer.from_pretrained(self.path)
        self.ours = Tokenizer.open(self.path)

    @functools.cached_property
    def model(self) -> Any:
        return pretrain.load(self.path, quiet=True)

    def headed(self, use: str) -> tuple[Any, Any]:
        """Their model and ours with the head of a task."""
        path = self.folder / use
        if not path.exists():
            build(self.name, use, path)
        return model(self.family, use), pretrain.load(path, quiet=True)

    def feed(self, *texts: Any, **options: Any) -> dict[str, torch.Tensor]:
        """What a pipeline of transformers feeds."""
        made = dict(self.theirs(*texts, return_tensors="pt", **options))
        if self.family != "bert":
            made.pop("token_type_ids", None)
        return made


@functools.cache
def case(name: str) -> Case:
    return Case(name)


def _same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)


# ---------------------------------------------------------------------------- ids


def encode_one(c: Case) -> None:
    for text in TEXTS:
        assert c.ours.frame_texts([text])[0].ids == c.theirs(text)["input_ids"]
        bare = c.theirs(text, add_special_tokens=False)["input_ids"]
        assert c.ours.encode(text) == bare
        if bare:
            assert c.ours.frame(c.ours.encode(text)) == c.theirs(text)["input_ids"]


def encode_batch(c: Case) -> None:
    wanted = c.theirs(TEXTS)["input_ids"]
    assert [e.ids for e in c.ours.frame_texts(TEXTS)] == wanted
    assert c.ours.encode_batch(TEXTS) == c.theirs(TEXTS, add_special_tokens=False)["input_ids"]


def encode_pairs(c: Case) -> None:
    found = c.ours.frame_texts(TEXTS, PAIRS)
    wanted = c.theirs(TEXTS, PAIRS, return_token_type_ids=True)
    assert [e.ids for e in found] == wanted["input_ids"]
    assert [e.type_ids for e in found] == wanted["token_type_ids"]


def cut_text(c: Case) -> None:
    texts = [LONG, *TEXTS]
    for room in (5, ROOM):
        wanted = c.theirs(texts, truncation=True, max_length=room)["input_ids"]
        assert [e.ids for e in c.ours.frame_texts(texts, max_length=room)] == wanted


def cut_pair(c: Case) -> None:
    for first, second in ((LONG, "the dog"), ("the dog", LONG), (LONG, LONG)):
        for strategy in ("longest_first", "only_first"):
            options: Any = {"max_length": 48 if strategy == "only_first" else ROOM}
            wanted = c.theirs([first], [second], truncation=strategy, **options)["input_ids"]
            found = c.ours.frame_texts([first], [second], strategy=strategy, **options)
            assert [e.ids for e in found] == wanted


def offsets(c: Case) -> None:
    wanted = c.theirs(TEXTS, PAIRS, return_offsets_mapping=True)["offset_mapping"]
    assert [e.offsets for e in c.ours.frame_texts(TEXTS, PAIRS)] == wanted


def typed_specials(c: Case) -> None:
    names = sorted(set(c.theirs.all_special_tokens))
    text = " and ".join(["the", *names, "<x>", "goodbook", "<y>"])
    assert c.ours.frame_texts([text])[0].ids == c.theirs(text)["input_ids"]


def lists_of_words(c: Case) -> None:
    sentences = [text.split() for text in TEXTS]
    found = c.ours.frame_texts(sentences, words=True)
    wanted = c.theirs(sentences, is_split_into_words=True)
    assert [e.ids for e in found] == wanted["input_ids"]
    assert [e.word_ids for e in found] == [wanted.word_ids(i) for i in range(len(sentences))]


def decode(c: Case) -> None:
    more = ["cat , dog . it 's don ' t", "the <x> and <X> goodbook <y>"]
    for ids in c.theirs([*TEXTS, *more])["input_ids"]:
        for skip in (True, False):
            wanted = c.theirs.decode(ids, skip_special_tokens=skip)
            assert c.ours.decode(ids, skip_special=skip) == wanted


def continue_text(c: Case) -> None:
    for text in (*TEXTS, *MARKED):
        ids = c.theirs(text)["input_ids"]
        whole = c.theirs.decode(ids, skip_special_tokens=True)
        for k in range(1, len(ids)):
            before = c.ours.decode(ids[:k])
            if whole.startswith(
                before
            ):  # not inside a character, nor of words that are joined later
                assert before + c.ours.continuation(ids[:k], ids[k:]) == whole


def save_and_open(c: Case) -> None:
    path = c.model.save(c.folder / "again")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(path), Tokenizer.open(path)
    for tokenizer in (theirs, c.theirs):
        assert [e.ids for e in ours.frame_texts(TEXTS, PAIRS)] == tokenizer(TEXTS, PAIRS)[
            "input_ids"
        ]
    assert len(theirs) == len(ours)


def named_tokens(c: Case) -> None:
    path = c.model.save(c.folder / "named")
    copy = transformers.AutoTokenizer.from_pretrained(path)
    for role in ("bos", "eos", "cls", "sep", "pad", "mask"):
        assert getattr(copy, f"{role}_token") == getattr(c.theirs, f"{role}_token")
    assert Tokenizer.open(path).fingerprint == c.ours.fingerprint


def chat(c: Case) -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    source += "".join(f"|{{{{ {role}_token }}}}" for role in ("bos", "eos", "cls", "sep"))
    said: Any = [{"role": "user", "content": "the cat"}]
    wanted = c.theirs.apply_chat_template(said, chat_template=source, tokenize=False)
    assert ChatTemplate.of(c.ours, source).render(said) == wanted


def task_rows(c: Case) -> None:
    encoder = TaskEncoder(c.ours, ROOM, segments=True)
    wanted = c.theirs(TEXTS, PAIRS, truncation=True, max_length=ROOM, return_token_type_ids=True)
    for i, encoding in enumerate(encoder.texts(TEXTS, PAIRS)):
        example = encoder.example(encoding)
        assert example["input_ids"].tolist() == wanted["input_ids"][i]


# ---------------------------------------------------------------------------- outputs


@torch.no_grad()
def embed(c: Case) -> None:
    body = model(c.family, "language").base_model
    wanted = torch.cat([body(**c.feed(t)).last_hidden_state.mean(1) for t in [*TEXTS, LONG]])
    _same(c.model.embed([*TEXTS, LONG]), wanted)
    _same(torch.cat([c.model.embed(text) for text in [*TEXTS, LONG]]), wanted)


@torch.no_grad()
def fill_or_continue(c: Case) -> None:
    theirs = model(c.family, "language")
    if c.causal:
        seen: list[Any] = []
        hook = c.model.backbone.register_forward_pre_hook(
            lambda _, args: seen.append(args[0]["input_ids"])
        )
        for text in TEXTS[:3]:
            seen.clear()
            c.model.generate(text, max_new_tokens=1, temperature=0)
            assert seen[0].tolist() == [c.theirs(text)["input_ids"]]
        hook.remove()
        return
    mask = c.theirs.mask_token
    if mask is None:
        pytest.skip("no mask token")
    for text in (f"the cat {mask} on a mat", f"{mask} dog"):
        feed = c.feed(text)
        place = (feed["input_ids"][0] == c.theirs.mask_token_id).nonzero()
        if not len(place):
            pytest.skip("the mask is read as text")
        scores = theirs(**feed).logits[0, place[0, 0]].softmax(-1)[: len(c.theirs)].topk(4)
        found = c.model.fill_mask(text, top_k=4)
        assert [answer["token_id"] for answer in found] == scores.indices.tolist()
        _same(torch.tensor([answer["score"] for answer in found]), scores.values)


@torch.no_grad()
def classify(c: Case) -> None:
    theirs, ours = c.headed("classification")
    rows = [{"text": a, "text_pair": b} for a, b in zip(TEXTS, PAIRS, strict=True) if b]
    for inputs, fed in (
        (TEXTS, [c.feed(text) for text in TEXTS]),
        (rows, [c.feed(row["text"], row["text_pair"]) for row in rows]),
    ):
        logits = torch.cat([theirs(**feed).logits for feed in fed])
        best = logits.softmax(-1).max(-1)
        found = ours.predict(inputs)
        labels = [theirs.config.id2label[int(i)] for i in best.indices]
        assert [answer["label"] for answer in found] == labels
        _same(torch.tensor([answer["score"] for answer in found]), best.values)


@torch.no_grad()
def loss_of_rows(c: Case) -> None:
    theirs, ours = c.headed("classification")
    rows = [{"text": text, "label": f"LABEL_{i % 3}"} for i, text in enumerate(TEXTS)]
    task = task_of(ours).eval()
    encoded = task.encode(read_table(rows))
    precision = choose_precision("fp32", torch.device("cpu"))
    found = evaluate_rows(task, encoded, precision, batch_rows=3)
    logits = torch.cat([theirs(**c.feed(text)).logits for text in TEXTS])
    wanted = torch.nn.functional.cross_entropy(logits, torch.arange(len(TEXTS)) % 3)
    assert found["loss"] == pytest.approx(float(wanted), rel=1e-4, abs=1e-4)


@torch.no_grad()
def tag(c: Case) -> None:
    theirs, ours = c.headed("tags")
    task = task_of(ours).eval()
    sentences = [text.split() for text in TEXTS]
    encoded = task.encode(read_table([{"tokens": words} for words in sentences]), targets=False)
    wanted = c.theirs(sentences, is_split_into_words=True)["input_ids"]
    assert [example["input_ids"].tolist() for example in encoded] == wanted
    words = sentences[0]
    found = ours.predict([words])[0]["tags"]
    fed = c.feed([words], is_split_into_words=True)
    logits = theirs(**fed).logits[0]
    places = c.theirs([words], is_split_into_words=True).word_ids(0)
    first = [places.index(i) for i in range(len(words))]
    assert found == [theirs.config.id2label[int(i)] for i in logits[first].argmax(-1)]


@torch.no_grad()
def answer(c: Case) -> None:
    _, ours = c.headed("answers")
    task = task_of(ours).eval()
    rows = [{"question": "where is the cat", "context": LONG * 3}]
    encoded = task.encode(read_table(rows), targets=False)
    options = {"max_length": task.max_length, "stride": task.stride, "truncation": "only_second"}
    wanted = c.theirs(
        rows[0]["question"], rows[0]["context"], return_overflowing_tokens=True, **options
    )
    assert [example["input_ids"].tolist() for example in encoded] == wanted["input_ids"]
    assert len(encoded) > 1


def answer_of_marks(c: Case) -> None:
    task = task_of(c.headed("answers")[1])
    for context in MARKED:
        text = context.split(" ", 1)[1]
        row = {"question": "where", "context": context, "answers": text}
        encoded = task.encode(read_table([row]))
        first, last = encoded[0]["labels"]
        said = context[encoded[0]["starts"][first] : encoded[0]["ends"][last]]
        assert said == text.strip() and not encoded.cut


USES: list[Callable[[Case], None]] = [
    encode_one, encode_batch, encode_pairs, cut_text, cut_pair, offsets, typed_specials,
    lists_of_words, decode, continue_text, save_and_open, named_tokens, chat, task_rows, embed, fill_or_continue,
    classify, loss_of_rows, tag, answer, answer_of_marks,
]  # fmt: skip


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.parametrize("name", DIRECTORIES)
def test_directory(name: str, use: Callable[[Case], None]) -> None:
    use(case(name))


def test_there_are_enough_of_them() -> None:
    assert len(DIRECTORIES) >= 40 and len(USES) >= 10
    assert all(re.match(r"^[\w ]+$", name) for name in DIRECTORIES)
