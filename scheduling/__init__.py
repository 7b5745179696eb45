"""Pure policy: who runs next, with which tokens, in which blocks.

No I/O, no clock (the caller passes `now`, in seconds), no asyncio, no torch: the same code drives
the workers and the simulator.
"""
