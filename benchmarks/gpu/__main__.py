"""MBU, MFU, step times and kernels on this GPU, and output tokens per second beside transformers.

    python -m benchmarks.gpu [--shapes llama-3-8b,qwen3-0.6b,mistral-7b] [--formats none,int8,int4]
        [--only passes,serving,kernels] [--out docs/performance/gpu]

Models have random weights. Ceilings are measured in the same run. `--out` writes a flat JSON record
for each number, with the date and the device's name.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu import kernels, passes, serving
from benchmarks.gpu.ceilings import Ceilings, measure
from benchmarks.gpu.models import SHAPES, Sizes, config_of, executor
from engine.bench.work import ModelCount

_GENERATION = ((1, 128), (1, 8192 - 64), (8, 2048), (64, 2048))  # batch, context
_PROMPTS = ((1, 512), (1, 2048), (8, 1024), (2, 4096))  # sequences, tokens
_WEIGHTS = {"none": "bfloat16", "int8": "int8", "int4": "int4", "fp8": "int8"}  # bytes that count

Row = dict[str, Any]


def main() -> None:
    """Measure and print."""
    options = _options()
    device = torch.device(options.device)
    console = Console()
    with console.status("ceilings"):
        ceilings = measure(device, **({"size": 2**20, "side": 64} if options.quick else {}))
    console.print(
        f"{_name(device)}: {ceilings.read / 1e9:.0f} GB/s, "
        f"{ceilings.bf16 / 1e12:.1f} TFLOP/s bf16, {ceilings.fp8 / 1e12:.1f} fp8"
    )
    rows: list[Row] = []
    if "kernels" in options.only:
        rows += _kernels(console, device, ceilings, options)
    for shape in options.shapes:
        if "passes" in options.only:
            for quantization in options.formats:
                rows += _passes(console, shape, quantization, device, ceilings, options)
        if "serving" in options.only:
            rows += _serving(console, shape, device, options)
        if options.out is not None:
            _save(options.out, rows, device, ceilings)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    names = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--shapes", type=names, default=["llama-3-8b", "qwen3-0.6b", "mistral-7b"])
    parser.add_argument("--formats", type=names, default=["none", "int8", "int4"])
    parser.add_argument("--only", type=names, default=["kernels", "passes", "serving"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the benchmark")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if unknown := set(options.shapes) - set(SHAPES):
        parser.error(f"--shapes: {', '.join(unknown)} not in {', '.join(SHAPES)}")
    return options


def _kernels(
    console: Console, device: torch.device, ceilings: Ceilings, options: argparse.Namespace
) -> list[Row]:
    found = kernels.measure(device, ceilings, (16,) if options.quick else (64, 1024, 8192))
    table = Table("kernel", "tokens", "us", "share of copy bandwidth")
    for one in found:
        table.add_row(one.name, f"{one.tokens}", f"{one.seconds * 1e6:.1f}", f"{one.share:.2f}")
    console.print(table)
    return [
        {"workload": f"kernel {one.name} {one.tokens}", "metric": metric, "value": value}
        for one in found
        for metric, value in (("seconds", one.seconds), ("share", one.share))
    ]


def _passes(
    console: Console,
    shape: str,
    quantization: str,
    device: torch.device,
    ceilings: Ceilings,
    options: argparse.Namespace,
) -> list[Row]:
    wanted = [passes.Shape(batch, context) for batch, context in _GENERATION]
    wanted += [passes.Shape(batch, prompt=prompt) for batch, prompt in _PROMPTS]
    if options.quick:
        wanted = [passes.Shape(2, 24), passes.Shape(2, prompt=16)]
    limit = SHAPES[shape]().max_position_embeddings
    wanted = [one for one in wanted if max(part.end for part in one.parts) + 64 <= limit + 1]
    blocks = max(one.batch * -(-(max(p.end for p in one.parts) + 64) // 16) for one in wanted)
    sizes = Sizes(blocks, max(one.tokens for one in wanted), max(one.batch for one in wanted))
    made = executor(shape, device, sizes, quantization=quantization)
    count = ModelCount.of(config_of(SHAPES[shape]()), _WEIGHTS[quantization], "bfloat16")
    table = Table(f"{shape}, {quantization}", "ms", "MBU", "MFU", "of the floor", "device idle")
    rows: list[Row] = []
    for one in wanted:
        took = passes.measure(made, one, count, ceilings, steps=8 if options.quick else 40)
        idle = "" if took.idle is None else f"{took.idle:.1%}"
        table.add_row(
            one.name,
            f"{took.seconds * 1e3:.2f}",
            f"{took.mbu:.2f}",
            f"{took.mfu:.2f}",
            f"{took.floor_share:.2f}",
            idle,
        )
        values = {"seconds": took.seconds, "mbu": took.mbu, "mfu": took.mfu, "idle": took.idle}
        rows += [
            {"shape": shape, "format": quantization, "workload": one.name, "metric": m, "value": v}
            for m, v in values.items()
            if v is not None
        ]
    console.print(table)
    made.close()
    del made
    _give_back(device)
    return rows


def _serving(
    console: Console, shape: str, device: torch.device, options: argparse.Namespace
) -> list[Row]:
    """Rounds of both in turn; equal output lengths, as transformers' interface wants them."""
    config = SHAPES[shape]()
    count, prompt, output = (4, 8, 4) if options.quick else (256, 256, 128)
    work = serving.jobs(count, config.vocab_size, prompt=prompt, output=output)
    work = serving.equal_outputs(work, output)
    blocks = sum(-(-(len(job.prompt) + output + 1) // 16) for job in work)
    ours = executor(shape, device, Sizes(blocks, 32 if options.quick else 2048, len(work)))
    theirs = serving.Transformers(shape, device, torch.bfloat16)
    rates: dict[str, list[float]] = {"baton": [], "transformers": []}
    for turn in range(options.rounds + 1):
        pair = {"baton": serving.baton(ours, work), "transformers": theirs.run(work)}
        for name, rate in pair.items():
            rates[name] += [rate] if turn else []  # in the first both warm up
    ours.close()
    del ours, theirs
    _give_back(device)
    ratio = statistics.median(a / b for a, b in zip(*rates.values(), strict=True))
    found = {name: statistics.median(each) for name, each in rates.items()}
    console.print(
        f"{shape}: {found['baton']:.0f} output tokens/s, transformers "
        f"{found['transformers']:.0f}, ratio {ratio:.2f}"
    )
    return [
        {"shape": shape, "workload": "serving", "metric": f"{name} tokens/s", "value": value}
        for name, value in (*found.items(), ("ratio", ratio))
    ]


def _give_back(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _save(out: Path, rows: list[Row], device: torch.device, ceilings: Ceilings) -> None:
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "device": _name(device),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "read_bytes_per_second": ceilings.read,
        "bf16_operations_per_second": ceilings.bf16,
        "fp8_operations_per_second": ceilings.fp8,
    }
    text = json.dumps({"about": about, "records": rows}, indent=1)
    (out / f"{_name(device).lower().replace(' ', '-')}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
