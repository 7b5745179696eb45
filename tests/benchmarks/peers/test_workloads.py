"""Requests come from a seed and stay within their bounds."""

from __future__ import annotations

import statistics

from benchmarks.peers.workloads import WORKLOADS, batch, stream, warm_up


def test_the_same_seed_gives_the_same_requests_and_another_one_others() -> None:
    for make in WORKLOADS.values():
        assert make(1000, 7) == make(1000, 7)
        assert make(1000, 7) != make(1000, 8)


def test_the_batch_has_64_requests_within_bounds_and_about_the_right_means() -> None:
    lengths, outputs = [], []
    for seed in range(40):
        workload = batch(1000, seed)
        assert len(workload.asks) == 64
        lengths += [len(ask.prompt) for ask in workload.asks]
        outputs += [ask.output for ask in workload.asks]
        assert workload.output_tokens == sum(ask.output for ask in workload.asks)
        assert workload.longest <= 512 + 256
    assert (min(lengths), max(lengths)) == (8, 512)
    assert min(outputs) >= 4
    assert max(outputs) == 256
    assert 110 < statistics.mean(lengths) < 130  # 128 before the longest are cut
    assert 58 < statistics.mean(outputs) < 68


def test_the_stream_is_one_request_of_512_in_and_128_out() -> None:
    (ask,) = stream(1000, 3).asks
    assert (len(ask.prompt), ask.output) == (512, 128)


def test_tokens_are_of_the_vocabulary_and_mark_nothing() -> None:
    for workload in (batch(50, 1), stream(50, 1), warm_up(50)):
        tokens = {token for ask in workload.asks for token in ask.prompt}
        assert tokens == set(range(3, 50))
