"""Is everything there, and what will be slow? Versions, device, shipped models, and timings on this machine.

`coneslab doctor` prints it. It changes nothing and downloads nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from packaging.requirements import Requirement

from .. import __version__
from ..diffusion import pipelines
from ..diffusion.precision import bfloat16_pays
from ..diffusion.sampling import generate
from ..errors import ConeslabError
from ..neurons.search import find_concept_neurons
from ..world.subjects import subject as subject_named

Level = Literal["ok", "note", "problem"]
ROUNDS, STEPS = 60, 25  # of the search and of the pictures whose times are predicted, from a few
_PARTS = {  # what an extra of the package brings, by the command that needs it
    "jupyterlab": "the notebooks in JupyterLab (make lab)",
    "voila": "the playground as a page (make app)",
    "nbgrader": "graded coursework (make assignments)",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was checked. level: "problem" if something will not work; hint: what to do about it."""

    what: str
    found: str
    level: Level = "ok"
    hint: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings, in the order they were made. ok: none is a problem."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return all(finding.level != "problem" for finding in self.findings)

    def __str__(self) -> str:
        signs = {"ok": "    ", "note": "  ! ", "problem": "  X "}
        lines = []
        for finding in self.findings:
            lines.append(f"{signs[finding.level]}{finding.what:22}{finding.found}")
            lines += [f"{'':26}→ {finding.hint}"] if finding.hint else []
        problems = sum(finding.level == "problem" for finding in self.findings)
        return "\n".join([*lines, f"{problems or 'no'} problem{'s' * (problems != 1)} found"])

    def to_dict(self) -> dict[str, Any]:
        """For JSON: ok, and one dictionary per finding."""
        return {"ok": self.ok, "findings": [asdict(finding) for finding in self.findings]}


def examine(*, device: str | None = None, timing: bool = True) -> Diagnosis:
    """Check the installation and this machine. timing: also draw and search a little, for about ten seconds.

    device: default a GPU if there is one.
    """
    found = Diagnosis((*_versions(), *_device(device), *_machine(), *_parts(), *_shipped()))
    if not timing or not found.ok:
        return found
    return Diagnosis((*found.findings, *_speed(pipelines.usable_device(device))))


def _versions() -> Iterator[Finding]:
    python = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    yield Finding("coneslab", f"{__version__}, Python {python}")
    wrong: dict[Requirement, str] = {}
    shown = []
    try:
        lines = importlib.metadata.requires("coneslab") or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
        yield Finding("libraries", "not checked: coneslab itself is not installed", "note", "pip install -e .")
    for line in lines:
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            wrong[need] = "is not installed"
            continue
        if need.name in ("torch", "diffusers", "transformers"):
            shown.append(f"{need.name} {version}")
        if not need.specifier.contains(version, prereleases=True):
            wrong[need] = f"is {version}, coneslab needs {need.specifier}"
    if shown:
        yield Finding("libraries", ", ".join(shown))
    for need, text in wrong.items():
        mend = shlex.join([sys.executable, "-m", "pip", "install", f"{need.name}{need.specifier}"])
        yield Finding("library", f"{need.name} {text}", "problem", mend)


def _device(device: str | None) -> Iterator[Finding]:
    try:
        where = pipelines.usable_device(device)
    except ConeslabError as error:
        yield Finding("device", f"{device}, which torch cannot use", "problem", str(error))
        return
    if where.type == "cuda":
        facts = torch.cuda.get_device_properties(where)
        yield Finding("device", f"{facts.name}, {facts.total_memory / 1e9:.0f} GB")
    else:
        yield Finding(
            "device",
            f"{where}; no GPU is used",
            "ok",
            "the tiny model needs none; with a real Stable Diffusion a picture takes minutes (docs/models.md)",
        )


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    few = threads < min(cores, 2)
    hint = "OMP_NUM_THREADS limits torch: unset it" if few and "OMP_NUM_THREADS" in os.environ else ""
    kind = (
        "bfloat16" if bfloat16_pays(torch.device("cpu")) else "no bfloat16, without which notebooks take twice as long"
    )
    yield Finding("processor", f"{cores} cores, torch uses {threads} threads; {kind}", "note" if few else "ok", hint)
    if (memory := _memory()) is not None:
        low = memory < 3e9
        hint = "notebooks take up to 3 GB: close other programs" if low else ""
        yield Finding("memory", f"{memory / 1e9:.1f} GB free", "note" if low else "ok", hint)
    free = shutil.disk_usage(".").free
    hint = "a run saves checkpoints and edits: free some space" if free < 1e9 else ""
    yield Finding("disk", f"{free / 1e9:.1f} GB free here", "note" if free < 1e9 else "ok", hint)


def _memory() -> float | None:
    """Bytes of memory that are available, or None if the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = re.search(r"MemAvailable:\s+(\d+) kB", file.read())
    except OSError:
        return None
    return 1024 * int(found[1]) if found else None


def _parts() -> Iterator[Finding]:
    missing = []
    for name, what in _PARTS.items():
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{what}: {name}")
    yield Finding("extras", f"missing: {'; '.join(missing)}" if missing else "all are installed")


def _shipped() -> Iterator[Finding]:
    for name in pipelines.SHIPPED:
        try:
            folder = pipelines.model_folder(name)
            pipelines.verify(folder)
        except ConeslabError as error:
            yield Finding(f"model {name!r}", "missing or damaged", "problem", str(error))
        else:
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            yield Finding(f"model {name!r}", f"complete, {size / 1e6:.0f} MB, checksums match")


def _speed(device: torch.device) -> Iterator[Finding]:
    pipe, subject = pipelines.load("tiny", device=device), subject_named("cat")

    def seconds(run: Any) -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def drawn(steps: int) -> float:
        return seconds(lambda: generate(pipe, ["a cat"] * 8, sampler_steps=steps))

    generate(pipe, "a cat", sampler_steps=2)  # the first call of a pipeline is slower
    few, more = 2, 7
    first = drawn(few)
    pictures = first + max(0.0, drawn(more) - first) / (more - few) * (STEPS - few)
    stamps: list[float] = []
    quick: dict[str, Any] = {"rounds": 3, "prior_images": 2, "sampler_steps": 2}  # a round takes as long as with many
    find_concept_neurons(pipe, subject, progress=False, callback=lambda *_: stamps.append(time.perf_counter()), **quick)
    one = (stamps[-1] - stamps[0]) / (len(stamps) - 1)
    yield Finding("eight pictures", f"about {pictures:.1f} s in {STEPS} steps")
    slow = ROUNDS * one > 90
    hint = "the notebooks were timed at about half a minute: lower ROUNDS in them" if slow else ""
    yield Finding(f"search, {ROUNDS} rounds", f"about {ROUNDS * one:.0f} s", "note" if slow else "ok", hint)
