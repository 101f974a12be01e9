"""Numbers about pictures: alignment with text and references, accuracy, KID, bootstrap intervals.

A `Judge` is a CLIP model that only measures. The shipped one was trained apart from the diffusion model, on
all art styles; any CLIP checkpoint in the transformers format works as well. `coneslab.measure.evaluation` puts these
numbers together into the table that `coneslab evaluate-model` prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ConeslabError, MismatchError

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPProcessor

Images: TypeAlias = Image.Image | Sequence[Image.Image] | np.ndarray
Reduction: TypeAlias = Literal["mean", "none"]


def as_pictures(images: Images) -> list[Image.Image]:
    """One picture, several, or a uint8 array (n, height, width, 3), as a list of RGB pictures."""
    if isinstance(images, Image.Image):
        images = [images]
    elif isinstance(images, np.ndarray):
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[-1] != 3:
            raise ConeslabError(
                f"got an array of {images.dtype} and shape {images.shape}, expected uint8 and "
                "(n, height, width, 3): scale values to 0..255 and put the channels last"
            )
        images = [Image.fromarray(array) for array in images.reshape(-1, *images.shape[-3:])]
    pictures = list(images)
    if not pictures:
        raise ConeslabError("got no pictures, expected at least one: generate some first")
    for picture in pictures:
        if not isinstance(picture, Image.Image):
            raise ConeslabError(f"got a {type(picture).__name__} among the pictures, expected PIL pictures")
    return [picture if picture.mode == "RGB" else picture.convert("RGB") for picture in pictures]


@dataclass(frozen=True, eq=False)
class Judge:
    """A CLIP model with its processor, used only to measure.

    Features have length 1, so every dot product is a cosine. All results are on the CPU in float32.
    """

    model: CLIPModel
    processor: CLIPProcessor
    batch_size: int = 64

    def __repr__(self) -> str:
        size = self.model.config.vision_config.image_size
        weights = sum(weight.numel() for weight in self.model.parameters())
        return f"Judge({weights / 1e6:.1f} M weights, {size}x{size} pixels, {self.width} features)"

    @property
    def width(self) -> int:
        """Number of features d."""
        return self.model.config.projection_dim

    @torch.no_grad()
    def image_features(self, images: Images, *, normalize: bool = True) -> Tensor:
        """Embeddings of pictures, (n, d); of length 1 unless `normalize` is False."""
        pictures = as_pictures(images)
        features = []
        for start in range(0, len(pictures), self.batch_size):
            pixels = self.processor(images=pictures[start : start + self.batch_size], return_tensors="pt")
            pixels = pixels["pixel_values"].to(self.model.device, self.model.dtype)
            pooled = self.model.vision_model(pixel_values=pixels).pooler_output
            features.append(self.model.visual_projection(pooled).float().cpu())
        return _unit(torch.cat(features)) if normalize else torch.cat(features)

    @torch.no_grad()
    def text_features(self, prompts: str | Sequence[str], *, normalize: bool = True) -> Tensor:
        """Embeddings of prompts, (n, d); of length 1 unless `normalize` is False. Long prompts are cut."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts:
            raise ConeslabError("got no prompts, expected at least one")
        length = self.model.config.text_config.max_position_embeddings
        distinct = sorted(set(texts))
        features = []
        for start in range(0, len(distinct), 4 * self.batch_size):
            tokens = self.processor(
                text=distinct[start : start + 4 * self.batch_size],
                padding="max_length", max_length=length, truncation=True, return_tensors="pt",
            )  # fmt: skip
            pooled = self.model.text_model(
                input_ids=tokens["input_ids"].to(self.model.device),
                attention_mask=tokens["attention_mask"].to(self.model.device),
            ).pooler_output
            features.append(self.model.text_projection(pooled).float().cpu())
        row = {text: index for index, text in enumerate(distinct)}
        table = torch.cat(features)[[row[text] for text in texts]]
        return _unit(table) if normalize else table

    def label_features(self, labels: Sequence[str | Sequence[str]]) -> Tensor:
        """One embedding a label, (k, d); a label given in several phrasings gets the direction of their mean.

        Averaging the phrasings is the prompt ensemble of CLIP (Radford et al. 2021, Sec. 3.1.4).
        """
        phrasings = [[label] if isinstance(label, str) else list(label) for label in labels]
        if not phrasings or not all(phrasings):
            raise ConeslabError("got no labels, or a label without a phrasing: expected at least one each")
        features = self.text_features([text for texts in phrasings for text in texts])
        by_label = features.split([len(texts) for texts in phrasings])
        return _unit(torch.stack([part.mean(0) for part in by_label]))

    @overload
    def text_alignment(
        self, images: Images, prompts: str | Sequence[str], *, reduction: Literal["mean"] = "mean"
    ) -> float: ...
    @overload
    def text_alignment(self, images: Images, prompts: str | Sequence[str], *, reduction: Literal["none"]) -> Tensor: ...
    def text_alignment(
        self, images: Images, prompts: str | Sequence[str], *, reduction: Reduction = "mean"
    ) -> float | Tensor:
        """Mean cosine of each picture and its prompt; one value a picture, (n,), with reduction="none".

        prompts: one for all pictures, or one each; without modifier tokens (`Subject.plain`), which no judge
        knows. Text alignment of Custom Diffusion (Kumari et al. 2023) and Cones (Liu et al. 2023).
        """
        features = self.image_features(images)
        texts = [prompts] * len(features) if isinstance(prompts, str) else list(prompts)
        if len(texts) != len(features):
            raise MismatchError(
                f"got {len(features)} pictures and {len(texts)} prompts, expected one for all or one each"
            )
        return _reduce((features * self.text_features(texts)).sum(-1), reduction)

    @overload
    def image_alignment(self, images: Images, references: Images, *, reduction: Literal["mean"] = "mean") -> float: ...
    @overload
    def image_alignment(self, images: Images, references: Images, *, reduction: Literal["none"]) -> Tensor: ...
    def image_alignment(self, images: Images, references: Images, *, reduction: Reduction = "mean") -> float | Tensor:
        """Mean cosine over all pairs of a picture and a reference.

        With reduction="none" one value a picture, (n,): its mean over the references.
        Image alignment of Custom Diffusion and Cones; average it over subjects.
        """
        pairs = self.image_features(images) @ self.image_features(references).T  # (pictures, references)
        return _reduce(pairs.mean(1), reduction)

    def similarity(self, images: Images, labels: Sequence[str | Sequence[str]]) -> Tensor:
        """Cosine of every picture with every label, (n, k)."""
        return self.image_features(images) @ self.label_features(labels).T

    def classify(self, images: Images, labels: Sequence[str | Sequence[str]]) -> Tensor:
        """Index of the label nearest to each picture, (n,), int64. A label may be several phrasings."""
        return self.similarity(images, labels).argmax(1)


def load_judge(name_or_path: str | Path = "judge", *, device: str | torch.device = "cpu") -> Judge:
    """The shipped judge, or any CLIP folder or hub id in the transformers format.

    Raises ConeslabError if the folder holds no CLIP model.
    """
    from transformers import CLIPModel, CLIPProcessor  # here: what measures numbers below does without

    from ..diffusion.pipelines import model_folder, without_bars

    shipped = str(name_or_path) == "judge"
    folder = model_folder("judge") if shipped else name_or_path
    try:
        with without_bars() if shipped else nullcontext():
            model = CLIPModel.from_pretrained(folder, use_safetensors=True)
        processor = CLIPProcessor.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ConeslabError(
            f"got {str(name_or_path)!r} as a judge, expected 'judge' or a folder with a CLIP model and its "
            f"processor in the transformers format: {error}"
        ) from error
    return Judge(model.to(device).eval().requires_grad_(False), processor)


def kid(
    features_a: Tensor | np.ndarray,
    features_b: Tensor | np.ndarray,
    *,
    subset_size: int | None = None,
    subsets: int = 100,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    seed: int = 0,
) -> float:
    """Kernel inception distance: unbiased MMD² with the kernel (γ·aᵀb + c)^degree (Binkowski et al. 2018).

    features_a, features_b: (n, d) and (m, d), of any judge; γ is 1/d unless given. Unbiased, so it may fall
    below 0 for equal distributions. `subset_size` None takes all pictures once (the least variance); a number
    averages over `subsets` random subsets of that size, drawn without replacement, as clean-fid does
    (100 subsets of 1000).
    Raises MismatchError for different widths, ConeslabError for fewer than two pictures or values not finite.
    """
    a, b = (np.asarray(features, dtype=np.float64) for features in (features_a, features_b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise MismatchError(
            f"got features of shape {a.shape} and {b.shape}, expected (n, d) and (m, d): take both from one judge"
        )
    size = min(len(a), len(b)) if subset_size is None else subset_size
    if size < 2 or size > min(len(a), len(b)):
        raise ConeslabError(
            f"got {len(a)} and {len(b)} pictures and subset_size={subset_size}, expected at least 2 pictures "
            "on both sides and a subset no larger than either"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ConeslabError("got features with NaN or infinite values, expected finite ones")
    scale = 1.0 / a.shape[1] if gamma is None else gamma

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (scale * x @ y.T + coef0) ** degree

    def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
        n, m = len(x), len(y)
        xx, yy = kernel(x, x), kernel(y, y)
        within_x = (xx.sum() - np.trace(xx)) / (n * (n - 1))  # without the diagonal: that makes it unbiased
        within_y = (yy.sum() - np.trace(yy)) / (m * (m - 1))
        return float(within_x + within_y - 2 * kernel(x, y).mean())

    if subset_size is None:
        return squared_mmd(a, b)
    rng = np.random.default_rng(seed)
    return float(np.mean([
        squared_mmd(a[rng.choice(len(a), size, replace=False)], b[rng.choice(len(b), size, replace=False)])
        for _ in range(subsets)
    ]))  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval."""

    estimate: float
    low: float
    high: float
    level: float
    values: int

    def __repr__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_dict(self) -> dict[str, float]:
        """Plain numbers, for JSON."""
        return {"estimate": self.estimate, "low": self.low, "high": self.high, "level": self.level,
                "values": self.values}  # fmt: skip


def bootstrap_interval(
    values: Sequence[float] | np.ndarray | Tensor,
    *,
    clusters: Sequence[Sequence] = (),
    minus: Sequence[float] | np.ndarray | Tensor | None = None,
    level: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a mean (Efron and Tibshirani 1993, Sec. 13.3), by clusters if given.

    values: (n,). clusters: label sequences of length n, outermost first, for example `[subjects, seeds]`:
    each resample draws subjects, then seeds within each drawn subject, and keeps the pictures of a drawn seed
    together, because pictures of one subject are no independent evidence (Davison and Hinkley 1997, 3.8).
    The mean is taken in each seed, then over seeds, then over subjects, so every subject counts the same.
    Without clusters the values are drawn one by one.
    minus: (n,) values to subtract first, for the interval of a paired difference.
    Raises MismatchError for different lengths, ConeslabError for no values or values not finite.

    >>> bootstrap_interval([1, 0, 1, 1], clusters=[["cat", "cat", "dog", "dog"]]).estimate
    0.75
    """
    numbers = np.asarray(values, dtype=np.float64)
    lengths = {"values": numbers.shape, **{f"clusters[{i}]": (len(c),) for i, c in enumerate(clusters)}}
    if minus is not None:
        lengths["minus"] = np.shape(minus)
    if numbers.ndim != 1 or len(set(lengths.values())) != 1:
        raise MismatchError(f"got shapes {lengths}, expected one length for all")
    if minus is not None:
        numbers = numbers - np.asarray(minus, dtype=np.float64)
    if not len(numbers) or not np.isfinite(numbers).all():
        raise ConeslabError(f"got {len(numbers)} values, expected at least one, and all finite")
    if not 0 < level < 1 or resamples < 1:
        raise ConeslabError(f"got level={level}, resamples={resamples}, expected 0 < level < 1 and 1 or more")

    columns = [np.unique(np.asarray(labels), return_inverse=True)[1].reshape(-1) for labels in clusters]
    if not columns:
        columns = [np.arange(len(numbers))]
    tree = _group(numbers, columns)
    means = _resample(tree, resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(_tree_mean(tree), float(low), float(high), level, len(numbers))


_Tree: TypeAlias = "float | list[_Tree]"


def _group(numbers: np.ndarray, columns: list[np.ndarray]) -> _Tree:
    """Nest values by the columns' labels; a leaf is the mean of the values that stay together."""
    if not columns:
        return float(numbers.mean())
    first, *rest = columns
    members = [first == label for label in np.unique(first)]
    return [_group(numbers[here], [column[here] for column in rest]) for here in members]


def _tree_mean(tree: _Tree) -> float:
    return tree if isinstance(tree, float) else float(np.mean([_tree_mean(child) for child in tree]))


def _resample(tree: _Tree, size: int, rng: np.random.Generator) -> np.ndarray:
    """Means of `size` resamples of a tree, (size,): children drawn with replacement, each resampled anew."""
    if isinstance(tree, float):
        return np.full(size, tree)
    drawn = rng.integers(len(tree), size=(size, len(tree)))
    means = np.empty(drawn.shape)
    for index, child in enumerate(tree):
        here = drawn == index
        means[here] = _resample(child, int(here.sum()), rng)
    return means.mean(1)


def _unit(features: Tensor) -> Tensor:
    return features / features.norm(dim=-1, keepdim=True)


def _reduce(values: Tensor, reduction: Reduction) -> float | Tensor:
    if reduction not in ("mean", "none"):
        raise ConeslabError(f"got reduction={reduction!r}, expected 'mean' or 'none'")
    return values.mean().item() if reduction == "mean" else values
