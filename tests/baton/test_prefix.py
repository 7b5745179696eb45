"""Keys of prefixes."""

from __future__ import annotations

from baton.prefix import KEY_BYTES, block_keys, salt_of

SALT = salt_of("tenant", "")


def test_only_full_blocks_have_keys() -> None:
    assert [len(block_keys(range(n), 4, SALT)) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    assert {len(key) for key in block_keys(range(100), 4, SALT)} == {KEY_BYTES}


def test_a_key_names_all_tokens_up_to_the_end_of_its_block() -> None:
    keys = block_keys([1, 2, 3, 4, 5, 6, 7, 8], 4, SALT)
    assert block_keys([1, 2, 3, 4, 5, 6, 7, 9], 4, SALT)[0] == keys[0]
    others = [[9, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 8, 7], [5, 6, 7, 8, 5, 6, 7, 8]]
    for tokens in others:
        assert block_keys(tokens, 4, SALT)[1] != keys[1]


def test_a_sequence_that_grew_goes_on_from_its_last_key() -> None:
    tokens = list(range(40))
    keys = block_keys(tokens, 4, SALT)
    assert keys[:5] + block_keys(tokens[20:], 4, keys[4]) == keys


def test_the_keys_do_not_depend_on_process_or_machine() -> None:
    # Gateways and workers of different hosts must agree.
    salt = salt_of("tenant", "name")
    assert salt.hex() == "96086541bd9aac8948a77167a85f109d"
    assert block_keys([1, 2, 70000, 4], 4, salt)[0].hex() == "aa1bc6f16dcd0064f0e87c7a9326ac8d"


def test_tenants_and_namespaces_have_keys_of_their_own() -> None:
    salts = [salt_of("a", "bc"), salt_of("ab", "c"), salt_of("abc", ""), salt_of("", "abc")]
    assert len(set(salts)) == 4
    assert len({block_keys([1, 2, 3, 4], 4, salt)[0] for salt in salts}) == 4
