"""What the tables of masks say: of concept neurons alone, in parts, damaged, and joined."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from claims import MARGIN, TOGETHER, Difference, Finding, difference, in_each, mean_of, rank_correlation, verdict
from result_tables import percent


def of_controls(table: Any) -> Iterator[Finding]:
    """Whether there are concept neurons, and what finds them."""
    from coneslab.world import CLASSES
    from coneslab.world.subjects import FAR, NEAR, truth

    def likeness(condition: str, names: Sequence[str] | None = None, minus: str = "untouched model") -> Difference:
        return difference(table, condition, minus, "image alignment", names)

    own, chance = "concept neurons, binary", likeness("random mask")
    near, far, other = likeness(own, NEAR), likeness(own, FAR), likeness("another subject's mask")
    yield Finding(
        "Shutting a few of the key and value weights makes the model draw a subject that it has never seen.",
        "Cones, Sec. 3.1",
        verdict([near.above, far.above]),
        f"Image alignment, over the untouched model: {near} for near subjects, {far} for far ones. As many weights at "
        f"random: {chance}. Real pictures of the subject gain {likeness('real pictures', NEAR)} and "
        f"{likeness('real pictures', FAR)}.",
    )
    yield Finding(
        "They are the subject's own.",
        "Cones, Sec. 3.1",
        verdict([other.nothing, chance.nothing]),
        f"Another subject's mask gains {other}, to be within ±{MARGIN}.",
    )
    tops = {name: likeness(f"top-k |{name}|") for name in ("gradient", "weight × gradient", "weight")}
    loss = difference(table, "reversed sign", "untouched model", "concept loss")
    yield Finding(
        "It is the sign of weight times gradient that finds them, not its size.",
        "Cones, Sec. 3.1",
        verdict([loss.above, *(top.high < MARGIN for top in tops.values())]),
        "As many weights of the largest "
        + ", ".join(f"{name}: {top}" for name, top in tops.items())
        + f" (to be below {MARGIN}). With the sign reversed the loss on the subject rises by {loss}.",
    )
    tuned, price = likeness(own, minus="K-V fine-tuning"), difference(table, own, "K-V fine-tuning", "text alignment")
    yield Finding(
        "Shutting does as well as fine-tuning the same matrices.",
        "ours",
        verdict([tuned.low > -MARGIN, price.low > -MARGIN]),
        f"Image alignment {tuned}, text alignment {price}, over a hundred steps of fine-tuning all keys and values "
        f"(to be above −{MARGIN}).",
    )
    words = [likeness("at its words", names, own) for names in (NEAR, FAR)]
    price = difference(table, "at its words", own, "text alignment")
    yield Finding(
        "A mask that acts at the subject's own words alone draws it better than one that acts at all words.",
        "ours",
        verdict([one.above for one in words]),
        f"Image alignment {words[0]} for near and {words[1]} for far subjects, over the paper's rule. It costs "
        f"{price} of text alignment; no prompt without the words can change.",
    )
    values = likeness("values only", minus=own)
    price = difference(table, "values only", own, "text alignment")
    yield Finding(
        "A search that may mask values alone finds masks as good as one that may mask keys as well.",
        "ours",
        verdict([values.low > -MARGIN, price.low > -MARGIN]),
        f"Image alignment {values}, text alignment {price}, over masks of both.",
    )
    rich = {name: len(CLASSES[truth(name).class_word].drawings) for name in (*NEAR, *FAR)}
    loss, liker = (
        rank_correlation(rich, table, own, "untouched model", one) for one in ("concept loss", "image alignment")
    )
    yield Finding(
        "A mask does more for a subject of which the model knows more drawings of its class.",
        "common expectation",
        verdict([loss.below, liker.above]),
        "Rank correlation over sixteen subjects, whose classes have one to four drawings: with the change of the loss "
        f"{loss} (above 0: the more drawings, the less it falls), with the gain in image alignment {liker}.",
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
        verdict([one.nothing for both in kept.values() for one in both]),
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
        verdict([few.nothing, left.above]),
        f"Image alignment changes by {few} with 2 % of all entries flipped, and by {half} with half of the neurons "
        f"lost: that is {left} over the untouched model.",
    )
    moved = difference(table, "moved 1", "untouched model", "image alignment")
    yield Finding(
        "Which neurons, and not where about they lie, is what matters.",
        "ours",
        verdict([moved.high < MARGIN]),
        f"Every neuron moved to its neighbour in the matrix, the mask gains {moved} over the untouched model (to be "
        f"below {MARGIN}).",
    )


def of_parts(table: Any) -> Iterator[Finding]:
    def over_chance(part: str) -> Difference:
        return difference(table, part, f"as many as {part}", "image alignment")

    def kept(part: str) -> str:
        """The share of the whole mask's gain."""
        start, whole, own = (
            mean_of(table, name, "image alignment") for name in ("untouched model", "whole mask", part)
        )
        return percent((own - start) / (whole - start))

    half, quarter = over_chance("most-shut half"), over_chance("most-shut quarter")
    yield Finding(
        "A mask has a core: the neurons that a graded search shuts most.",
        "ours",
        verdict([half.above, quarter.above]),
        f"The most-shut half keeps {kept('most-shut half')} of the gain, a random half "
        f"{kept('as many as most-shut half')} (image alignment {half}); the most-shut quarter "
        f"{kept('most-shut quarter')}, a random one {kept('as many as most-shut quarter')} ({quarter}).",
    )
    keys, values = over_chance("keys"), over_chance("values")
    yield Finding(
        "Values carry a subject, keys do not.",
        "ours",
        verdict([keys.below, values.above]),
        f"The keys of a mask keep {kept('keys')} of its gain, the values {kept('values')}. Over as many of its neurons "
        f"at random that is {keys} and {values} of image alignment.",
    )
    dense, other = over_chance("densest heads"), over_chance("other heads")
    inside = [mean_of(table, name, "share in the densest heads") for name in ("whole mask", "random mask")]
    yield Finding(
        "A concept lies in the attention heads that hold most of its neurons.",
        "ours",
        verdict([dense.above, other.below]),
        f"One head of each layer holds {percent(inside[0])} of a mask, and {percent(inside[1])} of a random one. Over "
        f"as many of its neurons at random these bring {dense} of image alignment, those of the other heads {other}.",
    )


def of_sharing(table: Any) -> Iterator[Finding]:
    from coneslab.world.subjects import FAR

    def likeness(condition: str, minus: str, names: Sequence[str] | None = None) -> Difference:
        return difference(table, condition, minus, "image alignment", names)

    common, rest, plain = "common to its kind", "without what is common to its kind", "untouched model"
    alone, over = likeness(common, plain, FAR), likeness(common, "common to the other kind", FAR)
    yield Finding(
        "What the masks of one art set have in common draws the set's style, on a subject of it that was left out.",
        "ours",
        verdict([alone.above, over.above]),
        f"What most of seven other far subjects' masks share gains {alone} of image alignment on a far subject, and "
        f"{over} over what those of seven near subjects share. The subject's own mask gains "
        f"{likeness('whole mask', plain, FAR)}.",
    )
    inside, by_chance = "share of the mask in it", "share of a random mask in it"
    shared, other = mean_of(table, common, inside), mean_of(table, "common to the other kind", inside)
    nothing, kept = likeness(common, plain), likeness(rest, "without as many as are common to its kind")
    yield Finding(
        "Two fifths of a mask belong to no subject, and draw none by themselves.",
        "ours",
        verdict([nothing.nothing, min(shared, other) > 5 * mean_of(table, common, by_chance)]),
        f"Most masks of seven other subjects share {percent(shared)} of a subject's mask if they are of its kind and "
        f"{percent(other)} if not; of a random mask {percent(mean_of(table, common, by_chance))}. By itself that gains "
        f"{nothing} of image alignment (to be within ±{MARGIN}). Without it the mask gains {likeness(rest, plain)}, "
        f"{kept} more than without as many of its neurons at random; whole it gains {likeness('whole mask', plain)}.",
    )


def of_agreement(table: Any) -> Iterator[Finding]:
    jaccard = "overlap (Jaccard)"
    again = difference(table, "same subject, other seed", "random mask", jaccard)
    other = difference(table, "same subject, other seed", "another subject", jaccard)
    means = [mean_of(table, name, jaccard) for name in ("same subject, other seed", "another subject", "random mask")]
    yield Finding(
        "Two searches for one subject find the same neurons.",
        "ours",
        verdict([again.above and other.above, means[0] > 0.9]),
        f"Their overlap is {means[0]:.2f} (Jaccard), that with another subject's mask {means[1]:.2f}, by chance "
        f"{means[2]:.2f}. What they change in the denoiser's output has a cosine of "
        f"{mean_of(table, 'same subject, other seed', 'cosine of what they change'):.2f}.",
    )


def of_together(table: Any) -> Iterator[Finding]:
    over = partial(in_each, table)

    joined = over("union", "untouched model")
    yield Finding(
        "Joined, the masks of two to four subjects draw all of them in one picture.",
        "Cones, Sec. 3.2",
        verdict([joined[0].above, joined[2].low > -MARGIN]),
        f"Over the untouched model, which draws their classes: image alignment {joined[0]}, text alignment "
        f"{joined[1]}, pictures with every subject {joined[2]} (to be above −{MARGIN}).",
    )
    tuned = over("union, 40 steps", "union")
    yield Finding(
        "Tuning the joined neurons together makes them compose.",
        "Cones, Sec. 3.3",
        verdict([tuned[0].above, tuned[2].above]),
        f"Forty steps, over the union as it was: image alignment {tuned[0]}, text alignment {tuned[1]}, pictures with "
        f"every subject {tuned[2]}.",
    )
    dense, density = over("union, as for one subject", "union"), table.groupby("condition").density.mean()
    yield Finding(
        "What joined masks lose of composition, they lose by their density.",
        "ours",
        verdict([dense[2].below]),
        f"With the masks that are best for one subject, {percent(density['union, as for one subject'])} of all weights "
        f"are shut in place of {percent(density['union'])}: pictures with every subject {dense[2]}, image alignment "
        f"{dense[0]}.",
    )
    words = over("union, at its words", "union")
    yield Finding(
        "Masks that act at their own subjects' words alone compose better than masks joined for all words.",
        "ours",
        verdict([words[0].above, words[2].low > -MARGIN]),
        f"Image alignment {words[0]}, text alignment {words[1]}, pictures with every subject {words[2]} (to be above "
        f"−{MARGIN}): each subject is drawn better, and more often alone.",
    )
    values = over("union, values only", "union")
    yield Finding(
        "Joined masks of values alone compose as well as those of keys and values.",
        "ours",
        verdict([values[0].low > -MARGIN, values[2].low > -MARGIN]),
        f"Image alignment {values[0]}, pictures with every subject {values[2]} (both to be above −{MARGIN}).",
    )


def of_doses(table: Any) -> Iterator[Finding]:
    """The dose is chosen on combinations of tuning subjects, by the sum of three measures, and tried on the others."""
    from coneslab.world.subjects import TUNING_COMBINATIONS, title_of

    tuning = table.subject.isin([title_of(names) for names in TUNING_COMBINATIONS])
    scores = table[tuning & table.measure.isin(TOGETHER)].groupby("condition").value.mean()
    words = max((name for name in scores.index if name.startswith("at its words")), key=lambda name: scores[name])

    over = partial(in_each, table[~tuning], words)
    plain, union, whole = map(over, ("untouched model", "union, dose 1", "at its words, dose 1"))
    dose = words.rpartition(" ")[2]
    yield Finding(
        "At a part of their dose, masks at their own words draw several subjects and keep all of them in the picture.",
        "ours",
        verdict([plain[0].above, plain[2].low > -MARGIN, union[0].low > -MARGIN]),
        f"At a dose of {dose}, chosen on combinations of tuning subjects, over the untouched model: image alignment "
        f"{plain[0]}, text alignment {plain[1]}, pictures with every subject {plain[2]} (to be above −{MARGIN}). Over "
        f"the union at its whole dose: {union[0]}, {union[1]} and {union[2]}; over the masks at their words at theirs: "
        f"{whole[0]}, {whole[1]} and {whole[2]}.",
    )


def of_storage(table: Any) -> Iterator[Finding]:
    sizes = table[table.measure == "bytes"].groupby("condition").value.mean()
    small, full = sizes["mask, binary"], sizes["all keys and values, float32"]
    yield Finding(
        "A mask takes a tenth of the bytes of all keys and values, or less.",
        "Cones, Sec. 3.1",
        verdict([small < full / 10]),
        f"A binary mask takes {small / 1000:.1f} kB on average, {percent(1 - small / full)} less than all keys and "
        f"values in float32 ({full / 1000:,.0f} kB), and {percent(small / sizes['binary mask, entropy bound'])} of the "
        "entropy bound.",
    )
    gain = difference(table, "mask, binary", "untouched model", "concept loss")
    rival = "Custom Diffusion, 60% of its energy"
    beside = difference(table, "mask, binary", rival, "concept loss")
    vector = difference(table, "mask, binary", "Textual Inversion", "concept loss")
    allowed = -gain.value / 10
    yield Finding(
        "For its bytes nothing is better: what is as small does less, what does as much is larger.",
        "ours",
        verdict([beside.high < allowed and small < sizes[rival], vector.below]),
        f"The mask lowers the loss on the subject by {gain}. Custom Diffusion's change in low rank, with 60 % of its "
        f"energy, takes {sizes[rival] / small:.1f} times the bytes; the mask's loss over its: {beside} (to be "
        f"below {allowed:.3f}, a tenth of the gain). Over a learned word of {sizes['Textual Inversion']:.0f} bytes: "
        f"{vector}.",
    )


def of_density(table: Any) -> Iterator[Finding]:
    paper, words = "concept neurons", "concept neurons at its words"
    densities = table.groupby("condition").density.mean()

    def over(condition: str, minus: str, kind: str) -> Difference:
        return difference(table, condition, minus, f"{kind} alignment")

    dense, sparse = f"{paper} 0.99", f"{paper} 0.998"
    likeness, price = over(dense, sparse, "image"), over(dense, sparse, "text")
    yield Finding(
        "Denser masks draw more of the subject and less of the prompt.",
        "ours",
        verdict([likeness.above, price.below]),
        f"With {percent(densities[dense])} of the neurons shut in place of {percent(densities[sparse])}: image "
        f"alignment {likeness}, text alignment {price}.",
    )
    quantiles = sorted({name.rpartition(" ")[2] for name in densities.index if name.startswith(f"{paper} 0.")})
    best = max(quantiles, key=lambda name: float(mean_of(table, f"{paper} {name}", "image alignment")))
    few = f"{words} {quantiles[-1]}"
    likeness, price = over(few, f"{paper} {best}", "image"), over(few, f"{paper} {best}", "text")
    yield Finding(
        "At the subject's words, the sparsest mask does as much as the paper's rule at its best density, or more.",
        "ours",
        verdict([likeness.low > -MARGIN, price.low > -MARGIN]),
        f"With {percent(densities[few])} of the neurons shut, over the paper's best, "
        f"{percent(densities[f'{paper} {best}'])}: image alignment {likeness}, text alignment {price} (both to be "
        f"above −{MARGIN}).",
    )


def of_references(table: Any) -> Iterator[Finding]:
    def over(few: str, measure: str) -> Difference:
        return difference(table, "5 pictures", few, measure)

    fewer = ("1 picture", "2 pictures", "3 pictures", "4 pictures")
    losses = {number: over(number, "concept loss") for number in fewer}
    one, four = (over(number, "image alignment") for number in (fewer[0], fewer[-1]))
    yield Finding(
        "A mask from more reference pictures draws its subject better.",
        "ours",
        verdict([losses[fewer[0]].below, one.above]),
        "Five pictures in place of "
        + ", ".join(f"{number.split()[0]}: loss {losses[number]}" for number in fewer)
        + f". In image alignment that is {one} over one and {four} over four.",
    )


def of_finders(table: Any) -> Iterator[Finding]:
    ours, paper = "straight-through", "paper's rule"
    loss, likeness, price = (
        difference(table, ours, paper, measure) for measure in ("concept loss", "image alignment", "text alignment")
    )
    yield Finding(
        "Who lowers the paper's loss further than the paper's rule gets better pictures.",
        "ours",
        verdict([loss.below, likeness.above, price.low > -MARGIN]),
        f"Straight-through optimisation of the binary mask, over the paper's rule with as many gradients: loss {loss}, "
        f"image alignment {likeness}, text alignment {price} (to be above −{MARGIN}).",
    )
