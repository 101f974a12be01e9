"""Training: the loop, its checkpoints, the tokenizer, and every stage for one or two steps."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import nn
from transformers import CLIPModel, CLIPTokenizer

from coneslab import cli, diffusion, judging, modelcard, models, pretrain, training, world
from coneslab.errors import ConeslabError, FileFormatError
from coneslab.training import Log, Recipe

QUICK = Recipe(minutes=10, batch_size=4, learning_rate=1e-2, steps=6, warmup=2, ema=0.9)


# --- the loop -------------------------------------------------------------------------------------------


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def fit_small(folder: Path, recipe: Recipe = QUICK, **options) -> tuple[nn.Sequential, Log]:
    net = small_net()

    def loss(step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        x = torch.randn(16, 3, generator=generator)
        return {"loss": (net(x) - x.sum(1, keepdim=True)).square().mean()}

    return net, training.fit(folder, modules={"net": net}, loss=loss, recipe=recipe, log_every=1, **options)


@pytest.mark.parametrize("muon", [False, True])
def test_an_interrupted_run_ends_where_a_whole_one_does(tmp_path: Path, muon: bool):
    recipe = replace(QUICK, muon=muon)
    whole, _ = fit_small(tmp_path / "whole", recipe)
    fit_small(tmp_path / "parts", recipe, stop_after=2)
    parts, log = fit_small(tmp_path / "parts", recipe)  # a fresh network: everything comes from the checkpoint
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], weight, rtol=0, atol=0)
    assert log.steps == 6 and [row["step"] for row in log.rows] == list(range(1, 7))


def test_every_step_draws_its_own_noise(tmp_path: Path):
    net, drawn = small_net(), []

    def loss(step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        drawn.append(torch.rand(1, generator=generator).item())
        return {"loss": net(torch.ones(1, 3)).square().mean()}

    training.fit(tmp_path, modules={"net": net}, loss=loss, recipe=QUICK)
    assert len(set(drawn)) == QUICK.steps


def test_a_keyboard_interrupt_leaves_a_checkpoint(tmp_path: Path):
    net = small_net()

    def loss(step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        if step == 3:
            raise KeyboardInterrupt
        return {"loss": net(torch.ones(1, 3)).square().mean()}

    with pytest.raises(KeyboardInterrupt):
        training.fit(tmp_path, modules={"net": net}, loss=loss, recipe=QUICK)
    assert training.load_checkpoint(tmp_path / "checkpoint.safetensors")[1]["step"] == 3


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path: Path):
    fit_small(tmp_path, stop_after=2)
    path = tmp_path / "checkpoint.safetensors"
    tensors, facts = training.load_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(FileFormatError, match="not a whole coneslab checkpoint"):
        fit_small(tmp_path)
    training.save_checkpoint(path, {k: v for k, v in tensors.items() if "net.0" not in k}, facts)
    with pytest.raises(FileFormatError, match="lacks 2 weights"):
        fit_small(tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path):
    net = small_net()

    def loss(step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"loss": net(torch.ones(1, 3)).sum() * float("nan")}

    with pytest.raises(ConeslabError, match="no longer finite"):
        training.fit(tmp_path, modules={"net": net}, loss=loss, recipe=QUICK)


def test_the_rate_rises_stays_and_falls_to_nothing_on_time():
    recipe = Recipe(minutes=10, batch_size=1, learning_rate=1.0, warmup=10, decay=0.5)
    assert recipe.rate(0, 0.0) == pytest.approx(0.1)
    assert recipe.rate(10, 240.0) == 1.0
    assert recipe.rate(10, 450.0) == pytest.approx(0.5)  # half of the last half
    assert recipe.rate(10, 600.0) == 0.0
    assert replace(recipe, steps=100).spent(50, 0.0) == 0.5


def test_the_average_is_the_exponential_one():
    weight = {"w": torch.zeros(1)}
    average = training.Average(weight, decay=0.5)
    by_hand = 0.0
    for step in range(20):
        weight["w"] = torch.tensor([float(step)])
        average.update(weight, step)
        kept = min(0.5, (1 + step) / (10 + step))
        by_hand = kept * by_hand + (1 - kept) * step
    assert average.shadow["w"].item() == pytest.approx(by_hand, rel=1e-5)


def test_muon_makes_updates_nearly_orthogonal():
    matrices = torch.randn(2, 12, 30, generator=torch.Generator().manual_seed(0))
    for made, raw in ((training.orthogonal(matrices), matrices), (training.orthogonal(matrices.mT).mT, matrices)):
        values = torch.linalg.svdvals(made.float())
        assert values.min() > 0.5 and values.max() < 1.3  # the iteration's own range
        left, _, right = torch.linalg.svd(raw, full_matrices=False)  # the exact answer has the same directions
        exact = left @ right
        cosine = (made.float() * exact).sum((1, 2)) / (made.float().norm(dim=(1, 2)) * exact.norm(dim=(1, 2)))
        assert cosine.min() > 0.95


def test_muon_leaves_edges_and_vectors_to_adamw():
    net = small_net()
    weights = {"net.conv_in.weight": net[0].weight, "net.2.weight": net[2].weight, "net.2.bias": net[2].bias}
    adam, muon = training.optimizers(weights, replace(QUICK, muon=True))
    assert [id(w) for w in muon.param_groups[0]["params"]] == [id(net[2].weight)]
    assert {id(w) for group in adam.param_groups for w in group["params"]} == {id(net[0].weight), id(net[2].bias)}


def test_a_feed_gives_the_same_pictures_again():
    with training.Feed(8, seed=3) as feed:
        pictures, part = feed.batch(5, 4)  # the second half of chunk 2
        assert part == slice(4, 8)
        np.testing.assert_array_equal(pictures.images, world.sample(8, seed=3 * 1_000_003 + 2).images)


# --- text -----------------------------------------------------------------------------------------------


def test_every_word_is_one_token_and_anything_else_still_encodes(tmp_path: Path):
    pretrain.build_tokenizer().save_pretrained(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert all(len(tokenizer(word).input_ids) == 3 for word in world.WORDS)
    sentence = " ".join(world.WORDS[:20])
    assert len(tokenizer(sentence).input_ids) == 22
    assert len({tokenizer(word).input_ids[1] for word in world.WORDS}) == len(world.WORDS)
    strange = tokenizer("zebra-crossing, 1984 é 象").input_ids
    assert len(strange) > 10 and tokenizer.unk_token_id not in strange[1:-1]
    padded = tokenizer("a cat", padding="max_length").input_ids
    assert len(padded) == 32 and padded[0] == tokenizer.bos_token_id and set(padded[3:]) == {tokenizer.eos_token_id}


def test_captions_fit_into_the_text_encoder():
    tokenizer = pretrain.build_tokenizer()
    lengths = [len(ids) for ids in tokenizer(world.sample(400, seed=5).captions).input_ids]
    assert max(lengths) <= tokenizer.model_max_length


def test_the_text_encoder_pools_at_the_end_of_the_text():
    torch.manual_seed(0)
    tokenizer = pretrain.build_tokenizer()
    from transformers import CLIPTextModel

    model = CLIPTextModel(pretrain.text_config(tokenizer, **pretrain.TEXT_CONFIG)).eval()
    ids = tokenizer("a cat", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        out = model(ids)
    torch.testing.assert_close(out.pooler_output, out.last_hidden_state[:, 3])


# --- autoencoder and U-Net ------------------------------------------------------------------------------


def test_pixels_go_back_and_forth():
    images = world.sample(2, seed=0).images
    np.testing.assert_array_equal(pretrain.to_uint8(pretrain.to_tensor(images)), images)


def test_picture_loss_by_hand():
    made, real, even = torch.zeros(1, 1, 2, 2), torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]), torch.ones(1, 1, 2, 2)
    pixels, edges = pretrain.picture_loss(made, real, even)
    assert pixels.item() == 0.5 and edges.item() == 0.5  # across: 1 everywhere; down: 0
    soft, _ = pretrain.picture_loss(made, real, even, softness=0.75)
    assert soft.item() == pytest.approx(((1 + 0.75**2) ** 0.5 - 0.75) / 2)
    uneven = torch.tensor([[[[1.0, 3.0], [0.0, 0.0]]]])
    pixels, edges = pretrain.picture_loss(made, real, uneven)
    assert pixels.item() == 0.75 and edges.item() == 0.75  # (0·1 + 1·3) / 4; across: (1·3 + 1·0) / 2 = 1.5, down: 0


def test_objects_outweigh_scenery():
    record = world.compose(["cat"], "grass", seed=0)[1]
    weights = pretrain.object_weights([record], torch.device("cpu"))[0, 0]
    mask = torch.from_numpy(record.objects[0].mask)
    assert weights.mean().item() == pytest.approx(1, abs=1e-5)
    assert weights[mask].min() / weights.min() == pytest.approx(pretrain.OBJECT_WEIGHT)


def test_standard_latents_decode_to_the_same_pictures():
    torch.manual_seed(0)
    vae = AutoencoderKL(**pretrain.VAE_CONFIG).eval()
    x = pretrain.to_tensor(world.sample(16, seed=1).images)
    with torch.no_grad():
        before = vae.encode(x).latent_dist
        picture = vae.decode(before.mean).sample
        pretrain.standardise_latents(vae, torch.device("cpu"), n=64)
        after = vae.encode(x).latent_dist
        torch.testing.assert_close(vae.decode(after.mean).sample, picture, rtol=1e-3, atol=1e-3)
        latents = vae.encode(pretrain.to_tensor(world.sample(64, seed=77).images)).latent_dist.mean
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
    ours = pretrain.level_weights(ratio)
    torch.testing.assert_close(ours[2:], (torch.tensor([6.0, 6.0]) / (ratio[2:] + 1)))
    assert ours[0] == ours[1] == 1.0  # where min-SNR vanishes


def test_the_schedule_ends_in_noise_alone():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**pretrain.SCHEDULER_CONFIG)
    assert scheduler.alphas_cumprod[-1] < 1e-6 and scheduler.alphas_cumprod[0] > 0.99
    scheduler.set_timesteps(25)
    assert scheduler.timesteps[0] == 999


# --- judge ----------------------------------------------------------------------------------------------


def test_wrong_captions_are_wrong_in_one_thing():
    from random import Random

    record = world.compose(["cat", "car"], "beach", seed=0)[1]
    for seed in range(20):
        right, *wrong = judging.contrast(record, Random(seed), 5)
        assert Counter({"cat", "car"}) == Counter(word for word in right.split() if word in world.CLASSES)
        for text in wrong:
            words = text.replace(",", "").split()
            kept = {word for word in words if word in world.CLASSES}
            wrong_class = len(kept & {"cat", "car"}) == 1 and len(kept) == 2
            wrong_scene = (world.SCENES["beach"][0] in text) != (world.SCENES["beach"][0] in right)
            wrong_style = not set(words) & {"3d"} and bool(set(words) & {"flat", "cartoon", "sticker"})
            assert wrong_class + wrong_scene + wrong_style == 1


def test_patches_say_what_they_show():
    image, record = world.compose(["cat"], "white", seed=0)
    labels = judging.patch_labels([record], 8).view(8, 8)
    left, top, right, bottom = record.objects[0].box
    assert labels[(top + bottom) // 16, (left + right) // 16] == judging.NAMES.index("cat")
    assert labels[0, 0] == len(judging.NAMES)


def test_soft_entropy_agrees_with_torch():
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([0, 3, 1, 4])
    hard = nn.functional.one_hot(index, 5).float()
    torch.testing.assert_close(judging.soft_entropy(logits, hard), nn.functional.cross_entropy(logits, index))


# --- from nothing to a folder that loads ----------------------------------------------------------------


def test_every_stage_runs_and_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    small = {"steps": 2, "batch_size": 4, "minutes": 5}
    for module, name in ((pretrain, "VAE"), (pretrain, "DECODER"), (pretrain, "UNET"), (pretrain, "JUDGE")):
        monkeypatch.setattr(module, name, replace(getattr(module, name), **small))
    monkeypatch.setattr(pretrain, "PICTURES", 12)
    monkeypatch.setattr(pretrain, "CHUNK", 12)
    monkeypatch.setattr(pretrain, "LATENT_SAMPLES", 32)
    monkeypatch.setattr(pretrain, "VAE_CONFIG", pretrain.VAE_CONFIG | {"block_out_channels": (8, 8, 8)})
    monkeypatch.setattr(
        pretrain, "UNET_CONFIG", pretrain.UNET_CONFIG | {"block_out_channels": (8, 16), "norm_num_groups": 4}
    )
    runs, shipped = tmp_path / "runs", tmp_path / "models"
    assert cli.main(["pretrain", "all", "--runs", str(runs), "--models", str(shipped)]) == 0
    pipe = StableDiffusionPipeline.from_pretrained(shipped / "tiny")  # stock, no argument
    assert pipe("a cat", num_inference_steps=2).images[0].size == (64, 64)
    assert json.loads((shipped / "tiny" / "model_index.json").read_text())["safety_checker"] == [None, None]
    models.verify(shipped / "tiny")
    models.verify(shipped / "judge")
    judge = CLIPModel.from_pretrained(shipped / "judge")
    assert not any("head" in name.split(".") for name, _ in judge.named_parameters())
    vae, tuned = (AutoencoderKL.from_pretrained(runs / stage / "model") for stage in ("vae", "decoder"))
    assert models.fingerprint(vae.encoder) == models.fingerprint(tuned.encoder)  # the latents stay
    assert models.fingerprint(vae.decoder) != models.fingerprint(tuned.decoder)
    card = (shipped / "tiny" / "README.md").read_text()
    assert "Not measured yet" in card and "U-Net and text encoder" in card and (shipped / "tiny" / "loss.png").is_file()
    modelcard.write_model_card(
        shipped / "tiny", {"unet": Log.load(runs / "unet" / "log.json")}, {"right class": 0.912345}
    )
    assert "| right class | 0.912 |" in (shipped / "tiny" / "README.md").read_text()
    models.verify(shipped / "tiny")
    assert list((runs / "unet").glob("*.png"))


def test_a_stage_says_what_it_stands_on(tmp_path: Path, capsys):
    assert cli.main(["pretrain", "unet", "--runs", str(tmp_path)]) == 1
    assert "train it first" in capsys.readouterr().err
    assert cli.main(["pretrain", "export", "--runs", str(tmp_path)]) == 1
    assert "no trained model" in capsys.readouterr().err
    with pytest.raises(ConeslabError, match="not a shipped model"):
        modelcard.write_model_card(tmp_path, {})
    with pytest.raises(ConeslabError, match="no training log"):
        Log.load(tmp_path / "log.json")
