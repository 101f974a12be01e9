"""Loading: what is refused, and why; sums; fingerprints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from coneslab.diffusion import pipelines
from coneslab.diffusion.sampling import generate
from coneslab.errors import ConeslabError, FileFormatError
from coneslab.measure.judge import load_judge


@pytest.fixture
def saved(v_pipe: StableDiffusionPipeline, tmp_path: Path) -> Path:
    """A small random pipeline, saved where a shipped one would lie."""
    folder = tmp_path / "models" / "tiny"
    v_pipe.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture
def shipped(saved: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, with sums, taken for the shipped model."""
    pipelines.write_sums(saved.parent)
    monkeypatch.setattr(pipelines, "data_folder", lambda: saved.parent.parent)
    return saved


def test_a_folder_loads_as_it_was_saved(saved: Path, v_pipe: StableDiffusionPipeline):
    pipe = pipelines.load(saved)
    assert pipelines.fingerprint(pipe.unet) == pipelines.fingerprint(v_pipe.unet)
    assert pipe.safety_checker is None and pipe._progress_bar_config == {"disable": True}
    ours, theirs = (np.asarray(generate(p, "a cat", sampler_steps=2)[0]) for p in (pipe, v_pipe))
    np.testing.assert_array_equal(ours, theirs)


def test_the_dtype_is_what_was_asked_for(saved: Path, v_pipe: StableDiffusionPipeline):
    StableDiffusionPipeline.from_pretrained(saved).unet.half().save_pretrained(saved / "unet")
    pipe = pipelines.load(saved)  # float16 in the file, as in the shipped U-Net
    assert {p.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()} == {torch.float32}
    torch.testing.assert_close(pipe.unet.state_dict(), v_pipe.unet.state_dict(), rtol=1e-3, atol=1e-4)
    assert pipelines.load(saved, dtype=torch.bfloat16).unet.dtype == torch.bfloat16


@pytest.fixture
def bars() -> None:
    """Progress bars are on, whatever ran before."""
    diffusers_logging.enable_progress_bar()
    transformers_logging.enable_progress_bar()


def test_only_a_model_of_ones_own_loads_with_progress_bars(shipped: Path, bars: None, capfd: Any):
    pipelines.load(shipped)  # by its folder
    assert "Loading" in capfd.readouterr().err
    pipelines.load("tiny")
    assert "Loading" not in capfd.readouterr().err
    with pytest.raises(ConeslabError), pipelines.without_bars():
        raise ConeslabError("and afterwards they are back")
    pipelines.load(shipped)
    assert "Loading" in capfd.readouterr().err


def test_the_judge_loads_without_progress_bars(bars: None, capfd: Any):
    load_judge()
    assert "Loading" not in capfd.readouterr().err


def test_a_shipped_model_is_held_to_its_sums(shipped: Path):
    assert pipelines.load("tiny").unet is not None
    assert pipelines.model_folder("tiny") == shipped
    (shipped / "README.md").write_text("a card may change")
    pipelines.verify(shipped)
    weights = shipped / "unet" / "diffusion_pytorch_model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(FileFormatError, match="tiny/unet/diffusion_pytorch_model.safetensors.*Restore"):
        pipelines.load("tiny")
    weights.unlink()
    with pytest.raises(FileFormatError, match="damaged"):
        pipelines.load("tiny")


def test_missing_sums_are_said(shipped: Path):
    (shipped.parent / pipelines.SUMS).unlink()
    with pytest.raises(FileFormatError, match="sums"):
        pipelines.load("tiny")


def test_missing_and_unknown_shipped_models(shipped: Path):
    with pytest.raises(ConeslabError, match="'judge' is missing.*pretrain"):
        pipelines.model_folder("judge")
    with pytest.raises(ConeslabError, match="'huge'.*choose one of tiny, judge"):
        pipelines.model_folder("huge")


@pytest.mark.parametrize("name", ["tinny", "./nowhere/model", "/nowhere", Path("owner/name")])
def test_a_name_that_leads_nowhere_is_refused_without_asking_the_network(name):
    with pytest.raises(ConeslabError, match="there is no model.*expected 'tiny'"):
        pipelines.load(name)


def test_a_folder_of_something_else_is_refused(saved: Path, tmp_path: Path):
    with pytest.raises(ConeslabError, match="no model_index.json"):
        pipelines.load(tmp_path)
    index = saved / "model_index.json"
    parts = json.loads(index.read_text())
    index.write_text(json.dumps(parts | {"_class_name": "FluxPipeline"}))
    with pytest.raises(ConeslabError, match="holds a FluxPipeline"):
        pipelines.load(saved)
    index.write_text("{")
    with pytest.raises(FileFormatError, match="damaged"):
        pipelines.load(saved)


def test_pickled_weights_are_refused_unopened(saved: Path):
    (saved / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (saved / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ConeslabError, match="pickled.*safe_serialization"):
        pipelines.load(saved)
    (saved / "unet" / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(ConeslabError, match="holds no weights"):
        pipelines.load(saved)


def test_a_truncated_file_is_a_coneslab_error(saved: Path):
    weights = saved / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConeslabError, match="could not be loaded"):
        pipelines.load(saved)


def test_fingerprint_sees_names_shapes_types_and_bytes():
    one = {"a": torch.arange(4.0), "b": torch.ones(2, 2)}
    print_of = pipelines.fingerprint(one)
    assert len(print_of) == 64
    assert print_of == pipelines.fingerprint({"b": torch.ones(2, 2), "a": torch.arange(4.0)})  # order of names
    assert print_of == pipelines.fingerprint({"a": torch.arange(8.0)[::2] / 2, "b": torch.ones(2, 2)})  # strides
    changed = torch.ones(2, 2)
    changed[0, 0] += 1e-6
    for other in (
        {"a": one["a"], "c": one["b"]},
        {"a": one["a"], "b": one["b"].view(4)},
        {"a": one["a"], "b": changed},
        {"a": one["a"], "b": one["b"].half()},
    ):
        assert pipelines.fingerprint(other) != print_of
    zeros = ({"a": torch.zeros(2)}, {"a": torch.zeros(2, dtype=torch.int32)})  # the same bytes
    assert pipelines.fingerprint(zeros[0]) != pipelines.fingerprint(zeros[1])
    linear = torch.nn.Linear(2, 2)
    assert pipelines.fingerprint(linear) == pipelines.fingerprint(linear.state_dict())


def test_a_device_that_cannot_be_used_is_told():
    for device in ("nope", "cuda:99"):
        with pytest.raises(ConeslabError, match=device):
            pipelines.load("tiny", device=device)
