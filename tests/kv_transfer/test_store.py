"""Blocks over one buffer."""

from __future__ import annotations

import pytest

from kv_transfer.digest import block_digest
from kv_transfer.store import BufferStore, block_array


def test_blocks_are_writable_slices_of_the_buffer():
    buffer = bytearray(12)
    store = BufferStore(buffer, 4)
    store.block(1)[:] = b"abcd"
    block_array(store, 2)[:] = 7
    assert buffer == b"\0\0\0\0abcd\7\7\7\7"
    assert (store.blocks, store.block_bytes) == (3, 4)


@pytest.mark.parametrize("index", [-1, 3])
def test_a_block_outside_the_pool_is_refused(index):
    with pytest.raises(IndexError):
        BufferStore(bytearray(12), 4).block(index)


@pytest.mark.parametrize("block_bytes", [0, 5])
def test_a_buffer_must_hold_whole_blocks(block_bytes):
    with pytest.raises(ValueError, match="whole blocks"):
        BufferStore(bytearray(12), block_bytes)


def test_the_digest_depends_on_every_bit_and_on_the_position():
    block = bytearray(64)
    digests = {block_digest(memoryview(block), position) for position in range(8)}
    for bit in range(512):
        block[bit // 8] ^= 1 << bit % 8
        digests.add(block_digest(memoryview(block), 0))
        block[bit // 8] ^= 1 << bit % 8
    assert len(digests) == 8 + 512
