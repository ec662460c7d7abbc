"""Images as sequences of patches (ViT, arXiv 2010.11929): embedding, positions of the grid, and the pixels of patches.

Letters: B images, C channels, H x W pixels, p side of a patch, N patches, D hidden.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.errors import ModelError

__all__ = ["PatchEmbedding", "grid_positions", "patch_pixels"]


class PatchEmbedding(nn.Module):
    """Embed the patches of images, (B, C, H, W) -> (B, N, D), or (B, 1 + N, D) with a class token first.

    Positions are for square images of one size; for a grid of another shape they are interpolated (section 3.2).

    Args:
        hidden_size: D.
        image_size: H = W of the positions; what is left beyond a whole number of patches is not used.
        patch_size: p.
        num_channels: C.
        class_token: put a learned token before the patches.
        fixed: positions are the sines and cosines of ``grid_positions``, a buffer that files hold and no step changes.
        bias: bias of the projection.
        lead: leading dimensions of size 1 of the class token and the positions, as the files of the family have them:
            1 gives the shapes (1, 1, D) and (1, N, D), 0 gives (D,) and (N, D).
        antialias: average neighbouring positions where they are interpolated to a smaller grid.
    """

    constant_buffers: ClassVar[tuple[str, ...]] = ("positions",)

    def __init__(
        self,
        hidden_size: int,
        image_size: int,
        patch_size: int,
        num_channels: int,
        *,
        class_token: bool = True,
        fixed: bool = False,
        bias: bool = True,
        lead: int = 1,
        antialias: bool = False,
    ) -> None:
        super().__init__()
        self.shape = (num_channels, image_size, image_size)
        self.side = side = image_size // patch_size
        self.antialias = antialias
        self.projection = nn.Conv2d(num_channels, hidden_size, patch_size, patch_size, bias=bias)
        ones, rows = (1,) * lead, int(class_token) + side**2
        self.class_token = (
            nn.Parameter(torch.zeros(*ones, *ones, hidden_size)) if class_token else None
        )
        self.positions: Tensor
        if fixed:
            table = grid_positions(side, hidden_size, class_token=class_token)
            self.register_buffer("positions", table.reshape(*ones, rows, hidden_size))
        else:
            self.positions = nn.Parameter(torch.zeros(*ones, rows, hidden_size))

    def forward(self, pixels: Tensor, visible: Tensor | None = None) -> Tensor:
        """Embed all patches, or only those of ``visible``, (B, K) indices into the grid, row by row."""
        grid = self.projection(pixels)  # (B, D, rows, columns)
        first, places = self.positions_of(grid.shape[2], grid.shape[3])
        x: Tensor = grid.flatten(2).transpose(1, 2) + places
        if visible is not None:
            x = x.gather(1, visible[..., None].expand(-1, -1, x.shape[-1]))
        if self.class_token is None:
            return x
        token = (self.class_token + first).to(x.dtype)
        return torch.cat((token.expand(len(x), 1, -1), x), dim=1)

    def positions_of(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Return the positions of the class token and of a grid, interpolated if it is not that of ``image_size``."""
        first = self.positions.shape[-2] - self.side**2
        token, table = self.positions[..., :first, :], self.positions[..., first:, :]
        if rows == columns == self.side:
            return token, table
        grid = table.reshape(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        size, soft = (rows, columns), self.antialias
        grid = F.interpolate(grid, size, mode="bicubic", align_corners=False, antialias=soft)
        return token, grid.flatten(2).transpose(1, 2)

    def check(self, pixels: Tensor) -> None:
        """Check that images have the shape that the positions are for, in families that do not interpolate.

        Raises:
            ModelError: they have another one.
        """
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != self.shape:
            channels, side, _ = self.shape
            raise ModelError(
                f"pixel_values has the shape {tuple(pixels.shape)}; it must be (images, {channels}, {side}, {side}). "
                "Resize the images, or build the model with their image_size and num_channels."
            )


def grid_positions(side: int | tuple[int, int], hidden_size: int, *, class_token: int) -> Tensor:
    """Return sines and cosines of column and row, (N, D), after as many rows of zeros as there are class tokens.

    ``side`` is that of a square grid, or rows and columns.

    The first half of the features tells the column and the second the row, as in the published weights of MAE
    (arXiv 2111.06377); D must be a multiple of 4.
    """
    quarter = hidden_size // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = (side, side) if isinstance(side, int) else side
    place = torch.arange(max(rows, columns), dtype=torch.float64)[:, None] * frequency
    waves = torch.cat((place.sin(), place.cos()), dim=1)  # (longer side, D / 2)
    column, row = waves[:columns].repeat(rows, 1), waves[:rows].repeat_interleave(columns, 0)
    table = torch.cat((column, row), dim=1)
    if class_token:
        table = torch.cat((table.new_zeros(int(class_token), table.shape[1]), table))
    return table.float()


def patch_pixels(pixels: Tensor, patch_size: int) -> Tensor:
    """Return the pixels of each patch, channels last, (B, C, H, W) -> (B, N, p · p · C)."""
    grid = pixels.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    return grid.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
