"""The house: a room imports only from floors below its own, and no module, by whatever way, imports itself.

And the page about it says the same.
"""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "coneslab"
# Ground floor first; rooms of one floor do not import each other.
FLOORS = (
    ("errors", "callback"),
    ("checks",),
    ("files", "lazy", "coursework", "settings", "seeds", "blocks"),
    ("pictures",),
    ("world", "diffusion"),
    ("edits",),
    ("measure", "finetuning"),
    ("neurons", "pretraining"),
    ("methods", "show"),
    ("experiments", "web"),
    ("cli",),
    ("__main__",),
)
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def sources(package: Path) -> dict[str, Path]:
    """Every module, by its name in the package: "world.subjects", and "world" for that room's face."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(package: Path) -> dict[str, set[str]]:
    """module -> the modules it imports, at the top, inside functions and for type checkers alone."""
    modules = sources(package)
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        here = found[module] = set()
        room = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
                here |= {name.partition(".")[2] for name in names if name.split(".")[0] == package.name}
            elif isinstance(node, ast.ImportFrom):
                named = node.module.split(".") if node.module else []
                if node.level:
                    base = [*filter(None, room[: len(room) - node.level + 1]), *named]
                elif named and named[0] == package.name:
                    base = named[1:]
                else:
                    continue
                for alias in node.names:
                    full = ".".join([*base, alias.name])
                    here.add(full if full in modules else ".".join(base))
    return {module: {other for other in others if other} for module, others in found.items() if module}


def wrong_ways(found: dict[str, set[str]]) -> list[str]:
    """Imports from the same floor or from above."""
    wrong = []
    for module, others in found.items():
        room = module.split(".")[0]
        for other in sorted(others):
            home = other.split(".")[0]
            if home != room and FLOOR_OF[home] >= FLOOR_OF[room]:
                wrong.append(f"{module} imports {other}")
    return wrong


def test_every_room_has_its_floor_and_says_what_it_is_for():
    modules = sources(PACKAGE)
    assert {name.split(".")[0] for name in modules if name} == set(FLOOR_OF)
    for name, path in modules.items():
        if name and path.name == "__init__.py":
            assert "Builds on" in path.read_text(encoding="utf-8"), name


def test_a_room_imports_only_from_floors_below():
    assert wrong_ways(imports(PACKAGE)) == []


def borrowed(source: str) -> list[str]:
    """Private names that a module imports from another."""
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom))
    names = [alias.name for node in nodes if node.module != "__future__" for alias in node.names]
    return [name for name in names if name.startswith("_") and not name.startswith("__")]


def test_a_private_name_stays_in_its_module():
    found = {name: borrowed(path.read_text(encoding="utf-8")) for name, path in sources(PACKAGE).items()}
    assert {name: names for name, names in found.items() if names} == {}
    assert borrowed("from .loss import _alpha, snr") == ["_alpha"]


def test_no_module_imports_itself_by_a_detour():
    TopologicalSorter(imports(PACKAGE)).prepare()


PAGE = PACKAGE.parent / "docs" / "how_it_hangs_together.md"


def test_the_page_has_every_room_with_what_it_builds_on():
    rooms = {room for room in FLOOR_OF if (PACKAGE / room).is_dir()}
    used: dict[str, set[str]] = {room: set() for room in rooms}
    for module, others in imports(PACKAGE).items():
        room = module.split(".")[0]
        if room in rooms:
            used[room] |= {other.split(".")[0] for other in others} & rooms - {room}
    shown: dict[str, set[str]] = {}
    for room, text in re.findall(r"(?m)^\| `(\w+)` \| .+ \| (.+) \|$", PAGE.read_text(encoding="utf-8")):
        named = set(re.findall(r"`(\w+)`", text))
        shown[room] = shown.keys() - named if text.startswith("all") else named
        assert shown[room] <= shown.keys() - {room}, f"{room} stands above a room that it builds on"
    assert shown == used


def test_files_that_the_page_and_the_guide_name_are_there():
    root = PACKAGE.parent
    for page in (PAGE, root / "CONTRIBUTING.md"):
        named = set(re.findall(r"`([\w/]+(?:\.(?:py|md|toml)|/))`", page.read_text(encoding="utf-8")))
        missing = {name for name in named if not (root / name).exists() and not (PACKAGE / name).exists()}
        assert missing <= {"NAME.py"}, page.name


@pytest.mark.parametrize(
    "line",
    [
        "from ..edits.base import load_edit",
        "from ..edits import load_edit",
        "from .. import edits",
        "from coneslab.edits import load_edit",
        "import coneslab.edits.base",
        "def late():\n    from ..edits import base",
    ],
)
def test_a_way_up_is_found_however_it_is_written(tmp_path, line):
    package = tmp_path / "coneslab"
    for room in ("edits", "world"):
        (package / room).mkdir(parents=True)
        (package / room / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "edits" / "base.py").write_text("from ..world import sample\n")
    assert wrong_ways(imports(package)) == []
    (package / "world" / "subjects.py").write_text(line + "\n")
    (found,) = wrong_ways(imports(package))
    assert found in ("world.subjects imports edits", "world.subjects imports edits.base")


def test_a_circle_is_found(tmp_path):
    package = tmp_path / "coneslab"
    (package / "world").mkdir(parents=True)
    for path in ("__init__.py", "world/__init__.py"):
        (package / path).touch()
    (package / "world" / "one.py").write_text("from .two import b\n")
    (package / "world" / "two.py").write_text("def late():\n    from . import one\n")
    with pytest.raises(CycleError):
        TopologicalSorter(imports(package)).prepare()
