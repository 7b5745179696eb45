"""Sampling parameters do what their comments in the protos say, against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from baton.client import Client
from tests.e2e.answers import PROMPT, ask
from tests.e2e.conftest import Stack
from tests.engine.conftest import TinyModel

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_seeds_are_echoed_and_repeatable(client: Client) -> None:
    for seed in (0, 1, 2**64 - 1):
        one, two = [await ask(client, seed=seed, temperature=1.0) for _ in range(2)]
        assert one.ids == two.ids
        assert one.ended[0].seed == seed
    unset = [await ask(client, temperature=1.0) for _ in range(3)]
    assert len({answer.ended[0].seed for answer in unset}) == 3
    again = await ask(client, temperature=1.0, seed=unset[0].ended[0].seed)
    assert again.ids == unset[0].ids


async def test_sequences_are_different_and_end_each_for_itself(client: Client) -> None:
    options: dict[str, Any] = {"n": 16, "seed": 3, "temperature": 1.0}
    plain = await ask(client, **options)
    assert len({tuple(ids) for ids in plain.ids}) == 16
    stop = str(plain.ids[5][4])
    cut = await ask(client, stop=[stop], **options)
    early = 0
    for ids, whole, ended in zip(cut.ids, plain.ids, cut.ended, strict=True):
        hits = (i + 1 for i in range(20) if stop in " ".join(map(str, whole[: i + 1])))
        count = next(hits, 20)
        early += count < 20
        assert (ids, ended.completion_tokens) == (whole[:count], count)
    assert 0 < early < 16
    assert cut.usage.completion_tokens == sum(map(len, cut.ids))
    assert cut.usage.total_tokens == cut.usage.completion_tokens + len(PROMPT)


async def test_a_sequence_that_a_stop_string_ended_is_not_computed_any_further(
    stack: Stack, client: Client
) -> None:
    options: dict[str, Any] = {"n": 2, "seed": 3, "temperature": 1.0}
    stop = (await ask(client, **options)).texts[0][-12:]
    first, other = (await ask(client, stop=[stop], max_tokens=1000, **options)).ended
    assert (first.stop, first.completion_tokens) == (stop, 20)
    assert other.completion_tokens == 1000
    passes = [record.work.sequences for record in stack.decode[0].worker.engine.recent]
    assert passes.count(1) > 500


EXTREMES: dict[str, dict[str, Any]] = {
    "top_k 1": {"top_k": 1},
    "tiny top_p": {"top_p": 1e-6},
    "min_p 1": {"min_p": 1.0},
    "tiny temperature": {"temperature": 1e-30},
    "no temperature": {"temperature": 0.0, "top_k": 3},
}


@pytest.mark.parametrize("case", EXTREMES)
async def test_every_way_to_keep_one_token_is_greedy(
    client: Client, model: TinyModel, case: str
) -> None:
    answer = await ask(client, **{"temperature": 1.0} | EXTREMES[case])
    model.assert_generates(PROMPT, answer.ids[0])


async def test_bias_and_allowed_tokens_rule_what_comes(client: Client) -> None:
    plain = (await ask(client)).ids[0]
    assert (await ask(client, logit_bias={77: 100.0})).ids == [[77] * 20]
    assert plain[0] not in (await ask(client, logit_bias={plain[0]: -100.0})).ids[0]
    assert (await ask(client, allowed_token_ids=[77])).ids == [[77] * 20]
    hot = await ask(client, allowed_token_ids=[7, 8, 2], temperature=100.0, max_tokens=60)
    assert set(hot.ids[0]) == {7, 8, 2}
    ended = await ask(client, allowed_token_ids=[7, 2], logit_bias={2: 100}, ignore_eos=False)
    assert (ended.ids, ended.ended[0].eos_token_id) == ([[2]], 2)


async def test_penalties_are_those_of_the_formulas(client: Client, model: TinyModel) -> None:
    """Presence and frequency as OpenAI defines them, repetition as Keskar et al. 2019."""
    for presence, frequency, repetition in ((1.5, 0, 1), (0, 0.8, 1), (-1, 0.5, 1.2)):
        answer = await ask(
            client,
            presence_penalty=presence,
            frequency_penalty=frequency,
            repetition_penalty=repetition,
            logit_bias={7: 2.5},
        )
        output = answer.ids[0]
        with torch.inference_mode():
            logits = model.reference(torch.tensor([PROMPT + output])).logits[0].double()
        for i, token in enumerate(output):
            scores = logits[len(PROMPT) - 1 + i].clone()
            for seen in {*PROMPT, *output[:i]}:
                scores[seen] *= repetition if scores[seen] < 0 else 1 / repetition
            for seen in set(output[:i]):
                scores[seen] -= presence + frequency * output[:i].count(seen)
            scores[7] += 2.5
            assert scores[token] >= scores.max() - 1e-4


async def test_logprobs_of_every_sequence_are_those_of_transformers(
    client: Client, model: TinyModel
) -> None:
    for count in (0, 2):
        answer = await ask(client, n=3, logprobs=count, temperature=1.5, seed=1, top_k=20)
        for index in range(3):
            ids, entries = answer.ids[index], answer.logprobs(index)
            assert [entry.token_id for entry in entries] == ids
            with torch.inference_mode():
                logits = model.reference(torch.tensor([PROMPT + ids])).logits[0]
            rows = logits.log_softmax(-1)[len(PROMPT) - 1 :]
            for row, entry in zip(rows, entries, strict=False):
                assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
                assert entry.rank == 1 + int((row > row[entry.token_id]).sum())
                assert [top.token_id for top in entry.top] == row.topk(count).indices.tolist()
