"""Loading: what is refused, and why; checksums; fingerprints."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file
from small_judge import save_small_judge
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


@pytest.mark.slow
def test_a_folder_loads_as_it_was_saved(saved: Path, v_pipe: StableDiffusionPipeline):
    pipe = pipelines.load(saved)
    assert pipelines.fingerprint(pipe.unet) == pipelines.fingerprint(v_pipe.unet)
    assert pipe.safety_checker is None and pipe._progress_bar_config == {"disable": True}
    ours, theirs = (np.asarray(generate(p, "a cat", sampler_steps=2)[0]) for p in (pipe, v_pipe))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_would_be_random_are_refused(saved: Path, part: str):
    (file,) = (saved / part).glob("*.safetensors")
    weights = load_file(file)
    lost = next(name for name in weights if name.endswith("weight"))
    save_file({name: weight for name, weight in weights.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(FileFormatError, match=f"{part} lacks weights .* for example {lost}"):
        pipelines.load(saved)
    for around in ("base_layer.weight", "lora.base_layer.weight"):
        wrapped = lost.removesuffix("weight") + around
        renamed = {wrapped if name == lost else name: weight for name, weight in weights.items()}
        save_file(renamed, file, {"format": "pt"})
        with pytest.raises(FileFormatError, match=f"around them .{wrapped}.*unload_lora_weights"):
            pipelines.load(saved)


def test_weights_under_older_names_are_all_there(saved: Path, v_pipe: StableDiffusionPipeline):
    (file,) = (saved / "vae").glob("*.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(file)
    for new, name in old.items():
        weights = {one.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): w for one, w in weights.items()}
    assert sum("query" in name for name in weights) >= 2
    save_file(weights, file, {"format": "pt"})
    assert pipelines.fingerprint(pipelines.load(saved).vae) == pipelines.fingerprint(v_pipe.vae)


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


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every fingerprint that is computed from now on, with none known before."""
    found: list[str] = []

    def sha256(tensors: Any, real: Any = pipelines._sha256) -> str:
        found.append(real(tensors))
        return found[-1]

    monkeypatch.setattr(pipelines, "_FINGERPRINTS", {})
    monkeypatch.setattr(pipelines, "_sha256", sha256)
    return found


def set_one(net: torch.nn.Linear, value: float) -> None:
    net.weight.data[7, 11] = value


def crossed(net: torch.nn.Linear, *places: Any) -> None:
    one, other = places
    net.weight.data[[one, other]] = net.weight.data[[other, one]]


WAYS = {
    "in place": lambda net: net.weight.detach().add_(1),
    "the least step": lambda net: net.weight.detach()[9, 9].copy_(torch.nextafter(net.weight[9, 9], torch.tensor(9.0))),
    "one number, not counted": lambda net: set_one(net, 0.5),
    "a sign": lambda net: set_one(net, -float(net.weight.data[7, 11])),
    "as a LoRA is fused": lambda net: setattr(net.weight, "data", net.weight.data.add_(0.01)),
    "NumPy": lambda net: net.weight.detach().numpy().__setitem__((3, 5), 0.5),
    "NumPy at the end": lambda net: net.bias.detach().numpy().__setitem__(-1, 0.5),
    "data": lambda net: setattr(net.weight, "data", torch.zeros(40, 1024)),
    "another parameter": lambda net: setattr(net, "weight", torch.nn.Parameter(torch.zeros(40, 1024))),
    "a state": lambda net: net.load_state_dict(torch.nn.Linear(1024, 40).state_dict()),
    "a type": lambda net: net.to(torch.float64),
    "rounded": lambda net: net.to(torch.bfloat16).to(torch.float32),
    "rows changed over": lambda net: crossed(net, 3, 8),
    "columns changed over": lambda net: net.weight.data.copy_(net.weight.data[:, [2, 3, 0, 1, *range(4, 1024)]]),
    "halves of numbers changed over": lambda net: net.weight.data.view(torch.int16)[2, :2].copy_(
        net.weight.data.view(torch.int16)[2, :2].flip(0)
    ),
}


@pytest.mark.parametrize("change", WAYS.values(), ids=WAYS)
def test_a_change_of_weights_is_noticed_however_it_is_made(change: Any, hashed: list[str]):
    torch.manual_seed(0)
    net = torch.nn.Linear(1024, 40)
    kept = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    first = pipelines.fingerprint(net)
    change(net)
    changed = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = pipelines.fingerprint(net)
    assert hashed == [first, found] and found == pipelines._sha256(changed) != first
    assert pipelines.fingerprint(kept) == first


def test_weights_are_hashed_once_wherever_they_lie(hashed: list[str]):
    weight = torch.randn(3, 5000)
    first = pipelines.fingerprint({"w": weight})
    shifted = torch.cat([torch.zeros(1), weight.flatten()])[1:].view(3, 5000)
    views = [weight.clone(), weight.double().float(), weight.t().contiguous().t(), shifted, torch.nn.Parameter(weight)]
    assert {pipelines.fingerprint({"w": view}) for view in views} == {first} and hashed == [first]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.bool, torch.int64])
def test_weights_of_any_type_and_size_have_a_fingerprint(dtype: torch.dtype, hashed: list[str]):
    for size in (0, 1, 3, 4095, 4096, 4097, 20_000):
        weight = torch.arange(size + 1).remainder(2).to(dtype)[1:]  # begins where no 64-bit integer does
        first = pipelines.fingerprint({"w": weight})
        assert pipelines.fingerprint({"w": weight.clone()}) == first == hashed[-1]
        if size:
            weight[-1] = 1 - weight[-1].int()
            assert pipelines.fingerprint({"w": weight}) == hashed[-1] != first
    assert len(hashed) == len(set(hashed)) == 13


def test_only_the_fingerprints_asked_for_last_are_kept(hashed: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipelines, "_FINGERPRINTS_KEPT", 2)
    weights = [{"w": torch.full((2,), float(value))} for value in range(3)]
    for number in (0, 1, 0, 2, 0, 1):
        pipelines.fingerprint(weights[number])
    assert len(pipelines._FINGERPRINTS) == 2 and len(hashed) == 4  # 0, 1, 2, and 1 once more


@pytest.mark.parametrize("device", ["nope", "cuda:99", "meta"])
def test_a_device_that_cannot_be_used_is_told(device):
    for loaded in (pipelines.load, load_judge):
        with pytest.raises(ConeslabError, match=f"device '{device}' cannot be used here"):
            loaded(device=device)


@pytest.mark.parametrize("part", ["tokenizer", "scheduler"])
def test_a_folder_without_a_part_that_has_no_weights_is_refused(saved: Path, part: str):
    for name in list((saved / part).iterdir()):
        name.unlink()
    with pytest.raises(ConeslabError, match=f"has no {part}: expected .*; restore the folder"):
        pipelines.load(saved)
    (saved / part).rmdir()
    with pytest.raises(ConeslabError, match=f"has no {part}"):
        pipelines.load(saved)


def test_a_tokenizer_without_its_config_is_refused(saved: Path):
    (saved / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(ConeslabError, match="load the tokenizer of this model, with its tokenizer_config.json"):
        pipelines.load(saved)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_model_whose_weights_are_no_numbers_is_refused(own_pipe: StableDiffusionPipeline, tmp_path: Path, part: str):
    name, weight = list(getattr(own_pipe, part).named_parameters())[3]
    weight.data.view(-1)[0] = float("nan")
    own_pipe.save_pretrained(tmp_path / "model", safe_serialization=True)
    with pytest.raises(ConeslabError, match=f"NaN or infinite, for example in {name}"):
        pipelines.load(tmp_path / "model")


def test_a_model_of_another_family_is_refused_as_it_is_loaded(own_pipe: StableDiffusionPipeline, tmp_path: Path):
    own_pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    own_pipe.save_pretrained(tmp_path / "model", safe_serialization=True)
    with pytest.raises(ConeslabError, match="no noise schedule"):
        pipelines.load(tmp_path / "model")


def test_a_judge_without_tokenizer_or_numbers_is_refused(tmp_path: Path):
    folder = save_small_judge(tmp_path)
    judge = load_judge(folder)
    judge.model.visual_projection.weight.data[0, 0] = float("inf")
    judge.model.save_pretrained(folder)
    with pytest.raises(ConeslabError, match="the judge has weights that are NaN or infinite.*visual_projection"):
        load_judge(folder)
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ConeslabError, match="has no tokenizer: expected"):
        load_judge(folder)


@pytest.mark.parametrize(("device", "kept"), [("cpu", 1), ("meta", 0)])
def test_loading_onto_a_cpu_keeps_memory(device: str, kept: int, saved: Path, monkeypatch: pytest.MonkeyPatch):
    """Workers of a cluster load their own model, so that they keep it as well."""
    calls: list[bool] = []
    monkeypatch.setattr(pipelines, "keep_memory", lambda: calls.append(True))
    if device != "cpu":  # a stand-in for a GPU
        monkeypatch.setattr(pipelines, "usable_device", lambda given: torch.device(given))
        for check in ("require_pipeline", "require_finite"):
            monkeypatch.setattr(pipelines, check, lambda pipe: None)
    pipelines.load(saved, device=device)
    assert len(calls) == kept


FAULTS = """
import resource, torch
from concurrent.futures import ThreadPoolExecutor
from coneslab.diffusion.memory import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        [torch.ones(2_000_000) for _ in range(6)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with ThreadPoolExecutor(1) as one:
    before = faults(), one.submit(faults).result()
    kept = keep_memory()
    faults(), one.submit(faults).result()
    print(kept, *before, faults(), one.submit(faults).result())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep memory by themselves, or never do")
def test_memory_is_not_requested_page_by_page():
    """In the main thread and in another, as a worker's is: pages come once, not 20 times."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    kept, *faults = done.stdout.split()
    main, thread, main_kept, thread_kept = map(int, faults)
    assert kept == "True"
    assert main_kept < main / 4 and thread_kept < thread / 4


def test_a_pipeline_is_the_same_under_another_python_and_another_diffusers(v_pipe, monkeypatch):
    """On Python 3.12 a dictionary is written otherwise, and diffusers puts its version into what it loads."""
    first = pipelines.pipeline_fingerprint(v_pipe)

    class Written(dict):
        def __repr__(self) -> str:
            return f"Written({super().__repr__()})"

    def told(**changed: Any) -> str:
        config = Written({**v_pipe.scheduler.config, **changed})
        monkeypatch.setattr(v_pipe.scheduler, "_internal_dict", config)
        found = pipelines.pipeline_fingerprint(v_pipe)
        monkeypatch.undo()
        return found

    assert told() == told(_diffusers_version="9.0.0") == told(_use_default_values=["clip_sample"]) == first
    assert told(timestep_spacing="linspace") != first != told(something_new=1)
    monkeypatch.setattr(v_pipe, "scheduler", type(v_pipe.scheduler).from_config({**v_pipe.scheduler.config}))
    assert pipelines.pipeline_fingerprint(v_pipe) == first
    monkeypatch.setattr(v_pipe, "scheduler", type(v_pipe.scheduler)(prediction_type="epsilon"))
    assert pipelines.pipeline_fingerprint(v_pipe) != first
