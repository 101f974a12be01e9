"""What a pipeline must be: refused at every door in one sentence, or supported; and what is refused is left alone."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from small_pipelines import make_subject
from torch import nn

import coneslab
from coneslab import ConeslabError, record_attention
from coneslab.diffusion import KVSpace, checks, encode_images, frozen_copy, generate, start_noise
from coneslab.diffusion.precision import without_compiling
from coneslab.edits import Combined, TokenEdit, compress, vocabulary_fingerprint
from coneslab.methods import Decomposition, ablate, closed_form_edit, prune_feed_forward
from coneslab.neurons import TunedNeurons, concept_loss, find_concept_neurons

FEW = {"sampler_steps": 1, "pictures": 1, "progress": False}
TRAIN = {"steps": 1, "batch_size": 2, "prior_batch_size": 0, "progress": False}
SEARCH = {"batch_size": 2, "prior_batch_size": 0, "threshold_quantile": 0.9, "progress": False}


# --- every door -----------------------------------------------------------------------------------------

NO_DOORS = {
    "coneslab.blocks": "knows nothing of pipelines; those who use it do",
    "coneslab.diffusion.checks": "the checks themselves",
    "coneslab.diffusion.checks.require_finite": "called where the door is passed",
    "coneslab.diffusion.encoding.require_read": "called where the door is passed",
    "coneslab.diffusion.encoding.unread": "called where the door is passed",
    "coneslab.diffusion.encoding.warn_of_unread": "called where the door is passed",
    "coneslab.diffusion.sampling.require_steps": "called where the door is passed",
    "coneslab.measure.evaluation.evaluate_model": "draws first of all, and the door is there",
    "coneslab.show.app.Page": "made by page",
    "coneslab.show.widgets.Playground": "made by playground",
}


def doors() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every public function, class and method of the package that takes a pipeline."""
    for info in pkgutil.walk_packages(coneslab.__path__, "coneslab."):
        module = importlib.import_module(info.name)
        if info.name in NO_DOORS:
            continue
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", "") != info.name:
                continue
            members = {name: value}
            if inspect.isclass(value):
                own = {f"{name}.{key}": getattr(value, key) for key in vars(value) if not key.startswith("_")}
                members |= {key: member for key, member in own.items() if callable(member)}
            for key, member in members.items():
                try:
                    takes = "pipe" in inspect.signature(member).parameters
                except (TypeError, ValueError):
                    continue
                if takes and f"{info.name}.{key}" not in NO_DOORS and not inspect.isabstract(member):
                    yield f"{info.name}.{key}", member


DOORS = dict(doors())
ALONE = {  # given through a method: what it needs besides a pipeline is made beforehand
    name for name in DOORS if name.rsplit(".", 1)[-1][0].islower() and name.rsplit(".", 2)[-2][0].isupper()
}


def test_the_doors_are_found():
    names = {name.rsplit(".", 1)[-1] for name in DOORS}
    assert len(DOORS) > 60
    assert {"find_concept_neurons", "generate", "record_attention", "decompose", "merge", "KVGradient"} <= names


def knock(door: Callable[..., Any], pipe: Any) -> None:
    """Call a function with this pipeline and nothing else that makes sense."""
    options = [one for one in inspect.signature(door).parameters.values() if one.kind is not one.VAR_KEYWORD]
    needed = [one.name for one in options if one.default is one.empty or one.name == "pipe"]
    made = door(**{name: pipe if name == "pipe" else None for name in needed})
    if hasattr(made, "__enter__"):
        with made:
            pass


@pytest.mark.parametrize("name", sorted(DOORS.keys() - ALONE))
@pytest.mark.parametrize("given", ["tiny", SimpleNamespace(unet=1)], ids=["a name", "half a pipeline"])
def test_every_door_says_what_is_no_pipeline(name, given):
    with pytest.raises(ConeslabError, match="expected a StableDiffusionPipeline|the pipeline has no vae"):
        knock(DOORS[name], given)


@pytest.fixture(scope="module")
def edits(v_pipe):
    """An edit of every kind, by name."""
    subject = make_subject(16)
    quick = {"progress": False, "batch_size": 2, "prior_batch_size": 0}
    found = find_concept_neurons(v_pipe, subject, rounds=2, threshold_quantile=0.9, **quick)
    delta = closed_form_edit(v_pipe, "a cat", "a dog")
    token = TokenEdit(("sks",), torch.ones(1, 24), vocabulary_fingerprint(v_pipe))
    words = Decomposition("a pet", ("cat", "dog"), np.ones(2), 2, 1.0, vocabulary_fingerprint(v_pipe))
    tuned = TunedNeurons(found, np.zeros(len(found), np.float32))
    kinds = {"neurons": found, "delta": delta, "token": token, "words": words, "tuned": tuned}
    return {**kinds, "low rank": compress(delta), "combined": Combined((delta, token)), "none": Combined(())}


KINDS = ("neurons", "delta", "token", "words", "tuned", "low rank", "combined", "none")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_edit_has_a_door(edits, kind):
    with pytest.raises(ConeslabError, match="expected a StableDiffusionPipeline"):
        edits[kind].applied("tiny").__enter__()


# --- what is refused ------------------------------------------------------------------------------------


def sdxl(pipe):
    return StableDiffusionXLPipeline(
        pipe.vae, pipe.text_encoder, pipe.text_encoder, pipe.tokenizer, pipe.tokenizer, pipe.unet, pipe.scheduler
    )


def other_kind(pipe):
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    return StableDiffusionUpscalePipeline(**parts, low_res_scheduler=DDPMScheduler())


def without(part):
    def change(pipe):
        setattr(pipe, part, None)
        return pipe

    return change


def with_scheduler(scheduler):
    def change(pipe):
        pipe.scheduler = scheduler
        return pipe

    return change


def on_meta(pipe):
    pipe.unet.to("meta")
    return pipe


def half_on_meta(pipe):
    accelerate.cpu_offload(pipe.text_encoder, execution_device="cpu")
    return pipe


def offloaded(pipe):
    accelerate.hooks.add_hook_to_module(pipe.unet, accelerate.hooks.CpuOffload("cpu"))
    return pipe


def offloaded_in_groups(pipe):
    apply_group_offloading(pipe.vae, torch.device("cpu"), torch.device("cpu"), "leaf_level")
    return pipe


def cast_in_layers(pipe):
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return pipe


def cast(pipe):
    for weight in pipe.text_encoder.parameters():
        weight.data = weight.data.to(torch.float8_e4m3fn)
    return pipe


def quantised(pipe):
    for block in (pipe.unet.mid_block, pipe.unet.up_blocks):
        torch.ao.quantization.quantize_dynamic(block, {nn.Linear}, torch.qint8, inplace=True)
    return pipe


class Packed(nn.Parameter):
    """How quantising libraries keep their weights."""


def packed(pipe):
    attention = next(iter(KVSpace(pipe).modules.values()))
    attention.to_k.weight = Packed(attention.to_k.weight.detach())
    return pipe


def for_inpainting(pipe):
    pipe.unet.register_to_config(in_channels=9)
    return pipe


def with_more_than_text(pipe):
    pipe.unet.register_to_config(addition_embed_type="text_time")
    return pipe


def with_foreign_text(pipe):
    pipe.unet.register_to_config(cross_attention_dim=768)
    return pipe


def with_endless_texts(pipe):
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    pipe.tokenizer.model_max_length = int(1e30)  # what a tokenizer without its config has
    return pipe


def with_more_words(pipe):
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    pipe.tokenizer.add_tokens(["unheard"])
    return pipe


REFUSED = {
    "SDXL": (sdxl, "got a StableDiffusionXLPipeline, expected a StableDiffusionPipeline"),
    "another kind": (other_kind, "got a StableDiffusionUpscalePipeline"),
    "no tokenizer": (without("tokenizer"), "has no tokenizer: load all parts"),
    "no autoencoder": (without("vae"), "has no vae"),
    "flow matching": (with_scheduler(FlowMatchEulerDiscreteScheduler()), "no noise schedule alphas_cumprod"),
    "sigmas only": (with_scheduler(EDMEulerScheduler()), "EDMEulerScheduler, which has no noise schedule"),
    "another target": (
        with_scheduler(UniPCMultistepScheduler(prediction_type="flow_prediction")),
        "prediction_type is 'flow_prediction'",
    ),
    "meta": (on_meta, "U-Net has weights on the meta device"),
    "offloaded by accelerate": (half_on_meta, "text encoder is offloaded: call pipe.remove_all_hooks"),
    "offloaded as a model": (offloaded, "U-Net is offloaded"),
    "offloaded in groups": (offloaded_in_groups, "autoencoder is offloaded"),
    "cast in layers": (cast_in_layers, "U-Net are cast layer by layer"),
    "float8": (cast, "weights of the text encoder are float8_e4m3fn"),
    "quantised": (quantised, "U-Net is quantised"),
    "packed weights": (packed, "weights of the U-Net are float32 .Packed."),
    "for inpainting": (for_inpainting, "takes 9 channels, the autoencoder makes 4"),
    "more than text": (with_more_than_text, "addition_embed_type='text_time'"),
    "foreign text encoder": (with_foreign_text, "width 768, the text encoder makes 24"),
    "endless texts": (with_endless_texts, "up to 1e.30 tokens, the text encoder takes 12"),
    "more words": (with_more_words, "knows .* tokens, the text encoder .*resize_token_embeddings"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_said_at_the_door(own_pipe, name):
    change, reason = REFUSED[name]
    pipe = change(own_pipe)
    for door in (checks.require_pipeline, checks.require_editable, KVSpace, coneslab.find_concept_neurons):
        with pytest.raises(ConeslabError, match=reason):
            knock(door, pipe) if door is coneslab.find_concept_neurons else door(pipe)


@pytest.mark.parametrize("kind", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline])
def test_a_pipeline_that_draws_from_pictures_passes_unless_it_has_to_draw_from_texts(v_pipe, kind):
    pipe = kind(**v_pipe.components, requires_safety_checker=False)
    checks.require_pipeline(pipe)
    assert KVSpace(pipe).n == KVSpace(v_pipe).n
    for door in (checks.require_from_text, checks.require_editable, lambda pipe: generate(pipe, "a cat")):
        with pytest.raises(ConeslabError, match=f"{kind.__name__}, which draws from pictures, .*pipe.components"):
            door(pipe)


@pytest.mark.slow
def test_whatever_works_passes(v_pipe, epsilon_pipe, sd_pipe, own_pipe):
    for pipe in (v_pipe, epsilon_pipe, sd_pipe):
        checks.require_editable(pipe)
    for scheduler in (EulerDiscreteScheduler, PNDMScheduler, UniPCMultistepScheduler, DDPMScheduler):
        own_pipe.scheduler = scheduler.from_config(v_pipe.scheduler.config)
        checks.require_pipeline(own_pipe)
        assert len(generate(own_pipe, "a cat", sampler_steps=4)) == 1
    own_pipe.scheduler = v_pipe.scheduler
    checks.require_pipeline(own_pipe.to(torch.bfloat16))


def test_the_small_autoencoder_of_others_works(own_pipe):
    own_pipe.vae = AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    latents = encode_images(own_pipe, make_subject(16).images)
    assert latents.shape == (3, 4, 8, 8) and len(generate(own_pipe, "a cat", sampler_steps=1)) == 1


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_said_before_anything_is_drawn(own_pipe, part, number):
    name, weight = list(getattr(own_pipe, part).named_parameters())[-1]
    weight.data.view(-1)[-1] = number
    subject = make_subject(16)
    for work in (
        lambda: generate(own_pipe, "a cat", sampler_steps=1),
        lambda: find_concept_neurons(own_pipe, subject, rounds=1, progress=False),
        lambda: coneslab.dreambooth(own_pipe, subject, **TRAIN),
        lambda: coneslab.custom_diffusion(own_pipe, subject, **TRAIN),
        lambda: closed_form_edit(own_pipe, "a cat", "a dog"),
        lambda: prune_feed_forward(own_pipe, "a cat", "a dog"),
        lambda: concept_loss(own_pipe, subject, samples=2),
    ):
        with pytest.raises(ConeslabError, match=f"weights that are NaN or infinite, for example in {name}"):
            work()


def test_large_weights_are_numbers(own_pipe):
    own_pipe.to(torch.float16)
    own_pipe.unet.conv_in.weight.data.fill_(60_000.0)  # their sum is beyond float16
    checks.require_finite(own_pipe)


# --- weights that the U-Net does not compute with -------------------------------------------------------


def fused(pipe):
    pipe.fuse_qkv_projections()


def adapted(pipe):
    module = next(iter(KVSpace(pipe).modules.values()))
    wrapper = nn.Module()
    wrapper.base_layer, wrapper.weight = module.to_q, module.to_q.weight
    module.to_q = wrapper


def with_own_processors(pipe):
    for module in KVSpace(pipe).modules.values():
        module.set_processor(CustomDiffusionAttnProcessor(hidden_size=16, cross_attention_dim=24))


ELSEWHERE = {
    "fused": (fused, "projections are fused.*unfuse them first"),
    "LoRA": (adapted, "wrapped, perhaps by a LoRA adapter: unload it first"),
    "Custom Diffusion": (with_own_processors, "weights of a CustomDiffusionAttnProcessor instead of its own"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ELSEWHERE)
def test_edits_that_would_do_nothing_are_refused(own_pipe, edits, name):
    change, reason = ELSEWHERE[name]
    change(own_pipe)
    subject = make_subject(16)
    works: dict[str, Callable[[], Any]] = {
        f"applied {kind}": lambda kind=kind: edits[kind].applied(own_pipe, check_model=False).__enter__()
        for kind in ("neurons", "delta", "tuned", "low rank", "combined")
    }
    works |= {
        "record": lambda: record_attention(own_pipe).__enter__(),
        "find": lambda: find_concept_neurons(own_pipe, subject, rounds=1, progress=False),
        "dreambooth": lambda: coneslab.dreambooth(own_pipe, subject, **TRAIN),
        "lora": lambda: coneslab.lora(own_pipe, subject, rank=2, **TRAIN),
        "inversion": lambda: coneslab.textual_inversion(own_pipe, subject, steps=1, progress=False),
        "ablate": lambda: ablate(own_pipe, "a cat", "a dog", steps=1, **FEW),
        "closed form": lambda: closed_form_edit(own_pipe, "a cat", "a dog"),
        "copy": lambda: frozen_copy(own_pipe.unet, torch.float32) if name != "LoRA" else KVSpace(own_pipe.unet),
    }
    for work in works.values():
        with pytest.raises(ConeslabError, match=reason):
            work()


def pixels(pipe: Any, prompt: str = "a cat") -> np.ndarray:
    return np.asarray(pipe(prompt, num_inference_steps=2, latents=start_noise(pipe, [0])).images[0], float)


@pytest.mark.slow
def test_what_is_fused_inside_a_block_is_as_before_after_it(own_pipe, edits):
    before = pixels(own_pipe)
    for kind in ("neurons", "delta"):
        with edits[kind].applied(own_pipe):
            edited = pixels(own_pipe)
            own_pipe.fuse_qkv_projections(vae=False)
            assert np.abs(pixels(own_pipe) - edited).max() <= 1
        assert np.abs(pixels(own_pipe) - before).max() <= 1 < np.abs(edited - before).max()
        own_pipe.unfuse_qkv_projections(vae=False)
        assert np.array_equal(pixels(own_pipe), before)


@pytest.mark.slow
def test_everything_works_once_projections_are_separate_again(own_pipe, v_pipe, edits):
    own_pipe.fuse_qkv_projections()
    own_pipe.unfuse_qkv_projections()  # diffusers leaves the fused copies there
    with edits["neurons"].applied(own_pipe), edits["neurons"].applied(v_pipe):
        assert np.array_equal(pixels(own_pipe), pixels(v_pipe))
    with record_attention(own_pipe) as maps:
        generate(own_pipe, "a cat", sampler_steps=1)
    assert maps.token("cat").shape == (8, 8)
    tuned = [coneslab.dreambooth(pipe, make_subject(16), **TRAIN) for pipe in (own_pipe, v_pipe)]
    assert all(torch.equal(tuned[0].deltas[name], delta) for name, delta in tuned[1].deltas.items())
    assert tuned[0].deltas.keys() == tuned[1].deltas.keys()
    assert find_concept_neurons(own_pipe, make_subject(16), rounds=1, **SEARCH) == find_concept_neurons(
        v_pipe, make_subject(16), rounds=1, **SEARCH
    )


# --- compiled -------------------------------------------------------------------------------------------


def compiled(pipe):
    """Every network as torch.compile returns it; "eager" traces without a compiler."""
    for part in checks.NETWORKS:
        setattr(pipe, part, torch.compile(getattr(pipe, part), backend="eager"))


def compiled_in_place(pipe):
    pipe.unet.compile(backend="eager")


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [compiled, compiled_in_place])
def test_compiled_pipelines_do_what_others_do(own_pipe, v_pipe, edits, change):
    change(own_pipe)
    subject, parts = make_subject(16), [getattr(own_pipe, part) for part in checks.NETWORKS]
    for kind in ("neurons", "token"):
        with edits[kind].applied(own_pipe), edits[kind].applied(v_pipe):
            assert np.abs(pixels(own_pipe, "a sks cat") - pixels(v_pipe, "a sks cat")).max() <= 1
    assert np.abs(pixels(own_pipe) - pixels(v_pipe)).max() <= 1
    maps = []
    for pipe in (own_pipe, v_pipe):
        with record_attention(pipe) as recorded:
            generate(pipe, "a cat", sampler_steps=2, dtype=torch.float32)
        maps.append(recorded.token("cat"))
    assert torch.allclose(*maps, atol=1e-3)
    few = {"pictures": 1, "samples": 2, "sampler_steps": 2}  # two, as before: nothing has to be compiled again
    ours, theirs = (prune_feed_forward(pipe, "a cat", "a dog", **few) for pipe in (own_pipe, v_pipe))
    assert all(torch.equal(ours.deltas[name], delta) for name, delta in theirs.deltas.items())
    passes, drawn = [], []
    for pipe in (own_pipe, v_pipe):
        options = {"guidance_interval": (0.0, 0.6), "on_calls": passes.append, "dtype": torch.float32}
        drawn.append(np.asarray(generate(pipe, "a cat", sampler_steps=4, **options)[0], float))
    assert passes[0] == passes[1] < 8 and np.abs(drawn[0] - drawn[1]).max() <= 1
    assert np.abs(pixels(own_pipe) - pixels(v_pipe)).max() <= 1
    assert find_concept_neurons(own_pipe, subject, rounds=1, **SEARCH) == find_concept_neurons(
        v_pipe, subject, rounds=1, **SEARCH
    )
    for work in (
        lambda pipe: coneslab.dreambooth(pipe, subject, **TRAIN),
        lambda pipe: closed_form_edit(pipe, "a cat", "a dog"),
        lambda pipe: ablate(pipe, "a cat", "a dog", parameters="all", steps=1, **FEW),
    ):
        ours, theirs = work(own_pipe), work(v_pipe)
        assert all(torch.allclose(ours.deltas[name], delta, atol=1e-4) for name, delta in theirs.deltas.items())
    assert parts == [getattr(own_pipe, part) for part in checks.NETWORKS]
    assert (own_pipe.unet._compiled_call_impl is None) == (change is compiled)


@pytest.mark.slow
def test_nothing_is_compiled_inside_the_block_and_everything_after_it(own_pipe):
    compiled(own_pipe)
    checks.uncompiled(own_pipe.vae).compile(backend="eager")
    before = [(getattr(own_pipe, part), checks.uncompiled(getattr(own_pipe, part))) for part in checks.NETWORKS]
    with without_compiling(own_pipe):
        assert [getattr(own_pipe, part) for part in checks.NETWORKS] == [module for _, module in before]
        assert all(module._compiled_call_impl is None for _, module in before)
    assert [getattr(own_pipe, part) for part in checks.NETWORKS] == [wrapped for wrapped, _ in before]
    assert [module._compiled_call_impl is None for _, module in before] == [True, False, True]
