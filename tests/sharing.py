"""What many tests use, made once: a test that leaves it changed fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PIPELINE = ("unet", "text_encoder", "vae")
SHARED: dict[str, Shared] = {}  # what was handed out, by the name of its fixture


class Shared:
    """A pipeline, or a judge, that many tests use: as it was when it was made, so that no test can change it."""

    def __init__(self, what: Any, parts: Mapping[str, torch.nn.Module]) -> None:
        self.what, self.parts = what, dict(parts)
        self.kept = {name: {key: one.clone() for key, one in part.state_dict().items()} for name, part in parts.items()}
        self.wanted = [weight.requires_grad for part in self.parts.values() for weight in part.parameters()]
        self.tokenizer = getattr(what, "tokenizer", None)
        self.words = len(self.tokenizer) if self.tokenizer is not None else 0

    def changes(self) -> list[str]:
        """What is no longer as it was, in words."""
        import torch

        found = []
        for name, part in self.parts.items():
            now = part.state_dict()
            if getattr(self.what, name) is not part:
                found.append(f"{name} is another one")
            if now.keys() != self.kept[name].keys():
                found.append(f"{name} has other weights")
            else:
                found += [f"{name}.{key}" for key, one in self.kept[name].items() if not torch.equal(one, now[key])]
            if any(module._forward_hooks or module._forward_pre_hooks for module in part.modules()):
                found.append(f"{name} has hooks")
            if part.training:
                found.append(f"{name} is set to train")
        weights = [weight for part in self.parts.values() for weight in part.parameters()]
        if any(weight.grad is not None for weight in weights):
            found.append("gradients are left")
        if [weight.requires_grad for weight in weights] != self.wanted:
            found.append("other weights ask for gradients")
        if getattr(self.what, "tokenizer", None) is not self.tokenizer:
            found.append("the tokenizer is another one")
        elif self.tokenizer is not None and len(self.tokenizer) != self.words:
            found.append("the tokenizer has other words")
        return found

    def restore(self) -> None:
        """Put the weights back, for the tests that come after."""
        for name, part in self.parts.items():
            if part.state_dict().keys() == self.kept[name].keys():
                part.load_state_dict(self.kept[name])
            for weight in part.parameters():
                weight.grad = None


def share(name: str, what: Any, *parts: str) -> Any:
    """Hand out something that costs time to make; every test that is given it is held to leave it as it was."""
    SHARED[name] = Shared(what, {part: getattr(what, part) for part in parts})
    return what
