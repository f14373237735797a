"""Jobs that survive: what is done is committed beside the output, and another run goes on from there.

Start reading at ``attend.attend``; ``docs/design/durability.md`` says what each point of failure leaves.
"""

from .attend import attend
from .folder import JobFolder
from .job import stored_request
from .saved import Place, SavedLane, read_saved
from .setup import OutputSpec, Setup
from .status import JobStatus, status
from .stop import Stop

__all__ = [
    "JobFolder",
    "JobStatus",
    "OutputSpec",
    "Place",
    "SavedLane",
    "Setup",
    "Stop",
    "attend",
    "read_saved",
    "status",
    "stored_request",
]
