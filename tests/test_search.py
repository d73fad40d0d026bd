"""Attempts that react to what the selection samples show, with work and losses that are known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimline.basics.errors import SlimlineError
from slimline.measure import Cost, Part
from slimline.recipe import Budget, load_recipe
from slimline.search.attempts import ATTEMPTS, search
from slimline.search.fit import Fit
from slimline.search.ladder import Rung


class World:
    """A ladder whose losses are known; rung 0 does nothing. `journal` is what a run would keep."""

    def __init__(self, losses, budget, shapes=None):
        recipe = load_recipe("auto").model_copy(update={"budget": budget, "fit": False})
        self.rungs = tuple(Rung(f"rung {i}", recipe) for i in range(len(losses)))
        self.losses, self.budget, self.shapes = losses, budget, shapes or list(range(len(losses)))
        self.worked, self.measured, self.journal = [], [], {}

    def number(self, rung):
        return int(rung.name.split()[1])

    def work(self, attempt):
        self.worked.append((attempt.number, self.number(attempt.rung)))
        return self.number(attempt.rung)

    def measure(self, rung):
        self.measured.append(rung)
        return Cost(size=Part.exact(1, 2)), self.losses[rung]

    def decide(self, name, choose):
        if name not in self.journal:
            self.journal[name] = choose()
        return self.journal[name]

    def run(self, fitted=None):
        return search(
            self.rungs,
            1,
            fitted or Fit(rung=1),
            self.budget,
            self.work,
            self.measure,
            lambda rung: str(self.shapes[self.number(rung)]),
            self.decide,
        )


LOSSES = st.integers(0, 200).map(lambda thousandths: thousandths / 1000)


@given(st.lists(LOSSES, min_size=1, max_size=40), LOSSES)
def test_without_other_limits_as_much_is_compressed_as_accuracy_lets(losses, max_drop):
    losses = [0.0, *sorted(losses)]
    world = World(losses, Budget(max_drop=max_drop))
    found = world.run()
    tried = [rung for _, rung in world.worked]
    passing = [rung for rung in tried if losses[rung] <= max_drop]
    assert found.result == max(passing), "the strongest of those that were tried and lose little enough"
    assert len(tried) <= ATTEMPTS + 1
    assert not found.conflict
    if losses[1] <= max_drop and len(losses) > 2:
        assert tried[0] == 1, "it begins without pruning"
    if losses[1] > max_drop:
        assert tried == [1, 0], "and where that loses too much nothing is done"
    if len(losses) <= 16:
        assert found.result == max(i for i, loss in enumerate(losses) if loss <= max_drop)


def test_every_attempt_is_told_with_its_reason():
    world = World([0, 0.001, 0.004, 0.02, 0.05], Budget(max_drop=0.01))
    found = world.run()
    rows = {row.settings["strength"]: row for row in found.trials}
    assert {row.settings["attempt"] for row in found.trials} == set(range(1, len(rows) + 1))
    assert rows["rung 2"].chosen and "0.004 lost, within 0.01" in rows["rung 2"].reason
    assert not rows["rung 3"].chosen and "0.02 lost, the budget allows 0.01" in rows["rung 3"].reason
    assert "another was stronger" in rows["rung 1"].reason
    assert all(row.stage == "attempt" and row.drop is not None for row in found.trials)


def test_stages_of_later_attempts_have_names_of_their_own():
    world = World([0, 0.0, 0.0, 0.5, 0.5, 0.5], Budget(max_drop=0.01))
    seen = []
    work = world.work
    world.work = lambda attempt: seen.append(attempt.prefix) or work(attempt)
    world.run()
    assert seen[0] == "" and len(set(seen)) == len(seen) > 1


def test_with_other_limits_the_mildest_that_meets_them_is_enough():
    world = World([0, 0.001, 0.002, 0.003, 0.004], Budget(max_drop=0.01, max_latency=0.5))
    assert world.run(Fit(rung=3)).result == 3
    assert world.worked == [(1, 3)]


def test_a_loss_too_large_steps_back_as_far_as_the_clock_leaves_open():
    world = World([0, 0.001, 0.004, 0.02, 0.05], Budget(max_drop=0.01, max_latency=0.5))
    found = world.run(Fit(rung=4, milder=(3, 2)))
    assert world.worked == [(1, 4), (2, 3), (3, 2)]
    assert found.result == 2 and not found.conflict


def test_limits_that_conflict_are_said_with_the_best_that_was_reached():
    world = World([0, 0.001, 0.004, 0.03, 0.05], Budget(max_drop=0.01, max_latency=0.5))
    found = world.run(Fit(rung=4, milder=(3,)))
    assert found.result == 3
    assert found.conflict.startswith("the limits conflict")
    assert "0.03 lost and the budget allows 0.01" in found.conflict
    (row,) = [row for row in found.trials if row.chosen]
    assert "the least that was reached" in row.reason


def test_a_drop_of_exactly_the_limit_is_within_it():
    world = World([0, 0.99 - 0.98], Budget(max_drop=0.01))
    assert world.losses[1] > 0.01
    assert world.run().result == 1


def test_rungs_of_the_same_shapes_are_attempted_once():
    shapes = [0, 1] + [1 + i // 8 for i in range(31)]
    world = World([0.0] * 33, Budget(max_drop=0.01), shapes)
    world.run()
    tried = [shapes[rung] for _, rung in world.worked]
    assert len(tried) == len(set(tried))


def test_without_a_limit_on_the_drop_nothing_is_measured():
    world = World([0, 0.5, 0.5], Budget(max_drop=None, max_latency=0.5))
    assert world.run(Fit(rung=2)).result == 2
    assert not world.measured


def test_without_selection_samples_the_first_attempt_stands_and_that_is_said():
    world = World([0, None, None], Budget(max_drop=0.01, max_latency=0.5))
    found = world.run(Fit(rung=2))
    assert found.result == 2
    assert "no selection samples" in found.trials[-1].reason


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("attempt-1", {"strength": "rung 1", "cost": {}, "drop": "none"}),
        ("attempt-1", {"strength": "rung 1", "drop": 0.0}),
        ("attempt-1", {}),
        ("shapes-1", {"shapes": ["a"]}),
        ("shapes-1", {}),
    ],
)
def test_a_journal_that_was_changed_is_refused_in_a_sentence(name, record):
    world = World([0, 0.0, 0.0], Budget(max_drop=0.01))
    world.journal[name] = record
    with pytest.raises(SlimlineError, match=r"^What the run's journal holds of .* is damaged: start a new run"):
        world.run()


@given(st.lists(LOSSES, min_size=2, max_size=33), st.integers(0, 12))
def test_a_run_that_is_stopped_and_goes_on_ends_the_same(losses, kept):
    losses = [0.0, *sorted(losses)]
    whole = World(losses, Budget(max_drop=0.05))
    found = whole.run()
    again = World(losses, Budget(max_drop=0.05))
    again.journal = dict(list(whole.journal.items())[:kept])
    again.shapes = [str(shape) if i % 2 else shape for i, shape in enumerate(again.shapes)]
    resumed = again.run()
    assert (resumed.attempt, resumed.result, resumed.trials) == (found.attempt, found.result, found.trials)
    assert again.worked == whole.worked
    measured = sum(name.startswith("attempt-") for name in list(whole.journal)[:kept])
    assert len(again.measured) == len(whole.measured) - measured


def test_what_the_clock_decided_in_the_estimate_goes_to_the_attempt():
    world = World([0, 0, 0.5, 0.5], Budget(max_drop=0.01, max_latency=0.5))
    seen = []
    work = world.work
    world.work = lambda attempt: seen.append(dict(attempt.decisions)) or work(attempt)
    world.run(Fit(rung=3, milder=(2,), decisions={3: {"03-X/undo": {"back": ["a"]}}, 2: {"03-X/undo": {"back": []}}}))
    assert seen == [{"03-X/undo": {"back": ["a"]}}, {"03-X/undo": {"back": []}}]
