"""What the tables of other methods say: personalisation compared, concepts ablated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from claims import MARGIN, Difference, Finding, difference, share_of, verdict


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
        verdict([text.above for text, _ in alone.values()]),
        f"Text and image alignment over {told(alone)}.",
    )
    joined = {name: alignments(several, "Cones + collaborative tuning", name) for name in rivals}
    yield Finding(
        "With two to four subjects, joined and tuned concept neurons beat the same three in both alignments.",
        "Cones, Table 1",
        verdict([each.above for both in joined.values() for each in both]),
        f"Text and image alignment over {told(joined)}.",
    )
    merged = alignments(several, "Custom Diffusion, merged", "Custom Diffusion, joint")
    yield Finding(
        "Edits of single subjects, merged in a closed form, do as well as training on all of them together.",
        "Custom Diffusion, Sec. 4.2",
        verdict([each.low > -MARGIN for each in merged]),
        f"Text and image alignment, merged over joint: {merged[0]} and {merged[1]} (to be above −{MARGIN}).",
    )
    words = {name: alignments(one, "Cones, token-local", name) for name in ("Custom Diffusion, joint", "LoRA, joint")}
    yield Finding(
        "For one subject, a mask at the subject's words draws it better than Custom Diffusion and LoRA do.",
        "ours",
        verdict([image.above for _, image in words.values()]),
        f"Text and image alignment over {told(words)}.",
    )
    adding = difference(several, "LoRA, merged", "LoRA, joint", "every subject found")
    yield Finding(
        "LoRAs of single subjects that are added up lose subjects.",
        "common experience",
        verdict([adding.below]),
        f"Pictures that show every subject, over a LoRA trained on all of them: {adding}.",
    )


HALF = 0.5  # of the pictures: what eight targets can tell, since 0 of 8 may be 0.32
KID, SYNONYMS, TAUGHT = "KID of others", "comes back: other words", "comes back: Textual Inversion"
AT_ITS_WORD = "concept neurons, at its word"


def of_ablation(table: Any) -> Iterator[Finding]:
    """Over the objects: of styles and memorised pictures there are three each."""
    from coneslab.experiments import outcome, profiles

    objects = table[table.kind == "object"]
    chosen, pooled = outcome(objects), profiles(table[table.kind.isin(["object", "unseen"])])
    trained, plain = "model-based, K-V", "untouched model"

    def over(condition: str, minus: str, measure: str) -> Difference:
        return difference(chosen, condition, minus, measure)

    drawn, kept = share_of(chosen, trained, "target still drawn"), share_of(chosen, trained, "others kept")
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
    words = {name: share_of(objects, name, SYNONYMS) for name in ("model-based, embedding", trained)}
    yield Finding(
        "An ablated word embedding is undone by other words.",
        "Ablating Concepts, Sec. 4.3",
        verdict([words["model-based, embedding"].low > HALF]),
        "Pictures that show the target under its synonyms: "
        + "; ".join(f"{name} {share}" for name, share in words.items())
        + " (the first to be above a half).",
    )
    solved, rest = share_of(chosen, "UCE", "target still drawn"), over("UCE", trained, KID)
    yield Finding(
        "A closed form ablates as well as training, and moves the rest less.",
        "UCE, Sec. 4",
        verdict([solved.high < HALF, rest.below]),
        f"Pictures that still show the target {solved} (to be below a half), KID of others {rest} over the keys and "
        "values that were trained.",
    )
    pruned = share_of(chosen, "ConceptPrune", "target still drawn")
    yield Finding(
        "Setting the feed-forward weights that a concept needs most to zero removes it.",
        "ConceptPrune, Sec. 4",
        verdict([pruned.high < HALF]),
        f"Pictures that still show the target {pruned} (to be below a half).",
    )
    learned = {name: share_of(objects, name, TAUGHT) for name in (plain, trained, "ESD", "UCE")}
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
    local, others = over(AT_ITS_WORD, plain, KID), share_of(objects, AT_ITS_WORD, SYNONYMS)
    yield Finding(
        "Neurons shut at the target's word alone leave all other prompts as they were, and a synonym still draws it.",
        "ours",
        verdict([local.high < MARGIN, others.low > HALF]),
        f"KID of others {local} (to be below {MARGIN}); pictures that show the target under its own prompt "
        f"{share_of(chosen, AT_ITS_WORD, 'target still drawn')}, under its synonyms {others}.",
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
