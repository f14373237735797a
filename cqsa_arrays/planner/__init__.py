"""Planning: how a problem is run within its budget. Pure arithmetic, no I/O."""

from .candidates import DEVICE_PART_S, HOST_PART_S, Candidate, Machine
from .choose import COVERS, choose, take_over
from .cost import Rates, Traffic
from .durability import MOST_LANES, Durability, durability
from .groups import Group
from .memory import DISK, HOST, MEMORY, MemoryTerm, output_piece_rows
from .plan import Budget, Plan
from .problem import Operand, Problem, Result, mask_from_dict, mask_to_dict

__all__ = [
    "COVERS", "DEVICE_PART_S", "DISK", "HOST", "HOST_PART_S", "MEMORY", "MOST_LANES", "Budget", "Candidate",
    "Durability", "Group", "Machine", "MemoryTerm", "Operand", "Plan", "Problem", "Rates", "Result", "Traffic",
    "choose", "durability", "mask_from_dict", "mask_to_dict", "output_piece_rows", "take_over",
]  # fmt: skip
