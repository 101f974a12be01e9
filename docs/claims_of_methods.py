"""What the table of methods says: personalisation compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from claims import MARGIN, Difference, Finding, difference, in_each, verdict


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
        f"Text and image alignment over {told(joined)}. (What was tuned here is a union three times as dense as the "
        "one that was chosen without tuning.)",
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
    image, text, found = in_each(several, "Cones, token-local", "Custom Diffusion, joint")
    yield Finding(
        "For several subjects, masks at their words, each at a part of its dose, draw them better than Custom "
        "Diffusion does, and cost no more.",
        "ours",
        verdict([image.above, text.low > -MARGIN, found.low > -MARGIN]),
        f"Image alignment {image}, text alignment {text}, pictures that show every subject {found}, over Custom "
        f"Diffusion (the last two to be above −{MARGIN}).",
    )
