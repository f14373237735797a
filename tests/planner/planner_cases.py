"""Problems, machines and every way to run them, which the planner's tests share."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import settings
from hypothesis import strategies as st

from cqsa_arrays.masks import Causal, Full
from cqsa_arrays.planner import Budget, Candidate, Machine, Operand, Plan, Problem, Rates, Result, choose
from cqsa_arrays.planner.candidates import (
    KEY_BLOCK_TOKENS,
    chunk_counts,
    cqs_candidate,
    head_groups,
    rectangular_candidate,
)
from cqsa_arrays.planner.memory import TILE_TOKENS

THOROUGH, BRIEF = (settings(max_examples=n, deadline=None, derandomize=True, database=None) for n in (300, 100))
MACHINE = Machine(2, 16 << 30, Rates())
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def problem(
    *,
    batch=1,
    heads=1,
    queries=1000,
    keys=None,
    dim=64,
    value_dim=None,
    dtype="float32",
    mask=None,
    in_place=False,
    token_major=False,
    staging=0,
    held=0,
    touched=0,
    place="file",
    row_scalars=None,
    result_dtype=None,
    result_staging=0,
    holds_states=False,
) -> Problem:
    """Self-attention over float32 data in a file, result in a file, but for what is named."""
    keys = queries if keys is None else keys
    value_dim = dim if value_dim is None else value_dim
    result_dtype = result_dtype or dtype
    row_scalars = int(place == "file") if row_scalars is None else row_scalars

    def operand(name: str, tokens: int, width: int) -> Operand:
        shape, size = (batch, heads, tokens, width), ITEMSIZE[dtype]
        where = f"qkv.h5:/{name}"
        return Operand(shape, dtype, size, in_place, token_major, staging, held, where, touched_bytes=touched)

    result = Result(
        result_dtype, ITEMSIZE[result_dtype], place, row_scalars, result_staging, "out.h5:/out", holds_states
    )
    compute = "float64" if dtype == "float64" else "float32"
    q, k, v = operand("q", queries, dim), operand("k", keys, dim), operand("v", keys, value_dim)
    return Problem(q, k, v, result, compute, mask or Full(), dim**-0.5)


def budget(size_bytes: int) -> Budget:
    return Budget(size_bytes, f"memory={size_bytes}", "/scratch")


def plan_for(one: Problem, size_bytes: int, *, cover="auto", chunks=None, machine=MACHINE) -> Plan:
    return choose(one, budget(size_bytes), machine, cover=cover, chunks=chunks, device="cpu")


# From one token to about 10,000 tiles, small numbers more often than large ones.
token_counts = st.one_of(st.integers(1, 200), st.integers(1, 5000), st.integers(1, 1_000_000))
covers = st.sampled_from(["auto", "cqs", "rectangular"])


@st.composite
def problems(draw) -> Problem:
    queries = draw(token_counts)
    keys = draw(st.one_of(st.just(queries), token_counts))
    dtype = draw(st.sampled_from(sorted(ITEMSIZE)))
    place = draw(st.sampled_from(["file", "array", "new array"]))
    wide = dtype in ("float32", "float64")
    return problem(
        batch=draw(st.integers(1, 4)),
        heads=draw(st.integers(1, 9)),
        queries=queries,
        keys=keys,
        dim=draw(st.sampled_from([1, 8, 64, 128])),
        value_dim=draw(st.sampled_from([1, 8, 64, 100])),
        dtype=dtype,
        mask=draw(st.one_of(st.just(Full()), st.builds(Causal, st.integers(-queries, keys)))),
        in_place=wide and draw(st.booleans()),
        token_major=draw(st.booleans()),
        staging=draw(st.sampled_from([0, 1 << 20])),
        held=draw(st.sampled_from([0, 1 << 20])),
        touched=draw(st.sampled_from([0, 1 << 19])),
        place=place,
        result_staging=1 << 20 if place == "file" else 0,
        holds_states=place != "file" and wide and draw(st.booleans()),
    )


def tiles(tokens: int) -> int:
    return -(-tokens // TILE_TOKENS)


def every_candidate(one: Problem, cover: str, machine: Machine = MACHINE) -> Iterator[Candidate]:
    """Every way to run ``one`` with ``cover`` that the planner may consider, whatever it needs; not just a few."""
    for group in head_groups(one):
        if cover != "rectangular":
            for chunks in chunk_counts(one, machine):
                for states in ("memory", "disk"):
                    yield cqs_candidate(one, machine, group, states, chunks)
        if cover != "cqs":
            for block in key_blocks(one):
                for parts in {1, 2, 3, max(1, tiles(one.query_tokens) // 2), tiles(one.query_tokens)}:
                    yield rectangular_candidate(one, machine, group, block, parts)


def key_blocks(one: Problem) -> list[int]:
    """Lengths of key blocks: all keys where they are used in place, else halvings of the longest."""
    longest = tiles(one.key_tokens)
    if one.k.in_place and one.v.in_place:
        return [longest * TILE_TOKENS]
    longest = min(longest, KEY_BLOCK_TOKENS // TILE_TOKENS)
    return sorted({(longest >> shift) * TILE_TOKENS for shift in range(longest.bit_length())})
