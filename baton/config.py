"""One frozen configuration per process, read once in main: flags, then `BATON_*`, then YAML.

Every field is a flag (`kv_blocks` is `--kv-blocks`), an environment variable (`BATON_KV_BLOCKS`)
and a key of the YAML file. Later sources never override earlier ones.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from baton.errors import ConfigError

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]


class ProcessConfig(BaseSettings):
    """What every process has."""

    model_config = SettingsConfigDict(
        env_prefix="BATON_", frozen=True, extra="forbid", yaml_file=None
    )

    model: Path | None = Field(
        None, description="Hugging Face model directory; the demo model if unset"
    )
    model_name: str = Field("", description="served name; the directory's name if empty")
    pool: str = Field("default", description="name of the pool of workers in Redis")
    redis_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        description="redis://, rediss:// or unix:// URL of the shared queue",
    )
    metrics_address: str = Field("", description="host:port for Prometheus; off if empty")
    insecure_network: bool = Field(
        False, description="listen on addresses other than loopback without TLS"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="log level")
    drain_seconds: Annotated[float, Field(ge=0)] = Field(
        10.0, description="time that running requests get to finish at shutdown"
    )
    report_interval: Seconds = Field(0.1, description="seconds between reports to Redis")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, environment, file."""
        yaml_file = init_settings.init_kwargs.pop("_yaml", None)  # type: ignore[attr-defined]
        flags = InitSettingsSource(settings_cls, init_settings.init_kwargs)  # type: ignore[attr-defined]
        return flags, env_settings, YamlConfigSettingsSource(settings_cls, yaml_file)

    def shown(self) -> dict[str, Any]:
        """Plain values to print at start, secrets masked."""
        return self.model_dump(mode="json")


class SchedulingConfig(ProcessConfig):
    """What the gateway and the workers must agree on: the same levels and quanta."""

    mlfq_levels: Annotated[int, Field(ge=1, le=32)] = Field(16, description="MLFQ levels")
    mlfq_quantum: Seconds = Field(
        0.025, description="quantum of level 0, in seconds: about one pass"
    )
    mlfq_ratio: Annotated[float, Field(gt=1)] = Field(2.0, description="quantum growth per level")
    mlfq_promote_after: Seconds = Field(
        5.0, description="wait after which a request counts as starved and goes first"
    )
    policy: Literal["fcfs", "mlfq", "skip-join-mlfq", "predicted-srpt"] = Field(
        "predicted-srpt", description="order in which requests wait and sequences run"
    )
    srpt_aging: Annotated[float, Field(ge=0)] = Field(
        1.0,
        description="predicted-srpt: how much waiting counts beside predicted work; 0 is best for "
        "the mean latency, more is better for the tail",
    )


class GatewayConfig(SchedulingConfig):
    """The gateway."""

    address: str = Field("127.0.0.1:50051", description="host:port of the public API")
    gateway_id: str = Field("", description="unique id; made up if empty")
    max_queued_requests: Positive = Field(10_000, description="requests waiting in the pool")
    max_queued_tokens: Positive = Field(20_000_000, description="prompt tokens waiting in the pool")
    max_requests_per_tenant: Positive = Field(1_000, description="live requests of one tenant")
    max_prompt_bytes: Positive = Field(4_000_000, description="longest text accepted")
    max_sequences_per_request: Positive = Field(16, description="largest n")
    max_logprobs: Positive = Field(20, description="most alternatives per token")
    max_stop_strings: Positive = Field(16, description="most stop strings")
    default_max_tokens: Positive = Field(256, description="max_tokens when the caller sets none")
    queue_timeout: Seconds = Field(30.0, description="longest wait in the queue")
    request_timeout: Seconds = Field(
        600.0, description="longest deadline, and that of callers that set none"
    )
    max_attempts: Positive = Field(4, description="workers tried per request")
    prefill_seconds_per_token: Seconds = Field(
        0.0005, description="cost model of the first iteration: per uncached prompt token"
    )
    prefill_seconds_base: Seconds = Field(
        0.005, description="cost model of the first iteration: fixed part"
    )
    token_seconds: Seconds = Field(
        0.005, description="seconds per output token, until the workers have measured it"
    )
    routing: Literal["prefix-aware", "kv-aware", "least-outstanding", "round-robin"] = Field(
        "prefix-aware", description="which of the workers with room gets a request"
    )
    local_prefill_tokens: Annotated[int, Field(ge=0)] = Field(
        256,
        description="a decode worker that has all but so many tokens of a prompt in its prefix "
        "cache computes the rest by itself (prefix-aware routing, beside prefill workers)",
    )
    decode_ahead: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="sequences sent to a decode worker beyond its batch, as a share of the batch; "
        "0.25 under fcfs, 1 under policies that preempt",
    )
    fairness_slack: Seconds = Field(
        0.5,
        description="service that a tenant may have had more than others before its requests "
        "wait for theirs",
    )
    urgent_before: Annotated[float, Field(ge=0)] = Field(
        2.0, description="slack before its deadline at which a waiting request goes first"
    )
    length_predictor: str = Field(
        "online",
        description="how output lengths are predicted: online (learns from every request), off, or "
        "the directory of a transformers classifier",
    )
    length_quantile: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.9, description="share of outputs that are to stay within the KV predicted for them"
    )
    length_timeout: Seconds = Field(
        0.05, description="longest wait for a transformers classifier's prediction"
    )
    length_state: Path | None = Field(
        None, description="file that keeps what was learnt about lengths; Redis keeps it too"
    )
    length_salt: SecretStr = Field(
        SecretStr(""),
        description="secret that enters the hashes of the length predictor; the same for all "
        "gateways of a pool",
    )
    record_lengths: Path | None = Field(
        None,
        description="file that prompts and their output lengths are appended to, in plain text, "
        "to train a classifier on; off if unset",
    )


class WorkerConfig(SchedulingConfig):
    """What both kinds of worker have."""

    worker_id: str = Field("", description="unique id; made up if empty")
    advertise_address: str = Field("", description="address that others use; --address if empty")
    device: str = Field("cpu", description="torch device")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="number format of weights and KV; auto is the model's own, or what runs it "
        "fast where that is slow",
    )
    quantization: Literal["none", "int8", "int4", "fp8"] = Field(
        "none",
        description="what weights become at load: int8; int4, in groups of 32 inputs on a CPU and "
        "of 128 on a GPU; fp8 (e4m3), on a GPU; on a CPU they need the compiled backend",
    )
    kv_dtype: Literal["auto", "int8", "fp8"] = Field(
        "auto",
        description="number format of KV: that of dtype, or int8 or fp8 (e4m3; not in the compiled "
        "CPU backend) with a scale per token and head; the same for all workers, or there are no "
        "hand-offs",
    )
    attention_backend: str = Field(
        "auto",
        description="what runs a pass: native (the compiled CPU backend), torch, triton (on GPUs), "
        "or auto for the fastest that can",
    )
    instruction_set: Literal["auto", "portable", "avx2", "avx512", "avx512_bf16", "amx"] = Field(
        "auto", description="instructions of the compiled backend; auto is the machine's best"
    )
    threads: Annotated[int, Field(ge=0)] = Field(
        0, description="threads of a pass; as many as there are cores if 0"
    )
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="processes, or GPUs, that share each layer; threads are shared out to them"
    )
    pipeline_parallel: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="stages that the layers are divided into, each of tensor_parallel processes"
    )
    shared_cores: str = Field(
        "",
        description="file through which workers on this host lend each other idle cores, and this "
        "one's place: PATH:FIRST:OWN:TOTAL",
    )
    block_size: Annotated[int, Field(ge=1, le=1024)] = Field(16, description="tokens per KV block")
    kv_blocks: Annotated[int, Field(ge=0)] = Field(0, description="KV blocks; by kv_memory if 0")
    kv_memory: Annotated[int, Field(ge=0)] = Field(
        0,
        description="bytes of KV cache if kv_blocks is 0; if this is 0 too, 512 MiB on a CPU, and "
        "on a GPU what it has free when the worker is warm",
    )
    device_memory: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9,
        description="share of a GPU's memory that this worker may have, for weights, passes and KV",
    )
    max_batch_tokens: Positive = Field(512, description="token budget of one pass")
    max_batch_sequences: Positive = Field(64, description="sequences in one pass")
    max_context: Annotated[int, Field(ge=0)] = Field(
        0, description="longest prompt plus output; the model's own limit if 0"
    )
    max_waiting: Positive = Field(1024, description="sequences held beyond the running batch")
    prefix_cache: bool = Field(
        True, description="reuse the KV of prompts that begin as others of their tenant did"
    )
    worker_ttl: Seconds = Field(5.0, description="a worker silent for this long is gone")
    record_run: Path | None = Field(
        None, description="file to record every scheduling decision in, to replay; off if unset"
    )


class PrefillConfig(WorkerConfig):
    """A prefill worker."""

    address: str = Field("127.0.0.1:50061", description="host:port of the worker's API")
    kv_address: str = Field("127.0.0.1:0", description="host:port of the KV data channel")
    kv_lease_seconds: Seconds = Field(30.0, description="first time to live of published KV")


class DecodeConfig(WorkerConfig):
    """A decode worker."""

    address: str = Field("127.0.0.1:50071", description="host:port of the worker's API")
    admission: Literal["paged", "reserve-predicted", "reserve-max"] = Field(
        "reserve-predicted", description="KV that must be free before a sequence is let in"
    )
    batching: Literal["splitfuse", "prefill-first"] = Field(
        "splitfuse", description="how prompts and generation share a pass"
    )
    preemption: Literal["recompute", "swap", "auto"] = Field(
        "auto",
        description="what becomes of the KV of a preempted sequence; host_kv_memory 0: recompute",
    )
    swapping: Literal["proactive", "reactive"] = Field(
        "proactive", description="KV is swapped ahead of need, or when it is needed"
    )
    host_kv_memory: Annotated[int, Field(ge=0)] = Field(
        0, description="bytes of host memory for the KV of preempted sequences"
    )
    swap_bandwidth: Annotated[float, Field(ge=0)] = Field(
        0.0, description="most bytes per second swapped each way; unlimited if 0"
    )
    swap_reserve: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.05, description="share of the KV blocks that proactive swapping keeps free for bursts"
    )
    kv_transports: str = Field("cuda_ipc,shm,tcp", description="KV transports to try, best first")
    kv_timeout: Seconds = Field(20.0, description="longest silence during a KV pull")
    reserve_timeout: Seconds = Field(
        60.0, description="longest time that reserved KV blocks wait for their prefill"
    )


class ServeConfig(ProcessConfig):
    """A local cluster: embedded Redis, one gateway, workers."""

    address: str = Field("127.0.0.1:50051", description="host:port of the public API")
    prefill_workers: Annotated[int, Field(ge=0)] = Field(1, description="prefill workers")
    decode_workers: Positive = Field(1, description="decode workers")
    start_timeout: Seconds = Field(120.0, description="longest wait until the cluster is ready")
    redis_url: SecretStr = Field(
        SecretStr(""), description="Redis to use; $REDIS_URL or an embedded server if empty"
    )
    device: str = Field(
        "cpu",
        description="torch device of the workers; if several are given, cuda:0,cuda:1, each worker "
        "gets one in turn, the decode workers first",
    )
    device_memory: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="share of a GPU's memory that the workers on it may have together"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="number format of weights and KV"
    )
    quantization: Literal["none", "int8", "int4", "fp8"] = Field(
        "none", description="what weights become at load; fp8 on GPUs"
    )
    kv_dtype: Literal["auto", "int8", "fp8"] = Field(
        "auto", description="number format of KV: that of dtype, or int8 or fp8"
    )
    threads: Annotated[int, Field(ge=0)] = Field(
        0, description="threads per worker; the cores shared out if 0"
    )
    lend_cores: bool = Field(
        False, description="whether workers compute on cores whose own worker has nothing to do"
    )
    block_size: Annotated[int, Field(ge=1, le=1024)] = Field(16, description="tokens per KV block")
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="processes, or GPUs, of a worker that share each layer"
    )
    pipeline_parallel: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="stages that each worker's layers are divided into"
    )
    kv_blocks: Annotated[int, Field(ge=0)] = Field(0, description="KV blocks per worker")
    host_kv_memory: Annotated[int, Field(ge=0)] = Field(
        0, description="bytes of host memory per decode worker for the KV of preempted sequences"
    )
    prefix_cache: bool = Field(
        True, description="reuse the KV of prompts that begin as others of their tenant did"
    )
    policy: Literal["fcfs", "mlfq", "skip-join-mlfq", "predicted-srpt"] = Field(
        "predicted-srpt", description="order in which requests wait and sequences run"
    )
    max_batch_tokens: Positive = Field(512, description="token budget of one pass")
    max_batch_sequences: Positive = Field(64, description="sequences in one pass")
    max_context: Annotated[int, Field(ge=0)] = Field(0, description="longest prompt plus output")

    @field_validator("address")
    @classmethod
    def _has_port(cls, value: str) -> str:
        if ":" not in value:
            raise ValueError("must be host:port")
        return value


C = TypeVar("C", bound=ProcessConfig)


def load(kind: type[C], flags: dict[str, Any], file: Path | None = None) -> C:
    """Read one process's configuration.

    `flags` holds only what the command line set. Raises ConfigError naming every bad field, and
    unknown keys of the file.
    """
    if file is not None:
        try:
            content = yaml.safe_load(file.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"configuration file {file}: {error}") from error
        if content is not None and not isinstance(content, dict):
            raise ConfigError(f"configuration file {file}: must be a mapping of flags to values")
    try:
        # `_yaml` travels through the init source: pydantic-settings has no per-call file.
        return kind(**{"_yaml": file, **flags})
    except ValidationError as error:
        lines = [
            f"--{str(e['loc'][0]).replace('_', '-') if e['loc'] else '?'}: {e['msg']}"
            for e in error.errors()
        ]
        raise ConfigError("; ".join(lines)) from error


def environment_names(kind: type[ProcessConfig]) -> dict[str, str]:
    """Field name to environment variable, for help texts and for starting child processes."""
    return {name: f"BATON_{name.upper()}" for name in kind.model_fields}


def redis_url_from_environment() -> str:
    """`$REDIS_URL`, the conventional name, or empty."""
    return os.environ.get("REDIS_URL", "")
