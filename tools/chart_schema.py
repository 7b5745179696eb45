"""Keep the chart's schema up with the configuration: `tools/chart_schema.py generate | check`.

Rewrites only `$defs.*_config` of helm/baton/values.schema.json: one property for each field, with
its type, bounds and description. What the chart sets itself is left out, so nobody can set it
twice. `scheduling_config` has what all processes must agree on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from baton.config import (
    DecodeConfig,
    GatewayConfig,
    PrefillConfig,
    ProcessConfig,
    SchedulingConfig,
)

SCHEMA = Path(__file__).resolve().parent.parent / "helm" / "baton" / "values.schema.json"
KINDS: dict[str, type[ProcessConfig]] = {
    "gateway": GatewayConfig,
    "prefill": PrefillConfig,
    "decode": DecodeConfig,
}
SET_BY_CHART = frozenset(
    {
        "address",
        "advertise_address",
        "gateway_id",
        "insecure_network",
        "kv_address",
        "length_salt",
        "length_state",
        "metrics_address",
        "model",
        "redis_url",
        "worker_id",
    }
)


def config_schema(kind: type[ProcessConfig], without: frozenset[str]) -> dict[str, Any]:
    """JSON schema of what may be set of `kind`, apart from the fields `without`."""
    properties = kind.model_json_schema()["properties"]
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            name: {key: value for key, value in field.items() if key not in ("title", "default")}
            for name, field in properties.items()
            if name not in without
        },
    }


def current() -> str:
    """The schema file as it ought to be."""
    schema = json.loads(SCHEMA.read_text())
    for role, kind in KINDS.items():
        schema["$defs"][f"{role}_config"] = config_schema(kind, SET_BY_CHART)
    own = frozenset(ProcessConfig.model_fields)
    schema["$defs"]["scheduling_config"] = config_schema(SchedulingConfig, own)
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["generate"]:
            SCHEMA.write_text(current())
        case ["check"]:
            if SCHEMA.read_text() != current():
                raise SystemExit(f"{SCHEMA.name} is stale: python tools/chart_schema.py generate")
        case _:
            raise SystemExit(__doc__)
