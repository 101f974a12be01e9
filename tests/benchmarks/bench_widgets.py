"""How soon the playground shows something: seconds from a change to its preview and to the picture in full.

    python tests/benchmarks/bench_widgets.py [--model tiny|FOLDER] [--repeats 10] [--threads 2]

A change is what moving a control does; the browser's part is left out. "dose" needs only the edit's pictures, the
others also those of the untouched model. Printed beside the seconds: processor seconds, which hold on a busy machine
too, and how many times sooner the preview appears.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parents[2])]

import coneslab  # noqa: E402
from coneslab.diffusion.kvspace import KVSpace  # noqa: E402
from coneslab.edits.weights import model_fingerprint  # noqa: E402
from coneslab.neurons.mask import ConceptNeurons  # noqa: E402
from coneslab.show.widgets import playground  # noqa: E402


def timed(view) -> tuple[tuple[float, float], tuple[float, float]]:
    """Wall and processor seconds to the first picture, and to the last one."""
    wall, processor, seen = time.perf_counter(), time.process_time(), []
    view._asked += 1
    for _ in view._drawing():
        seen.append((time.perf_counter() - wall, time.process_time() - processor))
    return seen[0], seen[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipe = coneslab.load(arguments.model, device="cpu")
    layout = KVSpace(pipe).layout
    scale = (torch.rand(layout.n, generator=torch.Generator().manual_seed(0)) > 0.04).float()
    edit = ConceptNeurons.from_scale(scale, layout, model_fingerprint(pipe), subject="random")
    view = playground(pipe, {"random": edit}, prompt="a cat on the beach")
    view.loop = type("Later", (), {"call_soon_threadsafe": lambda *_: None})()  # drawn below, not by the control
    timed(view)  # the very first call of a pipeline is slower
    start = {name: view.controls[name].value for name in ("pictures", "steps")}
    print(f"{start}, preview in {view.preview_steps} steps, {arguments.threads} threads, {arguments.repeats} repeats")
    print(f"{'change of':10}{'':10}{'p50 s':>8}{'p95 s':>8}{'p50 processor s':>17}")
    changes = {
        "dose": lambda i: setattr(view.controls["dose"], "value", round(0.05 * (i + 1), 2)),
        "prompt": lambda i: setattr(view.controls["prompt"], "value", f"a cat on the beach, number {i}"),
        "seed": lambda i: setattr(view.controls["seed"], "value", 1000 + i),
    }
    for name, change in changes.items():
        first, last = [], []
        for i in range(arguments.repeats):
            change(i)
            one, other = timed(view)
            first.append(one)
            last.append(other)
        for what, times in (("preview", np.array(first)), ("in full", np.array(last))):
            p50, p95 = np.quantile(times[:, 0], [0.5, 0.95])
            print(f"{name:10}{what:10}{p50:8.2f}{p95:8.2f}{np.median(times[:, 1]):17.2f}")
        ratio = np.median([b[1] / a[1] for a, b in zip(first, last, strict=True)])
        print(f"{name:10}the preview is there {ratio:.1f} times sooner (processor time)")


if __name__ == "__main__":
    main()
