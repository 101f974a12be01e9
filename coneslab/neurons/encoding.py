"""Encodings of a mask: float32, float16, quaternary and binary, each close to its entropy bound.

A mask is a sparse set of neurons, each with a scale: here a pair of arrays, `indices` (k,) ascending and `scales` (k,)
in [0, 1), with the sizes of the layers they lie in. `ConceptNeurons.to`, `.to_bytes` and `.from_bytes` use these
functions.

The file (little-endian): a header of 172 bytes, a stream of 32-bit words from a range coder, then, for float masks
only, the scales as they are, and at the end the words of a scope, if the mask has one. The coder is that of
`constriction` (Bamler 2022, arXiv 2201.01741). In each layer, neurons are treated as independent with the layer's own
density p, so a binary mask takes close to sum n H(p) bits. It codes the lengths of runs of open neurons between shut
ones, which are geometrically distributed, in steps of at most RUN: as short as coding neuron by neuron, in a fraction
of the time.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import constriction
import numpy as np

from .. import checks
from ..errors import ArgumentError, ConeslabError, FileFormatError
from ..settings import ByValue

PRECISIONS = ("float32", "float16", "quaternary", "binary")
LEVELS = np.array([0, 1 / 3, 2 / 3], np.float32)  # of a quaternary mask; the fourth, 1, means "not in the mask"
RUN = 512
_FLOATS = {"float32": "<f4", "float16": "<f2"}

_MAGIC, _VERSION = b"conemask", 1
_SCOPED = 2  # the version of files that end with the words of a scope
_HEADER = struct.Struct("<8sHBBdQ8s32s64s32sII")  # ... fingerprint, subject, checksum, words, bytes of scales
_CHECKSUM = slice(_HEADER.size - 8 - 32, _HEADER.size - 8)
_MODEL = constriction.stream.model


def numbers(name: str, values: Any) -> np.ndarray:
    """Numbers as float32, of any shape. Raises ArgumentError for anything else."""
    try:
        return np.array(values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{name} are {checks.shown(values)}: give numbers") from error


def _places(indices: Any, sizes: Sequence[int]) -> np.ndarray:
    """Indices of neurons in layers of these sizes, (k,) ascending."""
    found, n = np.asarray(indices), sum(sizes)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu") or (np.diff(found.astype(np.int64)) <= 0).any():
        raise ArgumentError(f"indices are {checks.shown(indices)}: give a vector of integers, ascending, each once")
    if found.size and not 0 <= found[0] <= found[-1] < n:
        raise ArgumentError(
            f"indices run from {found[0]} to {found[-1]}, and the layers have {n:,} neurons: give indices from 0 to "
            f"{n - 1:,}"
        )
    return found


def _sizes(sizes: Any) -> list[int]:
    """Numbers of neurons in the layers."""
    return [checks.count("one of sizes", size, most=2**48) for size in checks.items("sizes", sizes)]


def quantised(scales: np.ndarray, precision: str, *, cut: float = 0.5) -> np.ndarray:
    """Round scales (k,) to a precision -> (k,) float32; a neuron whose scale becomes 1 leaves the mask.

    float16 rounds to nearest, quaternary to the nearest of 0, 1/3, 2/3, 1, binary to 0 below `cut` and 1 elsewhere
    (Cones, arXiv 2303.05125, Sec. 3.1). Raises ConeslabError for another precision.
    """
    checks.choice("precision", precision, PRECISIONS)
    scales = numbers("scales", scales)
    if not ((scales >= 0) & (scales <= 1)).all():
        raise ArgumentError("scales are numbers in [0, 1]: 1 leaves a neuron as it is, 0 shuts it")
    if precision == "float32":
        return scales
    if precision == "float16":
        return scales.astype(np.float16).astype(np.float32)
    if precision == "quaternary":
        return np.append(LEVELS, np.float32(1))[np.rint(scales * 3).astype(int)]
    return np.where(scales < checks.number("cut", cut, "(0, 1]", kind="scale"), 0, 1).astype(np.float32)


def precision_of(scales: np.ndarray) -> str:
    """The smallest precision that holds these scales (k,) exactly."""
    return next(kind for kind in reversed(PRECISIONS) if (quantised(scales, kind) == scales).all())


def entropy(counts: np.ndarray) -> float:
    """Least number of bits for a sequence with these symbol counts, if symbols are independent: n H(counts/n)."""
    counts = numbers("counts", counts).astype(float).reshape(-1)
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum())


def entropy_bound(indices: np.ndarray, scales: np.ndarray, sizes: Sequence[int]) -> float:
    """Least number of bytes for a binary or quaternary mask, given the density of each layer.

    sizes: neurons in each layer; layers lie end to end. Raises ConeslabError for scales of a finer precision.
    """
    scales, sizes = numbers("scales", scales).reshape(-1), _sizes(sizes)
    indices = _places(indices, sizes)
    checks.as_many("indices", indices, "scales", scales)
    if precision_of(scales) not in ("binary", "quaternary"):
        raise ConeslabError("the bound is for binary and quaternary masks: round this one first, e.g. to('quaternary')")
    bits = 0.0
    for _, part, size in _layers(indices, sizes):
        levels = np.array([(scales[part] == level).sum() for level in LEVELS])
        bits += entropy(np.append(levels, size - levels.sum()))
    return bits / 8


@dataclass(frozen=True, eq=False)
class MaskFile(ByValue):
    """The contents of a mask file; `ConceptNeurons` explains the fields."""

    indices: np.ndarray
    scales: np.ndarray
    precision: str
    cut: float
    fingerprint: str
    subject: str
    scope: tuple[str, ...] = ()


def encode(
    indices: np.ndarray,
    scales: np.ndarray,
    sizes: Sequence[int],
    *,
    fingerprint: str,
    subject: str,
    cut: float,
    scope: Sequence[str] = (),
) -> bytes:
    """Write a mask in the smallest precision that keeps it exactly.

    fingerprint: 64 hexadecimal digits; subject: its first 64 bytes are kept; scope: words, written if there are any.
    Raises ConeslabError for any other fingerprint.
    """
    scales, sizes = numbers("scales", scales).reshape(-1), _sizes(sizes)
    indices = _places(indices, sizes)
    checks.as_many("indices", indices, "scales", scales)
    cut, subject = checks.number("cut", cut, "(0, 1]", kind="scale"), checks.text("subject", subject, blank=True)
    try:
        model = bytes.fromhex(checks.text("fingerprint", fingerprint))
    except ValueError:
        model = b""
    if len(model) != 32:
        raise ConeslabError(f"fingerprint is {fingerprint!r}, expected the 64 hexadecimal digits of `KVSpace`")
    precision, coder = precision_of(scales), constriction.stream.queue.RangeEncoder()
    for start, part, size in _layers(indices, sizes):
        _encode_places(coder, indices[part] - start, size)
        if precision == "quaternary":
            _encode_levels(coder, scales[part])
    words = coder.get_compressed().astype("<u4").tobytes()
    values = scales.astype(_FLOATS[precision]).tobytes() if precision in _FLOATS else b""
    name = subject.encode()[:64].decode(errors="ignore").encode()
    words_of_scope = "\0".join(scope).encode()
    fields = (
        _SCOPED if scope else _VERSION,
        PRECISIONS.index(precision),
        len(name),
        cut,
        sum(sizes),
        _shape(sizes),
        model,
        name,
    )
    lengths = (len(words) // 4, len(values))
    blank = _HEADER.pack(_MAGIC, *fields, bytes(32), *lengths)
    body = words + values + words_of_scope
    digest = hashlib.blake2b(blank + body, digest_size=32).digest()
    return _HEADER.pack(_MAGIC, *fields, digest, *lengths) + body


def decode(data: bytes, sizes: Sequence[int]) -> MaskFile:
    """Read what `encode` wrote; whatever the file claims, memory is allocated only as the model's size warrants.

    sizes: neurons in each layer of that model. Raises FileFormatError for a file that is truncated, altered in any bit,
    of another format, or for a model of another shape.
    """
    data, sizes = checks.of_kind("data", data, bytes), _sizes(sizes)
    if len(data) < _HEADER.size or data[:8] != _MAGIC:
        raise FileFormatError("this is not a mask file of coneslab: it is too short, or begins differently")
    _, version, kind, letters, cut, n, shape, model, name, digest, words, values = _HEADER.unpack_from(data)
    if version not in (_VERSION, _SCOPED):
        raise FileFormatError(f"this mask file is of version {version}, this coneslab reads {_SCOPED}: update it")
    end = _HEADER.size + 4 * words + values
    if len(data) < end or (len(data) > end) != (version == _SCOPED):
        raise FileFormatError(
            f"this mask file has {len(data)} bytes, its header says {end}: it was "
            "truncated, or something was added; copy it again"
        )
    blank = data[: _CHECKSUM.start] + bytes(32) + data[_CHECKSUM.stop :]
    if hashlib.blake2b(blank, digest_size=32).digest() != digest:
        raise FileFormatError("this mask file is damaged (its checksum does not match): copy it again")
    if (n, shape) != (sum(sizes), _shape(sizes)):
        raise FileFormatError(
            f"this mask covers {n:,} neurons, the model has {sum(sizes):,} in {len(sizes)} layers of its own: "
            "load the model it was found on"
        )
    try:
        precision, subject = PRECISIONS[kind], name[:letters].decode()
        indices, scales = _decode_words(data[_HEADER.size : _HEADER.size + 4 * words], precision, sizes)
        if precision in _FLOATS:
            raw = np.frombuffer(data[_HEADER.size + 4 * words : end], _FLOATS[precision])
            scales = raw.astype(np.float32)
        scope = tuple(data[end:].decode().split("\0")) if version == _SCOPED else ()
        if len(scales) != len(indices):
            raise ValueError(f"{len(indices)} neurons and {len(scales)} scales")
    except (ValueError, IndexError, AssertionError) as error:  # a forged file may have the right checksum
        raise FileFormatError(f"this mask file is not one that coneslab wrote ({error})") from error
    return MaskFile(indices, scales, precision, cut, model.hex(), subject, scope)


def _shape(sizes: Sequence[int]) -> bytes:
    """Eight bytes that identify the sizes of the layers."""
    return hashlib.blake2b(np.array(sizes, "<u8").tobytes(), digest_size=8).digest()


def _layers(indices: np.ndarray, sizes: Sequence[int]) -> list[tuple[int, slice, int]]:
    """For each layer: its start, the slice of `indices` in it, its size."""
    edges = np.concatenate([[0], np.cumsum(sizes)])
    places = np.searchsorted(indices, edges)
    return [(int(edges[i]), slice(places[i], places[i + 1]), size) for i, size in enumerate(sizes)]


def _decode_words(data: bytes, precision: str, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))
    indices, scales, start = [], [], 0
    for size in sizes:
        indices.append(_decode_places(decoder, size) + start)
        count = len(indices[-1])
        scales.append(_decode_levels(decoder, count) if precision == "quaternary" else np.zeros(count, np.float32))
        start += size
    if not decoder.maybe_exhausted():
        raise ValueError("words are left over")
    return np.concatenate(indices), np.concatenate(scales)


# --- parts of the stream --------------------------------------------------------------------------------


def _encode_whole(coder: Any, value: int, most: int) -> None:
    """Encode an integer in [0, most], uniformly distributed, 16 bits at a time."""
    if most >> 16:
        coder.encode(value & 0xFFFF, _MODEL.Uniform(1 << 16))
        _encode_whole(coder, value >> 16, most >> 16)
    elif most:
        coder.encode(value, _MODEL.Uniform(most + 1))


def _decode_whole(coder: Any, most: int) -> int:
    if most >> 16:
        low = int(coder.decode(_MODEL.Uniform(1 << 16)))
        return low + (_decode_whole(coder, most >> 16) << 16)
    return int(coder.decode(_MODEL.Uniform(most + 1))) if most else 0


def _runs(count: int, size: int) -> Any:
    """Distribution of the length of a run of open neurons at density count/size: 0 to RUN - 1, or RUN and continued.

    Only by products: powers may differ between processors, and the decoder must see the same numbers.
    """
    shut = count / size
    reached = np.cumprod(np.append(1.0, np.full(RUN, 1.0 - shut)))
    return _MODEL.Categorical(np.append(reached[:-1] * shut, reached[-1]), perfect=False)


def _encode_places(coder: Any, places: np.ndarray, size: int) -> None:
    gaps = np.diff(places, prepend=-1) - 1
    longer = gaps // RUN
    _encode_whole(coder, len(places), size)
    if not len(places):
        return
    _encode_whole(coder, int(longer.sum()), size // RUN)
    symbols = np.full(len(places) + int(longer.sum()), RUN, np.int32)
    symbols[np.cumsum(longer + 1) - 1] = gaps % RUN
    coder.encode(symbols, _runs(len(places), size))


def _decode_places(coder: Any, size: int) -> np.ndarray:
    count = _decode_whole(coder, size)
    if count > size:
        raise ValueError(f"{count} neurons in a layer of {size}")
    if not count:
        return np.zeros(0, np.int64)
    longer = _decode_whole(coder, size // RUN)
    symbols = coder.decode(_runs(count, size), count + longer).astype(np.int64)
    ends = symbols < RUN
    places = (np.cumsum(np.where(ends, symbols + 1, RUN)) - 1)[ends]
    if len(places) != count or places[-1] >= size:
        raise ValueError(f"neurons outside a layer of {size}")
    return places


def _encode_levels(coder: Any, scales: np.ndarray) -> None:
    counts = [int((scales == level).sum()) for level in LEVELS]
    _encode_whole(coder, counts[0], len(scales))
    _encode_whole(coder, counts[1], len(scales) - counts[0])
    if len(scales):
        symbols = np.searchsorted(LEVELS, scales).astype(np.int32)
        coder.encode(symbols, _MODEL.Categorical(np.array(counts) / len(scales), perfect=False))


def _decode_levels(coder: Any, count: int) -> np.ndarray:
    first = _decode_whole(coder, count)
    second = _decode_whole(coder, max(0, count - first))
    if not count:
        return np.zeros(0, np.float32)
    shares = np.array([first, second, count - first - second]) / count
    return LEVELS[coder.decode(_MODEL.Categorical(shares, perfect=False), count)]
