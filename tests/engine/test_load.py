"""Settings that cannot work are refused with the flag's name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from baton.config import DecodeConfig
from baton.errors import ConfigError
from engine.load import executor_from, load_executor


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("device", ["cuda", "nonsense"])
def test_a_device_that_is_not_there_is_refused(device: str, tiny: Callable[[str], Any]) -> None:
    with pytest.raises(ConfigError, match=f"--device {device}"):
        load_executor(tiny("llama").path, device=device)


def test_a_context_beyond_the_model_is_refused(tiny: Callable[[str], Any]) -> None:
    with pytest.raises(ConfigError, match="--max-context 129"):
        load_executor(tiny("llama").path, max_context=129)


def test_a_worker_gets_its_executor_warm_and_the_log_says_what_that_took(
    tiny: Callable[[str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = DecodeConfig(model=tiny("llama").path, kv_blocks=4, threads=1)
    with caplog.at_level(logging.INFO):
        executor = executor_from(config)
    assert caplog.messages[-1].startswith("loaded in ")
    assert ", warmed up in " in caplog.messages[-1]
    assert not executor.pool.storage.any()
