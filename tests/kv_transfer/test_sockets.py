"""Scatter/gather over real sockets."""

from __future__ import annotations

import itertools
import random
import socket
import threading
import time

import pytest

from kv_transfer.sockets import receive_all, send_all


def test_scatter_and_gather_agree_whatever_the_pieces():
    numbers = random.Random(4)
    for _ in range(10):
        payload = numbers.randbytes(300_000)
        left, right = socket.socketpair()
        with left, right:
            left.setblocking(False)
            right.setblocking(False)
            views = [memoryview(piece) for piece in pieces(payload, numbers)]
            received = bytearray(len(payload))
            targets = pieces(memoryview(received), numbers)
            landed: list[int] = []
            sender = threading.Thread(target=send_all, args=(left, views, 5.0))
            sender.start()
            receive_all(right, targets, 5.0, landed.append)
            sender.join()
            assert received == payload
            assert landed == list(range(len(targets)))


def pieces(whole, numbers: random.Random):
    cuts = [0, *sorted(numbers.sample(range(1, len(whole)), 150)), len(whole)]
    return [whole[a:b] for a, b in itertools.pairwise(cuts)]


@pytest.mark.parametrize("direction", [send_all, receive_all])
def test_a_peer_that_does_nothing_costs_bounded_time(direction):
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        started = time.monotonic()
        with pytest.raises(TimeoutError, match="no progress"):
            direction(left, [memoryview(bytearray(2**24))], 0.1)
        assert time.monotonic() - started < 1.0
