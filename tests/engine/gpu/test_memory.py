"""What is left of a device for KV."""

from __future__ import annotations

import gc

import pytest
import torch

from baton.errors import ConfigError
from engine.gpu.memory import Memory, room_for_kv

GIB = 2**30


def test_weights_and_passes_are_taken_from_the_share_and_the_trials_pool_is_not() -> None:
    memory = Memory(total=80 * GIB, others=2 * GIB, peak=21 * GIB, trial=1 * GIB)
    assert memory.room(0.9) == 72 * GIB - 20 * GIB


def test_workers_that_share_a_device_have_their_parts_of_it() -> None:
    alone = Memory(total=80 * GIB, others=1 * GIB, peak=20 * GIB, trial=GIB)
    beside = Memory(total=80 * GIB, others=37 * GIB, peak=20 * GIB, trial=GIB)
    assert alone.room(0.45) == beside.room(0.45) == 36 * GIB - 19 * GIB


def test_what_another_process_takes_beyond_its_part_is_not_there_for_kv() -> None:
    memory = Memory(total=80 * GIB, others=31 * GIB, peak=20 * GIB, trial=GIB)
    assert memory.room(0.9) == 80 * GIB - 31 * GIB - 4 * GIB - 19 * GIB
    assert memory.room(1.0) == 80 * GIB - 31 * GIB - 19 * GIB


@pytest.mark.parametrize("share", [0.1, 0.25])
def test_a_share_smaller_than_the_weights_leaves_nothing(share: float) -> None:
    assert Memory(total=80 * GIB, others=0, peak=22 * GIB, trial=GIB).room(share) <= 0


@pytest.mark.gpu
def test_a_trial_is_measured_and_its_pool_is_not_counted() -> None:
    device = torch.device("cuda")
    gc.collect()
    torch.cuda.empty_cache()  # what other tests have left there is free, too
    kept = torch.zeros(GIB // 4, dtype=torch.uint8, device=device)

    def trial() -> int:
        pool = torch.zeros(GIB // 2, dtype=torch.uint8, device=device)
        torch.zeros(GIB // 4, dtype=torch.uint8, device=device)
        return pool.nbytes

    free, total = torch.cuda.mem_get_info(device)
    room = room_for_kv(trial, device, 1.0)
    # `kept` was taken before, and a quarter of a GiB of what the trial took was no pool.
    assert room == pytest.approx(free - GIB // 4, abs=total // 100)
    del kept
    with pytest.raises(ConfigError, match="no KV fits"):
        room_for_kv(trial, device, 1e-6)
