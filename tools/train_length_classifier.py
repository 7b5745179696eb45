"""Fine-tune a classifier of output lengths on what a gateway recorded with --record-lengths:

    python tools/train_length_classifier.py RECORDS.jsonl OUT [--base DIR] [--epochs N]

Then: baton gateway --length-predictor OUT
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from baton.errors import ModelError
from engine.length_training import Training, read_records, train
from scheduling.length_buckets import Buckets


def main() -> None:
    """Train, save, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", type=Path, help="directory to start from, such as DistilBERT")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--held-out", type=float, default=0.1, help="share that judges the result")
    parser.add_argument("--longest", type=int, default=0, help="end of the last bucket")
    parser.add_argument("--equal-width", type=int, default=0, help="S3's buckets, so many")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    try:
        records = read_records(chosen.records)
        longest = chosen.longest or max((record.tokens for record in records), default=1)
        buckets = (
            Buckets.equal_width(longest, chosen.equal_width)
            if chosen.equal_width
            else Buckets.geometric(longest)
        )
        how = Training(
            base=chosen.base,
            epochs=chosen.epochs,
            batch=chosen.batch,
            learning_rate=chosen.learning_rate,
            held_out=chosen.held_out,
            seed=chosen.seed,
        )
        report = train(records, buckets, chosen.out, how, lambda line: print(line, flush=True))
    except (ModelError, OSError) as error:
        sys.exit(f"{error}")
    if report is None:
        print("nothing was held out that could judge the result")
        return
    print(
        f"held out: {report.weight:.0f} outputs\n"
        f"accuracy {report.accuracy:.3f}, majority class {report.majority_accuracy:.3f}\n"
        f"mean absolute error {report.error_tokens:.1f} tokens "
        f"(always the mean: {report.majority_error_tokens:.1f}), "
        f"{report.error_buckets:.2f} buckets\n"
        f"expected calibration error {report.calibration_error:.3f}\n"
        f"longer than the allotment {report.exceeded:.3f}, reserved {report.reserved:.2f} times "
        "what was used"
    )


if __name__ == "__main__":
    main()
