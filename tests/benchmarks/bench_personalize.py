"""How much faster a step of our Textual Inversion, DreamBooth and Custom Diffusion is than of diffusers' examples.

    python tests/benchmarks/bench_personalize.py --scripts FOLDER [--methods ...] [--precision float32|bfloat16|own]
        [--model FOLDER] [--batch 8] [--steps 20] [--warmup 3] [--threads 2]

FOLDER is `examples` in a checkout of diffusers at the installed version (or name it in DIFFUSERS_EXAMPLES); none of it
is kept here. Both sides of a method run unchanged, each in its own process, and alternate step by step, from the end of
one optimiser step to the end of the next, so set-up is not measured and a busy machine slows both alike. The ratio is
the median of these pairs, with the tenth and ninetieth percentiles. Below it is printed where the time of a step goes.

The same on both sides: model, five pictures of the subject, prior pictures, resolution, batch size, precision (except
for "own": each side's default, float32 for theirs, bfloat16 for ours where that is faster), prior loss weight 1, AdamW,
threads; no gradient checkpointing, augmentation, validation, logs or files.
Only theirs, and without a switch: Textual Inversion mirrors pictures at random and picks each one's caption from 27;
DreamBooth and Custom Diffusion clip gradients; all encode pictures and captions at every step.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import CLIPTextModel

sys.path[:0] = [str(Path(__file__).parents[2])]

import coneslab  # noqa: E402
from coneslab.files import data_folder  # noqa: E402
from coneslab.finetuning.samples import prior_pictures  # noqa: E402

SCRIPTS = {
    "textual_inversion": "textual_inversion/textual_inversion.py",
    "dreambooth": "dreambooth/train_dreambooth.py",
    "custom_diffusion": "custom_diffusion/train_custom_diffusion.py",
}
NEEDED = ("accelerate", "torchvision", "huggingface_hub", "packaging", "safetensors", "tqdm")  # what the scripts import
PARTS = ("load pictures", "autoencoder", "text encoder", "U-Net", "backward", "clip", "optimiser")
PRECISIONS = {"float32": (torch.float32, "no"), "bfloat16": (torch.bfloat16, "bf16"), "own": (None, "no")}
NAMES = {"clock": "all", "busy": "of processors"}
NEVER = 10**9
RATE = 1e-6  # so small that a thousand steps change nothing that matters here
NEW, WORD = "<new1>", "dog"  # the token that Textual Inversion and Custom Diffusion learn; what it starts from

HOW = f"""Not measured: {{}}.
Get the scripts, and what they import, and say where they are:

    git clone --depth 1 --branch v{diffusers.__version__} https://github.com/huggingface/diffusers
    pip install {" ".join(NEEDED[:2])}
    python tests/benchmarks/bench_personalize.py --scripts diffusers/examples
"""


# --- inside a process that is measured ------------------------------------------------------------------


def measured(run: Callable[[], object]) -> None:
    """Run a training that goes on for ever; take a step for each line on stdin, and answer with its figures."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the training prints is no answer
    spent: defaultdict[str, float] = defaultdict(float)
    begun = {"clock": 0.0, "busy": 0.0, "optimiser": 0.0}

    def timed(owner: Any, name: str, part: str) -> None:
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def outer(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                spent[part] += time.perf_counter() - start

        setattr(owner, name, outer)

    def before(*_: Any) -> None:
        begun["optimiser"] = time.perf_counter()

    def after(*_: Any) -> None:
        now, busy = time.perf_counter(), time.process_time()
        spent["optimiser"] += now - begun["optimiser"]
        answers.write(json.dumps({"clock": now - begun["clock"], "busy": busy - begun["busy"], **spent}) + "\n")
        if not sys.stdin.readline():
            os._exit(0)  # nobody asks for more; what a training does at its end is not wanted
        spent.clear()
        begun["clock"], begun["busy"] = time.perf_counter(), time.process_time()

    timed(torch.utils.data.dataloader._BaseDataLoaderIter, "__next__", "load pictures")
    timed(AutoencoderKL, "encode", "autoencoder")
    timed(CLIPTextModel, "forward", "text encoder")
    timed(UNet2DConditionModel, "forward", "U-Net")
    timed(torch.Tensor, "backward", "backward")
    timed(torch.autograd, "grad", "backward")
    timed(torch.nn.utils, "clip_grad_norm_", "clip")
    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)
    run()


def ours(method: str, model: str, precision: str, batch: int) -> None:
    pipe, about = coneslab.load(model, device="cpu"), coneslab.subject(WORD)
    common: dict[str, Any] = {
        "steps": NEVER,
        "batch_size": batch,
        "learning_rate": RATE,
        "dtype": PRECISIONS[precision][0],
    }
    new = replace(about, token=NEW)
    if method == "textual_inversion":
        coneslab.textual_inversion(pipe, new, initial=WORD, **common)
    elif method == "dreambooth":
        coneslab.dreambooth(pipe, about, prior_batch_size=batch, prior_weight=1.0, **common)
    else:
        coneslab.custom_diffusion(
            pipe, new, initial=WORD, prior_batch_size=batch, prior_weight=1.0, augment=False, **common
        )


def theirs(script: str, options: Sequence[str]) -> None:
    import accelerate.tracking

    accelerate.tracking.get_available_trackers = list  # no logs, whatever is installed
    sys.argv = [script, *options]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


# --- the process that asks ------------------------------------------------------------------------------


def options_of(
    method: str, model: Path, folder: Path, resolution: int, batch: int, steps: int, mixed: str
) -> list[str]:
    """A script's command line: what our side does, with as many pictures in an epoch as all its steps need."""
    about, where = coneslab.subject(WORD), {"subject": folder / "subject", "prior": folder / "prior"}
    options: dict[str, Any] = {
        "pretrained_model_name_or_path": model,
        "output_dir": folder / "out",
        "resolution": resolution,
        "seed": 0,
        "train_batch_size": batch,
        "max_train_steps": steps,
        "learning_rate": RATE,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "adam_weight_decay": 0,
        "checkpointing_steps": NEVER,
        "mixed_precision": mixed,
    }
    if method == "textual_inversion":
        options |= {"train_data_dir": where["subject"], "placeholder_token": NEW, "initializer_token": WORD}
        options |= {"repeats": batch * steps, "save_steps": NEVER}
        switches: list[str] = []
    else:
        options |= {"instance_data_dir": where["subject"], "class_data_dir": where["prior"]}
        options |= {"class_prompt": about.prior_prompt, "num_class_images": batch * steps, "prior_loss_weight": 1.0}
        switches = ["--with_prior_preservation", "--center_crop", "--set_grads_to_none"]
        options["instance_prompt"] = about.prompt
    if method == "custom_diffusion":
        options |= {"instance_prompt": replace(about, token=NEW).prompt, "freeze_model": "crossattn_kv"}
        options |= {"modifier_token": NEW, "initializer_token": WORD}
        switches.append("--noaug")
    return [*(text for name, value in options.items() for text in (f"--{name}", str(value))), *switches]


def write_pictures(pipe: Any, folder: Path, n: int) -> None:
    """The subject's pictures, and n of its class: the sixteen that our side draws, again and again."""
    about = coneslab.subject(WORD)
    prior = prior_pictures(pipe, about)
    for name, pictures in {"subject": about.images, "prior": [prior[i % len(prior)] for i in range(n)]}.items():
        (folder / name).mkdir()
        for number, picture in enumerate(pictures):
            picture.save(folder / name / f"{number:04}.png")


class Side:
    """A training in a process of its own, which waits between steps."""

    def __init__(self, arguments: Sequence[str], log: Path, threads: int) -> None:
        self._log = log
        told = {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            bufsize=1,
            env={**os.environ, **told, "HF_HUB_OFFLINE": "1"},
        )

    def answer(self) -> dict[str, float]:
        """Figures of a step; raises RuntimeError with the last words of a process that failed."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            words = [line for line in self._log.read_text().splitlines() if line.strip()]
            raise RuntimeError("\n".join(words[-3:]))
        return json.loads(line)

    def step(self) -> dict[str, float]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and `answer` says why
            self._process.stdin.write("\n")
        return self.answer()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def in_turn(sides: dict[str, Side], warmup: int, steps: int) -> dict[str, list[dict[str, float]]]:
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for side in sides.values():
        side.answer()  # the first step, with all set-up
    for _ in range(warmup + steps):
        for name, side in sides.items():
            figures[name].append(side.step())
    return {name: each[warmup:] for name, each in figures.items()}


def report(method: str, figures: dict[str, list[dict[str, float]]]) -> None:
    def pairs(key: str) -> str:
        both = zip(figures["theirs"], figures["ours"], strict=True)
        low, middle, high = np.percentile([theirs[key] / ours[key] for theirs, ours in both], [10, 50, 90])
        return f"{middle:.2f} ({low:.2f} to {high:.2f})"

    def median(side: str, part: str) -> float:
        return 1000 * float(np.median([step.get(part, 0.0) for step in figures[side]]))

    print(f"{method}: ours is {pairs('clock')} times as fast by the clock, {pairs('busy')} in processor time")
    print(f"{'ms a step':>18}{'ours':>10}{'theirs':>10}{'saved':>10}")
    for step in (*figures["ours"], *figures["theirs"]):
        step["rest"] = step["clock"] - sum(step.get(part, 0.0) for part in PARTS)
    for part in (*PARTS, "rest", "clock", "busy"):
        mine, other = median("ours", part), median("theirs", part)
        print(f"{NAMES.get(part, part):>18}{mine:10.1f}{other:10.1f}{other - mine:10.1f}")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scripts", type=Path, default=os.environ.get("DIFFUSERS_EXAMPLES"))
    parser.add_argument("--methods", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--model", type=Path, default=data_folder() / "models" / "tiny", help="a folder")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="own: what each side does unasked")
    parser.add_argument("--batch", type=int, default=8, help="subject samples a step, and as many prior ones")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if arguments.scripts is None or lacking:
        print(HOW.format(f"{', '.join(lacking)} is not installed" if lacking else "--scripts was not given"))
        return
    scripts, model, batch = Path(arguments.scripts).resolve(), arguments.model.resolve(), arguments.batch
    there = [method for method in arguments.methods if (scripts / SCRIPTS[method]).is_file()]
    if missing := [str(scripts / SCRIPTS[method]) for method in arguments.methods if method not in there]:
        print(HOW.format(f"{', '.join(missing)} is missing"))
    if not there:
        return
    precision, mixed = arguments.precision, PRECISIONS[arguments.precision][1]
    most = arguments.warmup + arguments.steps + 2
    pipe = coneslab.load(model, device="cpu")
    resolution = pipe.unet.config.sample_size * pipe.vae_scale_factor
    print(f"{model.name}, {resolution} pixels, {batch} samples a step (+ {batch} prior), {arguments.threads} threads")
    print(
        f"{precision}, {arguments.steps} steps in turn; torch {torch.__version__}, diffusers {diffusers.__version__}\n"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_pictures(pipe, folder, batch * most)
        for method in there:
            script = scripts / SCRIPTS[method]
            options = options_of(method, model, folder, resolution, batch, most, mixed)
            calls = {"ours": [method, str(model), precision, str(batch)], "theirs": [str(script), *options]}
            sides: dict[str, Side] = {}
            try:
                for name, call in calls.items():
                    sides[name] = Side(["--measured", name, *call], folder / f"{name}.log", arguments.threads)
                report(method, in_turn(sides, arguments.warmup, arguments.steps))
            except RuntimeError as error:
                print(f"{method}: not measured, a side failed:\n{error}\n")
            finally:
                for side in sides.values():
                    side.end()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measured"]:
        side, first, *others = sys.argv[2:]
        if side == "ours":
            measured(lambda: ours(first, others[0], others[1], int(others[2])))
        else:
            measured(lambda: theirs(first, others))
    else:
        main()
