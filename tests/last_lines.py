"""The last lines of a failed test run: which tests failed, why, and how to run each alone."""

from __future__ import annotations

import os
import shlex
import sys
from typing import Any

import pytest

SHOWN = 10


def reason(report: Any) -> str:
    """What went wrong, in one line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash is not None else report.longreprtext).strip().splitlines()
    if not lines:
        return "it says nothing"
    return lines[0] if crash is not None else lines[-1]


def command(nodeid: str) -> str:
    """The command that runs this test, or notebook, and nothing else."""
    python, name = os.path.relpath(sys.executable), nodeid
    python = sys.executable if python.startswith("..") else python
    before, options = "", "--durations=3"
    path, _, rest = nodeid.partition("::")
    if path.endswith(".ipynb"):
        name, options = path, "--nbmake"
        folder, file = os.path.split(path)
        if not rest and folder.startswith("build"):  # a short copy: written anew, from what the notebook is now
            before = f"{python} tests/short_notebooks.py {folder} {file.removesuffix('.ipynb')} && "
    return f"{before}{python} -m pytest {options} {shlex.quote(name)}"


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """After everything else that pytest prints."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(config, "workerinput"):
        return
    wrong = [report for kind in ("failed", "error") for report in reporter.stats.get(kind, ())]
    for report in wrong[:SHOWN]:
        print(f"\n{report.nodeid}\n    why:    {reason(report)[:300]}\n    alone:  {command(report.nodeid)}")
    if len(wrong) > SHOWN:
        print(f"\nand {len(wrong) - SHOWN} more")
