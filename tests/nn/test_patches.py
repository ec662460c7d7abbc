"""Patches of images: their embedding, the sine positions and their pixels, against transformers and plain loops."""

from __future__ import annotations

import pytest
import torch
from transformers import ViTConfig
from transformers.models.vit.modeling_vit import ViTEmbeddings
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from pretrain.errors import ModelError
from pretrain.nn.patches import PatchEmbedding, grid_positions, patch_pixels


def test_grid_positions_are_those_of_published_mae():
    # transformers 5.23 leaves the positions of a fresh model at zero, so its function is called.
    wanted = build_2d_sinusoidal_position_embedding(5, 5, 24, cls_token=True)
    wanted = torch.cat((wanted[:, 12:], wanted[:, :12]), dim=1)  # as ViTMAEEmbeddings has them
    torch.testing.assert_close(grid_positions(5, 24, class_token=True), wanted, rtol=0, atol=1e-6)
    assert torch.equal(
        grid_positions(5, 24, class_token=False), grid_positions(5, 24, class_token=True)[1:]
    )


def test_embedding_equals_that_of_transformers():
    theirs = ViTEmbeddings(ViTConfig(hidden_size=16, image_size=12, patch_size=4)).eval()
    ours = PatchEmbedding(16, 12, 4, 3)
    state = theirs.state_dict()
    ours.load_state_dict(
        {
            "projection.weight": state["patch_embeddings.projection.weight"],
            "projection.bias": state["patch_embeddings.projection.bias"],
            "class_token": state["cls_token"],
            "positions": state["position_embeddings"],
        }
    )
    images = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(ours(images), theirs(images))
    visible = torch.tensor([[8, 0], [3, 4]])
    some = ours(images, visible)
    whole = ours(images)
    assert some.shape == (2, 3, 16)
    for row in range(2):
        assert torch.equal(some[row, 1:], whole[row, 1 + visible[row]])
    assert torch.equal(some[:, 0], whole[:, 0])


@pytest.mark.parametrize("lead", [0, 1])
def test_shapes_without_a_class_token(lead: int):
    module = PatchEmbedding(8, 13, 4, 1, class_token=False, bias=False, lead=lead)  # 13 = 3 * 4 + 1
    assert module.positions.shape == ((1, 9, 8) if lead else (9, 8))
    assert module(torch.randn(2, 1, 13, 13)).shape == (2, 9, 8)


def test_another_size_is_refused_where_it_is_not_interpolated():
    module = PatchEmbedding(8, 12, 4, 3)
    module.check(torch.zeros(2, 3, 12, 12))
    for shape in ((2, 3, 16, 16), (2, 1, 12, 12), (3, 12, 12)):
        with pytest.raises(ModelError, match=r"must be \(images, 3, 12, 12\)"):
            module.check(torch.zeros(shape))


def test_patch_pixels_are_in_reading_order():
    images = torch.randn(2, 3, 6, 6)
    found = patch_pixels(images, 2)
    assert found.shape == (2, 9, 12)
    for row in range(3):
        for column in range(3):
            patch = images[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            wanted = patch.permute(0, 2, 3, 1).flatten(1)
            assert torch.equal(found[:, 3 * row + column], wanted)
