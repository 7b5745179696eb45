"""The search for the cheapest cluster that meets its SLOs.

    tune    the pass budget and the first quantum, on a cluster of about the right size, by
            successive halving: all candidates on a short run, the better half on a longer one
    size    for each number of prefill workers the fewest decode workers, by bisection
    prove   the cheapest one again, on a longer run with other arrivals; one more worker until
            it holds

More workers are taken to be never worse. Knows nothing of files, terminals or charts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from scheduling.cost import Work
from scheduling.mlfq import Mlfq
from scheduling.simulator.sizing import Answer, Layout, Question, Trial, Tuning, simulate_trial
from scheduling.simulator.traffic import Job

Progress = Callable[[str], None]
"""Told what is being tried."""


class Search:
    """One search. Deterministic."""

    def __init__(self, question: Question, progress: Progress = lambda line: None) -> None:
        self._question = question
        self._progress = progress
        self._trials: dict[tuple[Layout, Tuning, int, int], Trial] = {}
        self._jobs: dict[tuple[int, int], list[Job]] = {}

    def run(self) -> Answer:
        """Search. Takes from seconds to minutes."""
        question = self._question
        alone = self._alone()
        if not alone.meets:
            return Answer(None, self._hopeless(alone), [alone])
        answers = []
        for split in (False, True) if question.split else (False,):
            tuning = self._tune(self._guess(alone, split))
            answers.append(self._size(tuning, split))
        found = [best for best in answers if best is not None]
        trials = [t for (_, _, count, _), t in self._trials.items() if count == question.requests]
        if not found:
            return Answer(None, self._too_few(trials), trials)
        best = self._prove(min(found, key=self._cost))
        if best is None:
            return Answer(None, self._too_few(trials), trials)
        return Answer(best, self._binding(best), trials)

    # -- What a trial is -------------------------------------------------------------------

    def trial(self, layout: Layout, tuning: Tuning, count: int, seed: int) -> Trial:
        """Simulate one cluster; remembered."""
        key = (layout, tuning, count, seed)
        if key not in self._trials:
            self._progress(
                f"{layout}, passes of {tuning.max_tokens} tokens and {tuning.max_sequences} "
                f"sequences, {count} requests"
            )
            self._trials[key] = simulate_trial(
                self._question, layout, tuning, self._traffic(count, seed)
            )
        return self._trials[key]

    def _traffic(self, count: int, seed: int) -> list[Job]:
        if (count, seed) not in self._jobs:
            self._jobs[count, seed] = self._question.jobs(count, seed)
        return self._jobs[count, seed]

    # -- A first idea ----------------------------------------------------------------------

    def _alone(self) -> Trial:
        """Requests one at a time: no cluster is faster."""
        jobs = self._traffic(self._question.requests // 8, self._question.seed)
        apart = [replace(job, arrived_at=1e6 * number) for number, job in enumerate(jobs)]
        tuning = Tuning(max(self._question.token_budgets), 1, Mlfq())
        return replace(simulate_trial(self._question, Layout(0, 1), tuning, apart), stable=True)

    def _guess(self, alone: Trial, split: bool) -> tuple[Layout, int]:
        """About the right size, and the most sequences of a pass that keep the TPOT limit."""
        question = self._question
        jobs = self._traffic(question.requests, question.seed)
        rate = len(jobs) / max(jobs[-1].arrived_at, 1e-9)
        prompt = sum(job.prompt_tokens for job in jobs) / len(jobs)
        output = sum(job.output_tokens for job in jobs) / len(jobs)
        sequences, step = self._batch(prompt + output / 2)
        budget = max(question.token_budgets)
        cost = question.prefill.cost
        prefill = cost.base * prompt / budget + cost.per_token * prompt
        decode = output * step / sequences
        if not split:
            return self._clip(Layout(0, math.ceil(1.2 * rate * (prefill + decode)))), sequences
        helpers = max(1, math.ceil(1.2 * rate * prefill))
        return self._clip(Layout(helpers, max(1, math.ceil(1.2 * rate * decode)))), sequences

    def _clip(self, layout: Layout) -> Layout:
        most = self._question.max_workers
        return Layout(min(layout.prefill, most - 1), max(1, min(layout.decode, most)))

    def _batch(self, context: float) -> tuple[int, float]:
        """The largest batch of `context` tokens each that keeps the TPOT limit and fits the
        memory, and what a pass of it takes."""
        question = self._question
        profile, limit = question.decode, question.slo.tpot or math.inf
        room = profile.blocks * profile.block_size / context
        best = min(question.sequence_limits)
        for count in sorted(question.sequence_limits):
            seconds = profile.cost.seconds(Work(sequences=count, context=round(count * context)))
            if seconds <= 0.8 * limit and count <= room:
                best = count
        seconds = profile.cost.seconds(Work(sequences=best, context=round(best * context)))
        return best, seconds

    # -- Tune ------------------------------------------------------------------------------

    def _tune(self, guess: tuple[Layout, int]) -> Tuning:
        """The best of the candidates on this layout, by successive halving."""
        layout, sequences = guess
        question = self._question
        left = list(self._candidates(sequences))
        count = max(100, question.requests // 4)
        while len(left) > 1:
            tried = [self.trial(layout, tuning, count, question.seed) for tuning in left]
            tried.sort(key=lambda t: (t.score, max(t.usage.values())))
            left = [t.tuning for t in tried[: max(1, len(tried) // 2)]]
            count = min(question.requests, 2 * count)
        return left[0]

    def _candidates(self, sequences: int) -> Iterator[Tuning]:
        question = self._question
        step = question.decode.cost.seconds(Work(sequences=sequences, context=sequences * 500))
        levels = [Mlfq(quantum=round(step * times, 4)) for times in question.quanta]
        if question.policy_name == "fcfs":
            levels = [Mlfq()]
        for budget in question.token_budgets:
            for mlfq in levels:
                yield Tuning(max(budget, sequences), sequences, mlfq)

    # -- Size ------------------------------------------------------------------------------

    def _size(self, tuning: Tuning, split: bool) -> Trial | None:
        """The cheapest layout that meets the SLOs."""
        question = self._question
        best: Trial | None = None
        for helpers in range(1, question.max_workers) if split else (0,):
            ceiling = question.max_workers - helpers
            if best is not None:
                dearer = (self._cost(best) - question.price * helpers) - 1e-9
                ceiling = min(ceiling, math.ceil(dearer) - 1)
            if ceiling < 1:
                break
            found = self._fewest(helpers, ceiling, tuning)
            if found is not None:
                best = found
        return best

    def _fewest(self, helpers: int, ceiling: int, tuning: Tuning) -> Trial | None:
        """The fewest decode workers, up to `ceiling`, that do beside so many prefill workers."""

        def at(decode: int) -> Trial:
            question = self._question
            return self.trial(Layout(helpers, decode), tuning, question.requests, question.seed)

        low, high = 0, 1  # low does not do
        while not at(high).meets:
            if high == ceiling or self._useless(at(high), helpers):
                return None
            low, high = high, min(2 * high, ceiling)
        while high - low > 1:
            middle = (low + high) // 2
            if at(middle).meets:
                high = middle
            else:
                low = middle
        return at(high)

    def _useless(self, trial: Trial, helpers: int) -> bool:
        """More decode workers would not help: prompts cannot be computed fast enough."""
        return helpers > 0 and not trial.meets and self._prefill_share(helpers) > 1.0

    def _prefill_share(self, helpers: int) -> float:
        """How busy prompts alone keep so many prefill workers."""
        question = self._question
        jobs = self._traffic(question.requests, question.seed)
        cost = question.prefill.cost
        seconds = sum(cost.per_token * job.prompt_tokens for job in jobs)
        return seconds / (helpers * max(jobs[-1].arrived_at, 1e-9))

    def _cost(self, trial: Trial) -> float:
        return trial.layout.prefill * self._question.price + trial.layout.decode

    # -- Prove -----------------------------------------------------------------------------

    def _prove(self, found: Trial) -> Trial | None:
        """The same on a run twice as long with other arrivals, with more workers until it
        holds; or with fewer, if it holds with room to spare."""
        question, layout = self._question, found.layout
        if (proven := self._long(layout, found.tuning)).meets:
            return self._leaner(proven)
        while layout.prefill + layout.decode < question.max_workers:
            helper = bool(layout.prefill) and proven.limit == "TTFT"
            layout = Layout(layout.prefill + helper, layout.decode + (not helper))
            if (proven := self._long(layout, found.tuning)).meets:
                return proven
        return None

    def _leaner(self, proven: Trial) -> Trial:
        while proven.layout.decode > 1:
            fewer = self._long(self._without_one(proven.layout), proven.tuning)
            if not fewer.meets:
                break
            proven = fewer
        return proven

    def _long(self, layout: Layout, tuning: Tuning) -> Trial:
        question = self._question
        return self.trial(layout, tuning, 2 * question.requests, question.seed + 1)

    @staticmethod
    def _without_one(layout: Layout) -> Layout:
        return Layout(layout.prefill, layout.decode - 1)

    # -- Reasons ---------------------------------------------------------------------------

    def _hopeless(self, alone: Trial) -> str:
        if alone.outcome.rejected:
            return (
                f"{alone.outcome.rejected} of {self._question.requests // 8} requests are longer "
                f"than a worker can hold"
            )
        name = alone.limit
        return (
            f"even one request at a time misses the {name} limit: its P"
            f"{self._question.slo.percentile:g} is {alone.usage[name]:.2f} times the limit"
        )

    def _too_few(self, trials: Sequence[Trial]) -> str:
        largest = max(trials, key=lambda t: (t.layout.prefill + t.layout.decode, -t.score))
        if largest.outcome.rejected:
            return f"{largest.outcome.rejected} requests are longer than a worker can hold"
        if not largest.stable:
            return f"{largest.layout} do not keep up with the arrivals"
        over = largest.usage[largest.limit]
        return f"{largest.layout} still miss {largest.limit}, by a factor of {over:.2f}"

    def _binding(self, best: Trial) -> str:
        """What breaks first with a decode worker less."""
        layout = best.layout
        if layout.decode == 1:
            return f"{best.limit} is used most: {best.usage[best.limit]:.0%} of its limit"
        fewer = self._long(self._without_one(layout), best.tuning)
        if fewer.meets:
            return f"{best.limit}: it took one worker more to hold it on every run"
        if not fewer.stable:
            return f"throughput: {fewer.layout} do not keep up with the arrivals"
        over = fewer.usage[fewer.limit]
        return f"{fewer.limit}: with {fewer.layout} it is {over:.2f} times the limit"
