"""transformers, in Baton's own environment: its continuous batching for many requests, its plain
`generate` for a single one."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from serving import Answers, Ask, Setup, serve
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.streamers import BaseStreamer

_PAGE = 16


class Transformers:
    """One model, greedy. Continuous batching changes the model's attention, so plain generation
    has a model of its own."""

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        options: dict[str, Any] = {"dtype": torch.bfloat16, "local_files_only": True}
        self._single = AutoModelForCausalLM.from_pretrained(setup.model, **options)
        self._batching = AutoModelForCausalLM.from_pretrained(setup.model, **options)
        self._setup = setup
        self.about = {"transformers": version("transformers")}

    @torch.inference_mode()
    def run(self, requests: list[Ask], answers: Answers) -> None:
        """Many requests go through the manager, which serves them in a thread of its own."""
        if len(requests) == 1:
            self._generate(requests[0], answers)
        else:
            self._batch(requests, answers)

    def close(self) -> None:
        """Nothing outlives the process."""

    def _generate(self, request: Ask, answers: Answers) -> None:
        prompt = torch.tensor([request.prompt])
        self._single.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            streamer=_Streamer(answers),
            max_new_tokens=request.output,
            min_new_tokens=request.output,
            do_sample=False,
        )

    def _batch(self, requests: list[Ask], answers: Answers) -> None:
        longest = -(-self._setup.context // _PAGE)
        manager = self._batching.continuous_batching_context_manager(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=_PAGE,
                num_blocks=self._setup.max_sequences * longest,
                max_batch_tokens=self._setup.max_tokens,
                max_requests_per_batch=self._setup.max_sequences,
                allow_block_sharing=False,
            ),
            warmup=False,
        )
        left = dict(enumerate(request.output for request in requests))
        with manager as batching:
            for number, request in enumerate(requests):
                batching.add_request(
                    request.prompt,
                    request_id=str(number),
                    max_new_tokens=request.output,
                    eos_token_id=-1,
                )
            while left:
                result = batching.get_result(timeout=1)
                if result is None:
                    if not batching.is_running():
                        raise RuntimeError("continuous batching has stopped")
                elif result.error is not None:
                    raise RuntimeError(result.error)
                elif result.is_finished():
                    number = int(result.request_id)
                    answers.add(number, result.generated_tokens)
                    del left[number]


class _Streamer(BaseStreamer):
    """Tells of tokens as they come; what comes first is the prompt."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """One step's tokens."""
        if not self._prompt:
            self._answers.add(0, value.flatten().tolist())
        self._prompt = False

    def end(self) -> None:
        """There are no more."""


if __name__ == "__main__":
    serve(Transformers)
