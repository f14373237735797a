"""Planning: how a problem is run within its budget. Pure arithmetic, no I/O."""

from .candidates import Candidate, Machine
from .choose import COVERS, choose, take_over
from .cost import Rates, Traffic
from .durability import Durability, durability
from .memory import MemoryTerm, output_piece_rows
from .plan import Budget, Group, Plan
from .problem import Operand, Problem, Result, mask_from_dict, mask_to_dict

__all__ = [
    "COVERS", "Budget", "Candidate", "Durability", "Group", "Machine", "MemoryTerm", "Operand", "Plan", "Problem",
    "Rates", "Result", "Traffic", "choose", "durability", "mask_from_dict", "mask_to_dict", "output_piece_rows",
    "take_over",
]  # fmt: skip
