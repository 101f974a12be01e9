"""The package as users get it: dependency lists that agree, a wheel that works offline away from the checkout."""

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

import coneslab
from coneslab.files import data_folder
from coneslab.lazy import attach

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REQUIREMENTS = PYPROJECT["project"]["dependencies"]
EXTRAS = PYPROJECT["project"]["optional-dependencies"]


def split(requirement: str) -> tuple[str, str]:
    """("torch", ">=2.6") from "torch>=2.6", the name normalised."""
    name, bound = re.fullmatch(r"([\w.-]+)(.*)", requirement.replace(" ", "")).groups()
    return re.sub(r"[-_.]+", "-", name).lower(), bound


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def test_conda_environment_has_the_same_dependencies():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = dict(split(entry) for entry in environment["dependencies"] if isinstance(entry, str))
    python = conda.pop("python")  # one minor version: what Binder reads (tests/test_hosts.py)
    assert numbers(python.removeprefix("=")) >= numbers(PYPROJECT["project"]["requires-python"].removeprefix(">="))
    conda.pop("pip")
    conda["torch"] = conda.pop("pytorch")  # conda-forge's name
    *by_pip, checkout = environment["dependencies"][-1]["pip"]  # what conda-forge does not have
    assert checkout == "-e ."
    assert conda | dict(map(split, by_pip)) == dict(map(split, [*REQUIREMENTS, *EXTRAS["lab"]]))


def test_constraints_pin_every_direct_dependency_within_its_range():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(split(line) for line in lines if line and not line.startswith("#"))
    extras = [entry for extra in EXTRAS.values() for entry in extra if not entry.startswith("coneslab[")]
    wanted = dict(map(split, [*REQUIREMENTS, *extras]))
    assert pins.keys() - wanted.keys() == {"jsonschema"} and not wanted.keys() - pins.keys()  # why: see there
    for name, least in wanted.items():
        assert numbers(pins[name].removeprefix("==")) >= numbers(least.removeprefix(">=")), name
    assert pins["torch"] == "==2.13.0"


@pytest.mark.slow
def test_every_import_is_declared_and_every_dependency_says_why():
    declared = {split(requirement)[0] for requirement in REQUIREMENTS}
    optional = {split(requirement)[0] for extra in ("stickers", "web") for requirement in EXTRAS[extra]}
    distributions = packages_distributions()
    for path in (ROOT / "coneslab").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            for top in {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"coneslab"}:
                owners = {split(owner)[0] for owner in distributions.get(top, [top])}
                assert owners & (declared | optional), f"{path.name} imports {top}, which pyproject.toml lacks"
    assert "torchvision" not in declared, "torchvision has no CPU build to match this torch"
    for line in (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines():
        if re.match(r'    "[\w-]+>=', line):
            assert re.search(r'",\s+# \w', line), f"say what this is for: {line}"


def test_citation_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] and citation["title"] and citation["authors"]
    assert citation["version"] == coneslab.__version__
    assert citation["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


@pytest.mark.slow
def test_wheel_carries_the_licences_of_code_and_art(installed):
    (metadata,) = installed.glob("coneslab-*.dist-info")
    carried = {path.name for path in (metadata / "licenses").rglob("*") if path.is_file()}
    assert carried == {"LICENSE"} | {path.name for path in (ROOT / "data" / "licences").iterdir()}
    assert "License-Expression: Apache-2.0 AND MIT AND CC-BY-4.0" in (metadata / "METADATA").read_text()


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel installed alone into a folder; other packages are this Python's."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", folder, wheel], check=True)
    return folder


def run_away(installed: Path, folder: Path, code: str) -> str:
    """Run code against the installed wheel, in an empty folder, without a network or a home."""
    path = [str(installed), *(entry for entry in sys.path if entry and Path(entry).resolve() != ROOT)]
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(path),
        "HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        # any attempt to reach a host fails at once
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "all_proxy": "http://127.0.0.1:9",
    }
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_wheel_holds_package_and_data_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert all(name.startswith("coneslab/") for name in names)
    assert not [name for name in names if "__pycache__" in name or name.endswith(".ipynb")]
    shipped = {name.removeprefix("coneslab/data/") for name in names if name.startswith("coneslab/data/")}
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "data"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\0")
    assert {name.removeprefix("data/") for name in tracked if name} <= shipped


@pytest.mark.slow
def test_installed_wheel_finds_its_own_data(installed, tmp_path):
    out = run_away(installed, tmp_path, "from coneslab.files import data_folder; print(data_folder())")
    assert Path(out.strip()) == installed.resolve() / "coneslab" / "data"
    assert data_folder() == ROOT / "data"


TOUR = """
import coneslab
pipe = coneslab.load("tiny")
cat = coneslab.subject("cat")
few = {"batch_size": 4, "prior_batch_size": 2, "prior_images": 2, "sampler_steps": 2}
found = coneslab.find_concept_neurons(pipe, cat, rounds=2, rate=0.5, **few)
with found.applied(pipe):
    images = coneslab.generate(pipe, cat.prompts[:2], seed=0, sampler_steps=2)
judge = coneslab.load_judge()
print(coneslab.__file__, [image.size for image in images])
print(judge.text_alignment(images, [cat.plain(prompt) for prompt in cat.prompts[:2]]))
print(judge.image_alignment(images, cat.images))
"""


@pytest.mark.slow
def test_installed_wheel_runs_the_tour_offline(installed, tmp_path):
    for model in ("tiny", "judge"):
        if not (data_folder() / "models" / model).is_dir():
            pytest.skip(f"data/models/{model} is not in this checkout yet: train it with `coneslab pretrain all`")
    lines = run_away(installed, tmp_path, TOUR).splitlines()[-3:]
    assert str(installed) in lines[0] and "(64, 64), (64, 64)" in lines[0]
    assert all(-1 <= float(line) <= 1 for line in lines[1:])


def test_a_name_with_two_homes_is_refused():
    with pytest.raises(ValueError, match="here has a name from two of its modules"):
        attach("here", {"one": ("a", "b"), "other": ("b",)})


LAZY = [
    path.parent for path in (ROOT / "coneslab").rglob("__init__.py") if "attach(" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("folder", LAZY, ids=lambda folder: folder.name)
def test_the_names_that_type_checkers_see_are_those_that_load(folder):
    package = importlib.import_module(".".join(folder.relative_to(ROOT).parts))
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {(node.module, alias.name) for node in block.body for alias in node.names}
    assert {name for _, name in seen} == set(package.__all__)
    for module, name in seen:
        assert getattr(package, name) is getattr(importlib.import_module(f".{module}", package.__name__), name)
        assert name in dir(package)
    with pytest.raises(AttributeError, match="has no attribute 'gone'"):
        package.gone  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "unneeded"),
    [
        ("import coneslab, coneslab.cli", {"torch", "numpy", "diffusers", "transformers", "matplotlib", "pandas"}),
        ("import coneslab.world", {"torch", "diffusers", "transformers"}),
        ("import coneslab; coneslab.subject('cat'), coneslab.compose", {"torch", "diffusers", "transformers"}),
        (
            "import coneslab; coneslab.generate, coneslab.find_concept_neurons, coneslab.load, coneslab.load_edit, "
            "coneslab.load_judge",
            {"diffusers", "transformers", "scipy", "pandas"},
        ),
    ],
)
def test_nothing_is_imported_before_it_is_needed(code, unneeded):
    code += f"; import sys; print(*sorted({unneeded!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
