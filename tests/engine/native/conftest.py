"""The compiled library and teams of its threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from engine.native.library import Library, load

TeamOf = Callable[[int], int]


@pytest.fixture(scope="session")
def library() -> Library:
    found = load()
    if found is None:
        pytest.skip("the compiled backend was not built")
    return found


@pytest.fixture(scope="session")
def team(library: Library) -> Iterator[TeamOf]:
    """Teams by their number of threads, made once."""
    teams: dict[int, int] = {}

    def of(threads: int) -> int:
        if threads not in teams:
            teams[threads] = library.functions.baton_team_new(threads, None)
        return teams[threads]

    yield of
    for handle in teams.values():
        library.functions.baton_team_free(handle)
