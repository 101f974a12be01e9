"""LoRA: what is trained, that it is what diffusers and peft compute, and files of other programs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_personalization import FAST as STEPS
from test_personalization import PRIOR

from coneslab.diffusion.kvspace import KVSpace
from coneslab.diffusion.sampling import generate
from coneslab.edits.base import Combined, load_edit
from coneslab.edits.interchange import LORA, export_lora, import_lora
from coneslab.edits.low_rank import LowRankDelta, compress
from coneslab.edits.weights import model_fingerprint
from coneslab.errors import ConeslabError, FileFormatError, MismatchError
from coneslab.methods import lora

FAST = STEPS | PRIOR


def linear(pipe) -> dict[str, torch.nn.Linear]:
    return {name: part for name, part in pipe.unet.named_modules() if isinstance(part, torch.nn.Linear)}


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["cross-attention", "attention", "all"])
def test_the_layers_asked_for_change_and_no_other(v_pipe, pictured, targets):
    expected = {
        "cross-attention": {f"{name}.weight" for name in linear(v_pipe) if ".attn2." in name},
        "attention": {f"{name}.weight" for name in linear(v_pipe) if ".attn1." in name or ".attn2." in name},
        "all": {f"{name}.weight" for name in linear(v_pipe)},
    }[targets]
    before = {name: weight.detach().clone() for name, weight in v_pipe.unet.named_parameters()}
    edit = lora(v_pipe, pictured, rank=2, targets=targets, **FAST)
    assert set(edit.factors) == expected and set(edit.ranks.values()) == {2}
    assert all(torch.equal(weight, before[name]) for name, weight in v_pipe.unet.named_parameters())
    with edit.applied(v_pipe):
        now = dict(v_pipe.unet.named_parameters())
        changed = {name for name, weight in before.items() if not torch.equal(now[name], weight)}
    assert changed == expected


@pytest.mark.slow
def test_it_learns_from_b_at_zero_and_the_loss_falls(v_pipe, pictured):
    edit = lora(v_pipe, pictured, rank=4, **FAST | {"steps": 30, "learning_rate": 3e-3})
    losses = edit.history["loss"]
    assert np.mean(losses[-8:]) < np.mean(losses[:8])
    first = lora(v_pipe, pictured, rank=4, **FAST | {"steps": 1, "learning_rate": 1e-9})
    assert all(float(left.abs().max()) < 1e-8 for left, _ in first.factors.values())
    assert all(0.05 < float(right.std()) < 1 for _, right in first.factors.values())  # peft's "gaussian" is N(0, 1/r)


@pytest.mark.slow
def test_alpha_scales_the_change(v_pipe, pictured):
    options = {"rank": 4, **FAST, "steps": 1, "learning_rate": 1e-3}
    plain, doubled = lora(v_pipe, pictured, **options), lora(v_pipe, pictured, alpha=8.0, **options)
    for name, (left, right) in plain.factors.items():
        assert torch.equal(doubled.factors[name][1], right)
        # Adam's first step is the learning rate, whatever the size of the gradient: B is the same, its factor is not
        apart = (doubled.factors[name][0] - 2 * left).abs() > 0.02 * (2 * left).abs()
        assert apart.float().mean() < 0.05, name  # where a gradient is as small as Adam's epsilon


@pytest.mark.slow
def test_a_seed_repeats_it_and_no_random_number_of_the_caller_is_drawn(v_pipe, pictured):
    state = torch.random.get_rng_state()
    one, again, other = (lora(v_pipe, pictured, rank=2, **FAST | {"seed": seed}) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, (left, right) in one.factors.items():
        assert torch.equal(left, again.factors[name][0]) and torch.equal(right, again.factors[name][1])
        assert not torch.equal(right, other.factors[name][1])


@pytest.mark.slow
def test_random_numbers_of_a_gpu_stay_the_callers(v_pipe, pictured, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPU was seeded"))
    lora(v_pipe, pictured, rank=2, **FAST | {"steps": 1})


@pytest.mark.slow
def test_diffusers_draws_the_same_with_the_exported_file(v_pipe, own_pipe, pictured, tmp_path):
    edit = lora(v_pipe, pictured, rank=2, alpha=6.0, targets="all", **FAST | {"learning_rate": 1e-2})
    assert export_lora(edit, tmp_path) == tmp_path / LORA
    own_pipe.load_lora_weights(tmp_path)
    x, text = _input(v_pipe)
    theirs = own_pipe.unet(x, 7, text).sample
    with edit.applied(v_pipe):
        ours = v_pipe.unet(x, 7, text).sample
    plain = v_pipe.unet(x, 7, text).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - plain).abs().max() > 10 * (ours - theirs).abs().max()
    with pytest.raises(ConeslabError, match="unload_lora_weights"):
        lora(own_pipe, pictured, **FAST)
    own_pipe.unload_lora_weights()
    assert torch.equal(own_pipe.unet(x, 7, text).sample, plain)


def _input(pipe) -> tuple[torch.Tensor, torch.Tensor]:
    side, chance = pipe.unet.config.sample_size, torch.Generator().manual_seed(0)
    x = torch.randn(2, pipe.unet.config.in_channels, side, side, generator=chance)
    return x, torch.randn(2, 8, pipe.unet.config.cross_attention_dim, generator=chance)


@pytest.mark.slow
def test_files_come_back_as_they_were(v_pipe, pictured, tmp_path):
    edit = lora(v_pipe, pictured, rank=2, **FAST)
    again = import_lora(v_pipe, export_lora(edit, tmp_path))
    assert again.factors.keys() == edit.factors.keys() and again.fingerprint == model_fingerprint(v_pipe)
    kept = load_edit(edit.save(tmp_path / "lora.safetensors"))
    for name, pair in edit.factors.items():
        for one in (again, kept):
            assert all(torch.equal(a, b) for a, b in zip(one.factors[name], pair, strict=True))
    mixed = compress(edit.dense(), energy=0.9)  # ranks that differ, too
    assert import_lora(v_pipe, export_lora(mixed, tmp_path / "mixed")).ranks == mixed.ranks


def kohya(edit: LowRankDelta, alpha: float) -> dict[str, torch.Tensor]:
    """The same file as kohya's scripts write it."""
    tensors = {}
    for name, (left, right) in edit.factors.items():
        layer = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        rank = left.shape[1]
        tensors |= {f"{layer}.lora_up.weight": left * rank / alpha, f"{layer}.lora_down.weight": right.clone()}
        tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.mark.slow
def test_a_file_of_kohyas_scripts_is_read_with_its_alphas(v_pipe, pictured, tmp_path):
    edit = lora(v_pipe, pictured, rank=4, targets="attention", **FAST)
    save_file(kohya(edit, 1.0), tmp_path / "theirs.safetensors")
    found = import_lora(v_pipe, tmp_path / "theirs.safetensors")
    assert found.factors.keys() == edit.factors.keys()
    for name, delta in edit.dense().deltas.items():
        torch.testing.assert_close(found.dense().deltas[name], delta)


def write_as_diffusers_does(pipe, folder, **changes) -> None:
    """A LoRA of random matrices, trained in `pipe`, with its `LoraConfig` in the metadata."""
    torch.manual_seed(0)
    options = {"r": 4, "init_lora_weights": False, "target_modules": ["to_k", "to_v"]} | changes
    pipe.unet.add_adapter(LoraConfig(**options), "own")
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet, adapter_name="own"))
    pipe.save_lora_weights(
        folder, unet_lora_layers=layers, unet_lora_adapter_metadata=pipe.unet.peft_config["own"].to_dict()
    )
    pipe.unet.delete_adapters("own")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": 16},
        {"lora_alpha": 16, "use_rslora": True},
        {"lora_alpha": 2, "alpha_pattern": {"up_blocks.*to_k": 12, "attn2.to_v": 1}},
        {"lora_alpha": 4, "rank_pattern": {"attn2.to_k": 2}},
        {},
    ],
    ids=lambda changes: ", ".join(changes) or "peft's own alpha",
)
def test_the_scale_in_a_files_metadata_is_the_one_diffusers_applies(v_pipe, own_pipe, tmp_path, changes):
    write_as_diffusers_does(own_pipe, tmp_path, **changes)
    own_pipe.load_lora_weights(tmp_path)
    x, text = _input(v_pipe)
    theirs, plain = own_pipe.unet(x, 7, text).sample, v_pipe.unet(x, 7, text).sample
    with import_lora(v_pipe, tmp_path).applied(v_pipe):
        ours = v_pipe.unet(x, 7, text).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - plain).abs().max() > 10 * (ours - theirs).abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "use_dora=True, which is not understood"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which is not understood"),
    ],
)
def test_what_is_no_plain_lora_is_refused(v_pipe, own_pipe, tmp_path, changes, said):
    write_as_diffusers_does(own_pipe, tmp_path, **changes)
    with pytest.raises(FileFormatError, match=said):
        import_lora(v_pipe, tmp_path)
    tensors = load_file(tmp_path / LORA)
    save_file(tensors, tmp_path / LORA)  # and without the metadata
    if "use_dora" in changes:
        with pytest.raises(FileFormatError, match="more than pairs of matrices.*lora_magnitude_vector"):
            import_lora(v_pipe, tmp_path)


def test_metadata_that_do_not_fit_the_matrices_are_refused(v_pipe, tmp_path):
    name, weight = next((name, part.weight) for name, part in linear(v_pipe).items() if "attn2" in name)
    thin = {"lora_A": torch.ones(2, weight.shape[1]), "lora_B": torch.ones(weight.shape[0], 2)}
    tensors = {f"unet.{name}.{half}.weight": matrix for half, matrix in thin.items()}
    for config, said in (
        ("{", "no JSON object"),
        ("[]", "no JSON object"),
        ('{"text_encoder.r": 2}', "without a field of the U-Net's"),
        ('{"unet.r": 4, "unet.lora_alpha": 4}', "matrices of rank 2 for .* says 4"),
        ('{"unet.lora_alpha": 4}', "says 8"),  # peft's default
        ('{"unet.r": 2, "unet.lora_alpha": "much"}', "says no scale"),
        ('{"unet.r": 2, "unet.alpha_pattern": {"(": 1}}', "says no scale"),
        ('{"unet.r": 2, "unet.alpha_pattern": 3}', "says no scale"),
        ('{"unet.r": 2, "unet.peft_type": "LOHA"}', "peft_type='LOHA', which is not understood"),
        ('{"unet.r": 2, "unet.brand_new": 1}', "brand_new=1, which is not understood"),
    ):
        save_file(tensors, tmp_path / LORA, metadata={"lora_adapter_metadata": config})
        with pytest.raises(FileFormatError, match=said):
            import_lora(v_pipe, tmp_path)
    good = '{"unet.r": 2, "unet.lora_alpha": 3, "unet.brand_new": null, "text_encoder.r": 9}'
    save_file(tensors, tmp_path / LORA, metadata={"lora_adapter_metadata": good})
    (delta,) = import_lora(v_pipe, tmp_path).dense().deltas.values()
    assert torch.equal(delta, torch.full_like(delta, 2 * 3 / 2))
    scaled = {f"lora_unet_{name.replace('.', '_')}.{part}.weight": thin[half] for half, part in HALVES.items()}
    scaled[f"lora_unet_{name.replace('.', '_')}.alpha"] = torch.tensor(1.0)
    save_file(scaled, tmp_path / LORA, metadata={"lora_adapter_metadata": good})
    with pytest.raises(FileFormatError, match="alphas in its tensors and in its metadata"):
        import_lora(v_pipe, tmp_path)
    dora = scaled | {f"lora_unet_{name.replace('.', '_')}.dora_scale": torch.ones(weight.shape[0], 1)}
    save_file(dora, tmp_path / LORA)
    with pytest.raises(FileFormatError, match="is a DoRA"):
        import_lora(v_pipe, tmp_path)


HALVES = {"lora_A": "lora_down", "lora_B": "lora_up"}  # kohya's names


def test_files_that_are_no_lora_of_this_unet_are_refused(v_pipe, sd_pipe, pictured, tmp_path):
    edit = lora(v_pipe, pictured, rank=2, **FAST)
    good = load_file(export_lora(edit, tmp_path))
    layer = next(iter(good)).removesuffix(".lora_A.weight")
    wrong = {
        "text_encoder": (FileFormatError, {"text_encoder.x.lora_A.weight": torch.ones(2, 2)}),
        "halves": (FileFormatError, {f"{layer}.lora_A.weight": torch.ones(2, 2)}),
        "nothing": (FileFormatError, {"weight": torch.ones(2)}),
    }
    for name, (kind, tensors) in wrong.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(kind):
            import_lora(v_pipe, tmp_path / f"{name}.safetensors")
    with pytest.raises(MismatchError, match="trained for another model"):
        import_lora(sd_pipe, tmp_path)
    (tmp_path / LORA).write_bytes((tmp_path / LORA).read_bytes()[:-3])
    with pytest.raises(FileFormatError):
        import_lora(v_pipe, tmp_path)


@pytest.mark.slow
def test_merged_loras_are_the_sum_of_their_changes(v_pipe, pictured):
    one, other = (lora(v_pipe, pictured, rank=2, **FAST | {"seed": seed, "learning_rate": 1e-2}) for seed in (0, 1))
    before = KVSpace(v_pipe).gather()
    with Combined((one, other)).applied(v_pipe):
        both = KVSpace(v_pipe).gather() - before
    with one.applied(v_pipe):
        alone = KVSpace(v_pipe).gather() - before
    with other.applied(v_pipe):
        torch.testing.assert_close(both, alone + KVSpace(v_pipe).gather() - before, rtol=1e-3, atol=1e-5)


def test_settings_out_of_range_are_refused(v_pipe, pictured):
    for wrong, said in (
        ({"rank": 0}, "rank"),
        ({"rank": 10_000}, "narrowest layer"),
        ({"alpha": 0.0}, "alpha"),
        ({"targets": "convolutions"}, "choose one of cross-attention, attention, all"),
    ):
        with pytest.raises(ConeslabError, match=said):
            lora(v_pipe, pictured, **FAST | wrong)


@pytest.mark.slow
def test_pictures_change_with_it(v_pipe, pictured):
    edit = lora(v_pipe, pictured, rank=2, **FAST | {"learning_rate": 1e-1})
    plain = np.asarray(generate(v_pipe, "a cat", sampler_steps=1)[0])
    with edit.applied(v_pipe):
        assert not np.array_equal(np.asarray(generate(v_pipe, "a cat", sampler_steps=1)[0]), plain)
    assert np.array_equal(np.asarray(generate(v_pipe, "a cat", sampler_steps=1)[0]), plain)
