"""Jobs that survive: what is done is committed beside the output, and another run goes on from there.

Start reading at ``attend.attend``; ``docs/design/durability.md`` says what each point of failure leaves.
"""

from .attend import Ended, attend
from .ending import remove_remains
from .finding import Depth, Finder
from .finished import require_finished
from .folder import JobFolder, Picture
from .inputs import KnownInput, describe_inputs, read_inputs
from .job import stored_request
from .saved import Place, SavedJob, SavedLane
from .setup import OutputSpec, Setup
from .status import JobStatus, finished_status, status
from .stop import Stop, stopped_by
from .watch import Watch

__all__ = [
    "Depth",
    "Ended",
    "Finder",
    "JobFolder",
    "JobStatus",
    "KnownInput",
    "OutputSpec",
    "Picture",
    "Place",
    "SavedJob",
    "SavedLane",
    "Setup",
    "Stop",
    "Watch",
    "attend",
    "describe_inputs",
    "finished_status",
    "read_inputs",
    "remove_remains",
    "require_finished",
    "status",
    "stopped_by",
    "stored_request",
]
