"""Mask files: exact for any mask, close to the entropy bound, and never misread when damaged or forged."""

from __future__ import annotations

import hashlib
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coneslab.diffusion.kvspace import KVSpace
from coneslab.errors import ConeslabError, FileFormatError, MismatchError
from coneslab.neurons import encoding
from coneslab.neurons.encoding import LEVELS, PRECISIONS, RUN, decode, encode, entropy_bound, precision_of, quantised
from coneslab.neurons.mask import ConceptNeurons

ABOUT = {"fingerprint": "0f" * 32, "subject": "cat", "cut": 0.5}


@st.composite
def sparse(draw, most_layers=4, most=3 * RUN):
    """Indices, scales of one precision and layer sizes, from empty masks to full ones."""
    sizes = draw(st.lists(st.integers(1, most), min_size=1, max_size=most_layers))
    precision = draw(st.sampled_from(PRECISIONS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.sampled_from((0.0, 0.001, 0.04, 0.5, 1.0)))
    indices = np.flatnonzero(rng.random(sum(sizes)) < share)
    scales = quantised(rng.random(len(indices)).astype(np.float32), precision)
    left = scales != 1
    return indices[left], scales[left], sizes


@settings(max_examples=150, deadline=None)
@given(sparse())
def test_any_mask_comes_back_exactly(mask):
    indices, scales, sizes = mask
    back = decode(encode(indices, scales, sizes, **ABOUT), sizes)
    assert np.array_equal(back.indices, indices) and np.array_equal(back.scales, scales)
    assert (back.fingerprint, back.subject, back.cut) == ("0f" * 32, "cat", 0.5)
    assert back.precision == precision_of(scales)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounding_is_to_the_nearest_value_that_the_precision_has(precision):
    scales = np.linspace(0, 0.999, 400, dtype=np.float32)
    rounded = quantised(scales, precision, cut=0.4)
    assert rounded.dtype == np.float32 and np.array_equal(quantised(rounded, precision, cut=0.4), rounded)
    if precision == "float32":
        assert np.array_equal(rounded, scales)
    if precision == "float16":
        assert np.array_equal(rounded, torch.tensor(scales).half().float().numpy())
    if precision == "quaternary":
        options = np.array([0, 1 / 3, 2 / 3, 1])
        assert np.allclose(rounded, options[np.abs(scales[:, None] - options).argmin(1)])
    if precision == "binary":
        assert np.array_equal(rounded, scales >= np.float32(0.4))


@pytest.mark.parametrize("indices", [[2, 50], [-3, 2], [10], [-1], np.array([2**63], np.uint64)])
def test_neurons_outside_the_layers_are_refused(indices):
    for write in (lambda *mask: encode(*mask, **ABOUT), entropy_bound):
        with pytest.raises(ConeslabError, match=r"indices run from .* have 10 neurons: give indices from 0 to 9"):
            write(indices, np.zeros(len(indices)), [4, 6])
        write([0, 9], np.zeros(2), [4, 6])


def test_an_unknown_precision_is_refused():
    with pytest.raises(ConeslabError, match="'int8': choose one of float32, float16, quaternary, binary"):
        quantised(np.zeros(3, np.float32), "int8")


def realistic(kind, n=270_336, layers=20, seed=0):
    rng = np.random.default_rng(seed)
    sizes = [n // layers] * layers
    shares = np.repeat(rng.uniform(0.01, 0.09, layers), n // layers)
    indices = np.flatnonzero(rng.random(n // layers * layers) < shares)
    chosen = rng.choice(3, len(indices), p=[0.6, 0.3, 0.1]) if kind == "quaternary" else np.zeros(len(indices), int)
    return indices, LEVELS[chosen], sizes


@pytest.mark.parametrize("kind", ["binary", "quaternary"])
def test_files_are_within_five_percent_of_the_entropy_bound(kind):
    indices, scales, sizes = realistic(kind)
    symbols = np.full(sum(sizes), 3)
    symbols[indices] = np.searchsorted(LEVELS, scales)
    bound, start = 0.0, 0
    for size in sizes:  # n H(p), layer by layer, from the definition
        shares = np.bincount(symbols[start : start + size], minlength=4) / size
        bound += size * sum(-p * math.log2(p) for p in shares if p) / 8
        start += size
    assert entropy_bound(indices, scales, sizes) == pytest.approx(bound)
    header = encoding._HEADER.size
    assert header <= 256
    size = len(encode(indices, scales, sizes, **ABOUT)) - header
    assert bound <= size <= 1.05 * bound


def test_float_masks_take_their_values_and_the_places():
    indices, _, sizes = realistic("binary")
    places = len(encode(indices, np.zeros(len(indices), np.float32), sizes, **ABOUT))
    scales = np.random.default_rng(1).random(len(indices)).astype(np.float32)
    for precision, width in (("float16", 2), ("float32", 4)):
        values = quantised(scales, precision)
        assert abs(len(encode(indices, values, sizes, **ABOUT)) - places - width * len(indices)) <= 8
    with pytest.raises(ConeslabError, match="round this one first"):
        entropy_bound(indices, scales, sizes)


# --- damage ---


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_damaged_file_is_refused(data):
    indices, scales, sizes = realistic(data.draw(st.sampled_from(("binary", "quaternary"))), n=4000, layers=4)
    whole = encode(indices, scales, sizes, **ABOUT)
    damaged = bytearray(whole)
    place = data.draw(st.integers(0, len(whole) - 1))
    how = data.draw(st.sampled_from(("flip", "cut", "add", "swap")))
    if how == "flip":
        damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "cut":
        damaged = damaged[:place]
    elif how == "add":
        damaged += data.draw(st.binary(min_size=1, max_size=9))
    else:
        damaged[place:] = damaged[place:][::-1]
    if bytes(damaged) != whole:
        with pytest.raises(FileFormatError, match="mask"):
            decode(bytes(damaged), sizes)


def forged(data: bytes) -> bytes:
    """Give changed data the right lengths and checksum, as somebody with our source could."""
    fields = list(encoding._HEADER.unpack_from(data.ljust(encoding._HEADER.size, b"\0")))
    body = data[encoding._HEADER.size :]
    fields[10], fields[11] = len(body) // 4, len(body) % 4
    fields[9] = bytes(32)
    fields[9] = hashlib.blake2b(encoding._HEADER.pack(*fields) + body, digest_size=32).digest()
    return encoding._HEADER.pack(*fields) + body


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_forged_file_gives_an_error_or_a_mask_that_fits_the_model(data):
    """Whatever the bytes say: no crash, no index outside, and never more memory than the model's own size asks for."""
    indices, scales, sizes = realistic(data.draw(st.sampled_from(("binary", "quaternary"))), n=4000, layers=4)
    changed = bytearray(encode(indices, scales, sizes, **ABOUT))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(8, len(changed) - 1))
        changed[place] = data.draw(st.integers(0, 255))
    try:
        found = decode(forged(bytes(changed)), sizes)
    except FileFormatError:
        return
    assert len(found.indices) == len(found.scales) <= sum(sizes)
    assert (np.diff(found.indices) > 0).all() and (found.indices < sum(sizes)).all()


@settings(max_examples=200, deadline=None)
@given(
    body=st.binary(max_size=400),
    kind=st.integers(0, 4),
    sizes=st.lists(st.integers(1, 1 << 20), min_size=1, max_size=3),
)
def test_forged_streams_of_any_bytes_are_survived(body, kind, sizes):
    fields = (encoding._VERSION, kind, 3, 0.5, sum(sizes), encoding._shape(sizes), bytes(32), b"cat", bytes(32), 0, 0)
    try:
        found = decode(forged(encoding._HEADER.pack(b"conemask", *fields) + body), sizes)
    except FileFormatError:
        return
    assert len(found.indices) == len(found.scales) and (found.indices < sum(sizes)).all()


def test_a_file_cannot_ask_for_more_than_the_model_has():
    indices, scales, sizes = realistic("binary", n=4000, layers=4)
    data = bytearray(encode(indices, scales, sizes, **ABOUT))
    data[20:28] = struct.pack("<Q", 1 << 60)  # the number of neurons it claims
    with pytest.raises(FileFormatError, match="covers 1,152,921,504,606,846,976 neurons.*the model has 4,000"):
        decode(forged(bytes(data)), sizes)


def test_foreign_files_and_later_versions_are_refused():
    indices, scales, sizes = realistic("binary", n=400, layers=4)
    whole = encode(indices, scales, sizes, **ABOUT)
    for data in (b"", b"PK\x03\x04" * 100, b"\x80\x04pickle" * 40):
        with pytest.raises(FileFormatError, match="not a mask file of coneslab"):
            decode(data, sizes)
    later = bytearray(whole)
    later[8] = 9
    with pytest.raises(FileFormatError, match="version 9.*update"):
        decode(bytes(later), sizes)
    with pytest.raises(FileFormatError, match="400 neurons, the model has 100 in 1"):
        decode(whole, [100])
    with pytest.raises(FileFormatError, match="layers of its own: load the model"):
        decode(whole, [200, 100, 50, 50])
    with pytest.raises(ConeslabError, match="64 hexadecimal digits"):
        encode(indices, scales, sizes, fingerprint="abc", subject="", cut=0.5)


# --- as concept neurons ---


@pytest.fixture
def found(v_pipe):
    space = KVSpace(v_pipe)
    rng = np.random.default_rng(0)
    indices = np.flatnonzero(rng.random(space.n) < 0.05)
    scales = 0.75 ** rng.integers(1, 12, len(indices))
    return ConceptNeurons(space.layout, indices, scales, space.fingerprint(), subject="cat", cut=0.4)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_is_a_mask_with_a_file_of_its_own(v_pipe, found, tmp_path, precision):
    mask = found.to(precision)
    assert precision_of(mask.scales) == precision and mask.settings["precision"] == precision
    again = ConceptNeurons.load_mask(mask.save_mask(tmp_path / "cat.mask"), v_pipe)
    assert again == mask and (again.subject, again.cut) == ("cat", 0.4)
    with again.applied(v_pipe):
        assert not torch.equal(KVSpace(v_pipe).gather(), torch.zeros(mask.n))


def test_coarser_precisions_take_fewer_bytes(found):
    sizes = [len(found.to(precision).to_bytes()) for precision in PRECISIONS]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    binary = found.to("binary")
    assert binary == found.binary() and np.array_equal(binary.shut(), found.shut())
    assert binary.entropy_bound <= len(binary.to_bytes())


def test_a_mask_file_of_another_model_reads_but_does_not_apply(found, own_pipe, epsilon_pipe):
    data = found.to_bytes()
    with pytest.raises(FileFormatError, match="load the model it was found on"):
        ConceptNeurons.from_bytes(data, epsilon_pipe)
    next(iter(KVSpace(own_pipe).parameters.values())).data.mul_(1.01)
    with pytest.raises(MismatchError, match="cat"), ConceptNeurons.from_bytes(data, own_pipe).applied(own_pipe):
        pass


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(max_size=80))
def test_any_subject_name_is_kept_as_far_as_there_is_room(name, v_pipe, found):
    from dataclasses import replace

    again = ConceptNeurons.from_bytes(replace(found, subject=name).to_bytes(), v_pipe)
    assert name.startswith(again.subject)
    assert again.subject == name if len(name.encode()) <= 64 else len(again.subject.encode()) > 60
