"""``python -m cqsa_arrays`` is the command ``cqsa``."""

import sys

from .cli import main

sys.exit(main())
