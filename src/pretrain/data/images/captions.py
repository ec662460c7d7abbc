"""Images with their captions: the rows that ``data.source: image_text`` names, and a tokenizer of the captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.images.pairs import PairProcessor
from pretrain.data.images.rows import parts_of, pictures, read_images
from pretrain.data.images.source import IMAGE, file_examples, processor_for
from pretrain.data.labelled import (
    Role,
    choose_columns,
    drop_duplicates,
    roles_table,
    split,
    text_id,
)
from pretrain.data.labels import listed
from pretrain.data.row_source import RowSource
from pretrain.data.tables import Table
from pretrain.data.tokenizer import KINDS, Tokenizer, train_from_texts
from pretrain.errors import DataError, TokenizerError
from pretrain.utils.files import note

__all__ = [
    "CAPTION",
    "caption_fields",
    "captioned_images",
    "captions_by_row",
    "listed",
    "one_row_for_each_image",
    "read_pairs",
]

CAPTION = Role(
    "caption",
    (
        *("caption", "captions", "text", "texts", "sentence", "sentences", "description"),
        *("alt_text", "alt", "title", "raw"),
    ),
    help="the text of the image, or a list of several",
)
_LEAST, _MOST = 32, 77  # tokens of a caption in a new model; prompts are longer than names


def captioned_images(
    train: str,
    valid: float | str | None = None,
    *,
    image: str | None = None,
    caption: str | None = None,
    size: int | None = None,
    channels: int = 3,
    tokenizer: str = "bpe",
    vocab_size: int = 8192,
    lowercase: bool = False,
    max_length: int | None = None,
    seed: int = 0,
) -> RowSource:
    """Return rows of images with their captions, for the objectives ``Contrastive`` and ``SigmoidContrastive``.

    Args:
        train: a table with a column of images and one of captions, a folder of images with a ``.txt`` beside each or
            with ``metadata.csv``, or archives of WebDataset; see ``pretrain.data.images.rows.read_images``. Rows of
            one image become one row with several captions, of which each epoch draws one.
        valid: held-out rows: such a source, or a fraction of the images. None: the part ``val`` of the source, if it
            has one, else a tenth.
        image: column of the images; None: it is recognised by its name.
        caption: column of the captions; None: it is recognised by its name.
        size: height and width that the model reads; None: as for ``data.source images``.
        channels: 3 for RGB, 1 for grey.
        tokenizer: a kind to train on the captions (``bpe``, ``wordpiece``, ``char``), or the path or name on the Hub
            of one; that of the checkpoint if one is trained on.
        vocab_size: upper bound for a trained vocabulary.
        lowercase: train a WordPiece tokenizer that drops case and accents.
        max_length: tokens of a caption, with its frame, after which it is cut; None: those of the longest caption, at
            least 32 and at most 77.
        seed: seed of the split.

    Returns:
        Rows with ``image`` and ``input_ids`` (all captions, whose ``lengths`` stand beside them if there are several);
        the processor of both; and the fields of a new model.

    Raises:
        DataError: no images, no captions, or an image that does not exist.
        TokenizerError: the tokenizer cannot be opened or trained.
    """
    if lowercase and tokenizer != "wordpiece":
        raise TokenizerError(
            "lowercase is for the tokenizer that is trained with data.source_args.tokenizer=wordpiece. Leave it out."
        )
    columns = {"image": image, "caption": caption}
    whole = read_pairs(train, columns, "train")
    if valid is None:
        valid = train if "valid" in parts_of(train) else 0.1
    if isinstance(valid, str):
        held = read_pairs(valid, columns, "validation")
    else:
        whole, held = split(whole, None, float(valid), seed)
    whole, _ = drop_duplicates(whole, held, ["image"], "validation")
    texts = [text for captions in whole.columns["caption"] for text in captions]
    if tokenizer in KINDS:
        words = train_from_texts(
            texts, tokenizer, vocab_size=vocab_size, lowercase=lowercase, captions=True
        )
    else:
        words = Tokenizer.open(tokenizer)
    if max_length is None:
        longest = max((len(e.ids) for e in words.frame_texts(texts)), default=1)
        max_length = min(_MOST, max(_LEAST, longest))
    rows, held_rows = (
        _examples(table, words, max_length, what)
        for table, what in ((whole, "training"), (held, "validation"))
    )
    if not rows:
        raise DataError(f"None of the images of {train} can be read.")
    processor, sizes = processor_for(rows, size, channels)
    return RowSource(
        rows,
        held_rows,
        processor=PairProcessor(words, processor),
        overrides={**sizes, "max_positions": max_length},
        name=Path(train).name,
    )


def read_pairs(source: Any, columns: Mapping[str, Any], name: str = "data") -> Table:
    """Read images with their captions as a table of ``image`` and ``caption``, one row for each image.

    Args:
        source: as for ``read_images``.
        columns: role -> column, or None if it is recognised by its name.
        name: what the rows are for.

    Raises:
        DataError: there is no column of images or of captions, or a caption is no text.
    """
    table = read_images(source, name=name)
    found = roles_table(table, choose_columns(table, (IMAGE, CAPTION), columns))
    return one_row_for_each_image(found)


def one_row_for_each_image(table: Table) -> Table:
    """Return ``image`` as pictures and ``caption`` as lists of texts; rows of one image become one.

    Raises:
        DataError: a caption is no text; the message names the row.
    """
    found = captions_by_row(table)
    images = pictures(table)
    merged: dict[str, list[Any]] = {
        "image": [images[i] for i in found],
        "caption": [*found.values()],
    }
    return table.take(list(found)).with_columns(merged, {})


def captions_by_row(table: Table) -> dict[int, list[str]]:
    """Return the captions of every image by the first of its rows.

    Rows without a caption are left out and counted in a printed line, as are further rows of one image.

    Raises:
        DataError: a caption is no text; the message names the row.
    """
    first, found, without = dict[str, int](), dict[int, list[str]](), 0
    for i, image in enumerate(pictures(table)):
        texts = _captions(table, i)
        if not texts:
            without += 1
            continue
        held = found.setdefault(i if image is None else first.setdefault(image.digest, i), [])
        held += [text for text in texts if text not in held]
    if without:
        note(f"{table.name}: {without:,} of {len(table):,} rows have no caption and are left out")
    rows = len(table) - without
    if rows > len(found):
        note(
            f"{table.name}: {len(found):,} images in {rows:,} rows; the captions of one image stand together, and each "
            "epoch draws one of them"
        )
    return found


def _captions(table: Table, i: int) -> list[str]:
    """Return the captions of a row: a text, a list of texts, or such a list in the cell of a CSV file."""
    value = listed(table.columns["caption"][i])
    several = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(several, list | tuple) or not all(isinstance(v, str) for v in several):
        raise DataError(
            f"{table.where(i)}: the caption is {type(value).__name__} {str(value)[:40]!r}, not a text or a list of "
            "texts. Name the column that holds it, or turn its values into strings."
        )
    return [text.strip() for text in several if text.strip()]


def _examples(
    table: Table, tokenizer: Tokenizer, max_length: int, what: str
) -> list[dict[str, Any]]:
    # Training rows have no ids of texts, which would change the fingerprint of earlier runs.
    ids = what != "training"
    fields, cut = caption_fields(table.columns["caption"], tokenizer, max_length, ids=ids)
    if cut:
        note(
            f"{len(cut):,} {what} rows have a caption of more than {max_length} tokens, which is cut "
            "(data.source_args.max_length)"
        )
    return file_examples(table, what, lambda i: fields[i])


def caption_fields(
    captions: Sequence[Sequence[str]], tokenizer: Tokenizer, max_length: int, *, ids: bool = True
) -> tuple[list[dict[str, Any]], list[int]]:
    """Return ``input_ids``, and ``lengths`` if there are several captions, of each row; and the rows that are cut.

    Special tokens typed into a caption are read as plain text, so that it cannot end itself. With ``ids`` the field
    ``text_ids`` tells which captions are alike.
    """
    encodings = tokenizer.frame_texts(
        [text for texts in captions for text in texts], max_length=max_length, special=False
    )
    found, cut, at = list[dict[str, Any]](), list[int](), 0
    for row, texts in enumerate(captions):
        here = encodings[at : at + len(texts)]
        at += len(texts)
        if any(encoding.overflowing for encoding in here):
            cut.append(row)
        fields = {"input_ids": np.concatenate([np.asarray(e.ids, np.int32) for e in here])}
        if len(here) > 1:
            fields["lengths"] = np.asarray([len(e.ids) for e in here], np.int32)
        if ids:
            fields["text_ids"] = np.asarray([text_id(text) for text in texts], np.int64)
        found.append(fields)
    return found, cut
