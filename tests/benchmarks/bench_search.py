"""Whole searches: the paper's beside those at the subject's own words, with the pictures that their masks give.

    python tests/benchmarks/bench_search.py [--model tiny|FOLDER] [--subjects cat,tom] [--seeds 1] [--threads 2]

A search is timed from the call to the mask, prior pictures included, by the clock and by the processors, one after the
other in one process. Image alignment and the share of pictures taken for the subject (`coneslab.measure`) say what the
seconds buy: the same noises for every mask of a subject.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[2])]

import coneslab  # noqa: E402
from coneslab.experiments.setting import measure  # noqa: E402
from coneslab.finetuning import samples  # noqa: E402

SEARCHES: dict[str, dict[str, Any]] = {
    "the paper's, 60 rounds": {},
    "the paper's, 30 rounds": {"rounds": 30},
    "at its words, 60 rounds": {"scope": "subject"},
    "at its words, 30 rounds": {"scope": "subject", "rounds": 30},
    "at its words, 15 rounds": {"scope": "subject", "rounds": 15},
    "at its words, 30 rounds of 16": {"scope": "subject", "rounds": 30, "batch_size": 16},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--subjects", default="cat,tom")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipe, judge = coneslab.load(arguments.model, device="cpu"), coneslab.load_judge()
    names = arguments.subjects.split(",")
    coneslab.find_concept_neurons(pipe, coneslab.subject(names[0]), rounds=2, progress=False)  # warms up
    print(f"{', '.join(names)}; {arguments.seeds} seeds; {torch.get_num_threads()} threads\n")
    print(f"{'':32}{'s':>7}{'CPU s':>8}{'of the first':>14}{'shut':>7}{'image':>8}{'share':>7}")
    base = 0.0
    for label, options in {"untouched model": None, **SEARCHES}.items():
        clock = busy = shut = image = share = 0.0
        for subject in map(coneslab.subject, names):
            for seed in range(arguments.seeds):
                edit = None
                if options is not None:
                    samples._DRAWN.clear()  # the pictures of the class belong to the search
                    begun = time.perf_counter(), time.process_time()
                    found = coneslab.find_concept_neurons(pipe, subject, seed=seed, progress=False, **options)
                    clock, busy = clock + time.perf_counter() - begun[0], busy + time.process_time() - begun[1]
                    edit, shut = found.binary(), shut + found.density
                values = measure(pipe, judge, subject, edit, seed=seed, sampler_steps=12, samples=32)
                image, share = image + values["image alignment"], share + values["subject share"]
        runs = len(names) * arguments.seeds
        base = base or busy
        ratio = f"{busy / base:14.2f}" if base else f"{'':14}"
        seconds = f"{label:32}{clock / runs:7.1f}{busy / runs:8.1f}{ratio}"
        print(f"{seconds}{shut / runs:7.1%}{image / runs:8.3f}{share / runs:7.2f}", flush=True)


if __name__ == "__main__":
    main()
