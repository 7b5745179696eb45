"""A whole pass of the compiled library against the same pass in torch, in float32."""

from __future__ import annotations

import random
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from engine.attention.contract import Batch
from engine.attention.reference import TorchAttention
from engine.model.config import ModelConfig
from engine.model.llama import Llama
from engine.model.pool import KvGeometry, KvPool
from engine.native.library import Format, Isa, Library
from engine.native.model import CompiledLlama, StepOptions

VOCAB = 203
LONGEST = 600
SEQUENCES = 5
BLOCK = 16
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "intermediate_size": 208,
    "max_position_embeddings": 1024,
}


def _heads(heads: int, kv_heads: int, dim: int) -> dict[str, Any]:
    return _SIZES | {
        "hidden_size": 16 * heads,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
    }


CONFIGS: dict[str, PretrainedConfig] = {
    "heads-of-16": LlamaConfig(**_heads(3, 3, 16)),
    "heads-of-48": LlamaConfig(**_heads(6, 2, 48)),
    "heads-of-64-tied": LlamaConfig(**_heads(9, 3, 64), tie_word_embeddings=True),
    "heads-of-80-seven-to-one": LlamaConfig(**_heads(7, 1, 80), hidden_act="gelu"),
    "heads-of-128-biases": LlamaConfig(**_heads(4, 4, 128), attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**_heads(6, 2, 32)),
    "qwen3": Qwen3Config(**_heads(6, 2, 64)),
    "narrow-window": MistralConfig(**_heads(6, 2, 32), sliding_window=37),
    "wide-window": MistralConfig(**_heads(6, 2, 32), sliding_window=200),
}

# Passes over shared sequences, as (sequence, start, length): prompts, chunks that go on, and single
# tokens, also beside one another.
PASSES = (
    ((0, 0, 150), (1, 0, 7), (2, 0, 1)),
    ((0, 150, 1), (1, 7, 1), (2, 1, 40), (3, 0, 450)),
    ((0, 151, 1), (1, 8, 90), (2, 41, 1), (3, 450, 30), (4, 0, 3)),
    ((3, 480, 1),),
)


class RandomCheckpoint:
    """Weights by name, the same ones whoever asks, in the place of a Checkpoint."""

    device = "cpu"

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._tensors: dict[str, Tensor] = {}

    def mapped(self, name: str, *shape: int) -> Tensor:
        if name not in self._tensors:
            seed = int.from_bytes(name.encode()[-24:], "little") % 2**31 + len(name)
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            if "norm" in name:
                noise = 1 + 0.1 * noise
            elif name.endswith("weight") and "embed" not in name:
                noise = noise * shape[-1] ** -0.5
            self._tensors[name] = noise
        return self._tensors[name]

    def __call__(self, name: str, *shape: int) -> Tensor:
        return self.mapped(name, *shape).to(self.dtype, copy=True)

    def forget(self, name: str) -> None:
        pass


def read(source: PretrainedConfig) -> ModelConfig:
    """`source` as `read_config` would have read it from a directory."""
    return ModelConfig(
        path=Path("random"),
        architecture=type(source).__name__.replace("Config", "ForCausalLM"),
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        layers=source.num_hidden_layers,
        heads=source.num_attention_heads,
        max_context=source.max_position_embeddings,
        dtype=torch.float32,
        tied=source.tie_word_embeddings,
        source=source,
    )


@dataclass
class Served:
    """One model over a pool of its own, and the sequences that its passes are cut from."""

    model: Llama | CompiledLlama
    pool: KvPool

    def logits(self, chunks: Items[tuple[int, int, int]]) -> Tensor:
        """All logits of a pass, float32."""
        return self.model.forward(batch_of(chunks, self.pool), self.pool).logits.float()

    def best(self, chunks: Items[tuple[int, int, int]]) -> Tensor:
        """The tokens with the largest logits of all rows of a pass."""
        batch = replace(batch_of(chunks, self.pool), whole_rows=0)
        return self.model.forward(batch, self.pool).best


def torch_model(name: str, dtype: torch.dtype = torch.float32) -> Served:
    checkpoint: Any = RandomCheckpoint(dtype)
    model = Llama(read(CONFIGS[name]), checkpoint, TorchAttention())
    return Served(model, _pool(model, dtype, BLOCK, fill=0.0))


def compiled_model(
    library: Library,
    name: str,
    *,
    isa: Isa | None = None,
    dtype: torch.dtype = torch.float32,
    block_size: int = BLOCK,
    threads: int = 2,
    quantization: Format | None = None,
) -> Served:
    """Its pool holds nothing but NaN: a pass reads only what passes wrote."""
    checkpoint: Any = RandomCheckpoint(dtype)
    options = StepOptions(
        dtype=dtype,
        kv_dtype=dtype,
        quantization=quantization,
        block_size=block_size,
        max_tokens=1024,
        threads=threads,
        isa=library.isa if isa is None else isa,
    )
    model = CompiledLlama(read(CONFIGS[name]), checkpoint, library, options)
    return Served(model, _pool(model, dtype, block_size, fill=float("nan")))


def _pool(model: Llama | CompiledLlama, dtype: torch.dtype, block_size: int, fill: float) -> KvPool:
    geometry = KvGeometry(
        model_fingerprint="random",
        layers=model.layers,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        dtype=str(dtype).removeprefix("torch."),
        block_size=block_size,
        item_size=dtype.itemsize,
    )
    pool = KvPool(geometry, SEQUENCES * -(-LONGEST // block_size))
    pool.storage.fill_(fill)
    return pool


def batch_of(chunks: Items[tuple[int, int, int]], pool: KvPool) -> Batch:
    """A pass over sequences of random tokens whose blocks lie scattered; all rows are wanted."""
    size, order = pool.block_size, list(range(pool.blocks))
    random.Random(0).shuffle(order)
    tokens = torch.randint(VOCAB, (SEQUENCES, LONGEST), generator=torch.Generator().manual_seed(0))
    each = pool.blocks // SEQUENCES
    blocks = [order[i * each : (i + 1) * each] for i in range(SEQUENCES)]
    where = [(s, p) for s, start, length in chunks for p in range(start, start + length)]
    width = max(-(-(start + length) // size) for _, start, length in chunks)
    tables = []
    for sequence, start, length in chunks:
        used = blocks[sequence][: -(-(start + length) // size)]
        tables.append(used + used[-1:] * (width - len(used)))
    return Batch(
        token_ids=torch.stack([tokens[s, p] for s, p in where]),
        positions=torch.tensor([p for _, p in where]),
        slots=torch.tensor([blocks[s][p // size] * size + p % size for s, p in where]),
        starts=tuple(start for _, start, _ in chunks),
        lengths=tuple(length for _, _, length in chunks),
        block_tables=torch.tensor(tables),
        prompt_lengths=tuple(start + length for _, start, length in chunks),
        logit_rows=torch.arange(len(where)),
        whole_rows=len(where),
    )


def worst(served: Served, reference: Served) -> float:
    """The largest difference over all passes, as a share of the largest logit."""
    differences = []
    for chunks in PASSES:
        wanted, found = reference.logits(chunks), served.logits(chunks)
        assert found.isfinite().all()
        differences.append(float((found - wanted).abs().max() / wanted.abs().max()))
    return max(differences)


def isas(library: Library) -> list[Isa]:
    return [isa for isa in Isa if isa <= library.isa]


@pytest.mark.parametrize("name", CONFIGS)
def test_passes_in_float32_equal_torch(library: Library, name: str) -> None:
    for isa in isas(library):
        served = compiled_model(library, name, isa=isa)
        assert worst(served, torch_model(name)) < 1e-5, isa


@pytest.mark.parametrize("block_size", [1, 2, 32, 128])
def test_blocks_of_any_power_of_two(library: Library, block_size: int) -> None:
    served = compiled_model(library, "narrow-window", block_size=block_size)
    assert worst(served, torch_model("narrow-window")) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_is_as_near_to_float32_as_torch_in_bfloat16(library: Library, name: str) -> None:
    bound = worst(torch_model(name, torch.bfloat16), torch_model(name))
    for isa in isas(library):
        served = compiled_model(library, name, isa=isa, dtype=torch.bfloat16)
        assert worst(served, torch_model(name)) < bound, isa


@pytest.mark.parametrize(("weights", "bound"), [(Format.INT8, 0.05), (Format.INT4, 0.25)])
def test_quantized_weights_stay_near_float32(
    library: Library, weights: Format, bound: float
) -> None:
    for isa in isas(library):
        served = compiled_model(
            library, "heads-of-64-tied", isa=isa, dtype=torch.bfloat16, quantization=weights
        )
        assert worst(served, torch_model("heads-of-64-tied")) < bound, isa


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_single_token_gets_the_same_numbers_in_every_batch(
    library: Library, dtype: torch.dtype
) -> None:
    for isa in isas(library):
        beside, alone = (
            compiled_model(library, "heads-of-64-tied", isa=isa, dtype=dtype) for _ in range(2)
        )
        for served in (beside, alone):
            served.logits(((0, 0, 300), (1, 0, 130)))
        together = beside.logits(((2, 0, 17), (1, 130, 1), (0, 300, 1), (3, 0, 140)))
        assert torch.equal(together[18], alone.logits(((0, 300, 1),))[0]), isa
        assert torch.equal(together[17], alone.logits(((1, 130, 1),))[0]), isa


@pytest.mark.parametrize("threads", [1, 3])
def test_results_do_not_depend_on_threads(library: Library, threads: int) -> None:
    one, other = (
        compiled_model(library, "qwen2", threads=count, dtype=torch.bfloat16)
        for count in (2, threads)
    )
    for chunks in PASSES:
        assert torch.equal(one.logits(chunks), other.logits(chunks))


def test_the_best_token_is_that_of_the_logits(library: Library) -> None:
    for isa in isas(library):
        served = compiled_model(library, "heads-of-64-tied", isa=isa)
        for chunks in PASSES:
            assert torch.equal(served.best(chunks), served.logits(chunks).argmax(-1)), isa


def test_equal_logits_choose_the_lowest_token(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = RandomCheckpoint.mapped

    def doubled(self: RandomCheckpoint, name: str, *shape: int) -> Tensor:
        tensor = whole(self, name, *shape)
        return tensor if name != "lm_head.weight" else torch.cat((tensor[:101], tensor[:102]))

    monkeypatch.setattr(RandomCheckpoint, "mapped", doubled)
    served = compiled_model(library, "qwen2")
    logits = served.logits(PASSES[0])
    assert torch.equal(logits[:, :101], logits[:, 101:202])
    best = served.best(PASSES[0])
    assert best.max() < 101
    assert torch.equal(best, logits[:, :101].argmax(-1))


def test_broken_tokens_and_slots_are_refused(library: Library) -> None:
    served = compiled_model(library, "qwen2")
    good = batch_of(PASSES[0], served.pool)
    bad = [
        replace(good, token_ids=good.token_ids.index_fill(0, torch.tensor([3]), VOCAB)),
        replace(good, token_ids=good.token_ids.index_fill(0, torch.tensor([3]), -1)),
        replace(good, slots=good.slots.index_fill(0, torch.tensor([3]), -1)),
        replace(good, logit_rows=good.logit_rows + 1),
        replace(good, lengths=(150, 7, 2)),
        replace(good, block_tables=good.block_tables[:, :2].contiguous()),
    ]
    for batch in bad:
        with pytest.raises(RuntimeError, match="compiled backend"):
            served.model.forward(batch, served.pool)
    assert served.logits(PASSES[0]).isfinite().all()


def test_a_pass_beyond_the_scratch_is_refused(library: Library) -> None:
    served = compiled_model(library, "qwen2")
    with pytest.raises(RuntimeError, match="1025 tokens"):
        served.logits(((0, 0, 600), (1, 0, 425)))


@pytest.mark.parametrize("name", ["heads-of-64-tied", "qwen3"])
def test_chunks_of_a_prompt_give_what_the_prompt_gives(library: Library, name: str) -> None:
    whole, parts = (compiled_model(library, name) for _ in range(2))
    wanted = whole.logits(((0, 0, 200),))
    cuts = (0, 1, 16, 99, 130, 200)
    found = [parts.logits(((0, a, b - a),)) for a, b in pairwise(cuts)]
    assert torch.equal(torch.cat(found), wanted)
