"""What a page in the browser is given: graphs that compute what PyTorch does, the sampler, plain edits, whole files."""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import json
import re
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from coneslab import ConceptNeurons, ConeslabError
from coneslab.diffusion.encoding import decode_latents, encode_prompts, tokenize
from coneslab.diffusion.kvspace import KVSpace
from coneslab.diffusion.sampling import start_noise
from coneslab.edits.base import Combined
from coneslab.edits.tokens import TokenEdit
from coneslab.edits.weights import WeightDelta, model_fingerprint
from coneslab.errors import ConeslabWarning, FileFormatError, MismatchError, MissingFileError, WriteError
from coneslab.measure.recording import record_attention
from coneslab.methods import closed_form_edit
from coneslab.neurons import ready
from coneslab.web import (
    Graph,
    Runtime,
    Shelved,
    default_shelf,
    difference,
    export,
    export_web,
    fetch_runtime,
    graphs,
    plain,
    sampling_table,
    shelf,
    shelf_of,
)
from coneslab.web import runtime as runtimes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "docs"))
import playground  # noqa: E402

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the packages of the extra web: pip install -e '.[web]'")


def some_neurons(pipe: Any, seed: int = 0, *, graded: bool = False, **facts: Any) -> ConceptNeurons:
    layout, generator = KVSpace(pipe).layout, torch.Generator().manual_seed(seed)
    scale = (torch.rand(layout.n, generator=generator) > 0.1).float()
    if graded:
        scale = torch.maximum(scale, torch.rand(layout.n, generator=generator))
    return ConceptNeurons.from_scale(scale, layout, model_fingerprint(pipe), subject="cat", **facts)


# --- graphs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def v_graphs(v_pipe: Any) -> dict[str, Any]:
    return graphs(v_pipe, precision="float32")


def run(graph: Any, **inputs: Any) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(graph.data, providers=["CPUExecutionProvider"])
    return dict(zip(graph.outputs, session.run(list(graph.outputs), inputs), strict=True))


@pytest.mark.full
def test_graphs_compute_what_pytorch_does(v_graphs):
    for graph in v_graphs.values():
        assert difference(graph) < 2e-5, graph
    shapes = {name: {key: value.shape for key, value in graph.outputs.items()} for name, graph in v_graphs.items()}
    assert shapes == {
        "text_encoder": {"text": (1, 12, 24)},
        "unet": {"output": (2, 4, 8, 8), "attention": (12, 8, 8)},
        "decoder": {"pixels": (1, 3, 16, 16)},
    }


@pytest.mark.full
def test_graphs_agree_with_the_pipeline_itself(v_graphs, v_pipe):
    """Not with the modules that were traced: with the pipeline's own calls, under an edit."""
    prompts, mask = ["", "a cat on the grass"], some_neurons(v_pipe)
    text = encode_prompts(v_pipe, prompts)
    found = [run(v_graphs["text_encoder"], ids=row[None].int().numpy())["text"][0] for row in tokenize(v_pipe, prompts)]
    assert np.abs(np.stack(found) - text.detach().numpy()).max() < 1e-5
    noise, space = start_noise(v_pipe, [3]), KVSpace(v_pipe)
    with torch.no_grad(), mask.applied(v_pipe), record_attention(v_pipe, guided=True) as maps:
        expected = v_pipe.unet(noise.repeat(2, 1, 1, 1), 500, encoder_hidden_states=text).sample
        projected = {name: F.linear(text, weight).numpy() for name, weight in space.parameters.items()}
    given = {"sample": noise.repeat(2, 1, 1, 1).numpy(), "timestep": np.float32([500]), **projected}
    made = run(v_graphs["unet"], **given)
    assert np.abs(made["output"] - expected.numpy()).max() < 1e-4
    assert np.abs(made["attention"] - maps.average().numpy()).max() < 1e-3  # recorded in float16
    assert np.allclose(made["attention"].sum(0), 1, atol=1e-5)
    pixels = run(v_graphs["decoder"], latents=noise.numpy())["pixels"]
    drawn = np.asarray(decode_latents(v_pipe, noise)[0], float)
    assert np.abs((pixels[0].transpose(1, 2, 0) / 2 + 0.5).clip(0, 1) * 255 - drawn).max() < 0.51


@pytest.mark.full
def test_graphs_are_small_the_same_each_time_and_say_nothing_of_this_machine(v_graphs, v_pipe):
    narrow = graphs(v_pipe)
    for name, graph in narrow.items():
        assert len(graph.data) < len(v_graphs[name].data) and difference(graph) < 5e-3
        assert b"/" + b"coneslab/" not in graph.data and b".py" not in graph.data
    assert {name: graph.data for name, graph in graphs(v_pipe).items()} == {n: g.data for n, g in narrow.items()}
    smallest = graphs(v_pipe, precision="int8")
    assert all(len(smallest[name].data) < len(narrow[name].data) for name in narrow)
    assert max(map(difference, smallest.values())) < 0.2


@pytest.mark.full
@pytest.mark.parametrize("name", ["epsilon_pipe", "sd_pipe"])
def test_graphs_of_other_structures(name, request):
    for graph in graphs(request.getfixturevalue(name), precision="float32").values():
        assert difference(graph) < 5e-5


def test_a_unet_that_a_graph_would_not_have_is_refused(own_pipe):
    own_pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: args)
    with pytest.raises(ConeslabError, match="has hooks, adapters or an attention of its own"):
        graphs(own_pipe)


def test_without_its_packages_the_export_says_what_to_install(v_pipe, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ConeslabError, match=re.escape("pip install 'coneslab[web]'")):
        graphs(v_pipe)


# --- the sampler ----------------------------------------------------------------------------------------


def with_scheduler(pipe: Any, kind: str, **changes: Any) -> Any:
    other = copy.copy(pipe)
    config = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    other.scheduler = getattr(diffusers, kind).from_config(config | changes)
    return other


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("name", ["v_pipe", "epsilon_pipe"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("DDIMScheduler", {}),
        ("DDIMScheduler", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
        ("UniPCMultistepScheduler", {"solver_order": 2}),
        ("PNDMScheduler", {"skip_prk_steps": True}),
    ],
)
def test_the_table_samples_as_the_scheduler_does(request, name, kind, changes, steps):
    if name == "epsilon_pipe" and changes.get("rescale_betas_zero_snr"):
        pytest.skip("an ε-prediction is not defined at pure noise")
    pipe = with_scheduler(request.getfixturevalue(name), kind, **changes)
    table = sampling_table(pipe, steps)
    scheduler, generator = copy.deepcopy(pipe.scheduler), torch.Generator().manual_seed(0)
    scheduler.set_timesteps(steps)
    start = torch.randn(1, 4, 8, 8, generator=generator)
    x, outputs = start, []
    for time, row in zip(scheduler.timesteps, table["rows"], strict=True):
        outputs.append(torch.randn(x.shape, generator=generator))
        x = scheduler.step(outputs[-1], time, x).prev_sample
        summed = sum(weight * out for weight, out in zip(row, [start, *outputs], strict=True))
        assert torch.allclose(summed, x, atol=2e-4), time
    assert table["timesteps"] == [float(time) for time in scheduler.timesteps] and table["start"] == 1.0


def test_the_table_says_what_the_clean_latents_are(v_pipe):
    table, scheduler = sampling_table(v_pipe, 5), copy.deepcopy(v_pipe.scheduler)
    scheduler.set_timesteps(5)
    x, out = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for time, (a, b) in zip(scheduler.timesteps, table["clean"], strict=True):
        assert torch.allclose(a * x + b * out, scheduler.step(out, time, x).pred_original_sample, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("DDPMScheduler", {"variance_type": "fixed_small"}, "adds noise"),
        ("DDIMScheduler", {"clip_sample": True, "clip_sample_range": 0.1}, "clips"),
        ("EulerDiscreteScheduler", {}, "scales what the network is given"),
    ],
)
def test_a_scheduler_without_a_table_is_refused(v_pipe, kind, changes, said):
    with pytest.raises(ConeslabError, match=f"{kind}.*{said}"):
        sampling_table(with_scheduler(v_pipe, kind, **changes), 5)


# --- plain edits ----------------------------------------------------------------------------------------


def places(data: bytes) -> list[int]:
    """The neurons of a plain mask, read in another way than the page does."""
    found, index, groups = [], 0, re.findall(rb"[\x80-\xff]*[\x00-\x7f]", data, re.DOTALL)
    for group in groups:
        index += sum((byte & 127) << 7 * number for number, byte in enumerate(group))
        found.append(index)
    return found


@pytest.mark.parametrize("indices", [[0], [127], [128, 129, 300], [0, 127, 255, 16384 + 255]])
def test_distances_of_any_size_come_back(indices):
    gaps = np.diff(indices, prepend=0).tolist()
    assert places(b"".join(map(shelf._seven_bits, gaps))) == indices


def test_a_mask_in_plain_form(v_pipe):
    mask = some_neurons(v_pipe, graded=True, scope=("sks", "cat"))
    data, (part,) = plain(mask, v_pipe)
    end = len(data) - 4 * len(mask)
    assert places(data[:end]) == mask.indices.tolist()
    assert np.frombuffer(data[end:], "<f4").tolist() == mask.scales.tolist()
    ids = [v_pipe.tokenizer(word, add_special_tokens=False).input_ids for word in ("sks", "cat")]
    assert part == {
        "kind": "mask", "count": len(mask), "graded": True, "words": ["sks", "cat"], "scope": ids, "bytes": len(data)
    }  # fmt: skip
    data, (part,) = plain(mask.binary().at(), v_pipe)
    assert places(data) == mask.shut().tolist() and not part["graded"] and part["scope"] == []


def test_an_ablation_in_plain_form_is_its_change(v_pipe):
    edit = closed_form_edit(v_pipe, "a cat", "a dog")
    data, (part,) = plain(edit, v_pipe)
    numbers, start = np.frombuffer(data, "<f2").astype(np.float32), 0
    for layer in KVSpace(v_pipe).layout:
        rank, (out, width) = part["ranks"][layer.name], layer.shape
        left = numbers[start : start + out * rank].reshape(out, rank)
        start += out * rank
        right = numbers[start : start + rank * width].reshape(rank, width)
        start += rank * width
        delta = edit.deltas[layer.name].numpy()
        assert np.linalg.norm(left @ right - delta) < 5e-3 * np.linalg.norm(delta)
    assert start == len(numbers) and part["bytes"] == len(data)


def test_edits_that_are_combined_are_parts(v_pipe):
    both = Combined(
        (some_neurons(v_pipe), Combined((some_neurons(v_pipe, 1), closed_form_edit(v_pipe, "a cat", "a dog"))))
    )
    data, parts = plain(both, v_pipe)
    assert [part["kind"] for part in parts] == ["mask", "mask", "delta"]
    assert sum(part["bytes"] for part in parts) == len(data)


def test_parts_of_a_combination_come_at_its_dose(v_pipe):
    mask, change = some_neurons(v_pipe).binary(), closed_form_edit(v_pipe, "a cat", "a dog")
    data, (first, second) = plain(Combined((Combined((mask, change), 0.5),), 0.4), v_pipe)
    scales = np.frombuffer(data[first["bytes"] - 4 * len(mask) : first["bytes"]], "<f4")
    assert first["graded"] and np.allclose(scales, 1 - 0.2)
    whole, (alone,) = plain(change, v_pipe)
    assert second == alone
    old, new = np.frombuffer(whole, "<f2"), np.frombuffer(data[first["bytes"] :], "<f2")
    layer = next(iter(KVSpace(v_pipe).layout))
    count = layer.shape[0] * alone["ranks"][layer.name]  # numbers of its left factor, which takes the dose
    assert np.allclose(new[:count], 0.2 * old[:count], atol=1e-3)
    assert np.array_equal(new[count : 2 * count], old[count : 2 * count])


def test_an_edit_of_anything_else_is_refused(v_pipe, epsilon_pipe):
    weight = {"conv_in.weight": torch.zeros_like(v_pipe.unet.conv_in.weight)}
    query = {f"{next(iter(KVSpace(v_pipe).modules))}.to_q.weight": torch.zeros(16, 16)}
    token = TokenEdit(("sks",), torch.zeros(1, 24), "x")
    for edit in (WeightDelta(weight, model_fingerprint(v_pipe)), WeightDelta(query, model_fingerprint(v_pipe))):
        with pytest.raises(ConeslabError, match="more than the keys and values"):
            plain(edit, v_pipe)
    with pytest.raises(ConeslabError):
        plain(token, v_pipe)
    with pytest.raises(MismatchError):
        plain(some_neurons(epsilon_pipe), v_pipe)


# --- the shelf ------------------------------------------------------------------------------------------


def test_a_shelf_is_read_from_files_and_folders(v_pipe, tmp_path):
    mask, ablation = some_neurons(v_pipe), closed_form_edit(v_pipe, "a cat", "a dog")
    mask.save(tmp_path / "some" / "Cat 1.safetensors")
    mask.at("sks", "cat").save_mask(tmp_path / "some" / "local.mask")
    (tmp_path / "some" / "notes.txt").write_text("no edit")
    alone = ablation.save(tmp_path / "forget.safetensors")
    found = shelf_of(v_pipe, [tmp_path / "some", alone])
    assert [one.name for one in found] == ["cat-1", "local", "forget"]
    assert [one.title for one in found] == [
        "cat: concept neurons",
        "cat: concept neurons, at “sks cat” only",
        "a cat → a dog: forgotten, in closed form",
    ]
    assert found[0].phrase == "a sks cat" and found[0].prompt.startswith("a sks cat ")
    assert (found[2].phrase, found[2].prompt) == ("a cat", "a cat")
    assert found[0].edit == mask and found[1].edit == mask.at("sks", "cat")
    with pytest.raises(ConeslabError, match="two edits would be named 'cat-1'"):
        shelf_of(v_pipe, [tmp_path / "some", tmp_path / "some"])
    with pytest.raises(MissingFileError):
        shelf_of(v_pipe, [tmp_path / "none.safetensors"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match="holds no edits"):
        shelf_of(v_pipe, [tmp_path / "empty"])


def test_what_a_page_cannot_draw_with_is_left_out_of_a_folder_and_refused_by_name(v_pipe, epsilon_pipe, tmp_path):
    some_neurons(v_pipe).save(tmp_path / "some" / "cat.safetensors")
    token = TokenEdit(("sks",), torch.zeros(1, 24), "x").save(tmp_path / "some" / "token.safetensors")
    other = some_neurons(epsilon_pipe).save(tmp_path / "some" / "other.safetensors")
    with pytest.warns(ConeslabWarning, match="is left out of the page") as told:
        assert [one.name for one in shelf_of(v_pipe, [tmp_path / "some"])] == ["cat"]
    assert len(told) == 2
    with pytest.raises(ConeslabError, match="token.safetensors: TokenEdit.*more than the keys and values"):
        shelf_of(v_pipe, [token])
    with pytest.raises(MismatchError, match="other.safetensors: this edit"):
        shelf_of(v_pipe, [other])


def test_a_subject_of_your_own_is_drawn_by_its_own_words_whatever_its_name(v_pipe, tmp_path):
    own = replace(some_neurons(v_pipe), settings={"prompt": "a zwx hamster"})
    (found,) = shelf_of(v_pipe, [own.save(tmp_path / "cat.safetensors")])
    assert own.subject == "cat" and (found.phrase, found.prompt) == ("a zwx hamster", "a zwx hamster")


@pytest.mark.slow
def test_the_shelf_that_is_searched_for_is_kept(world_pipe, tmp_path, monkeypatch):
    searched = []
    monkeypatch.setattr(ready, "SHIPPED", tmp_path / "shipped")

    def search(pipe: Any, subject: Any, settings: Any, *, progress: bool) -> ConceptNeurons:
        searched.append((subject.name, settings.rounds, settings.scope))
        words = (subject.token, subject.class_word) if settings.scope == "subject" else ()
        return replace(some_neurons(pipe, scope=words), subject=subject.name)

    monkeypatch.setattr(ready, "find_concept_neurons", search)
    first = default_shelf(world_pipe, tmp_path, rounds=3, progress=False)
    assert searched == [("cat", 3, "subject"), ("car", 3, "subject"), ("dog", 3, "all")]
    again = default_shelf(world_pipe, tmp_path, rounds=3, progress=False)
    assert len(searched) == 3 and [one.edit for one in first] == [one.edit for one in again]
    names = [one.name for one in first]
    assert names == ["cat", "car", "dog", "cat-to-dog"]
    states = [state for shown in playground.STATES.values() for _, state in shown]  # what lectures link to
    assert {name for state in states for name in state["edits"].split(",")} == set(names)
    prompts = {one.name: one.prompt for one in first}
    assert all(state["prompt"] == prompts[state["edits"]] for state in states if state["edits"] in ("dog", "cat"))
    kept = sorted(tmp_path.glob("*.mask"))
    kept[0].write_bytes(b"broken")
    default_shelf(world_pipe, tmp_path, rounds=3, progress=False)
    default_shelf(world_pipe, tmp_path, rounds=4, progress=False)
    assert len(searched) == 3 + 1 + 3, "what is broken, and another search, is searched for"
    (tmp_path / "shipped").mkdir()
    for file in kept:
        file.rename(tmp_path / "shipped" / file.name)
    default_shelf(world_pipe, tmp_path, rounds=3, progress=False)
    assert len(searched) == 7, "what is shipped with the model is not"
    other = copy.deepcopy(world_pipe)
    next(iter(KVSpace(other).parameters.values())).data.add_(1.0)
    default_shelf(other, tmp_path, rounds=3, progress=False)
    assert len(searched) == 10, "what was found on another model is searched for"


# --- ONNX Runtime ---------------------------------------------------------------------------------------


@contextmanager
def registry(data: bytes) -> Iterator[tuple[str, list[str]]]:
    """A registry that has one thing: its address, and what it was asked for."""
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/npm/", asked
        server.shutdown()


def tarball() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name in (name for names in runtimes.FILES.values() for name in names):
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
    return file.getvalue()


@pytest.mark.slow
def test_the_runtime_is_fetched_once_from_npms_mirror_and_checked(tmp_path, monkeypatch):
    data = tarball()
    with registry(data) as (address, asked):
        monkeypatch.setenv("npm_config_registry", address)
        with pytest.raises(FileFormatError, match="their SHA-512 differs"):
            fetch_runtime(tmp_path)
        assert not list(tmp_path.iterdir())
        monkeypatch.setattr(runtimes, "INTEGRITY", base64.b64encode(hashlib.sha512(data).digest()).decode())
        found = fetch_runtime(tmp_path)
        assert fetch_runtime(tmp_path).files == found.files
    assert asked == [f"/npm/onnxruntime-web/-/onnxruntime-web-{runtimes.VERSION}.tgz"] * 2
    assert found.files["ort.wasm.min.mjs"] == b"ort.wasm.min.mjs" and len(found.files) == 6


def test_without_a_network_the_runtime_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "http://127.0.0.1:9/")
    with pytest.raises(ConeslabError, match="could not be fetched from http://127.0.0.1:9/onnx.*npm_config_registry"):
        fetch_runtime(tmp_path, timeout=5)


# --- all of it ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_page_is_written_whole_with_the_sums_of_its_files(world_pipe, tmp_path, monkeypatch):
    outputs = {"output": np.ones((2, 4, 32, 32)), "pixels": np.ones((1, 3, 64, 64))}
    made = {name: Graph(name, b"nodes", {"timestep": np.ones(1)}, outputs) for name in ("unet", "decoder")}
    monkeypatch.setattr(export, "graphs", lambda pipe, **options: made)
    shelved = Shelved("cat", "cat", "a cat", "a cat on the grass", some_neurons(world_pipe))
    runtime = Runtime("1", {"ort.wasm.min.mjs": b"x"})
    folder = tmp_path / "page"
    manifest = export_web(world_pipe, folder, [shelved], runtime=runtime, home="../index.html")
    assert json.loads((folder / "manifest.json").read_text(encoding="utf-8")) == json.loads(json.dumps(manifest))
    for name, file in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
    layers = manifest["layers"]
    assert (folder / "keys_and_values.bin").stat().st_size == 2 * sum(
        a * b for a, b in (one["shape"] for one in layers)
    )
    assert '<a href="../index.html">' in (folder / "index.html").read_text(encoding="utf-8")
    assert manifest["check"]["output"] == manifest["check"]["pixels"] == [1.0] * 32
    assert [len(one["timesteps"]) for one in manifest["sampler"]] == list(range(1, 31))
    kinds = {one["word"]: one["kind"] for one in manifest["words"]}
    assert kinds["cat"] == "thing" and kinds["sks"] == "rare token" and kinds["on the grass"] == "place"

    export_web(world_pipe, folder)  # its own folder may be replaced
    assert not (folder / "edits").exists() and json.loads((folder / "manifest.json").read_text())["runtime"] is None
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(WriteError, match="holds other things"):
        export_web(world_pipe, tmp_path / "other")
