"""The first cell of a notebook, except for the line that installs coneslab on Colab."""

from __future__ import annotations

import diffusers
import torch

from .. import __version__, checks
from ..diffusion import bfloat16_pays

_WITHOUT_BFLOAT16 = 2.2  # times as long on a CPU that computes only in float32


def set_up_notebook(*, minutes: float) -> str:
    """Print versions, the device and how long the notebook takes on it; return the device, "cuda" or "cpu".

    minutes: for all cells, on two CPU cores that compute in bfloat16. One core takes twice as long, more than two are
    not assumed to help, and a CPU without bfloat16 takes 2.2 times as long. There is no estimate for a GPU.

        device = coneslab.set_up_notebook(minutes=1.2)
        pipe = coneslab.load("tiny", device=device)
    """
    minutes = checks.number("minutes", minutes, "[0, inf)")
    print(f"coneslab {__version__}, diffusers {diffusers.__version__}, torch {torch.__version__}")
    if torch.cuda.is_available():
        print(f"on {torch.cuda.get_device_name()}; on two CPU cores this notebook takes about {minutes:g} min")
        return "cuda"
    threads = torch.get_num_threads()
    minutes *= 2 / min(threads, 2) * (1 if bfloat16_pays(torch.device("cpu")) else _WITHOUT_BFLOAT16)
    print(f"on the CPU (threads: {threads}); this notebook takes about {minutes:.2g} min")
    return "cpu"
