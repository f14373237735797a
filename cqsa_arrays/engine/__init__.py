"""The engine runs a plan: pages inputs in, keeps states, hands out finished rows. Start reading at ``executor.run``."""

from .checkpoint import Checkpoint
from .executor import RunReport, run
from .progress import Progress, ProgressBar, Silent
from .resident import Inputs
from .results import OutputResults, StatisticsResults

__all__ = [
    "Checkpoint", "Inputs", "OutputResults", "Progress", "ProgressBar", "RunReport", "Silent", "StatisticsResults",
    "run",
]  # fmt: skip
