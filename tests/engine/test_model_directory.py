"""What is served and what is refused at load, and why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from baton.errors import ConfigError, ModelError
from engine.load import load_executor
from engine.model.weights import fingerprint

PROMPT = [5, 17, 3, 44, 101, 9]


def small_llama(**changes: Any) -> LlamaConfig:
    """A Llama of four narrow layers."""
    sizes: dict[str, Any] = {
        "vocab_size": 199,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    return LlamaConfig(**sizes | changes)


@pytest.fixture
def directory(tiny: Callable[..., Any], tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to spoil."""
    return Path(shutil.copytree(tiny("llama").path, tmp_path / "model"))


def rewrite_config(directory: Path, **changes: Any) -> None:
    """Change config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change model.safetensors."""
    file = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_sharded_checkpoints_are_read_through_their_index(
    save: Callable[..., Any], drive: Callable[..., Any], tmp_path: Path
) -> None:
    model = save(small_llama(), tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    driver = drive(tmp_path)
    sequence = driver.add(PROMPT, 12)
    driver.run()
    model.assert_generates(PROMPT, sequence.tokens[len(PROMPT) :])


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_run_as_float32_exactly(
    stored: torch.dtype, save: Callable[..., Any], drive: Callable[..., Any], tmp_path: Path
) -> None:
    model = save(small_llama(), tmp_path, dtype=stored)
    driver = drive(tmp_path, dtype="float32")
    assert driver.executor.pool.geometry.dtype == "float32"
    sequence = driver.add(PROMPT, 12)
    driver.run()
    model.assert_generates(PROMPT, sequence.tokens[len(PROMPT) :])


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_can_run_in_their_own_dtype(
    stored: torch.dtype, save: Callable[..., Any], drive: Callable[..., Any], tmp_path: Path
) -> None:
    model = save(small_llama(tie_word_embeddings=True), tmp_path, dtype=stored)
    driver = drive(tmp_path, budget=4, dtype=str(stored).removeprefix("torch."))
    assert driver.executor.pool.geometry.dtype == str(stored).removeprefix("torch.")
    assert driver.executor.pool.storage.dtype is stored
    sequence = driver.add(PROMPT, 8, logprobs=0)
    driver.run()
    found = [s.logprob for _, r in driver.results for s in r.sampled if s is not None]
    with torch.inference_mode():
        exact = model.reference(torch.tensor([sequence.tokens])).logits[0].log_softmax(-1)
    for position, logprob in enumerate(found, start=len(PROMPT) - 1):
        token = sequence.tokens[position + 1]
        assert logprob.logprob == pytest.approx(exact[position, token].item(), abs=0.5)


def test_bfloat16_runs_as_float32_where_the_processor_would_emulate_it(
    save: Callable[..., Any], drive: Callable[..., Any], tmp_path: Path
) -> None:
    save(small_llama(), tmp_path, dtype=torch.bfloat16)
    runs = drive(tmp_path, dtype="auto").executor.pool.geometry.dtype
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert runs == ("bfloat16" if supported else "float32")


def test_checkpoints_of_the_bare_opt_decoder_are_understood(
    tiny: Callable[..., Any], drive: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny("opt")
    directory = Path(shutil.copytree(model.path, tmp_path / "model"))

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    rewrite_weights(directory, strip)
    driver = drive(directory)
    sequence = driver.add(PROMPT, 8)
    driver.run()
    model.assert_generates(PROMPT, sequence.tokens[len(PROMPT) :])


@pytest.mark.parametrize("name", ["rope-linear", "rope-dynamic", "rope-llama3", "rope-yarn"])
@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_rope_scaling_is_read_as_older_checkpoints_write_it(
    name: str, kind: str, tiny: Callable[..., Any], drive: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny(name)
    directory = Path(shutil.copytree(model.path, tmp_path / "model"))
    config = json.loads((directory / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = scaling | {kind: scaling.pop("rope_type")}
    (directory / "config.json").write_text(json.dumps(config))
    driver = drive(directory)
    prompt = PROMPT * 7  # longer than the trained length of all of them
    sequence = driver.add(prompt, 12)
    driver.run()
    model.assert_generates(prompt, sequence.tokens[len(prompt) :])


def test_a_configuration_without_rope_has_the_usual_one(
    tiny: Callable[..., Any], drive: Callable[..., Any], directory: Path
) -> None:
    config = json.loads((directory / "config.json").read_text())
    del config["rope_parameters"]
    (directory / "config.json").write_text(json.dumps(config))
    driver = drive(directory)
    sequence = driver.add(PROMPT, 12)
    driver.run()
    tiny("llama").assert_generates(PROMPT, sequence.tokens[len(PROMPT) :])


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model directory"):
        load_executor(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("config.json", "config.json"),
        ("tokenizer.json", "no tokenizer"),
        ("model.safetensors", "no .*safetensors"),
    ],
)
def test_a_directory_that_lacks_a_file_is_refused(directory: Path, file: str, reason: str) -> None:
    (directory / file).unlink()
    if file == "tokenizer.json":
        (directory / "tokenizer_config.json").unlink(missing_ok=True)
    with pytest.raises(ModelError, match=reason):
        load_executor(directory)


def test_pickled_weights_are_never_loaded(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickled weights, which are never loaded"):
        load_executor(directory)


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_truncated_weights_are_refused(directory: Path, kept: int) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match="damaged or incomplete"):
        load_executor(directory)


def test_a_missing_tensor_is_named(directory: Path) -> None:
    rewrite_weights(directory, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.* is missing"):
        load_executor(directory)


def test_a_tensor_of_another_shape_is_named(directory: Path) -> None:
    rewrite_weights(directory, lambda t: t.update({"model.norm.weight": torch.ones(47)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight.*\(47,\).*\(48,\)"):
        load_executor(directory)


def test_integer_weights_are_refused(directory: Path) -> None:
    rewrite_weights(
        directory, lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)})
    )
    with pytest.raises(ModelError, match="int8"):
        load_executor(directory)


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"weight_map": {"a": "absent.safetensors"}}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index_is_refused(directory: Path, index: str) -> None:
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"index\.json"):
        load_executor(directory)


def test_an_index_cannot_point_out_of_the_directory(directory: Path) -> None:
    shutil.copy(directory / "model.safetensors", directory.parent / "other.safetensors")
    index = {"weight_map": {"model.norm.weight": "../other.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="not there"):
        load_executor(directory)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_hidden_layers": "two"}, "config.json"),
        ({"architectures": None}, "architectures"),
        ({"architectures": ["A", "B"]}, "architectures"),
        ({"model_type": "no-such-model"}, "config.json"),
        ({"num_key_value_heads": 4}, "6 heads cannot share 4"),
        ({"hidden_act": "wobble"}, "wobble"),
        ({"intermediate_size": 95}, r"mlp\.gate_proj\.weight"),
        ({"vocab_size": 200}, r"embed_tokens\.weight"),
        ({"num_hidden_layers": 3}, r"layers\.2\..*is missing"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq checkpoints with bits None"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "spiral"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(
    directory: Path, changes: dict[str, Any], reason: str
) -> None:
    rewrite_config(directory, **changes)
    with pytest.raises(ModelError, match=reason):
        load_executor(directory)


def test_a_configuration_that_is_no_json_is_refused(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "llama"')
    with pytest.raises(ModelError, match=r"config\.json"):
        load_executor(directory)


def test_code_in_the_model_directory_is_never_run(directory: Path) -> None:
    trap = directory / "configuration_trap.py"
    trap.write_text(f"open({str(directory / 'sprung')!r}, 'w').close()\n")
    auto_map = {"AutoConfig": "configuration_trap.Trap", "AutoModelForCausalLM": "x.Y"}
    rewrite_config(directory, model_type="trap", auto_map=auto_map)
    with pytest.raises(ModelError):
        load_executor(directory)
    assert not (directory / "sprung").exists()


def test_other_safetensors_beside_the_model_are_left_alone(directory: Path) -> None:
    (directory / "adapter.safetensors").write_bytes(b"not a model")
    load_executor(directory)


def test_the_fingerprint_follows_configuration_and_weights(directory: Path) -> None:
    before = fingerprint(directory)
    assert fingerprint(directory) == before
    rewrite_weights(directory, lambda t: t["model.norm.weight"].add_(1))
    changed = fingerprint(directory)
    assert changed != before
    rewrite_config(directory, rms_norm_eps=1e-3)
    assert fingerprint(directory) not in (before, changed)


def test_the_pool_is_no_larger_than_the_batch_can_use(directory: Path) -> None:
    executor = load_executor(directory, max_batch_sequences=3, max_context=50)
    assert executor.capacity.blocks == 3 * 4
    assert executor.capacity.max_context == 50


def test_the_pool_fits_the_memory_it_is_given(directory: Path) -> None:
    memory = 10_000
    executor = load_executor(directory, kv_memory=memory)
    block = executor.pool.block_bytes
    assert executor.capacity.blocks == memory // block > 0
    assert load_executor(directory, kv_memory=memory, kv_blocks=77).capacity.blocks == 77


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"kv_memory": 100}, "--kv-memory"),
        ({"max_context": 129}, "--max-context"),
        ({"attention_backend": "magic"}, "--attention-backend"),
    ],
)
def test_parameters_that_cannot_work_name_their_flag(
    directory: Path, options: dict[str, Any], flag: str
) -> None:
    with pytest.raises(ConfigError, match=flag):
        load_executor(directory, **options)
