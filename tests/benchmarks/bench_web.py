"""How fast the page in the browser is: headless Chromium on this machine, the shipped model, the page as exported.

    python tests/benchmarks/bench_web.py [--folder build/playground] [--repeats 5] [--cores 2] [--out FILE.csv]

Each repeat is a new visitor with an empty cache: seconds until the model is in, from then to the first picture, to all
three, from a change of dose to its preview, and to the picture in full; and the memory of the browser's processes.
Then the bytes that such a visitor fetches, as they are and with gzip, and what the other precisions of the weights
would take and change. The committed table is data/results/browser.csv.
"""

from __future__ import annotations

import argparse
import gzip
import os
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from chromium import CHROMIUM  # noqa: E402

import coneslab  # noqa: E402
from coneslab.diffusion.encoding import to_uint8, tokenize  # noqa: E402
from coneslab.diffusion.kvspace import KVSpace  # noqa: E402
from coneslab.diffusion.sampling import start_noise  # noqa: E402
from coneslab.files import write_table  # noqa: E402
from coneslab.web import default_shelf, export_web, fetch_runtime, graphs, sampling_table  # noqa: E402

KEPT = Path(__file__).parents[2] / "build" / "web"
DRAWN = "document.getElementById('status').textContent === 'Drawn.'"
SHOWN = "document.querySelector('[data-column={}] canvas').dataset.state === '{}'"
PROMPTS = ("a cat in the snow", "a dog and a car on the beach", "a robot in the city", "a guitar at night")
STEPS, GUIDANCE = 10, 3.0


class Quiet(SimpleHTTPRequestHandler):
    """A plain static host that counts what it sends."""

    sent: dict[str, int] = {}

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        path = path / "index.html" if path.is_dir() else path
        if path.is_file():
            Quiet.sent[str(path)] = path.stat().st_size
        super().do_GET()


def visits(folder: Path, repeats: int, cores: int) -> list[dict[str, float]]:
    """One row for each new visitor: seconds, and bytes of memory."""
    from playwright.sync_api import sync_playwright

    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:cores]))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    rows = []
    with sync_playwright() as playwright:
        for _ in range(repeats):
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            start = time.perf_counter()
            page.goto(f"http://127.0.0.1:{server.server_address[1]}/")
            page.wait_for_function("!document.getElementById('lab').hidden", timeout=180_000)
            row = {"model in": time.perf_counter() - start}
            row |= timed(page, {"first picture": SHOWN.format("untouched", "drawn"), "all three pictures": DRAWN})
            page.evaluate(
                """() => {
                    const dose = document.getElementById("dose");
                    dose.value = 0.6;
                    dose.dispatchEvent(new Event("input"));
                }"""
            )
            wanted = {"dose: preview": SHOWN.format("edit", "preview"), "dose: in full": SHOWN.format("edit", "drawn")}
            row |= timed(page, wanted)
            page.wait_for_function(DRAWN, timeout=180_000)
            row["memory"] = memory(os.getpid())
            rows.append(row)
            browser.close()
    server.shutdown()
    return rows


def timed(page: object, wanted: dict[str, str]) -> dict[str, float]:
    """Seconds from now until each of these is so, in this order."""
    start, found = time.perf_counter(), {}
    for name, condition in wanted.items():
        page.wait_for_function(condition, timeout=180_000, polling=20)  # type: ignore[attr-defined]
        found[name] = time.perf_counter() - start
    return found


def memory(pid: int) -> int:
    """Bytes that the browser's processes below this one hold, what they share counted once for each share."""
    total, left = 0, [pid]
    while left:
        for task in Path(f"/proc/{left.pop()}/task").glob("*/children"):
            for child in map(int, task.read_text().split()):
                left.append(child)
                if "chrom" in Path(f"/proc/{child}/cmdline").read_text().split("\0")[0]:
                    lines = Path(f"/proc/{child}/smaps_rollup").read_text().splitlines()
                    total += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def compared(pipe: object) -> list[dict[str, object]]:
    """Bytes of the graphs in each precision, and how far their pictures are from PyTorch's."""
    import onnxruntime

    table, matrices, rows = sampling_table(pipe, STEPS), KVSpace(pipe).parameters, []
    options = {"sampler_steps": STEPS, "guidance_scale": GUIDANCE, "dtype": torch.float32}
    expected = [np.asarray(one, float) for one in coneslab.generate(pipe, PROMPTS, seed=0, **options)]
    for precision in ("float32", "float16", "int8"):
        made = graphs(pipe, precision=precision)
        session = {name: onnxruntime.InferenceSession(graph.data) for name, graph in made.items()}
        apart = []
        for seed, (prompt, picture) in enumerate(zip(PROMPTS, expected, strict=True)):
            rows_of_ids = tokenize(pipe, ["", prompt]).int().numpy()
            texts = [session["text_encoder"].run(None, {"ids": row[None]})[0][0] for row in rows_of_ids]
            text = torch.tensor(np.stack(texts))
            given = {name: F.linear(text, weight.detach()).numpy() for name, weight in matrices.items()}
            x = start = start_noise(pipe, [seed]).numpy() * np.float32(table["start"])
            outputs: list[np.ndarray] = []
            for step, (first, *others) in zip(table["timesteps"], table["rows"], strict=True):
                feed = {"sample": np.repeat(x, 2, 0), "timestep": np.float32([step]), **given}
                (out,) = session["unet"].run(["output"], feed)
                outputs.append(out[:1] + GUIDANCE * (out[1:] - out[:1]))
                x = first * start + sum(weight * one for weight, one in zip(others, outputs, strict=True))
                x = x.astype(np.float32)
            pixels = to_uint8(torch.tensor(session["decoder"].run(None, {"latents": x})[0]))[0]
            apart.append(pixels.astype(float) - picture)
        error = np.stack(apart)
        facts = {
            "bytes of the graphs": sum(len(graph.data) for graph in made.values()),
            "bytes of the graphs, gzip": sum(len(gzip.compress(graph.data, 9)) for graph in made.values()),
            "largest difference, of 255": float(np.abs(error).max()),
            "mean difference, of 255": float(np.abs(error).mean()),
        }
        rows += [{"what": f"{precision}: {name}", "median": value} for name, value in facts.items()]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="an exported page (default: one is exported)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the table here")
    arguments = parser.parse_args()
    pipe, folder = coneslab.load("tiny", device="cpu"), arguments.folder
    if folder is None:
        folder = KEPT / "bench"
        export_web(pipe, folder, default_shelf(pipe, KEPT), runtime=fetch_runtime(KEPT))
    seconds = pandas.DataFrame(visits(folder, arguments.repeats, arguments.cores))
    shown = {"memory": "memory of the browser, bytes"}
    rows = [
        {"what": shown.get(name, f"{name}, s"), "median": values.median(), "worst": values.max(), "n": len(values)}
        for name, values in seconds.items()
    ]
    contents = {path: Path(path).read_bytes() for path in Quiet.sent}
    rows.append({"what": "over the wire, bytes", "median": sum(map(len, contents.values()))})
    packed = sum(len(gzip.compress(data, 9)) for data in contents.values())
    rows.append({"what": "over the wire with gzip, bytes", "median": packed})
    table = pandas.DataFrame([*rows, *compared(pipe)])
    table["cores"] = arguments.cores
    print(table.to_string(index=False))
    if arguments.out:
        write_table(arguments.out, table)


if __name__ == "__main__":
    main()
