"""Checkpoints of training: tensors and facts in one safetensors file, so that resuming never unpickles anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import FileFormatError, MismatchError
from ..files import replacing, require_sum, require_writable, safetensors_in, sealed

Function = TypeVar("Function", bound=Callable[..., Any])

FORMAT = "coneslab.checkpoint/1"
_REMEDY = "delete it to start again, or name another file"


def save_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and facts as one safetensors file, atomically. Raises WriteError if it cannot be written."""
    with replacing(path) as unfinished:
        kept = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        save_file(kept, unfinished, sealed(kept, {"format": FORMAT, "facts": json.dumps(facts)}))


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_checkpoint` wrote. Raises FileFormatError if the file is damaged, or not a checkpoint."""
    tensors, metadata = safetensors_in(path, what="coneslab checkpoint", remedy=_REMEDY)
    if metadata.keys() != {"facts"}:  # nothing else: it was written before checkpoints had a checksum
        require_sum(path, tensors, metadata, FORMAT, remedy=_REMEDY)
    try:
        return tensors, dict(json.loads(metadata["facts"]))
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise FileFormatError(f"{path} is not a complete coneslab checkpoint ({error}): {_REMEDY}") from error


def resumable(function: Function) -> Function:
    """Check `resume`, the file to continue from, when a function is called: much is computed before the first step.

    The function then raises WriteError if the file cannot be written, FileFormatError if it is damaged or of another
    kind.
    """

    @wraps(function)
    def checked(*arguments: Any, resume: str | Path | None = None, **options: Any) -> Any:
        if resume is not None and require_writable(resume).is_file():
            load_checkpoint(resume)
        return function(*arguments, resume=resume, **options)

    return cast(Function, checked)


def training_state(weights: Mapping[str, Tensor], optimisers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Weights as "weight/name", and the optimisers' state of each as "key/name"."""
    tensors = {f"weight/{name}": weight for name, weight in weights.items()}
    for optimiser in optimisers:
        for name, weight in weights.items():
            remembered = optimiser.state.get(weight, {})
            tensors |= {f"{key}/{name}": torch.as_tensor(value) for key, value in remembered.items()}
    return tensors


class TuningCheckpoint:
    """Weights, the optimiser's state and the history, in one safetensors file.

    identity: everything that the state depends on, by name; a file with another one is refused.
    Raises WriteError if the file cannot be written.
    """

    def __init__(
        self,
        path: str | Path | None,
        weights: Mapping[str, Tensor],
        optimiser: torch.optim.Optimizer,
        identity: Mapping[str, Any],
    ) -> None:
        self.path = None if path is None else require_writable(path)
        self.weights, self.optimiser = weights, optimiser
        self.identity = json.loads(json.dumps(dict(identity)))

    def save(self, step: int, history: dict[str, list[float]]) -> None:
        if self.path is None:
            return
        facts = {"step": step, "history": history, "identity": self.identity}
        save_checkpoint(self.path, training_state(self.weights, [self.optimiser]), facts)

    def load(self, *, at_most: int) -> tuple[int, dict[str, list[float]]]:
        """Restore the state; return the number of steps done, and the history.

        Raises MismatchError if the file belongs to another run, or holds more than `at_most` steps.
        """
        if self.path is None or not self.path.is_file():
            return 0, {}
        tensors, facts = load_checkpoint(self.path)
        if not {"identity", "step", "history"} <= facts.keys():
            raise FileFormatError(f"{self.path} is a checkpoint of other training than this one: name another file")
        was, now = facts["identity"], self.identity
        other = [name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name)]
        if other:
            said = ", ".join(f"{name} was {was.get(name)!r}, now {now.get(name)!r}"[:120] for name in other)
            raise MismatchError(f"{self.path} belongs to another run ({said}): name another file, or delete it")
        if facts["step"] > at_most:
            raise MismatchError(
                f"{self.path} holds {facts['step']} steps, more than the {at_most} asked for: ask for at least that "
                "many, or name another file"
            )
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(tensors[f"weight/{name}"])
                keys = [key.split("/", 1)[0] for key in tensors if key.endswith(f"/{name}")]
                kept = {key: tensors[f"{key}/{name}"] for key in keys if key != "weight"}
                self.optimiser.state[weight] = {
                    key: value if key == "step" else value.to(weight.device) for key, value in kept.items()
                }
        return int(facts["step"]), {name: list(values) for name, values in facts["history"].items()}
