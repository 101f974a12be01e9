"""Samplers side by side: guidance in part of the schedule, call counts, and the judge's table."""

import numpy as np
import pytest
from small_judge import save_small_judge

from coneslab import cli, generate, load_judge
from coneslab.diffusion import encode_prompts
from coneslab.diffusion.sampling import ddim_sample, guided_between, start_noise
from coneslab.errors import ConeslabError
from coneslab.measure import samplers
from coneslab.measure.samplers import Sampler, compare_samplers, use_scheduler


def pictures(pipe, scale: float, steps: int = 4, interval=(0.0, 1.0)) -> tuple[np.ndarray, int]:
    calls: list[int] = []
    made = generate(
        pipe,
        ["a cat", "a dog"],
        seed=1,
        sampler_steps=steps,
        guidance_scale=scale,
        guidance_interval=interval,
        on_calls=calls.append,
    )
    return np.stack([np.asarray(picture, np.int16) for picture in made]), calls[0]


@pytest.mark.slow
def test_guidance_everywhere_is_the_pipelines_own_and_nowhere_is_none(v_pipe):
    (guided, both), (plain, one) = pictures(v_pipe, 7.0), pictures(v_pipe, 1.0)
    assert np.abs(guided - plain).mean() > 1
    assert both == 2 * 2 * 4 and one == 2 * 4
    own = v_pipe(
        ["a cat", "a dog"], num_inference_steps=4, guidance_scale=7.0, latents=start_noise(v_pipe, [1, 2])
    ).images
    exact = generate(v_pipe, ["a cat", "a dog"], seed=1, sampler_steps=4, guidance_scale=7.0, dtype=v_pipe.unet.dtype)
    assert all(np.array_equal(a, b) for a, b in zip(own, exact, strict=True))
    never, calls = pictures(v_pipe, 7.0, interval=(0.9999, 1.0))
    assert np.abs(never - plain).max() <= 2 and calls == 2 * 4  # u + 7 (c - u) with u = c, rounded


@pytest.mark.slow
def test_guidance_in_a_part_of_the_schedule(v_pipe):
    part, calls = pictures(v_pipe, 7.0, 10, (0.4, 1.0))
    inside = sum(1 - (int(t) + 1) / 1000 >= 0.4 for t in v_pipe.scheduler.timesteps)
    assert 0 < inside < 10 and calls == 2 * (10 + inside)
    assert not np.array_equal(part, pictures(v_pipe, 7.0, 10)[0])
    assert not np.array_equal(part, pictures(v_pipe, 1.0, 10)[0])
    with pytest.raises(ConeslabError, match="two shares in order"):
        pictures(v_pipe, 7.0, 4, (0.8, 0.2))


@pytest.mark.slow
def test_without_guidance_an_interval_changes_nothing(v_pipe):
    (plain, calls), (part, counted) = pictures(v_pipe, 1.0), pictures(v_pipe, 1.0, interval=(0.4, 0.6))
    assert np.array_equal(plain, part) and calls == counted == 2 * 4
    same = {"seed": [3, 3], "sampler_steps": 2, "guidance_scale": 1.0}  # the same noise twice, as if for guidance
    drawn = [generate(v_pipe, ["a cat", "a dog"], **same, guidance_interval=i) for i in ((0.0, 1.0), (0.4, 0.6))]
    assert drawn[0] == drawn[1]


@pytest.mark.slow
def test_batches_of_another_sampler_are_not_taken_for_guidance(v_pipe):
    text, noise = encode_prompts(v_pipe, ["a cat", "a dog"]), start_noise(v_pipe, [1, 2])
    options = {"sampler_steps": 2, "empty_embeddings": encode_prompts(v_pipe, "")}
    expected = ddim_sample(v_pipe, text, noise, **options)
    generate(v_pipe, "a cat", sampler_steps=1, guidance_scale=7.0)  # the pipeline's last call was guided
    with guided_between(v_pipe, 0.999, 1.0) as passes:
        assert ddim_sample(v_pipe, text, noise, **options).equal(expected)
        assert passes() == 2 * 2 * 2


def test_the_network_is_put_back_whatever_happens(v_pipe):
    with guided_between(v_pipe, 0.2, 1.0):
        outer = v_pipe.unet.forward
        with pytest.raises(RuntimeError, match="stop"), guided_between(v_pipe, 0.0, 1.0):
            raise RuntimeError("stop")
        assert v_pipe.unet.forward is outer
    assert "forward" not in v_pipe.unet.__dict__


@pytest.mark.parametrize("name", samplers.SCHEDULERS)
def test_each_scheduler_keeps_the_noise_schedule_and_the_prediction_type(v_pipe, name):
    own = v_pipe.scheduler
    try:
        use_scheduler(v_pipe, name)
        assert type(v_pipe.scheduler).__name__ == samplers.SCHEDULERS[name][0]
        for key in ("prediction_type", "beta_schedule", "beta_start", "timestep_spacing", "num_train_timesteps"):
            assert v_pipe.scheduler.config[key] == own.config[key], key
        assert pictures(v_pipe, 3.0)[0].std() > 0
    finally:
        v_pipe.scheduler = own


@pytest.mark.slow
def test_the_table_has_a_row_a_sampler_and_puts_the_scheduler_back(v_pipe, tmp_path):
    save_small_judge(tmp_path)
    own, out = v_pipe.scheduler, tmp_path / "samplers.csv"
    asked = [Sampler("DDIM", 3), Sampler("UniPC", 2, guided=(0.5, 1.0))]
    table = compare_samplers(
        v_pipe, load_judge(tmp_path), asked, seeds=1, limit=1, kid_pictures=4, out=out, progress=False
    )
    assert v_pipe.scheduler is own and out.read_text().count("\n") == 3
    assert table.scheduler.tolist() == ["DDIM", "UniPC"] and table.calls[0] == 6 and 2 <= table.calls[1] < 4
    assert table.KID.notna().all() and table["right class"].between(0, 1).all()


def test_samplers_that_cannot_be_are_refused(capsys):
    with pytest.raises(ConeslabError, match="choose one of DDIM"):
        Sampler("Euler", 10)
    with pytest.raises(ConeslabError, match="two shares in order"):
        Sampler("DDIM", 10, guided=(0.8, 0.2))
    with pytest.raises(ConeslabError, match="guidance_scale is 0.5: give 1 for no guidance, or more"):
        Sampler("DDIM", 10, 0.5)
    assert cli.main(["compare-samplers", "tiny", "--sampler", "DDIM,many"]) == 2
    assert "NAME,STEPS" in capsys.readouterr().err
