"""Known models of GPUs, so that a plan can be made for one on a machine that has none."""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class GpuModel:
    """What a plan needs of a GPU: memory as CUDA reports it, within 1 %, and compute capability."""

    title: str
    total_bytes: int
    capability: tuple[int, int]


def _model(title: str, gib: float, capability: tuple[int, int]) -> GpuModel:
    return GpuModel(f"NVIDIA {title}", int(gib * GIB), capability)


# Sources: NVIDIA's table of compute capabilities; memory as seen by CUDA programs, a little less than on data sheets.
MODELS = {
    "a100": _model("A100 80GB", 79.2, (8, 0)),
    "a100-40gb": _model("A100 40GB", 39.5, (8, 0)),
    "a10": _model("A10", 22.0, (8, 6)),
    "a40": _model("A40", 44.4, (8, 6)),
    "a6000": _model("RTX A6000", 47.5, (8, 6)),
    "rtx3090": _model("GeForce RTX 3090", 23.6, (8, 6)),
    "l4": _model("L4", 22.0, (8, 9)),
    "l40s": _model("L40S", 44.4, (8, 9)),
    "rtx4090": _model("GeForce RTX 4090", 23.6, (8, 9)),
    "h100": _model("H100 80GB", 79.1, (9, 0)),
    "h200": _model("H200", 139.8, (9, 0)),
    "b200": _model("B200", 178.3, (10, 0)),
    "rtx5090": _model("GeForce RTX 5090", 31.3, (12, 0)),
}

DEFAULT_MODEL = "h100"
"""What is planned for where a GPU is asked for, none is here and no model is named: the rates of plans are its."""


def model_key(text: str) -> str | None:
    """The name in ``MODELS`` of a model as people write it, or None.

    >>> model_key("NVIDIA H200"), model_key("RTX 4090"), model_key("A100 40GB"), model_key("K80")
    ('h200', 'rtx4090', 'a100-40gb', None)
    """
    names = {_squeezed(name): key for key, model in MODELS.items() for name in (key, model.title)}
    return names.get(_squeezed(text))


def _squeezed(name: str) -> str:
    return re.sub(r"nvidia|geforce|[^a-z0-9]", "", name.lower())
