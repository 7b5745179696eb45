"""vLLM on the CPU: its engine in this process, stepped by hand. torch.compile is left on, as by
default, which makes the first start slow."""

from __future__ import annotations

import os
from importlib.metadata import version

from serving import Answers, Ask, Setup, serve


class Vllm:
    """One engine, greedy."""

    def __init__(self, setup: Setup) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        os.environ["HF_HUB_OFFLINE"] = "1"
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        arguments = EngineArgs(
            model=str(setup.model),
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=setup.context,
            max_num_batched_tokens=max(setup.max_tokens, setup.context),
            max_num_seqs=setup.max_sequences,
            enable_prefix_caching=False,
            enforce_eager=bool(setup.options.get("eager", False)),
        )
        self._engine = LLMEngine.from_engine_args(arguments)
        self._runs = 0
        self.about = {"vllm": version("vllm-cpu")}

    def run(self, requests: list[Ask], answers: Answers) -> None:
        """Step by step, so that the time of every token is seen."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._runs += 1
        for number, request in enumerate(requests):
            params = SamplingParams(
                temperature=0.0,
                max_tokens=request.output,
                min_tokens=request.output,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            prompt = {"prompt_token_ids": request.prompt}
            self._engine.add_request(f"{self._runs}/{number}", prompt, params)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                number = int(output.request_id.split("/")[1].split("-")[0])
                answers.add(number, output.outputs[0].token_ids)

    def close(self) -> None:
        """Nothing outlives the process."""


if __name__ == "__main__":
    serve(Vllm)
