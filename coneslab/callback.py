"""What a callback sees: one dictionary, with the same keys whatever is going on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

#: Called after each step with a dictionary. "step" (from 0) and "steps" (how many there will be, None if nobody knows)
#: are always in it, "loss" wherever one is minimised; further keys are named where the callback is taken.
Callback: TypeAlias = Callable[[Mapping[str, Any]], object]
