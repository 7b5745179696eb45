"""Baton beside other engines, on the same model directory and the same requests.

Every system runs in a process of its own (systems/), in an environment of its own (install.py), and
serves the same requests in turn (rounds.py)."""
