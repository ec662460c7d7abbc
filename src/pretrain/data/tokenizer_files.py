"""Opening of tokenizer directories by the rules of ``AutoTokenizer`` of transformers 5.

A directory holds ``tokenizer.json``, or the vocabulary of an older tokenizer, and companion files such as
``tokenizer_config.json``. Which of them is used depends on the class of the tokenizer: transformers rebuilds the rules
of many classes from the vocabulary and ``tokenizer_config.json``, and uses ``tokenizer.json`` as it is for all others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from pretrain.data.tokenizer_build import library_errors, trained_here
from pretrain.errors import TokenizerError
from pretrain.utils.files import known_as

__all__ = ["ROLE_KEYS", "open_directory", "open_file"]

_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # roles that transformers knows
# Role in this package -> the named tokens of transformers that it is taken from; a later one takes precedence.
ROLE_KEYS = {
    "pad": ("pad_token",),
    "bos": ("cls_token", "bos_token"),
    "eos": ("sep_token", "eos_token"),
    "mask": ("mask_token",),
    "unk": ("unk_token",),
}
_JSON = "tokenizer.json"
_DAMAGED = (
    "The file is damaged or was written by a newer release of tokenizers; copy it again, or write it again with "
    "Tokenizer.save()."
)
_CONVERT = (
    "Open it once with transformers and write it again, which makes a tokenizer.json: "
    "AutoTokenizer.from_pretrained(...).save_pretrained(...)."
)

# ---------------------------------------------------------------------------- tokenizer class of a directory

# Class that transformers registers for a model type -> model types; used if tokenizer_config.json names no class.
_MODELS = {
    "BertTokenizer": "align bark bert blip bros chinese_clip convbert distilbert electra ernie flava git "
    "grounding-dino layoutlm lxmert megatron-bert mobilebert nezha nomic_bert qdqbert realm retribert squeezebert tvp "
    "vilt visual_bert",
    "RobertaTokenizer": "bart bridgetower clap data2vec-text ibert led lilt longformer mega mra mvp roberta "
    "roberta-prelayernorm",
    "GPT2Tokenizer": "blip-2 codegen dbrx emu3 gpt2 gpt_neo gptj instructblip jais2 opt phi starcoder2",
    "Qwen2Tokenizer": "audioflamingo3 colqwen2 internvl ovis2 qwen2 qwen2_5_omni qwen2_5_vl qwen2_audio qwen2_moe "
    "qwen2_vl qwen3 qwen3_asr qwen3_moe qwen3_next qwen3_omni_moe qwen3_vl qwen3_vl_moe",
    "Qwen3_5Tokenizer": "qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen4_exp",
    "GPTNeoXTokenizer": "falcon_mamba gpt_neox mamba mamba2 mpt olmo olmoe rwkv xlstm",
    "MPNetTokenizer": "mpnet",
    "GemmaTokenizer": "gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text recurrent_gemma t5gemma",
    "AlbertTokenizer": "albert yoso",
    "CamembertTokenizer": "camembert",
    "CohereTokenizer": "cohere cohere2",
    "DebertaTokenizer": "deberta",
    "DebertaV2Tokenizer": "deberta-v2",
    "T5Tokenizer": "mt5 switch_transformers t5",
    "XLMRobertaTokenizer": "gte jina_embeddings_v3 xlm-roberta xmod",
    "XLNetTokenizer": "xlnet",
    "BertJapaneseTokenizer": "bert-japanese",
    "BertweetTokenizer": "bertweet",
    "BioGptTokenizer": "biogpt",
    "ByT5Tokenizer": "byt5",
    "CanineTokenizer": "canine",
    "CTRLTokenizer": "ctrl",
    "EsmTokenizer": "esm",
    "FlaubertTokenizer": "flaubert",
    "PhobertTokenizer": "phobert",
    "RoCBertTokenizer": "roc_bert",
    "XLMTokenizer": "xlm",
    "TokenizersBackend": "aria bigbird_pegasus exaone4 flex_olmo glm glm4 glm4_moe gpt_bigcode granite granitemoe "
    "granitemoehybrid granitemoeshared ministral ministral3 mistral mistral3 mixtral nystromformer olmo2 olmo3 "
    "olmo_hybrid persimmon stablelm umt5 xlm-roberta-xl",
}
_CLASS_OF_MODEL = {model: name for name, types in _MODELS.items() for model in types.split()}
# Model types whose published files name a wrong class; the registered class, or tokenizer.json, is used for them.
_MISNAMED_TYPES = (
    "arctic chatlm cohere_asr ernie4_5 ernie4_5_moe fuyu hyperclovax internlm2 internlm3 jamba llava llava_next "
    "minicpm3 minicpmv minimax_m2 modernbert modernbert-decoder molmo molmo2 nemotron phi3 phi3_v phimoe qwen2 qwen3_5 "
    "qwen3_5_moe qwen3_5_moe_text qwen4_exp smolvlm vipllava"
)
_MISNAMED = set(_MISNAMED_TYPES.split())
# Aliases of the classes that are built here.
_ALIASES = {
    "BertTokenizer": "ConvBert DistilBert DPRContextEncoder DPRQuestionEncoder DPRReader Electra LayoutLM Lxmert "
    "MobileBert Retribert SqueezeBert",
    "RobertaTokenizer": "Bart LED Longformer Mvp",
}
_ALIAS_OF = {f"{a}Tokenizer": name for name, known in _ALIASES.items() for a in known.split()}
# Classes that use token_type_ids if model_input_names is not set.
_SEGMENTS = {"BertTokenizer", "DebertaTokenizer", "DebertaV2Tokenizer", "FNetTokenizer"}
# Classes that transformers implements in Python, so their rules are not in any file.
_PROGRAM_NAMES = (
    "Bartpho BertJapanese Bertweet BioGpt BlenderbotSmall ByT5 CTRL Canine Cpm CpmAnt Esm FSMT Flaubert "
    "GPTNeoXJapanese MyT5 PLBart Perceiver Phobert ProphetNet Rag RoCBert Tapas XLM"
)
_PROGRAMS = {f"{name}Tokenizer" for name in _PROGRAM_NAMES.split()}


def _class_name(config: Mapping[str, Any], model: Mapping[str, Any], byte_level: bool) -> str:
    """Return the class that AutoTokenizer chooses; ``TokenizersBackend`` if tokenizer.json is used as it is.

    ``config`` and ``model`` are tokenizer_config.json and config.json; ``byte_level`` that tokenizer.json is such BPE.
    """
    family = model.get("model_type")
    registered = _CLASS_OF_MODEL.get(family) if isinstance(family, str) else None
    if family in _MISNAMED:
        return registered or "TokenizersBackend"
    declared = config.get("tokenizer_class") or model.get("tokenizer_class")
    if not isinstance(declared, str):
        return registered or ("TokenizersBackend" if family else "")
    declared = declared.removesuffix("Fast")
    if registered == "TokenizersBackend" or (declared == "LlamaTokenizer" and byte_level):
        return "TokenizersBackend"
    if declared in ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend"):
        return "TokenizersBackend"
    return _ALIAS_OF.get(declared, declared)


# ---------------------------------------------------------------------------- rules of the classes

_SPLIT = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?{letters}+|\p{N}| ?[^\s{others}\p{N}]+[\r\n]*|\s*[\r\n]+"""
    r"""|\s+(?!\S)|\s+"""
)
_BYTE_LEVEL = {"unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}


@dataclass
class _Rules:
    """The rules by which a class turns a vocabulary into a tokenizer.

    Attributes:
        model: parameters of the model besides the vocabulary.
        frame: builds the post-processor from the named tokens and their ids; None keeps that of the file.
        defaults: default named tokens of the class.
        bare: blanks beside special tokens are kept, whatever the companion files say of these tokens.
    """

    model: dict[str, Any]
    normalizer: Any = None
    pre_tokenizer: Any = None
    decoder: Any = None
    frame: Callable[[dict[str, tuple[str, int]]], Any] | None = None
    defaults: dict[str, str] = field(default_factory=dict)
    bare: bool = False


def _flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config.get(key, default)
    return value if isinstance(value, bool) else default


def _wordpiece(config: Mapping[str, Any], defaults: dict[str, str], frame: Any) -> _Rules:
    strip = config.get("strip_accents")
    unknown = _content(config.get("unk_token")) or defaults["unk"]
    return _Rules(
        {"type": "WordPiece", "unk_token": unknown, "continuing_subword_prefix": "##"}
        | {"max_input_chars_per_word": 100},
        normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=_flag(config, "tokenize_chinese_chars", True),
            strip_accents=strip if isinstance(strip, bool) else None,
            lowercase=_flag(config, "do_lower_case", True),
        ),
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(prefix="##"),
        frame,
        defaults,
    )


def _bert(config: Mapping[str, Any]) -> _Rules:
    def frame(named: dict[str, tuple[str, int]]) -> Any:
        (cls, _), (sep, _) = named["cls"], named["sep"]
        return processors.TemplateProcessing(
            single=f"{cls}:0 $A:0 {sep}:0",
            pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
            special_tokens=[named["cls"], named["sep"]],
        )

    names = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
    return _wordpiece(config, names, frame)


_ROBERTA = {
    "bos": "<s>",
    "eos": "</s>",
    "sep": "</s>",
    "cls": "<s>",
    "pad": "<pad>",
    "mask": "<mask>",
}


def _roberta_frame(
    *, trim: bool = True, blank: bool = False
) -> Callable[[dict[str, tuple[str, int]]], Any]:
    """Return a function that builds RoBERTa's post-processor from the named tokens."""
    return lambda named: processors.RobertaProcessing(
        named["sep"], named["cls"], trim_offsets=trim, add_prefix_space=blank
    )


def _mpnet(config: Mapping[str, Any]) -> _Rules:
    return _wordpiece(config, {**_ROBERTA, "unk": "[UNK]"}, _roberta_frame())


def _byte_level(config: Mapping[str, Any], **rules: Any) -> _Rules:
    """Return the rules of byte-level BPE as in GPT-2."""
    blank = _flag(config, "add_prefix_space", False)
    rules.setdefault("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=blank))
    return _Rules({"type": "BPE", **_BYTE_LEVEL}, decoder=decoders.ByteLevel(), **rules)


def _roberta(config: Mapping[str, Any]) -> _Rules:
    trim, blank = _flag(config, "trim_offsets", True), _flag(config, "add_prefix_space", False)
    frame = _roberta_frame(trim=trim, blank=blank)
    return _byte_level(config, frame=frame, defaults={**_ROBERTA, "unk": "<unk>"})


def _gpt2(config: Mapping[str, Any]) -> _Rules:
    return _byte_level(config, defaults=dict.fromkeys(("unk", "bos", "eos"), "<|endoftext|>"))


def _gpt_neox(config: Mapping[str, Any]) -> _Rules:
    names = dict.fromkeys(("unk", "bos", "eos"), "<|endoftext|>") | {"pad": "<|padding|>"}
    return _byte_level(
        config,
        normalizer=normalizers.NFC(),
        frame=lambda named: _ends(named, config),
        defaults=names,
    )


def _qwen(config: Mapping[str, Any], letters: str, others: str) -> _Rules:
    pattern = tokenizers.Regex(_SPLIT.replace("{letters}", letters).replace("{others}", others))
    blank = _flag(config, "add_prefix_space", False)
    steps = [
        pre_tokenizers.Split(pattern, behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=blank, use_regex=False),
    ]
    return _byte_level(
        config,
        normalizer=normalizers.NFC(),
        pre_tokenizer=pre_tokenizers.Sequence(steps),
        defaults=dict.fromkeys(("unk", "eos", "pad"), "<|endoftext|>"),
        bare="M" not in letters,
    )


def _llama(config: Mapping[str, Any]) -> _Rules:
    blank = _flag(config, "add_prefix_space", True)
    scheme = "never" if not blank else "always" if config.get("legacy", False) else "first"
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    return _Rules(
        {"type": "BPE", **_BYTE_LEVEL, "fuse_unk": True, "byte_fallback": True},
        pre_tokenizer=pre_tokenizers.Metaspace("\u2581", prepend_scheme=scheme, split=False),
        decoder=decoders.Sequence(steps + [decoders.Strip(content=" ", left=1)] * blank),
        defaults={"unk": "<unk>", "bos": "<s>", "eos": "</s>"},
    )


_BUILT: dict[str, Callable[[Mapping[str, Any]], _Rules]] = {
    "BertTokenizer": _bert,
    "RobertaTokenizer": _roberta,
    "MPNetTokenizer": _mpnet,
    "GPT2Tokenizer": _gpt2,
    "GPTNeoXTokenizer": _gpt_neox,
    "Qwen2Tokenizer": lambda config: _qwen(config, r"\p{L}", r"\p{L}"),
    "Qwen3_5Tokenizer": lambda config: _qwen(config, r"[\p{L}\p{M}]", r"\p{L}\p{M}"),
    "LlamaTokenizer": _llama,
}


def _ends(named: Mapping[str, tuple[str, int]], config: Mapping[str, Any]) -> Any:
    """Return the post-processor that ``add_bos_token`` and ``add_eos_token`` of the config specify."""
    bos = named.get("bos") if config.get("add_bos_token") else None
    eos = named.get("eos") if config.get("add_eos_token") else None
    start, end = (f"{bos[0]}:%d " if bos else "", f" {eos[0]}:%d" if eos else "")
    single = f"{start}$A:0{end}".replace("%d", "0")
    return processors.TemplateProcessing(
        single=single,
        pair=f"{single} " + f"{start}$B:1{end}".replace("%d", "1"),
        special_tokens=[token for token in (bos, eos) if token],
    )


# ---------------------------------------------------------------------------- companion files


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"{file} cannot be read: it is not UTF-8 text (byte {error.start}). It is damaged or of another kind."
        ) from error
    except OSError as error:
        raise TokenizerError(f"{file} cannot be read: {error.strerror or error}.") from error


def _object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a companion file, or an empty one if the file does not exist."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(_read(file))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(
            f"{file} is not valid JSON: {error}. Copy it again from its origin."
        ) from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{file} must hold a JSON object, found {type(content).__name__}.")
    return content


def _content(value: Any) -> str | None:
    """Return the content of a token that JSON gives as a string or as an object, or None."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _added(value: Any, **options: Any) -> AddedToken | None:
    """Return a token of a companion file as an AddedToken, or None if the value is not a token."""
    text = _content(value)
    if not text:
        return None
    if isinstance(value, dict):
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        options = {k: v for k, v in value.items() if k in flags and isinstance(v, bool)} | options
    return AddedToken(text, **options)


@dataclass
class _CompanionFiles:
    """The content of the companion files of a tokenizer, merged in the order in which transformers reads them.

    Attributes:
        config: tokenizer_config.json, with tokens as strings.
        named: key -> token of every ``*_token``.
        extra: further special tokens.
        added: id -> token; the ids only determine the order.
    """

    config: dict[str, Any]
    named: dict[str, AddedToken | str]
    extra: list[AddedToken | str]
    added: dict[int, AddedToken]

    @classmethod
    def read(cls, folder: Path, stored: Mapping[str, Any]) -> _CompanionFiles:
        """Read the companion files of a directory; ``stored`` is the content of its ``tokenizer.json``, or empty."""
        config = _object(folder / "tokenizer_config.json")
        decoder = config.pop("added_tokens_decoder", None)
        listed = config.get("extra_special_tokens") or config.get("additional_special_tokens")
        further = listed if isinstance(listed, dict) else {}  # named tokens of the model
        added: dict[int, AddedToken] = {}
        if isinstance(decoder, dict):
            for index, value in decoder.items():
                _place(added, index, _added(value))
        else:
            # These files predate added_tokens_decoder, so transformers only reads them in its absence.
            special = _object(folder / "special_tokens_map.json")
            config |= {k: v for k, v in special.items() if k.endswith("_token")}
            more = [v for v in _values(special.get("extra_special_tokens")) if _content(v)]
            listed = [*_values(listed), *more] if more else listed
            # Of added_tokens.json those are special that are named as strings, or as objects in the other file.
            given = [*config.items(), *((key, _content(v)) for key, v in special.items())]
            names = {v for k, v in given if k.endswith("_token") and isinstance(v, str)}
            names |= {v for v in _values(listed) if isinstance(v, str)}
            listed = listed or special.get("additional_special_tokens")
            names |= {_content(value) or "" for value in _values(listed) if _untyped(value)}
            # One that is named as an object only is found in normalized text, but it is special as well.
            objects = {_content(value) for value in [*_named(config).values(), *further.values()]}
            for text, index in _object(folder / "added_tokens.json").items():
                known = text in names
                token = _added(text, normalized=not known, special=known or text in objects)
                _place(added, index, token)
            for value in _values(stored.get("added_tokens")):
                if isinstance(value, dict):
                    _place(added, value.get("id"), _added(value))
        stated = _named(config) | {k: v for k, v in further.items() if _content(v)}
        tokens = {token.content: token for token in added.values()}
        named: dict[str, AddedToken | str] = {}
        for key, value in stated.items():
            text = _content(value) or ""
            whole = _added(value, special=True) if isinstance(value, dict) else text
            named[key] = tokens.get(text) or whole or text
        # Those given as objects with a type are special only if the object says so.
        extra = [
            v if isinstance(v, str) else _added(v, special=True) if _untyped(v) else _added(v)
            for v in _values(listed)
        ]
        texts = {key: _content(value) for key, value in stated.items()}
        return cls({**config, **texts}, named, [token for token in extra if token], added)

    def roles(self, defaults: Mapping[str, str]) -> dict[str, str]:
        """Return role -> token with the role names of this package.

        Args:
            defaults: named tokens of the class; a default that equals the default eos is used for eos only.
        """
        end = defaults.get("eos")
        texts = {f"{r}_token": text for r, text in defaults.items() if r == "eos" or text != end}
        texts |= {key: text for key, text in self.config.items() if key in self.named}
        found = {role: [texts[k] for k in keys if texts.get(k)] for role, keys in ROLE_KEYS.items()}
        return {role: named[-1] for role, named in found.items() if named}

    def tokens(
        self, defaults: Mapping[str, str], vocab: Mapping[str, int], held: set[str]
    ) -> list[AddedToken]:
        """Return the tokens that transformers adds to a tokenizer on opening it, in the same order.

        Args:
            defaults: named tokens of the class; those missing from the vocabulary are not added, since no model was
                trained on them.
            vocab: the vocabulary.
            held: tokens that it has, and that keep their flags.
        """
        tokens = [token for _, token in sorted(self.added.items())]
        held = held | {token.content for token in tokens}
        named = dict.fromkeys(f"{role}_token" for role in _NAMED) | self.named
        for role, text in defaults.items():
            if text in vocab:
                named[f"{role}_token"] = named[f"{role}_token"] or text
        seen = set()
        for value in [*filter(None, named.values()), *self.extra]:
            token = AddedToken(value, special=True) if isinstance(value, str) else value
            # A token that two names give with other flags is added twice, so that the later flags count.
            if token.content not in held and repr(value) not in seen:
                seen.add(repr(value))
                tokens.append(token)
        return tokens


def _named(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the named tokens in the content of a companion file, as they stand there."""
    return {k: v for k, v in config.items() if k.endswith("_token") and _content(v)}


def _values(listed: Any) -> list[Any]:
    return listed if isinstance(listed, list) else []


def _untyped(value: Any) -> bool:
    """Whether a listed token is an object of older releases, which transformers 5 refuses for want of its type."""
    return isinstance(value, dict) and "__type" not in value


def _place(added: dict[int, AddedToken], index: Any, token: AddedToken | None) -> None:
    """Store a token under its id if both are valid."""
    try:
        place = int(index)
    except (TypeError, ValueError):
        return
    if token is not None:
        added[place] = token


# ---------------------------------------------------------------------------- opening


def open_file(file: Path) -> tokenizers.Tokenizer:
    """Open a file of the ``tokenizers`` library without companion files.

    Raises:
        TokenizerError: the file cannot be read, or its rules could fill the memory; see ``check_harmless``.
    """
    return _from_content(file, _stored(file))


def _stored(file: Path) -> dict[str, Any]:
    text = _read(file)
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError(f"it holds {type(content).__name__}")
    except (ValueError, RecursionError) as error:
        raise TokenizerError(
            f"{file} is not a tokenizer of the 'tokenizers' library ({error}). "
            + (known_as(text[:64].encode()) or _DAMAGED)
        ) from error
    check_harmless(content, file)
    return content


def _from_content(file: Path, content: Mapping[str, Any]) -> tokenizers.Tokenizer:
    with library_errors(f"{file} is not a tokenizer of the 'tokenizers' library", _DAMAGED):
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        backend.get_vocab_size()
        return backend


def open_directory(
    folder: Path,
) -> tuple[tokenizers.Tokenizer, dict[str, str | None], dict[str, Any], dict[str, str]]:
    """Open the tokenizer of a directory as ``AutoTokenizer`` of transformers 5 does.

    Returns:
        The tokenizer; role -> token, as far as the files define them, None if they take it away; tokenizer_config.json
        with tokens as strings and the class, if any file names it; the named tokens of the class that no file names.

    Raises:
        TokenizerError: there is no tokenizer, it is damaged, or its class cannot be built here.
    """
    file = folder / _JSON
    stored = _stored(file) if file.is_file() else {}
    odd = f"the files beside the tokenizer in {folder} hold an invalid token"
    with library_errors(odd, _DAMAGED):
        companions = _CompanionFiles.read(folder, stored)
    config, model = companions.config, _model_config(folder)
    name = _class_name(config, model, _has_byte_level(stored)) or _guess(folder)
    if name in _PROGRAMS:
        keep = " To use the tokenizer.json as it is, remove tokenizer_class." if stored else ""
        raise TokenizerError(
            f"{folder} needs the tokenizer class {name}, which transformers implements in Python, so no file "
            f"holds its rules. Use a model with a tokenizer.json.{keep}"
        )
    rules = _BUILT[name](config) if name in _BUILT else None
    if stored and model.get("model_type") in _MISNAMED and _made_here(stored):
        rules = None
    whole = {} if rules is None else rules.defaults
    absent: set[str] = set()
    if rules is not None:  # null takes a named token away, except those the class needs
        needed = {"cls", "sep"} | ({"unk"} if rules.model["type"] == "WordPiece" else set())
        absent = {r for r in whole if config.get(f"{r}_token", r) is None} - needed
        rules.defaults = {r: text for r, text in whole.items() if r not in absent}
    if not stored:
        backend = _from_vocabulary(folder, name, rules)
    elif rules is not None:
        backend = _rebuilt(file, stored, rules)
    else:
        backend = _from_content(file, stored)
    with library_errors(odd, _DAMAGED):
        _add(backend, companions, rules, model.get("vocab_size"))
        if rules is not None:
            _reframe(backend, companions, rules, explicit=not stored)
    if not isinstance(config.get("model_input_names"), list):
        uses_segments = name in _SEGMENTS or trained_here(backend.get_vocab())
        segments = ["token_type_ids"] * uses_segments
        config["model_input_names"] = ["input_ids", *segments, "attention_mask"]
    defaults = {} if rules is None else rules.defaults
    if rules is not None:
        config.setdefault("tokenizer_class", name)
    named = {f"{r}_token": t for r, t in defaults.items() if backend.token_to_id(t) is not None}
    own = {key: text for key, text in named.items() if key not in config}
    # A token that null takes away keeps its role where it is special all the same: runs were begun with it.
    special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    roles: dict[str, str | None] = dict(companions.roles(whole))
    told = companions.roles(defaults)
    roles |= {r: told.get(r) for r, text in roles.items() if r in absent and text not in special}
    return backend, roles, config, own


def _guess(folder: Path) -> str:
    """Return the class of a tokenizer for which no file names one."""
    if (folder / _JSON).is_file():
        return "TokenizersBackend"
    return "BertTokenizer" if (folder / "vocab.txt").is_file() else "GPT2Tokenizer"


def _model_config(folder: Path) -> dict[str, Any]:
    """Return config.json of the model beside the tokenizer; errors in it are reported when the model is opened."""
    try:
        return _object(folder / "config.json")
    except TokenizerError:
        return {}


def _has_byte_level(stored: Mapping[str, Any]) -> bool:
    return any(
        part.get("type") == "ByteLevel"
        for key in ("pre_tokenizer", "decoder")
        for part in _parts(stored.get(key))
    )


def _made_here(stored: Mapping[str, Any]) -> bool:
    """Whether a file has rules of this package that rebuilding by the class of its model would overwrite.

    These are the rules of tokenizers trained by this package, and a normalizer that prepends a space to words (see
    ``blanks_before_words``).
    """
    vocab = stored.get("model", {}).get("vocab")
    blank = any(
        part.get("type") == "Prepend" and part.get("prepend") == " "
        for part in _parts(stored.get("normalizer"))
    )
    return blank or (isinstance(vocab, dict) and trained_here(vocab))


def _rebuilt(file: Path, stored: dict[str, Any], rules: _Rules) -> tokenizers.Tokenizer:
    """Return a tokenizer with the vocabulary of a file and the rules of a class; equivalent parts stay unchanged."""
    model = stored.get("model")
    if not isinstance(model, dict):
        return _from_content(file, stored)
    kind = rules.model["type"]
    empty = {"type": kind, "vocab": {}} | ({"merges": []} if kind == "BPE" else {})
    wanted = _canonical({"model": rules.model | empty} | dict.fromkeys(_PARTS))
    given = (
        _canonical({**stored, "model": {**model, **empty}, "added_tokens": []})
        if (model.get("type", kind) == kind)
        else {}
    )
    for key in _PARTS:
        rule = getattr(rules, key)
        if rule is not None or key != "decoder":
            wanted[key] = _written(key, rule)
    changed = {key: wanted[key] for key in _PARTS if wanted[key] != given.get(key, "")}
    if _plain(given.get("model", {})) != _plain(wanted["model"]):
        vocab = model.get("vocab")
        if isinstance(vocab, list):
            vocab = {str(v[0] if isinstance(v, list) and v else v): i for i, v in enumerate(vocab)}
        content = {"vocab": vocab} | ({"merges": model.get("merges", [])} if kind == "BPE" else {})
        changed["model"] = wanted["model"] | content
    return _from_content(file, {**stored, **changed} if changed else stored)


_PARTS = ("normalizer", "pre_tokenizer", "decoder")


def _canonical(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a tokenizer file as the installed library writes it, or {} if it cannot be read."""
    unset = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    base = {"version": "1.0", "added_tokens": []} | dict.fromkeys(unset)
    try:
        text = tokenizers.Tokenizer.from_str(json.dumps(base | dict(content))).to_str()
    except Exception:  # raised by the library; errors are reported when the whole file is opened
        return {}
    found: dict[str, Any] = json.loads(text)
    return found


def _written(key: str, rule: Any) -> Any:
    """Return a rule as the library serialises it."""
    if rule is None:
        return None
    made = tokenizers.Tokenizer(models.BPE())
    setattr(made, key, rule)
    return json.loads(made.to_str())[key]


def _plain(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a model besides its vocabulary, with empty values as None."""
    return {k: v or None for k, v in model.items() if k not in ("vocab", "merges")}


def _from_vocabulary(folder: Path, name: str, rules: _Rules | None) -> tokenizers.Tokenizer:
    """Build a tokenizer of the class ``name`` from ``vocab.txt``, or ``vocab.json`` and ``merges.txt``."""
    pieces = (folder / "vocab.txt").is_file()
    pairs = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if rules is not None and rules.model["type"] == "WordPiece" and pieces:
        return _pieces(folder / "vocab.txt", rules)
    if rules is not None and rules.model["type"] == "BPE" and pairs and name != "LlamaTokenizer":
        with library_errors(f"{folder}/vocab.json and merges.txt do not form a BPE tokenizer"):
            model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
            return _with_rules(model, rules)
    found = sorted(p.name for p in folder.iterdir() if p.suffix == ".model" or p.name in _OTHERS)
    if not (pieces or pairs or found):
        raise TokenizerError(
            f"no tokenizer in {folder}: expected tokenizer.json, vocab.txt, or vocab.json with merges.txt. "
            "Give the directory of a tokenizer or of a checkpoint, or a kind to train: bpe, wordpiece, char."
        )
    found += ["vocab.txt"] * pieces + ["vocab.json and merges.txt"] * pairs
    raise TokenizerError(
        f"{folder} has no tokenizer.json, and a tokenizer of the class {name} cannot be built from "
        f"{', '.join(found)} here. {_CONVERT}"
    )


_OTHERS = ("bpe.codes", "tekken.json", "vocab.bpe", "spiece.vocab")


def _pieces(file: Path, rules: _Rules) -> tokenizers.Tokenizer:
    """Build BERT's WordPiece from its list of pieces."""
    _read(file)  # raises if the file is not UTF-8
    fix = "Copy it again from its origin."
    with library_errors(f"{file} is not a vocabulary of BERT", fix):
        vocab = models.WordPiece.read_file(str(file))
        unknown = rules.model["unk_token"]
        if unknown not in vocab:
            raise TokenizerError(
                f"{file} has no {unknown}, so it cannot encode unknown words; it is truncated, or not a "
                "vocabulary of BERT."
            )
        return _with_rules(models.WordPiece(vocab, unk_token=unknown), rules)


def _with_rules(model: Any, rules: _Rules) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    for key in _PARTS:
        if (rule := getattr(rules, key)) is not None:
            setattr(backend, key, rule)
    return backend


def _add(
    backend: tokenizers.Tokenizer, companions: _CompanionFiles, rules: _Rules | None, rows: Any
) -> None:
    """Add the tokens of the companion files, except those whose id would exceed the rows of the model's embedding.

    ``rows`` is the model's ``vocab_size``, if known.
    """
    vocab = backend.get_vocab(with_added_tokens=True)
    room = (
        rows - (max(vocab.values(), default=-1) + 1) if isinstance(rows, int) else len(vocab) + 1024
    )
    special = {*map(str, companions.named.values()), *map(str, companions.extra)}
    # A file that is used as it is decides on the flags of its tokens.
    given = backend.get_added_tokens_decoder().values() if rules is None else []
    held = {token.content for token in given}
    for token in companions.tokens({} if rules is None else rules.defaults, vocab, held):
        if token.content not in vocab:
            room -= 1
            if room < 0:
                continue
            vocab[token.content] = -1
        if rules is not None and rules.bare and token.content in special:
            token = AddedToken(token.content, special=True)
        backend.add_tokens([token])


def _reframe(
    backend: tokenizers.Tokenizer, companions: _CompanionFiles, rules: _Rules, *, explicit: bool
) -> None:
    """Set the post-processor of a rebuilt tokenizer to that of its class.

    If ``explicit``, there is no tokenizer.json, so ``add_bos_token`` and ``add_eos_token`` of the config apply.
    """
    config = {} if not explicit else companions.config
    texts = dict(rules.defaults)
    for role in _NAMED:
        if text := companions.config.get(f"{role}_token"):
            texts[role] = text
    named = {
        role: (text, index)
        for role, text in texts.items()
        if (index := backend.token_to_id(text)) is not None
    }
    asked = any(key in config for key in ("add_bos_token", "add_eos_token"))
    if rules.frame is None:
        if asked:
            backend.post_processor = _ends(named, config)
        return
    try:
        wanted = rules.frame(named)
    except KeyError:  # the vocabulary lacks a token of the frame
        return
    if explicit or not _frames_alike(backend, wanted):
        backend.post_processor = wanted


def _frames_alike(backend: tokenizers.Tokenizer, frame: Any) -> bool:
    """Whether a post-processor frames a text and a pair in the same way as that of the tokenizer."""
    probe = tokenizers.Tokenizer(backend.model)
    made = []
    for processor in (backend.post_processor, frame):
        if processor is None:
            return False
        probe.post_processor = processor
        text, pair = (probe.encode(*texts) for texts in (("a",), ("a", "a")))
        made.append((text.ids, text.type_ids, pair.ids, pair.type_ids, _trims(processor)))
    return made[0] == made[1]


def _trims(processor: Any) -> list[Any]:
    """Return how a post-processor trims spaces from the offsets of tokens."""
    return [
        part.get("trim_offsets") and (True, part.get("add_prefix_space"))
        for part in _parts(_written("post_processor", processor))
        if part.get("type") in ("ByteLevel", "RobertaProcessing")
    ]


# ---------------------------------------------------------------------------- malicious files

_MOST_ADDED = 64  # tokens that a frame adds, and characters that a rule inserts at one place
_MOST_GROWTH = 1024  # factor by which the rules may lengthen a text
_MOST_STEPS = 256
_MOST_PADDING = 1 << 20


def check_harmless(content: Mapping[str, Any], file: Path) -> None:
    """Reject a tokenizer file whose rules would expand a short text until it fills the memory.

    Raises:
        TokenizerError: a rule exceeds a limit; names the rule.
    """

    def refuse(what: str) -> None:
        raise TokenizerError(
            f"{file}: {what}; no text needs that, and it would exhaust the memory. Copy the file again from its origin."
        )

    padding = content.get("padding")
    if isinstance(padding, dict):
        strategy = padding.get("strategy")
        length = strategy.get("Fixed") if isinstance(strategy, dict) else 0
        for value in (length, padding.get("pad_to_multiple_of")):
            if isinstance(value, int | float) and value > _MOST_PADDING:
                refuse(f"padding asks for {value:,} tokens")
    for key in ("normalizer", "decoder"):
        growth = 1.0
        for step, part in enumerate(_parts(content.get(key))):
            growth *= _growth(part)
            if _longest(part) > _MOST_ADDED or growth > _MOST_GROWTH or step >= _MOST_STEPS:
                refuse(
                    f"the rule {step + 1} of the {key}, {part.get('type')!r}, lengthens every text"
                )
    for part in _parts(content.get("post_processor")):
        for key in ("single", "pair"):
            pieces = part.get(key)
            if isinstance(pieces, list) and len(pieces) > _MOST_ADDED:
                refuse(f"the template {key!r} of the post_processor has {len(pieces):,} pieces")
        special = part.get("special_tokens")
        for name, token in special.items() if isinstance(special, dict) else ():
            ids = token.get("ids") if isinstance(token, dict) else None
            if isinstance(ids, list) and len(ids) > _MOST_ADDED:
                refuse(
                    f"the special token {name[:40]!r} of the post_processor has {len(ids):,} ids"
                )


def _parts(rule: Any) -> Iterator[dict[str, Any]]:
    """Yield the rules of a part of a tokenizer file, with nested sequences flattened."""
    waiting = [rule]
    while waiting:
        item = waiting.pop()
        if not isinstance(item, dict):
            continue
        inner = [
            child
            for key in ("normalizers", "pretokenizers", "processors", "decoders")
            if isinstance(item.get(key), list)
            for child in item[key]
        ]
        if inner:
            waiting += reversed(inner)
        else:
            yield item


def _longest(part: Mapping[str, Any]) -> int:
    """Return the number of characters that a rule inserts at one place."""
    return max(
        (len(v) for k in ("content", "prepend") if isinstance(v := part.get(k), str)), default=0
    )


def _growth(part: Mapping[str, Any]) -> float:
    """Return the largest factor by which a rule can lengthen a text."""
    if part.get("type") != "Replace":
        return 1.0
    pattern, content = part.get("pattern"), part.get("content")
    text = pattern.get("String") if isinstance(pattern, dict) else None
    size = len(text) if isinstance(text, str) else 1
    return max(1.0, (_longest(part) if size and content else 1 + _longest(part)) / max(1, size))
