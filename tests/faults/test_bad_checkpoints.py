"""Every kind of damage to a checkpoint is named, or the one before it is used aloud; nothing in one can run code."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import (
    TrainingState,
    inspect,
    latest,
    load,
    read_training,
    save_checkpoint,
    save_model,
    verify,
)
from pretrain.checkpoint.manifest import INESSENTIAL
from pretrain.checkpoint.peers import SINGLE_PROCESS
from pretrain.checkpoint.sharded_loading import latest_on_all_ranks
from pretrain.data.tokenizer import train_from_texts
from pretrain.errors import CheckpointCorrupt, CheckpointError, ConfigError, PretrainError
from pretrain.models import build

SIZES = {"num_layers": 1, "hidden_size": 8, "num_heads": 1, "max_positions": 8}
FILES = [
    *("README.md", "chat_template.jinja", "config.json", "generation_config.json"),
    *("manifest.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("training/optimizer.safetensors", "training/state.json"),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A run with checkpoints 1 and 2."""
    run = tmp_path_factory.mktemp("good")
    model = build("gpt2", tokenizer=train_from_texts(["abc"], "char"), **SIZES)
    model.tokenizer.chat_template = "{{ messages }}"
    for step in (1, 2):
        training = TrainingState({"optimizer": {"exp_avg/w": torch.ones(3)}}, {"step": step})
        save_checkpoint(run, model, step=step, tokens=9, pretrain_block={}, training=training)
    return run


@pytest.fixture
def run(good, tmp_path):
    shutil.copytree(good, tmp_path / "run")
    return tmp_path / "run"


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << position % 8
    path.write_bytes(data)


def missing(path):
    path.unlink()


def truncated(path):
    os.truncate(path, path.stat().st_size // 2)


def zero_bytes(path):
    os.truncate(path, 0)


def bit_flipped(path):
    flip(path, path.stat().st_size * 2 // 3)


def page_zeroed(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def longer(path):
    path.write_bytes(path.read_bytes() + b"\0")


def linked(path):
    elsewhere = next(parent for parent in path.parents if parent.name == "run").parent / "elsewhere"
    shutil.move(path, elsewhere)
    os.symlink(elsewhere, path)


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = [missing, truncated, zero_bytes, bit_flipped, page_zeroed, longer, linked, fifo, folder]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_named_and_the_one_before_is_used(run, name, damage, capfd):
    newest = run / "checkpoint-2"
    assert set(FILES) == {str(p.relative_to(newest)) for p in newest.rglob("*") if p.is_file()}
    damage(newest / name)
    began = time.monotonic()
    with pytest.raises(CheckpointCorrupt) as caught:
        verify(newest)
    assert caught.value.file.startswith(str(newest / name))
    assert caught.value.expected
    assert caught.value.found
    if name in INESSENTIAL:
        assert latest_on_all_ranks(run, SINGLE_PROCESS) == newest
        assert latest(run) == newest
        said = capfd.readouterr().err.splitlines()
        assert len(said) == 2 and said[0] == said[1] and name in said[0]
        model = load(run, quiet=True)
        assert model.source == str(newest) and model.tokenizer.chat_template == "{{ messages }}"
        said = capfd.readouterr().err.splitlines()
        assert len(said) == 1 and name in said[0]
        assert inspect(newest)["manifest"].startswith("broken: ")
        return
    assert latest(run) == run / "checkpoint-1"
    said = capfd.readouterr().err
    assert len(said.splitlines()) == 1
    assert said.startswith("checkpoint-2 is broken")
    assert name in said
    if name.startswith("training/"):
        load(newest, quiet=True)  # never reads that folder
        with pytest.raises(CheckpointError):
            read_training(newest)
    else:
        with pytest.raises(CheckpointCorrupt) as caught:
            load(newest)
        assert caught.value.file.startswith(str(newest / name))
        capfd.readouterr()
        load(run)
        said = capfd.readouterr().err.splitlines()
        assert len(said) == 2
        assert said[0].startswith("checkpoint-2 is broken")
        assert said[1].startswith("gpt2: ")
    assert inspect(newest)["manifest"].startswith("broken: ")
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "name",
    ["extra.safetensors", "vocab.txt", "pytorch_model.bin", "training/rng.pt", "x/y"],
)
def test_extra_files_are_refused(run, name):
    newest = run / "checkpoint-2"
    (newest / name).parent.mkdir(exist_ok=True)
    (newest / name).write_bytes(b"x")
    with pytest.raises(CheckpointCorrupt, match="does not list it"):
        verify(newest)
    assert latest(run) == run / "checkpoint-1"


def test_hidden_files_of_file_managers_and_downloads_are_left_alone(run):
    (run / "checkpoint-2" / ".gitattributes").write_text("*.safetensors filter=lfs")
    (run / "checkpoint-2" / ".cache").mkdir()
    verify(run / "checkpoint-2")
    load(run / "checkpoint-2", quiet=True)


def test_a_run_none_of_whose_checkpoints_is_whole_stops(run, capfd):
    for step in (1, 2):
        bit_flipped(run / f"checkpoint-{step}" / "training" / "optimizer.safetensors")
    with pytest.raises(
        CheckpointError, match=r"holds 2 checkpoints, but none is complete.*move the dir"
    ):
        latest_on_all_ranks(run, SINGLE_PROCESS)
    assert latest_on_all_ranks(run.parent / "another", SINGLE_PROCESS) is None


def test_a_checkpoint_without_its_training_folder_is_no_place_to_resume_from(run, capfd):
    shutil.rmtree(run / "checkpoint-2" / "training")
    assert latest_on_all_ranks(run, SINGLE_PROCESS) == run / "checkpoint-1"
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("checkpoint-2 is broken or incomplete")
    assert latest(run) == run / "checkpoint-2"  # its weights are whole
    shutil.rmtree(run / "checkpoint-1" / "training")
    with pytest.raises(CheckpointError, match=r"holds 2 checkpoints.*has no training/ folder"):
        latest_on_all_ranks(run, SINGLE_PROCESS)


def test_no_flipped_bit_goes_unnoticed(run):
    rng, newest = random.Random(0), run / "checkpoint-2"
    for name in FILES:
        path = newest / name
        data = path.read_bytes()
        for position in rng.sample(range(len(data)), min(40, len(data))):
            flip(path, position)
            with pytest.raises(CheckpointCorrupt) as caught:
                verify(newest)
            assert caught.value.file == str(path)
            path.write_bytes(data)
    verify(newest)


def test_files_of_another_checkpoint_are_noticed(run):
    one, two = run / "checkpoint-1", run / "checkpoint-2"
    shutil.copy(one / "config.json", two / "config.json")  # same size, other step
    with pytest.raises(CheckpointCorrupt, match=r"config\.json"):
        load(two)
    shutil.copy(one / "manifest.json", two / "manifest.json")
    with pytest.raises(CheckpointCorrupt) as caught:
        load(two)
    assert (caught.value.expected, caught.value.found) == ("step 2", "step 1")
    shutil.rmtree(two)
    one.rename(two)
    with pytest.raises(CheckpointCorrupt, match=r"renamed"):
        verify(two)
    two.rename(run / "final")
    verify(run / "final")


def sealed(body):
    """A manifest with a digest that is right: what a forger writes."""
    from pretrain.utils.strict_json import to_json

    body.pop("digest", None)
    return to_json({**body, "digest": hashlib.sha256(to_json(body)).hexdigest()})


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(schema=99),
        lambda body: body.update(schema="1"),
        lambda body: body.update(step="2"),
        lambda body: body.update(step=True),
        lambda body: body.update(files=[]),
        lambda body: body.update(files={}),
        lambda body: body["files"].update({"../evil": {"size": 1, "sha256": ""}}),
        lambda body: body["files"].update({"/etc/passwd": {"size": 1, "sha256": ""}}),
        lambda body: body["files"].update({"training/../../x": {"size": 1, "sha256": ""}}),
        lambda body: body["files"].update({"C:\\x": {"size": 1, "sha256": ""}}),
        lambda body: body["files"].update({"a\0b": {"size": 1, "sha256": ""}}),
        lambda body: body["files"].update({"model.safetensors": 3}),
        lambda body: body["files"]["model.safetensors"].update(size=-1),
        lambda body: body["files"]["model.safetensors"].update(size=1.0),
        lambda body: body["files"]["model.safetensors"].update(sha256=None),
        lambda body: body["files"]["model.safetensors"].pop("size"),
        lambda body: body.update(environment=[1]),
    ],
)
def test_forged_manifests_are_refused(run, change):
    path = run / "checkpoint-2" / "manifest.json"
    body = json.loads(path.read_text())
    path.write_bytes(sealed(body))
    verify(run / "checkpoint-2")
    change(body)
    path.write_bytes(sealed(body))
    with pytest.raises(CheckpointCorrupt) as caught:
        verify(run / "checkpoint-2")
    assert caught.value.file == str(path)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b'{"digest": 3}', b'{"a":1,"a":2}', b"\xff" * 50, b"[" * 9999],
)
def test_mangled_manifests_are_refused(run, data):
    (run / "checkpoint-2" / "manifest.json").write_bytes(data)
    with pytest.raises(CheckpointCorrupt):
        verify(run / "checkpoint-2")
    assert latest(run) == run / "checkpoint-1"


def test_without_a_manifest_a_checkpoint_of_ours_does_not_exist(run, tmp_path):
    newest = run / "checkpoint-2"
    (newest / "manifest.json").unlink()
    with pytest.raises(CheckpointCorrupt, match=r"manifest\.json"):
        load(newest)
    load(newest, verify=False, quiet=True)
    shutil.rmtree(newest / "training")
    with pytest.raises(CheckpointCorrupt, match=r"manifest\.json"):
        load(newest)
    newest.rename(tmp_path / "plain")  # a plain Hugging Face directory from now on
    load(tmp_path / "plain", quiet=True)
    assert inspect(tmp_path / "plain")["manifest"] == "absent"


def test_all_broken(run):
    for step in (1, 2):
        (run / f"checkpoint-{step}" / "manifest.json").unlink()
    assert latest(run) is None
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load(run)


def test_a_change_on_purpose_can_be_loaded_without_verification(run, tmp_path):
    (run / "checkpoint-2" / "README.md").write_text("my own card")
    load(run / "checkpoint-2", quiet=True)
    config = run / "checkpoint-2" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(CheckpointCorrupt):
        load(run / "checkpoint-2")
    model = load(run / "checkpoint-2", verify=False, quiet=True)
    save_model(model, tmp_path / "again")
    verify(tmp_path / "again")


# ------------------------------------------------------------------------------------------------ foreign files


class Payload:
    def __reduce__(self):
        return os.system, ("touch /tmp/pretrain-payload-ran",)


OPENED: list[str] | None = None


def watch(event, arguments):
    if OPENED is not None and event in (
        "open",
        "pickle.find_class",
        "os.system",
        "subprocess.Popen",
        "exec",
    ):
        OPENED.append(f"{event} {arguments[0]!r}")


sys.addaudithook(watch)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "pytorch_model.bin",
            "model.pt",
            "model.pth",
            "model.ckpt",
            "pytorch_model-00001-of-00002.bin",
        ),
        *("model.pkl", "weights.npy", "__0_0.distcp", "adapter_model.bin"),
    ],
)
def test_pickles_are_refused_and_never_opened(tmp_path, name):
    global OPENED
    config = build("gpt2", vocab_size=9, **SIZES).hf_config()
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / name).write_bytes(pickle.dumps(Payload()))
    OPENED = []
    try:
        advice = r"save_pretrained\(.*safe_serialization=True"
        if name == "adapter_model.bin":
            advice = r"save_file\(peft.load_peft_weights\("
        with pytest.raises(CheckpointError, match=f"never opens them.*{advice}"):
            load(tmp_path)
        with pytest.raises(CheckpointError):
            inspect(tmp_path)
        assert latest(tmp_path) is None
        seen, OPENED = OPENED, None
    finally:
        OPENED = None
    assert any("config.json" in event for event in seen), "the hook works"
    assert not [event for event in seen if name in event or not event.startswith("open")]
    assert not Path("/tmp/pretrain-payload-ran").exists()


@pytest.mark.parametrize(
    "slot", ["model.safetensors", "config.json", "manifest.json", "model.safetensors.index.json"]
)
def test_a_pickle_under_another_name_is_just_bytes(tmp_path, slot):
    save_model(build("gpt2", vocab_size=9, **SIZES), tmp_path / "m")
    (tmp_path / "m" / slot).write_bytes(pickle.dumps(Payload()))
    if slot.endswith("index.json"):
        (tmp_path / "m" / "model.safetensors").unlink()
    if slot != "manifest.json":
        (tmp_path / "m" / "manifest.json").unlink()
    with pytest.raises(CheckpointCorrupt):
        load(tmp_path / "m")
    assert not Path("/tmp/pretrain-payload-ran").exists()


def plain(tmp_path, **options):
    """A directory as transformers writes it: no manifest."""
    model = build("gpt2", **({"vocab_size": 9} | SIZES | options))
    save_model(model, tmp_path / "m", max_shard_bytes=500)
    (tmp_path / "m" / "manifest.json").unlink()
    return tmp_path / "m"


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.update({next(iter(table)): "../m/config.json"}),
        lambda table: table.update({next(iter(table)): "/etc/passwd"}),
        lambda table: table.update({next(iter(table)): "sub/model.safetensors"}),
        lambda table: table.update({next(iter(table)): ".hidden.safetensors"}),
        lambda table: table.update({next(iter(table)): "pytorch_model.bin"}),
        lambda table: table.update({next(iter(table)): ["a"]}),
        lambda table: table.update({"no.such.tensor": next(iter(table.values()))}),
        lambda table: table.pop(next(iter(table))),
        lambda table: table.update({next(iter(table)): "absent.safetensors"}),
        lambda table: table.clear(),
    ],
)
def test_a_lying_index_is_refused(tmp_path, change):
    path = plain(tmp_path)
    load(path, quiet=True)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    change(index["weight_map"])
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointCorrupt):
        load(path)


def test_a_zero_byte_shard_of_a_plain_directory(tmp_path):
    path = plain(tmp_path)
    shard = sorted(path.glob("model-*.safetensors"))[1]
    os.truncate(shard, 0)
    with pytest.raises(CheckpointCorrupt) as caught:
        load(path)
    assert caught.value.file == str(shard)


def test_weights_that_do_not_fit(tmp_path):
    path = plain(tmp_path)
    for key, value, error in (
        ("n_embd", 16, CheckpointError),
        ("n_layer", 2, CheckpointError),
        ("vocab_size", 10, CheckpointError),
        ("model_type", "no-such-family", ConfigError),
        ("model_type", "os:system", ConfigError),
        ("model_type", None, ConfigError),
    ):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(error):
            load(path)
        (path / "config.json").write_text(json.dumps(config))
    load(path, quiet=True)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "modernbert"])
def test_absurd_sizes_are_refused_before_memory_is_taken(tmp_path, family):
    path = plain(tmp_path)
    clean = build(family, vocab_size=9, **SIZES).hf_config()
    width, layers = (
        ("n_embd", "n_layer") if family == "gpt2" else ("hidden_size", "num_hidden_layers")
    )
    cases = [
        {width: 2**31},
        {"vocab_size": 2**40},
        {layers: 10**9},
        {layers: 0},
        {width: 1.5},
        {"vocab_size": -1},
    ]
    cases += [{width: "8"}, {width: None}, {"vocab_size": True}, {width: 2**16, layers: 4096}]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in cases:
        (path / "config.json").write_text(json.dumps(clean | case))
        began = time.perf_counter()
        with pytest.raises(ConfigError):
            load(path)
        assert time.perf_counter() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.parametrize(
    "text", ['{"a": NaN}', '{"a":1,"a":2}', "[]", "", '{"model_type": "gpt2"', '"gpt2"', "\ufeff{}"]
)
def test_config_must_be_strict_json(tmp_path, text):
    path = plain(tmp_path)
    (path / "config.json").write_text(text)
    with pytest.raises(CheckpointCorrupt):
        load(path)


def test_a_tokenizer_that_does_not_fit(tmp_path):
    path = plain(tmp_path)
    train_from_texts(["abc"], "char").save(path)
    with pytest.raises(
        CheckpointError,
        match=r"tokenizer has 264 ids and the model 9 embedding rows.*resize_token_embeddings\(264\)",
    ):
        load(path)
    assert load(path, tokenizer=False, quiet=True).tokenizer is None
    padded = build("gpt2", vocab_size=320, **SIZES)  # rows rounded up are fine
    save_model(padded, tmp_path / "padded")
    train_from_texts(["abc"], "char").save(tmp_path / "padded")
    assert len(load(tmp_path / "padded", verify=False, quiet=True).tokenizer) == 264


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\x00\xff", b'{"model": {"type": "BPE"}}', b"{" * 5000]
)
def test_a_broken_tokenizer(tmp_path, content):
    path = plain(tmp_path)
    (path / "tokenizer.json").write_bytes(content)
    with pytest.raises(PretrainError, match="tokenizer"):
        load(path)


def test_a_tokenizer_that_is_no_file(tmp_path):
    path = plain(tmp_path)
    os.symlink("/etc/passwd", path / "tokenizer.json")
    with pytest.raises(CheckpointCorrupt, match="regular file"):
        load(path)
    (path / "tokenizer.json").unlink()
    os.mkfifo(path / "tokenizer_config.json")
    with pytest.raises(CheckpointCorrupt, match="regular file"):
        load(path)


def test_weights_with_nan_are_not_taken_for_healthy(tmp_path):
    from safetensors.torch import load_file, save_file

    save_model(build("gpt2", vocab_size=9, **SIZES), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-4] + b"\xff" * 4)
    with pytest.raises(CheckpointCorrupt, match="SHA-256"):  # damage is not called divergence
        load(tmp_path / "m")
    file.write_bytes(good)
    tensors = load_file(file)
    tensors["transformer.ln_f.weight"][0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"transformer\.ln_f\.weight.*NaN"):
        load(tmp_path / "m", verify=False)


def test_places_that_hold_no_model(tmp_path):
    (tmp_path / "file.safetensors").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "trainer" / "checkpoint-500").mkdir(parents=True)
    for name, words in (
        ("absent", "no such directory"),
        ("file.safetensors", "is a file"),
        ("empty", r"has no model\.safetensors"),
        ("adapter", "PEFT adapter"),
        ("trainer", "checkpoint-500"),
    ):
        with pytest.raises(CheckpointError, match=words):
            load(tmp_path / name)
    with pytest.raises(CheckpointError):
        load("/dev/null")


READERS = {"load": load, "inspect": inspect, "latest": latest, "verify": verify}
READERS |= {"read_training": read_training}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["n" * 300, "~nouser/x", "a\0b", "x/" * 3000])
def test_impossible_names_are_sentences(reader, name, tmp_path):
    """A name longer than the system allows, a user who is not there, a zero byte."""
    for path in (name, tmp_path / name):
        if reader == "latest":  # no run there is no error, a name that cannot be looked up is one
            with contextlib.suppress(CheckpointError):
                assert latest(path) is None
            continue
        with pytest.raises(CheckpointError, match=r"no such directory|too long|cannot be the name"):
            READERS[reader](path)


@pytest.mark.parametrize("reader", READERS)
def test_a_directory_that_may_not_be_read_is_a_sentence(reader, run, monkeypatch):
    """Mode 000; simulated, because root reads everything."""

    def refuse(path=".", *_):
        raise PermissionError(13, "Permission denied", str(path))

    for call in ("listdir", "scandir") if reader != "read_training" else ("open",):
        monkeypatch.setattr(os, call, refuse)
    path = run if reader == "latest" else run / "checkpoint-2"
    with pytest.raises(CheckpointError, match=r"run.* cannot be read: Permission denied"):
        READERS[reader](path)


def test_an_unreadable_newest_checkpoint_is_passed_over_aloud(run, monkeypatch, capfd):
    original = os.scandir

    def refuse(path="."):
        if "checkpoint-2" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert latest(run) == run / "checkpoint-1"
    assert "checkpoint-2 is broken or incomplete and is skipped" in capfd.readouterr().err


def test_saving_under_an_impossible_name_is_a_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="File name too long"):
        save_model(build("gpt2", vocab_size=9, **SIZES), tmp_path / ("n" * 300))


def test_a_file_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    """What was verified is what is used: the file is read once."""
    from pretrain.checkpoint import model_directory

    save_model(build("gpt2", vocab_size=9, **SIZES), tmp_path / "m")
    wanted = load(tmp_path / "m", quiet=True).state_dict()
    original = model_directory.checked_tensors

    @contextlib.contextmanager
    def then_cut(path, *arguments, **options):
        with original(path, *arguments, **options) as found:
            os.truncate(path, 0)
            yield found

    monkeypatch.setattr(model_directory, "checked_tensors", then_cut)
    found = load(tmp_path / "m", quiet=True).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
