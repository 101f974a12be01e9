"""The notebooks elsewhere: one set-up cell and one address for all, a small Colab, Binder, development containers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from short_notebooks import shortened

import coneslab

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
sys.path.insert(0, str(ROOT / "docs"))

import hosts  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def first_code(path: Path) -> nbformat.NotebookNode:
    return hosts.first_code(nbformat.read(path, as_version=4))


# --- one source for all notebooks -----------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_has_the_set_up_and_the_links_that_are_written_for_it(path):
    cell = first_code(path)
    minutes = hosts.minutes_of(cell.source)
    assert minutes is not None, f"run: python docs/hosts.py --minutes N notebooks/{path.name}"
    assert cell.source == hosts.set_up(hosts.address(), minutes), "run: make hosts"
    (output,) = cell.outputs
    assert re.search(r"coneslab [\d.]+, diffusers .*, torch .*\n.*about [\d.]+ min", output.text)
    title = nbformat.read(path, as_version=4).cells[0].source
    assert hosts.links(hosts.address(), path.name) in title, "run: make hosts"


def test_readme_opens_the_tour():
    assert hosts.links(hosts.address(), "00_tour.ipynb", "the tour ") in (ROOT / "README.md").read_text("utf-8")


def test_nothing_names_another_address():
    written = ("*.*", "docs/**/*.md", "notebooks/**/*.ipynb", "data/*.md", "coursework/**/*.ipynb")
    files = [path for pattern in written for path in ROOT.glob(pattern)]
    found = {
        place
        for path in files
        if path.is_file() and path.suffix in (".md", ".toml", ".yml", ".cff", ".ipynb")
        for place in re.findall(r"https://github\.com/[\w-]+/coneslab\b", path.read_text(encoding="utf-8"))
    }
    assert found == {hosts.address()}


@pytest.fixture
def draft(tmp_path, monkeypatch) -> Path:
    """A notebook that somebody has begun, with an old set-up and something to lose."""
    monkeypatch.setattr(hosts, "printed", lambda minutes: f"about {minutes:g} min\n")
    output = nbformat.v4.new_output("stream", name="stdout", text="42\n")
    cells = [
        nbformat.v4.new_markdown_cell("# 09 · New\n\nWhat it is about.", id="title"),
        nbformat.v4.new_code_cell("import coneslab", id="old", execution_count=1),
        nbformat.v4.new_code_cell(
            "print(6 * 7)", id="kept", execution_count=2, outputs=[output], metadata={"tags": ["x"]}
        ),
    ]
    path = tmp_path / "09_new.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"widgets": {"state": {}}}), path)
    return path


def test_a_new_notebook_gets_both_and_keeps_the_rest(draft):
    kept = nbformat.read(draft, as_version=4)
    with pytest.raises(ValueError, match="09_new.ipynb does not say how long it takes: .*--minutes"):
        hosts.refresh(draft)
    assert hosts.refresh(draft, minutes=2.5)
    title, cell, other = nbformat.read(draft, as_version=4).cells
    assert title.source.split("\n\n") == ["# 09 · New", hosts.links(hosts.address(), draft.name), "What it is about."]
    assert cell.source == hosts.set_up(hosts.address(), 2.5) and "(minutes=2.5)" in cell.source
    assert (cell.id, cell.execution_count, cell.outputs[0].text) == ("old", 1, "about 2.5 min\n")
    assert other == kept.cells[2] and nbformat.read(draft, as_version=4).metadata == kept.metadata
    assert not hosts.refresh(draft), "written twice, it is the same"


def test_a_new_address_replaces_the_old_one_everywhere(draft, monkeypatch):
    hosts.refresh(draft, minutes=3)
    monkeypatch.setattr(hosts, "address", lambda: "https://github.com/someone/else")
    assert hosts.refresh(draft)
    text = draft.read_text(encoding="utf-8")
    assert "coneslab/coneslab" not in text and text.count("someone/else") == 3 and "(minutes=3)" in text


def test_texts_get_the_new_address_and_no_other_is_touched(draft, tmp_path):
    old, new = hosts.address(), "https://github.com/someone/else"
    hosts.refresh(draft, minutes=3)
    assert hosts.written_address(draft) == old
    text = (
        f"[coursework]({old}#coursework), {old}/blob/main/x, {old}-extra and https://github.com/huggingface/diffusers"
    )
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    page.write_text(text, encoding="utf-8")
    other.write_text("none", encoding="utf-8")
    assert hosts.readdress([page, other], old, new) == [page]
    assert page.read_text(encoding="utf-8") == text.replace(old, new).replace(f"{new}-extra", f"{old}-extra")
    assert hosts.readdress([page, other], old, new) == []


def test_a_notebook_without_a_title_is_refused(draft):
    notebook = nbformat.read(draft, as_version=4)
    notebook.cells[0].source = "No heading."
    nbformat.write(notebook, draft)
    with pytest.raises(ValueError, match="must begin with a heading"):
        hosts.refresh(draft, minutes=1)


# --- what the cell does, step by step -------------------------------------------------------------------

SET_UP = hosts.set_up(hosts.address(), 3)
COLAB_SHELL = "<google.colab._shell.Shell object at 0x7f0>"


class Shell:
    """Stands in for IPython's shell, and notes the magics that it is asked for."""

    def __init__(self, name: str) -> None:
        self.name, self.asked = name, []

    def __str__(self) -> str:
        return self.name

    def run_line_magic(self, magic: str, line: str) -> None:
        self.asked.append(f"{magic} {line}")


def run_set_up(shell: Shell) -> dict:
    """Run the set-up cell as IPython would in this shell; returns the names that it leaves behind."""
    found = {"get_ipython": lambda: shell}
    exec(TransformerManager().transform_cell(SET_UP), found)
    return found


def test_set_up_is_short_and_leaves_the_package_and_the_device():
    code = [line for line in SET_UP.splitlines() if line and not line.startswith("#")]
    assert len(code) <= 5, "what can be in coneslab.set_up_notebook belongs there"
    found = run_set_up(Shell("<ipykernel.zmqshell.ZMQInteractiveShell object at 0x7f0>"))
    assert found["coneslab"] is coneslab and found["device"] == ("cuda" if torch.cuda.is_available() else "cpu")


def test_set_up_installs_on_colab_alone_and_only_what_is_missing(monkeypatch):
    run_set_up(there := Shell(COLAB_SHELL))
    assert there.asked == [], "it is there already"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run_set_up(elsewhere := Shell("<ipykernel.zmqshell.ZMQInteractiveShell object at 0x7f0>"))
    assert elsewhere.asked == [], "a stranger's Python gets nothing unasked"
    run_set_up(missing := Shell(COLAB_SHELL))
    assert missing.asked == [f"pip install -q git+{hosts.address()}"]


def test_set_up_notebook_says_where_it_runs_and_for_how_long(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr("coneslab.show.notebook.bfloat16_pays", lambda device: True)
    assert coneslab.set_up_notebook(minutes=3) == "cpu"
    said = capsys.readouterr().out
    assert f"torch {torch.__version__}" in said and "(threads: 1)" in said
    assert "about 6 min" in said, "one thread takes twice as long as two"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    coneslab.set_up_notebook(minutes=3)
    assert "about 3 min" in capsys.readouterr().out, "more than two are not promised to help"
    monkeypatch.setattr("coneslab.show.notebook.bfloat16_pays", lambda device: False)
    coneslab.set_up_notebook(minutes=3)
    assert "about 6.6 min" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    assert coneslab.set_up_notebook(minutes=3) == "cuda"
    assert "on Some GPU; on two CPU cores this notebook takes about 3 min" in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_saved_with_the_cell_is_what_it_prints():
    said = hosts.printed(3)
    assert re.fullmatch(r"coneslab [\d.]+, diffusers .*, torch .*\non .*about [\d.]+ min\n", said)


@pytest.mark.slow
def test_set_up_elsewhere_without_coneslab_shows_how_to_install_it(bare, tmp_path):
    environment = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": "", "PIP_NO_INDEX": "1"}
    command = [bare / "python" / "bin" / "python", "-m", "IPython", "--colors=NoColor", "-c", SET_UP]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "No module named 'coneslab'" in said
    assert "`make lab`" in said and f"install -q git+{hosts.address()}" in said


# What Colab had in August 2026 (the pip-freeze.txt of googlecolab/backend-info). Its kernel has imported some of these
# before the first cell runs, and its pages show the widgets of ipywidgets 7 only: none of them may be replaced.
COLAB = {
    "torch": "2.11.0",
    "diffusers": "0.39.0",
    "transformers": "5.15.0",
    "accelerate": "1.14.0",
    "safetensors": "0.8.0",
    "numpy": "2.1.3",
    "scipy": "1.16.3",
    "pandas": "2.2.3",
    "pillow": "11.3.0",
    "matplotlib": "3.10.0",
    "seaborn": "0.13.2",
    "ipywidgets": "7.7.1",
    "ipython": "7.34.0",
    "tqdm": "4.67.3",
    "traitlets": "5.7.1",
    "packaging": "26.0",
}


def test_colab_keeps_what_it_has():
    lacking = set()
    for requirement in PROJECT["dependencies"]:
        name, bound = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement).groups()
        if name not in COLAB:
            lacking.add(name)
        else:
            assert [*map(int, COLAB[name].split("."))] >= [*map(int, bound.split("."))], requirement
    assert lacking == {"constriction", "dask", "distributed", "peft"}, "what else would be installed there?"


# --- Colab in small -------------------------------------------------------------------------------------

BACKEND = """
import pathlib, shutil
def build_wheel(folder, config_settings=None, metadata_directory=None):
    (wheel,) = pathlib.Path(__file__).parent.glob("*.whl")
    return pathlib.Path(shutil.copy(wheel, folder)).name
"""


def repository(folder: Path, wheel: Path) -> Path:
    """A git repository that installs as `wheel`: it stands in for the one on the network."""
    folder.mkdir()
    (folder / wheel.name).write_bytes(wheel.read_bytes())
    (folder / "backend.py").write_text(BACKEND)
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    git = ["git", "-C", folder, "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "the wheel"]):
        subprocess.run([*git, *command], check=True)
    return folder


@pytest.fixture
def bare(tmp_path) -> Path:
    """A folder with a Python in `python` that has everything that this one has, except coneslab."""
    folder = tmp_path / "bare"
    venv.create(folder / "python", symlinks=True)
    (own,) = (folder / "python").glob("lib/python*/site-packages")
    shared = folder / "shared"
    shared.mkdir()
    for entry in Path(torch.__file__).parent.parent.iterdir():
        if "coneslab" not in entry.name and entry.suffix != ".pth":
            (shared / entry.name).symlink_to(entry)
    (own / "shared.pth").write_text(f"{shared}\n")
    return folder


@pytest.fixture
def colab(wheel, bare, monkeypatch) -> Path:
    """The site-packages of a bare Python, and a Jupyter kernel in it that looks like Colab's.

    No network: whoever asks git for the address in the notebook gets the wheel.
    """
    folder = bare
    (own,) = (folder / "python").glob("lib/python*/site-packages")
    startup = folder / "ipython" / "profile_default" / "startup" / "colab.py"
    startup.parent.mkdir(parents=True)
    startup.write_text(
        "shell = get_ipython()\n"
        "shell.__class__ = type('Shell', (type(shell),), {'__module__': 'google.colab._shell'})\n"
    )
    environment = {
        "HOME": str(folder),
        "IPYTHONDIR": str(folder / "ipython"),
        "PYTHONPATH": "",
        "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_VALUE_0": hosts.address(),
        "GIT_CONFIG_KEY_0": f"url.{repository(folder / 'repository', wheel).as_uri()}.insteadOf",
        **dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9"),
    }
    kernel = folder / "jupyter" / "kernels" / "colab" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    command = [str(folder / "python" / "bin" / "python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": command, "display_name": "Colab", "language": "python", "env": environment}))
    monkeypatch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
    return own


@pytest.mark.slow
@pytest.mark.parametrize("cells", [2, pytest.param(None, marks=pytest.mark.full)])  # the set-up; all
def test_the_tour_runs_on_colab(cells, colab, tmp_path):
    notebook = shortened(nbformat.read(ROOT / "notebooks" / "00_tour.ipynb", as_version=4))
    code = [cell for cell in notebook.cells if cell.cell_type == "code"][:cells]
    notebook.cells = [*code, where := nbformat.v4.new_code_cell("print(coneslab.__file__)")]
    before = {entry.name for entry in colab.iterdir()}
    alone = tmp_path / "content"
    alone.mkdir()
    NotebookClient(notebook, timeout=600, kernel_name="colab", resources={"metadata": {"path": str(alone)}}).execute()
    said = "".join(output.text for output in code[0].outputs)
    assert re.search(r"(?m)^coneslab [\d.]+, diffusers", said), said
    assert where.outputs[0].text.strip() == str(colab / "coneslab" / "__init__.py")
    new = {entry.name for entry in colab.iterdir()} - before
    assert {name.partition("-")[0] for name in new} == {"coneslab"}, "the rest was there, and stays as it was"


# --- Binder and development containers ------------------------------------------------------------------


def test_binder_finds_one_python_and_the_checkout():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    (python,) = [entry for entry in environment["dependencies"] if re.match(r"python\b", str(entry))]
    assert re.fullmatch(r"python=3\.\d+", python), "repo2docker reads no other form, and falls back to an older Python"
    assert f"Programming Language :: Python :: {python[7:]}" in PROJECT["classifiers"]
    assert environment["dependencies"][-1]["pip"][-1] == "-e ."
    assert not [name for name in ("binder", ".binder") if (ROOT / name).exists()], "it would hide environment.yml"
    assert (ROOT / "notebooks" / hosts.FIRST).is_file()


def test_the_development_container_refers_to_what_is_there():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    version = container["image"].partition(":")[2]
    assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]
    make, target = container["postCreateCommand"].split()
    dry = subprocess.run([make, "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True)
    assert dry.returncode == 0 and "pip install -c constraints.txt -e '.[lab]'" in dry.stdout
    interpreter = container["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"]
    assert interpreter == f"${{containerWorkspaceFolder}}/{Path(target).parent}/bin/python"
    assert {str(port) for port in container["forwardPorts"]} == set(container["portsAttributes"])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for port in container["portsAttributes"].values():
        assert f"\n{port['label'].split('make ')[1]}: " in makefile
