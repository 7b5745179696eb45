"""OpenVINO GenAI: its continuous batching pipeline, on the CPU device.

The model is converted by optimum-intel, once: 16-bit weights are kept as fp16 and computed in
bf16, int8 weights are symmetric per channel (optimum's default) with activations quantized on the
fly. The KV cache has the format that OpenVINO chooses by itself.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import openvino
import openvino_genai
from serving import Answers, Ask, Setup, serve

_FORMATS = {"bf16": "fp16", "int8": "int8"}


class OpenVino:
    """One pipeline."""

    def __init__(self, setup: Setup) -> None:
        config = openvino_genai.SchedulerConfig()
        config.max_num_batched_tokens = setup.max_tokens
        config.max_num_seqs = setup.max_sequences
        config.dynamic_split_fuse = True
        config.enable_prefix_caching = False
        config.cache_size = 2
        properties = {
            "INFERENCE_NUM_THREADS": setup.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16",
        }
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(_converted(setup)), config, "CPU", properties
        )
        names = ("openvino", "openvino-genai", "optimum-intel")
        self.about = {name: version(name) for name in names}

    def run(self, requests: list[Ask], answers: Answers) -> None:
        """Step by step, so that the time of every token is seen."""
        handles = []
        for number, request in enumerate(requests):
            config = openvino_genai.GenerationConfig()
            config.max_new_tokens = request.output
            config.min_new_tokens = request.output
            config.ignore_eos = True
            config.do_sample = False
            prompt = openvino.Tensor(np.array([request.prompt], dtype=np.int64))
            handles.append(self._pipeline.add_request(number, prompt, config))
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for number, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        answers.add(number, output.generated_ids)

    def close(self) -> None:
        """Nothing outlives the process."""


def _converted(setup: Setup) -> Path:
    """The model in OpenVINO's own format, converted if it has not been."""
    weights = _FORMATS[setup.precision]
    target = setup.cache / f"openvino-{weights}"
    if target.is_dir():
        return target
    unfinished = target.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    command = [Path(sys.executable).parent / "optimum-cli", "export", "openvino"]
    command += ["--model", setup.model, "--task", "text-generation-with-past"]
    command += ["--weight-format", weights, unfinished]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return unfinished.rename(target)


if __name__ == "__main__":
    serve(OpenVino)
