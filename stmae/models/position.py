"""Position embeddings, learned (separable or joint) or fixed, and how learned ones are carried over to another patch grid."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

KEPT_TABLES = 32  # interpolated fixed tables, 5 MB each for ViT-B on 8x14x14


class Position(nn.Module):
    """Position embeddings for a patch grid (t, h, w) and, optionally, a class token. Calling it gives all of them, the class
    token's first.

    Separable: ``spatial`` [h * w, D], ``temporal`` [t, D] and, with a class token, ``class_token`` [1, D].
    Joint: ``joint`` [N, D], or [1 + N, D] with the class token's first. With ``table_grid``: ``table``, of the same shape, not
    learned and in no checkpoint: VideoMAE's sines and cosines of that grid, interpolated where ``grid`` is another.
    """

    table: torch.Tensor

    def __init__(
        self,
        grid: tuple[int, int, int],
        width: int,
        *,
        separable: bool,
        class_token: bool,
        table_grid: tuple[int, int, int] | None = None,
    ):
        super().__init__()
        t, h, w = grid
        self.grid = grid
        self.separable = separable
        self.has_class_token = class_token
        self.table_grid = table_grid
        self._tables: dict[tuple, torch.Tensor] = {}  # the fixed table of other grids
        if table_grid is not None:
            self.register_buffer("table", torch.empty(t * h * w + class_token, width), persistent=False)
            self.reset_buffers()
        elif separable:
            self.spatial = nn.Parameter(torch.empty(h * w, width))
            self.temporal = nn.Parameter(torch.empty(t, width))
            if class_token:
                self.class_token = nn.Parameter(torch.empty(1, width))
        else:
            self.joint = nn.Parameter(torch.empty(t * h * w + class_token, width))
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Computes the fixed table, which no checkpoint holds, in place."""
        if self.table_grid is not None:
            first = int(self.has_class_token)
            table = sincos_position(math.prod(self.table_grid), self.table.shape[1])
            self.table[:first] = 0
            self.table[first:] = interpolate_position(table, self.table_grid, self.grid)

    def _joint(self) -> torch.Tensor:
        return self.joint if self.table_grid is None else self.table

    def of_patches(self, grid: tuple[int, int, int] | None = None) -> torch.Tensor:
        """[N, D] of a patch grid, by default its own. Learned ones are interpolated, so that gradients go through; the fixed
        table's are kept for some grids."""
        if grid is None or grid == self.grid:
            if self.separable:
                return (self.temporal[:, None] + self.spatial).flatten(0, 1)
            return self._joint()[1:] if self.has_class_token else self._joint()
        t, h, w = grid
        if self.separable:
            space = interpolate_position(self.spatial, (1, *self.grid[1:]), (1, h, w))
            time = interpolate_position(self.temporal, (self.grid[0], 1, 1), (t, 1, 1))
            return (time[:, None] + space).flatten(0, 1)
        if self.table_grid is None:
            return interpolate_position(self.of_patches(), self.grid, grid)
        key = grid, self.table.device, self.table.dtype
        if key not in self._tables:
            table = interpolate_position(sincos_position(math.prod(self.table_grid), self.table.shape[1]), self.table_grid, grid)
            if len(self._tables) == KEPT_TABLES:  # a batch of native sizes has some of hundreds of grids
                del self._tables[next(iter(self._tables))]
            self._tables[key] = table.to(self.table)
        return self._tables[key]

    def of_class_token(self) -> torch.Tensor:
        """[1, D]; only where there is a class token."""
        return self.class_token if self.separable else self._joint()[:1]

    def forward(self, grids: Sequence[tuple[int, int, int]] | None = None) -> torch.Tensor | list[torch.Tensor]:
        """[N, D] or, with a class token, [1 + N, D]. For a list of patch grids a list of those, computed once for equal grids."""
        if grids is not None:
            first = [self.of_class_token()] if self.has_class_token else []
            own = {grid: torch.cat([*first, self.of_patches(grid)]) for grid in dict.fromkeys(grids)}
            return [own[grid] for grid in grids]
        if self.separable and self.has_class_token:
            return torch.cat([self.class_token, self.of_patches()])
        return self.of_patches() if self.separable else self._joint()


def sincos_position(tokens: int, width: int) -> torch.Tensor:
    """VideoMAE's fixed positions [tokens, width] float32: at token n, sin(n / 10000^(2i / D)) in place 2i and the cosine in
    place 2i + 1, computed in double precision as there.

    Source: Vaswani et al., "Attention Is All You Need", section 3.5; Tong et al., "VideoMAE", over the flattened patch grid.
    """
    place = torch.arange(width, dtype=torch.float64, device="cpu")
    angle = torch.arange(tokens, dtype=torch.float64, device="cpu")[:, None] / 10000 ** (2 * (place // 2) / width)
    return torch.where(place % 2 == 0, angle.sin(), angle.cos()).float()


def interpolate_position(values: torch.Tensor, old_grid: tuple[int, int, int], new_grid: tuple[int, int, int]) -> torch.Tensor:
    """Carries values [t * h * w, D] on ``old_grid`` over to ``new_grid``: bicubic in space, linear in time,
    float32 inside.

    The same grid gives the same values back. Spatial embeddings are passed with t = 1, temporal ones with h =
    w = 1; since both steps are linear and separable, interpolating the parts of separable embeddings equals
    interpolating their sum.
    """
    (t, h, w), (new_t, new_h, new_w) = old_grid, new_grid
    width = values.shape[-1]
    if values.shape[0] != t * h * w:
        raise ValueError(f"interpolate_position: expected values [{t * h * w}, D] for grid {t}x{h}x{w}, got {list(values.shape)}")
    x = values.float().reshape(t, h, w, width)
    if (h, w) != (new_h, new_w):
        x = F.interpolate(x.permute(0, 3, 1, 2), (new_h, new_w), mode="bicubic", align_corners=False)
        x = x.permute(0, 2, 3, 1)
    if t != new_t:
        x = x.reshape(t, new_h * new_w * width).t()[None]  # [1, values, t]
        x = F.interpolate(x, new_t, mode="linear", align_corners=False)[0].t()
    return x.reshape(new_t * new_h * new_w, width).to(values.dtype)
