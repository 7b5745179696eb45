"""The prefill worker: computes the KV of prompts, samples the first token, publishes the blocks.
Knows nothing of text, clients or what happens to a request afterwards."""
