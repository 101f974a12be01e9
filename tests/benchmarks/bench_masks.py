"""Bytes and seconds of a mask as large as Stable Diffusion 1.5's, in our files and in other formats.

    python tests/benchmarks/bench_masks.py [--density 0.044] [--repeats 3]

All encodings alternate within one process, on one thread, and the fastest run of each counts. Bytes stand beside the
entropy bound n·H(p) of the binary mask, given the density of each of the 32 layers.
"""

from __future__ import annotations

import argparse
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pyroaring

sys.path[:0] = [str(Path(__file__).parents[2])]

from coneslab.neurons.encoding import LEVELS, decode, encode, entropy_bound  # noqa: E402

WIDTHS = [320] * 10 + [640] * 10 + [1280] * 12  # output channels of its 32 key and value matrices
SIZES = [width * 768 for width in WIDTHS]  # each channel reads a text embedding of 768 numbers


def ours(places: np.ndarray, scales: np.ndarray):
    about = {"fingerprint": "00" * 32, "subject": "stand-in", "cut": 0.5}
    return lambda: encode(places, scales, SIZES, **about), lambda data: decode(data, SIZES).indices


def roaring(places: np.ndarray):
    def write() -> bytes:
        bitmap = pyroaring.BitMap(places.astype(np.uint32))
        bitmap.run_optimize()
        return bitmap.serialize()

    return write, lambda data: np.array(pyroaring.BitMap.deserialize(data))


def deflated(places: np.ndarray):
    def write() -> bytes:
        bits = np.zeros(sum(SIZES), bool)
        bits[places] = True
        return zlib.compress(np.packbits(bits).tobytes(), 9)

    return write, lambda data: np.flatnonzero(np.unpackbits(np.frombuffer(zlib.decompress(data), np.uint8)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--density", type=float, default=0.044)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    places = np.flatnonzero(rng.random(sum(SIZES)) < arguments.density)
    shut = np.zeros(len(places), np.float32)
    bound = entropy_bound(places, shut, SIZES)
    ways = {
        "ours, binary": ours(places, shut),
        "ours, quaternary": ours(places, LEVELS[rng.integers(0, 3, len(places))]),
        "roaring bitmap": roaring(places),
        "bits, deflated": deflated(places),
    }
    print(f"{sum(SIZES):,} neurons, {len(places):,} shut; entropy bound of the binary mask: {bound:,.0f} bytes")
    print(f"{'':18}{'bytes':>12}{'to the bound':>14}{'write s':>10}{'read s':>10}")
    for name, (write, read) in ways.items():
        seconds = []
        for _ in range(arguments.repeats):
            begun = time.perf_counter()
            data = write()
            middle = time.perf_counter()
            back = read(data)
            seconds.append((middle - begun, time.perf_counter() - middle))
        assert np.array_equal(back, places), f"{name} lost the mask"
        fastest = np.min(seconds, axis=0)
        print(f"{name:18}{len(data):12,}{len(data) / bound:14.3f}{fastest[0]:10.2f}{fastest[1]:10.2f}")


if __name__ == "__main__":
    main()
