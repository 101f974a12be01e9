"""Bad values: every public function refuses them in a sentence, before it does anything, and leaves no trace.

`CALLS` has a good call of every function, by the kinds of its parameters; each parameter in turn gets what makes no
sense for its kind. Where a kind is not named, the value is only there to complete the call.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from small_pipelines import make_subject

import coneslab
from coneslab import (
    checks,
    diffusion,
    edits,
    experiments,
    finetuning,
    measure,
    methods,
    neurons,
    show,
    web,
    world,
)
from coneslab.errors import ArgumentError, ConeslabError, ConeslabWarning
from coneslab.methods import ablation
from coneslab.show import plots

NAN, INF = float("nan"), float("inf")

# --- the checks themselves ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "value", "expected"),
    [
        (checks.count, 3, 3),
        (checks.count, np.int64(3), 3),
        (checks.count, np.uint8(3), 3),
        (checks.count, torch.tensor(3), 3),
        (checks.seed, 0, 0),
        (checks.seed, 2**32 - 1, 2**32 - 1),
        (checks.number, 2, 2),
        (checks.number, np.float32(0.5), 0.5),
        (checks.number, torch.tensor(0.5), 0.5),
        (checks.number, 2**60, 2.0**60),
        (checks.interval, (0, 0.5), (0, 0.5)),
        (checks.interval, np.array([0.25, 0.5]), (0.25, 0.5)),
        (checks.flag, np.True_, True),
        (checks.texts, "one text", ["one text"]),
        (checks.texts, ("a", "b"), ["a", "b"]),
        (checks.texts, (letter for letter in "ab"), ["a", "b"]),
        (checks.texts, np.array(["a"]), ["a"]),
        (checks.templates, "a {}", ["a {}"]),
        (checks.word, "<cat*>", "<cat*>"),
    ],
)
def test_a_good_value_comes_back_as_the_package_uses_it(check, value, expected):
    found = check("it", value)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("check", "value", "options", "said"),
    [
        (checks.count, 0, {}, "it is 0: give a positive number, at most 1,000,000"),
        (checks.count, 10**9, {}, "it is 1000000000: give a positive number, at most 1,000,000"),
        (checks.count, 1001, {"most": 1000}, "it is 1001: give a number from 1 to 1,000"),
        (checks.count, 2.0, {}, "it is 2.0: give a whole number"),
        (checks.count, True, {}, "it is True: give a whole number"),
        (checks.count, "3", {}, "it is '3': give a whole number"),
        (checks.count, None, {}, "it is None: give a whole number"),
        (checks.count, np.ones((2, 3), int), {}, r"it is a ndarray of shape \(2, 3\): give a whole number"),
        (checks.count, torch.ones(2), {}, r"it is a Tensor of shape \(2,\): give a whole number"),
        (checks.seed, -1, {}, "it is -1: give a number from 0 to 4,294,967,295"),
        (checks.seed, 2**32, {}, "give a number from 0 to 4,294,967,295"),
        (checks.number, NAN, {}, "it is nan: give a finite number"),
        (checks.number, INF, {"interval": "(0, inf)"}, "it is inf: give a positive number"),
        (checks.number, -0.5, {"interval": "[0, inf)"}, "it is -0.5: give a number of 0 or more"),
        (checks.number, 1, {"interval": "(0, 1)", "kind": "share"}, r"it is 1: give a share in \(0, 1\)"),
        (checks.number, 10**400, {}, "it is 1000000.*: give a finite number"),
        (checks.number, "1", {}, "it is '1': give a finite number"),
        (checks.number, 1e30, {"interval": "[0, 100]"}, r"it is 1e\+30: give a number in \[0, 100\]"),
        (checks.interval, (0.5, 0.5), {}, r"the it is \(0.5, 0.5\): give two shares in order"),
        (checks.interval, (0.5, NAN), {}, "give two shares in order"),
        (checks.interval, 0.5, {}, "give two shares in order"),
        (checks.flag, 1, {}, "it is 1: give True or False"),
        (checks.text, " ", {}, "it is empty: give a text"),
        (checks.text, b"x", {}, "it is b'x': give a text"),
        (checks.texts, [], {}, "got no it: give at least one"),
        (checks.texts, ["a", None], {}, "one of it is None: give a str"),
        (checks.texts, {"a": 1}, {}, "give a list"),
        (checks.word, "my cat", {}, "it is 'my cat': give one word, without spaces"),
        (checks.choice, "magic", {"among": ("mean", "none")}, "it is 'magic': choose one of mean, none"),
        (checks.choice, True, {"among": (1, -1)}, "it is True: choose one of 1, -1"),
        (checks.choice, [[1], [1, 2]], {"among": (1,)}, "choose one of 1"),
        (checks.items, 3, {}, "it is 3: give a list"),
        (checks.items, torch.tensor(3.0), {}, "give a list"),
        (checks.function, 3, {}, "it is 3: give a function, or None"),
    ],
)
def test_a_bad_value_is_refused_in_a_sentence(check, value, options, said):
    with pytest.raises(ArgumentError, match=said):
        check("it", value, **options)


@pytest.mark.parametrize("text", ["a", "{0}", "{name}", "{{}}", "{} and {}", "{", "{}}", "", None, 3])
def test_a_template_has_one_place_for_the_word_and_no_other_braces(text):
    with pytest.raises(ArgumentError):
        checks.template("template", text)


# --- every public function ------------------------------------------------------------------------------

COUNT = (0, -1, 10**9, 2.5, True, "3", NAN, [1])
WHOLE = tuple(one for one in COUNT if one != 0 or one is True)  # 0 is allowed
SEED = (-1, 2**32, 1.5, True, "0", NAN)
NUMBER = (NAN, INF, -INF, "1", True, [1.0])
LARGE = (*NUMBER, 1e30, -1e30)
TEXT = (None, 3, "", " ", b"a", ["a"])
ANY_TEXT = (None, 3, b"a", ["a"])  # an empty one is allowed
TEXTS = (None, 3, [], [3], [None], {"a": 1}, b"a")
LABELS = tuple(one for one in TEXTS if one != [])
TEMPLATE = (None, 3, "", "a", "{0}", "{x}", "{{}}", "{} {}", ["a {}", "b"])
WORD = (None, 3, "", "a b", " a", ["a"])
PICTURES = (None, 3, [], [None], ["nowhere.png"], np.full((4, 4, 3), NAN), np.zeros((2, 2, 2)), {}, object())
SUBJECT = (None, 3, "cat", object(), SimpleNamespace(name="cat"), [], [None])
JUDGE = (None, 3, "judge", object())
EDIT = (3, "cat.safetensors", object())
NEURONS = (None, 3, "x", object(), [])
FUNCTION = (3, "x", [])
DTYPE = ("float32", torch.int8, 3)
FLAG = ("no", 1, None)
SETTINGS = (3, "x", [], {"round": 3}, {"method": "another"})
NAMED = (3, "x", [], {3: 3})
CHOICE = ("magic", None, 3, [], True)
TENSOR = (None, 3, "x", [1.0], np.zeros((1, 4, 8, 8)), torch.zeros(2, 3), torch.zeros(0), object())
POSITION = (-1, 10**9, 2.5, True, None, [], ["a"], [99])
STEPS = (99, [99], [-99], [], 2.5, "x", [True])

CHOSEN = (-1, 2.5, "x", True, [], [-1], [True], (0.5, 0.5), (0.0, 2.0), (0.1,), {})  # numbers of steps, or shares

#: The kind of a parameter by its name, unless a call says otherwise: names mean the same everywhere.
KINDS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("batch_size", "samples", "pictures", "rounds", "steps", "chunk", "seeds", "n", "versions"), COUNT),
    **dict.fromkeys(("sampler_steps", "prior_images", "size", "max_words", "bins", "preview_steps", "columns"), COUNT),
    **dict.fromkeys(("inversion_steps", "finetune_steps", "validate_every", "validation_pictures", "hidden"), COUNT),
    **dict.fromkeys(("dictionary", "explain", "bands", "resolution", "limit", "max_bytes", "objects"), COUNT),
    **dict.fromkeys(("prior_batch_size", "prior_samples", "preserve_batch_size", "kid_pictures"), WHOLE),
    "seed": SEED,
    **dict.fromkeys(("guidance_scale", "dose"), LARGE),
    **dict.fromkeys(("learning_rate", "token_learning_rate", "ridge", "erase_weight"), (*NUMBER, 0, -1)),
    **dict.fromkeys(("weight_decay", "prior_weight", "preserve_weight", "sparsity", "eta", "factor"), (*NUMBER, -1)),
    **dict.fromkeys(
        ("share", "fraction", "density", "threshold_quantile", "momentum", "rate", "cut"), (*NUMBER, -1, 2)
    ),
    **dict.fromkeys(("energy", "strength", "level", "false_alarms", "degrees"), (*NUMBER, -1, 500)),
    "guidance_interval": (0.5, (0.5, 0.2), (0, 2), (NAN, 1), "ab", (0.1,), (0, 0.5, 1), ("a", "b")),
    **dict.fromkeys(("prompt", "target", "anchor", "scene"), TEXT),
    "prompts": (None, 3, [], [3], [None], {"a": 1}, b"a"),
    **dict.fromkeys(("captions", "words", "texts", "labels"), TEXTS),
    **dict.fromkeys(
        ("include", "exclude", "preserve", "paraphrases", "synonyms", "row_labels", "column_labels"), LABELS
    ),
    **dict.fromkeys(("small", "large", "small_words", "large_words"), LABELS),
    **dict.fromkeys(("template", "templates"), TEMPLATE),
    "token": WORD,
    **dict.fromkeys(("images", "references", "given", "prior"), PICTURES),
    "subject": SUBJECT,
    "subjects": SUBJECT,
    "judge": JUDGE,
    "edit": EDIT,
    **dict.fromkeys(("found", "union"), NEURONS),
    **dict.fromkeys(("callback", "on_calls", "shows", "render"), FUNCTION),
    "dtype": DTYPE,
    **dict.fromkeys(("keep_heads", "per_layer", "augment", "style", "colour", "extras", "beside_real"), FLAG),
    "settings": SETTINGS,
    **dict.fromkeys(("groups", "others", "masks", "lines", "deltas"), NAMED),
    **dict.fromkeys(("objective", "parameters", "teacher", "coefficients", "criterion", "rule", "precision"), CHOICE),
    **dict.fromkeys(("sign", "reduction", "scheduler", "kind", "level_of", "block"), CHOICE),
    **dict.fromkeys(("latents", "noise", "timesteps", "text", "text_embeddings", "theta", "flat", "scale"), TENSOR),
    **dict.fromkeys(("batch", "vocabulary", "decomposition", "layout", "limits"), (3, "x", object())),
}
NONE_IS_ALLOWED = {  # where None means "the default" or "none of these"
    *("prior", "edit", "callback", "on_calls", "shows", "dtype", "settings", "chunk", "dictionary", "explain", "limit"),
    *("words", "captions", "seed", "negative_prompt", "noise", "timesteps", "others", "vocabulary", "limits", "text"),
    *("ridge", "scene", "resolution", "token_learning_rate", "columns", "prompt", "total", "kind", "level", "block"),
}
FEW = {"steps": 1, "batch_size": 2, "progress": False}
DRAWN = {"sampler_steps": 1, "guidance_scale": 2.0, "seed": 0}
RUN = {"settings": None, "callback": None, "seed": 0}
TUNED = {**FEW, **RUN, "learning_rate": 1e-3, "weight_decay": 0.0}
CONCEPT = {"prior_batch_size": 0, "prior_weight": 1.0, "prior_images": 1, "sampler_steps": 1, "guidance_scale": 2.0}


@pytest.fixture(scope="session")
def made(v_pipe, judge, tmp_path_factory) -> SimpleNamespace:
    """What the calls act on."""
    cat = make_subject(16)
    changed = {"name": "dog", "class_word": "dog", "token": "<d>", "prompt": "a <d> dog", "prior_prompt": "a dog"}
    dog = SimpleNamespace(**{**vars(cat), **changed})
    space = diffusion.KVSpace(v_pipe)
    found = neurons.ConceptNeurons(space.layout, range(20), [0.25] * 20, space.fingerprint(), subject="cat")
    data = finetuning.concept_latents(v_pipe, cat, batch_size=2, prior_batch_size=0)
    words = methods.encode_vocabulary(v_pipe, judge, progress=False)
    table = edits.vocabulary_fingerprint(v_pipe)
    parts = methods.Decomposition("pet", ("cat", "dog"), np.array([0.5, 0.25]), 2, 1.0, table, template="a {}")
    folder = tmp_path_factory.mktemp("pictures")
    cat.images[0].save(folder / "a.png")
    with measure.record_attention(v_pipe) as maps:
        coneslab.generate(v_pipe, "a cat", sampler_steps=2)
    delta = edits.WeightDelta(
        {name: torch.zeros_like(one) for name, one in space.parameters.items()}, found.fingerprint
    )
    token = edits.TokenEdit(("<x>",), torch.zeros(1, 24), table)
    return SimpleNamespace(
        pipe=v_pipe,
        judge=judge,
        cat=cat,
        dog=dog,
        pics=list(cat.images),
        found=found,
        layout=space.layout,
        theta=space.gather(),
        data=data,
        batch=next(finetuning.sample_batches(v_pipe, data, seed=0)),
        gradient=finetuning.KVGradient(v_pipe, data),
        words=words,
        parts=parts,
        folder=folder,
        maps=maps,
        delta=delta,
        token=token,
        trained=edits.Combined((token, delta)),
        classifier=methods.train_classifier(v_pipe, list(cat.images[:2]) * 2, ["a", "b"] * 2, steps=1, batch_size=2),
        latents=torch.zeros(1, 4, 8, 8),
        text=diffusion.encode_prompts(v_pipe, "a cat"),
        at=torch.tensor([5]),
    )


MAPS = ("values", "mask")
NO_MAP = (None, 3, "x", [], np.ones(4), np.ones((3, 3)), [[NAN, 1.0], [1.0, 1.0]], np.zeros((2, 2, 2)))
LONG = "a cat on the grass in the city and a dog on the beach"  # the small pipeline reads twelve tokens


def traced() -> pandas.DataFrame:
    return pandas.DataFrame({"site": ["mid"], "band": [0], "first_step": [0], "last_step": [1], "effect": [0.5]})


def in_a_plane() -> pandas.DataFrame:
    """A condition with the two measures of a plane."""
    rows = [{"condition": "a", "measure": one, "value": 0.5, "low": 0.4, "high": 0.6} for one in ("text", "image")]
    return pandas.DataFrame(rows)


def scored() -> pandas.DataFrame:
    numbers = {"value": [0.5], "chance": [0.1], "elsewhere": [0.2], "objects": [1]}
    return pandas.DataFrame({"layer": ["mid"], "timestep": [5], "word": ["all"], "measure": ["IoU"], **numbers})


#: name -> made -> (function, arguments by position, arguments to spoil, kinds where the name does not say it)
CALLS: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    # diffusion
    "generate": lambda m: (
        coneslab.generate,
        (m.pipe,),
        dict(prompts="a", **DRAWN, batch_size=1, guidance_interval=(0, 1), callback=None, on_calls=None, dtype=None),
        {"seed": (*SEED, None, [], [-1], [0, 1])},
    ),
    "generate, negative": lambda m: (
        coneslab.generate,
        (m.pipe, "a"),
        {"negative_prompt": ""},
        {"negative_prompt": (3,)},
    ),
    "generate, steps": lambda m: (coneslab.generate, (m.pipe, "a"), {"sampler_steps": 1}, {"sampler_steps": (1001,)}),
    "sites": lambda m: (diffusion.sites, (), {"pipe": m.pipe}, {"pipe": (None, 3, "tiny", object())}),
    "watch": lambda m: (
        coneslab.watch,
        (m.pipe,),
        dict(sites="mid", steps=None, half="both", dtype=None, max_bytes=9),
        {"sites": (*TEXTS, "nowhere", ["mid", "x"], ""), "steps": CHOSEN, "half": CHOICE, "max_bytes": COUNT[:2]},
    ),
    "patch": lambda m: (
        coneslab.patch,
        (m.pipe,),
        dict(site="mid", function=torch.zeros_like, steps=None, half="text"),
        {"site": (*TEXTS, "nowhere"), "function": (None, *FUNCTION, m.theta), "steps": CHOSEN, "half": CHOICE},
    ),
    "load": lambda m: (
        coneslab.load,
        (),
        dict(name_or_path="tiny", dtype=torch.float32),
        {"name_or_path": (None, 3, "x")},
    ),
    "device": lambda m: (diffusion.usable_device, (), {"device": "cpu"}, {"device": ("", "gpu", 3.5, [], "cuda:99")}),
    "encode_images": lambda m: (diffusion.encode_images, (m.pipe,), dict(images=m.pics, batch_size=1)),
    "decode_latents": lambda m: (
        diffusion.decode_latents,
        (m.pipe,),
        dict(latents=m.latents, batch_size=1),
        {"latents": (*TENSOR, torch.full((1, 4, 8, 8), NAN), m.at)},
    ),
    "encode_prompts": lambda m: (diffusion.encode_prompts, (m.pipe,), {"prompts": "a"}),
    "tokenize": lambda m: (diffusion.tokenize, (m.pipe,), {"prompts": "a"}),
    "encode_ids": lambda m: (diffusion.encode_ids, (m.pipe,), {"ids": m.at[None]}, {"ids": TENSOR}),
    "snr": lambda m: (diffusion.snr, (m.pipe,), {"timesteps": m.at}, {"timesteps": (*TENSOR, m.at + 1000, m.at - 9)}),
    "add_noise": lambda m: (
        diffusion.add_noise,
        (m.pipe.scheduler,),
        dict(latents=m.latents, noise=m.latents, timesteps=m.at),
        dict.fromkeys(("noise", "timesteps"), (*TENSOR,)),
    ),
    "target": lambda m: (
        diffusion.target,
        (m.pipe.scheduler,),
        dict(latents=m.latents, noise=m.latents, timesteps=m.at),
        dict.fromkeys(("noise", "timesteps"), (*TENSOR,)),
    ),
    "stratified_timesteps": lambda m: (
        diffusion.stratified_timesteps,
        (),
        dict(n=2, total=10, generator=torch.Generator()),
        {"total": COUNT, "generator": (None, 3)},
    ),
    "denoising_loss": lambda m: (
        diffusion.denoising_loss,
        (m.pipe,),
        dict(latents=m.latents, text_embeddings=m.text, noise=m.latents, timesteps=m.at, reduction="mean"),
    ),
    "denoising_loss, more": lambda m: (
        diffusion.denoising_loss,
        (m.pipe, m.latents, m.text),
        dict(weights=torch.ones(1), mask=torch.ones(1, 1, 8, 8), regression_target=m.latents),
        dict.fromkeys(("weights", "mask", "regression_target"), TENSOR[1:]),
    ),
    "clean_and_noise": lambda m: (
        diffusion.clean_and_noise,
        (m.pipe.scheduler,),
        dict(noisy=m.latents, predicted=m.latents, timestep=5),
        {"noisy": TENSOR, "predicted": TENSOR, "timestep": (-1, 1000, 2.5, None, "5")},
    ),
    "guided": lambda m: (
        diffusion.guided,
        (m.pipe,),
        dict(noisy=m.latents, timestep=5, text=m.text, empty=None, guidance_scale=2.0),
        {"noisy": TENSOR, "text": TENSOR, "empty": TENSOR[1:], "timestep": (None, "5"), "guidance_scale": NUMBER},
    ),
    **{
        one.__name__: lambda m, one=one: (
            one,
            (m.pipe,),
            dict(text_embeddings=m.text, noise=m.latents, sampler_steps=1, guidance_scale=2.0, callback=None),
            {"sampler_steps": (*COUNT, 1001), "noise": TENSOR},
        )
        for one in (diffusion.ddim_sample, diffusion.ddpm_sample)
    },
    "start_noise": lambda m: (
        diffusion.start_noise,
        (m.pipe,),
        {"seeds": [0]},
        {"seeds": (*SEED, None, [], [None], [-1])},
    ),
    "guided_between": lambda m: (
        diffusion.guided_between,
        (m.pipe,),
        dict(first=0.0, last=1.0),
        {"first": (*NUMBER, 1.0, -1), "last": (*NUMBER, 0, 2)},
    ),
    "frozen_copy": lambda m: (diffusion.frozen_copy, (m.pipe.unet,), {"dtype": torch.float32}),
    "layout": lambda m: (m.layout.heat_map, (), dict(flat=m.theta, bins=3)),
    "where": lambda m: (
        m.layout.where,
        (),
        dict(kind="V", level=0, block="mid"),
        {"kind": ("value", "k", 3, True), "level": (99, -1, "0"), "block": ("middle", 3)},
    ),
    # edits
    **{
        name: lambda m, name=name: (getattr(m, name).applied, (m.pipe,), {"dose": 1.0}, {"dose": (*LARGE, None)})
        for name in ("found", "delta", "token", "parts", "trained")
    },
    "applied": lambda m: (edits.applied, (), dict(edit=m.delta, pipe=m.pipe, dose=1.0)),
    "combined": lambda m: (
        edits.Combined,
        (),
        {"edits": (m.delta,), "dose": 0.5},
        {"edits": (None, 3, [None], "x"), "dose": (-0.5, 2, None)},
    ),
    "compress": lambda m: (edits.compress, (), dict(edit=m.delta, energy=0.5, dtype=torch.float32), {"edit": NEURONS}),
    "WeightDelta": lambda m: (edits.WeightDelta, (), dict(deltas={}, fingerprint="ab"), {"fingerprint": TEXT}),
    "TokenEdit": lambda m: (
        edits.TokenEdit,
        (),
        dict(tokens="<x>", vectors=torch.zeros(1, 4), fingerprint="ab", initial=()),
        {
            "tokens": (*TEXTS, "", "a b", ["a", "b"]),
            "vectors": TENSOR[:-2],
            "fingerprint": TEXT,
            "initial": (3, ["a", "b"]),
        },
    ),
    "with_tokens": lambda m: (
        edits.with_tokens,
        (m.pipe.tokenizer,),
        {"tokens": ["<x>"]},
        {"tokens": (*TEXTS, "", "a b", ["a", "a"], ["SKS", "sks"], "<|endoftext|>")},
    ),
    "LearnedText": lambda m: (
        edits.LearnedText,
        (m.pipe,),
        dict(captions=["a <x>"], tokens=["<x>"]),
        {"captions": (*TEXTS, "a cat", "a " * 11 + "<x>"), "tokens": (*TEXTS, "", "a b", "cat")},
    ),
    "start_vector": lambda m: (edits.start_vector, (m.pipe,), {"word": "cat"}, {"word": ANY_TEXT}),
    "export_tokens": lambda m: (
        edits.export_tokens,
        (),
        dict(edit=m.token, pipe=m.pipe, folder=m.folder / "out", names=None),
        {"edit": NEURONS, "names": (3, [], {"<x>": "a b"}, {"<x>": 3})},
    ),
    "export_lora": lambda m: (
        edits.export_lora,
        (),
        dict(edit=edits.compress(m.trained.edits[1]), folder=m.folder / "out"),
        {"edit": NEURONS},
    ),
    # fine-tuning
    "concept_latents": lambda m: (
        finetuning.concept_latents,
        (m.pipe,),
        dict(subject=m.cat, settings=None, prior=m.pics, **CONCEPT, batch_size=1, seed=0),
    ),
    "joint_latents": lambda m: (finetuning.joint_latents, (m.pipe,), dict(subjects=[m.cat], settings=None)),
    "CaptionedLatents": lambda m: (
        finetuning.CaptionedLatents,
        (),
        dict(latents=m.latents, text=m.text[0], batch_size=1, weight=1.0, mask=None),
        {"weight": (*NUMBER, -1), "mask": TENSOR[1:], "text": (*TENSOR[:5], m.text)},
    ),
    "KVGradient": lambda m: (
        finetuning.KVGradient,
        (m.pipe,),
        dict(data=m.data, dtype=None, chunk=None),
        {"data": (None, [], [3], "x")},
    ),
    "gradient": lambda m: (
        m.gradient,
        (),
        dict(theta=m.theta, batch=m.batch),
        {"batch": (None, 3, m.batch.part(slice(1)))},
    ),
    "gradients": lambda m: (m.gradient.gradients, (), dict(theta=m.theta, text=m.text, batch=m.batch)),
    "generate_once": lambda m: (
        finetuning.generate_once,
        (m.pipe,),
        dict(prompts="a", **DRAWN),
        {"seed": (*SEED, None, [], [-1])},
    ),
    "prior_pictures": lambda m: (finetuning.prior_pictures, (m.pipe,), dict(subject=m.cat, n=1, **DRAWN)),
    "sample_batches": lambda m: (
        finetuning.sample_batches,
        (m.pipe,),
        dict(data=m.data, seed=0, bands=1),
        {"data": (None, [], [3])},
    ),
    "several": lambda m: (finetuning.several, (), {"subjects": m.cat}),
    "total_loss": lambda m: (
        finetuning.total_loss,
        (),
        dict(data=m.data, losses=[1.0]),
        {"data": (None, [3]), "losses": ([], [1.0, 2.0])},
    ),
    # neurons
    "find_concept_neurons": lambda m: (
        coneslab.find_concept_neurons,
        (m.pipe,),
        dict(subject=m.cat, **RUN, **CONCEPT, rounds=1, batch_size=1, chunk=None, dtype=None, prior=None, cut=0.5)
        | dict(
            threshold_quantile=0.9, momentum=0.5, rate=0.5, density=0.1, bands=1, sign=1, rule="bands", per_layer=True
        ),
    ),
    "find_concept_neurons, more": lambda m: (
        coneslab.find_concept_neurons,
        (m.pipe, m.cat),
        dict(start=None, threshold=None),
        {"start": (3, "x", m.delta), "threshold": NUMBER},
    ),
    "ready_neurons": lambda m: (
        neurons.ready_neurons,
        (m.pipe,),
        dict(subject=m.cat, settings=None, kept=None, rounds=1, batch_size=1, prior_batch_size=0, progress=False),
    ),
    "reversed_neurons": lambda m: (neurons.reversed_neurons, (m.pipe,), dict(subject=m.cat, rounds=1)),
    "top_k_neurons": lambda m: (
        neurons.top_k_neurons,
        (m.pipe,),
        dict(
            subject=m.cat, density=0.1, criterion="weight", per_layer=True, rounds=1, settings=None, prior=None, seed=0
        ),
    ),
    "mean_gradient": lambda m: (
        neurons.mean_gradient,
        (m.pipe,),
        dict(subject=m.cat, rounds=1, prior=m.pics, dtype=None),
    ),
    "finetune_kv": lambda m: (
        coneslab.finetune_kv,
        (m.pipe,),
        dict(subject=m.cat, prior=m.pics, chunk=None, dtype=None, **TUNED, **CONCEPT),
    ),
    "finetune_together": lambda m: (
        coneslab.finetune_together,
        (m.pipe,),
        dict(union=m.found, subjects=[m.cat], chunk=None, dtype=None, **TUNED, **CONCEPT),
    ),
    "random_neurons": lambda m: (neurons.random_neurons, (), dict(found=m.found, seed=0)),
    **{
        name: lambda m, damage=damage: (damage, (), dict(found=m.found, fraction=0.1, seed=0))
        for name, damage in neurons.DAMAGES.items()
    },
    "concept_loss": lambda m: (
        neurons.concept_loss,
        (m.pipe,),
        dict(
            subject=m.cat,
            edit=None,
            dose=1.0,
            samples=1,
            prior=None,
            prior_samples=0,
            seed=0,
            batch_size=1,
            callback=None,
        ),
    ),
    "output_changes": lambda m: (
        neurons.output_changes,
        (m.pipe,),
        dict(edits=[m.found], subjects=[m.cat], samples=1, seed=0),
        {"edits": (None, 3, [], ["x"])},
    ),
    "additivity": lambda m: (
        neurons.additivity,
        (m.pipe,),
        dict(found=[m.found] * 2, subjects=[m.cat, m.dog], samples=1, seed=0),
        {"found": (*NEURONS, [m.found]), "subjects": (*SUBJECT, [m.cat])},
    ),
    "overlap_matrices": lambda m: (neurons.overlap_matrices, (), {"found": [m.found]}),
    "joint_prompt": lambda m: (neurons.joint_prompt, (), {"subjects": [m.cat]}),
    "cosines": lambda m: (
        neurons.cosines,
        (),
        dict(a=torch.ones(2, 4), b=torch.ones(2, 4)),
        dict.fromkeys(("a", "b"), TENSOR),
    ),
    "quantiles": lambda m: (
        neurons.quantiles,
        (),
        dict(values=m.theta, layout=m.layout, share=0.5),
        {"values": TENSOR},
    ),
    "quantised": lambda m: (
        neurons.quantised,
        (),
        dict(scales=np.zeros(2), precision="binary", cut=0.5),
        {"scales": ("x", None, [2.0], [NAN], object())},
    ),
    "encode": lambda m: (
        neurons.encode,
        (),
        dict(indices=np.arange(1), scales=np.zeros(1), sizes=[4], fingerprint="ab" * 32, subject="", cut=0.5),
        {
            "indices": (None, [1, 0], [0.5], "x", [4], [-1]),
            "scales": ([0, 0], "x", [2.0]),
            "sizes": (None, [], [0], "x"),
        }
        | {"fingerprint": (None, "", "xy", 3), "subject": ANY_TEXT},
    ),
    "decode": lambda m: (
        neurons.decode,
        (),
        dict(data=m.found.to_bytes(), sizes=[layer.size for layer in m.layout]),
        {"data": (None, "x", 3, b"x"), "sizes": (None, [], [0], [4])},
    ),
    "ConceptNeurons": lambda m: (
        neurons.ConceptNeurons,
        (m.layout,),
        dict(indices=[0], scales=[0.0], fingerprint="ab", subject="", cut=0.5, settings={}, history={}),
        {
            "indices": (None, [10**9], "x"),
            "scales": (None, "x", [2]),
            "subject": ANY_TEXT,
            "settings": (3,),
            "history": (3,),
        },
    ),
    "from_scale": lambda m: (
        neurons.ConceptNeurons.from_scale,
        (),
        dict(scale=m.theta.abs().clamp(max=1), layout=m.layout, fingerprint="ab"),
    ),
    "TunedNeurons": lambda m: (
        neurons.TunedNeurons,
        (m.found,),
        {"values": np.zeros(20)},
        {"values": (None, "x", [1.0], [NAN] * 20)},
    ),
    "shut": lambda m: (m.found.shut, (), {"cut": 0.5}),
    "binary": lambda m: (m.found.binary, (), {"cut": 0.5}),
    "to": lambda m: (m.found.to, (), {"precision": "binary"}),
    "overlap": lambda m: (m.found.overlap, (), {"other": m.found}, {"other": NEURONS}),
    "within": lambda m: (
        m.found.within,
        (),
        dict(kind="V", level=0, block="mid"),
        {"kind": ("value", "k", 3, True), "level": (99, -1, "0"), "block": ("middle", 3)},
    ),
    # methods
    "custom_diffusion": lambda m: (
        coneslab.custom_diffusion,
        (m.pipe,),
        dict(
            subjects=[m.cat], chunk=None, dtype=None, **TUNED, **CONCEPT, augment=False, small_words=(), large_words=()
        )
        | dict(initial=None, token_learning_rate=None),
        {"initial": (3, [])},
    ),
    "textual_inversion": lambda m: (
        coneslab.textual_inversion,
        (m.pipe,),
        dict(subjects=m.cat, chunk=None, dtype=None, **TUNED, initial=None),
        {"initial": (3, [], ["a", "b"], [3])},
    ),
    "dreambooth": lambda m: (coneslab.dreambooth, (m.pipe,), dict(subjects=m.cat, dtype=None, **TUNED, **CONCEPT)),
    "lora": lambda m: (
        coneslab.lora,
        (m.pipe,),
        dict(subjects=m.cat, dtype=None, **TUNED, **CONCEPT, rank=2, alpha=None, targets="all"),
    ),
    "scaled_latents": lambda m: (
        methods.scaled_latents,
        (m.pipe,),
        dict(subject=m.cat, batch_size=2, versions=1, seed=0, small=(), large=()),
    ),
    "merge": lambda m: (
        coneslab.merge,
        (m.pipe,),
        dict(edits=[m.trained] * 2, subjects=[m.cat, m.dog], templates="a {}", captions="a cat", ridge=None),
        {"edits": (None, 3, [], [m.trained], [3, 3]), "ridge": (*NUMBER, -1)},
    ),
    "ablate": lambda m: (
        coneslab.ablate,
        (m.pipe,),
        dict(target="a cat", anchor="a dog", **TUNED, sampler_steps=1, guidance_scale=2.0, templates="{}", pictures=1)
        | dict(
            preserve_batch_size=0,
            preserve_weight=1.0,
            objective="model",
            parameters="all",
            teacher="frozen",
            images=None,
        )
        | dict(chunk=None, dtype=None),
        {
            "target": (None, 3, "", " ", [], [3], ["a cat", ""]),
            "anchor": (None, 3, "", [], ["a dog"] * 2),
            "images": PICTURES[1:],
        },
    ),
    "ablation_data": lambda m: (
        methods.ablation_data,
        (m.pipe,),
        dict(target="a cat", anchor="a dog", images=m.pics),
        {"target": (None, "", []), "anchor": (None, "", []), "images": PICTURES[1:]},
    ),
    "closed_form_edit": lambda m: (
        methods.closed_form_edit,
        (m.pipe,),
        dict(target="a cat", anchor="a dog", settings=None, preserve=(), templates="{}", erase_weight=1.0, ridge=0.1)
        | dict(preserve_weight=0.1),
        {"target": (None, 3, "", [], ["a " * 20]), "anchor": (None, "", "a " * 20)},
    ),
    "erase": lambda m: (
        methods.erase,
        (m.pipe,),
        dict(target="a cat", **TUNED, pictures=1, sampler_steps=1, guidance_scale=2.0, eta=1.0, chunk=None, dtype=None),
    ),
    "prune_feed_forward": lambda m: (
        methods.prune_feed_forward,
        (m.pipe,),
        dict(target="a cat", anchor="a dog", settings=None, share=0.1, pictures=1, samples=1, **DRAWN),
    ),
    "ablating_neurons": lambda m: (
        methods.ablating_neurons,
        (m.pipe,),
        dict(target="a cat", anchor="a dog", pictures=1, rounds=1, dtype=None, **RUN),
    ),
    "evaluate_ablation": lambda m: (
        methods.evaluate_ablation,
        (m.pipe,),
        dict(judge=m.judge, edit=None, target="a cat", anchor="a dog", others={"x": "a car"}, pictures=2, **DRAWN)
        | dict(probes=(), rivals=(), shows=None, batch_size=1),
        {
            "others": (*NAMED, {"x": 3}, {"x": [3]}, {"anchor": "a car"}, {"asked by its word": "a car"}),
            "probes": (None, 3, "x", [3]),
            "rivals": LABELS,
        }
        | {"sampler_steps": (*COUNT, 1001)},
    ),
    "unlearn": lambda m: (
        methods.unlearn,
        (m.pipe,),
        dict(target="a cat", anchor="a dog", **TUNED, sampler_steps=1, guidance_scale=2.0, pictures=1, eta=1.0, words=1)
        | dict(preserve_batch_size=1, preserve_weight=1.0, preserve=(), images=None, chunk=None, dtype=None, length=1),
        {
            "target": (None, 3, "", " ", [], [3], ["a cat", ""]),
            "anchor": (None, 3, "", [], ["a dog"] * 2),
            "images": PICTURES[1:],
            "preserve_batch_size": COUNT,
            "words": (-1, 1000, 2.5, "3", True),
            "length": (*COUNT, 9),
            "dtype": (*DTYPE, torch.float16),
        },
    ),
    "completions": lambda m: (
        methods.completions,
        (m.pipe,),
        dict(pictures=m.pics, prompt="", level=1.0, settings=None, batch_size=1, **DRAWN),
        {"pictures": PICTURES, "prompt": ANY_TEXT, "level": (*NUMBER, 0, -1, 2, 0.1), "sampler_steps": (*COUNT, 1001)},
    ),
    "filled_in": lambda m: (
        methods.filled_in,
        (m.pipe,),
        dict(pictures=m.pics[0], masks=[np.ones((16, 16), bool)], prompt="", settings=None, batch_size=1, **DRAWN),
        {
            "pictures": PICTURES,
            "masks": (
                None,
                3,
                "x",
                [],
                [None],
                [np.ones((2, 2), bool)],
                [np.ones((16, 16))],
                [np.ones((16, 16), bool)] * 2,
            ),
            "prompt": ANY_TEXT,
            "sampler_steps": (*COUNT, 1001),
        },
    ),
    "stirred": lambda m: (
        methods.stirred,
        (m.pipe,),
        dict(prompts="a cat", churn=1.0, settings=None, batch_size=1, **DRAWN),
        {"churn": (*LARGE, -1), "sampler_steps": (*COUNT, 1001)},
    ),
    "steered": lambda m: (
        methods.steered,
        (m.pipe,),
        dict(classifier=m.classifier, label="a", prompts="", scale=1.0, settings=None, batch_size=1, **DRAWN),
        {"classifier": (None, 3, "x", object()), "label": (*TEXT, "z"), "scale": (*LARGE, -1)}
        | {"sampler_steps": (*COUNT, 1001)},
    ),
    "train_classifier": lambda m: (
        methods.train_classifier,
        (m.pipe,),
        dict(pictures=m.pics[:2] * 2, labels=["a", "b"] * 2, settings=None, steps=1, batch_size=1, learning_rate=1e-3)
        | dict(width=2, held_out=0.5, seed=0),
        {
            "pictures": PICTURES,
            "labels": (*TEXTS, ["a"] * 4, ["a", "b"], ["a", "b", "c", "d"]),
            "width": COUNT,
            "held_out": (*NUMBER, 0, 1),
        },
    ),
    "attack_prompt": lambda m: (
        methods.attack_prompt,
        (m.pipe,),
        dict(pictures=m.pics, prompt="a cat", exclude="cat", settings=None, tokens=1, rounds=1, candidates=1)
        | dict(proposals=1, batch_size=1, seed=0, dtype=None),
        {"pictures": PICTURES, "prompt": ANY_TEXT, "exclude": LABELS[:1], "tokens": (*COUNT, 99)}
        | {"candidates": COUNT, "proposals": COUNT},
    ),
    "asking": lambda m: (
        methods.asking,
        (),
        dict(name="x", prompts="a", uses_word=True, contexts="{}"),
        {"name": TEXT, "uses_word": FLAG, "contexts": TEMPLATE},
    ),
    "completing": lambda m: (
        methods.completing,
        (),
        dict(pictures=m.pics, level=0.5, prompt="", name=""),
        {"pictures": PICTURES, "level": (*NUMBER, 0, 2), "prompt": ANY_TEXT, "name": ANY_TEXT},
    ),
    "inpainting": lambda m: (
        methods.inpainting,
        (),
        dict(pictures=m.pics[0], masks=[np.ones((16, 16), bool)], prompt=""),
        {"pictures": PICTURES, "masks": (None, 3, "x", [], [1, 2]), "prompt": ANY_TEXT},
    ),
    "steering": lambda m: (
        methods.steering,
        (),
        dict(classifier=m.classifier, label="a", prompt="", scale=1.0),
        {"classifier": (None, 3, object()), "label": (*TEXT, "z"), "prompt": ANY_TEXT, "scale": (*LARGE, -1)},
    ),
    "stirring": lambda m: (methods.stirring, (), dict(prompt="a", churn=1.0), {"churn": (*LARGE, -1)}),
    "searching": lambda m: (
        methods.searching,
        (),
        dict(pictures=m.pics, prompt="", exclude="cat", settings=None),
        {"pictures": PICTURES, "prompt": ANY_TEXT, "exclude": LABELS[:1]},
    ),
    "inverting": lambda m: (
        methods.inverting,
        (),
        dict(pictures=m.pics, initial="", token="<b>", steps=1, batch_size=1, seed=0),
        {"pictures": PICTURES, "initial": ANY_TEXT},
    ),
    "retraining": lambda m: (
        methods.retraining,
        (),
        dict(pictures=m.pics, prompt="a cat", steps=1, batch_size=1, seed=0),
        {"pictures": PICTURES},
    ),
    "usual_probes": lambda m: (
        methods.usual_probes,
        (),
        dict(target="a cat", anchor="a dog", pictures=m.pics, word="cat", budget=None),
        {"pictures": PICTURES, "word": (*ANY_TEXT, "dog"), "budget": SETTINGS},
    ),
    "floors_of": lambda m: (
        methods.floors_of,
        (),
        dict(control=methods.Profile([methods.Finding("x", "y", *[0.5] * 6)])),
        {"control": (None, 3, "x", object())},
    ),
    "class_pictures": lambda m: (
        methods.class_pictures,
        (),
        dict(name="cat", n=1, styles="flat", seed=0),
        {"name": (None, 3, "", "unicorn", []), "styles": (None, 3, "", "oil", [], [3])},
    ),
    "class_rivals": lambda m: (methods.class_rivals, (), {"name": "cat"}, {"name": (None, 3, "", "unicorn", [])}),
    "words_for": lambda m: (methods.words_for, (), {"name": "cat"}, {"name": (None, 3, "", "unicorn", [])}),
    "style_rivals": lambda m: (
        methods.style_rivals,
        (),
        dict(style="flat", name="cat"),
        {"style": (None, 3, "", "oil"), "name": (None, 3, "", "unicorn", [])},
    ),
    "class_probes": lambda m: (
        methods.class_probes,
        (),
        dict(name="cat", anchor="dog", beside="car", classifier=None, pictures=1, budget=None),
        {"name": (None, 3, "", "unicorn"), "anchor": (None, 3, "", "unicorn"), "beside": TEXTS}
        | {"classifier": (3, "x", m.classifier), "budget": SETTINGS},
    ),
    "style_probes": lambda m: (
        methods.style_probes,
        (),
        dict(style="flat", anchor="3d", name="cat", classifier=None, pictures=1, budget=None),
        {"style": (None, 3, "", "oil"), "anchor": (None, 3, "", "oil"), "name": (None, 3, "", "unicorn")}
        | {"classifier": (3, "x", m.classifier), "budget": SETTINGS},
    ),
    "world_classifier": lambda m: (
        methods.world_classifier,
        (m.pipe,),
        dict(by="class", pictures=2, settings=None, steps=1),
        {"by": CHOICE},
    ),
    "near_and_far": lambda m: (methods.near_and_far, (), {"name": "cat"}, {"name": (None, 3, "", "unicorn", [])}),
    "misspelled": lambda m: (ablation.misspelled, (), {"word": "cat"}, {"word": TEXT}),
    "calibrated": lambda m: (
        methods.CopyDetector.calibrated,
        (m.judge,),
        dict(original=m.pics[0], others=m.pics, false_alarms=0.5),
        {"original": PICTURES, "others": PICTURES},
    ),
    "decompose": lambda m: (
        coneslab.decompose,
        (m.pipe, m.pics),
        dict(judge=m.judge, **TUNED, pictures=1, dictionary=4, explain=2, sparsity=0.1, hidden=2, coefficients="mlp")
        | dict(include=(), exclude=(), exclude_similar=None, template="a {}", token="<c>", validate_every=1, dtype=None)
        | dict(validation_pictures=1, sampler_steps=1, guidance_scale=2.0, name="", vocabulary=None),
        {"exclude_similar": (*NUMBER, 2), "name": ANY_TEXT, "sampler_steps": (*COUNT, 1001)},
    ),
    "decompose, concept": lambda m: (
        coneslab.decompose,
        (m.pipe,),
        dict(concept="a cat", judge=m.judge),
        {"concept": (*PICTURES[:4], "", " ", "a cat " * 9)},
    ),
    "decompose_image": lambda m: (
        coneslab.decompose_image,
        (m.pipe,),
        dict(decomposition=m.parts, judge=m.judge, **DRAWN, threshold=0.5, target="concept", max_words=2, batch_size=2)
        | dict(prompt=None, near_synonyms=(), callback=None),
        {
            "threshold": (*NUMBER, 2),
            "target": ("magic", None, 3, [], ["nowhere.png"]),
            "near_synonyms": (3, "ab", [3], [[]]),
        }
        | {"sampler_steps": (*COUNT, 1001), "prompt": TEXT[1:]},
    ),
    "encode_vocabulary": lambda m: (
        coneslab.encode_vocabulary,
        (m.pipe,),
        dict(judge=m.judge, words=["cat"], templates="a {}"),
        {"words": (3, [], [3], "unicorn", {"cat": 1})},
    ),
    "choose_dictionary": lambda m: (
        methods.choose_dictionary,
        (m.words, m.words.features[:1], m.judge),
        dict(size=2, prompt="", include=(), exclude=(), exclude_similar=0.9),
        {"prompt": ANY_TEXT, "exclude_similar": (*NUMBER, 2)},
    ),
    "Decomposition": lambda m: (
        methods.Decomposition,
        (),
        dict(concept="x", words=("cat", "dog"), coefficients=[0.5, 0.5], explain=2, norm=1.0, fingerprint="ab")
        | dict(token="<x>", template="a {}"),
        {"concept": TEXT, "fingerprint": TEXT, "coefficients": ("x", None, [1.0], [NAN, 1], [INF, 1], [-1, 1], [0, 0])}
        | {"norm": (*NUMBER, -1)},
    ),
    "top": lambda m: (m.parts.top, (), {"n": 1}, {"n": (-1, 2.5, "3", None, True)}),
    "of_words": lambda m: (m.parts.share, (), {"words": "cat"}, {"words": (None, 3, [3])}),
    "scaled": lambda m: (m.parts.scaled, (), dict(word="cat", factor=2.0), {"word": (None, 3, "unicorn")}),
    "vocabulary": lambda m: (m.words.part, (), {"rows": [0]}, {"rows": (None, 3, [], [-1], [10**6], ["a"], [0.5])}),
    "bias": lambda m: (
        methods.bias,
        (),
        dict(decomposition=m.parts, groups={"a": "cat", "b": ["dog"]}),
        {"groups": (*NAMED, {"a": "cat"}, {"a": "cat", "b": []}, {"a": 3, "b": 4}, {"a": "cat", "b": ["dog", "cat"]})},
    ),
    "rebalance": lambda m: (
        methods.rebalance,
        (),
        dict(decomposition=m.parts, groups={"a": "cat", "b": "dog"}, shares=None, total=None),
        {"shares": (3, {"a": 1}, {"a": NAN, "b": 1}, {"a": 2, "b": -1}), "total": (*NUMBER, 0, 1)}
        | {"groups": (*NAMED, {"a": "cat", "b": "cat"})},
    ),
    "group_shares": lambda m: (
        methods.group_shares,
        (),
        dict(judge=m.judge, images=m.pics, groups={"a": "cat", "b": "dog"}, template="a {}"),
    ),
    # measure
    "image_features": lambda m: (m.judge.image_features, (), {"images": m.pics}),
    "text_features": lambda m: (m.judge.text_features, (), {"prompts": "a"}),
    "classify": lambda m: (
        m.judge.classify,
        (),
        dict(images=m.pics, labels=["a", "b"]),
        {"labels": (*TEXTS, [[]], [[3]])},
    ),
    "text_alignment": lambda m: (
        m.judge.text_alignment,
        (),
        dict(images=m.pics, prompts="a", reduction="mean"),
        {"prompts": (None, 3, [], ["a"] * 2)},
    ),
    "image_alignment": lambda m: (
        m.judge.image_alignment,
        (),
        dict(images=m.pics, references=m.pics, reduction="mean"),
    ),
    "load_judge": lambda m: (
        coneslab.load_judge,
        (),
        dict(name_or_path="judge", device="cpu"),
        {"name_or_path": (None, 3, "x"), "device": ("", 3.5, "gpu")},
    ),
    "finds_objects": lambda m: (
        measure.finds_objects,
        (m.judge,),
        dict(images=m.pics[:1], objects=[["cat"]], level=0.1),
        {"objects": (None, 3, [], [3], [[]], [["cat"]] * 2)},
    ),
    "questions": lambda m: (
        measure.questions,
        (),
        dict(objects=1, seeds=1, limit=1, style=False, colour=False, seed=0),
        {"objects": (*COUNT, 5)},
    ),
    "evaluate_model": lambda m: (
        measure.evaluate_model,
        (m.pipe,),
        dict(judge=m.judge, seeds=1, **DRAWN, limit=1, extras=False, kid_pictures=0, batch_size=1, beside_real=False)
        | dict(guidance_interval=(0, 1), progress=False),
        {"kid_pictures": (*WHOLE, 1)},
    ),
    "judge_accuracy": lambda m: (
        measure.judge_accuracy,
        (),
        dict(judge=m.judge, styles=None, seeds=1, limit=1, seed=0),
        {"styles": ("oil", [], 3, [3])},
    ),
    "Sampler": lambda m: (
        measure.Sampler,
        (),
        dict(scheduler="DDIM", sampler_steps=1, guidance_scale=2.0, guided=(0, 1)),
        {"guided": KINDS["guidance_interval"]},
    ),
    "compare_samplers": lambda m: (
        measure.compare_samplers,
        (m.pipe, m.judge),
        dict(samplers=[measure.Sampler("DDIM", 1)], seeds=1, limit=1, kid_pictures=0, seed=0),
        {"samplers": (None, 3, [], ["DDIM"], [measure.Sampler("DDIM", 1001)])},
    ),
    "use_scheduler": lambda m: (measure.use_scheduler, (m.pipe,), {"name": "DDIM"}, {"name": CHOICE}),
    "record_attention": lambda m: (
        measure.record_attention,
        (m.pipe,),
        dict(words=(), keep_heads=False, dtype=torch.float16, max_bytes=9, guided=None),
        {"guided": ("no", 3), "max_bytes": (0, -1, 2.5, "3"), "words": (None, 3, [3], "", {"a": 1}, LONG)},
    ),
    "attention_merit": lambda m: (
        measure.attention_merit,
        (m.pipe,),
        dict(pictures=world.sample(1, seed=0), timesteps=[5], seed=0, batch_size=1),
        {"pictures": (None, 3, "x", m.pics), "timesteps": (None, 3, [], [1000], [-1], [0.5], "x")},
    ),
    "map_iou": lambda m: (measure.map_iou, (), dict(values=np.eye(2), mask=np.eye(2)), dict.fromkeys(MAPS, NO_MAP)),
    "points_at": lambda m: (measure.points_at, (), dict(values=np.eye(2), mask=np.eye(2)), dict.fromkeys(MAPS, NO_MAP)),
    "chance_iou": lambda m: (measure.chance_iou, (), {"mask": np.eye(2)}, {"mask": (None, 3, [], np.zeros((2, 2)))}),
    "trace_activations": lambda m: (
        measure.trace_activations,
        (m.pipe,),
        dict(source="a cat", into="a dog", sites="mid", bands=1, judge=None, metric=None, half="text", pictures=1)
        | dict(**DRAWN, batch_size=1, max_bytes=9**9, progress=False),
        {"source": (*ANY_TEXT, LONG), "into": (*ANY_TEXT, LONG), "sites": (*TEXTS, "nowhere"), "bands": (*COUNT, 2)}
        | {"judge": JUDGE[1:], "metric": FUNCTION, "half": CHOICE, "max_bytes": COUNT[:2]},
    ),
    "average": lambda m: (
        m.maps.average,
        (),
        dict(picture=0, layers=None, resolution=None, steps=slice(None), size=None),
        {
            "picture": (-1, 1, 2.5, True, "0"),
            "layers": ([], "up 9", ["up 9"], 3),
            "steps": STEPS,
            "resolution": (3, "8", 0),
        }
        | {"size": (3, (0, 1), (1,), (1, 2, 3), ("a", "b"))},
    ),
    "token_map": lambda m: (
        m.maps.token,
        (),
        dict(token="cat", picture=0),
        {"token": (*POSITION, "dog", ""), "picture": (-1, 1, 2.5)},
    ),
    "per_layer": lambda m: (
        m.maps.per_layer,
        (),
        dict(token=[1], picture=0),
        {"token": (*POSITION, "dog"), "picture": (-1, 1)},
    ),
    "layer_map": lambda m: (m.maps.layer, (), {"label": m.maps.layers[0]}, {"label": (None, 3, "up 9", [])}),
    "came_through": lambda m: (
        measure.came_through,
        (),
        dict(judge=m.judge, images=m.pics[:1], name="tom", degrees=30.0),
        {"name": (None, 3, "x", [])},
    ),
    "kid": lambda m: (
        measure.kid,
        (),
        dict(
            features_a=np.eye(3), features_b=np.eye(3), subset_size=2, subsets=1, degree=3, gamma=1.0, coef0=1.0, seed=0
        )
        | dict(paired=False),
        {"features_a": (None, "x", [1.0], np.full((3, 3), NAN)), "features_b": (None, np.eye(2)), "subsets": COUNT}
        | {"subset_size": (*COUNT, 4), "degree": COUNT, "gamma": (*NUMBER, 0), "coef0": NUMBER, "paired": FLAG},
    ),
    "bootstrap_interval": lambda m: (
        measure.bootstrap_interval,
        (),
        dict(values=[0.5] * 6, clusters=(), minus=None, level=0.9, resamples=9, seed=0),
        {"values": (None, "x", [], [NAN], [[1.0]]), "clusters": (3, "x", [[1]]), "minus": ("x", [1.0], [NAN] * 6)}
        | {"level": (*NUMBER, 0, 1, 95), "resamples": COUNT},
    ),
    "share_interval": lambda m: (
        measure.share_interval,
        (),
        dict(values=[0.5] * 6, clusters=(), level=0.9),
        {"values": (None, "x", [], [NAN], [[1.0]], [2.0], [-0.1]), "clusters": (3, "x", [[1]])}
        | {"level": (*NUMBER, 0, 1, 95)},
    ),
    "Setting": lambda m: (
        experiments.Setting,
        (m.pipe, m.judge),
        dict(rounds=1, pictures=1, sampler_steps=1, samples=1, guidance_scale=2.0, finetune_steps=1),
    ),
    "run_experiment": lambda m: (
        experiments.run_experiment,
        (),
        dict(name="controls", setting=experiments.Setting(m.pipe, m.judge), subjects="cat", seeds=1),
        {"name": (None, 3, "x", []), "setting": (None, 3), "subjects": (3, [], "unicorn", [3])},
    ),
    "compare_methods": lambda m: (
        experiments.compare_methods,
        (m.folder / "table.csv",),
        dict(
            methods="untouched model",
            counts=[1],
            seeds=1,
            subjects=None,
            pictures=1,
            sampler_steps=2,
            samples=2,
            settings=None,
        ),
        {
            "sampler_steps": (None, 0, "x", 2.5),
            "samples": (None, 0, "x", 2.5),
            "methods": (None, 3, [], "x", {"x": 3}),
            "counts": (None, 3, [], "1", [9], [0]),
            "subjects": (3, [], "unicorn"),
        }
        | {"settings": (3, [], "x")},
    ),
    "make_edit": lambda m: (
        experiments.make_edit,
        (),
        dict(method="Cones, float", pipe=m.pipe, subjects=[m.cat], seed=0),
        {"method": (None, 3, "x", []), "seed": (*SEED, None)},
    ),
    # the picture world
    "sample": lambda m: (
        world.sample,
        (),
        dict(n=1, seed=0, styles=("flat",), objects=(1, 0, 0, 0)),
        {
            "n": (-1, 10**9, 2.5, None),
            "seed": (*SEED, None),
            "styles": ("oil", [], 3, None),
            "objects": (3, [1], [NAN] * 4, [0] * 4, None),
        },
    ),
    "compose": lambda m: (
        world.compose,
        (),
        dict(objects=["cat"], scene="beach", seed=0, style="3d", caption=None),
        {
            "objects": (
                None,
                3,
                [],
                ["cat"] * 5,
                ["unicorn"],
                [3],
                [("cat", "3d")],
                [("cat", "oil", None)],
                [(3, "3d", None)],
            )
        }
        | {
            "scene": (None, 3, "moon", []),
            "style": (None, "oil", []),
            "seed": (*SEED, None),
            "caption": (3, []),
        },
    ),
    "sprite": lambda m: (
        world.sprite,
        (),
        dict(name="cat", style="3d", colour=None),
        {"name": (None, 3, "", "unicorn", []), "style": (None, 3, "oil", []), "colour": (3, "dark", [])},
    ),
    "memorised": lambda m: (world.memorised, (), {"name": "lighthouse"}, {"name": (None, 3, "x", [])}),
    "rearranged": lambda m: (
        world.rearranged,
        (),
        dict(name="lighthouse", seed=0),
        {"name": (None, "x", []), "seed": (*SEED, None)},
    ),
    "article": lambda m: (world.article, (), {"word": "cat"}, {"word": TEXT}),
    "listed": lambda m: (world.listed, (), {"phrases": ["a"]}, {"phrases": TEXTS}),
    "classes_of": lambda m: (world.classes_of, (), {"style": "3d"}, {"style": (None, 3, "oil", [])}),
    "drawings_of": lambda m: (
        world.drawings_of,
        (),
        dict(name="cat", style="3d"),
        dict.fromkeys(("name", "style"), (None, 3, "x", [])),
    ),
    "plain_caption": lambda m: (
        world.plain_caption,
        (),
        dict(objects=[world.Described("cat")], scene=None),
        {"objects": (None, 3, [], ["cat"]), "scene": (3, "moon", "", [])},
    ),
    "subject": lambda m: (world.subject, (), {"name": "cat"}, {"name": (None, 3, "", "dragon", [])}),
    "subjects_of": lambda m: (world.subjects_of, (), {"title": "cat"}, {"title": TEXT}),
    "wanted_pictures": lambda m: (world.wanted_pictures, (), dict(subject=world.subject("cat"), n=1, seed=0)),
    "Subject": lambda m: (
        world.Subject,
        (),
        dict(name="x", class_word="cat", token="zwx", images=m.pics, prompts="a zwx cat"),
        {"name": (*TEXT, "a/b", "..", "a\\b", "a\0"), "class_word": (*TEXT, "zwx", "zwx cat"), "prompts": TEXTS},
    ),
    "subject_from_folder": lambda m: (
        world.subject_from_folder,
        (m.folder,),
        dict(class_word="cat", token="zwx", name=None, prompts=None, resolution=16),
        {"token": (*WORD, "dog", "a", "Dog", "cat"), "name": ("", "a/b", 3, ".."), "class_word": TEXT}
        | {"prompts": (*TEXTS[1:], ""), "resolution": (*COUNT, 7, 100_000)},
    ),
    "no folder": lambda m: (
        world.subject_from_folder,
        (),
        dict(path=m.folder, class_word="cat"),
        {"path": ("/nowhere", "")},
    ),
    # show
    "picture_grid": lambda m: (
        plots.picture_grid,
        (m.pics,),
        dict(columns=1, row_labels="a", captions="a", title="", size=1.0),
        {"title": ANY_TEXT, "size": (*NUMBER, 0, -1, 1e6), "captions": LABELS},
    ),
    "attention_overlay": lambda m: (
        plots.attention_overlay,
        (),
        dict(pictures=m.pics[:1], maps=[np.ones((2, 2))], size=1.0, title=""),
        {"pictures": PICTURES, "maps": (None, 3, [], ["x"], [np.ones(2)], [np.ones((2, 2))] * 2), "size": (*NUMBER, 0)}
        | {"title": ANY_TEXT},
    ),
    "heatmap": lambda m: (
        plots.heatmap,
        (),
        dict(values=np.ones((1, 2)), rows="a", columns=["b", "c"], label="x"),
        {"values": (None, "x", [], np.ones(2), np.ones((2, 2))), "rows": LABELS, "columns": LABELS, "label": ANY_TEXT},
    ),
    "pictures_and_map": lambda m: (
        plots.pictures_and_map,
        (),
        dict(pictures=m.pics[:1], values=np.ones((1, 2)), rows="a", label="x", size=1.0),
        {"pictures": PICTURES, "values": (None, "x", [], np.ones((2, 2))), "rows": LABELS, "size": (*NUMBER, 0)},
    ),
    "trace_map": lambda m: (
        show.trace_map,
        (),
        dict(table=traced(), pictures=None, title=""),
        {"table": (None, 3, "x", [], traced()[:0], traced()[["site"]]), "pictures": PICTURES[1:], "title": ANY_TEXT},
    ),
    "merit_map": lambda m: (
        show.merit_map,
        (),
        dict(table=scored(), word="all", title=""),
        {"table": (None, 3, "x", [], scored()[:0], scored()[["word"]]), "word": (None, 3, "x", []), "title": ANY_TEXT},
    ),
    "applied, steps": lambda m: (
        edits.applied,
        (m.delta, m.pipe),
        dict(dose=1.0, steps=(0.0, 0.5)),
        {"steps": (3, "ab", (0.5, 0.5), (0.5, 0.2), (0, 2), (NAN, 1), (0.1,), (0, 0.5, 1))},
    ),
    "profile_map": lambda m: (
        plots.profile_map,
        (),
        dict(profiles={"UCE": methods.Profile([methods.Finding("x", "y", *[0.5] * 6)])}, title=""),
        {"profiles": (*NAMED, {}, {"UCE": 3}), "title": ANY_TEXT},
    ),
    "plane": lambda m: (
        plots.plane,
        (),
        dict(table=in_a_plane(), x="text", y="image", by="condition", title="", note=""),
        {
            "table": (None, 3, "x", [], in_a_plane()[:0], in_a_plane()[["value"]], in_a_plane()[:1]),
            **dict.fromkeys(("x", "y"), (None, 3, [], "likeness")),
            **dict.fromkeys(("title", "note"), ANY_TEXT),
        },
    ),
    "curves": lambda m: (
        plots.curves,
        (),
        dict(lines={"a": ([1], [1])}, x_label="x", y_label="y", baseline=None),
        {
            "lines": (*NAMED, {}, {"a": 3}, {"a": ([1], [1, 2])}, {"a": ([1],)}),
            "x_label": ANY_TEXT,
            "baseline": (3, []),
        },
    ),
    "graphs": lambda m: (web.graphs, (m.pipe,), dict(precision="float16", prompt="a cat"), {"prompt": TEXT}),
    "difference": lambda m: (web.difference, (), {"graph": None}, {"graph": (None, 3, b"x", object())}),
    "sampling_table": lambda m: (
        web.sampling_table,
        (m.pipe,),
        {"sampler_steps": 1},
        {"sampler_steps": (*COUNT, 1001)},
    ),
    "plain": lambda m: (web.plain, (), dict(edit=m.found, pipe=m.pipe), {"edit": (None, *EDIT), "pipe": (None, 3)}),
    "shelf_of": lambda m: (
        web.shelf_of,
        (m.pipe,),
        {"paths": []},
        {"paths": (None, 3, [], [3], "nowhere", ["nowhere.safetensors"], ["a\0b"])},
    ),
    "default_shelf": lambda m: (
        web.default_shelf,
        (m.pipe,),
        dict(kept=m.folder / "kept", rounds=1),
        {"kept": (None, 3, "a\0b", m.folder / "a.png")},
    ),
    "fetch_runtime": lambda m: (
        web.fetch_runtime,
        (),
        dict(kept=m.folder / "kept", timeout=1.0),
        {"kept": (None, 3, "a\0b", m.folder / "a.png"), "timeout": (*NUMBER, 0, -1)},
    ),
    "export_web": lambda m: (
        web.export_web,
        (m.pipe,),
        dict(folder=m.folder / "page", shelf=(), precision="float16", sampler_steps=1, guidance_scale=2.0, runtime=None)
        | dict(home=""),
        {
            "folder": (None, 3, "a\0b", m.folder / "a.png", m.folder),
            "shelf": (None, 3, [3], [m.found], ["x"]),
            "sampler_steps": (*COUNT, 31),
            "runtime": (3, "x", {}),
            "home": ANY_TEXT,
        },
    ),
    "slider": lambda m: (
        show.slider,
        (),
        dict(low=0, high=9, value=1, step=1),
        {"low": (*NUMBER, None, 9), "high": (*NUMBER, None, 0), "value": (*NUMBER, 10), "step": (*NUMBER, 0, -1)},
    ),
    "control": lambda m: (
        show.control,
        (),
        dict(given=True, label="x"),
        {"given": (None, 3, [], {}, range(0)), "label": ANY_TEXT},
    ),
    "explorer": lambda m: (
        show.explorer,
        (),
        dict(render=lambda seed: None, seed=range(3)),
        {"seed": (None, 3, []), "render": (None, *FUNCTION)},
    ),
    "neuron_explorer": lambda m: (
        show.neuron_explorer,
        (m.pipe,),
        dict(masks={"a": m.found}, prompts="a cat", pictures=1, bins=4),
        {"masks": (*NAMED, {}, {"a": m.delta})},
    ),
    "attention_browser": lambda m: (
        show.attention_browser,
        (m.pipe,),
        dict(prompt="a cat", **DRAWN, edit=None),
        {"prompt": TEXT, "sampler_steps": (*COUNT, 1001)},
    ),
    "playground": lambda m: (
        show.playground,
        (m.pipe,),
        dict(
            edits=None,
            prompt="a cat",
            seed=0,
            pictures=1,
            sampler_steps=1,
            guidance_scale=2.0,
            preview_steps=1,
            limits=None,
        ),
        {"edits": (3, [], {"a": 3}, "/nowhere"), "prompt": TEXT[1:], "pictures": COUNT, "sampler_steps": COUNT},
    ),
    "sketched": lambda m: (
        show.sketched,
        (m.pipe,),
        dict(prompts="a", edit=None, dose=1.0, sampler_steps=1, preview_steps=1),
    ),
    "Limits": lambda m: (
        show.Limits,
        (),
        dict(pictures=1, steps=1, prompt=9, dose=1.0, guidance=2.0),
        {"prompt": COUNT, "dose": (*LARGE, 0, -1), "guidance": (*LARGE, 1)},
    ),
}


def run(function: Callable[..., Any], /, *args: Any, **options: Any) -> None:
    """Call it; enter what is entered, and take the first of what is yielded."""
    result = function(*args, **options)
    if isinstance(result, Iterator):
        next(result)
    elif hasattr(result, "__enter__") and not isinstance(result, measure.record_attention | coneslab.watch):
        with result:
            pass


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_bad_values_are_refused_in_a_sentence_and_leave_no_trace(made, v_pipe, name):
    function, args, options, *more = CALLS[name](made)
    kinds = more[0] if more else {}
    state = torch.random.get_rng_state()
    spoiled = [parameter for parameter in options if parameter in kinds or parameter in KINDS]
    assert spoiled, f"nothing of {name} is tried"
    for parameter in spoiled:
        for value in kinds.get(parameter, KINDS.get(parameter, ())):
            if value is None and parameter in NONE_IS_ALLOWED and parameter not in kinds:
                continue
            said = f"{name}({parameter}={value!r:.60})"
            try:
                with contextlib.suppress(StopIteration):
                    run(function, *args, **{**options, parameter: value})
            except ConeslabError as error:
                assert len(str(error)) > 10, said
            except BaseException as error:
                raise AssertionError(f"{said} raises {type(error).__name__}: {error}") from error
            else:
                pytest.fail(f"{said} is accepted")
    assert torch.equal(torch.random.get_rng_state(), state), "a random number was drawn before the values were checked"


ELSEWHERE = {  # what takes no value that could be bad in these ways, or is tried in its module's own file
    "diffusion": "alphas_cumprod bfloat16_pays cross_attentions drawing fast_dtype fingerprint flushing_denormals "
    "is_plain latent_shape mixed_precision model_folder require_editable require_finite require_pipeline short_name "
    "uncompiled unet_of verify write_sums",
    "edits": "custom_diffusion_parts embedding_of export_custom_diffusion import_custom_diffusion import_lora in_steps "
    "import_tokens load_edit model_fingerprint require_dose require_model untouched vocabulary_fingerprint",
    "finetuning": "generated_latents load_checkpoint loss_values numbered_batches save_checkpoint tune tune_kv "
    "tune_unet",
    "measure": "as_pictures attention_probabilities",
    "methods": "merge_matrices",
    "neurons": "concatenate entropy entropy_bound precision_of",
    "show": "intervals page set_up_notebook show",
    "web": "",
    "world": "evaluation_prompts full_drawing named_plan title_of truth wanted with_article",
}


@pytest.mark.parametrize(
    "room", [diffusion, edits, finetuning, measure, methods, neurons, show, web, world], ids=lambda room: room.__name__
)
def test_every_public_function_is_tried_or_named(made, room):
    tried = {getattr(CALLS[name](made)[0], "__func__", CALLS[name](made)[0]) for name in CALLS}
    functions = {name for name in room.__all__ if inspect.isfunction(getattr(room, name))}
    left = {name for name in functions if getattr(room, name) not in tried}
    assert left == set(ELSEWHERE[room.__name__.split(".")[-1]].split())


# --- what is as good as a list or an int ----------------------------------------------------------------


def test_a_numpy_integer_is_as_good_as_an_int_and_goes_into_files(v_pipe, pictured, tmp_path):
    quick = {"rounds": 1, "batch_size": 2, "prior_batch_size": 1, "prior_images": 1, "sampler_steps": 1, "seed": 3}
    wide = {name: np.int64(value) for name, value in quick.items()} | {"rate": np.float32(0.5)}
    found = coneslab.find_concept_neurons(v_pipe, pictured, **wide, progress=False)
    assert found == coneslab.find_concept_neurons(v_pipe, pictured, **quick, rate=0.5, progress=False)
    again = coneslab.load_edit(found.save(tmp_path / "found"))
    assert again.settings["seed"] == 3 and again.settings["rounds"] == 1
    drawn = coneslab.generate(v_pipe, ["a", "b"], seed=np.int64(3), sampler_steps=np.int32(1), batch_size=np.int8(1))
    assert drawn == coneslab.generate(v_pipe, ["a", "b"], seed=np.array([3, 4]), sampler_steps=1)
    assert diffusion.start_noise(v_pipe, np.uint64(2**32 - 1)).shape == (1, 4, 8, 8)
    with pytest.raises(
        ArgumentError, match="from 0 to 4,294,967,295"
    ):  # the seed after the last would draw what 0 draws
        diffusion.generate(v_pipe, ["a cat", "a dog"], seed=2**32 - 1, sampler_steps=1)


def once(*things: Any) -> Iterator[Any]:
    """What can be read a single time."""
    yield from things


def test_a_generator_is_as_good_as_a_list(made, v_pipe):
    m = made
    assert coneslab.generate(v_pipe, once("a", "b"), seed=once(3, 4), sampler_steps=1) == coneslab.generate(
        v_pipe, ["a", "b"], seed=3, sampler_steps=1
    )
    assert torch.equal(diffusion.encode_prompts(v_pipe, once("a", "b")), diffusion.encode_prompts(v_pipe, ["a", "b"]))
    assert neurons.joint_prompt(once(m.cat, m.dog)) == "a sks cat and a <d> dog"
    assert m.judge.classify(once(*m.pics), once("a", once("b", "c"))).tolist() == (
        m.judge.classify(m.pics, ["a", ["b", "c"]]).tolist()
    )
    assert edits.Combined(once(m.delta, m.token)).edits == (m.delta, m.token)
    assert m.words.rows(once("cat", "dog")) == m.words.rows(["cat", "dog"])
    uce = {
        kind: methods.closed_form_edit(v_pipe, *arguments[:2], preserve=arguments[2], templates=arguments[3])
        for kind, arguments in {
            "lists": (["a cat"], ["a dog"], ["a car"], ["{}"]),
            "generators": (once("a cat"), once("a dog"), once("a car"), once("{}")),
            "texts": ("a cat", "a dog", "a car", "{}"),
        }.items()
    }
    for edit in uce.values():
        assert edit.settings == uce["lists"].settings
        assert all(torch.equal(delta, uce["lists"].deltas[name]) for name, delta in edit.deltas.items())
    taught = coneslab.custom_diffusion(
        v_pipe, once(m.cat, m.dog), steps=1, batch_size=2, prior_batch_size=0, progress=False
    )
    assert taught.edits[0].tokens == ("sks", "<d>")


def test_one_text_where_several_are_meant_is_one_and_not_its_letters(made, v_pipe):
    m = made
    assert len(finetuning.generate_once(v_pipe, "a cat", sampler_steps=1)) == 1
    assert methods.AblationSettings(templates="a {}").templates == ("a {}",)
    assert methods.DecompositionSettings(include="woman", exclude="cat").include == ("woman",)
    assert methods.CustomDiffusionSettings(small_words="very small").small_words == ("very small",)
    assert coneslab.encode_vocabulary(v_pipe, m.judge, words="cat", templates="a {}", progress=False).words == ("cat",)
    assert methods.bias(m.parts, {"a": "cat", "b": "dog"}) == methods.bias(m.parts, {"a": ["cat"], "b": ["dog"]})
    assert torch.equal(m.maps.token("cat", layers=m.maps.layers[0]), m.maps.token("cat", layers=[m.maps.layers[0]]))
    (axes,) = plots.picture_grid(m.pics, captions="a caption").axes
    assert [text.get_text() for text in axes.texts] == ["a caption"]
    assert world.sample(1, seed=0, styles="flat").captions == world.sample(1, seed=0, styles=["flat"]).captions
    report = methods.evaluate_ablation(
        v_pipe, m.judge, None, "a cat", "a dog", others={"other": "a car"}, pictures=2, sampler_steps=1
    )
    assert set(report[report.group == "other"].prompt) == {"a car"}


# --- what the text encoder does not read ----------------------------------------------------------------


def test_words_that_are_cut_off_are_told(v_pipe, judge):
    for read in (
        lambda: coneslab.generate(v_pipe, LONG, sampler_steps=1),
        lambda: coneslab.generate(v_pipe, "a cat", negative_prompt=LONG, sampler_steps=1),
        lambda: diffusion.encode_prompts(v_pipe, ["a cat", LONG]),
        lambda: edits.LearnedText(v_pipe, ["a <x> " + LONG], ["<x>"]),
    ):
        with pytest.warns(
            ConeslabWarning, match="reads 12 tokens at most, which leaves out '.*beach' of 'a .*shorten"
        ) as told:
            read()
        assert told[0].filename == __file__
    with pytest.warns(ConeslabWarning, match="the judge reads 24 tokens at most, so the beginning alone of 'a cat"):
        judge.text_features([f"{LONG} {LONG}", "a cat"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConeslabWarning)
        full = " ".join(LONG.split()[:10])
        assert diffusion.tokenize(v_pipe, full)[0, -2:].tolist() == v_pipe.tokenizer(full).input_ids[-2:]
        judge.text_features("a cat")


@pytest.mark.parametrize(
    "call",
    [
        lambda m: methods.closed_form_edit(m.pipe, LONG, "a dog"),
        lambda m: methods.closed_form_edit(m.pipe, "a cat", LONG),
        lambda m: methods.closed_form_edit(m.pipe, "a cat", "a dog", preserve=[LONG]),
        lambda m: methods.closed_form_edit(m.pipe, "cat", "dog", templates=["{} " + LONG]),
        lambda m: coneslab.ablate(m.pipe, LONG, "a dog", steps=1, progress=False),
        lambda m: coneslab.ablate(m.pipe, "a cat", "a dog", templates="{} " + LONG, steps=1, progress=False),
        lambda m: methods.erase(m.pipe, LONG, steps=1, progress=False),
        lambda m: methods.prune_feed_forward(m.pipe, "a cat", LONG),
        lambda m: methods.ablating_neurons(m.pipe, LONG, "a dog", progress=False),
        lambda m: coneslab.decompose(m.pipe, LONG, m.judge),
        lambda m: coneslab.decompose_image(m.pipe, m.parts, m.judge, target="concept", prompt=LONG),
        lambda m: coneslab.find_concept_neurons(
            m.pipe, SimpleNamespace(**{**vars(m.cat), "prompt": f"{LONG} sks cat"})
        ),
        lambda m: coneslab.finetune_kv(m.pipe, SimpleNamespace(**{**vars(m.cat), "prior_prompt": LONG})),
        lambda m: coneslab.merge(
            m.pipe,
            [m.trained, other_words(m)],
            [SimpleNamespace(**{**vars(m.cat), "token": token}) for token in ("<x>", "<y>")],
            templates=LONG + " {}",
        ),
        lambda m: methods.scaled_latents(m.pipe, m.cat, batch_size=8, small=LONG, large="on"),
    ],
)
def test_where_every_word_counts_a_prompt_that_is_too_long_is_refused(made, v_pipe, call):
    with pytest.raises(
        ArgumentError, match="the text encoder reads 12 tokens at most, which leaves out .*: shorten it"
    ):
        call(made)


def other_words(made: SimpleNamespace) -> edits.Combined:
    """A Custom Diffusion edit with a token of its own."""
    return edits.Combined((edits.TokenEdit("<y>", made.token.vectors, made.token.fingerprint), made.delta))


def test_settings_that_nobody_has_are_told_unless_an_edit_kept_them():
    kept = {"method": "DreamBooth", "steps": 3, "prompt": "a sks cat"}
    assert methods.DreamBoothSettings.chosen(kept, {}).steps == 3
    with pytest.raises(ConeslabError, match="step: not a setting of DreamBooth"):
        methods.DreamBoothSettings.chosen({"step": 3}, {})
