"""Roles, batches and checks of the data."""

from __future__ import annotations

import logging
import sys
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimline.basics.errors import SlimlineError
from slimline.data import Data
from slimline.data.datasets import builtin
from slimline.data.splits import rebatch
from slimline.graph.ir import InputSpec
from tests.specs import specs


def samples(n: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Samples that can be told apart, with labels of two classes."""
    x = np.arange(start, start + n, dtype=np.float32)[:, None]
    return x, np.arange(n) % 2


def ids(data: Data, role: str) -> list[int]:
    return data.split(role).inputs[0][:, 0].astype(int).tolist()  # type: ignore[arg-type]


@settings(deadline=None, max_examples=60)
@given(n=st.integers(4, 900), seed=st.integers(0, 2**32 - 1))
def test_train_is_partitioned(n: int, seed: int) -> None:
    data = Data(train=samples(n), test=samples(50, start=10_000), seed=seed)
    train, selection, calibration = ids(data, "train"), ids(data, "selection"), ids(data, "calibration")
    assert sorted(train + selection) == list(range(n))
    assert len(selection) == max(1, n // 10)
    assert set(calibration) <= set(train)
    assert len(calibration) == min(512, len(train))
    assert ids(data, "certification") == list(range(10_000, 10_050))


@settings(deadline=None, max_examples=60)
@given(n=st.integers(5, 4000), seed=st.integers(0, 2**32 - 1))
def test_without_train_test_is_partitioned(n: int, seed: int) -> None:
    data = Data(test=samples(n), seed=seed)
    parts = [ids(data, role) for role in ("calibration", "selection", "certification")]
    assert sorted(i for part in parts for i in part) == list(range(n))
    assert len(parts[2]) >= n / 2
    assert not data.has("train")


def test_cuts_repeat_and_depend_on_the_seed() -> None:
    first, again, other = (Data(train=samples(200), seed=seed) for seed in (1, 1, 2))
    assert ids(first, "selection") == ids(again, "selection") != ids(other, "selection")


def test_given_splits_are_used_whole() -> None:
    data = Data(train=samples(40), selection=samples(7, 100), calibration=samples(8, 200), test=samples(9, 300))
    assert ids(data, "train") == list(range(40))
    assert ids(data, "selection") == list(range(100, 107))
    assert ids(data, "calibration") == list(range(200, 208))
    assert ids(data, "certification") == list(range(300, 309))


def test_the_division_of_test_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "slimline"):
        Data(test=samples(100))
    assert "20 for calibration, 20 for selection, 60 for certification" in caplog.text


@settings(deadline=None)
@given(n=st.integers(2, 300), size=st.integers(1, 64), epoch=st.integers(0, 5))
def test_shuffled_batches_hold_every_sample_once(n: int, size: int, epoch: int) -> None:
    train = Data(train=samples(n), selection=samples(2)).split("train")
    batches = [inputs[0][:, 0] for inputs, _ in train.batches(size, seed=3, epoch=epoch)]
    assert len(batches) == -(-n // size)
    assert max(map(len, batches)) <= size
    assert max(map(len, batches)) - min(map(len, batches)) <= 1
    assert sorted(np.concatenate(batches)) == list(range(n))
    again = [inputs[0][:, 0] for inputs, _ in train.batches(size, seed=3, epoch=epoch)]
    assert all(map(np.array_equal, batches, again))


def test_epochs_differ_and_plain_batches_are_in_order() -> None:
    train = Data(train=samples(100), selection=samples(2)).split("train")
    zero, one = (next(train.batches(100, seed=0, epoch=e))[0][0] for e in (0, 1))
    assert not np.array_equal(zero, one)
    assert np.array_equal(next(train.batches(100))[0][0][:, 0], np.arange(100))


def test_only_shuffled_training_batches_are_augmented() -> None:
    def negate(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return -x - rng.random(x.shape, dtype=np.float32)

    data = Data(train=samples(50), test=samples(20), augment=negate)
    first, again = (next(data.split("train").batches(8, seed=0))[0][0] for _ in range(2))
    assert (first < 0).all()
    assert np.array_equal(first, again)
    assert (next(data.split("train").batches(8))[0][0] >= 0).all()
    assert (next(data.split("selection").batches(8, seed=0))[0][0] >= 0).all()


def test_an_augmentation_that_changes_shapes_is_refused() -> None:
    data = Data(train=samples(50), augment=lambda x, rng: x[:, :0])
    with pytest.raises(SlimlineError, match=r"augment returned shape \(8, 0\) for an array \(8, 1\): return the same"):
        next(data.split("train").batches(8, seed=0))


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=20), size=st.integers(1, 12))
def test_rebatch_keeps_order_and_sizes(sizes: list[int], size: int) -> None:
    x = np.arange(sum(sizes))
    parts = np.split(x, np.cumsum(sizes)[:-1])
    batches = [inputs[0] for inputs, _ in rebatch((((p,), None) for p in parts), size)]
    assert np.array_equal(np.concatenate(batches), x)
    assert all(len(b) == size for b in batches[:-1])
    assert len(batches[-1]) <= size


def test_a_list_of_batches_is_streamed_for_training_and_held_for_the_rest() -> None:
    x, y = samples(30)
    batches = [(x[i : i + 7], y[i : i + 7]) for i in range(0, 30, 7)]
    data = Data(train=batches, test=batches)
    assert len(data.split("train")) == 30
    assert [len(b[0][0]) for b in data.split("train").batches(8)] == [8, 8, 8, 6]
    assert sorted(ids(data, "selection") + ids(data, "certification")) == list(range(30))
    assert np.array_equal(data.split("calibration").inputs[0], x)
    with pytest.raises(SlimlineError, match="stream"):
        _ = data.split("train").inputs


def test_a_shuffling_dataloader_repeats_per_seed_and_epoch() -> None:
    torch = pytest.importorskip("torch")
    x, y = samples(40)
    dataset = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y))
    data = Data(train=torch.utils.data.DataLoader(dataset, batch_size=6, shuffle=True), test=(x, y))
    train = data.split("train")

    def order(epoch: int) -> np.ndarray:
        return np.concatenate([inputs[0][:, 0] for inputs, _ in train.batches(5, seed=1, epoch=epoch)])

    torch.manual_seed(0)
    first = order(0)
    outside = torch.rand(3)
    torch.manual_seed(99)
    assert np.array_equal(first, order(0))
    assert not np.array_equal(first, order(1))
    assert sorted(first) == list(range(40))
    torch.manual_seed(0)
    assert torch.equal(outside, torch.rand(3)), "the caller's random state must be left alone"


def test_several_inputs_as_tuple_and_dict() -> None:
    x, y = (np.zeros((20, 3), np.float32), np.ones((20, 4), np.int64)), np.arange(20) % 4
    model = specs(x, "image", "tokens")
    for given_x in (x, {"image": x[0], "tokens": x[1]}, {"tokens": x[1], "image": x[0]}):
        split = Data(test=(given_x, y)).check(model).split("certification")
        assert [a.shape[1:] for a in split.inputs] == [(3,), (4,)]
        assert [a.shape[1:] for a in next(split.batches(2))[0]] == [(3,), (4,)]
    with pytest.raises(SlimlineError, match="called ids, image, and the model takes image, tokens: name them so"):
        Data(test=({"image": x[0], "ids": x[1]}, y)).check(model)
    with pytest.raises(
        SlimlineError, match=r"Input tokens of the calibration data .*\(4,\) but the model takes \(5,\)"
    ):
        Data(test=(x, y), overlap="allow").check(specs((x[0], np.ones((2, 5), np.int64)), "image", "tokens"))
    with pytest.raises(SlimlineError, match=r"different names \(train image, tokens; test none\)"):
        Data(train=({"image": x[0], "tokens": x[1]}, y), test=(x, y))
    assert Data(test={"only": x[0]}).check(specs(x[:1], "other")).split("certification").inputs[0].shape[1] == 3


def test_inputs_by_name_are_the_same_samples_in_any_order() -> None:
    """In another order of the dict, of one batch to the next and of the model, nothing changes: copies, fingerprint."""
    rng = np.random.default_rng(0)
    a, b, y = rng.random((30, 2), np.float32), rng.random((30, 3), np.float32), np.arange(30) % 3
    batches = [({"b": b[:15], "a": a[:15]}, y[:15]), ({"a": a[15:], "b": b[15:]}, y[15:])]
    whole = {"a": a, "b": b}, y
    assert Data(train=whole).fingerprint() == Data(train=({"b": b, "a": a}, y)).fingerprint()
    model = specs((b, a), "b", "a")
    data = Data(train=batches, test=whole).check(model)
    assert data.overlaps()["train"] == len(data.split("certification"))
    for split in ("train", "certification", "calibration"):
        inputs = next(data.split(split).batches(4))[0]  # type: ignore[arg-type]
        assert [x.shape[1] for x in inputs] == [3, 2]
    assert set(data.example_by_name()) == {"a", "b"}
    assert data.example_by_name()["a"].shape == (2, 2)  # type: ignore[call-overload]

    def augment(x: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"a": x["a"] + 1, "b": x["b"]}

    for train in (whole, batches):
        changed = Data(train=train, augment=augment).check(model).split("train")
        rows = next(changed.batches(5, seed=0))[0]
        assert rows[1].min() >= 1 and rows[0].max() < 1
    wrong = Data(train=whole, augment=lambda x, rng: x["a"]).check(model).split("train")
    with pytest.raises(SlimlineError, match="returned a ndarray for a dict of b, a"):
        next(wrong.batches(5, seed=0))
    with pytest.raises(SlimlineError, match="inputs of different names"):
        Data(test=[({"a": a}, y), ({"c": a}, y)])


def test_sizes_that_are_free_may_be_any() -> None:
    model = [InputSpec("image", (None, 3, None, None), "float32")]
    x = np.zeros((20, 3, 5, 7), np.float32)
    assert Data(test=x).check(model).split("certification").inputs[0].shape[1:] == (3, 5, 7)
    with pytest.raises(SlimlineError, match=r"\(5, 7, 3\) but the model takes \(3, any, any\): put the channels first"):
        Data(test=np.zeros((20, 5, 7, 3), np.float32)).check(model)


def test_unlabelled_data() -> None:
    x = np.zeros((20, 3), np.float32)
    for given_test in (x, (x,), {"x": x}):
        data = Data(test=given_test)
        assert data.split("certification").labels is None
        assert not data.labelled


def test_labels_take_the_form_of_class_numbers() -> None:
    x, classes = np.zeros((6, 2)), np.array([0, 1, 2, 0, 1, 2])
    for labels in (classes, classes[:, None], np.eye(3)[classes], classes.astype(np.uint8)):
        given_labels = Data(calibration=(x, labels)).split("calibration").labels
        assert given_labels is not None
        assert given_labels.dtype == np.int64
        assert np.array_equal(given_labels, classes)


def test_dtypes_follow_the_model() -> None:
    data = Data(calibration=np.ones((4, 3), np.float64))
    assert data.split("calibration").inputs[0].dtype == np.float32
    images = Data(calibration=np.full((4, 3), 7, np.uint8)).check(specs((np.zeros((1, 3), np.float32),)))
    assert images.split("calibration").inputs[0].dtype == np.float32
    assert next(images.split("calibration").batches(2))[0][0].max() == 7


def test_fingerprint_sees_every_number_and_the_seed() -> None:
    x, y = samples(20)
    base = Data(train=(x, y), seed=1).fingerprint()
    assert base == Data(train=(x.copy(), y.copy()), seed=1).fingerprint()
    changed = x.copy()
    changed[7] += 1
    others = [
        Data(train=(changed, y), seed=1),
        Data(train=(x, 1 - y), seed=1),
        Data(train=(x, y), seed=2),
        Data(train=(x, y), test=(x, y), seed=1),
    ]
    assert base not in {other.fingerprint() for other in others}


def test_digits_are_stratified_and_laid_out() -> None:
    first, last = builtin("digits"), builtin("digits", "channels_last")
    assert first.example(3)[0].shape == (3, 1, 8, 8)
    assert last.example(3)[0].shape == (3, 8, 8, 1)
    split = first.split("certification")
    assert split.labels is not None
    assert np.bincount(split.labels).min() >= 57
    assert (split.inputs[0].min(), split.inputs[0].max()) == (0, 1)
    roles = [np.round(16 * first.split(r).inputs[0]).reshape(-1, 64) for r in ("train", "selection", "certification")]  # type: ignore[arg-type]
    from sklearn.datasets import load_digits

    assert sorted(map(tuple, np.concatenate(roles))) == sorted(map(tuple, load_digits().data))


def test_a_framework_that_cannot_be_used_does_not_stop_the_data_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keras without TensorFlow may be imported in the process that compresses a torch model."""
    from slimline.frameworks import base

    usable = base.adapter

    def adapter(name: str) -> object:
        if name == "keras":
            raise SlimlineError("tensorflow is not installed: run pip install 'slimline[keras]'.")
        return usable(name)

    monkeypatch.setitem(sys.modules, "keras", ModuleType("keras"))
    monkeypatch.setattr(base, "adapter", adapter)
    x, y = samples(20)
    data = Data(train=[(x[:10], y[:10]), (x[10:], y[10:])])
    assert sum(len(inputs[0]) for inputs, _ in data.split("train").batches(4)) == 20
    assert "keras" not in [each.name for each in base.imported()]
