"""What this world shows: claims, each with a verdict that is computed from a table, never written by hand.

Every number in a sentence comes from `data/results`; a verdict changes when its table does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from result_tables import markdown_table, percent, read, signed

HELD, IN_PART, NOT = "held", "held in part", "did not hold"
MARGIN = 0.02  # of a cosine, named before any table was made (lecture 04)


@dataclass(frozen=True)
class Finding:
    """A claim, whose it is, the verdict, and the numbers behind it in a sentence."""

    claim: str
    source: str
    verdict: str
    because: str


@dataclass(frozen=True)
class Difference:
    """A mean paired difference between two conditions, with its interval."""

    value: float
    low: float
    high: float

    @property
    def above(self) -> bool:
        return self.low > 0

    @property
    def below(self) -> bool:
        return self.high < 0

    @property
    def nothing(self) -> bool:
        """Within the margin, which is more than that no difference was seen."""
        return -MARGIN < self.low and self.high < MARGIN

    def __str__(self) -> str:
        return signed(self.value, self.low, self.high, digits=3)


def difference(
    table: Any, condition: str, minus: str, measure: str, subjects: Sequence[str] | None = None, level: float = 0.95
) -> Difference:
    """Of one condition from another, paired by subject and seed. Raises ValueError if the table has them not."""
    from coneslab.experiments import summarise

    part = table[table.condition.isin([condition, minus]) & (table.measure == measure)]
    part = part if subjects is None else part[part.subject.isin(subjects)]
    if part.condition.nunique() < 2:
        raise ValueError(f"the table has not both of {condition!r} and {minus!r} with {measure!r}")
    (row,) = summarise(part, minus=minus, level=level).itertuples()
    return Difference(row.value, row.low, row.high)


def _mean(table: Any, condition: str, measure: str) -> float:
    return float(table[(table.condition == condition) & (table.measure == measure)].value.mean())


def _verdict(all_of: Sequence[bool]) -> str:
    return HELD if all(all_of) else IN_PART if any(all_of) else NOT


def of_controls(table: Any) -> Iterator[Finding]:
    """Whether there are concept neurons, and what finds them."""
    from coneslab.world.subjects import FAR, NEAR

    def likeness(condition: str, names: Sequence[str] | None = None, minus: str = "untouched model") -> Difference:
        return difference(table, condition, minus, "image alignment", names)

    own, chance = "concept neurons, binary", likeness("random mask")
    near, far, other = likeness(own, NEAR), likeness(own, FAR), likeness("another subject's mask")
    yield Finding(
        "Shutting a few of the key and value weights makes the model draw a subject that it has never seen.",
        "Cones, Sec. 3.1",
        _verdict([near.above, far.above]),
        f"Image alignment, over the untouched model: {near} for near subjects, {far} for far ones. As many weights at "
        f"random: {chance}. Real pictures of the subject gain {likeness('real pictures', NEAR)} and "
        f"{likeness('real pictures', FAR)}.",
    )
    yield Finding(
        "They are the subject's own.",
        "Cones, Sec. 3.1",
        _verdict([other.nothing, chance.nothing]),
        f"Another subject's mask gains {other}, to be within ±{MARGIN}.",
    )
    tops = {name: likeness(f"top-k |{name}|") for name in ("gradient", "weight × gradient", "weight")}
    loss = difference(table, "reversed sign", "untouched model", "concept loss")
    yield Finding(
        "It is the sign of weight times gradient that finds them, not its size.",
        "Cones, Sec. 3.1",
        _verdict([loss.above, *(top.high < MARGIN for top in tops.values())]),
        "As many weights of the largest "
        + ", ".join(f"{name}: {top}" for name, top in tops.items())
        + f" (to be below {MARGIN}). With the sign reversed the loss on the subject rises by {loss}.",
    )
    tuned, price = likeness(own, minus="K-V fine-tuning"), difference(table, own, "K-V fine-tuning", "text alignment")
    yield Finding(
        "Shutting does as well as fine-tuning the same matrices.",
        "ours",
        _verdict([tuned.low > -MARGIN, price.low > -MARGIN]),
        f"Image alignment {tuned}, text alignment {price}, over a hundred steps of fine-tuning all keys and values "
        f"(to be above −{MARGIN}).",
    )
    words = [likeness("at its words", names, own) for names in (NEAR, FAR)]
    price = difference(table, "at its words", own, "text alignment")
    yield Finding(
        "A mask that acts at the subject's own words alone draws it better than one that acts at all words.",
        "ours",
        _verdict([one.above for one in words]),
        f"Image alignment {words[0]} for near and {words[1]} for far subjects, over the paper's rule. It costs "
        f"{price} of text alignment; no prompt without the words can change.",
    )
    values = likeness("values only", minus=own)
    price = difference(table, "values only", own, "text alignment")
    yield Finding(
        "A search that may mask values alone finds masks as good as one that may mask keys as well.",
        "ours",
        _verdict([values.low > -MARGIN, price.low > -MARGIN]),
        f"Image alignment {values}, text alignment {price}, over masks of both.",
    )


def of_precision(table: Any) -> Iterator[Finding]:
    kept = {
        name: [difference(table, name, "float32", f"{one} alignment", level=0.9) for one in ("image", "text")]
        for name in ("float16", "quaternary", "binary")
    }
    sizes = table.groupby("condition").bytes.median()
    yield Finding(
        "A mask of one bit a neuron does as well as one of 32.",
        "Cones, Sec. 3.1",
        _verdict([one.nothing for both in kept.values() for one in both]),
        "Image and text alignment, over float32 (90 % intervals, to be within "
        f"±{MARGIN}): "
        + "; ".join(f"{name} {image} and {text}" for name, (image, text) in kept.items())
        + f". The file shrinks from {sizes['float32'] / 1000:.0f} kB to {sizes['binary'] / 1000:.0f} kB.",
    )


def of_damage(table: Any) -> Iterator[Finding]:
    def lost(condition: str) -> Difference:
        return difference(table, condition, "whole mask", "image alignment")

    few, half = lost("flipped 0.02"), lost("dropped 0.5")
    left = difference(table, "dropped 0.5", "untouched model", "image alignment")
    yield Finding(
        "A binary mask survives errors.",
        "ours",
        _verdict([few.nothing, left.above]),
        f"Image alignment changes by {few} with 2 % of all entries flipped, and by {half} with half of the neurons "
        f"lost: that is {left} over the untouched model.",
    )
    moved = difference(table, "moved 1", "untouched model", "image alignment")
    yield Finding(
        "Which neurons, and not where about they lie, is what matters.",
        "ours",
        _verdict([moved.high < MARGIN]),
        f"Every neuron moved to its neighbour in the matrix, the mask gains {moved} over the untouched model (to be "
        f"below {MARGIN}).",
    )


def of_parts(table: Any) -> Iterator[Finding]:
    def over_chance(part: str) -> Difference:
        return difference(table, part, f"as many as {part}", "image alignment")

    def kept(part: str) -> str:
        """The share of the whole mask's gain."""
        start, whole, own = (_mean(table, name, "image alignment") for name in ("untouched model", "whole mask", part))
        return percent((own - start) / (whole - start))

    half, quarter = over_chance("most-shut half"), over_chance("most-shut quarter")
    yield Finding(
        "A mask has a core: the neurons that a graded search shuts most.",
        "ours",
        _verdict([half.above, quarter.above]),
        f"The most-shut half keeps {kept('most-shut half')} of the gain, a random half "
        f"{kept('as many as most-shut half')} (image alignment {half}); the most-shut quarter "
        f"{kept('most-shut quarter')}, a random one {kept('as many as most-shut quarter')} ({quarter}).",
    )
    keys, values = over_chance("keys"), over_chance("values")
    yield Finding(
        "Values carry a subject, keys do not.",
        "ours",
        _verdict([keys.below, values.above]),
        f"The keys of a mask keep {kept('keys')} of its gain, the values {kept('values')}. Over as many of its neurons "
        f"at random that is {keys} and {values} of image alignment.",
    )
    dense, other = over_chance("densest heads"), over_chance("other heads")
    inside = [_mean(table, name, "share in the densest heads") for name in ("whole mask", "random mask")]
    yield Finding(
        "A concept lies in the attention heads that hold most of its neurons.",
        "ours",
        _verdict([dense.above, other.below]),
        f"One head of each layer holds {percent(inside[0])} of a mask, and {percent(inside[1])} of a random one. Over "
        f"as many of its neurons at random these bring {dense} of image alignment, those of the other heads {other}.",
    )


def of_agreement(table: Any) -> Iterator[Finding]:
    jaccard = "overlap (Jaccard)"
    again = difference(table, "same subject, other seed", "random mask", jaccard)
    other = difference(table, "same subject, other seed", "another subject", jaccard)
    means = [_mean(table, name, jaccard) for name in ("same subject, other seed", "another subject", "random mask")]
    yield Finding(
        "Two searches for one subject find the same neurons.",
        "ours",
        _verdict([again.above and other.above, means[0] > 0.9]),
        f"Their overlap is {means[0]:.2f} (Jaccard), that with another subject's mask {means[1]:.2f}, by chance "
        f"{means[2]:.2f}. What they change in the denoiser's output has a cosine of "
        f"{_mean(table, 'same subject, other seed', 'cosine of what they change'):.2f}.",
    )


def of_methods(table: Any) -> Iterator[Finding]:
    one, several = table[table["count"] == 1], table[table["count"] > 1]
    rivals = "Textual Inversion", "DreamBooth", "Custom Diffusion, joint"

    def alignments(part: Any, name: str, minus: str) -> list[Difference]:
        return [difference(part, name, minus, f"{kind} alignment") for kind in ("text", "image")]

    def told(over: dict[str, list[Difference]]) -> str:
        return "; ".join(f"{name} {text} and {image}" for name, (text, image) in over.items())

    alone = {name: alignments(one, "Cones, binary", name) for name in rivals}
    yield Finding(
        "For one subject, concept neurons obey the prompt better than three methods that train.",
        "Cones, Table 1",
        _verdict([text.above for text, _ in alone.values()]),
        f"Text and image alignment over {told(alone)}.",
    )
    joined = {name: alignments(several, "Cones + collaborative tuning", name) for name in rivals}
    yield Finding(
        "With two to four subjects, joined and tuned concept neurons beat the same three in both alignments.",
        "Cones, Table 1",
        _verdict([each.above for both in joined.values() for each in both]),
        f"Text and image alignment over {told(joined)}.",
    )
    merged = alignments(several, "Custom Diffusion, merged", "Custom Diffusion, joint")
    yield Finding(
        "Edits of single subjects, merged in a closed form, do as well as training on all of them together.",
        "Custom Diffusion, Sec. 4.2",
        _verdict([each.low > -MARGIN for each in merged]),
        f"Text and image alignment, merged over joint: {merged[0]} and {merged[1]} (to be above −{MARGIN}).",
    )
    words = {name: alignments(one, "Cones, token-local", name) for name in ("Custom Diffusion, joint", "LoRA, joint")}
    yield Finding(
        "For one subject, a mask at the subject's words draws it better than Custom Diffusion and LoRA do.",
        "ours",
        _verdict([image.above for _, image in words.values()]),
        f"Text and image alignment over {told(words)}.",
    )
    adding = difference(several, "LoRA, merged", "LoRA, joint", "every subject found")
    yield Finding(
        "LoRAs of single subjects that are added up lose subjects.",
        "common experience",
        _verdict([adding.below]),
        f"Pictures that show every subject, over a LoRA trained on all of them: {adding}.",
    )


def _interval(table: Any, condition: str, measure: str) -> Any:
    """The row of a condition and a measure in a summary: value, low, high. Shares without an order are left out."""
    from coneslab.experiments import summarise

    part = table[(table.condition == condition) & (table.measure == measure) & table.value.notna()]
    (row,) = summarise(part).itertuples()
    return row


def of_conceptor(table: Any) -> Iterator[Finding]:
    """What can be trusted in a decomposition: which words, how much of each, what they draw, and a bias."""
    from coneslab import bootstrap_interval

    def over(control: str, measure: str) -> Difference:
        return difference(table, "Conceptor", control, measure)

    controls = "random words", "nearest words"
    named = {control: [over(control, one) for one in ("precision at k", "recall at 10")] for control in controls}
    right = _interval(table, "Conceptor", "precision at k")
    yield Finding(
        "A decomposition names what a concept is made of.",
        "Conceptor, Sec. 4",
        _verdict([each.above for both in named.values() for each in both]),
        f"Of its first k words, for k components, {right.value:.2f} [{right.low:.2f}, {right.high:.2f}] name one. "
        "Precision at k and recall at ten words, over "
        + "; ".join(f"{control} {precision} and {recall}" for control, (precision, recall) in named.items())
        + f" ({right.clusters} concepts, one seed). By component, among the first k, it finds "
        f"{over('nearest words', 'recall at k')} more than the nearest words.",
    )
    order = _interval(table, "Conceptor", "rank correlation")
    ordered = table[(table.measure == "rank correlation") & table.value.notna()].subject.unique()
    shares = difference(table, "Conceptor", "random words", "error of shares", ordered)
    eight = table[table.subject.isin(table[table.condition == "random start"].subject) & table.value.notna()]
    start = _interval(eight, "random start", "rank correlation")
    gain = difference(eight, "random start", "Conceptor", "rank correlation")
    yield Finding(
        "The coefficients say how much of each component there is.",
        "ours",
        _verdict([order.low > 0, shares.below]),
        f"Rank correlation with the planted shares {signed(order.value, order.low, order.high, digits=2)} "
        f"({order.clusters} concepts); the error of the shares over that of equal shares for all {shares}. Begun at "
        f"random, as in the paper, at ten times the rate, the rank correlation is {start.value:.2f}: {gain} over our "
        f"start on the same {start.clusters} concepts.",
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
        _verdict([gone.high < 0, bool((hats < 0).all())]),
        f"The share of pictures with a component changes by {signed(gone.estimate, gone.low, gone.high, digits=2)} "
        f"({len(parts)} concepts); that of a profession's hats in the colour taken out, by "
        f"{changed} ({len(hats)} professions, no interval). The table has no control, such as another word taken out.",
    )
    at = table[table.kind == "profession"].set_index(["condition", "measure", "subject"]).value.sort_index()
    planted, drawn = at["untouched model", "blue, planted"], at["untouched model", "blue, pictures"]
    read, leaning = at["Conceptor", "blue, coefficients"], planted[(planted - 0.5).abs() > 1e-6].index
    yield Finding(
        "A bias that can be seen is seen in the coefficients.",
        "Conceptor, Sec. 4.3",
        _verdict([(read[name] - 0.5) * (planted[name] - 0.5) > 0.01 for name in leaning]),
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
        _verdict(
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


METHODS = "compare"  # a command of its own; all other tables are experiments
TESTED: dict[str, Callable[[Any], Iterator[Finding]]] = {  # experiment -> what its table says
    "controls": of_controls,
    "precision": of_precision,
    "damage": of_damage,
    "parts": of_parts,
    "agreement": of_agreement,
    "conceptor": of_conceptor,
    METHODS: of_methods,
}


def table_of(experiment: str, folder: Path) -> Path:
    from coneslab.experiments import EXPERIMENTS

    return folder / ("methods.csv" if experiment == METHODS else EXPERIMENTS[experiment].table)


def findings(folder: Path) -> Iterator[tuple[str, Finding]]:
    """Every finding of the tables that are there, after the name of its experiment."""
    for experiment, said in TESTED.items():
        if (path := table_of(experiment, folder)).exists():
            yield from ((experiment, finding) for finding in said(read(path)))


def page(folder: Path) -> str:
    """The findings as a table and, below it, the numbers behind each."""
    rows, parts = [], []
    for number, (experiment, one) in enumerate(findings(folder), 1):
        command = experiment if experiment == METHODS else f"experiment {experiment}"
        rows.append([str(number), one.claim, one.source, f"**{one.verdict}**"])
        parts.append(f"**{number}. {one.claim}** {one.because} `coneslab {command}`")
    return "\n\n".join([markdown_table(["", "claim", "whose", "here"], rows), *parts])
