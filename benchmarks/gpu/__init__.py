"""What Baton makes of a GPU: `python -m benchmarks.gpu`, or `make gpu-bench`."""
