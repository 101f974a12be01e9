"""The page of findings: verdicts follow from the tables, and the tables are of the shipped model."""

import sys
from functools import cache
from pathlib import Path

import numpy as np
import pandas
import pytest

from coneslab import load
from coneslab.diffusion.pipelines import pipeline_fingerprint
from coneslab.experiments.table import SHARES, read_table
from coneslab.world import CLASSES
from coneslab.world.subjects import truth

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "data" / "results"
sys.path.insert(0, str(ROOT / "docs"))

import claims  # noqa: E402
import findings  # noqa: E402


def shifted(table: pandas.DataFrame, condition: str, measure: str, by: float) -> pandas.DataFrame:
    """A table in which one condition fares better or worse than it did."""
    table = table.copy()
    table.loc[(table.condition == condition) & (table.measure == measure), "value"] += by
    return table


def verdicts(name: str, table: pandas.DataFrame) -> list[str]:
    return [finding.verdict for finding in findings.TESTED[name](table)]


@cache
def as_measured(name: str) -> tuple[pandas.DataFrame, list[str]]:
    """A table and its verdicts."""
    table = read_table(findings.table_of(name, RESULTS))
    return table, verdicts(name, table)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, number, condition, by",
    [
        ("controls", 0, "concept neurons, binary", -0.2),
        ("controls", 1, "another subject's mask", 0.1),
        ("controls", 2, "top-k |gradient|", 0.2),
        ("controls", 3, "K-V fine-tuning", 0.2),
        ("controls", 4, "at its words", -0.3),
        ("controls", 5, "values only", 0.05),
        ("precision", 0, "binary", -0.1),
        ("damage", 0, "flipped 0.02", -0.1),
        ("damage", 1, "moved 1", 0.1),
        ("parts", 0, "most-shut half", -0.1),
        ("parts", 1, "keys", 0.1),
        ("parts", 2, "densest heads", 0.2),
        ("density", 0, "concept neurons 0.998", 0.2),
        ("density", 1, "concept neurons at its words 0.998", -0.2),
        ("sharing", 0, "common to its kind", -0.1),
        ("sharing", 1, "common to its kind", 0.1),
        ("references", 0, "1 picture", -0.2),
        ("finders", 0, "straight-through", 0.1),
        ("doses", 0, "untouched model", 0.1),
        ("compare", 1, "Cones + collaborative tuning", -0.2),
        ("compare", 2, "Custom Diffusion, merged", -0.1),
        ("compare", 3, "Cones, token-local", -0.3),
    ],
)
def test_a_verdict_changes_with_its_table(name, number, condition, by):
    table, before = as_measured(name)
    assert before[number] != verdicts(name, shifted(table, condition, "image alignment", by))[number]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, number, condition, measure, by",
    [
        ("together", 0, "union", "every subject found", 0.3),
        ("together", 1, "union, 40 steps", "every subject found", -0.3),
        ("together", 2, "union, as for one subject", "every subject found", 0.4),
        ("together", 3, "union, at its words", "every subject found", 0.9),
        ("together", 4, "union, values only", "every subject found", 0.3),
        ("ablation", 0, "model-based, K-V", "comes back: plain prompt", 0.9),
        ("ablation", 1, "noise-based, K-V", "comes back: plain prompt", 0.5),
        ("ablation", 2, "model-based, embedding", "comes back: other words", -0.9),
        ("ablation", 3, "UCE", "comes back: plain prompt", 0.9),
        ("ablation", 4, "ConceptPrune", "comes back: plain prompt", -0.8),
        ("ablation", 5, "ESD", "comes back: Textual Inversion", 0.95),
        ("ablation", 6, "unlearning", "comes back: other words", 0.9),
        ("ablation", 7, "unlearning", "comes back: other words", 0.9),
        ("ablation", 8, "concept neurons, at its word", "comes back: other words", -0.9),
        ("storage", 0, "mask, binary", "bytes", 1e6),
        ("storage", 1, "mask, binary", "concept loss", 0.02),
        ("many-concepts", 0, "UCE, at once", "right class, others", 0.3),
        ("compare", 5, "Cones, token-local", "every subject found", 0.3),
    ],
)
def test_a_verdict_on_other_measures_changes_with_its_table(name, number, condition, measure, by):
    table, before = as_measured(name)
    moved = shifted(table, condition, measure, by)
    if (table[table.measure == measure].value <= 1).all():
        moved.loc[moved.measure == measure, "value"] = moved[moved.measure == measure].value.clip(0, 1)
    assert before[number] != verdicts(name, moved)[number]


@pytest.mark.parametrize(
    "number, condition, measure, by",
    [
        (0, "Conceptor", "precision at k", 0.3),
        (1, "Conceptor", "rank correlation", 0.6),
        (2, "component removed", "share after", -0.2),
        (3, "Conceptor", "blue, coefficients", 0.2),
        (4, "balanced", "likeness, hats", 0.6),
    ],
)
def test_a_verdict_on_decompositions_changes_with_its_table(number, condition, measure, by):
    table, before = as_measured("conceptor")
    after = verdicts("conceptor", shifted(table, condition, measure, by))
    changed = [old != new for old, new in zip(before, after, strict=True)]
    assert changed == [one == number for one in range(len(before))]


@pytest.mark.slow
def test_a_verdict_on_rich_classes_changes_with_its_table():
    table, before = as_measured("controls")
    moved = table.copy()
    drawings = moved.subject.map(lambda name: len(CLASSES[truth(name).class_word].drawings))
    own = moved.condition == "concept neurons, binary"
    moved.loc[own & (moved.measure == "concept loss"), "value"] -= drawings
    assert [before[6], verdicts("controls", moved)[6]] == [claims.NOT, claims.IN_PART]
    moved.loc[own & (moved.measure == "image alignment"), "value"] += drawings
    assert verdicts("controls", moved)[6] == claims.HELD


def test_a_rank_correlation_is_of_the_gain_and_its_interval_over_subjects():
    names = "abcdefgh"
    rows = [
        {"subject": name, "seed": seed, "condition": condition, "measure": "m", "value": 10 * number + gain + seed}
        for number, name in enumerate(names)
        for seed in (0, 1)
        for condition, gain in {"untouched": 0.0, "mask": -float(number)}.items()
    ]
    table = pandas.DataFrame(rows)
    found = claims.rank_correlation(dict(zip(names, range(8), strict=True)), table, "mask", "untouched", "m")
    assert (found.value, found.low, found.high) == pytest.approx((-1, -1, -1))
    mixed = dict(zip(names, (3, 1, 4, 1, 5, 9, 2, 6), strict=True))
    found = claims.rank_correlation(mixed, table, "mask", "untouched", "m")
    assert found.low < found.value < 0 < found.high and not found.below


def test_a_difference_is_paired_and_its_interval_is_over_subjects():
    rows = [
        {"subject": name, "seed": 0, "condition": condition, "measure": "m", "value": number + gain}
        for number, name in enumerate("abcdefgh")
        for condition, gain in {"untouched": 0.0, "mask": 0.25 + number / 1000}.items()
    ]
    found = claims.difference(pandas.DataFrame(rows), "mask", "untouched", "m")
    assert found.above and not found.nothing and found.value == pytest.approx(0.2535)
    assert 0.25 < found.low < found.value < found.high < 0.2571
    with pytest.raises(ValueError, match="not both of 'mask' and 'other'"):
        claims.difference(pandas.DataFrame(rows), "mask", "other", "m")


def test_no_difference_is_more_than_none_seen():
    assert claims.Difference(0.0, -0.01, 0.01).nothing
    assert not claims.Difference(0.0, -0.05, 0.05).nothing
    assert str(claims.Difference(-0.5, -0.75, 0.25)) == "−0.500 [−0.750, +0.250]"


@pytest.mark.slow
def test_every_table_was_measured_on_the_shipped_model():
    shipped = pipeline_fingerprint(load("tiny", device="cpu"))[:16]
    for path in RESULTS.glob("*.csv"):
        assert path.with_name(f"{path.name}.sha256").is_file(), path.name
        if path.name != "browser.csv":  # times of the page alone
            assert set(read_table(path).model) == {shipped}, path.name


@pytest.mark.slow
def test_the_page_has_every_claim_with_its_verdict_and_numbers():
    shown, found = findings.page(RESULTS), [one for _, one in findings.findings(RESULTS)]
    assert len(found) >= 12 and len({one.claim for one in found}) == len(found)
    for one in found:
        assert f"| {one.claim} |" in shown and one.because in shown
        assert one.verdict in (claims.HELD, claims.IN_PART, claims.NOT)
        assert np.char.isdigit(list(one.because)).any()


NO_SHARES = (  # what measures begin with that lie between 0 and 1 as well, and count no pictures
    *("text alignment", "image alignment", "concept loss", "CLIP score", "likeness", "additivity: ", "overlap "),
    *("blue, coefficients", "blue, planted", "error of shares", "density by chance"),
    *("share of the mask in it", "share of a random mask in it"),
)


def test_every_share_of_pictures_is_known_as_one():
    """Or its interval would be a bootstrap's, which at 0 and 1 has no width."""
    unknown = set()
    for path in RESULTS.glob("*.csv"):
        rows = read_table(path)
        if {"measure", "value"} <= set(rows.columns):
            bounds = rows.groupby("measure").value.agg(["min", "max"])
            unknown |= {*bounds[(bounds["min"] >= 0) & (bounds["max"] <= 1)].index}
    assert [one for one in sorted(unknown) if not one.startswith((*SHARES, *NO_SHARES))] == []
    assert [one for one in SHARES if one.startswith(NO_SHARES)] == []
