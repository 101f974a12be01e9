"""Small pipelines, a judge and a browser, made once and shared: a test that leaves one changed fails.

What takes seconds to import is imported by the fixtures: the process that hands out tests to others runs none.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch comes; more fight for the cores, with each other and all else

import pytest
from chromium import launched
from last_lines import pytest_unconfigure  # noqa: F401
from sharing import PIPELINE, SHARED, share

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from coneslab.measure import Judge


@pytest.fixture(scope="session", autouse=True)
def memory_is_kept() -> None:
    from coneslab.diffusion.memory import keep_memory

    keep_memory()


@pytest.fixture(autouse=True)
def shared_stays_as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """Weights bit for bit, no gradients, no hooks, the tokenizer and its words."""
    yield
    for name in SHARED.keys() & {*request.fixturenames}:
        if changes := SHARED[name].changes():
            SHARED[name].restore()
            pytest.fail(f"the test leaves {name}, which others use, changed: {', '.join(changes[:5])}", pytrace=False)


@pytest.fixture(scope="session")
def v_pipe(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    """v-prediction, attention at two resolutions, 12 tokens."""
    from small_pipelines import make_pipeline

    return share("v_pipe", make_pipeline(tmp_path_factory.mktemp("v")), *PIPELINE)


@pytest.fixture
def own_pipe(v_pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """A copy of `v_pipe` that a test may change."""
    return copy.deepcopy(v_pipe)


@pytest.fixture(scope="session")
def epsilon_pipe(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    """ε-prediction, one block without attention, other widths."""
    from small_pipelines import DOWN, make_pipeline

    made = make_pipeline(
        tmp_path_factory.mktemp("epsilon"),
        prediction_type="epsilon",
        widths=(8, 16),
        text_width=16,
        tokens=10,
        down_blocks=(DOWN, "DownBlock2D"),
        seed=1,
    )
    return share("epsilon_pipe", made, *PIPELINE)


@pytest.fixture(scope="session")
def sd_pipe(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    """Blocks, depth, tokens and prediction type of Stable Diffusion 1.5, with small widths."""
    from small_pipelines import DOWN, make_pipeline

    made = make_pipeline(
        tmp_path_factory.mktemp("sd"),
        prediction_type="epsilon",
        widths=(8, 16, 16, 16),
        text_width=12,
        tokens=77,
        heads=2,
        layers_per_block=2,
        down_blocks=(DOWN, DOWN, DOWN, "DownBlock2D"),
        sample_size=16,
        seed=2,
    )
    return share("sd_pipe", made, *PIPELINE)


@pytest.fixture(scope="session")
def world_pipe(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    """Pictures of the sticker world's size and room for its prompts; everything else as small as it gets."""
    from small_pipelines import DOWN, WORDS, make_pipeline

    words = (*WORDS, "flat", "3d", "cartoon", "ladybug", "butterfly")
    made = make_pipeline(
        tmp_path_factory.mktemp("world"),
        widths=(8, 16),
        sample_size=32,
        tokens=64,
        words=words,
        seed=3,
        down_blocks=("DownBlock2D", DOWN),
    )
    return share("world_pipe", made, *PIPELINE)


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """Random, and of another size than the test's pictures."""
    from small_judge import save_small_judge

    from coneslab.measure import load_judge

    return share("judge", load_judge(save_small_judge(tmp_path_factory.mktemp("judge"))), "model")


@pytest.fixture(scope="session")
def tiny() -> StableDiffusionPipeline:
    """The shipped model."""
    from coneslab import load

    return share("tiny", load("tiny", device="cpu"), *PIPELINE)


@pytest.fixture
def pictured() -> SimpleNamespace:
    """A subject for the 16-pixel pipelines."""
    from small_pipelines import make_subject

    return make_subject(16)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    root = Path(__file__).resolve().parent.parent
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, root], check=True)
    (built,) = folder.glob("coneslab-*.whl")
    return built


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """For one module only: Playwright's loop must be gone when other tests run theirs."""
    with launched() as opened:
        yield opened
