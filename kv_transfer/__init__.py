"""The hand-off of KV blocks from a prefill worker to a decode worker.

Pull by default: the consumer owns every write into its pages, so it knows when they are quiet.
Knows blocks of bytes; knows nothing of models, tokens or scheduling.
"""
