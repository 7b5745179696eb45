from __future__ import annotations

import pytest

from launcher import cores


def test_idle_threads_spin_briefly_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
):
    environment: dict[str, str] = {}
    monkeypatch.setattr(cores.os, "environ", environment)
    cores.spin_briefly()
    assert environment == {"GOMP_SPINCOUNT": "1000"}
    for chosen in ({"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": "ACTIVE"}):
        environment.clear()
        environment.update(chosen)
        cores.spin_briefly()
        assert environment == chosen
