"""The site: built without warnings; links that resolve, alt texts, headings in order, enough contrast.

Every check of the built pages is a function of a folder, and is shown here to find what is wrong in a broken one.
"""

import inspect
import json
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pandas
import pytest

for needed in ("sphinx", "myst_nb", "pydata_sphinx_theme", "sphinx-mathjax-offline", "bs4", "tinycss2.color3"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: pip install -c constraints.txt -e '.[test]'")

import tinycss2  # noqa: E402
from bs4 import BeautifulSoup  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
sys.path.insert(0, str(ROOT / "docs"))

import hosts  # noqa: E402
import overview  # noqa: E402
import playground  # noqa: E402
import prose  # noqa: E402
import result_tables as tables  # noqa: E402

import notebooks  # noqa: E402

# --- the checks -----------------------------------------------------------------------------------------


def pages(folder: Path) -> dict[Path, BeautifulSoup]:
    """Every page; what lies in `_static` serves them and is none."""
    paths = [path for path in sorted(folder.rglob("*.html")) if "_static" not in path.relative_to(folder).parts]
    return {path: parsed(path.read_bytes()) for path in paths}


@lru_cache(maxsize=200)
def parsed(page: bytes) -> BeautifulSoup:
    """Once for all checks of the same site: it takes seconds."""
    return BeautifulSoup(page, "html.parser")


def broken_links(folder: Path) -> list[str]:
    """Links and sources inside the site whose file, or whose place in it, is not there."""
    parsed = pages(folder)
    places = {path: {tag["id"] for tag in page.find_all(id=True)} for path, page in parsed.items()}
    wrong = []
    for path, page in parsed.items():
        for tag in page.find_all(["a", "img", "link", "script"]):
            address = urlsplit(tag.get("href") or tag.get("src") or "")
            if address.scheme or address.netloc or not (address.path or address.fragment):
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            state = target.parent.name == playground.FOLDER and "=" in address.fragment  # not a place in the page
            here = (
                not address.fragment
                or target.suffix != ".html"
                or state
                or unquote(address.fragment) in places.get(target, ())
            )
            if not target.is_file() or not here:
                wrong.append(f"{path.relative_to(folder)}: {address.geturl()}")
    return wrong


def wordless_pictures(folder: Path) -> list[str]:
    return [
        f"{path.relative_to(folder)}: {str(picture)[:100]}"
        for path, page in pages(folder).items()
        for picture in page.find_all("img")
        if not picture.get("alt", "").strip()
    ]


def headings_out_of_order(folder: Path) -> list[str]:
    """Pages without exactly one h1, and headings more than one level below the one before."""
    wrong = []
    for path, page in pages(folder).items():
        levels = [int(heading.name[1]) for heading in page.find_all(re.compile("^h[1-6]$"))]
        if levels.count(1) != 1 or any(below > above + 1 for above, below in zip([0, *levels], levels, strict=False)):
            wrong.append(f"{path.relative_to(folder)}: {levels}")
    return wrong


def fetched_from_elsewhere(folder: Path) -> list[str]:
    """What a browser would load from a network by itself."""
    wrong = []
    for path, page in pages(folder).items():
        for tag in page.select("script[src], img[src], iframe[src], source[src], link[href]"):
            address = tag.get("src") or tag["href"]
            if urlsplit(address).netloc:
                wrong.append(f"{path.relative_to(folder)}: {address}")
    for path in folder.rglob("*.css"):
        found = re.findall(r"(?:url\(|@import)\s*[\"']?\s*(?:https?:)?//[^\"')]+", path.read_text(encoding="utf-8"))
        wrong += [f"{path.relative_to(folder)}: {address}" for address in found]
    return wrong


def declarations(sheet: Path) -> list[tuple[str, str, str]]:
    """(selector, property, value) of a style sheet, quotes left out of selectors."""
    rules = tinycss2.parse_stylesheet(sheet.read_text(encoding="utf-8"), skip_comments=True, skip_whitespace=True)
    return [
        (selector.strip(), item.name, tinycss2.serialize(item.value).strip())
        for rule in rules
        if rule.type == "qualified-rule"
        for selector in tinycss2.serialize(rule.prelude).replace('"', "").split(",")
        for item in tinycss2.parse_blocks_contents(rule.content)
        if item.type == "declaration"
    ]


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, 1 to 21 (WCAG 2.2)."""

    def luminance(colour: str) -> float:
        linear = [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
            for part in tinycss2.color3.parse_color(colour)[:3]
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


WORDS = ("text-base", "text-muted", "heading", "link", "link-higher-contrast", "inline-code")
ENOUGH = 4.5  # for text of normal size (WCAG 2.2, AA)


def faint_text(folder: Path) -> list[str]:
    """Colours of text, of code, and those written into pages, that stand out too little from what is behind them."""
    sheets = ("styles/pydata-sphinx-theme.css", "book.css")  # what the second says counts
    theme = [item for sheet in sheets for item in declarations(folder / "_static" / sheet)]
    code = declarations(folder / "_static" / "pygments.css")
    wrong = []
    for look in ("light", "dark"):
        root = f"html[data-theme={look}]"
        named = {name: value for selector, name, value in theme if selector in (":root", root) and name[:2] == "--"}

        def colour(value: str, named: dict[str, str] = named) -> str:
            while found := re.fullmatch(r"var\((--[\w-]+)\)", value):
                value = named[found[1]]
            return value

        behind = [colour(f"var(--pst-color-{name})") for name in ("background", "surface")]
        front = {name: colour(f"var(--pst-color-{name})") for name in WORDS}
        front |= {s: value for s, name, value in code if s.startswith(f"{root} .highlight .") and name == "color"}
        wrong += [
            f"{look}: {name} {value} on {ground}, {contrast(value, ground):.2f}"
            for name, value in front.items()
            for ground in behind
            if value != "inherit" and contrast(value, ground) < ENOUGH
        ]
    for path, page in pages(folder).items():
        for tag in page.find_all(style=re.compile(r"color\s*:")):
            style = {item.name: tinycss2.serialize(item.value).strip() for item in _style(tag["style"])}
            front, ground = style.get("color"), style.get("background-color")
            if front and contrast(front, ground or "white") < ENOUGH:
                wrong.append(f"{path.relative_to(folder)}: {tag['style']}")
    return wrong


def _style(text: str) -> list:
    return [item for item in tinycss2.parse_blocks_contents(text) if item.type == "declaration"]


# --- the site -------------------------------------------------------------------------------------------


def built(folder: Path, *options: str) -> Path:
    command = [sys.executable, ROOT / "docs" / "build.py", folder, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "html"


@pytest.fixture(scope="module")
def whole_site(tmp_path_factory) -> Path:
    return built(tmp_path_factory.mktemp("book"))


@pytest.fixture(scope="module")
def draft(tmp_path_factory) -> Path:
    return built(tmp_path_factory.mktemp("draft"), "--draft")


@pytest.fixture(params=["draft", pytest.param("whole_site", marks=pytest.mark.full)])
def site(request) -> Path:
    return request.getfixturevalue(request.param)


@pytest.mark.slow
@pytest.mark.parametrize(
    "check", [broken_links, wordless_pictures, headings_out_of_order, fetched_from_elsewhere, faint_text]
)
def test_site(site, check):
    assert check(site) == []


@pytest.mark.slow
def test_site_has_every_notebook_in_order_and_every_model_card(site):
    page = BeautifulSoup((site / "notebooks.html").read_bytes(), "html.parser")
    shown = [link["href"] for link in page.select(".gallery-card p:nth-of-type(2) a")]
    assert shown == [f"notebooks/{path.stem}.html" for path in NOTEBOOKS]
    lines = [line.text for line in page.select(".gallery-card p:nth-of-type(3)")]
    assert len(lines) == len(shown) and all(re.search(r"\w”?[.?!]$", line) for line in lines), lines
    for card in (ROOT / "data" / "models").glob("*/README.md"):
        assert (site / card.relative_to(ROOT).with_suffix(".html")).is_file()


@pytest.mark.slow
def test_site_keeps_the_alt_texts_of_notebooks_and_no_widgets(site):
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        saved = [alt for cell in cells if cell.cell_type == "code" for _, alt in notebooks.pictures(cell)]
        page = BeautifulSoup((site / "notebooks" / f"{path.stem}.html").read_bytes(), "html.parser")
        shown = [picture["alt"] for picture in page.find_all("img")]
        assert [alt for alt in saved if alt not in shown] == []
        assert "vnd.jupyter.widget" not in str(page) and "it/s]" not in page.text


@pytest.mark.full
def test_reference_shows_every_public_function(whole_site):
    page = BeautifulSoup((whole_site / "api" / "neurons.search.html").read_bytes(), "html.parser")
    entry = page.find(id="coneslab.neurons.search.find_concept_neurons")
    assert "threshold_quantile" in entry.text
    about = entry.find_next_sibling("dd")
    assert [strong.text for strong in about.find_all("strong")][:2] == ["subject", "prior"]
    assert about.find("a", href="https://arxiv.org/abs/2303.05125")
    assert "θ_j ∂L_con/∂θ_j > τ" in about.text


# --- each check on something broken -------------------------------------------------------------------


def write(folder: Path, body: str, name: str = "page.html") -> Path:
    (folder / name).write_text(f"<!doctype html><title>x</title><body>{body}</body>", encoding="utf-8")
    return folder


@pytest.mark.parametrize("link", ["gone.html", "page.html#gone", "#gone", "../page.html"])
def test_broken_links_are_found(tmp_path, link):
    good = '<a href="#here" id="here">a</a> <a href="page.html#here">b</a> <a href="https://arxiv.org/x">c</a>'
    assert broken_links(write(tmp_path, good)) == []
    assert broken_links(write(tmp_path, f'{good} <a href="{link}">d</a>')) == [f"page.html: {link}"]


def test_missing_pictures_are_found(tmp_path):
    assert broken_links(write(tmp_path, '<img src="gone.png" alt="a cat">')) == ["page.html: gone.png"]


@pytest.mark.parametrize("alt", ["", 'alt=""', 'alt=" "'])
def test_pictures_without_words_are_found(tmp_path, alt):
    assert wordless_pictures(write(tmp_path, '<img alt="a cat" src="data:,">')) == []
    assert len(wordless_pictures(write(tmp_path, f'<img {alt} src="data:,">'))) == 1


@pytest.mark.parametrize("levels", ["", "2", "11", "13", "1224"])
def test_headings_out_of_order_are_found(tmp_path, levels):
    assert headings_out_of_order(write(tmp_path, "<h1>a</h1><h2>b</h2><h3>c</h3><h2>d</h2>")) == []
    assert headings_out_of_order(write(tmp_path, "".join(f"<h{n}>x</h{n}>" for n in levels)))


@pytest.mark.parametrize(
    "body",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/x.css">',
        '<img alt="x" src="http://pictures.example/x.png">',
    ],
)
def test_what_is_fetched_from_elsewhere_is_found(tmp_path, body):
    assert fetched_from_elsewhere(write(tmp_path, '<a href="https://arxiv.org">a</a><img alt="x" src="x.png">')) == []
    assert len(fetched_from_elsewhere(write(tmp_path, body))) == 1


def test_fonts_from_elsewhere_are_found(tmp_path):
    (tmp_path / "x.css").write_text("@font-face { src: url('https://fonts.example/x.woff2') }")
    assert len(fetched_from_elsewhere(tmp_path)) == 1


def styles(folder: Path, *, text: str = "#222", code: str = "#7928a1") -> Path:
    names = [f"--pst-color-{name}: {text};" for name in WORDS]
    look = "html[data-theme={}] { --pst-color-background: %s; --pst-color-surface: %s; {} }"
    sheet = folder / "_static" / "styles" / "pydata-sphinx-theme.css"
    sheet.parent.mkdir(parents=True, exist_ok=True)
    light = look.replace("%s", "#fff").replace("{}", "light", 1).replace("{}", " ".join(names))
    dark = look.replace("%s", "#000").replace("{}", "dark", 1).replace("{}", " ".join(names).replace(text, "#fff"))
    sheet.write_text(light + dark)
    (folder / "_static" / "book.css").touch()
    (folder / "_static" / "pygments.css").write_text(f'html[data-theme="light"] .highlight .k {{ color: {code} }}')
    return folder


def test_faint_text_is_found(tmp_path):
    assert contrast("#000", "#fff") == pytest.approx(21)
    assert contrast("#777", "#fff") == pytest.approx(4.48, abs=0.01)  # the well-known grey that just fails
    assert faint_text(styles(tmp_path)) == []
    assert len(faint_text(styles(tmp_path, text="#aaa"))) == 2 * len(WORDS)
    assert len(faint_text(styles(tmp_path, code="#ff8080"))) == 2
    styles(write(tmp_path, '<td style="background-color: #ffff00; color: #f1f1f1">0.5</td>'))
    assert len(faint_text(tmp_path)) == 1


# --- what the pages are made of -------------------------------------------------------------------------


def test_notebooks_lose_what_only_a_kernel_can_use(tmp_path):
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}
    bar = nbformat.v4.new_output("display_data", {**widget, "text/plain": "x:   0%|          | 0/5 [00:00<?, ?it/s]"})
    view = nbformat.v4.new_output("display_data", {**widget, "text/plain": "(Sliders appear here.)"})
    picture = nbformat.v4.new_output("display_data", {"image/png": "iVBORw0KGgo=", "text/plain": "<PIL.Image>"})
    links = "[there](00_x.ipynb), [to come](07_y.ipynb), [wrong](00_z.ipynb), [below](#end)"
    cells = [
        nbformat.v4.new_markdown_cell(f"# X\n\n{links}"),
        nbformat.v4.new_code_cell("import this"),
        nbformat.v4.new_code_cell("a = 1\ndraw('cat')", outputs=[bar, view, picture]),
    ]
    path = tmp_path / "00_x.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"widgets": {}}), path)
    text, set_up, shown = nbformat.reads(notebooks.cleaned(path), as_version=4).cells
    assert text.source.endswith('[there](00_x.ipynb), to come, [wrong](00_z.ipynb), <a href="#end">below</a>')
    assert "hide-input" in set_up.metadata.tags
    assert [dict(output.data) for output in shown.outputs[:1]] == [{"text/plain": "(Sliders appear here.)"}]
    (image,) = BeautifulSoup(shown.outputs[1].data["text/html"], "html.parser").find_all("img")
    assert image["alt"] == "The picture that this cell shows: draw('cat')"


CITED = re.compile(r"\[\d\d[a-z]?, [^]]+\]\((notebooks/\w+\.ipynb)#[\w-]+\),\s+the\s+cell\s+with\s+`([^`]+)`")


@pytest.mark.slow
def test_the_cells_that_instructors_are_sent_to_are_there():
    guide = (ROOT / "docs" / "instructors.md").read_text(encoding="utf-8")
    cited = CITED.findall(guide)
    assert len(cited) == len(re.findall(r"the\s+cell\s+with\s+`", guide)) >= 10
    for name, words in cited:
        cells = nbformat.read(ROOT / name, as_version=4).cells
        found = [cell.id for cell in cells if cell.cell_type == "code" and words in cell.source]
        assert len(found) == 1, f"{name}: `{words}` is in {found}"


def test_the_glossary_is_in_the_order_of_the_alphabet():
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"(?m)^(\w[^\n]*)\n  \S", text)
    assert len(terms) > 40 and terms == sorted(terms, key=str.lower)


def test_the_reference_lists_every_module_and_no_other():
    text = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    groups = re.findall(r"(?m)^```\{modules\}\n([^`]+)```$", text)
    listed = [f"coneslab.{name}" for group in groups for name in group.split()]
    assert sorted(listed) == sorted(prose.modules())


def test_the_overview_is_as_drawn():
    assert overview.FILE.read_text(encoding="utf-8") == overview.svg(), "run: python docs/overview.py"


def test_running_times_are_those_of_the_set_up_cells():
    table = hosts.running_times(NOTEBOOKS)
    assert table.count(" min |") == len(NOTEBOOKS)
    source = next(c.source for c in nbformat.read(NOTEBOOKS[0], as_version=4).cells if c.cell_type == "code")
    assert f"[{NOTEBOOKS[0].stem}](notebooks/{NOTEBOOKS[0].name}) | {hosts.minutes_of(source):g} min |" in table


def test_docstrings_become_what_they_say():
    text = "Shut V* |θ|_j.\n\nscale: s in `scale`, see `plots.show` and `search.py`.\nRaises MaskError.\n\n    x = f(1)"
    assert prose.to_rst(text, frozenset({"scale"})).split("\n\n") == [
        r"Shut V\* \|θ\|\_j.",
        "**scale**: s in ``scale``, see :py:obj:`plots.show <coneslab.show.plots.frame.show>` and "
        ":py:mod:`search.py <coneslab.neurons.search>`.",
        "Raises :py:exc:`MaskError <coneslab.errors.MaskError>`.",
        "::",
        "    x = f(1)",
    ]


def test_defaults_are_shown_as_written_and_no_path_of_the_machine():
    def plain(folder=ROOT, *, seed=0):
        pass

    def says_so_itself(folder=ROOT, **settings):
        pass

    says_so_itself.__signature__ = inspect.signature(plain)
    for function in (plain, says_so_itself):
        prose.defaults_as_written(None, function, False)
    assert str(inspect.signature(plain)) == "(folder=ROOT, *, seed=0)"


def test_a_table_of_methods_joins_when_it_is_there(tmp_path):
    path = tmp_path / "methods.csv"
    assert "coneslab compare" in tables.methods(path) and "0." not in tables.methods(path)
    rows = [
        f"{subject},{method},{seed},1,{measure},{value}"
        for subject, more in zip(("cat", "dog", "car", "cow", "bus", "elf"), (0.0, 0.2) * 3, strict=True)
        for method, value in (("mine", 0.4 + more), ("theirs", 0.1 + more))
        for seed in (0, 1)
        for measure in ("text alignment", "image alignment")
    ]
    path.write_text("subject,condition,seed,count,measure,value\n" + "\n".join([*rows, "fox,mine,0,1,,"]) + "\n")
    shown = tables.methods(path)
    assert "| mine | 0.500 / 0.500 |" in shown and "| theirs | 0.200 / 0.200 |" in shown
    mean = "0.500 [0.433,\N{NO-BREAK SPACE}0.567]"
    assert "6 subjects, 2 seeds" in shown and f"| mine | {mean} | {mean} |" in shown
    table = tables.read(path)
    assert tables.size(table[(table.subject != "cat") | (table.seed == 0)]) == "6 subjects, 1 to 2 seeds"
    assert tables.size(table[(table.subject == "cat") & (table.seed == 0)]) == "1 subject, 1 seed"


def test_pictures_of_several_subjects_are_summed_up_by_their_number():
    rows = [
        {"subject": title, "condition": "union", "seed": 0, "count": count, "measure": measure, "value": value}
        for title, count in (("a+b", 2), ("b+c", 2), ("a+b+c", 3))
        for measure, value in (("nearness", 0.25 * count), (f"near {title[0]}", 0.9), ("bytes", 4000.0 * count))
    ]
    two, first, three, second = tables.by_count(pandas.DataFrame(rows))
    assert two == "2 subjects in a picture, 2 combinations:" and three.startswith("3 subjects")
    one, _ = tables.by_count(pandas.DataFrame([{**rows[0], "subject": "a", "count": 1}]))
    assert one == "One subject in a picture, 1 of them:"
    assert "| 0.500 | 8,000 |" in first and "near a" not in first + two  # two combinations: no interval
    assert "| 0.750 |" in second
    for value, as_text in ((0.00012, "1.2e−04"), (-3e-8, "0.000"), (-0.25, "−0.250"), (4e6, "4,000,000")):
        (_, shown) = tables.by_count(pandas.DataFrame([{**rows[0], "value": value}]))
        assert f"| {as_text} |" in shown
    many = [{**rows[0], "subject": f"{name}+z", "value": 0.25 + number / 10} for number, name in enumerate("abcdef")]
    (_, whole) = tables.by_count(pandas.DataFrame(many))
    assert "| 0.500 [0." in whole


def test_the_table_of_the_page_in_the_browser_joins_when_it_is_there(tmp_path):
    path = tmp_path / "browser.csv"
    assert "has not been made yet" in tables.browser(path)
    path.write_text('what,median,worst\n"first picture, s",2.345678,3.5\n"over the wire, bytes",1234567.0,\n')
    assert tables.browser(path).splitlines()[2:] == [
        "| first picture, s | 2.35 | 3.5 |",
        "| over the wire, bytes | 1,234,567 |  |",
    ]


@pytest.mark.slow
def test_the_readme_shows_the_table_of_controls_as_it_is():
    shown = tables.at_a_glance(ROOT / "data" / "results" / "concept_neurons.csv")
    assert shown in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.slow
def test_the_readme_shows_the_table_of_ablations_as_it_is():
    shown = tables.ablated_at_a_glance(ROOT / "data" / "results" / "ablation.csv")
    assert shown in (ROOT / "README.md").read_text("utf-8")


def test_tables_of_kinds_and_of_so_many_concepts_are_summed_up_apart():
    row = {"seed": 0, "condition": "a", "measure": "m", "value": 0.5}
    kinds = pandas.DataFrame([{**row, "subject": name, "kind": name[:5]} for name in ("style:flat", "objec:cat")])
    assert tables.by_count(kinds)[::2] == ["Style, 1 of this kind:", "Objec, 1 of this kind:"]
    sizes = pandas.DataFrame([{**row, "subject": str(number), "count": number} for number in (1, 20)])
    assert tables.by_count(sizes)[::2] == ["1 concept:", "20 concepts:"]


def test_gains_have_a_sign_and_nothing_is_less_than_nothing():
    assert tables.gain(0.214, -0.138, 0.281) == "+0.21 [−0.14, +0.28]"
    assert tables.gain(-0.001, -0.004, 0.004) == "+0.00 [+0.00, +0.00]"


def test_near_and_far_subjects_are_summed_up_apart():
    rows = [
        {"subject": name, "seed": 0, "condition": "a", "measure": "m", "value": value}
        for name, value in {"tom": 0.25, "spot": 0.25, "cat": 0.75, "dog": 0.75}.items()
    ]
    near, first, far, second = tables.by_count(pandas.DataFrame(rows))
    assert "2 subjects" in near and "| a | 0.250 |" in first and "never seen" in far and "| a | 0.750 |" in second
    assert len(tables.by_count(pandas.DataFrame(rows[:2]))) == 1


def test_a_summary_is_read_without_scrolling_and_without_empty_columns():
    measures = [f"{name}, {group}" for group in ("target", "far") for name in ("score", "KID")]
    measures += ["seconds", *(f"comes back: probe {number}" for number in range(8))]
    rows = [("untouched", one) for one in measures] + [("edited", one) for one in measures if one != "seconds"]
    rows += [("random", "overlap")]
    columns = ["condition", "measure"]
    made = [
        pandas.DataFrame(rows, columns=columns).assign(subject=f"s{i}", seed=0, value=0.25 + i / 8) for i in range(5)
    ]
    whole = pandas.concat(made)
    shown = tables.summary(whole).split("\n\n")
    titles, grids = [one for one in shown if "|" not in one], [one.splitlines() for one in shown if "|" in one]
    heads = [[cell.strip() for cell in grid[0].strip("|").split("|")][1:] for grid in grids]
    probes = [f"probe {number}" for number in range(8)]
    assert heads == [["score", "KID"], ["score", "KID"], ["seconds"], probes[:4], probes[4:], ["overlap"]]
    assert titles == ["Target:", "Far:", "Comes back:", "Comes back:"]
    assert [len(grid) - 2 for grid in grids] == [2, 2, 1, 2, 2, 1]
    text = "\n".join(shown)
    assert text.count("0.500 [") == len(rows) and ", 0." not in text, "an interval is not broken"
    few = whole[whole.measure.isin(["score, target", "KID, target", "seconds"])]
    (one,) = tables.summary(few).split("\n\n")
    assert one.startswith("| condition | score, target | KID, target | seconds |") and one.count("\n") == 3


def test_a_lecture_links_to_states_of_the_page():
    shown = {stem: playground.links(stem) for stem in (path.stem for path in NOTEBOOKS)}
    assert {stem[:2] for stem, line in shown.items() if line} == {"00", "03", "05", "07"}
    assert 'href="../playground/index.html#prompt=a+sks+cat+and+a+vqz+car' in shown["05_concatenating_concepts"]
    cells = nbformat.reads(notebooks.cleaned(NOTEBOOKS[0], shown["00_tour"]), as_version=4).cells
    assert cells[1].source == shown["00_tour"] and cells[0].source.startswith("# ")


def test_evaluations_are_shown_as_they_were_saved():
    for path in (ROOT / "data" / "results").glob("evaluation_*.json"):
        shown = tables.evaluation(path).splitlines()
        shares = json.loads(path.read_text(encoding="utf-8"))["shares"]
        assert len(shown) == len(shares) + 2
        assert f"{shares[0]['estimate']:.3f} [{shares[0]['low']:.3f}, " in shown[2]
