"""A static entropy coder for integers under known contexts: interleaved rANS, vectorised over lanes.

Source: Duda 2013 (asymmetric numeral systems, arXiv 1311.2540); interleaving after Giesen 2014 (arXiv 1402.3392).
States are 32 bits wide and renormalized by 16-bit words; frequencies have 12 bits, one table per context. Values below
16 are symbols of their own; a larger one is a symbol for its length and the two bits after the leading one, and raw
bits. The contexts are known to both sides and are not stored.
"""

from __future__ import annotations

import math
import struct
import zlib

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.uint64]
Contexts = npt.NDArray[np.uint8]
_Words = npt.NDArray[np.uint32]
_Table = npt.NDArray[np.int64]

_BITS = 12
_TOTAL = 1 << _BITS
_LOW = 1 << 16
"""Least state after renormalization, and each lane's state before the first symbol."""
_DIRECT = 16
_SYMBOLS = 256
_HEAD = struct.Struct("<III")
_PACKED = 1 << 16
"""Values whose raw bits are spread out at a time."""


class MalformedError(ValueError):
    """The data were not made by :func:`encode` with these contexts."""


def encode(values: Values, contexts: Contexts) -> bytes:
    """Compress values, each with the statistics of its context.

    ``values``: uint64, one-dimensional; ``contexts``: uint8 of the same length. The result depends on nothing else.
    """
    symbols, raw = _split(values)
    tables = _frequencies(symbols, contexts)
    packed = zlib.compress(_tables_bytes(tables), 9)
    words, states = _push(symbols, contexts, tables)
    head = _HEAD.pack(len(packed), words.size, len(raw))
    return head + packed + states.astype("<u4").tobytes() + words.astype("<u2").tobytes() + raw


def decode(data: bytes, contexts: Contexts) -> Values:
    """Return the values that :func:`encode` was given with these contexts; MalformedError for anything else."""
    if len(data) < _HEAD.size:
        raise MalformedError("the data end within their header")
    table_size, word_count, raw_size = _HEAD.unpack_from(data)
    lanes = _lanes(contexts.size)
    if len(data) != _HEAD.size + table_size + 4 * lanes + 2 * word_count + raw_size:
        raise MalformedError("the data have another length than their header says")
    at = _HEAD.size + table_size
    tables = _tables_read(data[_HEAD.size : at], contexts)
    states = np.frombuffer(data, "<u4", lanes, at).astype(np.uint32)
    at += 4 * lanes
    words = np.frombuffer(data, "<u2", word_count, at).astype(np.uint32)
    symbols = _pull(words, states, contexts, tables)
    return _unite(symbols, data[at + 2 * word_count :])


def entropy_bits(values: npt.NDArray[np.generic]) -> float:
    """Return the empirical entropy (order zero) of all values together, in bits (Shannon 1948)."""
    _, counts = np.unique(values, return_counts=True)
    share = counts / max(1, values.size)
    return float(-(counts * np.log2(share)).sum()) if values.size else 0.0


def _lanes(count: int) -> int:
    """Return how many states run side by side: enough for numpy, and few since each costs 32 bits at the end."""
    return max(1, math.isqrt(count) // 2)


def _lengths(values: Values) -> _Table:
    """Return bit lengths; a double holds each half of a value exactly."""
    high = values >> np.uint64(32)
    big = high > 0
    return np.frexp(np.where(big, high, values).astype(np.float64))[1].astype(np.int64) + 32 * big


def _split(values: Values) -> tuple[npt.NDArray[np.uint8], bytes]:
    symbols = np.minimum(values, np.uint64(_DIRECT)).astype(np.uint8)
    where = np.flatnonzero(symbols == _DIRECT)
    if not where.size:
        return symbols, b""
    large = values[where]
    lengths = _lengths(large)
    places = (lengths - 3).astype(np.uint64)
    second = ((large >> places) & np.uint64(3)).astype(np.int64)
    symbols[where] = (_DIRECT + (lengths - 5) * 4 + second).astype(np.uint8)
    parts = []
    for length in np.unique(lengths):
        group, width = large[lengths == length], int(length) - 3
        for start in range(0, group.size, _PACKED):
            part = group[start : start + _PACKED].astype(">u8").view(np.uint8).reshape(-1, 8)
            parts.append(np.packbits(np.unpackbits(part, axis=1)[:, 64 - width :]).tobytes())
    return symbols, b"".join(parts)


def _unite(symbols: npt.NDArray[np.uint8], raw: bytes) -> Values:
    values = symbols.astype(np.uint64)
    where = np.flatnonzero(symbols >= _DIRECT)
    code = symbols[where].astype(np.int64) - _DIRECT
    lengths, at = code // 4 + 5, 0
    for length in np.unique(lengths):
        chosen = where[lengths == length]
        leading = (4 + code[lengths == length] % 4).astype(np.uint64)
        width = int(length) - 3
        for start in range(0, chosen.size, _PACKED):
            part = chosen[start : start + _PACKED]
            size = (part.size * width + 7) // 8
            if at + size > len(raw):
                raise MalformedError("raw bits are missing")
            bits = np.unpackbits(np.frombuffer(raw, np.uint8, size, at), count=part.size * width)
            spread = np.zeros((part.size, 64), np.uint8)
            spread[:, 64 - width :] = bits.reshape(-1, width)
            low = np.packbits(spread, axis=1).view(">u8").reshape(-1).astype(np.uint64)
            values[part] = (leading[start : start + _PACKED] << np.uint64(width)) | low
            at += size
    if at != len(raw):
        raise MalformedError("raw bits are left over")
    return values


def _frequencies(symbols: npt.NDArray[np.uint8], contexts: Contexts) -> dict[int, _Table]:
    """Return each context's frequencies: they sum to 4096, and every symbol that occurs has at least one."""
    pairs = contexts.astype(np.int32) * _SYMBOLS + symbols
    counts = np.bincount(pairs, minlength=_SYMBOLS * 256).reshape(256, _SYMBOLS)
    return {int(c): _quantized(counts[c]) for c in np.flatnonzero(counts.any(axis=1))}


def _quantized(counts: _Table) -> _Table:
    exact = counts * (_TOTAL / counts.sum())
    near = np.where(counts > 0, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    while (missing := _TOTAL - int(near.sum())) != 0:
        if missing > 0:
            near[np.argmax(exact - near)] += 1
        else:
            near[np.argmax(np.where(near > 1, near - exact, -np.inf))] -= 1
    return near


def _tables_bytes(tables: dict[int, _Table]) -> bytes:
    parts = []
    for _, table in sorted(tables.items()):
        used = np.flatnonzero(table)
        parts += [bytes([used.size - 1]), used.astype(np.uint8).tobytes(), (table[used] - 1).astype("<u2").tobytes()]
    return b"".join(parts)


def _tables_read(packed: bytes, contexts: Contexts) -> dict[int, _Table]:
    limit = 256 * (1 + 3 * _SYMBOLS)
    inflate = zlib.decompressobj()
    try:
        raw = inflate.decompress(packed, limit)
    except zlib.error as error:
        raise MalformedError(f"the tables are damaged ({error})") from error
    if not inflate.eof or inflate.unused_data:
        raise MalformedError("the tables are damaged")
    tables, at = {}, 0
    for context in np.flatnonzero(np.bincount(contexts, minlength=256)):
        count = raw[at] + 1 if at < len(raw) else 0
        if not count or at + 1 + 3 * count > len(raw):
            raise MalformedError("a context has no table")
        table = np.zeros(_SYMBOLS, np.int64)
        symbols = np.frombuffer(raw, np.uint8, count, at + 1)
        table[symbols] = np.frombuffer(raw, "<u2", count, at + 1 + count).astype(np.int64) + 1
        if np.count_nonzero(table) != count or table.sum() != _TOTAL:
            raise MalformedError("the frequencies of a context do not add up")
        tables[int(context)] = table
        at += 1 + 3 * count
    if at != len(raw):
        raise MalformedError("there are tables for contexts that do not occur")
    return tables


def _rows(tables: dict[int, _Table], contexts: Contexts) -> tuple[npt.NDArray[np.int32], _Table]:
    """Return for each element the row of its context's table, and the tables as one array."""
    row = np.zeros(256, np.int32)
    for number, context in enumerate(sorted(tables)):
        row[context] = number
    return row[contexts], np.stack([tables[context] for context in sorted(tables)])


def _push(
    symbols: npt.NDArray[np.uint8], contexts: Contexts, tables: dict[int, _Table]
) -> tuple[npt.NDArray[np.uint16], _Words]:
    """Code all symbols, last first; return the words in the order in which the decoder wants them."""
    lanes = _lanes(symbols.size)
    state = np.full(lanes, _LOW, np.uint32)
    if not symbols.size:
        return np.empty(0, np.uint16), state
    row, stacked = _rows(tables, contexts)
    place = row * _SYMBOLS + symbols
    first = np.cumsum(stacked, axis=1) - stacked
    often = stacked.reshape(-1).astype(np.uint32)[place]
    least = first.reshape(-1).astype(np.uint32)[place]
    found = []
    for start in range((symbols.size - 1) // lanes * lanes, -1, -lanes):
        f, c = often[start : start + lanes], least[start : start + lanes]
        x = state[: f.size]
        full = (x >> np.uint32(32 - _BITS)) >= f
        found.append(x[full].astype(np.uint16))
        x = np.where(full, x >> np.uint32(16), x)
        whole = x // f
        state[: f.size] = (whole << np.uint32(_BITS)) + (x - whole * f) + c
    return np.concatenate(found[::-1]), state


def _pull(
    words: _Words, state: _Words, contexts: Contexts, tables: dict[int, _Table]
) -> npt.NDArray[np.uint8]:  # fmt: skip
    symbols = np.zeros(contexts.size, np.uint8)
    if not contexts.size:
        if words.size or (state != _LOW).any():
            raise MalformedError("there are data for no values")
        return symbols
    row, stacked = _rows(tables, contexts)
    first = (np.cumsum(stacked, axis=1) - stacked).reshape(-1).astype(np.uint32)
    often = stacked.reshape(-1).astype(np.uint32)
    names = np.concatenate([np.repeat(np.arange(_SYMBOLS, dtype=np.uint8), table) for table in stacked])
    at, lanes = 0, state.size
    for start in range(0, contexts.size, lanes):
        here = row[start : start + lanes]
        x = state[: here.size]
        slot = x & np.uint32(_TOTAL - 1)
        symbol = names[here * _TOTAL + slot]
        place = here * _SYMBOLS + symbol
        x = often[place] * (x >> np.uint32(_BITS)) + slot - first[place]
        low = np.flatnonzero(x < _LOW)
        if at + low.size > words.size:
            raise MalformedError("words are missing")
        x[low] = (x[low] << np.uint32(16)) | words[at : at + low.size]
        at += low.size
        state[: here.size] = x
        symbols[start : start + lanes] = symbol
    if at != words.size or (state != _LOW).any():
        raise MalformedError("the last states are not the first ones")
    return symbols
