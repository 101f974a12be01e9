"""What is needed soon is asked for now: chunks of pictures that others draw, numbered one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Job = TypeVar("Job")


class Ahead(Generic[Job]):
    """Jobs by number: `take(i)` starts those up to i + `ahead` that were not started yet, and hands out number i, once.

    waiting: those started and not handed out, by number.
    """

    def __init__(self, start: Callable[[int], Job], ahead: int):
        self.start, self.ahead = start, ahead
        self.waiting: dict[int, Job] = {}

    def take(self, index: int) -> Job:
        for number in range(index, index + self.ahead + 1):
            if number not in self.waiting:
                self.waiting[number] = self.start(number)
        return self.waiting.pop(index)
