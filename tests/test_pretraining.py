"""Training: the loop, its checkpoints, the tokenizer, and every stage for one or two steps."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from random import Random

import numpy as np
import pandas
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import nn
from transformers import CLIPModel, CLIPTokenizer

from coneslab import cli, diffusion, pretraining, world
from coneslab.diffusion import encoding, pipelines
from coneslab.errors import ConeslabError, FileFormatError, MismatchError
from coneslab.finetuning import checkpoints
from coneslab.pretraining import autoencoder, loop, model_cards, optimizers, run, unet
from coneslab.pretraining import judge as judging
from coneslab.pretraining.loop import Log
from coneslab.pretraining.recipe import Recipe

QUICK = Recipe(pictures=24, batch_size=4, learning_rate=1e-2, parts=2, warmup=2, averages=(0.9, 0.1))
RECIPE = pretraining.load_recipe()


# --- the loop -------------------------------------------------------------------------------------------


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def fit_small(folder: Path, recipe: Recipe = QUICK, **options) -> tuple[nn.Sequential, Log]:
    net = small_net()

    def loss(step: int, part: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        x = torch.randn(16, 3, generator=generator)
        return {"loss": (net(x) - x.sum(1, keepdim=True)).square().mean()}

    return net, loop.fit(folder, modules={"net": net}, loss=loss, recipe=recipe, log_every=1, **options)


@pytest.mark.parametrize("muon", [False, True])
def test_an_interrupted_run_ends_where_a_whole_one_does(tmp_path: Path, muon: bool):
    recipe = replace(QUICK, muon=muon)
    whole, _ = fit_small(tmp_path / "whole", recipe)
    fit_small(tmp_path / "parts", recipe, stop_after=2)
    parts, log = fit_small(tmp_path / "parts", recipe)  # a fresh network: everything comes from the checkpoint
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], weight, rtol=0, atol=0)
    assert log.steps == 6 and [row["step"] for row in log.rows] == list(range(1, 7))


def test_every_part_of_every_step_draws_its_own_noise(tmp_path: Path):
    net, drawn = small_net(), []

    def loss(step: int, part: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        drawn.append(torch.rand(1, generator=generator).item())
        return {"loss": net(torch.ones(1, 3)).square().mean()}

    loop.fit(tmp_path, modules={"net": net}, loss=loss, recipe=QUICK)
    assert len(set(drawn)) == 6 * QUICK.parts


def test_parts_beside_each_other_give_what_parts_in_turn_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nets = []
    for cores in (1, 2):
        monkeypatch.setattr(loop.os, "cpu_count", lambda cores=cores: cores)
        nets.append(fit_small(tmp_path / str(cores), replace(QUICK, muon=True))[0])
    for one, other in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_step_takes_the_mean_gradient_of_its_parts(tmp_path: Path):
    weight = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(weight.weight)

    def loss(step: int, part: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"loss": ((weight.weight - (1.0, 3.0)[part]) ** 2).sum(), "part": torch.tensor(float(part))}

    recipe = replace(QUICK, learning_rate=0.0, decay=1.0)
    parts = loop._Parts(loss, {"weight": weight.weight}, [], [], recipe)
    with parts:
        figures = parts.differentiate(0)
    assert weight.weight.grad.item() == pytest.approx((-2 - 6) / 2)
    assert figures == {"loss": pytest.approx((1 + 9) / 2), "part": 0.5}


def test_a_log_names_every_device_that_a_run_was_computed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, log = fit_small(tmp_path, stop_after=4)
    cores = log.facts["device"]
    facts = loop._run_facts
    monkeypatch.setattr(loop, "_run_facts", lambda *arguments: facts(*arguments) | {"device": "NVIDIA T4"})
    fit_small(tmp_path, stop_after=6)
    fit_small(tmp_path, stop_after=8)
    monkeypatch.undo()
    _, log = fit_small(tmp_path)
    assert log.facts["device"] == f"{cores}, then NVIDIA T4, then {cores}"


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_step_is_finished_and_kept(tmp_path: Path, sign: signal.Signals):
    whole, _ = fit_small(tmp_path / "whole")
    net, before = small_net(), signal.getsignal(sign)

    def loss(step: int, part: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        if step == 3 and part == 1:
            os.kill(os.getpid(), sign)
        x = torch.randn(16, 3, generator=generator)
        return {"loss": (net(x) - x.sum(1, keepdim=True)).square().mean()}

    with pytest.raises(KeyboardInterrupt):
        loop.fit(tmp_path / "parts", modules={"net": net}, loss=loss, recipe=QUICK)
    assert checkpoints.load_checkpoint(tmp_path / "parts" / "checkpoint.safetensors")[1]["step"] == 4
    assert signal.getsignal(sign) is before
    parts, _ = fit_small(tmp_path / "parts")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=0, atol=0)


def test_a_second_interrupt_ends_at_once_and_leaves_the_last_checkpoint(tmp_path: Path):
    fit_small(tmp_path, stop_after=2)

    def loss(step: int, part: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        return {"loss": net(torch.ones(1, 3)).square().mean()}

    net = small_net()
    with pytest.raises(KeyboardInterrupt):
        loop.fit(tmp_path, modules={"net": net}, loss=loss, recipe=replace(QUICK, batch_size=1, parts=1))
    assert checkpoints.load_checkpoint(tmp_path / "checkpoint.safetensors")[1]["step"] == 2


def test_what_is_measured_is_measured_on_the_average_and_kept(tmp_path: Path):
    net, seen = small_net(), []

    def loss(step: int, part: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"loss": net(torch.ones(1, 3)).square().mean()}

    def measure(step: int) -> dict[str, float]:
        seen.append(net[0].weight.detach().clone())
        return {"held_out": float(step)}

    log = loop.fit(
        tmp_path, modules={"net": net}, loss=loss, recipe=QUICK, measure=measure, measure_every=8, checkpoint_every=0
    )
    assert [row["held_out"] for row in log.measures] == [2.0, 4.0, 6.0]
    torch.testing.assert_close(seen[-1], net[0].weight)  # the average is left in place at the end
    tensors, facts = checkpoints.load_checkpoint(tmp_path / "checkpoint.safetensors")
    assert not torch.equal(tensors["weight/net.0.weight"], tensors["average 0.9/net.0.weight"])
    assert not torch.equal(tensors["average 0.1/net.0.weight"], tensors["average 0.9/net.0.weight"])
    assert facts["measures"] == log.measures


def test_a_recipe_that_cannot_be_is_refused():
    with pytest.raises(ConeslabError, match="batches of 4 and 3 parts"):
        replace(QUICK, parts=3)
    with pytest.raises(ConeslabError, match="no average"):
        replace(QUICK, averages=())


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path: Path):
    fit_small(tmp_path, stop_after=2)
    path = tmp_path / "checkpoint.safetensors"
    tensors, facts = checkpoints.load_checkpoint(path)
    remembered = {"step", "exp_avg", "exp_avg_sq"}
    assert {name.split("/")[0] for name in tensors} == {"weight", "average 0.9", "average 0.1"} | remembered
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(FileFormatError, match="not a complete coneslab checkpoint"):
        fit_small(tmp_path)
    checkpoints.save_checkpoint(path, {k: v for k, v in tensors.items() if "net.0" not in k}, facts)
    with pytest.raises(FileFormatError, match="lacks 2 weights"):
        fit_small(tmp_path)


def test_a_checkpoint_takes_the_place_of_the_last_one_only_when_it_is_whole(tmp_path: Path, monkeypatch):
    path = tmp_path / "new folder" / "state"
    checkpoints.save_checkpoint(path, {"a": torch.ones(2)}, {"step": 1})

    def interrupted(tensors: dict, file: Path, facts: dict) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save_checkpoint(path, {"a": torch.zeros(2)}, {"step": 2})
    assert checkpoints.load_checkpoint(path)[1] == {"step": 1} and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"learning_rate": 1e-3}, "learning_rate was 0.01, now 0.001"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"averages": (0.5,)}, "averages was .0.9, 0.1., now .0.5."),
        ({"pictures": 8}, "holds 4 steps, more than 8 pictures in batches of 4"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, change, reason):
    fit_small(tmp_path, stop_after=4)
    path = tmp_path / "checkpoint.safetensors"
    before = path.read_bytes()
    with pytest.raises(MismatchError, match=reason):
        fit_small(tmp_path, replace(QUICK, **change))
    assert path.read_bytes() == before


def test_a_checkpoint_of_other_settings_is_refused_and_one_that_does_not_say_continued(tmp_path: Path):
    fit_small(tmp_path, stop_after=2, identity={"loss": {"weight": 1.0}})
    with pytest.raises(MismatchError, match="loss was {'weight': 1.0}, now {'weight': 2.0}"):
        fit_small(tmp_path, identity={"loss": {"weight": 2.0}})
    path = tmp_path / "checkpoint.safetensors"
    tensors, facts = checkpoints.load_checkpoint(path)
    del facts["identity"]  # as they were before
    checkpoints.save_checkpoint(path, tensors, facts)
    assert fit_small(tmp_path, replace(QUICK, seed=3))[1].steps == 6


def test_a_finished_run_is_only_saved_again_and_a_larger_budget_continues_it(tmp_path: Path):
    assert fit_small(tmp_path)[1].steps == fit_small(tmp_path)[1].steps == 6
    assert fit_small(tmp_path, replace(QUICK, pictures=32))[1].steps == 8


@pytest.mark.parametrize(
    "change", [{"learning_rate": -1.0}, {"warmup": 0}, {"decay": 0.0}, {"decay": 1.5}, {"clip": 0.0}, {"batch_size": 0}]
)
def test_a_recipe_that_would_divide_by_nothing_is_refused(change):
    with pytest.raises(ConeslabError, match=f"{next(iter(change))} is|batches of 0"):
        replace(QUICK, **change)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path):
    net = small_net()

    def loss(step: int, part: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"loss": net(torch.ones(1, 3)).sum() * float("nan")}

    with pytest.raises(ConeslabError, match="no longer finite"):
        loop.fit(tmp_path, modules={"net": net}, loss=loss, recipe=QUICK)


def test_the_rate_rises_stays_and_falls_to_nothing_on_time():
    recipe = Recipe(pictures=100, batch_size=1, learning_rate=1.0, warmup=10, decay=0.5)
    assert recipe.rate(0, 0.0) == pytest.approx(0.1)
    assert recipe.rate(40, 0.0) == 1.0
    assert recipe.rate(75, 0.0) == pytest.approx(0.5)  # half of the last half
    assert recipe.rate(100, 0.0) == 0.0
    timed = replace(recipe, minutes=10)
    assert timed.spent(20, 450.0) == 0.75 and timed.spent(90, 450.0) == 0.9


def test_the_average_is_the_exponential_one():
    weight = {"w": torch.zeros(1)}
    average = optimizers.Average(weight, decay=0.5)
    by_hand = 0.0
    for step in range(20):
        weight["w"] = torch.tensor([float(step)])
        average.update(weight, average.share(step))
        kept = min(0.5, (1 + step) / (10 + step))
        by_hand = kept * by_hand + (1 - kept) * step
    assert average.shadow["w"].item() == pytest.approx(by_hand, rel=1e-5)


def test_muon_makes_updates_nearly_orthogonal():
    matrices = torch.randn(2, 12, 30, generator=torch.Generator().manual_seed(0))
    for made, raw in ((optimizers.orthogonal(matrices), matrices), (optimizers.orthogonal(matrices.mT).mT, matrices)):
        values = torch.linalg.svdvals(made.float())
        assert values.min() > 0.5 and values.max() < 1.3  # the iteration's own range
        left, _, right = torch.linalg.svd(raw, full_matrices=False)  # the exact answer has the same directions
        exact = left @ right
        cosine = (made.float() * exact).sum((1, 2)) / (made.float().norm(dim=(1, 2)) * exact.norm(dim=(1, 2)))
        assert cosine.min() > 0.95


def test_muon_leaves_edges_and_vectors_to_adamw():
    net = small_net()
    weights = {"net.conv_in.weight": net[0].weight, "net.2.weight": net[2].weight, "net.2.bias": net[2].bias}
    adam, muon = optimizers.optimizers(weights, replace(QUICK, muon=True))
    assert [id(w) for w in muon.param_groups[0]["params"]] == [id(net[2].weight)]
    assert {id(w) for group in adam.param_groups for w in group["params"]} == {id(net[0].weight), id(net[2].bias)}


def test_muon_is_shared_out_evenly():
    weights = {f"m{i}": nn.Parameter(torch.zeros(8, 8 + i // 2)) for i in range(6)}
    shares = optimizers._shared_out(weights, weights, 2)
    assert sorted(name for own in shares for name in own) == sorted(weights)
    assert len(shares) == 2 and all(len(own) in (2, 4) for own in shares)
    assert optimizers._shared_out({}, [], 2) == []


def test_the_parts_of_all_steps_take_every_picture_of_a_chunk_once():
    recipe = replace(QUICK, batch_size=4, parts=2)
    taken = [recipe.place(step, part, 10) for step in range(4) for part in range(2)]
    assert [index for index, _ in taken] == [0, 0, 0, 0, 1, 1, 1, 1]  # a chunk of ten holds two batches of four
    assert [(own.start, own.stop) for _, own in taken[:4]] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert [own for _, own in taken[4:]] == [own for _, own in taken[:4]]


@pytest.mark.slow
def test_a_feed_gives_the_same_pictures_again():
    with loop.Feed(8, seed=3) as feed:
        pictures, part = feed.batch(5, 1, QUICK)  # the second half of the second batch of chunk 2
        assert part == slice(6, 8)
        np.testing.assert_array_equal(pictures.images, world.sample(8, seed=3 * 1_000_003 + 2).images)


# --- text -----------------------------------------------------------------------------------------------


def test_every_word_is_one_token_and_anything_else_still_encodes(tmp_path: Path):
    unet.build_tokenizer().save_pretrained(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert all(len(tokenizer(word).input_ids) == 3 for word in world.WORDS)
    sentence = " ".join(world.WORDS[:20])
    assert len(tokenizer(sentence).input_ids) == 22
    assert len({tokenizer(word).input_ids[1] for word in world.WORDS}) == len(world.WORDS)
    strange = tokenizer("zebra-crossing, 1984 é 象").input_ids
    assert len(strange) > 10 and tokenizer.unk_token_id not in strange[1:-1]
    padded = tokenizer("a cat", padding="max_length").input_ids
    assert len(padded) == 32 and padded[0] == tokenizer.bos_token_id and set(padded[3:]) == {tokenizer.eos_token_id}


@pytest.mark.slow
def test_captions_fit_into_the_text_encoder():
    tokenizer = unet.build_tokenizer()
    lengths = [len(ids) for ids in tokenizer(world.sample(400, seed=5).captions).input_ids]
    assert max(lengths) <= tokenizer.model_max_length


def test_the_text_encoder_pools_at_the_end_of_the_text():
    torch.manual_seed(0)
    tokenizer = unet.build_tokenizer()
    from transformers import CLIPTextModel

    model = CLIPTextModel(unet.text_config(tokenizer, **RECIPE["unet"]["text"])).eval()
    ids = tokenizer("a cat", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        out = model(ids)
    torch.testing.assert_close(out.pooler_output, out.last_hidden_state[:, 3])


# --- autoencoder and U-Net ------------------------------------------------------------------------------


def test_pixels_go_back_and_forth():
    images = world.sample(2, seed=0).images
    np.testing.assert_array_equal(encoding.to_uint8(encoding.to_tensor(images)), images)


def test_picture_loss_by_hand():
    made, real, even = torch.zeros(1, 1, 2, 2), torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]), torch.ones(1, 1, 2, 2)
    pixels, edges = autoencoder.picture_loss(made, real, even)
    assert pixels.item() == 0.5 and edges.item() == 0.5  # across: 1 everywhere; down: 0
    soft, _ = autoencoder.picture_loss(made, real, even, softness=0.75)
    assert soft.item() == pytest.approx(((1 + 0.75**2) ** 0.5 - 0.75) / 2)
    uneven = torch.tensor([[[[1.0, 3.0], [0.0, 0.0]]]])
    pixels, edges = autoencoder.picture_loss(made, real, uneven)
    assert pixels.item() == 0.75 and edges.item() == 0.75  # (0·1 + 1·3) / 4; across: (1·3 + 1·0) / 2 = 1.5, down: 0


def test_objects_outweigh_scenery():
    record = world.compose(["cat"], "grass", seed=0)[1]
    weights = autoencoder.object_weights([record], 4.0, torch.device("cpu"))[0, 0]
    mask = torch.from_numpy(record.objects[0].mask)
    assert weights.mean().item() == pytest.approx(1, abs=1e-5)
    assert weights[mask].min() / weights.min() == pytest.approx(4.0)


@pytest.mark.slow
def test_standard_latents_decode_to_the_same_pictures():
    torch.manual_seed(0)
    vae = AutoencoderKL(**RECIPE["vae"]["config"]).eval()
    x = encoding.to_tensor(world.sample(16, seed=1).images)
    with torch.no_grad():
        before = vae.encode(x).latent_dist
        picture = vae.decode(before.mean).sample
        autoencoder.standardise_latents(vae, torch.device("cpu"), n=64)
        after = vae.encode(x).latent_dist
        torch.testing.assert_close(vae.decode(after.mean).sample, picture, rtol=1e-3, atol=1e-3)
        latents = vae.encode(encoding.to_tensor(world.sample(64, seed=77).images)).latent_dist.mean
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=0.05)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), rtol=0, atol=0.05)
    ratio = (before.std / after.std).mean((0, 2, 3)) / (before.mean.std((0, 2, 3)) / after.mean.std((0, 2, 3)))
    torch.testing.assert_close(ratio, torch.ones(4), rtol=1e-3, atol=1e-3)  # the spread is scaled along


def test_timesteps_are_one_from_each_part():
    times = diffusion.stratified_timesteps(10, 1000, torch.Generator().manual_seed(0))
    assert sorted((times // 100).tolist()) == list(range(10))
    assert times.tolist() != sorted(times.tolist())


def test_level_weights_match_min_snr_where_there_is_little_noise():
    ratio = torch.tensor([0.0, 5.0, 20.0, 1000.0])
    ours = unet.level_weights(ratio)
    torch.testing.assert_close(ours[2:], (torch.tensor([6.0, 6.0]) / (ratio[2:] + 1)))
    assert ours[0] == ours[1] == 1.0  # where min-SNR vanishes


def test_the_schedule_ends_in_noise_alone():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**RECIPE["unet"]["scheduler"])
    assert scheduler.alphas_cumprod[-1] < 1e-6 and scheduler.alphas_cumprod[0] > 0.99
    scheduler.set_timesteps(25)
    assert scheduler.timesteps[0] == 999


def test_latents_are_scaled_turned_and_mirrored_like_pictures():
    x = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    assert torch.equal(autoencoder.transformed(x, 1.0, 0, False), x)
    assert torch.equal(autoencoder.transformed(x, 1.0, 1, False), torch.rot90(x, 1, (2, 3)))
    assert torch.equal(autoencoder.transformed(x, 1.0, 0, True), x.flip(3))
    half = autoencoder.transformed(x, 0.5, 0, False)
    assert half.shape == (2, 3, 4, 4)
    torch.testing.assert_close(half.mean(), x.mean())
    generator = torch.Generator().manual_seed(0)
    ways = Counter(autoencoder._draw_transform(0.5, generator) for _ in range(2000))
    assert 1000 - 90 < ways[(1.0, 0, False)] - 1000 / 24 < 1000 + 90  # every 24th of the transforms is none, too
    assert len(ways) == 24


def test_places_say_what_lies_there():
    _, record = world.compose([world.Sticker("cat", "flat", size=40.0)], "white", seed=0)
    drawings, styles = autoencoder.place_labels([record])
    thing = record.objects[0]
    share = thing.mask.reshape(16, 4, 16, 4).mean((1, 3))
    assert torch.equal(drawings[0] == world.DRAWINGS.index("cat/face"), torch.from_numpy(share > 0.25))
    assert torch.equal(styles[0] == world.STYLES.index("flat"), torch.from_numpy(share > 0.25))
    assert set(drawings[0].unique().tolist()) == {world.DRAWINGS.index("cat/face"), autoencoder.NOTHING}


def test_noises_go_to_the_nearest_pictures():
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(4, 2, 3, 3, generator=generator) for _ in range(2))
    ours = unet.nearest_noise(x, noise)

    def total(order) -> float:
        return sum(float((x[i] - noise[j]).norm()) for i, j in enumerate(order))

    best = min(permutations(range(4)), key=total)
    assert torch.equal(ours, noise[list(best)])


@pytest.mark.slow
def test_each_pass_shows_every_picture_once_in_another_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unet, "CHUNK", 8)
    for number in range(3):
        (tmp_path / "latents").mkdir(exist_ok=True)
        names = torch.arange(8) + 8 * number
        tensors = {"latents": names.half(), "drawings": names.byte(), "styles": names.byte()}
        checkpoints.save_checkpoint(tmp_path / "latents" / f"{number:05d}.safetensors", tensors, {"captions": [""] * 8})
    encode = lambda captions: torch.zeros(len(captions), 2)  # noqa: E731
    with unet.Latents(tmp_path, QUICK, encode, distinct=24, objects=(1, 0, 0, 0)) as latents:
        steps = [
            torch.cat([latents.batch(step, part)["latents"] for part in range(2)]).int().tolist() for step in range(12)
        ]
    first, second = (sum(steps[start : start + 6], []) for start in (0, 6))
    assert sorted(first) == sorted(second) == list(range(24)) and first != second
    assert sorted(steps[0] + steps[1]) == list(range(8))  # the first pass takes the chunks as they come


# --- recipe ---------------------------------------------------------------------------------------------


def test_the_recipe_takes_other_values_and_nothing_else():
    assert pretraining.load_recipe(["unet.training.learning_rate=1"])["unet"]["training"]["learning_rate"] == 1.0
    assert pretraining.load_recipe(["vae.config.block_out_channels=[8, 8]"])["vae"]["config"]["block_out_channels"] == [
        8,
        8,
    ]
    for text, message in (
        ("unet.learning_rate=1", "no value 'unet.learning_rate'"),
        ("unet.training=1", "no value 'unet.training'"),
        ("unet.training.muon=1", "give a bool"),
        ("unet.training.pictures=many", "is not a value"),
    ):
        with pytest.raises(ConeslabError, match=message):
            pretraining.load_recipe([text])


# --- judge ----------------------------------------------------------------------------------------------


def test_wrong_captions_are_wrong_in_one_thing():
    objects = [world.Sticker("cat", "flat", "red", "striped"), world.Sticker("doctor/man", "3d", hat="blue")]
    record = world.compose(objects, "beach", seed=0)[1]
    told: Counter = Counter()
    for seed in range(200):
        right, *wrong = judging.contrast(record, Random(seed), 5)
        assert Counter({"cat": 1, "doctor": 1}) == Counter(word for word in right.split() if word in world.CLASSES)
        truth = set(right.split())
        assert truth <= set("a an and in flat red striped cat 3d doctor blue hat on the beach".split())
        for text in wrong:
            off = [word for word in text.split() if word not in truth and word not in ("a", "an")]
            scenes = [phrases[0] for phrases in world.SCENES.values() if phrases[0] in text]
            if scenes and scenes != ["on the beach"]:
                told["scene"] += 1
                off = [word for word in off if word not in scenes[0].split()]
                assert not off
                continue
            assert len(off) <= 1, (right, text)  # "blue" may be right elsewhere in the caption
            assert text != right
            kind = (
                "class"
                if off and off[0] in world.CLASSES
                else "colour or hat"
                if "".join(off) in world.COLOURS
                else "other"
            )
            told[kind] += 1
    assert all(told[kind] > 50 for kind in ("scene", "class", "colour or hat", "other"))


def test_patches_say_what_they_show():
    image, record = world.compose(["cat"], "white", seed=0)
    labels = autoencoder.place_labels([record], 8)[0][0]
    left, top, right, bottom = record.objects[0].box
    assert labels[(top + bottom) // 16, (left + right) // 16] == world.DRAWINGS.index("cat/face")
    assert labels[0, 0] == len(world.DRAWINGS)


def test_soft_entropy_agrees_with_torch():
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([0, 3, 1, 4])
    hard = nn.functional.one_hot(index, 5).float()
    torch.testing.assert_close(judging.soft_entropy(logits, hard), nn.functional.cross_entropy(logits, index))


# --- from scratch to a folder that loads ----------------------------------------------------------------


SMALL = [
    *(f"{stage}.training.pictures=8" for stage in ("vae", "decoder", "unet", "judge")),
    *(f"{stage}.training.batch_size=4" for stage in ("vae", "decoder", "unet", "judge")),
    "vae.config.block_out_channels=[8, 8, 8]",
    "unet.config.block_out_channels=[8, 16, 16]",
    "unet.config.norm_num_groups=4",
    "unet.loss.distinct=8",
    "judge.vision.hidden_size=32",
    "judge.vision.num_hidden_layers=1",
    "judge.vision.num_attention_heads=2",
]


@pytest.mark.slow
def test_every_stage_runs_and_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(unet, "CHUNK", 16)
    monkeypatch.setattr(autoencoder, "LATENT_SAMPLES", 32)
    monkeypatch.setattr(autoencoder, "HELD_OUT_PICTURES", 8)
    monkeypatch.setattr(unet, "HELD_OUT_PICTURES", 8)
    runs, shipped = tmp_path / "runs", tmp_path / "models"
    options = [option for value in SMALL for option in ("--set", value)]
    assert cli.main(["pretrain", "all", "--runs", str(runs), "--models", str(shipped), *options]) == 0
    pipe = StableDiffusionPipeline.from_pretrained(shipped / "tiny")  # stock, no argument
    assert pipe("a cat", num_inference_steps=2).images[0].size == (64, 64)
    assert json.loads((shipped / "tiny" / "model_index.json").read_text())["safety_checker"] == [None, None]
    pipelines.verify(shipped / "tiny")
    pipelines.verify(shipped / "judge")
    judge = CLIPModel.from_pretrained(shipped / "judge")
    assert not any("head" in name.split(".") for name, _ in judge.named_parameters())
    vae, tuned = (AutoencoderKL.from_pretrained(runs / stage / "model") for stage in ("vae", "decoder"))
    assert pipelines.fingerprint(vae.encoder) == pipelines.fingerprint(tuned.encoder)  # the latents stay
    assert pipelines.fingerprint(vae.decoder) != pipelines.fingerprint(tuned.decoder)
    card = (shipped / "tiny" / "README.md").read_text()
    assert "Not measured yet" in card and "U-Net and text encoder" in card and (shipped / "tiny" / "loss.png").is_file()
    assert "captions.png" in card and (shipped / "tiny" / "captions.png").is_file()
    model_cards.write_model_card(
        shipped / "tiny", {"unet": Log.load(runs / "unet" / "log.json")}, {"right class": 0.912345}
    )
    assert "| right class | 0.912 |" in (shipped / "tiny" / "README.md").read_text()
    pipelines.verify(shipped / "tiny")
    assert list((runs / "unet").glob("*.png"))
    measured = Log.load(runs / "unet" / "log.json").measures[-1]
    assert 0 <= Log.load(runs / "judge" / "log.json").measures[-1]["right"] <= 0.2  # hardly trained: near one in 73
    levels = [measured[f"loss_{level}"] for level in unet.LEVELS]
    assert measured["loss"] == pytest.approx(np.mean(levels)) and 0 < min(levels) and max(levels) < 4


def test_a_trial_is_a_row_that_is_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run, "TRIALS", tmp_path / "trials.csv")
    (tmp_path / "vae").mkdir()
    facts = {"recipe": {"batch_size": 4}, "device": "2 CPU cores", "precision": "float32", "weights": 7}
    for loss in (0.5, 0.25):
        rows = [{"step": 10, "seconds": 90.0, "loss": 1.0}]
        Log(facts, rows, [{"step": 10, "seconds": 90.0, "held_out_mse": loss}]).save(tmp_path / "vae" / "log.json")
        run.note_trial("001", tmp_path, "vae", ["vae.loss.equivariance=0.0"])
    run.note_trial("other", tmp_path, "vae", [])
    table = pandas.read_csv(tmp_path / "trials.csv", dtype={"trial": str})
    assert table.trial.tolist() == ["001", "other"] and table.held_out_mse.tolist() == [0.25, 0.25]
    assert table.pictures.tolist() == [40, 40] and table.minutes.tolist() == [1.5, 1.5]
    assert table.changed[0] == "vae.loss.equivariance=0.0"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["unet", "--decoder-only"], "--decoder-only has no effect with pretrain unet"),
        (["judge", "--decoder-only"], "--decoder-only has no effect with pretrain judge"),
        (["all", "--decoder-only"], "--decoder-only has no effect with pretrain all"),
        (["export", "--decoder-only"], "--decoder-only has no effect with pretrain export"),
        (["vae", "--models", "x"], "--models has no effect with pretrain vae"),
        (["export", "--minutes", "3"], "--minutes has no effect with pretrain export"),
        (["export", "--set", "unet.seed=1"], "--set has no effect with pretrain export"),
        (["unet", "--set", "judge.training.seed=1"], "--set judge.training.seed=1 has no effect with pretrain unet"),
        (["vae", "--decoder-only", "--set", "unet.training.seed=1"], "reads decoder and vae"),
        (["all", "--trial", "x"], "--trial has no effect with pretrain all: a trial is of one stage"),
        (["export", "--trial", "x"], "--trial has no effect"),
        (["unet", "--judge", "x"], "--judge has no effect with pretrain unet"),
        (["vae", "--trial", "x", "--judge", "x"], "--judge has no effect with pretrain vae"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_options_that_are_not_for_a_stage_are_refused(tmp_path: Path, capsys, monkeypatch, arguments, reason):
    for name in ("train", "export", "note_trial"):
        monkeypatch.setattr(pretraining, name, lambda *_, **__: pytest.fail("began to work"))
    assert cli.main(["pretrain", *arguments, "--runs", str(tmp_path)]) != 0
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "stages"),
    [
        (["vae", "--decoder-only", "--set", "decoder.loss.noise=0.1"], ("decoder",)),
        (["decoder", "--decoder-only"], ("decoder",)),
        (["unet", "--trial", "x", "--judge", "judge", "--minutes", "3"], ("unet",)),
        (["all", "--models", "x", "--set", "judge.training.pictures=8"], ("vae", "unet", "judge", "decoder")),
        (["export", "--models", "x"], ()),
    ],
    ids=lambda given: " ".join(given),
)
def test_options_that_are_for_a_stage_are_taken(tmp_path: Path, monkeypatch, arguments, stages):
    asked = []
    monkeypatch.setattr(pretraining, "train", lambda runs, stages, **_: asked.append(stages))
    monkeypatch.setattr(pretraining, "export", lambda *_: "there")
    monkeypatch.setattr(pretraining, "note_trial", lambda *_, **__: {})
    assert cli.main(["pretrain", *arguments, "--runs", str(tmp_path)]) == 0 and asked == [stages]


def test_training_refuses_what_it_has_not(tmp_path: Path):
    for stages, options, reason in (
        (("unet", "magic"), {}, "magic: no stage of the training; choose from vae, unet"),
        (("vae",), {"minutes": 0}, "minutes is 0: give a positive number"),
        (("vae",), {"minutes": -1.0}, "minutes is -1.0"),
    ):
        with pytest.raises(ConeslabError, match=reason):
            pretraining.train(tmp_path, stages, **options)
    with pytest.raises(ConeslabError, match="a judge is asked about pictures of the U-Net"):
        run.note_trial("x", tmp_path, "vae", [], judge="mine")


def test_a_stage_says_what_it_stands_on(tmp_path: Path, capsys):
    assert cli.main(["pretrain", "unet", "--runs", str(tmp_path)]) == 2
    assert "train it first" in capsys.readouterr().err
    assert cli.main(["pretrain", "export", "--runs", str(tmp_path)]) == 2
    assert "no trained model" in capsys.readouterr().err
    with pytest.raises(ConeslabError, match="not a shipped model"):
        model_cards.write_model_card(tmp_path, {})
    with pytest.raises(ConeslabError, match="no training log"):
        Log.load(tmp_path / "log.json")
