"""RoIAlign in plain PyTorch, as two products with interpolation weights."""

import torch


def roi_align(features: torch.Tensor, boxes: torch.Tensor, clip: torch.Tensor, size: int) -> torch.Tensor:
    """What lies in each box of a feature map, on a grid of ``size`` x ``size`` cells.

    A cell is the mean of bilinear samples spread evenly over it, ``ceil(side of the box in pixels / size)`` along each axis,
    where pixel (i, j) has its centre at (i + 0.5, j + 0.5): ``torchvision.ops.roi_align`` with ``sampling_ratio=0,
    aligned=True``. The weight of a pixel in a cell is a product of one for its row and one for its column, so what is in a box
    is ``R F C^T``, and no sample is gathered.

    Args:
        features: [B, D, h, w] floating point.
        boxes: [K, 4] (x1, y1, x2, y2), relative to the width and height of the map: 0 is its left or upper edge, 1 the other.
        clip: [K] int64, which of the B maps a box lies in.
        size: cells along a side.

    Returns:
        [K, D, size, size], in the dtype of ``features``; a box without area gives zeros.

    Raises:
        ValueError: operands of other shapes or dtypes.

    Source: He et al., "Mask R-CNN", section 3.
    """
    if features.dim() != 4 or not features.is_floating_point():
        raise ValueError(f"roi_align: expected features [B, D, h, w] floating point, got {list(features.shape)} {features.dtype}")
    if boxes.dim() != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        raise ValueError(f"roi_align: expected boxes [K, 4] floating point, got {list(boxes.shape)} {boxes.dtype}")
    if clip.shape != boxes.shape[:1] or clip.dtype != torch.int64:
        raise ValueError(f"roi_align: expected clip [{len(boxes)}] int64, got {list(clip.shape)} {clip.dtype}")
    if size < 1:
        raise ValueError(f"roi_align: expected size of 1 or more, got {size}")
    height, width = features.shape[2:]
    columns = _axis_weights(boxes[:, 0], boxes[:, 2], width, size).to(features.dtype)
    rows = _axis_weights(boxes[:, 1], boxes[:, 3], height, size).to(features.dtype)
    return torch.einsum("kih,kdhw,kjw->kdij", rows, features[clip], columns)


def _axis_weights(start: torch.Tensor, end: torch.Tensor, length: int, size: int) -> torch.Tensor:
    """[K, size, length]: how much of each of the ``length`` pixels along an axis goes into each cell of a box from ``start`` to
    ``end`` [K], which are relative."""
    start, end = start * length - 0.5, end * length - 0.5  # pixel i has its centre at i
    cell = (end - start) / size
    counts = cell.ceil().clamp(min=0)
    most = int(counts.max().item()) if len(counts) else 0
    sample = torch.arange(most, device=start.device, dtype=start.dtype)
    index = torch.arange(size, device=start.device, dtype=start.dtype)[:, None]
    places = (sample[None, None] + 0.5) / counts.clamp(min=1)[:, None, None]  # of a sample in its cell, in [0, 1]
    places = start[:, None, None] + cell[:, None, None] * (index[None] + places)
    used = (sample < counts[:, None])[:, None] & (places >= -1) & (places <= length)
    places = places.clamp(0, length - 1)
    pixels = torch.arange(length, device=start.device, dtype=start.dtype)
    weights = (1 - (places[..., None] - pixels).abs()).clamp(min=0)  # bilinear: of the two pixels around the place
    return (weights * used[..., None]).sum(2) / counts.clamp(min=1)[:, None, None]
