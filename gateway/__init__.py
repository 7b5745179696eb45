"""The public API: validates, tokenizes, queues, dispatches, detokenizes and streams.

Knows nothing about models beyond their tokenizer and limits, and imports no torch.
"""
