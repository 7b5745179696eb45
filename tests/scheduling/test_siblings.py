"""Which blocks of a prompt its sequences share, by example."""

from __future__ import annotations

import pytest

from scheduling.sequence import Phase, Sequence
from scheduling.siblings import SharedPrompts

SIZE = 4


class Family:
    """The sequences of one request, put into places by hand."""

    def __init__(self, make_request, prompt: int, n: int = 3) -> None:
        request = make_request("a", prompt=prompt, n=n)
        self.sequences = [Sequence.start(request, index, 0.0) for index in range(n)]
        self.prompts = SharedPrompts(SIZE, lambda _: self.sequences)

    def run(self, index: int, computed: int) -> Sequence:
        sequence = self.sequences[index]
        sequence.move(Phase.RUNNING)
        blocks = -(-len(sequence.tokens) // SIZE)
        sequence.blocks = [10 * index + place for place in range(blocks)]
        sequence.computed = computed
        return sequence


@pytest.mark.parametrize(
    ("prompt", "shared"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (11, 2), (13, 3)]
)
def test_full_blocks_are_shared_but_not_the_last_prompt_token(make_request, prompt, shared) -> None:
    family = Family(make_request, prompt)
    family.run(0, computed=prompt)
    assert family.prompts.blocks(family.sequences[1]) == list(range(shared))


def test_nothing_is_shared_before_all_of_it_is_computed(make_request) -> None:
    family = Family(make_request, prompt=13)
    first, waits = family.run(0, computed=11), family.sequences[1]
    assert family.prompts.blocks(waits) == []
    assert family.prompts.is_coming(waits)
    first.computed = 12
    assert family.prompts.blocks(waits) == [0, 1, 2]
    assert not family.prompts.is_coming(waits)


def test_a_sibling_further_on_shares_its_prompt_and_no_output(make_request) -> None:
    family = Family(make_request, prompt=9)
    first = family.sequences[0]
    for token in range(3):
        first.append(token)
    family.run(0, computed=11)
    assert len(first.blocks) == 3
    assert family.prompts.blocks(family.sequences[2]) == [0, 1]


@pytest.mark.parametrize("phase", [Phase.WAITING, Phase.FINISHED])
def test_who_does_not_run_has_nothing_to_share(make_request, phase) -> None:
    family = Family(make_request, prompt=9)
    family.run(0, computed=9).move(phase)
    assert family.prompts.blocks(family.sequences[1]) == []
    assert not family.prompts.is_coming(family.sequences[1])


def test_kv_on_its_way_from_elsewhere_is_waited_for(make_request) -> None:
    family = Family(make_request, prompt=9)
    family.sequences[0].move(Phase.INCOMING)
    assert family.prompts.blocks(family.sequences[1]) == []
    assert family.prompts.is_coming(family.sequences[1])


def test_a_request_of_one_sequence_shares_nothing(make_request) -> None:
    family = Family(make_request, prompt=9, n=1)
    only = family.run(0, computed=9)
    assert family.prompts.blocks(only) == []
    assert not family.prompts.is_coming(only)
