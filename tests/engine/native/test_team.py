"""The team of threads: every product needs its wake-up, tickets and meeting to be right."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
import torch

from engine.native.library import Format, Library
from tests.engine.native.conftest import TeamOf
from tests.engine.native.test_gemm import multiply, operands


def threads_here() -> set[str]:
    """Ids of this process's threads."""
    return {entry.name for entry in Path("/proc/self/task").iterdir()}


@pytest.mark.parametrize("threads", (1, 2, 3, 8))
def test_any_number_of_threads_gives_the_same_bits(
    library: Library, team: TeamOf, threads: int
) -> None:
    # 8 threads are more than most test machines have processors: waiting must not starve anyone.
    x, w = operands(9, 300, 128)
    alone = multiply(library, team(1), library.isa, Format.F32, x, w)
    for _ in range(200):
        assert torch.equal(multiply(library, team(threads), library.isa, Format.F32, x, w), alone)


def test_more_threads_than_panels_is_fine(library: Library, team: TeamOf) -> None:
    x, w = operands(2, 20, 64)
    y = multiply(library, team(8), library.isa, Format.F32, x, w)
    torch.testing.assert_close(y, x @ w.T)


def test_teams_take_turns(library: Library, team: TeamOf) -> None:
    x, w = operands(4, 96, 64)
    alone = multiply(library, team(1), library.isa, Format.F32, x, w)
    for _ in range(50):
        for threads in (2, 3):
            y = multiply(library, team(threads), library.isa, Format.F32, x, w)
            assert torch.equal(y, alone)


def test_any_part_of_a_team_gives_the_same_bits(library: Library, team: TeamOf) -> None:
    x, w = operands(9, 300, 128)
    alone = multiply(library, team(1), library.isa, Format.F32, x, w)
    four = team(4)
    for round in range(300):
        library.functions.baton_team_use(four, (round * 7) % 6)  # 0 counts as 1, 5 as 4
        assert torch.equal(multiply(library, four, library.isa, Format.F32, x, w), alone)


def test_threads_that_take_no_part_sleep(library: Library) -> None:
    before = threads_here()
    team = library.functions.baton_team_new(2, None)
    (thread,) = threads_here() - before
    library.functions.baton_team_use(team, 1)
    x, w = operands(64, 512, 512)
    for _ in range(20):
        multiply(library, team, library.isa, Format.F32, x, w)
    stat = Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()
    assert stat[0] == "S"
    assert int(stat[11]) + int(stat[12]) == 0  # processor time, in ticks
    library.functions.baton_team_free(team)


def test_a_team_leaves_no_threads_behind(library: Library) -> None:
    functions = library.functions
    before = len(threads_here())
    for _ in range(20):
        team = functions.baton_team_new(4, None)
        assert len(threads_here()) == before + 3
        functions.baton_team_free(team)
    assert len(threads_here()) == before


def test_threads_run_where_they_are_pinned_and_the_caller_anywhere(library: Library) -> None:
    mine = os.sched_getaffinity(0)
    before = threads_here()
    cpu = max(mine)
    team = library.functions.baton_team_new(2, (ctypes.c_int32 * 2)(cpu, cpu))
    (thread,) = threads_here() - before
    assert os.sched_getaffinity(int(thread)) == {cpu}
    assert os.sched_getaffinity(0) == mine
    library.functions.baton_team_free(team)


def test_threads_that_are_not_pinned_keep_off_the_processor_of_the_caller(library: Library) -> None:
    mine = os.sched_getaffinity(0)
    if len(mine) < 2:
        pytest.skip("one processor")
    before = threads_here()
    team = library.functions.baton_team_new(2, None)
    (thread,) = threads_here() - before
    x, w = operands(2, 64, 64)
    multiply(library, team, library.isa, Format.F32, x, w)
    allowed = os.sched_getaffinity(int(thread))
    assert allowed < mine
    assert len(allowed) == len(mine) - 1
    assert os.sched_getaffinity(0) == mine
    library.functions.baton_team_free(team)


def test_teams_that_cannot_be_are_refused_with_a_reason(library: Library) -> None:
    assert library.functions.baton_team_new(0, None) is None
    assert "team" in library.error()
    assert library.functions.baton_team_new(2, (ctypes.c_int32 * 2)(0, 100_000)) is None
    assert "cpu 100000" in library.error()


def test_memory_is_read_at_some_bandwidth(library: Library, team: TeamOf) -> None:
    # Faster than a disk and slower than any first-level cache: a figure, not an overflow.
    assert 1e8 < library.functions.baton_read_bandwidth(team(2), 32 << 20, 2) < 1e13
