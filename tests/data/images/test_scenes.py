"""Synthetic scenes: what is drawn is what is said, and held-out pairs stay out of training."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from pretrain.data.images.scenes import COLOURS, SHAPES, UNSEEN, held_out, make_scenes, rows_of


def centre(image: np.ndarray, colour: str) -> tuple[float, float]:
    """Mean row and column of the pixels that are nearest to a colour."""
    tints = np.asarray([*COLOURS.values(), (20, 20, 20)])
    nearest = np.abs(image[:, :, None].astype(int) - tints).sum(-1).argmin(-1)
    rows, columns = np.nonzero(nearest == list(COLOURS).index(colour))
    assert len(rows) >= 8
    return float(rows.mean()), float(columns.mean())


def test_a_scene_is_as_its_caption_says() -> None:
    for scene in [*make_scenes(40, 3), *make_scenes(20, 3, unseen=True)]:
        assert scene.image.shape == (24, 24, 3) and scene.image.dtype == np.uint8
        (row, column), (other_row, other_column) = (
            centre(scene.image, colour) for colour, _ in (scene.first, scene.second)
        )
        apart = {"left of": other_column - column, "above": other_row - row}
        along, across = apart.pop(scene.side), apart.popitem()[1]
        assert along > 5 and abs(across) < along, scene.caption  # so that one caption is right
        assert scene.first[0] != scene.second[0] and scene.first[1] != scene.second[1]
        words = " ".join([scene.caption, *(a for _, a in scene.questions())]).split()
        little = {"a", "of", "left", "right", "above", "below"}
        assert set(words) <= {*COLOURS, *SHAPES, *little}


def test_held_out_pairs_are_in_no_training_scene() -> None:
    known = {pair for scene in make_scenes(800) for pair in (scene.first, scene.second)}
    assert not known & UNSEEN and len(known) == len(COLOURS) * len(SHAPES) - len(UNSEEN)
    assert {scene.first for scene in make_scenes(300, unseen=True)} == UNSEEN
    for part, every in enumerate((COLOURS, SHAPES)):  # each of their parts is seen with others
        assert {pair[part] for pair in UNSEEN} == {pair[part] for pair in known} == set(every)


def test_other_pairs_are_held_out_for_choosing() -> None:
    sets = [held_out(shift) for shift in range(4)]
    assert sets[0] == UNSEEN and len(frozenset().union(*sets)) == len(COLOURS) * len(SHAPES)
    assert all(set(Counter(shape for _, shape in pairs).values()) == {3} for pairs in sets)
    assert all(set(Counter(colour for colour, _ in pairs).values()) == {2} for pairs in sets)
    small = {"size": 12, "colours": 6, "shapes": 4, "apart": sets[1]}
    known = {pair for s in make_scenes(200, **small) for pair in (s.first, s.second)}
    unseen = {s.first for s in make_scenes(100, unseen=True, **small)}
    assert len(known) == 18 and len(unseen) == 6 and unseen < sets[1] and not known & sets[1]


def test_every_shape_looks_like_no_other() -> None:
    drawn = defaultdict[str, set[bytes]](set)
    for scene in make_scenes(400, 1, apart=frozenset()):
        bright = scene.image.max(-1) > 100
        halves = np.split(bright, 2, axis=1 if scene.side == "left of" else 0)
        for half, (_, shape) in zip(halves, (scene.first, scene.second), strict=True):
            rows, columns = np.nonzero(half)
            cut = half[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            drawn[shape].add(bytes(cut.shape) + cut.tobytes())
    assert set(drawn) == set(SHAPES)
    assert len(set().union(*drawn.values())) == sum(len(found) for found in drawn.values())


def test_the_seed_and_the_place_decide() -> None:
    some, more = make_scenes(5, 1), make_scenes(9, 1)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(some, more, strict=False))
    assert any(a.caption != b.caption for a, b in zip(some, make_scenes(5, 2), strict=True))
    rows = rows_of(some)
    assert [row["question"] == "describe" for row in rows] == [True, False] * 5
    assert [row["text"] for row in rows] == [row["text"] for row in rows_of(some)]
    assert len(rows_of(some, questions=0)) == 5
    many = rows_of(some, questions=6)
    for i, scene in enumerate(some):
        asked = [(row["question"], row["text"]) for row in many[7 * i + 1 : 7 * i + 7]]
        assert sorted(asked) == sorted(scene.questions())


@pytest.mark.parametrize("unseen", [pytest.param(False, marks=pytest.mark.slow), True])
def test_questions_do_not_tell_their_answers(unseen: bool) -> None:
    """The commonest answer to each question is as often right for one seed as for seeds that share nothing."""

    def blind(seed: int) -> float:
        rows = rows_of(make_scenes(1200, 0, unseen=unseen, size=12), seed)
        answers = defaultdict[str, Counter[str]](Counter)
        for row in rows[1::2]:
            answers[row["question"]][row["text"]] += 1
        return sum(max(found.values()) for found in answers.values()) / 1200

    assert blind(0) < np.mean([blind(7), blind(8)]) + 0.04
