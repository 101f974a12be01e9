"""Tables of the site, made from the files in `data/results`. A number that is in none of them is nowhere on it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coneslab.files import read_json, read_table

TIDY = {"subject", "seed", "condition", "measure", "value"}


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def plain(text: Any) -> str:
    """A name as Markdown that shows it as it is, such as <cat*>."""
    return re.sub(r"([\\`*_\[\]<>&$])", r"\\\1", " ".join(str(text).split()))


def interval(share: Mapping[str, float] | None) -> str:
    """A share with its interval, as everywhere in the project: 0.983 [0.971, 0.993]."""
    return told(share["estimate"], share["low"], share["high"], ".3f") if share else ""


def told(value: float, low: float | None, high: float | None, digits: str) -> str:
    """A number and its interval, if it has one: fewer than five subjects have none."""
    known = low is not None and high is not None and low == low
    text = f"{value:{digits}} [{low:{digits}}, {high:{digits}}]" if known else f"{value:{digits}}"
    return text.replace("-", "\N{MINUS SIGN}")


def evaluation(path: Path) -> str:
    """The shares of `coneslab evaluate-model`, from its JSON file; a column that would be empty is left out."""
    shares = read_json(path, remedy="make it again with coneslab evaluate-model")["shares"]
    columns = {
        "": [plain(share["name"]) for share in shares],
        "share": [interval(share) for share in shares],
        "on real pictures": [interval(share["real"]) for share in shares],
        "to be reached": ["" if share["bar"] is None else f"{share['bar']:g}" for share in shares],
        "reached": [{True: "yes", False: "no", None: ""}[share["met"]] for share in shares],
        "pictures": [f"{share['values']:,}" for share in shares],
    }
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    filled = {name or "what is asked": cells for name, cells in filled.items()}
    return markdown_table(list(filled), zip(*filled.values(), strict=True))


KINDS = {  # of single subjects, as `world.subjects` has them
    "near": "In a style that the model knows, with features that it knows one by one",
    "far": "In a style that it has never seen",
}


def of_kinds(table: Any) -> dict[str, Any]:
    """The rows of a table about near subjects, and those about far ones."""
    from coneslab.world.subjects import FAR, NEAR

    return {kind: table[table.subject.isin(names)] for kind, names in zip(KINDS, (NEAR, FAR), strict=True)}


AT_A_GLANCE = {  # condition of the controls -> what the README calls it
    "random mask": "as many neurons, at random",
    "another subject's mask": "another subject's neurons",
    "concept neurons, binary": "**concept neurons**, as in the paper",
    "at its words": "**concept neurons at the subject's words**, ours",
    "K-V fine-tuning": "fine-tuning all keys and values",
    "real pictures": "real pictures of the subject",
}


def at_a_glance(path: Path) -> str:
    """The controls as the README shows them: what is gained over the untouched model, near and far subjects."""
    from coneslab.experiments import summarise

    table, cells = read(path), {}
    for kind, part in {**of_kinds(table), "all": table}.items():
        for row in summarise(part[part.measure != "concept loss"], minus="untouched model").itertuples():
            cells[row.condition, row.measure, kind] = gain(row.value, row.low, row.high)
        for row in summarise(part[part.measure == "subject share"]).itertuples():
            cells[row.condition, "taken for it", kind] = percent(row.value)
    columns = [(measure, kind) for measure in ("image alignment", "taken for it") for kind in KINDS]
    rows = [
        [title, *(cells[name, *column] for column in [*columns, ("text alignment", "all")])]
        for name, title in AT_A_GLANCE.items()
    ]
    return markdown_table(["", *map(", ".join, columns), "text alignment"], rows)


ABLATED = {  # condition of the ablations -> what the README calls it
    "untouched model": "untouched model",
    "model-based, K-V": "keys and values, trained (Ablating Concepts)",
    "UCE": "keys and values, in closed form (UCE)",
    "ESD": "keys and values, trained (ESD)",
    "concept neurons": "**concept neurons**, shut",
    "concept neurons, at its word": "**concept neurons, shut at its word**, ours",
    "unlearning": "the whole U-Net unlearns, ours",
}


def ablated_at_a_glance(path: Path) -> str:
    """Objects ablated as the README shows it: whether they are gone, what else is lost, and what the probes say."""
    from coneslab.experiments import outcome, profiles, summarise

    table, cells = read(path), {}
    chosen = outcome(table[table.kind == "object"])
    for row in summarise(chosen).itertuples():
        cells[row.condition, row.measure] = told(row.value, row.low, row.high, ".2f")
    sizes = chosen[chosen.measure == "kilobytes"].groupby("condition").value.mean()
    verdicts = {name: one.verdict for name, one in profiles(table[table.kind.isin(["object", "unseen"])]).items()}
    columns = {"target still drawn": "target still drawn", "KID of others": "KID of others"}
    columns["back by training"] = "back after a little training"
    rows = [
        [title, *(cells[name, measure] for measure in columns), verdicts[name], kilobytes(sizes[name])]
        for name, title in ABLATED.items()
    ]
    rows[0] = [*rows[0][:2], "", *rows[0][3:-1], ""]
    return markdown_table(["", *columns.values(), "the probes say", "size"], rows)


def kilobytes(size: float) -> str:
    return f"{size / 1000:.1f} MB" if size >= 1000 else f"{size:.0f} kB"


def signed(value: float, low: float, high: float, digits: int) -> str:
    """A difference with its interval, such as +0.214 [−0.138, +0.281]."""
    return told(value, low, high, f"+.{digits}f")


def gain(value: float, low: float, high: float) -> str:
    """A difference with its interval to two digits, of which none is −0.00."""
    return signed(*(round(number, 2) + 0.0 for number in (value, low, high)), digits=2)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def methods(path: Path) -> str:
    """`coneslab compare`, from its CSV file: the paper's table, then single subjects with intervals."""
    if not path.exists():
        return f"This table has not been made yet. `coneslab compare` makes it, as `data/results/{path.name}`."
    from coneslab.experiments import paper_table

    table = read(path)
    shown = paper_table(table)
    columns = ["method", *("1 subject" if count == 1 else f"{count} subjects" for count in shown.columns)]
    rows = [[plain(name), *cells] for name, cells in zip(shown.index, shown.to_numpy(), strict=True)]
    parts = ["Text alignment / image alignment, means over subjects and seeds.", markdown_table(columns, rows)]
    single = table[table["count"] == 1]
    if len(single):
        parts += [f"One subject, with 95 % bootstrap intervals: {size(single)}.", summary(single)]
    return "\n\n".join(parts)


def browser(path: Path) -> str:
    """What `tests/benchmarks/bench_web.py` measured, from its CSV file."""
    if not path.exists():
        return f"This table has not been made yet: `tests/benchmarks/bench_web.py` makes `data/results/{path.name}`."
    rows = []
    for row in read_table(path).itertuples():
        digits = ",.0f" if "bytes" in row.what else ".3g"
        rows.append(
            [plain(row.what), f"{row.median:{digits}}", "" if row.worst != row.worst else f"{row.worst:{digits}}"]
        )
    return markdown_table(["what", "median", "worst"], rows)


def experiments(folder: Path) -> str:
    """Every table of `coneslab experiment` that is there, summed up; none that is not."""
    from coneslab.experiments import EXPERIMENTS

    parts = []
    for name, experiment in EXPERIMENTS.items():
        path = folder / experiment.table
        if path.exists():
            table = read(path)
            about = (experiment.measure.__doc__ or "").partition("\n")[0]
            parts.append(f"### {path.stem.replace('_', ' ').capitalize()}\n\n{about}")
            parts.append(f"Means with 95 % intervals, where there are five subjects or more: {size(table)}.")
            parts.append(f"`coneslab experiment {name}`")
            parts += by_count(table)
    return "\n\n".join(parts) or "No table has been made yet. `coneslab experiment NAME` makes them, in `data/results`."


def read(path: Path) -> Any:
    """A tidy table without the cells that failed. Raises ValueError if columns are missing."""
    table = read_table(path)
    if missing := TIDY - set(table.columns):
        raise ValueError(f"{path.name} lacks the columns {', '.join(sorted(missing))}")
    return table[table.value.notna()].astype({"subject": str})  # where the cells are so many concepts, too


def size(table: Any) -> str:
    seeds = table.groupby("subject").seed.nunique().tolist()
    most, fewest = max(seeds), f"{min(seeds)} to " if min(seeds) < max(seeds) else ""
    return f"{len(seeds)} subject{'s' * (len(seeds) > 1)}, {fewest}{most} seed{'s' * (most > 1)}"


def mean(row: Any) -> str:
    """A mean with its interval, large numbers whole; a narrow column breaks before the interval, not in it."""
    size = abs(row.value)
    digits = ",.0f" if size >= 1000 else ".1e" if 1e-6 < size < 0.0005 else ".3f"  # below that it is rounding
    numbers = [round(one, 6) + 0.0 if digits == ".3f" else one for one in (row.value, row.low, row.high)]
    return told(*numbers, digits).replace(", ", ",\N{NO-BREAK SPACE}")


def by_kind(table: Any) -> list[str]:
    """One summary, or one of the subjects near to what the model knows and one of those far from it."""
    parts = of_kinds(table)
    if any(part.empty for part in parts.values()) or sum(map(len, parts.values())) < len(table):
        return [summary(table)]
    shown = []
    for kind, part in parts.items():
        shown += [f"{KINDS[kind]}, {part.subject.nunique()} subjects:", summary(part)]
    return shown


def by_count(table: Any) -> list[str]:
    """One summary, or one for every number of subjects in a picture or of concepts, or for each kind."""
    if "count" not in table and "kind" not in table:
        return by_kind(table)
    if "kind" in table:
        return _apart(table, "kind", lambda kind, count: f"{plain(kind).capitalize()}, {count} of this kind:")
    if set(table.subject) == set(table["count"].astype(str)):  # so many concepts, whose cells have no other name
        return _apart(table, "count", lambda size, _: f"{size} concept{'s' * (size > 1)}:")
    return _apart(table, "count", _in_a_picture)


def _in_a_picture(size: int, count: int) -> str:
    pictures = "One subject in a picture" if size == 1 else f"{size} subjects in a picture"
    return f"{pictures}, {count} {'of them' if size == 1 else 'combinations'}:"


def _apart(table: Any, column: str, title: Callable[[Any, int], str]) -> list[str]:
    """A title and a summary for every value of a column; title(value, number of subjects)."""
    parts = []
    for value, part in table.groupby(column, sort=column == "count"):  # kinds as they come
        parts += [title(value, part.subject.nunique()), summary(part)]
    return parts


def summary(table: Any) -> str:
    """A row a condition, a column a measure that all subjects have, each cell a mean with its interval.

    Measures that few conditions have, of a family of their own, or more than can be read side by side have tables of
    their own.
    """
    from coneslab.experiments import summarise

    shared = table.groupby("measure").subject.transform("nunique") == table.subject.nunique()
    means = summarise(table[shared])
    cells = {(row.condition, row.measure): mean(row) for row in means.itertuples()}
    measures, every, parts = list(dict.fromkeys(means.measure)), tuple(dict.fromkeys(means.condition)), []
    had_by = {one: tuple(condition for condition in every if (condition, one) in cells) for one in measures}
    had_by = {one: own if 2 * len(own) < len(every) else every for one, own in had_by.items()}
    for (family, conditions), names in _families(measures, had_by).items():
        for some in _side_by_side(list(names)):
            found = {one: [cells.get((one, names[name]), "") for name in some] for one in conditions}
            rows = [[plain(condition), *row] for condition, row in found.items() if any(row)]
            parts += [f"{plain(family).capitalize()}:"] * bool(family)
            parts.append(markdown_table(["condition", *map(plain, some)], rows))
    return "\n\n".join(parts)


MOST = 6  # measures in a table


def _families(
    measures: Sequence[str], had_by: Mapping[str, tuple[str, ...]]
) -> dict[tuple[str, tuple[str, ...]], dict[str, str]]:
    """Measures that make one table: (family, conditions that have them) -> what a column is called -> its measure.

    Those called "family: one" are a family, and, where there are too many for one table, those called "one, family".
    """
    after = Counter(one.partition(", ")[2] for one in measures if ": " not in one)
    found: dict[tuple[str, tuple[str, ...]], dict[str, str]] = {}
    for measure in measures:
        first, colon, rest = measure.partition(": ")
        name, _, of_what = measure.partition(", ")
        if colon:
            family, column = first, rest
        elif len(measures) > MOST and after[of_what] > 1:
            family, column = of_what, name
        else:
            family, column = "", measure
        found.setdefault((family, had_by[measure]), {})[column] = measure
    return found


def _side_by_side(names: Sequence[str]) -> list[Sequence[str]]:
    """Names in parts of much the same size, none above `MOST`."""
    parts = -(-len(names) // MOST)
    return [names[len(names) * i // parts : len(names) * (i + 1) // parts] for i in range(parts)]
