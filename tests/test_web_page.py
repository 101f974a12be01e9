"""The page that draws in the browser, in a real one: that it draws what Python draws, and says what is missing.

One test in `make test`, all in `make test-all`; the style sheet's colours are checked without a browser. Screenshots
are written to build/screenshots. Needs Playwright's Python package and a Chromium (CHROMIUM names one).
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from chromium import PATIENCE, SCREENSHOTS, needs_chromium

from coneslab import ConceptNeurons, concatenate, generate, record_attention
from coneslab.diffusion.encoding import tokenize
from coneslab.diffusion.kvspace import KVSpace
from coneslab.edits.base import Combined, Edit
from coneslab.edits.weights import model_fingerprint
from coneslab.methods import closed_form_edit
from coneslab.neurons.controls import random_neurons
from coneslab.web import Shelved, export_web, fetch_runtime
from coneslab.web.export import PAGE

pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright: pip install -e '.[test]'")
pytest.importorskip("onnxscript", reason="needs the packages of the extra web: pip install -e '.[web]'")
from playwright.sync_api import Browser, Page, expect  # noqa: E402
from test_book import contrast, declarations  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
STEPS = 2
NEAR = 3  # of 255: how far a picture may be from Python's anywhere


# --- the page, and a visitor ------------------------------------------------------------------------------


def some_neurons(pipe: Any, seed: int, subject: str, **facts: Any) -> ConceptNeurons:
    """A mask of the shipped model that changes what it draws."""
    layout, generator = KVSpace(pipe).layout, torch.Generator().manual_seed(seed)
    scale = (torch.rand(layout.n, generator=generator) > 0.3).float()
    return ConceptNeurons.from_scale(scale, layout, model_fingerprint(pipe), subject=subject, **facts)


def shelf(pipe: Any) -> dict[str, Edit]:
    """Every kind of edit that the page knows."""
    graded = some_neurons(pipe, 2, "dog")
    halves = np.where(graded.indices % 2, np.float32(0.25), np.float32(0))
    return {
        "cat": some_neurons(pipe, 0, "cat"),
        "car": some_neurons(pipe, 1, "car"),
        "graded": ConceptNeurons(graded.layout, graded.indices, halves, graded.fingerprint, subject="dog"),
        "at-words": some_neurons(pipe, 3, "cat", scope=("sks", "cat")),
        "cat-to-dog": closed_form_edit(pipe, "a cat", "a dog", preserve=["a car"]),
    }


PROMPT = "a sks cat on the beach"


@pytest.fixture(scope="module")
def folder(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page as it is exported, with the shipped model."""
    made = tmp_path_factory.mktemp("web") / "playground"
    edits = [Shelved(name, name, f"a {name}", PROMPT, edit) for name, edit in shelf(tiny).items()]
    export_web(tiny, made, edits, sampler_steps=STEPS, runtime=fetch_runtime(ROOT / "build" / "web"))
    return made


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder on a plain host of static files: its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


class Visit:
    """A page of the browser, what it fetched from elsewhere, and what went wrong in it."""

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.address = page, address
        self.errors: list[str] = []
        page.set_default_timeout(PATIENCE * 1000)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda said: said.type == "error" and self.errors.append(said.text))
        page.on("request", lambda request: self._asked(request.url))

    def _asked(self, url: str) -> None:
        if not url.startswith((self.address, "data:", "blob:")):
            self.errors.append(f"asked {url}")

    def open(self, **state: Any) -> None:
        """Open the page at a state, and wait until all is drawn."""
        self.page.goto(f"{self.address}#{urlencode({'steps': STEPS, **state})}")
        self.drawn()

    def drawn(self) -> None:
        expect(self.page.locator("#status")).to_have_text("Drawn.", timeout=2 * PATIENCE * 1000)

    def picture(self, column: str) -> np.ndarray:
        """The pixels of a column, int (height, width, 3); the canvas shows each as four by four."""
        rows = self.page.evaluate(
            """column => {
                const canvas = document.querySelector(`[data-column=${column}] canvas`);
                const { data, width } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
                const places = Array.from({ length: width / 4 }, (_, place) => 4 * place);
                const start = (row, column) => 4 * (row * width + column);
                return places.map(r => places.map(c => [...data.slice(start(r, c), start(r, c) + 3)]));
            }""",
            column,
        )
        return np.array(rows)

    def photograph(self, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"web_{name}.png", full_page=True)


@contextmanager
def visitor(browser: Browser, address: str, **options: Any) -> Iterator[Visit]:
    context = browser.new_context(viewport={"width": 1280, "height": 1000}, **options)
    made = Visit(context.new_page(), address)
    try:
        yield made
        assert made.errors == []
    finally:
        context.close()


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with served(folder) as found:
        yield found


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Visit]:
    with visitor(browser, address) as made:
        yield made


def drawn_by_python(
    pipe: Any, edit: Edit | None, *, prompt: str = PROMPT, dose: float = 1.0, **options: Any
) -> np.ndarray:
    options = {"seed": 0, "sampler_steps": STEPS, "guidance_scale": 3.0, **options}
    if edit is None or not dose:
        return np.asarray(generate(pipe, prompt, dtype=torch.float32, **options)[0], int)
    with edit.applied(pipe, dose):
        return np.asarray(generate(pipe, prompt, dtype=torch.float32, **options)[0], int)


def apart(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one - other).max())


# --- what it draws ----------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_chromium
def test_the_page_draws_what_python_draws(visit, tiny):
    cat = shelf(tiny)["cat"]
    visit.open(prompt=PROMPT, edits="cat", seed=7)
    for column, edit in {"untouched": None, "random": random_neurons(cat), "edit": cat}.items():
        assert apart(visit.picture(column), drawn_by_python(tiny, edit, seed=7)) <= NEAR, column
    assert apart(visit.picture("untouched"), visit.picture("edit")) > 20
    assert visit.page.evaluate("crossOriginIsolated"), "without it, one thread computes"
    visit.photograph("drawn")

    before = visit.picture("edit")
    visit.page.get_by_label("Dose").focus()
    for _ in range(8):
        visit.page.keyboard.press("ArrowLeft")
    visit.drawn()
    assert apart(visit.picture("edit"), before) > 5, "the slider changes the picture"
    assert apart(visit.picture("edit"), drawn_by_python(tiny, cat, seed=7, dose=0.6)) <= NEAR
    assert "dose=0.6" in visit.page.url


@pytest.mark.full
@needs_chromium
@pytest.mark.parametrize("name", ["graded", "at-words", "cat-to-dog"])
@pytest.mark.parametrize("dose", [1.0, 0.35])
def test_every_kind_of_edit_draws_what_python_draws(visit, tiny, name, dose):
    visit.open(prompt=PROMPT, edits=name, dose=dose, guidance=1.5)
    drawn = drawn_by_python(tiny, shelf(tiny)[name], dose=dose, guidance_scale=1.5)
    assert apart(visit.picture("edit"), drawn) <= NEAR
    assert apart(visit.picture("untouched"), drawn) > 3 * NEAR
    if name == "cat-to-dog":
        expect(visit.page.locator("[data-column=random]")).to_contain_text("an ablation has none")


@pytest.mark.full
@needs_chromium
def test_joined_edits_draw_what_python_draws(visit, tiny):
    edits = shelf(tiny)
    visit.open(prompt=PROMPT, edits="cat,graded,at-words,cat-to-dog", dose=0.5)
    masks = concatenate(
        edits["cat"], ConceptNeurons.from_scale(edits["graded"].scale(), edits["cat"].layout, edits["cat"].fingerprint)
    )
    both = Combined((masks, edits["cat-to-dog"], edits["at-words"]))
    assert apart(visit.picture("edit"), drawn_by_python(tiny, both, dose=0.5)) <= NEAR


@pytest.mark.full
@needs_chromium
def test_dose_0_is_the_untouched_model_and_no_edit_leaves_it_alone(visit, tiny):
    visit.open(prompt=PROMPT, edits="cat", dose=0)
    assert apart(visit.picture("edit"), visit.picture("untouched")) == 0
    visit.page.get_by_role("checkbox", name="cat", exact=True).uncheck()
    visit.drawn()
    expect(visit.page.locator("[data-column=edit]")).to_contain_text("choose an edit")
    assert "edits=&" in visit.page.url


@pytest.mark.full
@needs_chromium
def test_a_preview_comes_before_the_picture_in_full(visit):
    visit.open(prompt=PROMPT, edits="cat", steps=8)
    canvas = visit.page.locator("[data-column=edit] canvas")
    visit.page.get_by_label("Dose").press("ArrowLeft")
    expect(canvas).to_have_attribute("data-state", "preview")
    expect(canvas).to_have_attribute("data-state", "drawn")


@pytest.mark.full
@needs_chromium
def test_the_attention_of_a_word_is_what_python_records(visit, tiny):
    visit.open(prompt=PROMPT, edits="")
    before = visit.picture("untouched")
    with record_attention(tiny) as maps:
        generate(tiny, PROMPT, seed=0, sampler_steps=STEPS, dtype=torch.float32)
    expected = maps.token("beach")
    word = visit.page.get_by_role("button", name="beach")
    word.hover()
    highest = round(100 * float(expected.max()))
    expect(visit.page.locator("#word-note")).to_contain_text(f"{highest} %")
    lit, times = visit.picture("untouched"), before.shape[0] // expected.shape[0]
    for place in (int(expected.argmax()), int(expected.argmin())):  # bright where it is largest, dark where it is not
        row, column = np.unravel_index(place, expected.shape)
        middle = (slice(row * times + 1, row * times + 3), slice(column * times + 1, column * times + 3))
        shade = 225 / 255 * (1 - float(expected[row, column] / expected.max()))
        assert apart(lit[middle], before[middle] * (1 - shade)) < 0.15 * 255
    visit.photograph("attention")
    word.click()
    visit.page.mouse.move(0, 0)
    assert "word=beach" in visit.page.url
    assert apart(visit.picture("untouched"), lit) == 0, "it stays once it is pressed"


# --- the parts of it, one by one ----------------------------------------------------------------------------


@pytest.fixture
def bare(browser: Browser) -> Iterator[Page]:
    """The page's modules without a model."""
    with served(Path(str(PAGE))) as address, visitor(browser, address) as made:
        made.page.route("**/bare.html", lambda route: route.fulfill(body="<!doctype html>", content_type="text/html"))
        made.page.goto(f"{address}bare.html")
        yield made.page


def module(page: Page, name: str, code: str, *arguments: Any) -> Any:
    """What a piece of JavaScript gives that has the names of a module."""
    return page.evaluate(
        f"async given => {{ const m = await import('/{name}'); return ({code})(...given); }}", list(arguments)
    )


@pytest.mark.full
@needs_chromium
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("n", [16, 24, 1024, 1000])
def test_noise_is_that_of_torch(bare, seed, n):
    found = module(bare, "numbers.js", "(n, seed) => [...m.randn(n, new m.Generator(seed))]", n, seed)
    expected = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    assert np.abs(np.array(found) - expected.numpy()).max() < 1e-5


@pytest.mark.full
@needs_chromium
@pytest.mark.parametrize("n", [1, 7, 24576])
def test_permutations_are_those_of_torch(bare, n):
    code = "(n, seed) => { const g = new m.Generator(seed); return [[...m.randperm(n, g)], [...m.randperm(n, g)]]; }"
    generator = torch.Generator().manual_seed(5)
    assert module(bare, "numbers.js", code, n, 5) == [torch.randperm(n, generator=generator).tolist() for _ in range(2)]


@pytest.mark.full
@needs_chromium
def test_float16_is_read_as_numpy_reads_it(bare):
    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)]
    found = module(bare, "numbers.js", "bytes => [...m.float16(new Uint8Array(bytes))]", list(values.tobytes()))
    assert (np.array(found) == values).all()


TEXTS = (
    "",
    "a cat",
    "  A  CAT\ton the\nGRASS ",
    "a sks cat, a dog and a car",
    "3d",
    "a 3D robot, 3d3 x3d -3d-",
    "the cat's 12 dogs don't",
    "naïve café, ÀÉÎ 猫 🐱",
    "e\u0301",
    "<|endoftext|> a <|startoftext|> b",
    "x" * 200,
    "!!! ... a-b_c",
)


@pytest.mark.full
@needs_chromium
@pytest.mark.parametrize("text", TEXTS)
def test_words_are_cut_as_python_cuts_them(bare, tiny, text):
    from coneslab.web.export import _tokenizer

    code = "(vocabulary, text) => [...new m.Tokenizer(vocabulary).encode(text)]"
    assert module(bare, "tokenizer.js", code, _tokenizer(tiny), text) == tokenize(tiny, text)[0].tolist()


@pytest.mark.full
@needs_chromium
@pytest.mark.parametrize(
    ("address", "wrong"),
    [
        ("#prompt=a+b&seed=3&steps=5&guidance=2.5&edits=cat&dose=0.5", []),
        ("#seed=-1", ["seed"]),
        ("#seed=1.5&steps=x&guidance=&dose=2", ["seed", "steps", "guidance", "dose"]),
        ("#edits=cat,mouse", ["mouse"]),
        ("#steps=31", ["steps"]),
    ],
)
def test_an_address_is_read_and_what_makes_no_sense_is_told(bare, address, wrong):
    choices = {
        "edits": [{"name": "cat", "title": "cat", "prompt": "a cat", "parts": []}],
        "mostSteps": 30,
        "start": {"sampler_steps": 10, "guidance_scale": 3},
    }
    code = """(text, choices) => {
        const found = m.readState(text, choices);
        return [found, m.readState(m.writeState(found.state), choices)];
    }"""
    found, again = module(bare, "state.js", code, address, choices)
    assert len(found["wrong"]) == len(wrong) and all(
        name in said for name, said in zip(wrong, found["wrong"], strict=True)
    )
    assert again == {"state": found["state"], "wrong": []}
    if not wrong:
        assert found["state"] == {
            "prompt": "a b", "seed": 3, "steps": 5, "guidance": 2.5, "edits": ["cat"], "dose": 0.5, "word": ""
        }  # fmt: skip


# --- the way it is used --------------------------------------------------------------------------------------


@pytest.mark.full
@needs_chromium
def test_a_second_visitor_of_the_same_address_sees_the_same_pictures(browser, address):
    seen = []
    for _ in range(2):
        with visitor(browser, address) as visit:
            visit.open(prompt="a sks cat and a car in the snow", seed=11, edits="cat,car", dose=0.7)
            visit.page.get_by_role("button", name="Next seed").click()
            visit.drawn()
            seen.append(visit.picture("edit"))
            address_then = visit.page.url
    with visitor(browser, address) as visit:
        visit.page.goto(address_then)
        visit.drawn()
        seen.append(visit.picture("edit"))
        visit.page.evaluate("location.hash = '#prompt=a+dog&steps=2&edits=&seed=3'")
        expect(visit.page.get_by_label("Prompt")).to_have_value("a dog")
        visit.drawn()
    assert apart(seen[0], seen[1]) == 0 and apart(seen[0], seen[2]) == 0


@pytest.mark.full
@needs_chromium
def test_the_keyboard_reaches_everything_in_order_and_words_are_offered(visit):
    visit.open(prompt="a cat", edits="cat", steps=1)
    page, prompt = visit.page, visit.page.get_by_label("Prompt")
    prompt.fill("")
    prompt.press_sequentially("a rob")
    option = page.get_by_role("option").first
    expect(option).to_contain_text("robot")
    prompt.press("ArrowDown")
    expect(option).to_have_attribute("aria-selected", "true")
    visit.photograph("suggestions")
    prompt.press("Enter")
    expect(prompt).to_have_value("a robot ")
    expect(page.get_by_role("listbox")).to_be_hidden()
    prompt.press("Enter")
    visit.drawn()
    expect(page.locator("[data-column=untouched] canvas")).to_have_attribute(
        "aria-label", "“a robot”, in the untouched model, seed 0"
    )
    reached = []
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("(e => e.id || e.dataset.word || e.value || e.textContent)(document.activeElement)")
        )
    names = ["cat", "car", "graded", "at-words", "cat-to-dog"]
    assert reached[:13] == ["a", "robot", *names, "dose", "seed", "another", "steps", "guidance", "copy"]
    page.get_by_label("Seed", exact=True).fill("-3")
    page.get_by_label("Seed", exact=True).press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("The seed is “-3”: give a whole number from 0 to 4294967295")


@pytest.mark.full
@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_a_phone_and_everything_has_a_name(browser, address, scheme, width):
    with visitor(browser, address, color_scheme=scheme, reduced_motion="reduce") as visit:
        visit.page.set_viewport_size({"width": width, "height": 740})
        visit.open(prompt=PROMPT, edits="cat", steps=1, word="cat")
        wide = visit.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"the page is {wide} pixels wide"
        nameless = visit.page.evaluate(
            """() => [...document.querySelectorAll("button, input, canvas, progress, [role=listbox], [role=group]")]
                .filter(e => e.ariaHidden !== "true")
                .filter(e => !(e.labels?.length || e.ariaLabel || e.textContent.trim()))
                .filter(e => !e.getAttribute("aria-labelledby"))
                .map(e => e.outerHTML.slice(0, 100))"""
        )
        assert nameless == []
        levels = visit.page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(h => Number(h.tagName[1]))")
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
        visit.photograph(f"{scheme}_{width}")


# --- what is missing -----------------------------------------------------------------------------------------


def cut(file: Path) -> None:
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[: len(data) // 2])


def changed(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.unlink()
    file.write_bytes(data)


def of_another_model(file: Path) -> None:
    manifest = json.loads(file.read_text())
    manifest["check"]["output"][3] += 1
    file.unlink()
    file.write_text(json.dumps(manifest))


def without_runtime(file: Path) -> None:
    manifest = json.loads(file.read_text())
    file.unlink()
    file.write_text(json.dumps(manifest | {"runtime": None}))


@pytest.mark.full
@needs_chromium
@pytest.mark.parametrize(
    ("name", "broken", "said"),
    [
        ("manifest.json", Path.unlink, "The file manifest.json is missing (the server says 404): reload the page"),
        ("manifest.json", cut, "The file manifest.json is damaged, it has no complete JSON"),
        ("manifest.json", without_runtime, "built without ONNX Runtime"),
        ("manifest.json", of_another_model, "This browser computes something else than the model (on the processor)"),
        ("unet.onnx", Path.unlink, "The file unet.onnx is missing"),
        ("unet.onnx", cut, "The file unet.onnx is damaged, it has"),
        ("decoder.onnx", changed, "The file decoder.onnx is damaged, it has other contents"),
        ("keys_and_values.bin", cut, "The file keys_and_values.bin is damaged"),
        ("runtime/ort.wasm.min.mjs", Path.unlink, "The file runtime/ort.wasm.min.mjs is missing or damaged"),
        ("engine.js", Path.unlink, "The part of the page that computes could not be started"),
        ("edits/cat.bin", Path.unlink, "The file edits/cat.bin is missing"),
    ],
)
def test_a_file_that_is_missing_or_broken_is_told_in_a_sentence(browser, folder, tmp_path, name, broken, said):
    copied = tmp_path / "site"
    shutil.copytree(folder, copied)
    broken(copied / name)
    with served(copied) as address, visitor(browser, address) as visit:
        visit.page.goto(f"{address}#{urlencode({'edits': 'cat', 'steps': 1})}")
        expect(visit.page.get_by_role("alert")).to_contain_text(said)
        visit.errors = [error for error in visit.errors if "404" not in error]


@pytest.mark.full
@needs_chromium
@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("delete globalThis.Worker", "too old"),
        ("Object.defineProperty(Worker.prototype, 'postMessage', {value() { this.onmessage({data: {kind: 'failed', "
         "message: 'This browser has WebAssembly turned off'}}) }})", "WebAssembly turned off"),
    ],
)  # fmt: skip
def test_what_a_browser_lacks_is_told(browser, address, script, said):
    with visitor(browser, address) as visit:
        visit.page.add_init_script(script)
        visit.page.goto(address)
        expect(visit.page.get_by_role("alert")).to_contain_text(said)
        visit.errors = []


@pytest.mark.full
@needs_chromium
def test_a_host_that_forbids_service_workers_gets_one_thread(browser, address):
    with visitor(browser, address, service_workers="block") as visit:
        visit.page.add_init_script("delete Navigator.prototype.serviceWorker")
        visit.open(prompt="a cat", edits="", steps=1)
        assert not visit.page.evaluate("crossOriginIsolated")
        expect(visit.page.locator("#machine")).to_contain_text("1 thread")


@pytest.mark.full
@needs_chromium
def test_opened_as_a_file_the_page_says_what_to_do(browser, folder):
    page = browser.new_page()
    page.goto((folder / "index.html").as_uri())
    expect(page.get_by_role("alert")).to_contain_text("Run “make web”")
    page.close()


# --- colours -------------------------------------------------------------------------------------------------

PAIRS = [
    ("text", "ground"), ("text", "panel"), ("muted", "ground"), ("muted", "panel"), ("accent", "ground"),
    ("accent", "panel"), ("on-accent", "accent"), ("problem", "problem-ground"),
]  # fmt: skip


def test_text_stands_out_from_its_ground_in_both_schemes():
    sheet = Path(str(PAGE)) / "page.css"
    light = {name: value for selector, name, value in declarations(sheet) if selector == ":root" and name[:2] == "--"}
    text = sheet.read_text(encoding="utf-8").split("prefers-color-scheme: dark", 1)[1]
    dark = dict(part.strip().split(": ") for part in text[: text.index("}")].split("{")[2].split(";") if "--" in part)
    assert light.keys() == {
        f"--{name}" for name in ("ground panel text muted line accent on-accent problem problem-ground shut".split())
    }
    for colours in (light, dark):
        faint = [pair for pair in PAIRS if contrast(colours[f"--{pair[0]}"], colours[f"--{pair[1]}"]) < 4.5]
        faint += [("line", "ground")] * (contrast(colours["--line"], colours["--ground"]) < 3)
        assert faint == []
