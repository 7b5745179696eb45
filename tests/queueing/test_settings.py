"""What a pool is told when nobody configures it."""

from __future__ import annotations

import pytest

from baton.config import GatewayConfig
from queueing.settings import QueueSettings
from scheduling.mlfq import Mlfq


def test_levels_are_those_of_the_workers_unless_configured():
    queue, policy, config = QueueSettings(), Mlfq(), GatewayConfig()
    assert (queue.levels, queue.quantum, queue.ratio, queue.promote_after) == (
        *(policy.levels, policy.quantum),
        *(policy.ratio, policy.promote_after),
    )
    assert (config.mlfq_levels, config.mlfq_quantum, config.mlfq_ratio) == (
        *(policy.levels, policy.quantum),
        policy.ratio,
    )
    assert config.mlfq_promote_after == policy.promote_after


def test_first_come_first_served_has_one_level():
    with pytest.raises(ValueError, match="levels"):
        QueueSettings(policy="fcfs", levels=2)
