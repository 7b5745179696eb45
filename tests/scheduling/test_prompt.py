from __future__ import annotations

from baton.types import Logprob
from scheduling.plan import Chunk
from scheduling.prompt import PromptRecord
from scheduling.sequence import Sequence


def test_logprobs_of_a_prompt_computed_twice_are_kept_once(make_request) -> None:
    request = make_request("r", prompt=6)
    sequence = Sequence.start(request, 0, now=0.0)
    all_of_them = [Logprob(token, -0.5, 1) for token in request.prompt_ids[1:]]
    record = PromptRecord(request, arrived_at=0.0)
    record.add(Chunk(sequence, 0, 4, sample=False), tuple(all_of_them[:4]))
    record.add(Chunk(sequence, 0, 3, sample=False), tuple(all_of_them[:3]))  # after a preemption
    record.add(Chunk(sequence, 3, 3, sample=True), tuple(all_of_them[3:]))
    assert record.logprobs == all_of_them


def test_times_and_cached_tokens_are_those_of_the_first_pass(make_request) -> None:
    request = make_request("r", prompt=6)
    sequence = Sequence.start(request, 0, now=1.0)
    record = PromptRecord(request, arrived_at=1.0)
    sequence.cached = 4
    record.begin(sequence, 3.0)
    sequence.cached = 5
    record.begin(sequence, 9.0)
    assert (record.queued, record.computed(10.0), record.cached) == (2.0, 7.0, 4)


def test_what_was_generated_before_is_no_cached_part_of_the_prompt(make_request) -> None:
    request = make_request("r", prompt=6)
    sequence = Sequence.start(request, 0, now=1.0)
    sequence.cached = 8
    record = PromptRecord(request, arrived_at=1.0)
    record.begin(sequence, 3.0)
    assert record.cached == 6
