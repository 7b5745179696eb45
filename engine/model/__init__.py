"""Models, weights, sampling and the runner that executes plans with torch."""
