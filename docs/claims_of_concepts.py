"""What the tables of concepts that the model knows say: taken apart, and ablated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from claims import MARGIN, Difference, Finding, difference, estimate, verdict
from result_tables import signed, size

HALF = 0.5  # of the pictures: what eight targets can tell, since 0 of 8 may be 0.32
KID, SYNONYMS, TAUGHT = "KID of others", "comes back: other words", "comes back: Textual Inversion"
AT_ITS_WORD = "concept neurons, at its word"


def of_conceptor(table: Any) -> Iterator[Finding]:
    """What can be trusted in a decomposition: which words, how much of each, what they draw, and a bias."""
    from coneslab import bootstrap_interval

    def over(control: str, measure: str) -> Difference:
        return difference(table, "Conceptor", control, measure)

    controls = "random words", "nearest words"
    named = {control: [over(control, one) for one in ("precision at k", "recall at 10")] for control in controls}
    right = estimate(table, "Conceptor", "precision at k")
    yield Finding(
        "A decomposition names what a concept is made of.",
        "Conceptor, Sec. 4",
        verdict([each.above for both in named.values() for each in both]),
        f"Of its first k words, for k components, {right.value:.2f} [{right.low:.2f}, {right.high:.2f}] name one. "
        "Precision at k and recall at ten words, over "
        + "; ".join(f"{control} {precision} and {recall}" for control, (precision, recall) in named.items())
        + f" ({size(table)}). By component, among the first k, it finds "
        f"{over('nearest words', 'recall at k')} more than the nearest words.",
    )
    order = estimate(table, "Conceptor", "rank correlation")
    ordered = table[(table.measure == "rank correlation") & table.value.notna()].subject.unique()
    shares = difference(table, "Conceptor", "random words", "error of shares", ordered)
    eight = table[table.subject.isin(table[table.condition == "random start"].subject)]
    start = estimate(eight, "random start", "rank correlation")
    gain = difference(eight, "random start", "Conceptor", "rank correlation")
    yield Finding(
        "The coefficients say how much of each component there is.",
        "ours",
        verdict([order.low > 0, shares.below]),
        f"Rank correlation with the planted shares {signed(order.value, order.low, order.high, digits=2)} "
        f"({order.clusters} concepts); the error of the shares over that of equal shares for all {shares}. Begun at "
        f"random, as in the paper, at ten times the rate, the rank correlation is {start.value:.2f}: {gain} over our "
        f"start on the same {start.clusters} concepts, from one seed.",
    )
    fell = table[table.condition == "component removed"].pivot_table(
        index=["kind", "subject", "component"], columns="measure", values="value"
    )
    fell = (fell["share after"] - fell["share before"]).groupby(["kind", "subject"]).mean().reset_index(name="fell")
    parts, hats = fell[fell.kind != "profession"].fell, fell[fell.kind == "profession"].fell
    gone = bootstrap_interval(parts.to_numpy())
    changed = ", ".join(f"{value:+.2f}".replace("-", "−") for value in hats)
    yield Finding(
        "What is taken out of the sum leaves the pictures.",
        "Conceptor, Sec. 4",
        verdict([gone.high < 0, bool((hats < 0).all())]),
        f"The share of pictures with a component changes by {signed(gone.estimate, gone.low, gone.high, digits=2)} "
        f"({len(parts)} concepts); that of a profession's hats in the colour taken out, by "
        f"{changed} ({len(hats)} professions, no interval). The table has no control, such as another word taken out.",
    )
    at = table[table.kind == "profession"].groupby(["condition", "measure", "subject"]).value.mean()  # over seeds
    planted, drawn = at["untouched model", "blue, planted"], at["untouched model", "blue, pictures"]
    read, leaning = at["Conceptor", "blue, coefficients"], planted[(planted - 0.5).abs() > 1e-6].index
    yield Finding(
        "A bias that can be seen is seen in the coefficients.",
        "Conceptor, Sec. 4.3",
        verdict([(read[name] - 0.5) * (planted[name] - 0.5) > 0.01 for name in leaning]),
        "The share of blue hats, planted, drawn and in the coefficients: "
        + "; ".join(
            f"{name.split(':')[1]} {planted[name]:.2f}, {drawn[name]:.2f}, {read[name]:.2f}" for name in planted.index
        )
        + ". To be on the planted side of one half, for each that has a bias; four professions have no interval.",
    )
    before, after = (at[name, "blue, pictures"] for name in ("Conceptor", "balanced"))
    likeness = [at[name, "likeness, hats"] for name in ("untouched model", "Conceptor", "balanced")]
    yield Finding(
        "It is mended by giving the two colours equal coefficients.",
        "Conceptor, Sec. 4.3",
        verdict(
            [
                bool(((after - 0.5).abs() < (before - 0.5).abs() + 1e-6)[leaning].all()),
                bool((likeness[2] - likeness[1] > -MARGIN)[leaning].all()),
            ]
        ),
        "Blue hats drawn by the sum before and after: "
        + "; ".join(f"{name.split(':')[1]} {before[name]:.2f}, {after[name]:.2f}" for name in before.index)
        + f". Mean likeness to the profession: {likeness[0].mean():.2f} for the word, {likeness[1].mean():.2f} for the "
        f"sum, {likeness[2].mean():.2f} balanced (to lose less than {MARGIN}).",
    )


def of_ablation(table: Any) -> Iterator[Finding]:
    """Over the objects: of styles and memorised pictures there are three each."""
    from coneslab.experiments import outcome, profiles

    objects = table[table.kind == "object"]
    chosen, pooled = outcome(objects), profiles(table[table.kind.isin(["object", "unseen"])])
    trained, plain = "model-based, K-V", "untouched model"

    def over(condition: str, minus: str, measure: str) -> Difference:
        return difference(chosen, condition, minus, measure)

    drawn, kept = estimate(chosen, trained, "target still drawn"), estimate(chosen, trained, "others kept")
    yield Finding(
        "Trained to answer the target's caption as its anchor's, keys and values no longer draw the target, and keep "
        "the rest.",
        "Ablating Concepts, Sec. 4",
        verdict([drawn.high < HALF, kept.low > HALF]),
        f"Pictures that still show the target {drawn} (to be below a half, which is what eight objects can tell), "
        f"other concepts kept {kept} (to be above a half).",
    )
    target, rest = over(trained, "noise-based, K-V", "target still drawn"), over(trained, "noise-based, K-V", KID)
    yield Finding(
        "The model-based loss ablates better than the noise-based one.",
        "Ablating Concepts, Sec. 3.2",
        verdict([target.below, rest.below]),
        f"Target still drawn {target}, KID of others {rest}, model-based over noise-based.",
    )
    words = {name: estimate(objects, name, SYNONYMS) for name in ("model-based, embedding", trained)}
    yield Finding(
        "An ablated word embedding is undone by other words.",
        "Ablating Concepts, Sec. 4.3",
        verdict([words["model-based, embedding"].low > HALF]),
        "Pictures that show the target under its synonyms: "
        + "; ".join(f"{name} {share}" for name, share in words.items())
        + " (the first to be above a half).",
    )
    solved, rest = estimate(chosen, "UCE", "target still drawn"), over("UCE", trained, KID)
    yield Finding(
        "A closed form ablates as well as training, and moves the rest less.",
        "UCE, Sec. 4",
        verdict([solved.high < HALF, rest.below]),
        f"Pictures that still show the target {solved} (to be below a half), KID of others {rest} over the keys and "
        "values that were trained.",
    )
    pruned = estimate(chosen, "ConceptPrune", "target still drawn")
    yield Finding(
        "Setting the feed-forward weights that a concept needs most to zero removes it.",
        "ConceptPrune, Sec. 4",
        verdict([pruned.high < HALF]),
        f"Pictures that still show the target {pruned} (to be below a half).",
    )
    learned = {name: estimate(objects, name, TAUGHT) for name in (plain, trained, "ESD", "UCE")}
    yield Finding(
        "A learned word brings an ablated concept back.",
        "Circumventing Concept Erasure, Sec. 4",
        verdict([share.low > HALF for name, share in learned.items() if name != plain]),
        "Pictures that show the target after Textual Inversion (to be above a half): "
        + "; ".join(f"{name} {share}" for name, share in learned.items())
        + ".",
    )
    gone = {name: one.verdict for name, one in pooled.items() if one.verdict != "not gone"}
    avoiding = [name for name, said in gone.items() if said == "avoiding"]
    yield Finding(
        "What is ablated is avoided, not removed.",
        "Lu et al. 2025",
        verdict([name in avoiding for name in gone]),
        f"{len(gone)} of {len(pooled) - 1} ways end the target under its own prompt; after {len(avoiding)} of these a "
        f"probe that never says its word finds it: {'; '.join(avoiding)}.",
    )
    ours = pooled["unlearning"]
    yield Finding(
        "A U-Net that unlearns the target under random words as well is found out by no probe.",
        "ours",
        verdict([not ours.found_by, ours.verdict == "removing"]),
        f"Of {len(ours.findings)} probes, {len(ours.found_by)} find it; the verdict is “{ours.verdict}”. The price: "
        f"KID of others {over('unlearning', plain, KID)}.",
    )
    local, others = over(AT_ITS_WORD, plain, KID), estimate(objects, AT_ITS_WORD, SYNONYMS)
    yield Finding(
        "Neurons shut at the target's word alone leave all other prompts as they were, and a synonym still draws it.",
        "ours",
        verdict([local.high < MARGIN, others.low > HALF]),
        f"KID of others {local} (to be below {MARGIN}); pictures that show the target under its own prompt "
        f"{estimate(chosen, AT_ITS_WORD, 'target still drawn')}, under its synonyms {others}.",
    )


def of_many_concepts(table: Any) -> Iterator[Finding]:
    """Points, as one seed has them: 20 pictures each."""
    most = table["count"].max()
    last = table[table["count"] == most].pivot_table(index="condition", columns="measure", values="value", sort=False)
    left, kept = last["right class, target"], last["right class, others"]
    ways = [name for name in last.index if name != "untouched model"]
    yield Finding(
        "A closed form scales to many concepts.",
        "UCE, Sec. 5",
        verdict([left[name] <= 0.1 and kept[name] >= 0.8 for name in ways if name.startswith("UCE")]),
        f"Pictures of {most} targets that still show them, and of ten other classes that show these (to be at most "
        "0.10 and at least 0.80; 20 pictures each, one seed): "
        + "; ".join(f"{name} {left[name]:.2f} and {kept[name]:.2f}" for name in ways)
        + ".",
    )
