"""Attention over paged KV: one contract, one file per backend."""
