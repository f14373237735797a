"""Which commands are run on a file, and command lines that nobody would type."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from pathlib import Path

import h5py
import numpy as np
from fuzz_files import Template, damaged, output, templates, write
from fuzz_runner import Play, Session
from fuzz_structures import Random, pick, write_odd_files

MOST_FLOPS, MOST_ELEMENTS = 1e10, 1e7
ATTEND = ["--memory", "8MiB", "--threads", "1", "--device", "cpu"]


def plays(folder: Path) -> dict[str, Play]:
    """The three kinds of cases; their templates are made in ``folder``."""
    made, (source, result) = templates(folder), output(folder)

    def play_bytes(session: Session, rng: Random) -> None:
        if rng.random() < 0.2:
            write(session.folder / "in.h5", source.content)
            write(session.folder / "good.h5", result.content)
            write(session.folder / "out.h5", damaged(result, rng))
            use_output(session)
        else:
            write(session.folder / "good.h5", source.content)
            write(session.folder / "in.h5", damaged(made[rng.integers(len(made))], rng))
            use_inputs(session, rng)

    def play_structure(session: Session, rng: Random) -> None:
        if rng.random() < 0.15:
            write(session.folder / "in.h5", source.content)
            write(session.folder / "good.h5", result.content)
            write(session.folder / "out.h5", result.content)
            _odd_output(session.folder / "out.h5", rng)
            use_output(session)
        else:
            write(session.folder / "good.h5", source.content)
            names = write_odd_files(session.folder, rng, source.content)
            with contextlib.suppress(OSError):
                os.mkfifo(session.folder / "fifo")
            use_inputs(session, rng, names)

    def play_command(session: Session, rng: Random) -> None:
        _surroundings(session.folder, source, result)
        argv = odd_command(rng)
        session.run(*argv, out=_out_of(argv))

    return {"bytes": play_bytes, "structure": play_structure, "command": play_command}


def use_inputs(session: Session, rng: Random, names: list[str] | None = None) -> None:
    """Every command on in.h5, as far as it is not work without an end."""
    found = session.run("info", "in.h5", "--json")
    session.run("info", "in.h5")
    shapes = _shapes(found.out) if found.code == 0 else {}
    q = f"in.h5:/{pick(rng, names)}" if names and rng.random() < 0.3 else "in.h5:/q"
    options = [*ATTEND, *_problem(rng), "--q", q]
    planned = session.run("plan", "in.h5", "--json", *options)
    if planned.code == 0 and json.loads(planned.out)["flops"] <= MOST_FLOPS:
        session.run("plan", "in.h5", *options)
        if session.run("attend", "in.h5", "-o", "new.h5", "--quiet", *options, out="new.h5").code == 0:
            session.run("verify", "new.h5", "--rows", "5")
    session.run("verify", "in.h5")
    session.run("compare", "in.h5", "--against", "cpu")
    if all(math.prod(shapes.get(name, ())) < MOST_ELEMENTS for name in "qkv"):
        session.run("compare", "in.h5:/q", "in.h5:/k")
        session.run("compare", "in.h5:/v", "good.h5:/v")


def use_output(session: Session) -> None:
    """Every command on out.h5, which was made of in.h5."""
    found = session.run("info", "out.h5", "--json")
    session.run("info", "out.h5")
    shapes = _shapes(found.out) if found.code == 0 else {}
    if any(math.prod(shape) > MOST_ELEMENTS for shape in shapes.values()):
        return
    session.run("verify", "out.h5", "--rows", "5", "--json")
    session.run("compare", "out.h5", "--against", "cpu", "--rows", "5")
    session.run("compare", "out.h5:/out", "good.h5:/out")


def _shapes(text: str) -> dict[str, tuple[int, ...]]:
    return {one["name"].lstrip("/"): tuple(one["shape"]) for one in json.loads(text)["datasets"]}


def _problem(rng: Random) -> list[str]:
    choices: list[object] = [[], [], ["--causal"], ["--layout", "nd"], ["--offset", "3"], ["--cover", "cqs"]]
    return list(pick(rng, choices))  # type: ignore[call-overload]


INPUTS_CHANGES: list[object] = [
    {}, [], None, 3, "x", {"relative": 5}, {"relative": None, "dataset": "/q", "layout": "hnd"}, {"relative": "a\0b"},
    {"relative": "in.h5"}, {"relative": "in.h5", "dataset": "/no", "layout": "hnd"}, {"relative": ".", "dataset": ""},
    {"relative": "in.h5", "dataset": "/q"}, {"relative": "in.h5", "dataset": "/q", "layout": "nd"},
    {"relative": "\ud800", "dataset": ""}, {"relative": "out.h5", "dataset": "/out", "layout": "hnd"},
    {"given": "/dev/zero", "relative": None}, {"relative": None, "given": 5}, {"relative": None, "given": "."},
    {"relative": "/dev/zero"}, {"relative": None}, {"given": "\ud800"}, {"sample": None}, {"sample": "0" * 64},
    {"full": 3}, {"shape": [2**80, 1]}, {"shape": []}, {"size": -1}, {"size": 10**30}, {"dtype": "int8"},
    {"layout": "nd"}, {"path": "in.h5", "mtime_ns": 5}, {"inode": []},
]  # fmt: skip
ATTRIBUTE_TEXTS: list[object] = [
    "", "{", "null", "[]", "5", '"x"', "NaN", "1e999", "-1e308", "inf", "[" * 100_000, "9" * 5000, 7, 2.5, np.zeros(3),
    b"\xff", h5py.Empty("f4"), '{"q": {}, "k": {}, "v": {}}', '{"kind": []}', '{"kind": "causal"}',
    *(f'{{"kind": "causal", "offset": {one}}}' for one in ("1e99", "9" * 25, "true", "-7", "null", 2**62, -(2**63))),
]  # fmt: skip


def _odd_output(path: Path, rng: Random) -> None:
    """Change what the output says of its inputs, mask and scale, or its arrays."""
    with h5py.File(path, "r+") as file:
        name = str(pick(rng, ["inputs", "inputs", "mask", "scale", "out", "lse"]))
        if name == "inputs" and rng.random() < 0.7:
            inputs = json.loads(file.attrs["inputs"])
            which = str(pick(rng, list("qkv")))
            inputs[which] = {**inputs[which], **one} if isinstance(one := pick(rng, INPUTS_CHANGES), dict) else one
            file.attrs["inputs"] = json.dumps(inputs)
        elif name in ("out", "lse"):
            del file[name]
            shape = pick(
                rng, [(2, 40, 8), (2, 40), (1, 2, 40, 8), (40, 8), (2, 3, 8), (2, 3), (2, 40, 1), (0, 0), (5,), ()]
            )
            if rng.random() < 0.9:
                file[name] = np.zeros(shape, str(pick(rng, ["f4", "f8", "f2", "i4"])))  # type: ignore[arg-type]
                if rng.random() < 0.5:
                    file[name].attrs["layout"] = str(pick(rng, ["hnd", "nhd", "hn", "bhn", "n", "nd", "x"]))
        elif rng.random() < 0.2:
            del file.attrs[name]
        else:
            file.attrs[name] = pick(rng, ATTRIBUTE_TEXTS)


def _surroundings(folder: Path, source: Template, result: Template) -> None:
    """What the command lines name: good files and things that are none."""
    write(folder / "in.h5", source.content)
    write(folder / "out.h5", result.content)
    write(folder / "text.h5", b"q,k,v" * 99)
    write(folder / "empty.h5", b"")
    (folder / "sub").mkdir()
    (folder / "linked.h5").symlink_to("in.h5")
    (folder / "dangling.h5").symlink_to("no.h5")
    with contextlib.suppress(OSError):
        os.mkfifo(folder / "fifo")
        os.mknod(folder / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))


PATHS = [
    "in.h5", "in.h5", "in.h5", "out.h5", "no.h5", "sub", ".", "..", "", "/", "text.h5", "empty.h5", "linked.h5", "fifo",
    "null", "dangling.h5", "é\u2028.h5", "\udcff.h5", "a\nb.h5", "\x1b[2J.h5", "x" * 300, "y/" * 3000, "in.h5/",
    "in.h5:/q",
    "./in.h5", "sub/../in.h5", " ", "-", "--", "~", "*", "$HOME", "file:in.h5", "in.h5:", ":", ":/q", "in.h5::/q",
    "/dev/null",
    "/dev/zero", "/proc/self/mem", "/proc/self/environ", "con", "nul.h5",
]  # fmt: skip
OUTS = ["new.h5", "new.h5", "new.h5", "out.h5", "in.h5", "sub/new.h5", "no/new.h5", "sub", ".", "", "null", "fifo",
        "linked.h5",
        "dangling.h5", "in.h5/x", "x" * 300, "x" * 252, "\udcff.h5", "a\nb.h5", "é.h5", "-", "sub/",
        "new.h5/"]  # fmt: skip
DATA_SETS = ["in.h5:/q", "in.h5:/k", "in.h5:q", "out.h5:/out", "out.h5:/lse", "in.h5:/no", "in.h5:/", "in.h5:",
             "in.h5:/q/",
             "in.h5://q", "in.h5:/q/x", "in.h5:\udcff", "in.h5:/\n", "in.h5:é", "linked.h5:/q", "in.h5:" + "q" * 9999,
             "in.h5:.", "in.h5:..", "in.h5:/./q", "in.h5:" + "/a" * 9999]  # fmt: skip
NUMBERS = ["0", "1", "2", "7", "-1", "-0", "3", "40", "64", "255", "1000000", "4294967296", "9223372036854775807",
           "9223372036854775808", "-9223372036854775809", "1e3", "1.5", "0x10", "nan", "inf", "-inf", "1_000", " 5 ",
           "٣", "²",
           "", "None", "True", "9" * 400, "9" * 5000, "1e400", "1e-400", "NaN", "½", "five", "\n",
           "\udcff"]  # fmt: skip
MEMORY = ["8MiB", "8MiB", "8MiB", "1KiB", "0", "-1", "1B", "64kb", "1.5MiB", "1e6", "nan", "inf", "infMiB", "9" * 30,
          "9" * 40,
          "1" * 30 + "TiB", ".5MiB", ".", "MiB", "8 MiB", "8\nMiB", "8MiB8", "٨MiB", "2**20", "", " ", "0x800000",
          "8PiB",
          "0.0000001TiB", "\udcff"]  # fmt: skip
WORDS = ["auto", "cpu", "cuda", "cuda:1", "cuda:-1", "cuda:" + "9" * 400, "cqs", "rectangular", "bhnd", "nd", "hnd",
         "nhd",
         "float16", "bfloat16", "float32", "float64", "f8", "int8", "object", "V0", ">f4", "f4,f4", "(2,)f4",
         "datetime64[ns]",
         "S", "U5", "f99", "", " ", "é", "\n", "\udcff", "x" * 9999, "--", "None", "O", "m8[h]", "{}",
                                                                                            "f4\0"[:2]]  # fmt: skip
PROBLEM = {
    "--q": DATA_SETS, "--k": DATA_SETS, "--v": DATA_SETS, "--memory": MEMORY, "--offset": NUMBERS, "--scale": NUMBERS,
    "--layout": WORDS, "--dtype": WORDS, "--device": WORDS, "--host-memory": MEMORY, "--scratch": PATHS,
    "--cover": WORDS,
    "--chunks": NUMBERS, "--threads": NUMBERS, "--causal": None, "--json": None,
}  # fmt: skip
CHECK = {"--rows": [*NUMBERS, "all"], "--seed": NUMBERS, "--tolerance": NUMBERS, "--json": None}
OPTIONS: dict[str, dict[str, list[str] | None]] = {
    "attend": {**PROBLEM, "--overwrite": None, "--quiet": None}, "plan": PROBLEM, "verify": CHECK,
    "info": {"--json": None},
    "compare": {**CHECK, "--against": WORDS},
}  # fmt: skip


def odd_command(rng: Random) -> list[str]:
    """A command line with up to four options, most of them with a value that makes no sense."""
    command = str(pick(rng, ["attend", "attend", "attend", "plan", "verify", "compare", "compare", "info"]))
    argv = [command]
    good = {"verify": "out.h5", "compare": str(pick(rng, ["out.h5", *DATA_SETS]))}.get(command, "in.h5")
    argv += [good if rng.random() < 0.6 else str(pick(rng, [*PATHS, *DATA_SETS]))]
    if command == "compare" and rng.random() < 0.6:
        argv += [str(pick(rng, DATA_SETS))]
    if command == "compare" and rng.random() < 0.4:
        argv += ["--against", "cpu"]
    if command in ("attend", "plan"):
        argv += ["-o", "new.h5" if rng.random() < 0.6 else str(pick(rng, OUTS)), "--memory", "8MiB", "--device", "cpu"]
    known = OPTIONS[command]
    for _ in range(int(rng.choice([0, 1, 1, 1, 2, 2, 3, 4]))):
        name = str(pick(rng, list(known)))
        values = known[name]
        value = [] if values is None else [str(pick(rng, values))]
        argv += [f"{name}={value[0]}"] if value and rng.random() < 0.7 else [name, *value]
    if rng.random() < 0.05:
        argv.insert(
            int(rng.integers(len(argv) + 1)), str(pick(rng, [*PATHS, *NUMBERS, *WORDS, "--help", "--version", "--no"]))
        )
    return argv


def _out_of(argv: list[str]) -> str | None:
    """The output that a command line names."""
    return next((argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "-o"), None) if "attend" in argv else None
