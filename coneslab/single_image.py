"""What one picture of a concept is made of: words fall away until the picture would change (Conceptor, Sec. 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .conceptor import Decomposition
from .diffusion import generate
from .errors import ConeslabError
from .metrics import Judge
from .tokens import TokenEdit


@dataclass(frozen=True)
class ImageDecomposition:
    """The words that one picture needs, and how the others went.

    words: from the largest coefficient to the smallest; target: the picture to keep; picture: what the words left
    draw from the same noise; similarity: of the two; removed: (word, similarity at that point), in order; drawn: how
    many pictures that took, in `passes` batches.
    """

    words: tuple[str, ...]
    target: Image.Image
    picture: Image.Image
    similarity: float
    removed: tuple[tuple[str, float], ...]
    drawn: int
    passes: int

    def __repr__(self) -> str:
        how = f"similarity {self.similarity:.3f}, {self.drawn} pictures drawn"
        return f"ImageDecomposition({', '.join(self.words)}: {how})"


def decompose_image(
    pipe: Any,
    decomposition: Decomposition,
    judge: Judge,
    *,
    seed: int = 0,
    threshold: float = 0.95,
    target: Literal["concept", "decomposition"] | Image.Image = "decomposition",
    prompt: str | None = None,
    max_words: int = 50,
    near_synonyms: Sequence[Sequence[str]] = (),
    steps: int = 25,
    guidance_scale: float = 3.0,
    batch_size: int = 25,
    progress: bool = True,
    callback: Callable[[int, tuple[str, ...]], object] | None = None,
) -> ImageDecomposition:
    """Leave out word after word while the picture from `seed` stays like the target (Conceptor, Sec. 3.3).

    target: what the pseudo-token draws from that seed, or what the concept's own prompt does ("concept", with
    `prompt` in place of the decomposition's name if given), or a picture. A word may go while the cosine of the
    judge's features stays at `threshold` or above. near_synonyms: groups of words that go together.
    Words go from the smallest coefficient up, one, two, four, eight of them, ..., as many as may: the trials of such a
    pass are drawn in one batch. When the smallest cannot go, a pass tries each of the words left, and then all that
    alone could go, half of them, a quarter, down to the one that matters least. It ends when none can go alone.
    callback(pass, words left). Raises ConeslabError for a threshold that is no cosine.
    """
    if not -1 <= threshold <= 1:
        raise ConeslabError(f"threshold is {threshold}: give a cosine in [-1, 1]")
    count = {"drawn": 0, "passes": 0}
    groups = {word: {word} for word in decomposition.words}
    for group in near_synonyms:
        for word in group:
            groups.get(word, set()).update(group)

    def draw(vectors: Sequence[Tensor]) -> list[Image.Image]:
        tokens = tuple(f"<part{number}>" for number in range(len(vectors)))
        prompts = [decomposition.template.format(token) for token in tokens]
        count["drawn"] += len(vectors)
        how: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale, "batch_size": batch_size}
        with TokenEdit(tokens, torch.stack(list(vectors)), decomposition.fingerprint).applied(pipe):
            return generate(pipe, prompts, seed=[seed] * len(prompts), **how)

    def vector(words: Sequence[str]) -> Tensor:
        return decomposition.only(*words).vector(pipe).cpu()

    words = [word for word, share in decomposition.top(min(max_words, decomposition.explain)) if share > 0]
    if isinstance(target, Image.Image):
        goal = target
    elif target == "concept":
        options: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale}
        goal = generate(pipe, [prompt or decomposition.concept], seed=seed, **options)[0]
    else:
        goal = draw([vector(words)])[0]
    seen = judge.image_features(goal)[0]

    def closeness(sets: Sequence[Sequence[str]]) -> list[float]:
        return (judge.image_features(draw([vector(own) for own in sets])) @ seen).tolist()

    removed: list[tuple[str, float]] = []
    bar = tqdm(desc="leaving words out", unit="pass", disable=not progress)

    def without(gone: set[str]) -> list[str]:
        return [word for word in words if word not in gone]

    def drop(gone: set[str], score: float) -> None:
        nonlocal words
        removed.extend((word, score) for word in words if word in gone)
        words = without(gone)

    def smallest() -> bool:
        """One pass from the smallest coefficient up; says whether any word went."""
        gone: set[str] = set()
        trials: list[set[str]] = []
        for number, word in enumerate(reversed(words), start=1):
            gone = gone | groups[word]
            if without(gone) and (number & (number - 1) == 0 or number == len(words) - 1):
                trials.append(gone)
        scores = closeness([without(trial) for trial in trials]) if trials else []
        good = [number for number, score in enumerate(scores) if score >= threshold]
        if good:
            drop(trials[good[-1]], scores[good[-1]])
        return bool(good)

    def alone() -> bool:
        """One pass over every word alone, then as many of the free ones together as may go."""
        rest = {word: without(groups[word]) for word in words}
        rest = {word: left for word, left in rest.items() if left}
        scores = dict(zip(rest, closeness(list(rest.values())), strict=True)) if rest else {}
        free = sorted((word for word in scores if scores[word] >= threshold), key=lambda word: -scores[word])
        while free:
            gone = set().union(*(groups[word] for word in free))
            left = without(gone)
            score = scores[free[0]] if len(free) == 1 else (closeness([left])[0] if left else -1.0)
            if left and score >= threshold:
                drop(gone, score)
                return True
            free = free[: len(free) // 2]
        return False

    for one_pass in (smallest, alone):
        went = True
        while went and len(words) > 1:
            count["passes"] += 1
            bar.update()
            went = one_pass()
            if callback is not None:
                callback(count["passes"], tuple(words))
    bar.close()
    picture = draw([vector(words)])[0]
    similarity = float(judge.image_features(picture)[0] @ seen)
    return ImageDecomposition(tuple(words), goal, picture, similarity, tuple(removed), count["drawn"], count["passes"])
