"""The page for a class, without a browser: searches once per subject, keeps what it found, survives errors."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from coneslab import files, load_edit
from coneslab.diffusion import KVSpace
from coneslab.errors import ConeslabError
from coneslab.neurons import ConceptNeurons
from coneslab.show import app, widgets

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch, pictured: Any) -> list[str]:
    """The subjects that were searched; each has pictures of the small pipeline's size."""
    names: list[str] = []
    real = app.find_concept_neurons

    def search(pipe: Any, about: Any, **settings: Any) -> Any:
        names.append(about.name)
        return real(pipe, pictured, **settings, prior_images=2, sampler_steps=1)

    monkeypatch.setattr(app, "find_concept_neurons", search)
    return names


def make(v_pipe: Any, folder: Path | None) -> app.Page:
    page = app.page(v_pipe, folder, limits=app.Limits(pictures=1, steps=1), rounds=2)
    page.playground._generate = lambda asked: []  # type: ignore[method-assign]
    page.playground.ask = lambda: None  # type: ignore[method-assign]
    return page


@pytest.mark.slow
def test_finds_once_and_keeps_it_for_the_next_visitor(v_pipe: Any, searches: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "edits"
    first, second = make(v_pipe, folder), make(v_pipe, folder)
    assert [value for _, value in first.playground.controls["edit"].options] == [""]
    first.choice.value = second.choice.value = "dog"
    first.button.click()
    assert searches == ["dog"] and "found: dog" in first.progress.value
    assert first.playground.controls["edit"].value == "dog"
    assert first.playground.controls["prompt"].value == app.subject_named("dog").prompts[0]
    assert load_edit(folder / "dog.safetensors") == first.playground.edits["dog"]
    second.button.click()
    first.button.click()
    assert searches == ["dog"] and second.playground.controls["edit"].value == "dog"
    third = make(v_pipe, folder)
    assert third.playground.controls["edit"].value == "dog"


def test_a_page_is_served_with_its_first_picture(v_pipe: Any) -> None:
    async def served() -> app.Page:  # as in a notebook, where changes are drawn after the cell
        return app.page(v_pipe, limits=app.Limits(pictures=1, steps=1))

    playground = asyncio.run(served()).playground
    assert playground.png and "drawing" not in playground.status.value


@pytest.mark.slow
def test_without_a_folder_what_it_finds_stays_with_the_page(
    v_pipe: Any, searches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(app.EDITS, raising=False)
    page = make(v_pipe, None)
    page.button.click()
    page.button.click()
    assert searches == [page.choice.value] and not page.button.disabled


def test_the_folder_may_come_from_the_environment(v_pipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(app.EDITS, str(tmp_path / "own"))
    assert make(v_pipe, None).folder == tmp_path / "own"


@pytest.mark.slow
def test_progress_is_said_round_by_round(v_pipe: Any, searches: list[str], tmp_path: Path) -> None:
    page, said = make(v_pipe, tmp_path), []
    page.progress.observe(lambda change: said.append(change["new"]), names="value")
    page.button.click()
    assert any("round 1 of 2" in text for text in said) and any("round 2 of 2" in text for text in said)


def test_an_error_is_shown_and_the_button_works_again(
    v_pipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise ConeslabError("no <room> left: empty the folder")

    monkeypatch.setattr(app, "find_concept_neurons", fails)
    page = make(v_pipe, tmp_path)
    page.button.click()
    assert "no &lt;room&gt; left" in page.progress.value and not page.button.disabled
    page.button.click()  # tried again
    assert "no &lt;room&gt; left" in page.progress.value


@pytest.mark.slow
def test_clicks_that_are_sent_while_it_waits_its_turn_do_not_queue_up(
    v_pipe: Any, searches: list[str], tmp_path: Path
) -> None:
    page, waiting = make(v_pipe, tmp_path), []

    class Loop:
        def call_soon_threadsafe(self, job: Any) -> None:
            waiting.append(job)

    page.playground.loop = Loop()  # type: ignore[assignment]
    for _ in range(3):
        page.button.click()
    assert len(waiting) == 1 and searches == []
    waiting[0]()
    assert len(searches) == 1


# --- bad files ------------------------------------------------------------------------------------------


def forged(path: Path, description: str) -> None:
    """A file with the right checksum of a description that no edit has."""
    metadata = {"format": "coneslab.edit/1", "kind": "WeightDelta", "description": description}
    save_file({"w": torch.ones(1)}, path, files.sealed({"w": torch.ones(1)}, metadata))


BAD: dict[str, Callable[[Path], Any]] = {
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "no edit": lambda path: path.write_bytes(b"not one"),
    "nothing": lambda path: path.write_bytes(b""),
    "a header of nested brackets": lambda path: path.write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000),
    "a description of nested brackets": lambda path: forged(path, "[" * 100_000),
    "settings that are none": lambda path: forged(path, '{"fingerprint": "a", "settings": 5}'),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_left_out_with_a_sentence(kind: str, v_pipe: Any, tmp_path: Path) -> None:
    space = KVSpace(v_pipe)
    ConceptNeurons(space.layout, [0], [0.5], space.fingerprint()).save(tmp_path / "cat.safetensors")
    for name in ("a", "dog", "<b>&\udcff"):
        BAD[kind](tmp_path / f"{name}.safetensors")
    page = app.page(v_pipe, tmp_path, limits=app.Limits(pictures=1, steps=1))
    assert [value for _, value in page.playground.controls["edit"].options] == ["", "cat"]
    assert page.playground.png and not page.playground.status.value
    shown = page.left_out.value
    assert "Left out of the menu" in shown and "<b>" not in shown and len(shown) < 4000
    shown.encode()
    assert all(f"<li>{name}: " in shown for name in ("a", "dog"))


@pytest.mark.slow
def test_it_begins_with_few_steps_and_never_more_than_it_may(v_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widgets.Playground, "draw", lambda self: True)
    started = {most: app.page(v_pipe, limits=app.Limits(pictures=1, steps=most)) for most in (30, 5)}
    assert {most: page.playground.controls["steps"].value for most, page in started.items()} == {30: 12, 5: 5}


@pytest.mark.slow
def test_without_bad_files_nothing_is_said(v_pipe: Any, tmp_path: Path) -> None:
    assert make(v_pipe, tmp_path).left_out.value == ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_does_not_stand_in_the_way_of_a_search(
    kind: str, v_pipe: Any, searches: list[str], tmp_path: Path
) -> None:
    BAD[kind](tmp_path / "dog.safetensors")
    page = make(v_pipe, tmp_path)
    page.choice.value = "dog"
    page.button.click()
    assert searches == ["dog"] and "found: dog" in page.progress.value
    assert isinstance(page.playground.edits["dog"], ConceptNeurons) and not page.button.disabled
    kept = kind not in ("a folder", "a pipe")  # which cannot be replaced: what was found stays with the page
    assert kept == ("lost with this page" not in page.progress.value)
    if kept:
        assert load_edit(tmp_path / "dog.safetensors") == page.playground.edits["dog"]


def test_the_page_begins_without_an_edit_of_another_model(
    v_pipe: Any, epsilon_pipe: Any, pictured: Any, tmp_path: Path
) -> None:
    other = app.find_concept_neurons(epsilon_pipe, pictured, rounds=1, prior_images=2, sampler_steps=1, progress=False)
    other.save(tmp_path / "cat.safetensors")
    page = app.page(v_pipe, tmp_path, limits=app.Limits(pictures=1, steps=1))
    assert page.playground.png and page.playground.controls["edit"].value == ""


# --- its server -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def serve() -> Any:
    pytest.importorskip("voila", reason="voila is not installed: pip install -e '.[app]'")
    spec = importlib.util.spec_from_file_location("serve", ROOT / "notebooks" / "app" / "serve.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("localhost", True),
        ("LOCALHOST.", True),
        ("page.localhost", True),
        ("127.0.0.1", True),
        ("[::1]", True),
        ("192.168.7.9", True),
        (socket.gethostname(), True),
        (f"{socket.gethostname()}.local", True),
        ("room7.school.example", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example", False),
        ("evil-localhost", False),
        ("", False),
    ],
)
def test_only_addresses_and_own_names_are_answered(host: str, known: bool, serve: Any) -> None:
    assert serve.Page(hosts=["Room7.school.example"]).knows(host) is known


def test_no_more_kernels_are_started_than_there_is_room_for(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[int] = []

    async def start(self: Any, **_: Any) -> str:
        await asyncio.sleep(0)
        running.append(1)
        return "kernel"

    monkeypatch.setattr(serve.AsyncMappingKernelManager, "start_kernel", start)
    monkeypatch.setattr(serve.Kernels, "__len__", lambda self: len(running))
    kernels = serve.Kernels(limit=3)

    async def visit() -> list[Any]:  # all at once: those that are being started count
        return await asyncio.gather(*(kernels.start_kernel() for _ in range(8)), return_exceptions=True)

    made = asyncio.run(visit())
    refused = [one for one in made if isinstance(one, serve.Refused)]
    assert made.count("kernel") == 3 and len(refused) == 5 and {one.status_code for one in refused} == {503}
    running.pop()  # one leaves
    assert asyncio.run(kernels.start_kernel()) == "kernel"


def test_the_memory_says_how_many_visitors_there_is_room_for(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.os, "sysconf", {"SC_PHYS_PAGES": 3_000_000, "SC_PAGE_SIZE": 4000}.get)
    assert serve.Kernels().limit == 8
    monkeypatch.setattr(serve.os, "sysconf", {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 4000}.get)
    assert serve.Kernels().limit == 1


def asked(port: int, path: str, host: str) -> tuple[int, str]:
    """Status and text of an answer."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Host": host})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture
def port(serve: Any, tmp_path: Path) -> Iterator[int]:
    """A server with room for one visitor, of a notebook that is quick to run."""
    cell = {"cell_type": "code", "id": "a", "execution_count": None, "metadata": {}, "outputs": [], "source": "6 * 7"}
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = {"cells": [cell], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "page.ipynb").write_text(json.dumps(notebook))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    command = [sys.executable, ROOT / "notebooks" / "app" / "serve.py", tmp_path / "page.ipynb", "--no-browser"]
    options = [f"--port={number}", "--Voila.ip=127.0.0.1", "--Voila.port_retries=0", "--Kernels.limit=1"]
    server = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with socket.socket() as there:
                if there.connect_ex(("127.0.0.1", number)) == 0:
                    break
            assert server.poll() is None, "the server has ended"
            time.sleep(0.2)
        yield number
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=30)


@pytest.mark.slow
def test_the_server_refuses_other_hosts_everywhere_and_says_when_it_is_full(port: int) -> None:
    for path in ("/", "/api/kernels/00000000-0000-0000-0000-000000000000", "/voila/static/x", "/voila/files/x"):
        status, text = asked(port, path, f"evil.example:{port}")
        assert status == 403 and "answers to its own address only" in text, path
    status, text = asked(port, "/", f"localhost:{port}")
    assert status == 200 and "42" in text  # and strangers have started no kernel
    status, text = asked(port, "/", f"127.0.0.1:{port}")
    assert status == 503 and "<h1>Full</h1>" in text and "come back in a few minutes" in text
