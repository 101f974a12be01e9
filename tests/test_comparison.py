"""Grids of cells: nothing lost or repeated after a kill, and summaries against direct computation."""

import numpy as np
import pandas
import pytest

from coneslab.errors import ConeslabError
from coneslab.experiments.table import equivalence, run_cells, summarise

CELLS = [{"subject": name, "seed": seed} for name in ("cat", "dog") for seed in range(3)]


def rows_of(subject: str, seed: int) -> list[dict]:
    value = seed + (10 if subject == "dog" else 0)
    return [
        {"condition": name, "measure": "m", "value": value + extra, "density": 0.1, "seconds": 1.0}
        for name, extra in (("a", 0.0), ("b", 0.5))
    ]


def test_a_killed_run_goes_on_without_losing_or_doubling(tmp_path):
    path, calls = tmp_path / "table.csv", []

    def measure(**cell):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(cell)
        return rows_of(**cell)

    with pytest.raises(KeyboardInterrupt):
        run_cells(CELLS, measure, path, progress=False)
    assert len(pandas.read_csv(path)) == 6
    table = run_cells(CELLS, lambda **cell: calls.append(cell) or rows_of(**cell), path, progress=False)
    assert calls == CELLS  # each cell once, in order
    assert not table.duplicated(["subject", "seed", "condition"]).any() and len(table) == 12
    pandas.testing.assert_frame_equal(table, pandas.read_csv(path), check_dtype=False)


def test_rows_of_another_model_version_or_settings_are_not_continued(tmp_path):
    path = tmp_path / "table.csv"
    made = {"model": "0123", "version": "1.0", "options": {"rounds": 3}}
    first = run_cells(CELLS[:2], rows_of, path, identity=made, progress=False)
    assert set(first.model) == {"0123"} and set(first.options) == {'{"rounds": 3}'}
    kept = path.read_bytes()
    for other in ({"model": "0124"}, {"version": "1.1"}, {"options": {"rounds": 4}}, {"judge": "ab"}):
        for cells in (CELLS, CELLS[2:]):
            with pytest.raises(ConeslabError, match=rf"{next(iter(other))}(.|\n)* name another file"):
                run_cells(cells, rows_of, path, identity=made | other, progress=False)
            assert path.read_bytes() == kept
    assert len(run_cells(CELLS, rows_of, path, identity=made, progress=False)) == 12
    run_cells(CELLS, rows_of, tmp_path / "old.csv", progress=False)
    with pytest.raises(ConeslabError, match="does not say with what model"):
        run_cells(CELLS, rows_of, tmp_path / "old.csv", identity=made, progress=False)


def test_each_cell_may_have_an_identity_of_its_own(tmp_path):
    path = tmp_path / "table.csv"
    run_cells(CELLS, rows_of, path, identity=lambda cell: {"settings": cell["subject"]}, progress=False)
    with pytest.raises(ConeslabError, match="settings cat, not x"):
        run_cells(CELLS, rows_of, path, identity=lambda cell: {"settings": "x"}, progress=False)


@pytest.mark.parametrize(
    "values", [["007", "7", "NA", "", "1e5", "True", "nan"], [0, 1, 10**12], [0.1, 1 / 3, 1e-12, 2.0], [True, False]]
)
def test_a_cell_is_known_again_whatever_its_values(tmp_path, values):
    path, calls = tmp_path / "table.csv", []
    cells = [{"name": value, "seed": seed} for value in values for seed in (0, 1)]

    def measure(name, seed):
        calls.append((name, seed))
        return [{"measure": "m", "value": 1 / 3, "density": np.float32(0.1)}]

    table = run_cells(cells, measure, path, progress=False)
    assert len(calls) == len(cells)
    again = run_cells(cells, measure, path, progress=False)
    assert len(calls) == len(cells) and list(again.name) == list(table.name) == [cell["name"] for cell in cells]
    pandas.testing.assert_frame_equal(again, table)
    assert set(table.value) == {0.333333}


def test_rows_come_in_the_order_of_the_cells_however_they_were_made(tmp_path):
    whole = run_cells(CELLS, rows_of, tmp_path / "whole.csv", progress=False)
    run_cells(CELLS[3:5], rows_of, tmp_path / "parts.csv", progress=False)
    run_cells([CELLS[0], CELLS[0]], rows_of, tmp_path / "parts.csv", progress=False)
    parts = run_cells(CELLS, rows_of, tmp_path / "parts.csv", progress=False)
    pandas.testing.assert_frame_equal(whole, parts)
    assert (tmp_path / "whole.csv").read_bytes() == (tmp_path / "parts.csv").read_bytes()


def test_a_foreign_table_is_refused_and_kept(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("x,y\n1,2\n")
    with pytest.raises(ConeslabError, match="x, y"):
        run_cells(CELLS, rows_of, path, progress=False)
    assert path.read_text() == "x,y\n1,2\n"


def test_how_long_a_cell_took_is_no_result_of_its_own():
    rows = [{"subject": "cat", "seed": 0, "condition": "a", "measure": "m", "value": 1.0, "cell_seconds": 9.0, "n": 3}]
    assert set(summarise(pandas.DataFrame(rows)).columns) >= {"n"}
    assert "cell_seconds" not in summarise(pandas.DataFrame(rows))
    assert "subject" not in summarise(pandas.DataFrame(rows).assign(subject=20))  # of so many concepts


def test_what_is_no_share_has_none_of_its_intervals_where_it_is_0():
    rows = [
        {"subject": name, "seed": 0, "condition": condition, "measure": measure, "value": value}
        for name in "abcdef"
        for measure, values in {"seconds": (0.0, 2.5), "KID, far": (0.0, 0.5), "found": (0.0, 1.0)}.items()
        for condition, value in zip(("untouched", "mask"), values, strict=True)
    ]
    found = summarise(pandas.DataFrame(rows)).set_index(["measure", "condition"])
    assert found.loc[("seconds", "untouched"), "high"] == found.loc[("KID, far", "untouched"), "high"] == 0
    assert found.loc[("found", "untouched"), "high"] == pytest.approx(0.39, abs=0.01)  # Wilson, 0 of 6
    less = summarise(pandas.DataFrame(rows), minus="untouched").set_index("measure")
    assert less.low["seconds"] == less.high["seconds"] == 2.5 and less.low["found"] < 0.6


def test_summaries_are_means_over_subjects_and_paired_differences():
    table = pandas.DataFrame([{**cell, **row} for cell in CELLS for row in rows_of(**cell)])
    summary = summarise(table).set_index("condition")
    assert summary.loc["a", "value"] == pytest.approx(np.mean([1, 11]))
    assert np.isnan(summary.loc["a", "low"]) and summary.loc["a", "points"] == (1, 11)  # two subjects: no interval
    many = pandas.concat([table.assign(subject=table.subject + str(number)) for number in range(3)])
    summary = summarise(many).set_index("condition")
    assert summary.loc["a", "low"] < 6 < summary.loc["a", "high"] and summary.loc["a", "points"] == ()
    difference = summarise(many, minus="a").set_index("condition")
    assert list(difference.index) == ["b"] and difference.loc["b", "clusters"] == 6
    assert difference.loc["b", ["value", "low", "high"]].tolist() == pytest.approx([0.5, 0.5, 0.5])


def test_what_is_not_defined_is_left_out_of_a_summary():
    table = pandas.DataFrame([{**cell, **row} for cell in CELLS for row in rows_of(**cell)])
    nowhere = table[table.subject == "cat"].assign(subject="bow", value=np.nan)
    for minus in (None, "a"):
        summary = summarise(pandas.concat([table, nowhere]), minus=minus)
        pandas.testing.assert_frame_equal(summary, summarise(table, minus=minus))


def test_a_difference_without_its_pair_is_refused():
    table = pandas.DataFrame([{**cell, **row} for cell in CELLS for row in rows_of(**cell)])
    known = table[(table.condition != "a") | (table.seed != table.seed.max())]
    seed = table.seed.max()
    with pytest.raises(ConeslabError, match=f"'b' was measured on 'cat' with seed {seed}, and 'a' was not"):
        summarise(known, minus="a")
    with pytest.raises(ConeslabError, match="and 'nothing' was not"):
        summarise(table, minus="nothing")
    twice = pandas.concat([table, table[(table.condition == "a") & (table.subject == "cat")]])
    with pytest.raises(ConeslabError, match="'a' has 9 values of m and 6 subjects and seeds: expected one for each"):
        summarise(twice, minus="a")


def test_rows_are_paired_whatever_their_order():
    rng = np.random.default_rng(0)
    keys = [(name, seed, condition) for name in "abcdefg" for seed in range(3) for condition in ("plain", "edit")]
    table = pandas.DataFrame(keys, columns=["subject", "seed", "condition"])
    table = table.assign(measure="m", value=rng.normal(size=len(table)), density=rng.random(len(table)))
    shuffled = table.sample(frac=1, random_state=1)
    (row,) = summarise(shuffled, minus="plain").itertuples()
    wide = table.pivot(index=["subject", "seed"], columns="condition", values="value")
    each = (wide["edit"] - wide["plain"]).groupby("subject").mean()
    assert row.value == pytest.approx(each.mean()) and row.low < row.value < row.high
    assert row.density == pytest.approx(table[table.condition == "edit"].density.mean())
    few = shuffled[shuffled.subject.isin(["a", "c", "f"])]
    (row,) = summarise(few, minus="plain").itertuples()
    assert row.points == pytest.approx(tuple(each[["a", "c", "f"]]))


def test_shares_in_a_table_are_never_known_exactly():
    rows = [
        {"subject": name, "seed": seed, "condition": "a", "measure": measure, "value": 1.0}
        for name in "abcdef"
        for seed in range(2)
        for measure in ("every subject found", "comes back: img2img")
    ]
    found = summarise(pandas.DataFrame(rows))
    assert (found.high == 1).all() and (found.low < 0.7).all()


def test_equivalence_is_refused_for_fewer_than_five_subjects():
    rows = [
        {"subject": name, "seed": 0, "condition": condition, "measure": "m", "value": 0.0}
        for name in "abcd"
        for condition in ("own", "other")
    ]
    with pytest.raises(ConeslabError, match="at least 5"):
        equivalence(pandas.DataFrame(rows), minus="own", margins={"m": 0.01})


def failing(subject: str, seed: int) -> list[dict]:
    if subject == "dog" and seed == 1:
        raise ValueError("no such dog")
    return rows_of(subject, seed)


@pytest.mark.slow
@pytest.mark.parametrize("on_dask", [False, True])
def test_a_failed_cell_is_recorded_and_tried_again(tmp_path, on_dask):
    path, client = tmp_path / "table.csv", None
    if on_dask:
        from distributed import Client

        client = Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None)
    try:
        table = run_cells(CELLS, failing, path, client=client, keep_going=True, progress=False)
        (failed,) = table[table.error.notna()].to_dict("records")
        assert (failed["subject"], failed["seed"], failed["error"]) == ("dog", 1, "ValueError: no such dog")
        assert table.error.isna().sum() == 10
        with pytest.raises(ValueError, match="no such dog"):
            run_cells(CELLS, failing, path, client=client, progress=False)
        mended = run_cells(CELLS, rows_of, path, client=client, keep_going=True, progress=False)
        assert "error" not in mended or mended.error.isna().all()
        assert len(mended) == 12 and not mended.duplicated(["subject", "seed", "condition"]).any()
    finally:
        if client is not None:
            client.close()


def test_equivalence_needs_the_whole_interval_within_the_margin():
    rng = np.random.default_rng(0)
    rows = []
    for cell in [{"subject": name, "seed": seed} for name in "abcdefgh" for seed in range(3)]:
        base = rng.normal()
        kinds = (("own", 0.0, 0.0), ("near", 0.002, 0.002), ("far", 0.05, 0.002), ("noisy", 0.0, 0.1))
        for name, shift, noise in kinds:
            value = base + shift + noise * rng.normal()
            rows.append({**cell, "condition": name, "measure": "m", "value": value, "density": 0.1, "seconds": 1.0})
    tested = equivalence(pandas.DataFrame(rows), minus="own", margins={"m": 0.01}).set_index("condition")
    assert tested.equivalent.to_dict() == {"near": True, "far": False, "noisy": False}
    assert (tested.margin == 0.01).all()
