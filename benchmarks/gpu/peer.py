"""transformers' continuous batching: the same shape on the same device, with the best of its
settings."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from benchmarks.gpu.models import SHAPES
from benchmarks.gpu.work import Job

_PAGE = 256  # tokens of a block of its cache, by default
_STUCK = 300  # seconds without an answer
_TRYING = 180  # seconds; no further setting is tried after that


@dataclass(frozen=True, slots=True)
class Setting:
    """An attention of transformers, and what ContinuousBatchingConfig is told beside it."""

    name: str
    attention: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)


_GRAPHS = {
    "max_batch_tokens": 2048,
    "use_cuda_graph": True,
    "use_async_batching": True,
    "q_padding_interval_size": 64,
    "kv_padding_interval_size": 4096,
}
# With flash attention graphs, running ahead and the fast path for decoding are its defaults. With
# SDPA it computes what requests would see of each other, and masks it: which size of a pass is best
# depends on that.
SETTINGS = (
    Setting("flash 3", "flash_attention_3", {"max_batch_tokens": 8192}),
    Setting("flash 2", "flash_attention_2", {"max_batch_tokens": 8192}),
    Setting("sdpa", "sdpa", {"max_batch_tokens": 2048}),
    Setting("sdpa, passes of 8192", "sdpa", {"max_batch_tokens": 8192}),
    Setting("sdpa, CUDA graphs", "sdpa", _GRAPHS),
)


def available(device: torch.device) -> list[Setting]:
    """The settings that this installation can try."""
    if device.type != "cuda":
        return [Setting("sdpa", "sdpa", {"max_batch_tokens": 64})]
    from transformers.utils.import_utils import (
        is_flash_attn_2_available,
        is_flash_attn_3_available,
    )

    hub = importlib.util.find_spec("kernels") is not None
    there = {
        "flash_attention_3": hub or is_flash_attn_3_available(),
        "flash_attention_2": hub or is_flash_attn_2_available(),
    }
    return [setting for setting in SETTINGS if there.get(setting.attention, True)]


class Transformers:
    """A model with random weights of its own, that serves lists of jobs."""

    def __init__(self, shape: str, device: torch.device, dtype: torch.dtype) -> None:
        with device:
            make: Any = AutoModelForCausalLM.from_config
            self._model = make(SHAPES[shape](), dtype=dtype, attn_implementation="sdpa").eval()
        self._manager: Any = None

    def start(self, setting: Setting, work: list[Job]) -> None:
        """Make its cache, and record its graphs. The cache holds half as much again as all jobs
        together; blocks are not shared, since random prompts have nothing in common, and those of
        an earlier round are not to be found again."""
        blocks = sum(-(-(len(job.prompt) + job.output) // _PAGE) for job in work)
        options = {
            "num_blocks": blocks + max(blocks // 2, 8),
            "max_requests_per_batch": len(work),
            "allow_block_sharing": False,
            "auto_switch_to_flash": False,
            **setting.options,
        }
        known = {each.name for each in dataclasses.fields(ContinuousBatchingConfig)}
        chosen = {name: value for name, value in options.items() if name in known}
        generation: Any = GenerationConfig
        self._model.set_attn_implementation(setting.attention)
        self._manager = self._model.init_continuous_batching(
            generation_config=generation(
                max_new_tokens=work[0].output, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(**chosen),
        )
        self._manager.warmup()
        self._manager.start()

    def run(self, work: list[Job]) -> float:
        """Output tokens per second. All outputs have one length, as its interface wants them.
        Raises RuntimeError if it fails."""
        begun = time.perf_counter()
        self._manager.add_requests(
            [list(job.prompt) for job in work], max_new_tokens=work[0].output
        )
        outputs: list[Any] = []
        heard = begun
        while len(outputs) < len(work):
            found = self._manager.get_result(timeout=1)
            if found is not None and found.is_finished():
                outputs.append(found)
                heard = time.perf_counter()
            elif not self._manager.is_running() or time.perf_counter() - heard > _STUCK:
                raise RuntimeError("transformers' generation has ended before its requests")
        took = time.perf_counter() - begun
        made = sum(len(output.generated_tokens) for output in outputs)
        if made != sum(job.output for job in work):
            raise RuntimeError(f"transformers made {made} tokens, and was asked for others")
        return made / took

    def stop(self) -> None:
        """Give its cache and its graphs back. Idempotent."""
        if self._manager is not None:
            self._manager.stop(block=True, timeout=30)
            self._manager = None
            gc.collect()

    def start_best(
        self, settings: list[Setting], work: list[Job], say: Callable[[str], None]
    ) -> Setting:
        """Run the jobs with each of the settings, start the fastest, and return it. Raises
        RuntimeError if none works."""
        rates: dict[Setting, float] = {}
        begun = time.monotonic()
        for setting in settings:
            if rates and time.monotonic() - begun > _TRYING:
                say(f"transformers, {setting.name}: left out, for time")
                continue
            try:
                self.start(setting, work)
                rates[setting] = self.run(work)
                say(f"transformers, {setting.name}: {rates[setting]:.0f} output tokens/s at first")
            except Exception as error:  # it may lack a package, a kernel or memory for this one
                say(f"transformers, {setting.name}: left out: {type(error).__name__}: {error}")
            self.stop()
        if not rates:
            raise RuntimeError("transformers' continuous batching runs with no setting")
        best = max(rates, key=lambda setting: rates[setting])
        self.start(best, work)
        return best
