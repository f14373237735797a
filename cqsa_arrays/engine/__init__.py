"""The engine runs a plan: pages inputs in, keeps states, hands out finished rows. Start reading at ``executor.run``."""

from .allocation import make_ready
from .checkpoint import Checkpoint
from .executor import RunReport, run
from .progress import Progress, ProgressBar, ProgressLines, Silent
from .resident import Inputs
from .results import OutputResults, StatisticsResults

__all__ = [
    "Checkpoint", "Inputs", "OutputResults", "Progress", "ProgressBar", "ProgressLines", "RunReport", "Silent",
    "StatisticsResults", "make_ready", "run",
]  # fmt: skip
