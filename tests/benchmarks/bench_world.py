"""Pictures per second of the sticker worlds: the old one and the new one with more variety, side by side.

    python tests/benchmarks/bench_world.py [--pictures 2000] [--repeats 5]

Both alternate on one core, drawing as many pictures, and the median of the repeats counts; backgrounds are painted and
the atlas is read beforehand. Processor seconds hold on a busy machine too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).parents[2])]

from side_by_side import spent  # noqa: E402

from coneslab import new_world, world  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    sides = {"old": world.sample, "new": new_world.sample}
    busy: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(arguments.repeats + 1):  # the first turn warms up
        for name, sample in sides.items():
            _, processor, _ = spent(lambda sample=sample, seed=repeat: sample(arguments.pictures, seed=seed))
            busy[name] += [processor] if repeat else []
    print(f"{arguments.pictures:,} pictures, {arguments.repeats} repeats, processor time")
    print(f"{'world':8}{'pictures/s':>12}{'slowest':>10}{'to the old':>12}")
    for name, seconds in busy.items():
        rate, slowest = arguments.pictures / median(seconds), arguments.pictures / max(seconds)
        print(f"{name:8}{rate:12,.0f}{slowest:10,.0f}{median(busy['old']) / median(seconds):12.2f}")


if __name__ == "__main__":
    main()
