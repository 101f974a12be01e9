"""What a process that is started anew draws for a stream of pictures: it imports this file, and little else."""

import time

import torch


def numbers(n: int, seed: int) -> torch.Tensor:
    return torch.arange(n) + seed


def never(n: int, seed: int) -> None:
    time.sleep(60)
