"""Seeds of random numbers: one stream for each replicate of an experiment, and for each purpose within it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from . import checks


def derived(seed: int, *purpose: str) -> int:
    """A seed for one purpose of one replicate, from 0 to 2³¹ − 1; the same arguments give the same one.

    Pictures that are drawn together start from consecutive seeds, so replicates with the seeds 0, 1 and 2 would share
    nearly all their noises, and pictures to learn from would share theirs with those that measure what was learned.
    Seeds derived for different replicates or purposes lie far apart, except by a rare chance: they are words of a hash
    of both (NumPy's `SeedSequence`; O'Neill 2015). 31 bits leave room for the seeds that follow: torch's generator on
    the CPU uses 32.

    >>> derived(0, "evaluation") == derived(0, "evaluation")
    True
    >>> len({derived(seed, purpose) for seed in range(100) for purpose in ("evaluation", "prior")})
    200
    """
    words = [checks.seed("seed", seed), *(zlib.crc32(name.encode()) for name in purpose)]
    return int(np.random.SeedSequence(words).generate_state(1)[0] >> 1)


@contextmanager
def seeded_on_the_cpu(seed: int) -> Iterator[None]:
    """Let what draws from torch's generator of the CPU, as new layers do, begin at a seed for the length of a block.

    Afterwards the caller's random numbers go on as if nothing had been drawn, on the CPU and on a GPU.
    """
    import torch  # not above: it takes seconds, and other seeds do without

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not `torch.manual_seed`, which would seed the caller's GPU too
        yield
