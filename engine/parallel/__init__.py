"""One worker over several ranks: tensor and pipeline parallelism (docs/decisions/008)."""
