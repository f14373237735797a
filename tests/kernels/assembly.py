"""Reading compiler output: which loops are innermost, how many fused multiply-adds they hold, what they spill."""

import re
from dataclasses import dataclass

LABEL = re.compile(r"^(\.?L\w+):")
JUMP = re.compile(r"^\s+(?:j[a-z]+|b|b\.[a-z]+|cbn?z\s+\w+,|tbn?z\s+\w+,\s*#\d+,)\s+(\.?L\w+)\s*(?:[#;/].*)?$")
# A vector register, or the low part of one, as an operand; names of general registers never match.
VECTOR = {"x86": re.compile(r"%[xyz]mm\d"), "arm": re.compile(r"\b[qvds]\d+\b")}
MULTIPLY_ADD = {
    "avx512": re.compile(r"^\s+vfmadd\d+p[sd]\s.*%zmm\d+$"),
    "avx2": re.compile(r"^\s+vfmadd\d+p[sd]\s.*%ymm\d+$"),
    "neon": re.compile(r"^\s+fmla\s+v\d+\.(?:4s|2d),"),
}
COMPARISON = re.compile(r"^\s+(?:vcmp|fcm)")
EXPONENTIAL = re.compile(r"^\s+(?:vpsll|shl\s+v)")
CALL = re.compile(r"^\s+(?:(?:callq?|blr?)\s|(?:jmp|b)\s+(?!\.?L))")


@dataclass(frozen=True)
class Loop:
    """The lines of one innermost loop of ``family`` code."""

    family: str
    lines: list[str]
    frame_pointer: bool

    @property
    def multiply_adds(self) -> int:
        return sum(bool(MULTIPLY_ADD[self.family].match(line)) for line in self.lines)

    @property
    def compares(self) -> bool:
        """Whether rows are tested inside: the masked product."""
        return any(COMPARISON.match(line) for line in self.lines)

    @property
    def product(self) -> bool:
        """Whether this is a product that is not masked; the exponential shifts integers into exponents."""
        return not self.compares and not any(EXPONENTIAL.match(line) for line in self.lines)

    @property
    def spills(self) -> list[str]:
        """Lines that move a vector register from or to the stack.

        The base is the stack pointer, or the frame pointer where the function keeps one (else it is a general register)
        and no index is added (else it is an array).
        """
        if self.family == "neon":
            frame = r"|x29, #-?\d+\]|x29\]" if self.frame_pointer else ""
            stack, vector = re.compile(rf"\[(?:sp\b{frame})"), VECTOR["arm"]
        else:
            frame = r"|%rbp\)" if self.frame_pointer else ""
            stack, vector = re.compile(rf"\((?:%rsp\b{frame})"), VECTOR["x86"]
        return [line for line in self.lines if stack.search(line) and vector.search(line)]


def functions(assembly):
    """The text of each function: from its label, in the first column and not a local one, to the next."""
    return re.split(r"\n(?=[A-Za-z_][\w.$]*:)", assembly)


def innermost_loops(assembly, family):
    """Every innermost loop: from a label to a later jump back to it, with no other such pair inside."""
    found = []
    for text in functions(assembly):
        frame_pointer = bool(re.search(r"movq\s+%rsp, %rbp|(?:mov|add)\s+x29, sp", text))
        lines, where, loops = text.splitlines(), {}, []
        for number, line in enumerate(lines):
            if label := LABEL.match(line):
                where[label[1]] = number
            elif (jump := JUMP.match(line)) and jump[1] in where:
                loops.append((where[jump[1]], number))
        found += [
            Loop(family, lines[a : b + 1], frame_pointer)
            for a, b in loops
            if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)
        ]
    return found


def hot_loops(assembly, family, multiply_adds):
    """The innermost loops with at least one register tile of fused multiply-adds."""
    return [loop for loop in innermost_loops(assembly, family) if loop.multiply_adds >= multiply_adds]


def calls(assembly):
    """The lines that call a function, by name or by address."""
    return [line for line in assembly.splitlines() if CALL.match(line)]
