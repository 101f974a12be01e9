"""An interrupt at one place of a program, for the tests of what is left afterwards."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal

import torch


class Injected(KeyboardInterrupt):
    """An interrupt that a test made."""


def interrupted_at(
    act: Callable[[], object],
    count: int,
    watched: Callable[[Any], bool],
    event: Literal["line", "opcode"] = "line",
) -> bool:
    """Act, with an interrupt at one of the lines or bytecodes of the watched code; whether it came to that.

    watched: of a code object, whether its lines count. Nothing of what `act` made is held afterwards.
    """
    return passed(act, watched, event, count) >= count  # also if it was swallowed, as where Python drops a block


def passed(
    act: Callable[[], object], watched: Callable[[Any], bool], event: Literal["line", "opcode"], end: int = 0
) -> int:
    """How many lines or bytecodes of the watched code are passed in acting, until the interrupt at `end`, if any."""
    seen = 0

    def tracer(frame: Any, now: str, argument: Any) -> Any:
        nonlocal seen
        if not watched(frame.f_code):
            return None
        frame.f_trace_opcodes = event == "opcode"
        if now == event:
            seen += 1
            if seen == end:
                sys.settrace(None)
                raise Injected("injected")
        return tracer

    previous = sys.gettrace()
    sys.settrace(tracer)
    try:
        act()
    except Injected:
        pass
    finally:
        sys.settrace(previous)
        torch.set_grad_enabled(True)  # a tracer can raise where no signal can: before a block's `__exit__` is called
    return seen
