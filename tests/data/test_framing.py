"""One function frames texts: the ids of ``AutoTokenizer`` for every post-processor, cut or whole."""

from __future__ import annotations

import functools
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

import pretrain
import tiny
from pretrain.data.task_rows import TaskEncoder
from pretrain.data.tokenizer import Tokenizer, train_from_texts
from pretrain.errors import TokenizerError

WORDS = st.sampled_from(["the", "red", "cat", "sat", "on", "Zoë", "é.", "日本", " ", "x7", "<s>"])
TEXTS = st.lists(WORDS, max_size=24).map(" ".join)


def _template(single: str, pair: str) -> Any:
    names = {name for name in (single + " " + pair).split() if name.startswith("<")}
    ids = [
        (name.split(":")[0], {"<s>": 1, "</s>": 2}[name.split(":")[0]]) for name in sorted(names)
    ]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)


# What a file can put around a text, with the same five special tokens defined in every case.
SHAPES: dict[str, Any] = {
    "nothing": lambda: None,
    "byte level": lambda: processors.ByteLevel(trim_offsets=True),
    "bos": lambda: _template("<s> $A", "<s> $A <s>:1 $B:1"),
    "eos": lambda: _template("$A </s>", "$A </s> $B:1 </s>:1"),
    "bos and eos": lambda: _template("<s> $A </s>", "<s> $A </s> $B:1 </s>:1"),
    "twice": lambda: _template("<s> <s> $A </s>", "<s> <s> $A </s> </s> $B </s>"),
    "roberta": lambda: processors.RobertaProcessing(("</s>", 2), ("<s>", 1)),
    "sequence": lambda: processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), _template("<s> $A", "<s> $A $B:1")]
    ),
}


@functools.cache
def opened(shape: str, padded: bool = False) -> tuple[Any, Tokenizer]:
    """A byte-level BPE with a post-processor, as transformers and as this package open its directory."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", "<mask>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(tiny.TEXTS, trainer)
    if (made := SHAPES[shape]()) is not None:
        backend.post_processor = made
    if padded:
        backend.enable_truncation(5)
        backend.enable_padding(length=9, pad_id=3, pad_token="<pad>")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, mask_token="<mask>", **names
    )
    with tempfile.TemporaryDirectory() as folder:
        fast.save_pretrained(folder)
        if padded:
            backend.save(f"{folder}/tokenizer.json")
        return transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.open(folder)


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3),
    paired=st.booleans(),
    room=st.one_of(st.none(), st.integers(8, 24)),
    strategy=st.sampled_from(["longest_first", "only_first"]),
)
def test_frames_are_those_of_the_file(
    shape: str, texts: list[tuple[str, str]], paired: bool, room: int | None, strategy: Any
) -> None:
    theirs, ours = opened(shape)
    first, second = [a for a, _ in texts], [b for _, b in texts] if paired else None
    options: dict[str, Any] = {"return_token_type_ids": True, "return_offsets_mapping": True}
    if room is not None:
        options |= {"truncation": strategy, "max_length": room}
    try:
        wanted = theirs(first, second, **options)
    except Exception:  # only the first text may be cut, and the second does not fit
        with pytest.raises(TokenizerError, match="max_length"):
            ours.frame_texts(first, second, max_length=room, strategy=strategy)
        return
    found = ours.frame_texts(first, second, max_length=room, strategy=strategy)
    assert [e.ids for e in found] == wanted["input_ids"]
    assert [e.type_ids for e in found] == wanted["token_type_ids"]
    assert [e.offsets for e in found] == wanted["offset_mapping"]
    alone = ours.frame_texts(first[:1], second and second[:1], max_length=room, strategy=strategy)
    assert alone[0].ids == found[0].ids


@pytest.mark.parametrize("shape", SHAPES)
def test_every_use_reads_the_same_ids(shape: str) -> None:
    theirs, ours = opened(shape)
    text = "the red cat sat on the mat"
    wanted = theirs(text)["input_ids"]
    sizes = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
    model = pretrain.build("llama", None, tokenizer=ours, max_positions=64, **sizes)
    seen: list[list[int]] = []

    def watch(module: Any, args: Any) -> None:
        seen.append(args[0]["input_ids"][0].tolist())

    model.backbone.register_forward_pre_hook(watch)
    model.embed(text)
    model.generate(text, max_new_tokens=1)
    masked = pretrain.build("bert", None, tokenizer=ours, max_positions=64, **sizes)
    masked.backbone.register_forward_pre_hook(watch)
    masked.fill_mask(text.replace("red", "<mask>"))
    assert seen[0] == seen[1] == wanted
    assert seen[2] == theirs(text.replace("red", "<mask>"))["input_ids"]
    assert TaskEncoder(ours, 64).texts([text])[0].ids == wanted
    assert ours.frame(ours.encode(text)) == wanted
    assert ours.frame_document(ours.encode(text))[-1] == ours.eos_id


def test_padding_and_truncation_of_a_file_do_not_act_and_are_kept(tmp_path: Path) -> None:
    _, plain = opened("bos and eos")
    _, ours = opened("bos and eos", padded=True)
    texts = ["the red cat sat on the mat", "a"]
    assert ours.encode_batch(texts) == plain.encode_batch(texts) == [plain.encode(t) for t in texts]
    framed = [[e.ids for e in tok.frame_texts(texts)] for tok in (ours, plain)]
    assert framed[0] == framed[1]
    sizes = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
    model = pretrain.build("bert", None, tokenizer=ours, max_positions=64, **sizes)
    both, alone = model.embed(texts), torch.cat([model.embed(text) for text in texts])
    assert torch.allclose(both, alone, atol=1e-6)
    ours.save(tmp_path)
    stored = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert stored.truncation["max_length"] == 5 and stored.padding["length"] == 9
    assert Tokenizer.open(tmp_path).fingerprint == ours.fingerprint != plain.fingerprint


def test_windows_over_the_second_text_are_those_of_transformers() -> None:
    theirs, ours = opened("roberta")
    options: dict[str, Any] = {"max_length": 12, "stride": 3}
    found = ours.frame_texts(["the cat"], ["the red dog " * 9], strategy="only_second", **options)[
        0
    ]
    wanted = theirs(
        "the cat",
        "the red dog " * 9,
        truncation="only_second",
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        **options,
    )
    assert [w.ids for w in [found, *found.overflowing]] == wanted["input_ids"]
    assert [w.offsets for w in [found, *found.overflowing]] == wanted["offset_mapping"]


def test_cuts_of_several_lengths_at_the_same_time_do_not_meet() -> None:
    _, ours = opened("bos and eos")
    wrong: list[Any] = []

    def work(room: int) -> None:
        for _ in range(60):
            ids = ours.frame_texts(["the red cat sat on the mat " * 4], max_length=room)[0].ids
            if len(ids) != room or ids[-1] != ours.eos_id:
                wrong.append((room, ids))

    threads = [threading.Thread(target=work, args=(room,)) for room in range(4, 28)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(ours.encode("the red cat sat on the mat " * 4)) > 28


@pytest.mark.parametrize("kind", ["bpe", "char", "wordpiece"])
def test_prompts_of_a_tokenizer_trained_here_stay_open(kind: str) -> None:
    ours = train_from_texts(tiny.TEXTS, kind, vocab_size=330)
    assert ours.trained_here and not opened("bos")[1].trained_here
    ids = ours.encode("the cat")
    assert ours.frame_prompts(["the cat", ""]) == [[ours.bos_id, *ids], [ours.bos_id]]
    assert ours.frame(ids) == ours.frame_document(ids) == [ours.bos_id, *ids, ours.eos_id]


def test_an_empty_prompt_has_a_beginning() -> None:
    _, ours = opened("nothing")
    assert ours.frame_prompts([""]) == [[ours.bos_id]]


def test_no_room_for_a_text_is_told() -> None:
    _, ours = opened("bos and eos")
    with pytest.raises(TokenizerError, match="leaves room for text"):
        ours.frame_texts(["the cat"], max_length=1)
