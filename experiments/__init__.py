"""Policies measured against each other, on the real engine and in the simulator.

Each experiment runs one engine with one policy swapped. Knows nothing of gateways or Redis.
"""
