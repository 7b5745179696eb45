"""Which worker suits a request, by what is known of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from baton.config import GatewayConfig
from gateway.pace import Pace
from gateway.placing import Placing
from gateway.prefixes import Prefixes


@pytest.fixture
def placing() -> Placing:
    """A prompt token takes a hundredth of a second."""
    pace = Pace(GatewayConfig(prefill_seconds_per_token=0.01))
    return Placing(pace, Prefixes(), "prefix-aware", 256)


@pytest.mark.parametrize(
    ("waited", "tokens", "waits"),
    [
        (0.0, 100, True),
        (0.9, 100, True),
        (1.1, 100, False),
        (0.0, 0, False),
        (0.0, -100, False),
        (-0.5, 0, False),  # it came while others were looked at
    ],
)
def test_a_request_waits_as_long_as_what_it_would_save(
    placing: Placing, waited: float, tokens: int, waits: bool
) -> None:
    session = SimpleNamespace(waiting_since=50.0 - waited)
    assert placing.is_worth_waiting(session, tokens, 50.0) is waits
