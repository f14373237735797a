"""The foundations: byte units, token ranges and cuts, and masks as key intervals, each against counting by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cqsa_arrays.errors import ArgumentError, CqsaError
from cqsa_arrays.masks import Causal, Full
from cqsa_arrays.ranges import Cut, Range
from cqsa_arrays.units import format_bytes, format_seconds, parse_bytes

RANGES = st.tuples(st.integers(0, 25), st.integers(0, 12)).map(lambda pair: Range(pair[0], pair[0] + pair[1]))
MASKS = st.just(Full()) | st.integers(-40, 40).map(Causal)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1),
        (4096, 4096),
        ("17", 17),
        ("1B", 1),
        ("1KiB", 1024),
        ("1kib", 1024),
        ("1KB", 1000),
        ("512MiB", 512 << 20),
        ("512 MB", 512 * 10**6),
        (" 1.5 GiB ", 3 << 29),
        ("2GB", 2 * 10**9),
        (".5TiB", 1 << 39),
        ("2.TB", 2 * 10**12),
        ("1.9", 1),
    ],
)
def test_bytes_are_parsed(value, expected):
    parsed = parse_bytes(value, "memory")
    assert parsed == expected
    assert type(parsed) is int


NOT_BYTES = "12 bananas|-1GiB|+1GiB|| |GiB|nan|inf|1e3|1,000|1 000|1.2.3|0x10|0|0.5|0GiB|1GiB 1|1 G iB|1EiB|٣|."


@pytest.mark.parametrize("value", [*NOT_BYTES.split("|"), True, False, 0, -5, 1.5, None, b"1GiB", (1,)], ids=repr)
def test_what_is_no_number_of_bytes_is_refused_by_name(value):
    with pytest.raises(ArgumentError) as caught:
        parse_bytes(value, "host_memory")
    assert caught.value.argument == "host_memory"
    assert repr(value) in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, CqsaError)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1 << 20, "1 MiB"),
        (5 << 29, "2.5 GiB"),
        (1 << 40, "1 TiB"),
        (3000 << 40, "3000 TiB"),
        (-2048, "-2 KiB"),
    ],
)
def test_bytes_are_written_for_people(size_bytes, text):
    assert format_bytes(size_bytes) == text


@given(st.integers(1, 1 << 52))
def test_written_bytes_are_read_back_to_four_digits(size_bytes):
    read = parse_bytes(format_bytes(size_bytes), "memory")  # which rounds down to whole bytes
    assert abs(read - size_bytes) <= 5.01e-4 * size_bytes + 1


@given(
    st.integers(1, 9999),
    st.sampled_from([(1, "B"), (1 << 10, "KiB"), (1 << 20, "MiB"), (1 << 30, "GiB"), (1 << 40, "TiB")]),
)
def test_whole_multiples_are_read_exactly(number, unit):
    assert parse_bytes(f"{number} {unit[1]}", "memory") == number * unit[0]


@pytest.mark.parametrize(
    ("elapsed_s", "text"),
    [
        (0, "0 s"),
        (0.01234, "0.0123 s"),
        (59, "59 s"),
        (60, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (3725, "1 h 2 min"),
        (47 * 3600, "47 h 0 min"),
        (60 * 3600, "2.5 days"),
    ],
)
def test_seconds_are_written_for_people(elapsed_s, text):
    assert format_seconds(elapsed_s) == text


def tokens_of(token_range):
    return set(range(token_range.start, token_range.stop))


@given(RANGES, RANGES)
def test_common_tokens(a, b):
    assert tokens_of(a & b) == tokens_of(a) & tokens_of(b)
    assert len(a & b) == len(tokens_of(a) & tokens_of(b))
    assert list(range(50))[a.slice] == sorted(tokens_of(a))


@given(RANGES, st.integers(1, 30))
def test_split_pieces_are_consecutive_and_full_but_the_last(whole, size):
    pieces = whole.split(size)
    assert [t for piece in pieces for t in range(piece.start, piece.stop)] == sorted(tokens_of(whole))
    assert all(len(piece) == size for piece in pieces[:-1])
    assert all(0 < len(piece) <= size for piece in pieces)


@given(tokens=st.integers(0, 300), parts=st.integers(1, 40), tile=st.integers(1, 20))
def test_a_cut_is_a_partition_into_whole_tiles_as_even_as_tiles_allow(tokens, parts, tile):
    cut = Cut(tokens, parts, tile)
    chunks = [cut[i] for i in range(len(cut))]
    assert len(chunks) == parts
    assert [t for chunk in chunks for t in range(chunk.start, chunk.stop)] == list(range(tokens))
    assert all(chunk.stop % tile == 0 or chunk.stop == tokens for chunk in chunks)
    tiles = [-(-len(chunk) // tile) for chunk in chunks]
    assert max(tiles) - min(tiles) <= 1


@given(tokens=st.integers(0, 300), parts=st.integers(1, 40), tile=st.integers(1, 20))
def test_the_longest_chunk_is_bounded_and_the_bound_is_reached_to_less_than_a_tile(tokens, parts, tile):
    cut = Cut(tokens, parts, tile)
    longest = max(len(cut[i]) for i in range(parts))
    assert longest <= cut.longest
    assert cut.longest - longest < tile
    if tokens % tile == 0:
        assert longest == cut.longest


def test_cuts_of_very_long_sequences_are_computed_from_the_index():
    cut = Cut(tokens=1 << 45, parts=1 << 20, tile=128)
    assert len(cut[(1 << 20) - 1]) == 1 << 25
    assert cut[(1 << 20) - 1].stop == 1 << 45


@pytest.mark.parametrize("index", [-1, 3, 100])
def test_chunks_outside_the_cut_are_refused(index):
    with pytest.raises(IndexError):
        Cut(10, 3, 2)[index]


def visible_pairs(mask, queries, keys):
    """Pairs counted one by one from the definition of the mask."""
    offset = mask.offset if isinstance(mask, Causal) else 10**6
    return sum(j <= i + offset for i in range(queries.start, queries.stop) for j in range(keys.start, keys.stop))


@given(MASKS, RANGES, RANGES)
def test_pairs_and_live_count_what_the_mask_shows(mask, queries, keys):
    assert mask.pairs(queries, keys) == visible_pairs(mask, queries, keys)
    assert mask.live(queries, keys) == (visible_pairs(mask, queries, keys) > 0)


@given(MASKS, st.integers(0, 40), st.integers(0, 40))
def test_keys_of_a_row_are_those_that_the_mask_shows(mask, row, key_tokens):
    keys = mask.keys_of(row, key_tokens)
    assert 0 <= keys.start <= keys.stop <= key_tokens
    shown = {j for j in range(key_tokens) if visible_pairs(mask, Range(row, row + 1), Range(j, j + 1))}
    assert tokens_of(keys) == shown
    assert shown == {j for j in range(key_tokens) if j <= row + mask.diagonal}


def test_counts_pass_64_bits():
    everything = Range(0, 1 << 40)
    assert Causal().pairs(everything, everything) == (1 << 39) * ((1 << 40) + 1)
    assert Full().pairs(everything, everything) == 1 << 80
    assert Full().diagonal + (1 << 45) < 1 << 63
