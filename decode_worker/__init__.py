"""The decode worker: takes requests over from prefill workers and generates in one continuous
batch. Knows token ids and KV blocks; knows nothing of text or clients."""
