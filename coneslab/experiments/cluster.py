"""Many processes: a Dask cluster whose workers share the cells of a table, and the models that each of them loads."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from ..diffusion.pipelines import load
from ..measure.judge import load_judge

_LOADING = threading.Lock()  # two threads of a worker must not load a model twice


def loaded(model: str, judge: str, device: str | None = None) -> tuple[Any, Any]:
    """Model and judge on a device, loaded once per process."""
    with _LOADING:
        return _loaded(model, judge, device)


@lru_cache(maxsize=2)
def _loaded(model: str, judge: str, device: str | None) -> tuple[Any, Any]:
    pipe = load(model, device=device)
    return pipe, load_judge(judge, device=pipe.device)


@contextmanager
def dask_client(scheduler: str | None = None, *, workers: int = 1, threads: int = 2) -> Any:
    """A Dask client of the scheduler at an address, or of a local cluster for the length of a block.

    workers: processes; threads: torch's in each; workers × threads should be the number of cores. Every worker runs
    one cell at a time.
    """
    from dask import config
    from distributed import Client, LocalCluster

    if scheduler is not None:
        with Client(scheduler) as client:
            yield client
        return
    options: dict[str, Any] = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
    spawn = {f"{library}_NUM_THREADS": threads for library in ("OMP", "MKL", "OPENBLAS")}
    before = dict(os.environ)
    try:
        settings = {"distributed.nanny.pre-spawn-environ": spawn}
        with config.set(settings), LocalCluster(processes=True, **options) as cluster:
            _restore(before)
            with Client(cluster) as client:
                yield client
    finally:
        _restore(before)


def _restore(environment: Mapping[str, str]) -> None:
    """Restore the environment: distributed sets the workers' variables in this process as well."""
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)
