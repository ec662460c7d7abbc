"""Tokenizer directories in the forms in which they are published, made on the fly: families, files, side files."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

VOCAB, POSITIONS = 512, 64
SENTENCE = (
    "the cat sat on a mat and dog ran after it while rain fell softly over green hills old mill "
    "good bad film book nice awful great dull Paris London Anna Tom lives works at Corp"
)
WORDS = SENTENCE.split()


@functools.cache
def corpus() -> list[str]:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(4, 14))) + "." for _ in range(400)]
    return (
        texts
        + ["naïve café über Straße schön", "日本語 東京 你好 世界", "it's 1995, isn't it?"] * 9
    )


# ---------------------------------------------------------------------------- vocabularies


@functools.cache
def wordpiece() -> dict[str, int]:
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    backend.train_from_iterator(corpus(), trainer)
    vocab = {name: i for i, name in enumerate(special)}
    names = sorted(set(backend.get_vocab()) - set(special))
    extra = ["schon", "schön", "uber", "日本", "##本", "<s>", "</s>", "<pad>", "<mask>"]
    for name in [*names, *extra]:
        vocab.setdefault(name, len(vocab))
    return vocab


@functools.cache
def byte_pairs(*special: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=440,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus(), trainer)
    return backend


@functools.cache
def sentence_pieces() -> str:
    """A tokenizer in the way of Llama 2: byte fallback, blanks as ``▁``."""
    options: dict[str, Any] = {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    backend = tokenizers.Tokenizer(models.BPE(**options))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=460,
        special_tokens=special + [f"<0x{i:02X}>" for i in range(256)],
        show_progress=False,
        max_token_length=12,
    )
    backend.train_from_iterator(corpus(), trainer)
    content = json.loads(backend.to_str())
    content["pre_tokenizer"] = None
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in special]
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return str(backend.to_str())


ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
ROBERTA_NAMES = {
    "bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>",
    "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>",
}  # fmt: skip
BERT_NAMES = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


# ---------------------------------------------------------------------------- files


def write(folder: Path, **files: Any) -> None:
    """Write JSON files; ``__`` in a name is a dot."""
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(json.dumps(content), encoding="utf-8")


def vocab_txt(folder: Path, config: dict[str, Any] | None = None, **files: Any) -> None:
    (folder / "vocab.txt").write_text("\n".join(wordpiece()) + "\n", encoding="utf-8")
    if config is not None:
        files["tokenizer_config__json"] = config
    write(folder, **files)


def vocab_merges(
    folder: Path, special: tuple[str, ...], config: dict[str, Any] | None = None, **files: Any
) -> None:
    byte_pairs(*special).model.save(str(folder))
    if config is not None:
        files["tokenizer_config__json"] = config
    write(folder, **files)


def template(single: str, pair: str, ids: dict[str, int]) -> Any:
    used = [(name, i) for name, i in ids.items() if name in single + pair]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=used)


def bert_json(
    folder: Path, config: dict[str, Any] | None = None, change: Callable[[Any], None] | None = None,
    **files: Any,
) -> None:  # fmt: skip
    vocab = wordpiece()
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(list(BERT_NAMES.values()))
    backend.post_processor = template(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", {"[CLS]": 2, "[SEP]": 3}
    )
    if change is not None:
        change(backend)
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        files["tokenizer_config__json"] = config
    write(folder, **files)


def bpe_json(
    folder: Path, special: tuple[str, ...], config: dict[str, Any], frame: Any = None,
    change: Callable[[Any], None] | None = None, **files: Any,
) -> None:  # fmt: skip
    backend = tokenizers.Tokenizer.from_str(byte_pairs(*special).to_str())
    if frame is not None:
        backend.post_processor = frame
    if change is not None:
        change(backend)
    backend.save(str(folder / "tokenizer.json"))
    write(folder, tokenizer_config__json=config, **files)


def ordinary_names(folder: Path) -> None:
    """Tokens of the vocabulary that are called like special ones."""
    bpe_json(folder, ("<|endoftext|>", "<s>", "</s>"), {**FAST, "eos_token": "<|endoftext|>"})
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    del content["added_tokens"][1:]
    write(folder, tokenizer__json=content)


def normalized(folder: Path) -> None:
    """Let the special tokens of tokenizer.json be found in texts as the normalizer leaves them."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for token in content["added_tokens"]:
        token["normalized"] = True
    write(folder, tokenizer__json=content)


def spm_json(folder: Path, config: dict[str, Any], frame: Any = None) -> None:
    backend = tokenizers.Tokenizer.from_str(sentence_pieces())
    if frame is not None:
        backend.post_processor = frame
    backend.save(str(folder / "tokenizer.json"))
    write(folder, tokenizer_config__json=config)


def unigram_json(folder: Path, name: str, **names: str) -> None:
    """A tokenizer of a class that is opened from its file, as transformers writes it."""
    pieces = sorted({f"▁{word}" for word in WORDS} | set("abcdefghijklmnopqrstuvwxyz▁.,é"))
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocab = [(s, 0.0) for s in special] + [(p, -5.0 - len(p) / 9) for p in pieces]
    made = getattr(transformers, name)(vocab=vocab, **names)
    made.save_pretrained(folder)


def _setting(**parts: Any) -> Callable[[Any], None]:
    def change(backend: Any) -> None:
        for key, value in parts.items():
            setattr(backend, key, value)

    return change


def _padded(backend: Any) -> None:
    backend.enable_truncation(9)
    backend.enable_padding(length=12, pad_id=0, pad_token="[PAD]")


def _token(text: str, **flags: bool) -> dict[str, Any]:
    base = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": text, **base, **flags}


def _listed(text: str, **flags: bool) -> dict[str, Any]:
    return {"__type": "AddedToken", **_token(text, **flags)}


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
S = {"<s>": 1, "</s>": 2}
R = {"<s>": 0, "</s>": 2}
LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

# name -> (family of the model, how its tokenizer files are written)
DIRECTORIES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "bert txt": ("bert", vocab_txt),
    "bert txt class": ("bert", lambda d: vocab_txt(d, {"tokenizer_class": "BertTokenizer"})),
    "bert txt cased": (
        "bert", lambda d: vocab_txt(d, {"tokenizer_class": "BertTokenizer", "do_lower_case": False}),
    ),
    "bert txt accents kept": ("bert", lambda d: vocab_txt(d, {"strip_accents": False})),
    "bert txt accents stripped": (
        "bert", lambda d: vocab_txt(d, {"strip_accents": True, "do_lower_case": False}),
    ),
    "bert txt no chinese": ("bert", lambda d: vocab_txt(d, {"tokenize_chinese_chars": False})),
    "bert txt never split": ("bert", lambda d: vocab_txt(d, {"never_split": ["good", "mat"]})),
    "bert txt electra": (
        "bert", lambda d: vocab_txt(d, {"tokenizer_class": "ElectraTokenizerFast"}),
    ),
    "bert txt mpnet": (
        "bert", lambda d: vocab_txt(d, {"tokenizer_class": "MPNetTokenizer", "unk_token": "[UNK]"}),
    ),
    "bert txt added tokens": (
        "bert",
        lambda d: vocab_txt(
            d, {}, added_tokens__json={"goodbook": len(wordpiece()), "<x>": len(wordpiece()) + 1},
            special_tokens_map__json={"additional_special_tokens": ["<x>"], **BERT_NAMES},
        ),
    ),
    "bert txt special in the map": (
        "bert",
        lambda d: vocab_txt(
            d, added_tokens__json={"<x>": len(wordpiece())},
            special_tokens_map__json={"additional_special_tokens": ["<x>", _listed("<y>")]},
        ),
    ),
    "bert txt named by objects": (
        "bert",
        lambda d: vocab_txt(
            d, {"pad_token": _listed("<x>"), "eos_token": _listed("<y>")},
            added_tokens__json={"<x>": len(wordpiece()), "<y>": len(wordpiece()) + 1},
        ),
    ),
    "bert txt decoder": (
        "bert",
        lambda d: vocab_txt(
            d,
            {
                "added_tokens_decoder": {
                    "0": _token("[PAD]", special=True),
                    str(len(wordpiece())): _token("goodbook", lstrip=True, special=False),
                    str(len(wordpiece()) + 1): _token("<x>", rstrip=True, special=True),
                },
                "additional_special_tokens": ["<x>"],
            },
        ),
    ),
    "bert txt other names": (
        "bert",
        lambda d: vocab_txt(
            d, {"cls_token": "[CLS]"},
            special_tokens_map__json={"cls_token": "<s>", "sep_token": _token("</s>")},
        ),
    ),
    "bert txt asks for bos": ("bert", lambda d: vocab_txt(d, {"add_bos_token": True})),
    "bert txt extra list": (
        "bert", lambda d: vocab_txt(d, {"extra_special_tokens": ["<x>", "<y>"]}),
    ),
    "bert txt published": (
        "bert", lambda d: vocab_txt(d, {"do_lower_case": True, "model_max_length": 512}),
    ),
    "bert json alone": ("bert", bert_json),
    "bert json as it is": ("bert", lambda d: bert_json(d, {**FAST, **BERT_NAMES})),
    "bert json cased by class": (
        "bert",
        lambda d: bert_json(d, {"tokenizer_class": "BertTokenizer", "do_lower_case": False}),
    ),
    "bert json cased but as it is": ("bert", lambda d: bert_json(d, {**FAST, "do_lower_case": False})),
    "bert json padded": ("bert", lambda d: bert_json(d, {**FAST, **BERT_NAMES}, _padded)),
    "bert json padded class": (
        "bert", lambda d: bert_json(d, {"tokenizer_class": "BertTokenizerFast"}, _padded),
    ),
    "bert json other frame as it is": (
        "bert",
        lambda d: bert_json(
            d, {**FAST, **BERT_NAMES},
            _setting(post_processor=template("$A [SEP]", "$A [SEP] $B:1", {"[SEP]": 3})),
        ),
    ),
    "bert json other frame by class": (
        "bert",
        lambda d: bert_json(
            d, {"tokenizer_class": "BertTokenizer"},
            _setting(post_processor=template("$A [SEP]", "$A [SEP] $B:1", {"[SEP]": 3})),
        ),
    ),
    "bert json no frame": (
        "bert",
        lambda d: bert_json(d, {**FAST, **BERT_NAMES}, _setting(post_processor=processors.Sequence([]))),
    ),
    "bert json other rules by class": (
        "bert",
        lambda d: bert_json(
            d, {"tokenizer_class": "BertTokenizer"},
            _setting(
                normalizer=normalizers.NFD(), pre_tokenizer=pre_tokenizers.WhitespaceSplit()
            ),
        ),
    ),
    "bert json added beside": (
        "bert",
        lambda d: bert_json(
            d, {**FAST, **BERT_NAMES}, added_tokens__json={"goodbook": len(wordpiece())},
            special_tokens_map__json={"additional_special_tokens": ["<y>"], "pad_token": "[PAD]"},
        ),
    ),
    "bert json decoder": (
        "bert",
        lambda d: bert_json(
            d,
            {
                "tokenizer_class": "BertTokenizer",
                "added_tokens_decoder": {str(len(wordpiece())): _token("goodbook", special=False)},
            },
        ),
    ),
    "bert json extra dict": (
        "bert",
        lambda d: bert_json(d, {**FAST, **BERT_NAMES, "extra_special_tokens": {"x_token": "<x>"}}),
    ),
    "bert txt extra dict and list": (
        "bert",
        lambda d: vocab_txt(
            d, {"extra_special_tokens": {"x_token": "<x>"}},
            special_tokens_map__json={"extra_special_tokens": ["<y>"]},
        ),
    ),
    "bert txt null names": ("bert", lambda d: vocab_txt(d, {"mask_token": None, "pad_token": None})),
    "bert txt null in the map": (
        "bert",
        lambda d: vocab_txt(
            d, {"mask_token": "[MASK]"}, special_tokens_map__json={"mask_token": None}
        ),
    ),
    "bert json normalized names": (
        "bert",
        lambda d: (
            bert_json(d, {**FAST, **BERT_NAMES}), normalized(d),
        ),
    ),
    "bert json token objects": (
        "bert",
        lambda d: bert_json(
            d, {**FAST, **BERT_NAMES, "mask_token": _listed("[MASK]", lstrip=True),
                "additional_special_tokens": [_listed("<x>")]},
        ),
    ),
    "bert json cut on the left": (
        "bert", lambda d: bert_json(d, {**FAST, **BERT_NAMES, "truncation_side": "left"}),
    ),
    "bert json specials are text": (
        "bert", lambda d: bert_json(d, {**FAST, **BERT_NAMES, "split_special_tokens": True}),
    ),
    "bert json cleaned": (
        "bert", lambda d: bert_json(d, {**FAST, **BERT_NAMES, "clean_up_tokenization_spaces": True}),
    ),
    "bert json without segments": (
        "bert",
        lambda d: bert_json(
            d, {**FAST, **BERT_NAMES, "model_input_names": ["input_ids", "attention_mask"]}
        ),
    ),
    "bert json unknown class": (
        "bert", lambda d: bert_json(d, {"tokenizer_class": "NobodyKnowsTokenizer", **BERT_NAMES}),
    ),
    "roberta files": ("roberta", lambda d: vocab_merges(d, ROBERTA)),
    "roberta files published": ("roberta", lambda d: vocab_merges(d, ROBERTA, {"model_max_length": 512})),
    "roberta files blank": (
        "roberta",
        lambda d: vocab_merges(
            d, ROBERTA, {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": True}
        ),
    ),
    "roberta files mask": (
        "roberta",
        lambda d: vocab_merges(
            d, ROBERTA, {"tokenizer_class": "RobertaTokenizer"},
            special_tokens_map__json={**ROBERTA_NAMES, "mask_token": _token("<mask>", lstrip=True)},
        ),
    ),
    "roberta files offsets": (
        "roberta", lambda d: vocab_merges(d, ROBERTA, {"trim_offsets": False}),
    ),
    "roberta files bart": (
        "roberta", lambda d: vocab_merges(d, ROBERTA, {"tokenizer_class": "BartTokenizer"}),
    ),
    "roberta json class": (
        "roberta",
        lambda d: bpe_json(d, ROBERTA, {"tokenizer_class": "RobertaTokenizer", **ROBERTA_NAMES}),
    ),
    "roberta json as it is": (
        "roberta",
        lambda d: bpe_json(
            d, ROBERTA, {**FAST, **ROBERTA_NAMES}, template("<s> $A </s>", "<s> $A </s> $B </s>", R)
        ),
    ),
    "roberta json decoder": (
        "roberta",
        lambda d: bpe_json(
            d, ROBERTA,
            {
                "tokenizer_class": "RobertaTokenizer", **ROBERTA_NAMES,
                "added_tokens_decoder": {"4": _token("<mask>", lstrip=True, special=True)},
            },
            processors.RobertaProcessing(("</s>", 2), ("<s>", 0)),
        ),
    ),
    "roberta xlm": (
        "roberta", lambda d: unigram_json(d, "XLMRobertaTokenizer", mask_token="<mask>"),
    ),
    "gpt2 files": ("gpt2", lambda d: vocab_merges(d, ("<|endoftext|>",))),
    "gpt2 files blank": (
        "gpt2",
        lambda d: vocab_merges(
            d, ("<|endoftext|>",), {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
        ),
    ),
    "gpt2 files new names": (
        "gpt2",
        lambda d: vocab_merges(
            d, ("<|endoftext|>",),
            {
                "additional_special_tokens": ["<x>"], "cls_token": "<c>", "mask_token": "<m>",
                "pad_token": "<p>", "sep_token": _listed("<s>", lstrip=True),
            },
        ),
    ),
    "gpt2 files names twice": (
        "gpt2",
        lambda d: vocab_merges(
            d, ("<|endoftext|>",), {"bos_token": _listed("<|endoftext|>", lstrip=True)}
        ),
    ),
    "gpt2 files bos": (
        "gpt2", lambda d: vocab_merges(d, ("<|endoftext|>",), {"add_bos_token": True}),
    ),
    "gpt2 files both": (
        "gpt2",
        lambda d: vocab_merges(
            d, ("<|endoftext|>", "<s>", "</s>"),
            {"add_bos_token": True, "add_eos_token": True, "bos_token": "<s>", "eos_token": "</s>"},
        ),
    ),
    "gpt2 json class": (
        "gpt2",
        lambda d: bpe_json(
            d, ("<|endoftext|>",), {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True},
            change=_setting(normalizer=normalizers.Lowercase()),
        ),
    ),
    "gpt2 json other flags": (
        "gpt2",
        lambda d: bpe_json(
            d, ("<|endoftext|>",),
            {
                **FAST, "eos_token": _listed("<|endoftext|>", lstrip=True),
                "added_tokens_decoder": {"440": _token("goodbook", special=False)},
            },
        ),
    ),
    "gpt2 json ends": (
        "gpt2",
        lambda d: bpe_json(
            d, ("<|endoftext|>",), {**FAST, "eos_token": "<|endoftext|>"},
            template("$A <|endoftext|>", "$A <|endoftext|> $B <|endoftext|>", {"<|endoftext|>": 0}),
        ),
    ),
    "gpt2 json published": (
        "gpt2", lambda d: bpe_json(d, ("<|endoftext|>",), {"model_max_length": 1024}),
    ),
    "gpt2 json ordinary names": ("gpt2", ordinary_names),
    "gpt2 json names unknown": ("gpt2", lambda d: bpe_json(d, ("<s>", "</s>"), FAST)),
    "gpt2 neox": (
        "gpt2",
        lambda d: bpe_json(
            d, ("<|endoftext|>", "<|padding|>"), {"tokenizer_class": "GPTNeoXTokenizerFast"},
            template("$A <|endoftext|>", "$A $B", {"<|endoftext|>": 0}),
        ),
    ),
    "qwen2 files": (
        "qwen2",
        lambda d: vocab_merges(
            d, QWEN,
            {
                "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "bos_token": None,
                "pad_token": "<|endoftext|>", "unk_token": None,
                "added_tokens_decoder": {
                    str(i): _token(name, special=True) for i, name in enumerate(QWEN)
                },
                "additional_special_tokens": list(QWEN[1:]),
            },
        ),
    ),
    "qwen2 files blanks": (
        "qwen2",
        lambda d: vocab_merges(
            d, QWEN,
            {
                "eos_token": _listed("<|im_end|>", lstrip=True),
                "additional_special_tokens": [_listed("<x>", lstrip=True, rstrip=True)],
            },
        ),
    ),
    "qwen2 files bare": ("qwen2", lambda d: vocab_merges(d, QWEN)),
    "qwen2 json forced": (
        "qwen2", lambda d: bpe_json(d, QWEN, {**FAST, "eos_token": "<|im_end|>"}),
    ),
    "qwen2 json ends": (
        "qwen2",
        lambda d: bpe_json(
            d, QWEN, {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"},
            template("$A <|endoftext|>", "$A <|endoftext|> $B:1 <|endoftext|>:1", {"<|endoftext|>": 0}),
        ),
    ),
    "llama json nothing": ("llama", lambda d: spm_json(d, {**FAST, **LLAMA})),
    "llama json bos": (
        "llama", lambda d: spm_json(d, {**FAST, **LLAMA}, template("<s> $A", "<s> $A <s> $B", S)),
    ),
    "llama json both": (
        "llama",
        lambda d: spm_json(
            d, {**FAST, **LLAMA}, template("<s> $A </s>", "<s> $A </s> $B:1 </s>:1", S)
        ),
    ),
    "llama json normalized names": (
        "llama",
        lambda d: (
            spm_json(d, {**FAST, **LLAMA}, template("<s> $A", "<s> $A <s> $B", S)),
            normalized(d),
        ),
    ),
    "llama json class": (
        "llama",
        lambda d: spm_json(
            d, {"tokenizer_class": "LlamaTokenizer", **LLAMA}, template("<s> $A", "<s> $A $B", S)
        ),
    ),
    "llama json legacy": (
        "llama",
        lambda d: spm_json(
            d, {"tokenizer_class": "LlamaTokenizerFast", "legacy": True, "add_eos_token": True, **LLAMA},
        ),
    ),
    "llama json byte level": (
        "llama",
        lambda d: bpe_json(
            d, ("<unk>", "<s>", "</s>"), {"tokenizer_class": "LlamaTokenizerFast", **LLAMA},
            template("<s> $A", "<s> $A <s> $B", S),
        ),
    ),
    "mistral json class": (
        "mistral",
        lambda d: spm_json(
            d, {"tokenizer_class": "LlamaTokenizer", **LLAMA}, template("<s> $A", "<s> $A $B", S)
        ),
    ),
    "modernbert json": (
        "modernbert",
        lambda d: bert_json(d, {"tokenizer_class": "BertTokenizer", "do_lower_case": False, **BERT_NAMES}),
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------- models

HEADS = {
    "classification": "ForSequenceClassification",
    "tags": "ForTokenClassification",
    "answers": "ForQuestionAnswering",
}
_PREFIX = {
    "bert": "Bert", "roberta": "Roberta", "gpt2": "GPT2", "llama": "Llama", "qwen2": "Qwen2",
    "mistral": "Mistral", "modernbert": "ModernBert",
}  # fmt: skip
CAUSAL = ("gpt2", "llama", "qwen2", "mistral")


@functools.cache
def model(family: str, use: str) -> Any:
    """A tiny random model of transformers with weights far from their first values."""
    head = HEADS.get(use) or ("LMHeadModel" if family == "gpt2" else "ForCausalLM")
    if use == "language" and family not in CAUSAL:
        head = "ForMaskedLM"
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": POSITIONS}
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}
    if family == "roberta":
        sizes |= {"max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1, "pad_token_id": 1}
        sizes |= {"bos_token_id": 0, "eos_token_id": 2}
    elif family in ("gpt2", "qwen2", "modernbert"):
        sizes |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    if family == "modernbert":
        sizes |= dict.fromkeys(("cls_token_id", "sep_token_id"), 2)
    if family in ("llama", "mistral", "qwen2"):
        sizes |= {"num_key_value_heads": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    labels = {"num_labels": 3} if use in ("classification", "tags") else {}
    config = getattr(transformers, f"{_PREFIX[family]}Config")(vocab_size=VOCAB, **sizes, **labels)
    made = getattr(transformers, f"{_PREFIX[family]}{head}")(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.3 if parameter.ndim > 1 else 0.1))
    made.tie_weights()
    return made


@functools.cache
def saved(family: str, use: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="conformance-", dir=os.environ["PRETRAIN_CACHE"]))
    model(family, use).save_pretrained(folder)
    return folder


def build(name: str, use: str, folder: Path) -> Path:
    """Make the directory of a model with its tokenizer."""
    family, files = DIRECTORIES[name]
    folder.mkdir(parents=True)
    for file in saved(family, use).iterdir():
        shutil.copy(file, folder)
    files(folder)
    return folder
