"""How an attempt to serve a request can fail without failing the request."""

from __future__ import annotations


class WorkerBusy(Exception):
    """A worker has no room now: try again later or elsewhere. Counts no attempt."""


class WorkerFailed(Exception):
    """A worker died or broke its word. Counts an attempt."""
