"""The coursework: checks that explain themselves, and every assignment graded by nbgrader, solved and unsolved."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from coneslab.coursework import check, check_range

ROOT = Path(__file__).resolve().parent.parent
COURSEWORK = ROOT / "coursework"
ASSIGNMENTS = sorted(path.parent.name for path in (COURSEWORK / "source").glob("*/*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"].removesuffix("/")
MARKS = re.compile(r"(BEGIN|END) (SOLUTION|HIDDEN TESTS)")

# --- the checks -----------------------------------------------------------------------------------------


def message(*arguments, function=check, **options) -> str:
    with pytest.raises(AssertionError) as raised:
        function("the dose", *arguments, **options)
    return str(raised.value)


def test_right_answers_pass_and_say_so(capsys):
    check("a number", np.float32(0.1), 0.1, tolerance=1e-6)
    check("a tensor", torch.ones(3, requires_grad=True), [1, 1, 1])
    check("half precision", torch.ones(3, dtype=torch.bfloat16), np.ones(3))
    check("a mask", torch.tensor([True, False]), [True, False])
    check("large and small", [1e9 + 1, 1e-9], [1e9, 1e-9], relative=1e-8)
    check("infinity", [np.inf, 0.0], [np.inf, 0.0], tolerance=1e-6)
    check("a set", {"dog", "cat"}, {"cat", "dog"})
    check("a word", "colour", "colour")
    check("nothing", None, None)
    check_range("a share", torch.tensor([0.5]), 0.5, 0.6)
    assert capsys.readouterr().out.splitlines()[-1] == "a share: right"


def test_a_wrong_answer_is_shown_beside_the_right_one_with_the_hint():
    assert message(1.25, 1.5, hint="solve for d").splitlines() == [
        "the dose: not yet right",
        "  got:      1.25",
        "  expected: 1.5",
        "  hint:     solve for d",
    ]
    assert "hint" not in message([1, 2], [1, 3])
    assert message("outline", "colour").splitlines()[1:] == ["  got:      'outline'", "  expected: 'colour'"]
    assert "one number from 0 to 1" in message(1.01, 0, 1, function=check_range)


def test_of_a_long_array_the_worst_entry_is_shown():
    expected = np.zeros((20, 30))
    got = expected.copy()
    got[3, 4], got[5, 6] = 0.5, -2.0
    lines = message(got, expected, tolerance=0.1).splitlines()
    assert lines[1:] == ["  got:      -2 at [5, 6], the worst; 2 of 600 entries wrong", "  expected: 0 at [5, 6]"]
    got[7, 8] = np.nan
    assert "nan at [7, 8]" in message(got, expected)


@pytest.mark.parametrize(
    ("got", "said"),
    [
        (None, "does the function return"),
        ("1.5", "'1.5'"),
        ([1.0, [2.0]], "[1.0, [2.0]]"),
        (torch.zeros(2, 4), "numbers of shape (2, 4)"),
        (np.nan, "nan"),
        (2, "got:      one number: 2"),
    ],
)
def test_an_answer_of_another_kind_is_said_to_be_one(got, said):
    assert said in message(got, [0.0, 0.0, 0.0] if not isinstance(got, float) else 0.0)


def test_an_array_is_no_word_and_a_word_is_in_no_range():
    assert "expected: 'colour'" in message(np.zeros(3), "colour")
    for got in (None, "half", [0.1, 0.2], np.nan):
        message(got, 0, 1, function=check_range)


# --- the assignments ------------------------------------------------------------------------------------


def cells(path: Path) -> list[nbformat.NotebookNode]:
    return nbformat.read(path, as_version=4).cells


def source(name: str) -> Path:
    return COURSEWORK / "source" / name / f"{name}.ipynb"


def about(cell: nbformat.NotebookNode) -> nbformat.NotebookNode:
    return cell.metadata.nbgrader


def test_there_are_assignments():
    assert ASSIGNMENTS


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_an_assignment_belongs_to_a_lecture_that_points_to_it(name):
    lecture = ROOT / "notebooks" / f"{name}.ipynb"
    exercises = [cell.source for cell in cells(lecture) if "Exercises" in cell.source]
    assert any(f"{REPOSITORY}#coursework" in text for text in exercises), "link to the README in the Exercises section"
    assert not any(MARKS.search(cell.source) for cell in cells(lecture))
    assert f"{REPOSITORY}/blob/main/notebooks/{name}.ipynb" in cells(source(name))[0].source


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_an_assignment_is_saved_without_outputs_and_well_formed(name):
    notebook = nbformat.read(source(name), as_version=4)
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]
    graded = [cell for cell in notebook.cells if about(cell).grade]
    assert len(graded) >= 3 and all(about(cell).points > 0 and about(cell).locked for cell in graded)
    told = int(re.search(r"(\d+) points", notebook.cells[0].source)[1])
    assert told == sum(about(cell).points for cell in graded)
    for cell in notebook.cells:
        wanted = "SOLUTION" if about(cell).solution else "HIDDEN TESTS" if about(cell).grade else None
        assert {what for _, what in MARKS.findall(cell.source)} <= {wanted}, cell.id
        assert not about(cell).solution or "### BEGIN SOLUTION" in cell.source, cell.id
        assert max(map(len, cell.source.splitlines())) <= 120, cell.id


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_a_text_above_the_answer_says_what_to_call_it(name):
    told = ""
    for cell in cells(source(name)):
        if cell.cell_type == "markdown":
            told = cell.source
        elif about(cell).solution:
            for node in ast.parse(cell.source).body:
                called = [each.id for each in node.targets] if isinstance(node, ast.Assign) else [node.name]
                assert all(f"`{each}`" in told for each in called), called


def filled_in(release: Path, solved: Path) -> nbformat.NotebookNode:
    """What a student hands in who knows everything: the version given out, with the solutions put in."""
    notebook = nbformat.read(release, as_version=4)
    answers = {about(cell).grade_id: cell.source for cell in cells(solved) if about(cell).solution}
    for cell in notebook.cells:
        if about(cell).solution:
            cell.source = re.sub(r"(?m)^ *### (BEGIN|END) SOLUTION\n?", "", answers[about(cell).grade_id])
    return notebook


def failed(path: Path, *, answers: bool) -> list[str]:
    """The cells of a graded notebook that stopped with an error: answers and their checks, or all others."""
    return [
        f"{about(cell).grade_id}: {output.ename}: {output.evalue}"
        for cell in cells(path)
        for output in cell.get("outputs", [])
        if output.output_type == "error" and (about(cell).grade or about(cell).solution) == answers
    ]


@pytest.fixture(scope="module")
def nbgrader(tmp_path_factory):
    """A course folder with the sources, and a function that runs nbgrader in it."""
    pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install -c constraints.txt -e '.[test]'")
    folder = tmp_path_factory.mktemp("coursework")
    course = shutil.copytree(COURSEWORK, folder / "course")
    own = {"JUPYTER_CONFIG_DIR": str(folder / "jupyter"), "IPYTHONDIR": str(folder / "ipython")}
    own["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])  # nbgrader calls alembic by name
    environment = os.environ | own | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "MPLBACKEND": "Agg"}

    def run(*arguments: str) -> Path:
        command = [sys.executable, "-m", "nbgrader", *arguments]
        done = subprocess.run(command, cwd=course, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return course

    return run


GRADED_FIRST = "01b_training_from_scratch"  # the others in `make test-all`


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] if name != GRADED_FIRST else []) for name in ASSIGNMENTS]
)
def test_solved_earns_every_point_and_unsolved_none(name, nbgrader):
    from nbgrader.api import Gradebook

    course = nbgrader("generate_assignment", name)
    release = course / "release" / name / f"{name}.ipynb"
    assert not MARKS.search(release.read_text(encoding="utf-8"))
    for student in ("solved", "unsolved"):
        submission = course / "submitted" / student / name / f"{name}.ipynb"
        submission.parent.mkdir(parents=True)
        handed_in = filled_in(release, source(name)) if student == "solved" else nbformat.read(release, as_version=4)
        nbformat.write(handed_in, submission)
    nbgrader("autograde", name)
    graded = {student: course / "autograded" / student / name / f"{name}.ipynb" for student in ("solved", "unsolved")}
    assert not failed(graded["solved"], answers=True) + failed(graded["solved"], answers=False)
    assert not failed(graded["unsolved"], answers=False), "what is given must run without any answer"
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as book:
        points = {student: book.find_submission(name, student) for student in graded}
        assert points["solved"].score == points["solved"].max_score > 0
        earned = {grade.name: grade.score for grade in points["unsolved"].notebooks[0].grades if grade.score}
        assert not earned and not points["unsolved"].needs_manual_grade
