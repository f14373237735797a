"""What is to be computed, in numbers: shapes, element types, mask. No arrays and no files."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from ..masks import UNBOUNDED_DIAGONAL, Causal, Full, Mask
from ..ranges import Range


@dataclass(frozen=True, slots=True)
class Operand:
    """One input as the planner sees it; see ``storage.TokenSource`` for the meaning of the flags."""

    shape: tuple[int, int, int, int]
    dtype: str
    itemsize: int
    in_place: bool
    token_major: bool
    staging_bytes: int
    held_bytes: int
    description: str
    on_disk: bool = True
    touched_bytes: int = 0

    @property
    def file_bytes(self) -> int:
        """Bytes that must be read to see all of it once; 0 for an array that is used where it lies."""
        batch, heads, tokens, dim = self.shape
        return 0 if self.in_place else batch * heads * tokens * dim * self.itemsize


@dataclass(frozen=True, slots=True)
class Result:
    """What is handed out: its element type and where it goes ("new array", "array" of the caller's or "file").

    ``row_scalars`` is how many numbers a row has besides its vector: 1 with log-sum-exp, 2 for statistics (m and l).
    ``holds_states``: whether unfinished rows may be accumulated in the result's own memory; ``on_device``: it is an
    array on the computing device.
    """

    dtype: str
    itemsize: int
    place: str
    row_scalars: int
    staging_bytes: int
    description: str
    holds_states: bool = False
    on_device: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """Exact attention of ``q`` (B, H, Nq, D) over ``k`` (B, H, Nk, D) and ``v`` (B, H, Nk, Dv)."""

    q: Operand
    k: Operand
    v: Operand
    result: Result
    compute_dtype: str
    mask: Mask
    scale: float

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def query_tokens(self) -> int:
        return self.q.shape[2]

    @property
    def key_tokens(self) -> int:
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        return self.q.shape[3]

    @property
    def value_dim(self) -> int:
        return self.v.shape[3]

    @property
    def compute_itemsize(self) -> int:
        return np.dtype(self.compute_dtype).itemsize

    @property
    def token_major(self) -> bool:
        """Whether any input keeps all heads of a token together, so that heads are best taken together."""
        return any(operand.token_major for operand in (self.q, self.k, self.v))

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of all heads."""
        visible = self.mask.pairs(Range(0, self.query_tokens), Range(0, self.key_tokens))
        return self.batch * self.heads * visible

    @property
    def flops(self) -> int:
        """Floating-point operations of the two products: 2 (D + Dv) a visible pair."""
        return 2 * (self.head_dim + self.value_dim) * self.pairs

    @property
    def file_bytes(self) -> int:
        """Bytes that must be read to see all inputs once."""
        return self.q.file_bytes + self.k.file_bytes + self.v.file_bytes

    @property
    def on_disk_bytes(self) -> int:
        """How many of those come from files and maps."""
        return sum(operand.file_bytes for operand in (self.q, self.k, self.v) if operand.on_disk)

    @property
    def output_bytes(self) -> int:
        """Bytes of the result."""
        rows = self.batch * self.heads * self.query_tokens
        return rows * (self.value_dim * self.result.itemsize + self.result.row_scalars * self.compute_itemsize)

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        operands = {name: asdict(getattr(self, name)) for name in ("q", "k", "v", "result")}
        mask = mask_to_dict(self.mask)
        return {**operands, "compute_dtype": self.compute_dtype, "mask": mask, "scale": self.scale}


def mask_to_dict(mask: Mask) -> dict[str, object]:
    """A mask for JSON."""
    return {"kind": "causal", "offset": mask.diagonal} if isinstance(mask, Causal) else {"kind": "full"}


def mask_from_dict(stored: dict[str, object]) -> Mask:
    """The mask that ``mask_to_dict`` described; ValueError for anything else."""
    match stored:
        case {"kind": "causal", "offset": int(offset)} if abs(offset) <= UNBOUNDED_DIAGONAL:
            return Causal(offset)
        case {"kind": "full"}:
            return Full()
    raise ValueError(f"not a mask: {stored!r}")
