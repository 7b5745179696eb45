"""llama.cpp, through the low level of llama-cpp-python: continuous batching as its own server does.

Every request is a sequence of its own in one context. A batch has one token of each sequence that
generates, then as much of the prompts as the token budget leaves.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from gguf_file import write
from serving import Answers, Ask, Setup, serve


class LlamaCpp:
    """One context, greedy."""

    def __init__(self, setup: Setup) -> None:
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        if setup.precision == "int8" and "amx_int8" in _processor_flags():
            options.use_extra_bufts = False  # Q8_0 in its AMX buffers ends in a segmentation fault
        self._model = llama_cpp.llama_model_load_from_file(str(_converted(setup)).encode(), options)
        if not self._model:
            raise RuntimeError("the GGUF file could not be loaded")
        sizes = llama_cpp.llama_context_default_params()
        sizes.n_ctx = setup.max_sequences * setup.context
        sizes.n_batch = sizes.n_ubatch = setup.max_tokens
        sizes.n_seq_max = setup.max_sequences
        sizes.n_threads = sizes.n_threads_batch = setup.threads
        sizes.kv_unified = False  # else each token attends over everybody's context
        self._context = llama_cpp.llama_init_from_model(self._model, sizes)
        if not self._context:
            raise RuntimeError("no context could be made")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self._model)
        )
        self._max_tokens, self._max_sequences = setup.max_tokens, setup.max_sequences
        self._batch = llama_cpp.llama_batch_init(setup.max_tokens, 0, 1)
        self.about = {"llama-cpp-python": version("llama-cpp-python")}

    def run(self, requests: list[Ask], answers: Answers) -> None:
        """Until all have their tokens. Positions of a sequence are those of its prompt, then its
        output."""
        done = [0] * len(requests)  # positions computed
        waiting, running = list(range(len(requests))), []
        slots = list(range(self._max_sequences))
        slot: dict[int, int] = {}
        while waiting or running:
            while waiting and slots:
                slot[waiting[0]] = slots.pop()
                running.append(waiting.pop(0))
            sampling = self._fill(requests, running, done, slot, answers)
            if llama_cpp.llama_decode(self._context, self._batch):
                raise RuntimeError("llama_decode failed")
            for row, number in sampling:
                logits = llama_cpp.llama_get_logits_ith(self._context, row)
                values = np.ctypeslib.as_array(logits, shape=(self._vocabulary,))
                answers.add(number, [int(values.argmax())])
                if len(answers.outputs[number].tokens) == requests[number].output:
                    running.remove(number)
                    slots.append(slot.pop(number))
                    memory = llama_cpp.llama_get_memory(self._context)
                    llama_cpp.llama_memory_seq_rm(memory, slots[-1], -1, -1)

    def close(self) -> None:
        """Nothing outlives the process."""

    def _fill(
        self,
        requests: list[Ask],
        running: list[int],
        done: list[int],
        slot: dict[int, int],
        answers: Answers,
    ) -> list[tuple[int, int]]:
        """The next batch: generation first. Returns the rows that sample, and for whom."""
        self._batch.n_tokens = 0
        sampling = []
        for number in sorted(running, key=lambda n: not answers.outputs[n].tokens):
            prompt, output = requests[number].prompt, answers.outputs[number].tokens
            tokens = prompt[done[number] :] if not output else output[-1:]
            room = self._max_tokens - self._batch.n_tokens
            part = tokens[:room]
            ends = len(part) == len(tokens)
            for offset, token in enumerate(part):
                last = ends and offset == len(part) - 1
                self._put(token, done[number] + offset, slot[number], last)
            done[number] += len(part)
            if part and ends:
                sampling.append((self._batch.n_tokens - 1, number))
        return sampling

    def _put(self, token: int, position: int, sequence: int, logits: bool) -> None:
        batch: Any = self._batch
        row = batch.n_tokens
        batch.token[row], batch.pos[row] = token, position
        batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
        batch.logits[row] = logits
        batch.n_tokens = row + 1


def _processor_flags() -> set[str]:
    """Empty where the system does not tell."""
    try:
        return set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return set()


def _converted(setup: Setup) -> Path:
    """The model as GGUF, written if it has not been."""
    target = setup.cache / f"{setup.precision}.gguf"
    if not target.is_file():
        unfinished = target.with_suffix(".unfinished")
        write(setup.model, setup.precision, unfinished)
        unfinished.rename(target)
    return target


if __name__ == "__main__":
    serve(LlamaCpp)
