"""The compiled extension (csrc/video/module.cpp), built for one version of Python."""

from collections.abc import Sequence
from typing import Any

def cpu_capability() -> str: ...
def best_cpu_capability() -> str: ...
def set_cpu_capability(name: str) -> None: ...

class CropResize:
    def __init__(
        self,
        *,
        size: tuple[int, int],
        box: tuple[int, int, int, int],
        out_size: tuple[int, int],
        mirror: tuple[bool, bool],
        chroma_shift: tuple[int, int],
        chroma_place: tuple[float, float],
        luma_weights: tuple[float, float],
        full_range: bool,
        depth: int,
        grey: bool,
    ) -> None: ...
    def __call__(self, planes: Sequence[Any], strides: Sequence[int], out: Any) -> None: ...
