"""A plan as values for the Helm chart (helm/baton)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from scheduling.simulator.profiles import Profile
from scheduling.simulator.sizing import Question, Trial

GPU_RESOURCE = "nvidia.com/gpu"


def chart_values(best: Trial, question: Question) -> dict[str, Any]:
    """What the chart needs to know to make this cluster; all else stays at its default."""
    order = _order(best, question)
    cost = question.prefill.cost
    return {
        "gateway": {
            "config": order
            | {
                "prefill_seconds_base": cost.base,
                "prefill_seconds_per_token": cost.per_token,
            }
        },
        "prefill": worker_values(
            best.layout.prefill, question.prefill, best, order, publishes=True
        ),
        "decode": worker_values(best.layout.decode, question.decode, best, order),
    }


def write_values(path: Path, best: Trial, question: Question) -> None:
    """Write them as YAML, with what they are for above."""
    slo = question.slo
    limits = [
        f"P{slo.percentile:g} {name} {limit * 1e3:g} ms"
        for name, limit in (("TTFT", slo.ttft), ("TPOT", slo.tpot))
        if limit is not None
    ]
    usage = ", ".join(f"{name} {used:.0%}" for name, used in best.usage.items())
    heading = (
        f"# Simulated on {question.decode.name}: {best.layout} for {' and '.join(limits)}\n"
        f"# (used: {usage}). Use with: helm install ... -f {path.name}\n"
    )
    path.write_text(heading + yaml.safe_dump(chart_values(best, question), sort_keys=False))


def _order(best: Trial, question: Question) -> dict[str, Any]:
    order: dict[str, Any] = {"policy": question.policy_name}
    if question.policy_name != "fcfs":
        mlfq = best.tuning.mlfq
        order |= {
            "mlfq_levels": mlfq.levels,
            "mlfq_quantum": mlfq.quantum,
            "mlfq_ratio": mlfq.ratio,
            "mlfq_promote_after": mlfq.promote_after,
        }
    return order


def worker_values(
    replicas: int, device: Profile, best: Trial, order: dict[str, Any], *, publishes: bool = False
) -> dict[str, Any]:
    """The part of one kind of worker; `order` is what all processes must agree on. Who `publishes`
    KV from a GPU has all of it in host memory, too, after a while."""
    if not replicas:
        return {"replicas": 0}
    config = order | {
        "max_batch_tokens": best.tuning.max_tokens,
        "max_batch_sequences": best.tuning.max_sequences,
        "block_size": device.block_size,
    }
    if device.kv_dtype != "auto":
        config["kv_dtype"] = device.kv_dtype
    if device.block_bytes:
        config["kv_memory"] = device.blocks * device.block_bytes
    workers: dict[str, Any] = {"replicas": replicas, "config": config}
    if device.device != "cpu":
        config["device"] = device.device
        held = device.weight_bytes  # weights pass through host memory
        if publishes:
            held += device.blocks * device.block_bytes
        memory = f"{8 + math.ceil(held / 2**30)}Gi"
        workers["resources"] = {
            "requests": {"memory": memory},
            "limits": {GPU_RESOURCE: 1, "memory": memory},
        }
    return workers
