"""Times the engine's generation steps beside transformers' own, in one process.

Both sides run the same model at the same batch size and context, one step of ours and one of
theirs in turn: the speed of a shared machine changes from second to second, and only neighbours
compare.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from baton import cores
from baton.types import Request, Sampling, Stopping
from engine.bench.backends import backend_of, load, weights_of
from engine.model.runner import TorchExecutor
from scheduling.plan import Chunk, StepPlan
from scheduling.sequence import Sequence

_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Row:
    """Generation at one batch size: medians over the steps, in seconds."""

    model: str
    backend: str
    dtype: str
    batch: int
    context: int  # tokens before the first step
    prefill: float  # one prompt of `context` tokens in one pass
    step: float
    reference_step: float  # transformers

    @property
    def tokens_per_second(self) -> float:
        """Tokens that all sequences together get per second."""
        return self.batch / self.step

    @property
    def ratio(self) -> float:
        """How many times faster than transformers a step is."""
        return self.reference_step / self.step


def measure(
    path: Path,
    name: str,
    dtype: str,
    *,
    batches: tuple[int, ...] = (1, 8, 32),
    context: int = 128,
    steps: int = 20,
    threads: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Time `steps` generation steps per batch size, after prompts of `context` tokens or what the
    model has room for. `progress` is told what is being done.

    Raises ModelError if the model cannot be served.
    """
    progress(f"{name} {dtype}: loading")
    blocks = max(batches) * -(-(context + steps + 1) // _BLOCK_SIZE)
    executor = load(
        path,
        "auto",
        dtype=dtype,
        block_size=_BLOCK_SIZE,
        kv_blocks=blocks,
        max_batch_tokens=context,
        max_batch_sequences=max(batches),
        threads=threads,
    )
    executor.warm_up()
    torch.set_num_threads(threads or cores.available())  # theirs: ours may want only one of torch's
    context = min(context, executor.capacity.max_context - steps - 1)
    used = weights_of(executor, dtype)
    stored = executor.pool.geometry.dtype  # what transformers runs in, which has no int8 here
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=stored, local_files_only=True)
    rows = []
    for batch in batches:
        progress(f"{name} {used}: batch {batch}")
        rows.append(_measure_batch(executor, reference, (name, used), batch, context, steps))
    return rows


def _measure_batch(
    executor: TorchExecutor,
    reference: PreTrainedModel,
    names: tuple[str, str],
    batch: int,
    context: int,
    steps: int,
) -> Row:
    vocabulary = executor.model.vocab_size
    prompts = torch.randint(
        vocabulary, (batch, context), generator=torch.Generator().manual_seed(1)
    )
    sequences = _sequences(prompts, steps)
    # On a thread of its own: torch keeps the number of its threads per calling thread.
    with ThreadPoolExecutor(1) as thread:
        prefill = [thread.submit(_ours, executor, [one]).result() for one in sequences]
        theirs = _reference_steps(reference, prompts)
        pairs = [
            (thread.submit(_ours, executor, sequences).result(), next(theirs)) for _ in range(steps)
        ]
    return Row(
        model=names[0],
        backend=backend_of(executor),
        dtype=names[1],
        batch=batch,
        context=context,
        prefill=statistics.median(prefill),
        step=statistics.median(ours for ours, _ in pairs),
        reference_step=statistics.median(reference_step for _, reference_step in pairs),
    )


def _sequences(prompts: Tensor, steps: int) -> list[Sequence]:
    """One sequence per row, with blocks for its prompt and `steps` more tokens."""
    width = -(-(prompts.shape[1] + steps + 1) // _BLOCK_SIZE)
    sequences = []
    for index, prompt in enumerate(prompts.tolist()):
        stopping = Stopping(max_tokens=steps + 1)
        request = Request(f"bench-{index}", tuple(prompt), Sampling(), stopping)
        sequence = Sequence.start(request, 0, now=0.0)
        sequence.blocks = list(range(index * width, (index + 1) * width))
        sequences.append(sequence)
    return sequences


def _ours(executor: TorchExecutor, sequences: list[Sequence]) -> float:
    """One pass over all that the sequences have not computed; returns its seconds."""
    chunks = tuple(Chunk(s, s.computed, s.uncomputed, sample=True) for s in sequences)
    result = executor.execute(StepPlan(chunks))
    for chunk, sampled in zip(chunks, result.sampled, strict=True):
        chunk.sequence.computed += chunk.length
        assert sampled is not None
        chunk.sequence.append(sampled.token_id)
    return result.seconds


@torch.inference_mode()
def _reference_steps(model: PreTrainedModel, prompts: Tensor) -> Iterator[float]:
    """Seconds of one greedy step of transformers after another, with its KV cache."""
    cache = DynamicCache(config=model.config)
    output = model(prompts, past_key_values=cache, use_cache=True, logits_to_keep=1)
    while True:
        tokens = output.logits[:, -1].argmax(-1, keepdim=True)
        started = time.perf_counter()
        output = model(tokens, past_key_values=cache, use_cache=True)
        output.logits[:, -1].argmax(-1)
        yield time.perf_counter() - started
