"""Weights in fewer bits: how they are made, how checkpoints store them, and what they mean.

Plain torch: the products over them are those of the backends.
"""
