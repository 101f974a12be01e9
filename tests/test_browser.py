"""The widgets in a real browser: JupyterLab and the app are started, Chromium opens them, moves controls and looks.

A notebook, a widget and the page in `make test`, the other widgets and two visitors at once in `make test-all`.
Screenshots are written to build/screenshots. Needs Playwright's Python package and a Chromium (CHROMIUM names one).
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from chromium import PATIENCE, SCREENSHOTS, needs_chromium
from short_notebooks import write

from coneslab import ConceptNeurons, subject
from coneslab.diffusion.kvspace import KVSpace
from coneslab.edits.weights import model_fingerprint
from coneslab.show import explorers

pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright: pip install -e '.[test]'")
from playwright.sync_api import Browser, Error, Locator, Page, expect  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
STARTING = 4 * PATIENCE  # seconds for a server, which tells by itself if it cannot start

pytestmark = [
    pytest.mark.slow,
    needs_chromium,
]

CELLS = [
    """
import numpy as np
from coneslab import ConeslabError
from coneslab.show import widgets

def stripe(level, side, bright, text):
    if not text:
        raise ConeslabError("the text is empty: write one")
    picture = np.full((64, 64, 3), level, np.uint8)
    half = picture[:, :32] if side == "left" else picture[:, 32:]
    half[..., 0] = 255 if bright else 90
    return picture

widgets.explorer(stripe, level=range(0, 255, 5), side=["left", "right"], bright=False, text="words")
""",
    """
import coneslab
from coneslab.diffusion import KVSpace
from coneslab.edits import model_fingerprint
from coneslab.neurons import ConceptNeurons
import torch

pipe = coneslab.load("tiny")
layout = KVSpace(pipe).layout
scale = (torch.rand(layout.n, generator=torch.Generator().manual_seed(0)) > 0.3).float()
some = ConceptNeurons.from_scale(scale, layout, model_fingerprint(pipe), subject="some")
widgets.playground(pipe, {"some neurons": some}, pictures=2, sampler_steps=6, preview_steps=2)
""",
    """
widgets.neuron_explorer(pipe, {"some neurons": some}, ["a cat"], pictures=2, sampler_steps=4, preview_steps=2)
""",
    """
widgets.attention_browser(pipe, "a cat and a car", sampler_steps=4)
""",
]


class Visit:
    """A page of the browser, and what went wrong in it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        page.set_default_timeout(PATIENCE * 1000)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._said)

    def _said(self, message: Any) -> None:
        """Keep an error, unless it is about another host: Voilà asks one for MathJax, and does without it offline."""
        if message.type == "error" and re.match(r"(http://127\.0\.0\.1|$)", message.location["url"]):
            self.errors.append(f"{message.text} ({message.location['url']})")

    def photograph(self, name: str, part: Locator | None = None) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        (part or self.page).screenshot(path=SCREENSHOTS / f"{name}.png")


@contextmanager
def visitor(browser: Browser, name: str) -> Iterator[Visit]:
    """A new visitor, in a window of a laptop's size. A failure leaves a screenshot."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    made = Visit(context.new_page())
    try:
        yield made
        assert made.errors == []
    finally:
        try:
            made.photograph(f"last_{name}")
        except Error:
            pass
        context.close()


@pytest.fixture
def visit(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Visit]:
    with visitor(browser, request.node.name) as made:
        yield made


@contextmanager
def server(command: list[str | Path], folder: Path, ready: str, **environment: str) -> Iterator[None]:
    """Run a server until the block ends; `ready` is the address that answers when it is up."""
    own = {
        "HOME": folder,
        "JUPYTER_CONFIG_DIR": folder / "config",
        "JUPYTER_RUNTIME_DIR": folder / "runtime",
        "JUPYTERLAB_SETTINGS_DIR": folder / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": folder / "workspaces",
        "IPYTHONDIR": folder / "ipython",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {name: str(value) for name, value in own.items()} | environment,
        )
        try:
            up = until(lambda: answers(ready) or process.poll() is not None, STARTING)
            assert up and process.poll() is None, log.read_text()
            yield
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # it ends its kernels
            process.wait(60)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def until(true: Callable[[], Any], seconds: float | None = None) -> Any:
    """Wait for something, and return it. seconds: then give up and return what there is; else the test fails."""
    end = time.monotonic() + (seconds or PATIENCE)
    while not (value := true()):
        if time.monotonic() > end:
            assert seconds, f"waited {PATIENCE} seconds in vain"
            break
        time.sleep(0.1)
    return value


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Path]]:
    """JupyterLab on this machine alone: its address, its token and the folder of its notebooks."""
    folder = tmp_path_factory.mktemp("lab")
    notebooks = folder / "notebooks"
    notebooks.mkdir()
    for name, text in {  # no question about news; all cells in the page, also those out of sight
        "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
        "notebook-extension/tracker": '{"windowingMode": "none"}',
    }.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    port, token = free_port(), secrets.token_hex(16)
    address = f"http://127.0.0.1:{port}"
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={notebooks}",
    ]
    with server(command, folder, f"{address}/api"):
        yield address, token, notebooks


def run_all(visit: Visit, lab: tuple[str, str, Path], name: str) -> list[Locator]:
    """Open a notebook and run its cells from the menu; returns its code cells when the last one is done."""
    address, token, notebooks = lab
    page = visit.page
    page.goto(f"{address}/lab/workspaces/{Path(name).stem}/tree/{name}?token={token}")
    page.get_by_text("| Idle").wait_for()
    cells = page.locator(".jp-CodeCell")
    count = sum(cell.cell_type == "code" for cell in nbformat.read(notebooks / name, 4).cells)
    numbers = [cells.nth(i).locator(".jp-InputArea-prompt") for i in range(count)]

    def started() -> bool:
        """Ask again where JupyterLab has dropped the request: it does so while it still connects to the kernel."""
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        return until(lambda: re.search(r"[\d*]", numbers[-1].inner_text()), 2)

    until(started)
    failed = page.locator("[data-mime-type='application/vnd.jupyter.stderr']").filter(has_text="Traceback (most recent")
    for number in numbers:  # each cell may take so long; the first that fails is the end
        until(lambda number=number: failed.count() or re.search(r"\d", number.inner_text()))
        assert failed.count() == 0, failed.first.inner_text().strip().splitlines()[-1]
    return [cells.nth(i) for i in range(count)]


LIVE = ".widget-html img"  # beside it there is the still picture, which is no widget


def next_picture(part: Locator, before: str | None) -> str:
    """Wait until the picture is another one, whole, and the status line is quiet."""
    status = part.get_by_text(re.compile("drawing (…|it in full)"))
    image = part.locator(LIVE)
    until(lambda: image.is_visible() and image.get_attribute("src") != before and status.count() == 0)
    until(lambda: image.evaluate("image => image.complete && image.naturalWidth > 0"))
    return str(image.get_attribute("src"))


def colour(part: Locator, x: float) -> list[int]:
    """The colour of the live picture, x of the way from left to right."""
    return part.locator(LIVE).evaluate(
        """(image, x) => {
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0);
            return [...context.getImageData(x * canvas.width, canvas.height / 2, 1, 1).data].slice(0, 3);
        }""",
        x,
    )


def control(part: Locator, label: str) -> Locator:
    """The box of the control with this label."""
    return part.locator(".widget-inline-hbox, .jupyter-widget-inline-hbox").filter(
        has=part.page.get_by_text(label, exact=True)
    )


def test_an_explorer_follows_slider_menu_checkbox_and_text(visit: Visit, lab: Any) -> None:
    write_notebook(lab[2] / "explorer.ipynb", CELLS[:1])
    (cell,) = run_all(visit, lab, "explorer.ipynb")
    expect(cell.locator("img")).to_be_visible()  # the still picture
    visit.photograph("explorer_start", cell)

    handle = control(cell, "level").get_by_role("slider")
    handle.focus()
    for _ in range(4):
        visit.page.keyboard.press("ArrowRight")
    before = next_picture(cell, None)
    until(lambda: colour(cell, 0.75) == [20, 20, 20])
    assert colour(cell, 0.25) == [90, 20, 20]
    assert handle.evaluate("handle => handle === document.activeElement"), "the keyboard was lost"
    visit.photograph("explorer_moved", cell)

    cell.locator("select").select_option("right")
    before = next_picture(cell, before)
    assert colour(cell, 0.75) == [90, 20, 20]
    cell.get_by_role("checkbox").check()
    before = next_picture(cell, before)
    assert colour(cell, 0.75) == [255, 20, 20]

    text = cell.locator("input[type=text]")
    text.fill("")
    text.press("Enter")
    expect(cell.get_by_role("alert")).to_have_text("the text is empty: write one")
    expect(cell.locator(LIVE)).to_be_hidden()
    visit.photograph("explorer_error", cell)
    text.fill("words")
    text.press("Enter")
    next_picture(cell, None)
    expect(cell.get_by_role("alert")).to_have_count(0)


@pytest.mark.full
def test_the_playground_draws_with_the_shipped_model(visit: Visit, lab: Any) -> None:
    write_notebook(lab[2] / "playground.ipynb", [CELLS[0], CELLS[1]])
    _, cell = run_all(visit, lab, "playground.ipynb")
    visit.photograph("playground_start", cell)
    control(cell, "dose").get_by_role("slider").focus()
    visit.page.keyboard.press("ArrowLeft")
    before = next_picture(cell, None)
    visit.photograph("playground_moved", cell)
    cell.locator("select").select_option("no edit")
    before = next_picture(cell, before)
    prompt = cell.locator("input[type=text]").first
    prompt.fill(" ")
    prompt.press("Enter")
    expect(cell.get_by_role("alert")).to_contain_text("the prompt is empty")
    visit.photograph("playground_error", cell)
    prompt.fill("a dog in the snow")
    prompt.press("Enter")
    assert next_picture(cell, before) != before


@pytest.mark.full
def test_views_of_neurons_and_of_attention_follow_their_menus(visit: Visit, lab: Any) -> None:
    write_notebook(lab[2] / "views.ipynb", CELLS)
    *_, neurons, attention = run_all(visit, lab, "views.ipynb")
    visit.photograph("neurons_start", neurons)
    control(neurons, "kind").locator("select").select_option("keys")
    before = next_picture(neurons, None)
    control(neurons, "block").locator("select").select_option("mid")
    assert next_picture(neurons, before) != before
    visit.photograph("neurons_moved", neurons)

    visit.photograph("attention_start", attention)
    control(attention, "stage").locator("select").select_option("last third")
    before = next_picture(attention, None)
    prompt = control(attention, "prompt").locator("input")
    prompt.fill("a dog")
    prompt.press("Enter")
    before = next_picture(attention, before)
    visit.photograph("attention_moved", attention)
    prompt.fill(" ")
    prompt.press("Enter")
    expect(attention.get_by_role("alert")).to_contain_text("the prompt is empty")


def test_a_lecture_runs_to_its_first_explorer_which_follows(visit: Visit, lab: Any) -> None:
    path = write(ROOT / "notebooks" / "01_diffusion_basics.ipynb", lab[2])  # in short
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        cell.metadata.pop("jupyter", None)  # solutions are folded, which hides the numbers that `run_all` waits for
    end = next(i for i, cell in enumerate(code) if "widgets.explorer(" in cell.source)
    notebook.cells = code[: end + 1]  # nbmake runs the others
    nbformat.write(notebook, path)
    *_, noisy = run_all(visit, lab, path.name)
    noisy.scroll_into_view_if_needed()
    control(noisy, "timestep").locator(".widget-readout").fill("250")
    control(noisy, "timestep").locator(".widget-readout").press("Enter")
    before = next_picture(noisy, None)
    caption = control(noisy, "caption").locator("input")
    caption.fill("a dog in the snow")
    caption.press("Enter")
    assert next_picture(noisy, before) != before
    visit.photograph("lecture_moved", noisy)


@pytest.mark.full
def test_the_tour_runs_and_its_explorer_follows(visit: Visit, lab: Any) -> None:
    write(ROOT / "notebooks" / "00_tour.ipynb", lab[2])  # in short: nbmake runs it at length
    dose = next(cell for cell in run_all(visit, lab, "00_tour.ipynb") if cell.locator(".widget-slider").count())
    dose.scroll_into_view_if_needed()
    visit.photograph("tour_start", dose)
    control(dose, "dose").locator(".widget-readout").fill("0.25")
    control(dose, "dose").locator(".widget-readout").press("Enter")
    before = next_picture(dose, None)
    control(dose, "prompt").locator("select").select_option(index=1)
    assert next_picture(dose, before) != before
    visit.photograph("tour_moved", dose)


def write_notebook(path: Path, cells: list[str]) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)


# --- the app --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The page as `make app` serves it: its address and its folder of edits."""
    folder = tmp_path_factory.mktemp("app")
    port = free_port()
    make = [
        "make",
        "--old-file",
        f"{sys.prefix}/.coneslab-app",
        f"VENV={sys.prefix}",
        f"EDITS={folder / 'edits'}",
        f"APP_ARGS=--no-browser --port={port} --Voila.port_retries=0",
        "app",
    ]
    address = f"http://127.0.0.1:{port}"
    with server(make, folder, f"{address}/voila/static/none"):
        yield address, folder / "edits"


def some_neurons(pipe: Any) -> ConceptNeurons:
    """An edit of the shipped model."""
    scale = (torch.rand(KVSpace(pipe).n, generator=torch.Generator().manual_seed(0)) > 0.1).float()
    return ConceptNeurons.from_scale(scale, KVSpace(pipe).layout, model_fingerprint(pipe), subject="cat")


SEND = """kernel => new Promise((resolve, reject) => {
    const socket = new WebSocket(`ws://${location.host}/api/kernels/${kernel}/channels`);
    const send = (type, content) => socket.send(JSON.stringify({
        header: {msg_id: type, msg_type: type, username: "", session: "visitor", version: "5.3", date: ""},
        parent_header: {}, metadata: {}, channel: "shell", content, buffers: [],
    }));
    const answers = [];
    socket.onerror = reject;
    socket.onopen = () => {
        send("execute_request", {code: "1", silent: false, store_history: false, user_expressions: {}});
        send("kernel_info_request", {});
    };
    socket.onmessage = event => {
        const message = JSON.parse(event.data);
        if (message.parent_header.session === "visitor") answers.push(message.header.msg_type);
        if (message.header.msg_type === "kernel_info_reply" && answers.includes("kernel_info_reply")) resolve(answers);
    };
})"""


def test_the_app_draws_finds_neurons_and_runs_no_code_of_visitors(
    visit: Visit, app: tuple[str, Path], tiny: Any
) -> None:
    page, (address, folder) = visit.page, app
    response = page.goto(address)
    assert response is not None and response.ok
    expect(page.get_by_role("heading", name="Concept neurons")).to_be_visible()
    body = page.locator("body")
    before = next_picture(body, None)
    assert "app.page(" not in page.content(), "visitors see the sources"
    visit.photograph("app_start")

    control(body, "seed").locator("input").fill("3")
    control(body, "seed").locator("input").press("Enter")
    before = next_picture(body, before)
    steps = control(body, "steps").locator(".widget-readout")
    for given in ("500", "2"):  # far beyond what a visitor may, and few
        steps.fill(given)
        steps.press("Enter")
    prompt = control(body, "prompt").locator("input")
    prompt.fill("cat " * 100)
    prompt.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("characters: give at most 200")
    visit.photograph("app_error")
    prompt.fill("a dog in the snow")
    prompt.press("Enter")
    before = next_picture(body, before)

    some_neurons(tiny).save(folder / "cat.safetensors")  # another visitor was quicker; the search has tests of its own
    page.get_by_role("combobox", name="subject").select_option("cat")
    page.get_by_role("button", name="Find its neurons").click()
    expect(page.get_by_text("found: cat is in the menu of edits")).to_be_visible()
    next_picture(body, before)
    expect(control(body, "edit").locator("select")).to_have_value("cat")
    expect(prompt).to_have_value(subject("cat").prompts[0])
    visit.photograph("app_found")

    replies = page.evaluate(SEND, kernel_of(page))
    assert "kernel_info_reply" in replies and "execute_reply" not in replies
    for path in ("api/contents", "api/kernels", "lab", "tree"):
        answer = page.request.post(f"{address}/{path}")
        assert answer.status in (403, 404, 405), path


def kernel_of(page: Page) -> str:
    found = re.search(r'"kernelId": ?"([0-9a-f-]+)"', page.content())
    assert found is not None
    return found[1]


@pytest.mark.full
def test_visitors_of_the_app_draw_at_once_and_do_not_see_each_other(browser: Browser, app: tuple[str, Path]) -> None:
    with visitor(browser, "app_one") as one, visitor(browser, "app_two") as two:
        bodies, first = [one.page.locator("body"), two.page.locator("body")], []
        for each, body in zip((one, two), bodies, strict=True):  # the second kernel starts beside one at rest
            each.page.goto(app[0], wait_until="commit")
            first.append(next_picture(body, None))
        assert first[0] == first[1] and kernel_of(one.page) != kernel_of(two.page)
        seeds = [control(body, "seed").locator("input") for body in bodies]
        for number, seed in enumerate(seeds, 3):
            seed.fill(str(number))
            seed.press("Enter")
        then = [next_picture(body, before) for body, before in zip(bodies, first, strict=True)]
        assert then[0] != then[1] and [seed.input_value() for seed in seeds] == ["3", "4"]


def test_a_strip_steps_through_its_pictures_by_mouse_and_keyboard_without_a_script(browser: Browser) -> None:
    pictures = {label: explorers.png(np.full((8, 8, 3), 60 * i, np.uint8)) for i, label in enumerate(("0", "0.5", "1"))}
    context = browser.new_context(java_script_enabled=False)
    try:
        page = context.new_page()
        page.set_content(f"<body>{explorers.stepped(pictures, 'dose', '0.5')}</body>")
        for act, seen in (
            (lambda: None, "dose 0.5: "),
            (lambda: page.get_by_label("0", exact=True).check(), "dose 0: "),
            (lambda: page.keyboard.press("ArrowLeft"), "dose 1: "),
        ):
            act()
            visible = [image for image in page.get_by_role("img").all() if image.is_visible()]
            assert len(visible) == 1 and (visible[0].get_attribute("alt") or "").startswith(seen)
        page.screenshot(path=SCREENSHOTS / "strip.png")
    finally:
        context.close()
