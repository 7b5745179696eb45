"""Names for prefixes of token sequences: what workers find KV by, and gateways route by.

The hash is BLAKE2b and not the faster xxh3: a wrong hit would give wrong tokens, so no two prefixes
that anybody can construct may have one key.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b

KEY_BYTES = 16


def block_keys(token_ids: Sequence[int], block_size: int, salt: bytes) -> list[bytes]:
    """A key of 16 bytes for each full block of the tokens, in order.

    A key names all tokens up to the end of its block: it is the hash of the key before it and of
    the token ids of its block. The first follows `salt` (`salt_of`, 16 bytes). So the keys of more
    tokens of the same sequence are `block_keys` of those, with the last key as the salt.
    """
    whole = len(token_ids) - len(token_ids) % block_size
    packed = struct.pack(f"<{whole}I", *token_ids[:whole])
    keys = []
    width = 4 * block_size
    for start in range(0, len(packed), width):
        salt = blake2b(salt + packed[start : start + width], digest_size=KEY_BYTES).digest()
        keys.append(salt)
    return keys


def salt_of(tenant: str, cache_salt: str) -> bytes:
    """What the chain of keys of a tenant's request begins with.

    Prefixes are shared within a tenant and namespace only: how long a first token takes would tell
    others what has been asked before.
    """
    name = tenant.encode()
    return blake2b(
        len(name).to_bytes(8, "little") + name + cache_salt.encode(), digest_size=KEY_BYTES
    ).digest()
