"""What every probe of a class costs: seconds of a core for a number of pictures, and for the whole of a table's cell.

    python tests/benchmarks/bench_probes.py [--model tiny|FOLDER] [--class cat] [--anchor dog] [--pictures 6]
        [--sampler-steps 12] [--way UCE] [--threads 1]

Seconds of the processor, not of the clock, so that other programs disturb little. Probes that ask in words are drawn
together, and cost what their pictures cost; those of the untouched model are drawn once for all ways to ablate it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[2])]

import coneslab  # noqa: E402
from coneslab.diffusion.sampling import generate  # noqa: E402
from coneslab.experiments import Setting  # noqa: E402
from coneslab.experiments.ablation import WAYS, ablation, ablation_target  # noqa: E402
from coneslab.methods import ProbeSettings, class_probes, world_classifier  # noqa: E402


def spent(make: Callable[[], Any]) -> tuple[Any, float]:
    """What is made, and the processor's seconds for it."""
    begun = time.process_time()
    made = make()
    return made, time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--class", dest="name", default="cat")
    parser.add_argument("--anchor", default="dog")
    parser.add_argument("--pictures", type=int, default=6)
    parser.add_argument("--sampler-steps", type=int, default=12)
    parser.add_argument("--way", choices=list(WAYS), default="UCE", help="whose whole cell is measured at the end")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipe, n = coneslab.load(arguments.model, device="cpu"), arguments.pictures
    classifier, seconds = spent(lambda: world_classifier(pipe))
    print(f"{seconds:7.1f} s  a classifier of all classes, once per process: {classifier}")
    settings = ProbeSettings(sampler_steps=arguments.sampler_steps)
    whole = 0.0
    for probe in class_probes(arguments.name, arguments.anchor, classifier=classifier):
        if probe.draw is None:
            options: dict[str, Any] = {"sampler_steps": arguments.sampler_steps}
            _, seconds = spent(lambda probe=probe, options=options: generate(pipe, probe.asked(n), **options))
        else:
            _, seconds = spent(lambda probe=probe: probe.draw(pipe, n, settings))
        whole += seconds
        print(f"{seconds:7.1f} s  {probe.name}")
    print(f"{whole:7.1f} s  together, {n} pictures each")
    setting, case = Setting(pipe, coneslab.load_judge()), ablation_target(f"object:{arguments.name}")
    for condition in ("untouched model", arguments.way):
        _, seconds = spent(lambda condition=condition: ablation(setting, case, 0, condition))
        print(f"{seconds:7.1f} s  a cell of the table: {condition}")


if __name__ == "__main__":
    main()
