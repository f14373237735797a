"""Why a job was asked to stop; what it says, and what its exit code is made of."""

INTERRUPTED_BY = "interrupted"
TERMINATED_BY = "terminated"
