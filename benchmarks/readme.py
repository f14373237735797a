"""Write the tables of README.md from the stored benchmark results: figures there are never typed in.

python benchmarks/readme.py           rewrite the generated parts
python benchmarks/readme.py --check   exit with 1 if they are not what the results say
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PART = re.compile(r"<!-- generated:(\w+) -->\n.*?<!-- /generated -->", re.DOTALL)


def cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(name: str) -> str:
    """The stored rows as a Markdown table, with machine and date below."""
    stored = json.loads((RESULTS / f"{name}.json").read_text())
    rows = stored["rows"]
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [" | ".join(cell(value) for value in row.values()) for row in rows]
    peer = f"; {stored['peer']}" if "peer" in stored else ""
    return "\n".join([*(f"| {line} |" for line in lines), "", f"*{place(stored)}{peer}.*"])


def beside(*names: str) -> str:
    """Results of one row each beside each other, with what was measured down the side."""
    found = [json.loads((RESULTS / f"{name}.json").read_text()) for name in names]
    rows = [stored["rows"][0] for stored in found]
    labels = list(dict.fromkeys(label for row in rows for label in row))
    lines = [" | ".join(["", *(str(row["device"]) for row in rows)]), " | ".join("---" for _ in [*rows, 0])]
    for label in (label for label in labels if label != "device"):
        lines.append(" | ".join([label, *(cell(row.get(label, "-")) for row in rows)]))
    where = [f"{row['device']}: {place(stored)}" for row, stored in zip(rows, found, strict=True)]
    return "\n".join([*(f"| {line} |" for line in lines), "", f"*{'; '.join(where)}.*"])


def place(stored: dict) -> str:
    """Machine and date."""
    machine = stored["machine"]
    where = f"{machine['cores']} cores of {machine['processor']}, {stored['date']}"
    return f"{stored['gpu']}, {where}" if "gpu" in stored else where


def plan() -> str:
    return f"```text\n{(RESULTS / 'plan.txt').read_text().rstrip()}\n```"


def render(text: str) -> str:
    def part(match: re.Match[str]) -> str:
        name = match[1]
        pairs = {"billion": ("billion_cpu", "billion_cuda"), "durability": ("durability_cpu", "durability_cuda")}
        body = plan() if name == "plan" else beside(*pairs[name]) if name in pairs else table(name)
        return f"<!-- generated:{name} -->\n{body}\n<!-- /generated -->"

    return PART.sub(part, text)


def main() -> int:
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = render(before)
    if "--check" in sys.argv[1:]:
        return int(before != after)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
