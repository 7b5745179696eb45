"""The model on a device. Knows token ids and KV blocks; knows nothing of text, gRPC or Redis.

The only package that imports torch (KV transport aside).
"""
