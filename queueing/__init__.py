"""The cluster's shared state in Redis: queue, MLFQ levels, claims and fences, worker registry.

Prompts, outputs and secrets never come here, and nothing here is called per token.
"""
