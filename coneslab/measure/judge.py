"""A judge of pictures and texts: alignment with prompts and references, accuracy.

A `Judge` is a CLIP model that only measures. The shipped one was trained separately from the diffusion model, on
all art styles; any CLIP checkpoint in the transformers format works as well. `coneslab.measure.evaluation` turns its
answers into the table that `coneslab evaluate-model` prints.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args, overload

import torch
from torch import Tensor

from .. import checks
from ..errors import ArgumentError, ConeslabError, MismatchError
from ..files import require_folder, user_path
from ..pictures import Images, as_pictures

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPProcessor

Reduction: TypeAlias = Literal["mean", "none"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)


def require_judge(judge: Any) -> None:
    """Raise ArgumentError unless something can judge pictures and texts, as `load_judge()` can."""
    checks.having("judge", judge, "a judge, such as load_judge()", "image_features", "text_features")


@dataclass(frozen=True, eq=False)
class Judge:
    """A CLIP model with its processor, used only to measure.

    Features have length 1, so every dot product is a cosine. All results are on the CPU in float32.
    """

    model: CLIPModel
    processor: CLIPProcessor
    batch_size: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", checks.count("batch_size", self.batch_size))

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
        """Embeddings of prompts, (n, d); of length 1 unless `normalize` is False.

        Prompts that are too long are truncated, with a warning.
        """
        texts = checks.texts("prompts", prompts, blank=True)
        length = self.model.config.text_config.max_position_embeddings
        distinct = sorted(set(texts))
        self._warn_of_unread(distinct, length)
        features = []
        for start in range(0, len(distinct), 4 * self.batch_size):
            tokens = self.processor(
                text=distinct[start : start + 4 * self.batch_size],
                padding="max_length",
                max_length=length,
                truncation=True,
                return_tensors="pt",
            )
            pooled = self.model.text_model(
                input_ids=tokens["input_ids"].to(self.model.device),
                attention_mask=tokens["attention_mask"].to(self.model.device),
            ).pooler_output
            features.append(self.model.text_projection(pooled).float().cpu())
        row = {text: index for index, text in enumerate(distinct)}
        table = torch.cat(features)[[row[text] for text in texts]]
        return _unit(table) if normalize else table

    def _warn_of_unread(self, texts: Sequence[str], length: int) -> None:
        most = length - self.processor.tokenizer.num_special_tokens_to_add()
        for start in range(0, len(texts), 4 * self.batch_size):
            own = texts[start : start + 4 * self.batch_size]
            ids = self.processor.tokenizer(own, add_special_tokens=False, verbose=False).input_ids
            long = [text for text, row in zip(own, ids, strict=True) if len(row) > most]
            if long:
                more = f" and of {len(long) - 1} more" if len(long) > 1 else ""
                checks.warn(
                    f"the judge reads {length} tokens at most, so the beginning alone of {checks.shown(long[0])}{more}"
                )

    def label_features(self, labels: Iterable[str | Iterable[str]]) -> Tensor:
        """One embedding per label, (k, d); for a label with several phrasings, the direction of their mean.

        Averaging the phrasings is CLIP's prompt ensembling (Radford et al. 2021, Sec. 3.1.4).
        """
        given = [labels] if isinstance(labels, str) else checks.items("labels", labels)
        phrasings = [checks.texts("phrasings", label, least=0) for label in given]
        if not all(phrasings):
            raise ArgumentError("got a label without a phrasing: give at least one for each")
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
        """Mean cosine of each picture and its prompt; one value per picture, (n,), with reduction="none".

        prompts: one for all pictures, or one each; without modifier tokens (`Subject.plain`), which no judge
        knows. Text alignment of Custom Diffusion (Kumari et al. 2023) and Cones (Liu et al. 2023).

        >>> judge, cat = coneslab.load_judge(), coneslab.subject("cat")
        >>> judge.text_alignment(cat.images, "a cat") > judge.text_alignment(cat.images, "a house")
        True
        >>> judge.text_alignment(cat.images, "a cat", reduction="none").shape
        torch.Size([5])
        """
        checks.choice("reduction", reduction, REDUCTIONS)
        given = checks.texts("prompts", prompts, blank=True)
        features = self.image_features(images)
        texts = given * len(features) if isinstance(prompts, str) else given
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

        With reduction="none", one value per picture, (n,): its mean over the references.
        Image alignment of Custom Diffusion and Cones; average it over subjects.
        """
        checks.choice("reduction", reduction, REDUCTIONS)
        pairs = self.image_features(images) @ self.image_features(references).T  # (pictures, references)
        return _reduce(pairs.mean(1), reduction)

    def similarity(self, images: Images, labels: Iterable[str | Iterable[str]]) -> Tensor:
        """Cosine of every picture with every label, (n, k)."""
        return self.image_features(images) @ self.label_features(labels).T

    def classify(self, images: Images, labels: Iterable[str | Iterable[str]]) -> Tensor:
        """Index of the label nearest to each picture, (n,), int64. A label may have several phrasings.

        >>> judge, cat = coneslab.load_judge(), coneslab.subject("cat")
        >>> judge.classify(cat.images, ["a car", ("a cat", "a picture of a cat"), "a house"]).tolist()
        [1, 1, 1, 1, 1]
        """
        return self.similarity(images, labels).argmax(1)


def judge_source(name_or_path: str | Path) -> str | Path:
    """Where `load_judge` finds a judge: a folder with the right checksums, if it has any, or a hub id.

    Raises ConeslabError if there is no such judge, or its files are damaged.
    """
    from ..diffusion.pipelines import is_hub_id, model_folder, verify

    name, folder = str(name_or_path), user_path(name_or_path)
    if name == "judge":
        folder = model_folder("judge")
        verify(folder)
    elif folder.is_dir():
        require_folder(folder)
        if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            raise ConeslabError(
                f"the judge {name!r} has no tokenizer: expected {folder / 'tokenizer.json'}; restore the folder, or "
                "save model and processor again"
            )
    elif not is_hub_id(name_or_path):
        raise ArgumentError(
            f"got {name!r} as a judge, expected 'judge', a folder with a CLIP model and its processor in the "
            "transformers format, or a hub id written owner/name"
        )
    else:
        return name
    return folder


def load_judge(name_or_path: str | Path = "judge", *, device: str | torch.device = "cpu") -> Judge:
    """The shipped judge, or any CLIP folder or hub id in the transformers format.

    Raises ConeslabError if it is damaged, the folder holds no CLIP model with its tokenizer, its weights are NaN or
    infinite, or the device cannot be used.

    >>> judge = coneslab.load_judge()
    >>> judge
    Judge(... M weights, ... pixels, ... features)
    >>> judge.text_features(["a cat", "a dog"]).shape == (2, judge.width)
    True
    """
    from transformers import CLIPModel, CLIPProcessor  # imported here, as only loading needs them

    from ..diffusion.checks import require_finite_weights
    from ..diffusion.pipelines import usable_device, without_bars

    where, shipped = usable_device(device), str(name_or_path) == "judge"
    folder = judge_source(name_or_path)
    try:
        with without_bars() if shipped else nullcontext():
            model = CLIPModel.from_pretrained(folder, use_safetensors=True)
        processor = CLIPProcessor.from_pretrained(folder)
    except Exception as error:  # transformers has its own ways to say "damaged" or "not found"
        raise ConeslabError(
            f"got {str(name_or_path)!r} as a judge, expected 'judge' or a folder with a CLIP model and its "
            f"processor in the transformers format: {error}"
        ) from error
    require_finite_weights(dict(model.named_parameters()), "judge")
    return Judge(model.to(where).eval().requires_grad_(False), processor)


def _unit(features: Tensor) -> Tensor:
    return features / features.norm(dim=-1, keepdim=True)


def _reduce(values: Tensor, reduction: Reduction) -> float | Tensor:
    return values.mean().item() if reduction == "mean" else values
