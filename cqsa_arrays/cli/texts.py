"""What the help says of ``cqsa`` and of each subcommand."""

from __future__ import annotations

from dataclasses import dataclass

DESCRIPTION = "Exact attention over HDF5 arrays larger than memory, in a promised amount of memory."

EXIT_CODES = """\
exit codes:
  0    done; of a job also: this process has done its share, and others go on, or all was done before
  1    a verification or comparison failed
  2    an error: something cannot be used, or memory was refused; one line on standard error says what
  3    a job stopped before its end, with everything committed: cqsa resume goes on
  130  interrupted (Ctrl-C)    141  nobody read the output    143  terminated"""

JSON = "With --json, standard output has one JSON object, or nothing where standard error has an error."

EPILOG = f"""\
examples:
  cqsa make qkv.h5 --tokens 100k --heads 4            synthetic inputs to try it with
  cqsa plan qkv.h5 --memory 64MiB --causal            what would be done, at what price
  cqsa attend qkv.h5 -o out.h5 --memory 64MiB --causal
  cqsa verify out.h5                                  rows of it against float64

Sizes are written 512MiB, 1.5G or 2GB (a letter alone is binary), counts 100000, 100k or 1e5, times 90s, 10min or 8h.

{EXIT_CODES}"""


@dataclass(frozen=True, slots=True)
class CommandText:
    """Usage, a line for the list of commands, some sentences, and examples."""

    usage: str
    summary: str
    description: str
    examples: str
    has_json: bool = True

    @property
    def epilog(self) -> str:
        lines = (f"  {line}" for line in self.examples.splitlines())
        return "\n".join(["examples:", *lines, "", EXIT_CODES, *(["", JSON] if self.has_json else [])])


COMMANDS = {
    "attend": CommandText(
        "[QKV.h5] -o OUT.h5 [options]",
        "compute attention of /q, /k, /v of a file into another file",
        """\
Compute softmax(scale * q.k) v of the data sets /q, /k and /v and write /out and /lse.

It is a job: what is done is committed in the folder OUT.h5.job. Killed or interrupted, the same command or
"cqsa resume OUT.h5" goes on from there; finished, and with inputs that nobody has touched since, it has nothing left
to do. Where standard error is no terminal, a line a minute says how far it is.""",
        """\
cqsa attend qkv.h5 -o out.h5 --memory 4G --causal
cqsa attend --q a.h5:/q --k b.h5:/keys --v b.h5:/values -o out.h5
cqsa attend qkv.h5 -o out.h5 --device cuda --max-time 8h --overwrite""",
    ),
    "resume": CommandText(
        "OUT.h5 [options]",
        "go on with an unfinished job where it was committed last",
        """\
Go on with the job that writes OUT.h5, as it was begun: with the same inputs and options. Inputs are known by what
they hold; --q, --k and --v say where one is that has moved.""",
        """\
cqsa resume out.h5
cqsa resume out.h5 --q moved.h5:/q --k moved.h5:/k --v moved.h5:/v
cqsa resume out.h5 --max-time 8h
cqsa resume out.h5 --device cpu --memory 2G""",
    ),
    "status": CommandText(
        "OUT.h5 [--json]",
        "show how far a job is: running, stopped or finished",
        """\
Show how much of the job that writes OUT.h5 is committed, whether a process works on it, and the time that is left.
Nothing is changed.""",
        """\
cqsa status out.h5
cqsa status out.h5 --json""",
    ),
    "plan": CommandText(
        "[QKV.h5] [options]",
        "show what attend would do, without reading any data",
        """\
Print the plan of attend with the same options: its buffers, its price, and the alternative. No element is read, and
nothing is written. --device may name a model of a GPU that this machine lacks.""",
        """\
cqsa plan qkv.h5 --memory 64MiB --causal
cqsa plan qkv.h5 --memory 4G --device cuda:h200
cqsa plan qkv.h5 --json""",
    ),
    "verify": CommandText(
        "OUT.h5 [options]",
        "check an output file against float64 attention of its inputs",
        """\
Compare sampled rows of OUT.h5 with float64 attention of the inputs that it names, which must hold what they did. Exit
code 1 if an error is larger than its tolerance.""",
        """\
cqsa verify out.h5
cqsa verify out.h5 --q moved.h5:/q --k moved.h5:/k --v moved.h5:/v
cqsa verify out.h5 --rows all --json
cqsa verify out.h5 --partial""",
    ),
    "compare": CommandText(
        "A.h5:/out B.h5:/out [options]\n       cqsa compare OUT.h5 --against DEVICE [options]",
        "error report of one data set against another, or of an output file against another device",
        """\
Compare two data sets of one shape; or, with --against, compute rows of an output file again on another device and
hold both against float64. Exit code 1 if an error is larger than its tolerance.""",
        """\
cqsa compare out.h5:/out reference.h5:/out --tolerance 1e-5
cqsa compare out.h5 --against cpu""",
    ),
    "make": CommandText(
        "QKV.h5 --tokens N [options]",
        "write synthetic /q, /k, /v of any size",
        """\
Write normal random numbers as /q, /k and /v, in bounded memory. Longer inputs begin with the shorter ones.""",
        """\
cqsa make qkv.h5 --tokens 1e5 --heads 4 --head-dim 64
cqsa make qkv.h5 --tokens 10k --dtype bfloat16 --layout bnhd --chunk-tokens 256 --compression gzip""",
    ),
    "info": CommandText(
        "FILE.h5 [--json]",
        "show what a file holds and how it would be read",
        "List the data sets of an HDF5 file, and whether each can be memory-mapped.",
        """\
cqsa info qkv.h5
cqsa info out.h5 --json""",
    ),
    "demo": CommandText(
        "[options]",
        "denoise a real electrocardiogram by all-pairs attention",
        """\
Compare every stretch of five minutes of an electrocardiogram with every other, in a few MiB, prove the result against
float64, and draw cqsa_demo.png (for which Matplotlib must be installed).""",
        """\
cqsa demo
cqsa demo --samples 20k --memory 16MiB --directory /tmp""",
    ),
    "completion": CommandText(
        "bash | zsh | fish",
        "print a script that completes cqsa's commands and options in a shell",
        "Print a script for the shell, which completes commands, options, their choices and names of files.",
        """\
eval "$(cqsa completion bash)"                              in ~/.bashrc
eval "$(cqsa completion zsh)"                               in ~/.zshrc, after compinit
cqsa completion fish > ~/.config/fish/completions/cqsa.fish""",
        has_json=False,
    ),
}
