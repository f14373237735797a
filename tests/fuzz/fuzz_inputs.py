"""Rubbish in: whatever a file holds and whatever is typed, ``cqsa`` ends with 0, 1 or 2 and one line of error.

Damaged files, odd files and odd command lines in turn, from a seed:

    python tests/fuzz/fuzz_inputs.py --cases 3000 --seed 0

No traceback, no signal, no hang, nothing left behind, no input changed. A case that breaks a promise is printed with
its number; ``--only NUMBER`` plays it again and keeps its files.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from fuzz_commands import plays
from fuzz_runner import Fuzz, run_cases

LIMIT_S = 30.0


def main() -> int:
    """1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3000, help="how many cases (default 3000)")
    parser.add_argument("--seed", type=int, default=0, help="of all cases (default 0)")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="play only this one, and keep its files")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help=f"seconds for a case (default {LIMIT_S:g})")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary directory)")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="cqsa-fuzz-"))
    folder.mkdir(exist_ok=True)
    fuzz = Fuzz(plays(folder), arguments.seed, folder, arguments.limit)
    indices = range(arguments.cases) if arguments.only is None else [arguments.only]
    summary = run_cases(fuzz, indices, report=lambda line: print(line, flush=True))
    print(f"{dict(summary.cases)} cases, seed {arguments.seed}, in {folder}")
    print("exit codes: " + ", ".join(f"{name} x {count}" for name, count in sorted(summary.codes.items())))
    print(f"{len(summary.faults)} broken promises")
    return 1 if summary.faults else 0


if __name__ == "__main__":
    sys.exit(main())
