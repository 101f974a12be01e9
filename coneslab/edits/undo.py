"""Undo every change, whatever happens on the way."""

from __future__ import annotations

from collections.abc import Callable


class Undo:
    """Steps that each undo a change; `run` takes all of them, the latest first.

    A step must be safe to repeat: one that is interrupted (Ctrl-C) is repeated, and the interruption raised at the end.
    An error in one step does not keep the others from running; the first error is raised at the end.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def add(self, step: Callable[[], object]) -> None:
        self._steps.append(step)

    def run(self) -> None:
        raised: BaseException | None = None
        while self._steps:
            try:
                self._steps[-1]()
                self._steps.pop()  # only now: an interruption before this line repeats the step
            except KeyboardInterrupt as interruption:
                raised = interruption
            except Exception as error:
                self._steps.pop()
                raised = raised or error
        if raised is not None:
            raise raised

    def __bool__(self) -> bool:
        return bool(self._steps)
