"""The parts of the benchmark: each measures, prints a table and keeps records."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu import attention, ceilings, handoff, kernels, parallel, passes, serving
from benchmarks.gpu.kernels import LLAMA_8B, TINY, Case
from benchmarks.gpu.models import SHAPES, Sizes, config_of, executor
from benchmarks.gpu.passes import Shape, Timed
from benchmarks.gpu.records import Record, Source
from engine.bench.work import ModelCount
from engine.gpu.model import GpuLlama

PARTS = ("kernels", "attention", "handoff", "passes", "serving")
KV = {"auto": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
_GENERATION = ((1, 128), (1, 8000), (8, 2048), (64, 2048))  # batch, context
_PROMPTS = ((1, 512), (1, 2048), (8, 1024), (2, 4096))  # sequences, tokens
_SHARED = (Shape(1, 8000), Shape(8, 2048), Shape(64, 2048), Shape(1, prompt=2048))  # by shards
_BLOCK = 16
_SPARE = 2**31  # bytes of the device that stay free beside a pool


class Bench:
    """One device and one day. On a CPU all is in float32, for which the interpreter is right."""

    def __init__(
        self, console: Console, device: torch.device, source: Source, *, quick: bool = False
    ) -> None:
        self._console, self._device, self._source, self._quick = console, device, source, quick
        self.records: list[Record] = []  # what has been measured, if a part fails, too
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._limits = ceilings.Ceilings(0.0, 0.0, 0.0)

    def ceilings(self) -> None:
        """What the rest is compared with: first."""
        small = {"size": 2**20, "side": 64} if self._quick else {}
        limits = self._limits = ceilings.measure(self._device, **small)
        self._console.print(
            f"{self._source.device}: {limits.read / 1e9:.0f} GB/s, "
            f"{limits.bf16 / 1e12:.1f} TFLOP/s in bfloat16, {limits.fp8 / 1e12:.1f} in fp8"
        )
        values = {
            "bytes per second": limits.read,
            "bfloat16 operations per second": limits.bf16,
            "fp8 operations per second": limits.fp8,
        }
        self.records += self._source.records("ceilings", "ceilings", values)

    def kernels(self) -> None:
        """All but attention, at the widths of Llama-3-8B."""
        table = Table("kernel", "tokens", "us", "share of the floor")
        for case in self._cases():
            one = kernels.Timed.of(case, self._limits, self._device)
            table.add_row(one.name, f"{one.tokens}", f"{one.seconds * 1e6:.1f}", f"{one.share:.2f}")
            values = {"seconds": one.seconds, "share": one.share}
            self.records += self._source.records("kernels", f"{one.name} x {one.tokens}", values)
        self._console.print(table)

    def _cases(self) -> Iterator[Case]:
        device, widths = self._device, TINY if self._quick else LLAMA_8B
        for tokens in (16,) if self._quick else kernels.ROWS:
            yield from kernels.rows(device, tokens, widths)
            yield from kernels.blocks(device, tokens, widths)
        yield from kernels.choices(device, 2 if self._quick else 64, widths)
        for tokens in (1, 4) if self._quick else kernels.PRODUCTS:
            yield from kernels.products(device, tokens, self._dtype, widths)

    def attention(self) -> None:
        """One layer's, over KV in every format."""
        table = Table("attention", "KV", "us", "of bandwidth", "of torch's product")
        for form, dtype in attention.KV.items():
            if self._quick:
                tiny = attention.Shape(2, 1, 16)
                chunks = {"decode, 2 x 24": [(23, 1)] * 2, "prompt, 20": [(0, 20)]}
                found = [
                    attention.case(name, tiny, each, dtype, self._device)
                    for name, each in chunks.items()
                ]
            else:
                found = attention.cases(attention.SHAPES["llama-3-8b"], dtype, self._device)
            for one in attention.measure(found, self._limits, self._device):
                table.add_row(
                    one.name,
                    form,
                    f"{one.seconds * 1e6:.1f}",
                    f"{one.of_bandwidth:.2f}",
                    f"{one.of_product:.2f}",
                )
                values = {
                    "seconds": one.seconds,
                    "of bandwidth": one.of_bandwidth,
                    "of product": one.of_product,
                }
                self.records += self._source.records("attention", one.name, values, form=form)
        self._console.print(table)

    def handoff(self) -> None:
        """Blocks of Llama-3-8B from another process, on this device and on the next one."""
        size = handoff.Size(1, 3) if self._quick else handoff.Size()
        table = Table("hand-off", "GB/s", "by way of the host", "ratio", "one block, us", "by way")
        sources = {"within the device": self._device}
        if self._device.type == "cuda" and torch.cuda.device_count() > 1:
            other = (self._device.index + 1) % torch.cuda.device_count()
            sources["from the next device"] = torch.device("cuda", other)
        for name, source in sources.items():
            found = handoff.compare(source, self._device, 1 if self._quick else 7, size)
            values = {
                "direct GB/s": found.bytes / found.all_blocks["cuda_ipc"] / 1e9,
                "by host GB/s": found.bytes / found.all_blocks["shm"] / 1e9,
                "ratio": found.ratio,
                "direct one block us": found.one_block["cuda_ipc"] * 1e6,
                "by host one block us": found.one_block["shm"] * 1e6,
            }
            table.add_row(name, *(f"{value:.1f}" for value in values.values()))
            self.records += self._source.records("handoff", name, values)
        self._console.print(table)

    def passes(self, shape: str, form: str, kv: str) -> None:
        """Whole passes of a model with its weights in `form`."""
        steps = 3 if self._quick else 40
        kv_dtype = KV[kv] or self._dtype
        config = config_of(SHAPES[shape]())
        formats = (str(self._dtype), str(kv_dtype))
        count = ModelCount.of(config, *(each.removeprefix("torch.") for each in formats))
        wanted = self._wanted(config.max_context, steps, count)
        made = executor(
            shape,
            self._device,
            _sizes(wanted, steps),
            quantization=form,
            dtype=self._dtype,
            kv_dtype=kv_dtype,
        )
        named = form if kv == "auto" else f"{form}, KV {kv}"
        heads = ("ms", "MBU", "MFU", "of the floor", "gap", "idle", "waits for host")
        table = Table(f"{shape}, {named}", *heads)
        try:
            passes.fill(made)
            assert isinstance(made.model, GpuLlama)
            count = count.measured(made.model.layer_bytes, made.model.head_bytes)
            for one in wanted:
                took = passes.measure(made, one, count, self._limits, steps=steps)
                table.add_row(*_row(took))
                self.records += self._source.records(
                    "passes", one.name, _values(took), shape=shape, form=named
                )
        finally:
            self._console.print(table)
            made.close()

    def _wanted(self, positions: int, steps: int, count: ModelCount) -> list[Shape]:
        """The passes that the model and the device have room for."""
        if self._quick:
            return [Shape(2, 12), Shape(2, prompt=8)]
        wanted = [Shape(batch, context) for batch, context in _GENERATION]
        wanted += [Shape(batch, prompt=prompt) for batch, prompt in _PROMPTS]
        room = float("inf")
        if self._device.type == "cuda":
            room = torch.cuda.mem_get_info(self._device)[0] - count.weight_bytes - _SPARE
        fitting = []
        for one in wanted:
            blocks = one.batch * -(-one.positions(steps) // _BLOCK)
            if one.positions(steps) > positions:
                continue
            if blocks * _BLOCK * count.kv_bytes_per_position > room:
                self._console.print(f"{one.name}: left out, its KV does not fit the device")
                continue
            fitting.append(one)
        return fitting

    def serving(self, shape: str, rounds: int) -> None:
        """Beside transformers."""
        load = serving.Load(2, 6, 3, 32) if self._quick else serving.Load()

        def say(line: str) -> None:
            self._console.print(line, markup=False, highlight=False)

        found = serving.compare(shape, load, self._device, self._dtype, rounds, say)
        rates = {
            "baton output tokens/s": median(found.baton),
            "transformers output tokens/s": median(found.transformers),
            "ratio": found.ratio,
        }
        self._console.print(
            f"{shape}, {load.name}: {rates['baton output tokens/s']:.0f} output tokens/s, "
            f"transformers ({found.setting}) {rates['transformers output tokens/s']:.0f}, "
            f"ratio {found.ratio:.2f}"
        )
        self.records += self._source.records("serving", load.name, rates, shape=shape)

    def parallel(self, shape: str, degree: int) -> None:
        """On several devices that share each layer, beside one."""
        if self._device.type == "cuda" and torch.cuda.device_count() < degree:
            self._console.print(f"{shape}, {degree} shards: left out, there are not so many GPUs")
            return
        steps = 3 if self._quick else 40
        config = config_of(SHAPES[shape]())
        count = ModelCount.of(config, *[str(self._dtype).removeprefix("torch.")] * 2)
        wanted = [
            one
            for one in self._wanted(config.max_context, steps, count)
            if self._quick or one in _SHARED
        ]
        sizes = _sizes(wanted, steps)
        found = parallel.compare(shape, degree, wanted, self._device, sizes, self._dtype, steps)
        table = Table(f"{shape}, {degree} shards", "ms", "ms on one", "ratio")
        for each in found:
            values = {
                "seconds": median(each.several),
                "seconds on one": median(each.one),
                "ratio": each.ratio,
            }
            ms = (f"{values[name] * 1e3:.2f}" for name in ("seconds", "seconds on one"))
            table.add_row(each.shape.name, *ms, f"{each.ratio:.2f}")
            workload = f"{each.shape.name}, {degree} shards"
            self.records += self._source.records("parallel", workload, values, shape=shape)
        self._console.print(table)


def _sizes(wanted: list[Shape], steps: int) -> Sizes:
    blocks = max(one.batch * -(-one.positions(steps) // _BLOCK) for one in wanted)
    most = max(one.tokens for one in wanted)
    return Sizes(blocks, most, max(one.batch for one in wanted), _BLOCK)


def _row(took: Timed) -> list[str]:
    waits = took.waiting
    return [
        took.shape.name,
        f"{took.seconds * 1e3:.2f}",
        f"{took.mbu:.2f}",
        f"{took.mfu:.2f}",
        f"{took.floor_share:.2f}",
        "" if took.gap is None else f"{took.gap:.1%}",
        "" if waits is None else f"{waits.idle:.1%}",
        "" if waits is None else f"{waits.host:.1%}",
    ]


def _values(took: Timed) -> dict[str, float]:
    values = {"seconds": took.seconds, "mbu": took.mbu, "mfu": took.mfu}
    if took.gap is not None:
        values["gap"] = took.gap
    if took.waiting is not None:
        values |= {"idle": took.waiting.idle, "host wait": took.waiting.host}
    return values
