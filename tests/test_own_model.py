"""Notebooks with `MODEL` set to another model: random weights, in the architecture of Stable Diffusion 1.5 or 2.1.

At full length, in `make test-all`. What each function does with other structures is tested where it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
from nbclient import NotebookClient
from short_notebooks import NOTEBOOKS
from small_pipelines import DOWN, make_pipeline

from coneslab import load
from coneslab.pretraining.unet import build_tokenizer
from coneslab.world import RARE_TOKENS, WORDS

VERSIONS = ("1.5", "2.1")
CASES = [pytest.param(path, version, id=f"{path.stem}-{version}") for path in NOTEBOOKS for version in VERSIONS]
# What a tokenizer of another model has in pieces; of the rare tokens it knows the one that everybody uses.
SPLIT = {"pipistrelle", "toadstool", "tangerine", "ladybug", *RARE_TOKENS} - {"sks"}


def stable_diffusion(folder: Path, version: str) -> Path:
    """Blocks, depth, tokens, attention heads, sampler and file layout of the original, with small widths."""
    newer = version == "2.1"
    tokenizer = build_tokenizer([word for word in WORDS if word not in SPLIT], length=77)
    pipe = make_pipeline(
        folder,
        prediction_type="v_prediction" if newer else "epsilon",
        widths=(16, 32, 32, 32),
        text_width=24,
        tokens=77,
        heads=(2, 4, 4, 4) if newer else 2,
        layers_per_block=2,
        down_blocks=(DOWN,) * 3 + ("DownBlock2D",),
        sample_size=8,
        tokenizer=tokenizer,
        linear=newer,
        seed=4,
    )
    pipe.register_modules(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16),
            norm_num_groups=4,
            sample_size=64,
        )
    )
    if newer:
        pipe.tokenizer.pad_token = "!"
    else:
        options = ("beta_start", "beta_end", "beta_schedule", "steps_offset", "set_alpha_to_one")
        config = {name: pipe.scheduler.config[name] for name in options}
        pipe.register_modules(scheduler=PNDMScheduler(**config, skip_prk_steps=True))
    pipe.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(version: str) -> Path:
        if version not in made:
            made[version] = stable_diffusion(tmp_path_factory.mktemp("model"), version)
        return made[version]

    return folder


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_the_model_has_the_structure_it_claims(version, model):
    pipe = load(model(version), device="cpu")
    assert isinstance(pipe, StableDiffusionPipeline) and pipe.tokenizer.model_max_length == 77
    assert len([name for name, _ in pipe.unet.named_modules() if name.endswith("attn2")]) == 16
    assert pipe.scheduler.config.prediction_type == {"1.5": "epsilon", "2.1": "v_prediction"}[version]
    pieces = {word: len(pipe.tokenizer(word, add_special_tokens=False).input_ids) for word in WORDS}
    assert {word for word, number in pieces.items() if number > 1} == SPLIT


def runs(notebook: nbformat.NotebookNode, model: Path, folder: Path) -> None:
    """Run a notebook with this model, to the end, and see that it shows pictures."""
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source, changed = re.subn(r'(?m)^MODEL = "tiny"', f"MODEL = {str(model)!r}", parameters.source)
    assert changed == 1
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("<img " in "".join(output.get("data", {}).get("text/html", "")) for output in shown)


@pytest.mark.full
@pytest.mark.parametrize(("path", "version"), CASES)
def test_a_notebook_runs_with_another_model(path, version, model, tmp_path):
    runs(nbformat.read(path, as_version=4), model(version), tmp_path)
