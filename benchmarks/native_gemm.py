"""Products of the compiled backend, also in int8 and int4, beside torch's: plain, oneDNN's, int8.

    python benchmarks/native_gemm.py [--threads 1] [--rounds 3] [--repeats 20]

Every system multiplies by a sequence of weight matrices that together exceed the processor's
second-level cache many times over, as a step does; systems take turns within a round. Printed are
median microseconds, how many times faster the compiled backend is, and what its bfloat16 products
read of the weights per second as a share of the memory's bandwidth (engine/ceilings.py): with few
rows nothing else counts. It writes float32 and _int_mm int32, the other two bfloat16, half the
bytes, which many rows show; in a step the sinks of the products write what the next part reads.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from engine.ceilings import measure
from engine.native.library import Format, Library, load

SHAPES = {
    "135M": ((576, 960), (576, 576), (576, 3072), (1536, 576), (576, 49152)),
    "0.5B": ((896, 1152), (896, 9728), (4864, 896), (896, 151936)),
}
ROWS = (1, 4, 16, 64, 256, 512)
ROTATION = 512 << 20  # bytes of weights, as baton_multiply goes round by itself

Product = Callable[[int], list[float]]


def timed(work: Callable[[int], object]) -> Product:
    def run(repeats: int) -> list[float]:
        seconds = []
        for index in range(repeats):
            start = time.perf_counter()
            work(index)
            seconds.append(time.perf_counter() - start)
        return seconds

    return run


def compiled(library: Library, team: int, weights: Format, m: int, k: int, n: int) -> Product:
    x, w, y = torch.randn(m, k), torch.randn(n, k) / k**0.5, torch.empty(m, n)

    def run(repeats: int) -> list[float]:
        seconds = (ctypes.c_double * repeats)()
        library.check(
            library.functions.baton_multiply(
                team, library.isa, weights, m, n, k,
                x.data_ptr(), w.data_ptr(), y.data_ptr(), repeats, seconds,
            )
        )  # fmt: skip
        return list(seconds)

    return run


def torch_products(m: int, k: int, n: int, repeats: int) -> dict[str, Product]:
    x = torch.randn(m, k, dtype=torch.bfloat16)
    copies = min(repeats, max(1, ROTATION // (2 * n * k)))
    plain = [torch.randn(n, k, dtype=torch.bfloat16) for _ in range(copies)]
    packed = [torch.ops.mkldnn._reorder_linear_weight(w, m) for w in plain]
    x8 = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    w8 = [torch.randint(-127, 128, (n, k), dtype=torch.int8).t() for _ in range(copies)]
    pointwise = torch.ops.mkldnn._linear_pointwise
    return {
        "bf16 F.linear": timed(lambda i: functional.linear(x, plain[i % copies])),
        "bf16 oneDNN": timed(lambda i: pointwise(x, packed[i % copies], None, "none", [], "")),
        "int8 _int_mm": timed(lambda i: torch._int_mm(x8, w8[i % copies])),
    }


def compare(
    library: Library, team: int, m: int, k: int, n: int, rounds: int, repeats: int, bandwidth: float
) -> str:
    products = {
        "bf16": compiled(library, team, Format.BF16, m, k, n),
        "int8": compiled(library, team, Format.INT8, m, k, n),
        "int4": compiled(library, team, Format.INT4, m, k, n),
        **torch_products(m, k, n, repeats),
    }
    for product in products.values():
        product(1)
    seconds: dict[str, list[float]] = {name: [] for name in products}
    for _ in range(rounds):
        for name, product in products.items():
            seconds[name] += product(repeats)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [
        median["bf16 F.linear"] / median["bf16"],
        median["bf16 oneDNN"] / median["bf16"],
        median["int8 _int_mm"] / median["int8"],
        median["bf16"] / median["int8"],
        median["int8"] / median["int4"],
        2 * n * k / median["bf16"] / bandwidth,
    ]
    times = "".join(f"{1e6 * value:12.1f}" for value in median.values())
    return times + " |" + "".join(f"{ratio:8.2f}" for ratio in ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--model", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--largest", type=int, default=1 << 62, help="skip larger matrices")
    options = parser.parse_args()
    library = load()
    if library is None:
        raise SystemExit("the compiled backend was not built")
    torch.set_num_threads(options.threads)
    team = library.functions.baton_team_new(options.threads, None)
    print(f"{library.isa_name(library.isa)}, {options.threads} threads; microseconds | ratios")
    names = ("bf16", "int8", "int4", "F.linear", "oneDNN", "_int_mm")
    ratios = ("/linear", "/oneDNN", "/int_mm", "8 / 16", "4 / 8", "memory")
    bandwidth = measure(options.threads, working_set=ROTATION).read_bandwidth
    print(
        f"{'k x n':>14}{'m':>5}" + "".join(f"{name:>12}" for name in names) + " |"
        + "".join(f"{ratio:>8}" for ratio in ratios)
    )  # fmt: skip
    for model, shapes in SHAPES.items():
        for k, n in shapes if options.model in (model, "all") else ():
            for m in options.rows if n * k <= options.largest else ():
                rounds, repeats = options.rounds, options.repeats
                line = compare(library, team, m, k, n, rounds, repeats, bandwidth)
                print(f"{f'{k} x {n}':>14}{m:>5}{line}", flush=True)
    library.functions.baton_team_free(team)


if __name__ == "__main__":
    main()
