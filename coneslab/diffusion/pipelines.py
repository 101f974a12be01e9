"""Load models: the shipped ones by name, any `StableDiffusionPipeline` by folder or hub id.

Pipelines stay plain diffusers objects. Only safetensors weights are read, never pickles, and the shipped folders
are checked against their SHA-256 checksums (`data/models/SHA256SUMS.json`) before use.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from .. import checks
from ..errors import ArgumentError, ConeslabError, FileFormatError
from ..files import SUMS, data_folder, file_sum, require_folder, user_path, write_whole
from .checks import NETWORKS, require_finite, require_pipeline, uncompiled
from .memory import keep_memory

if TYPE_CHECKING:  # diffusers and transformers take seconds to import: left until a model is loaded
    from diffusers import StableDiffusionPipeline

Pipeline: TypeAlias = "StableDiffusionPipeline"

SHIPPED = ("tiny", "judge")
_CONFIGS = {  # parts without weights, and a file without which they cannot be loaded
    "tokenizer": ("tokenizer.json", "vocab.json"),
    "scheduler": ("scheduler_config.json",),
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def model_folder(name: str) -> Path:
    """The folder of a shipped model, "tiny" or "judge". Raises ConeslabError for any other, or if it is missing."""
    if not isinstance(name, str) or name not in SHIPPED:
        raise ConeslabError(f"{name!r} is not a model that coneslab ships: choose one of {', '.join(SHIPPED)}")
    folder = data_folder() / "models" / name
    if not folder.is_dir():
        raise ConeslabError(
            f"the shipped model {name!r} is missing: expected it in {folder}. Restore it from the repository "
            f"(git checkout -- data/models), or train it: coneslab pretrain all"
        )
    return folder


def write_sums(models: Path) -> Path:
    """Write the checksums of the files in the shipped folders under `models`, for `verify`."""
    files = sorted(path for name in SHIPPED for path in (models / name).rglob("*") if path.is_file())
    sums = {path.relative_to(models).as_posix(): file_sum(path) for path in files if path.suffix not in (".md", ".png")}
    return write_whole(models / SUMS, (json.dumps(sums, indent=1) + "\n").encode())


def verify(folder: Path) -> None:
    """Check a shipped folder against the checksums written at its export.

    Raises FileFormatError naming the files that are missing or differ; model cards are not checked.
    """
    table = folder.parent / SUMS
    try:
        sums = {str(name): digest for name, digest in json.loads(table.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise FileFormatError(
            f"the checksums of the shipped models cannot be read ({error}): restore {table}"
        ) from error
    expected = {name: digest for name, digest in sums.items() if name.split("/")[0] == folder.name}
    wrong = [
        name
        for name, digest in expected.items()
        if not (path := folder.parent / name).is_file() or file_sum(path) != digest
    ]
    if wrong or not expected:
        raise FileFormatError(
            f"the shipped model {folder.name!r} is damaged: {', '.join(wrong) or 'no file'} does not match {table}. "
            "Restore it (git checkout -- data/models, or reinstall coneslab)"
        )


def _check_layout(folder: Path) -> None:
    """Check that a local folder holds a StableDiffusionPipeline with safetensors weights."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ConeslabError(
            f"{folder} is not a pipeline folder: it has no model_index.json. Give the folder that "
            "StableDiffusionPipeline.save_pretrained wrote"
        )
    try:
        parts: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
        kind = parts["_class_name"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileFormatError(f"{index} is damaged ({error}): restore the folder or save the pipeline again") from error
    if kind != "StableDiffusionPipeline":
        raise ConeslabError(
            f"{folder} holds a {kind}, expected a StableDiffusionPipeline: coneslab works only with those"
        )
    for part in ("vae", "text_encoder", "unet"):
        files = [path for path in (folder / part).glob("*") if path.is_file()]
        if any(path.suffix == ".safetensors" for path in files):
            continue
        if any(path.suffix in _PICKLES for path in files):
            raise ConeslabError(
                f"{folder / part} holds only pickled weights, which can run code when opened and are never loaded: "
                "convert them with save_pretrained(folder, safe_serialization=True)"
            )
        raise ConeslabError(f"{folder / part} holds no weights: expected a .safetensors file; restore the folder")
    for part, names in _CONFIGS.items():
        if not any((folder / part / name).is_file() for name in names):
            raise ConeslabError(
                f"{folder} has no {part}: expected {folder / part / names[0]}; restore the folder, or save the whole "
                "pipeline again"
            )


def usable_device(device: torch.device | str | None = None) -> torch.device:
    """The device, by default a GPU if there is one. Raises ConeslabError if torch cannot use it here."""
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
        torch.zeros(1, device=found).item()  # "meta" has no values
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError, ValueError) as error:
        reason = str(error).split("\n")[0][:100]
        raise ConeslabError(
            f"device {str(device)!r} cannot be used here ({reason}): give cpu, or cuda with a GPU"
        ) from error
    return found


def machine_name(device: torch.device | str) -> str:
    """What computes there: the name of a GPU, or how many cores the CPU has."""
    where = torch.device(device)
    return torch.cuda.get_device_name(where) if where.type == "cuda" else f"{os.cpu_count()} CPU cores"


def require_float(dtype: Any) -> torch.dtype:
    """A precision of floating-point numbers. Raises ArgumentError for anything else."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ArgumentError(f"dtype is {checks.shown(dtype)}: give torch.float32, torch.bfloat16 or torch.float16")
    return dtype


def is_hub_id(name_or_path: str | Path) -> bool:
    """Whether this can only be the id of a model on the Hugging Face hub, written owner/name."""
    name = str(name_or_path)
    written = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return written and not isinstance(name_or_path, Path) and not user_path(name_or_path).exists()


def source_of(name_or_path: str | Path) -> str | Path:
    """Where `load` finds a model: a folder, checked as far as it can be without loading it, or a hub id.

    Raises ConeslabError if it is missing, damaged, of another kind, or pickled.
    """
    name, folder = str(name_or_path), user_path(name_or_path)
    if name in SHIPPED:
        folder = model_folder(name)
        verify(folder)
    if folder.is_dir():
        _check_layout(folder)
        require_folder(folder)
        return folder
    if not is_hub_id(name_or_path):
        raise ConeslabError(
            f"there is no model {name!r}: expected 'tiny', the folder of a StableDiffusionPipeline, or a hub id "
            "written owner/name"
        )
    return name


def load(
    name_or_path: str | Path = "tiny",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Pipeline:
    """Load a pipeline, without safety checker and with its progress bar off.

    name_or_path: "tiny" (shipped, checksums verified), a folder (verified if it has checksums), or the id of a model on
    the Hugging Face hub such as "stable-diffusion-v1-5/stable-diffusion-v1-5". device: default a GPU if there is one,
    else the CPU. Raises ConeslabError if it is missing, damaged, of another kind, or pickled, if its weights are NaN or
    infinite, or the device cannot be used.

    >>> pipe = coneslab.load("tiny")
    >>> image = pipe("a cat on the beach", num_inference_steps=2, guidance_scale=3.0).images[0]
    >>> type(pipe).__name__, image.size
    ('StableDiffusionPipeline', (64, 64))
    """
    from diffusers import StableDiffusionPipeline

    where, name, dtype = usable_device(device), str(name_or_path), require_float(dtype)
    source = source_of(name_or_path)
    try:
        with without_bars() if name in SHIPPED else nullcontext():
            pipe = StableDiffusionPipeline.from_pretrained(
                source, dtype=dtype, use_safetensors=True, safety_checker=None, requires_safety_checker=False
            )
    except Exception as error:  # each of these libraries has its own ways to say "damaged" or "not found"
        raise ConeslabError(
            f"{name!r} could not be loaded as a StableDiffusionPipeline: {type(error).__name__}: {error}. Expected a "
            "complete folder in the diffusers format with safetensors weights, or a reachable hub id"
        ) from error
    if isinstance(source, Path):
        _require_all_weights(source, pipe)
    pipe.to(where)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        if part.dtype != dtype:  # an older diffusers knows this option by another name
            part.to(dtype)
        part.eval()
    require_pipeline(pipe)
    require_finite(pipe)
    if where.type == "cpu":
        keep_memory()
    return pipe


def _require_all_weights(folder: Path, pipe: Pipeline) -> None:
    """Raise FileFormatError if the weights in a pipeline's folder are fewer than those of its networks.

    The libraries put random numbers in their place. Old folders have other names for some, so that numbers are counted;
    names count where they say that the networks were saved with something around their weights.
    """
    from safetensors import safe_open

    for part, network in NETWORKS.items():
        kept: dict[str, int] = {}
        for file in sorted((folder / part).glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                kept |= {name: math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        needed = {name: weight.numel() for name, weight in getattr(pipe, part).named_parameters()}
        missing = {name: numbers for name, numbers in needed.items() if name not in kept}
        other = {name: numbers for name, numbers in kept.items() if name not in needed}
        if wrapped := [name for name in other if ".base_layer." in name or "_orig_mod." in name]:
            raise FileFormatError(
                f"{folder / part} holds weights of a {network} with something around them ({wrapped[0]}): save it "
                "again before it is compiled, and without LoRA adapters (pipe.fuse_lora(), pipe.unload_lora_weights())"
            )
        if sum(missing.values()) > sum(other.values()):
            raise FileFormatError(
                f"{folder / part} lacks weights of the {network}, for example {next(iter(missing))}, in whose place "
                "would be random numbers: restore the folder, or save the pipeline again"
            )


@contextmanager
def without_bars() -> Iterator[None]:
    """Let diffusers and transformers load without progress bars: the shipped models load before one could be read.

    Import these libraries beforehand: one that has not been imported yet is left alone.
    """
    loaded = [f"{name}.utils.logging" for name in ("diffusers", "transformers") if name in sys.modules]
    shown = [library for library in map(importlib.import_module, loaded) if library.is_progress_bar_enabled()]
    try:
        for library in shown:
            library.disable_progress_bar()
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


_FINGERPRINTS: dict[bytes, str] = {}  # checksum of weights -> fingerprint, the most recently used last
_FINGERPRINTS_KEPT = 256
_ROW = 4096  # bytes


def fingerprint(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """Hex SHA-256 of the names, shapes, dtypes and bytes of weights, in the order of their names.

    Weights are hashed only once: a checksum, several times as fast, recognises them when they come again, even after
    an edit or as a copy. It is computed at every call, from the memory itself and on its device, so that a change is
    noticed however it was made: in place, by other tensors, and through `.data` or a NumPy view, which torch itself
    does not track. It misses only a change that keeps the sum of every row and every column of a table with 512 64-bit
    integers per row; no training, rounding or edit does that.

    >>> fingerprint({"a": torch.zeros(2)}) == fingerprint({"a": torch.zeros(2)})
    True
    """
    tensors = weights.state_dict() if isinstance(weights, nn.Module) else weights
    key = _checksum(tensors)
    found = _FINGERPRINTS.pop(key, "") or _sha256(tensors)
    _FINGERPRINTS[key] = found
    if len(_FINGERPRINTS) > _FINGERPRINTS_KEPT:
        del _FINGERPRINTS[next(iter(_FINGERPRINTS))]
    return found


def pipeline_fingerprint(pipe: Pipeline) -> str:
    """Hex SHA-256 of everything that decides what a pipeline draws: weights, tokenizer, scheduler.

    It is the same under every version of Python and of diffusers: of the scheduler count its class and what it is told
    beside its defaults, not the version that saved it, nor how a dictionary is written.
    """
    require_pipeline(pipe)
    parts = [fingerprint(uncompiled(module)) for module in (pipe.unet, pipe.text_encoder, pipe.vae)]
    words = repr(sorted(pipe.tokenizer.get_vocab().items()))
    return hashlib.sha256("\n".join([*parts, words, _told(pipe.scheduler)]).encode()).hexdigest()


def _told(scheduler: Any) -> str:
    """A scheduler's class and the settings that differ from its defaults, as JSON."""
    known = inspect.signature(type(scheduler).__init__).parameters
    usual = {name: parameter.default for name, parameter in known.items()}
    told = {
        name: value
        for name, value in scheduler.config.items()
        if not name.startswith("_") and repr(value) != repr(usual.get(name, inspect.Parameter.empty))
    }
    return json.dumps([type(scheduler).__name__, told], sort_keys=True, default=repr)


def _checksum(tensors: Mapping[str, Tensor]) -> bytes:
    """What tells weights apart: names, shapes, dtypes, and sums of their bytes as 64-bit integers."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}\n".encode())
        raw = tensor.contiguous().reshape(-1).view(torch.uint8)
        end = raw.numel() // _ROW * _ROW
        if end:
            table = (raw if raw.storage_offset() % 8 == 0 else raw.clone())[:end].view(torch.int64).view(-1, _ROW // 8)
            digest.update(torch.cat([table.sum(0), table.sum(1)]).cpu().numpy().data)
        digest.update(raw[end:].cpu().numpy().data)
    return digest.digest()


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
