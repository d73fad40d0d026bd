"""Whatever a user gives as numbers or functions works, or is refused in one sentence before any work."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimline as sl
from slimline.basics.arrays import as_array
from slimline.basics.errors import SlimlineError
from slimline.data import Data
from slimline.data.splits import augmented
from slimline.measure.accuracy import evaluate

torch = pytest.importorskip("torch")
X, Y = np.random.default_rng(0).random((40, 3), np.float32), np.arange(40) % 2
OTHER = np.random.default_rng(1).random((40, 3), np.float32)
TRAINED = [sl.ChannelPruning(ratio=0.5), sl.Distillation(epochs=1)]
INTEGER = [sl.StaticQuantization(batch_size=8)]


class Lazy:
    """As dask and h5py give arrays: read when asked for."""

    shape, dtype = X.shape, X.dtype

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if self.fails:
            raise OSError("the file is closed\nfor good")
        return X


class Once:
    """A loader that gives its batches a single time."""

    def __init__(self) -> None:
        self.batches = iter([(X, Y)])

    def __iter__(self) -> Iterator[Any]:
        return self.batches


class Breaks:
    """A loader whose second batch cannot be read."""

    def __iter__(self) -> Iterator[Any]:
        yield X[:20], Y[:20]
        raise RuntimeError("worker died")


def broken(*_: Any) -> Any:
    raise ZeroDivisionError("division by\nzero")


def sparse() -> Any:
    import scipy.sparse

    return scipy.sparse.csr_array(X)


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: X.astype(complex), "is complex"),
    (sparse, "is sparse (csr_array): make it dense"),
    (lambda: torch.tensor(X).to_sparse(), "is sparse"),
    (lambda: torch.empty(40, 3, device="meta"), "meta tensor"),
    (lambda: np.ma.masked_less(X, 0.5), "masked"),
    (lambda: np.array([[1], [2, 3]] * 20, dtype=object), "must be numbers, not object"),
    (lambda: np.array(["cat"] * 40), "np.unique(y, return_inverse=True)[1]"),
    (lambda: np.array(["2020-01-01"] * 40, "datetime64[D]"), "must be numbers, not datetime64"),
    (lambda: Lazy(fails=True), "raised OSError (the file is closed) when it was read"),
    (lambda: np.full((40, 3), 1e300), "NaN or infinite"),
]


@pytest.mark.parametrize(("make", "said"), BAD, ids=[said[:30] for _, said in BAD])
def test_numbers_that_are_none(make: Callable[[], Any], said: str) -> None:
    bad = make()
    for attempt in (
        lambda: Data(test=(bad, Y)),
        lambda: Data(test=[(bad, Y)]),
        lambda: Data(test=(X, bad)),
        lambda: Data(train=[(bad, Y)]),
    ):
        with pytest.raises(SlimlineError) as error:
            attempt()
        message = str(error.value)
        assert said in message
        assert "\n" not in message
        assert message.endswith(".")


def test_lists_of_unequal_parts() -> None:
    with pytest.raises(SlimlineError, match="unequal parts"):
        as_array([[1, 2], [3]])


@pytest.mark.parametrize(
    "numbers",
    [
        torch.tensor(X, requires_grad=True),
        torch.tensor(X).bfloat16(),
        torch.tensor(X).half(),
        X.astype(np.float64),
        X.astype(np.float16),
        np.ma.masked_array(X, mask=False),
        Lazy(),
        X.tolist(),
    ],
    ids=lambda g: f"{type(g).__name__}-{getattr(g, 'dtype', '')}",
)
def test_numbers_that_are(numbers: Any) -> None:
    array = as_array(numbers)
    assert type(array) is np.ndarray
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, X, atol=0.01)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "1", None, True])
def test_seeds(seed: Any) -> None:
    from slimline.data.datasets import builtin

    model = sl.load(torch.nn.Linear(3, 2), X)
    for attempt in (
        lambda: Data(test=(X, Y), seed=seed),
        lambda: builtin("digits", seed=seed),
        lambda: sl.apply(model, INTEGER, Data(test=(X, Y)), seed=seed),
    ):
        with pytest.raises(SlimlineError, match=r"seed is .*: give a whole number from 0 to 4294967295"):
            attempt()
    Data(test=(X, Y), seed=np.int64(7))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metric": 3}, "metric is a int: give a function"),
        ({"augment": "flip"}, "augment is a str"),
        ({"metric_range": (0, 1)}, "give metric too"),
        ({"metric": len, "metric_range": (1, 0)}, "give the lowest and the highest score"),
        ({"metric": len, "metric_range": (0, np.inf)}, "give the lowest and the highest score"),
        ({"metric": len, "metric_range": "ab"}, "give the lowest and the highest score"),
        ({"overlap": "alow"}, "did you mean 'allow'"),
        ({"classes": -3}, "classes is -3"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SlimlineError, match=said):
        Data(test=(X, Y), **options)


AUGMENTS: list[tuple[Any, str]] = [
    (broken, r"augment \(broken\) raised ZeroDivisionError \(division by\) on an array \(4, 3\)"),
    (lambda x, rng: None, "returned a NoneType"),
    (lambda x, rng: 3.0, "returned a float"),
    (lambda x, rng: x[:2], r"returned shape \(2, 3\)"),
    (lambda x, rng: (x, Y), "returned a tuple"),
    (lambda x, rng: x * np.nan, "NaN or infinite"),
    (lambda x, rng: x.astype(complex), "complex"),
    (lambda x, rng: np.array(["a"] * 12).reshape(4, 3), "must be numbers"),
    (lambda x: x, "raised TypeError"),
    (lambda inputs, rng: (inputs[0] * 1.1,), r"returned shape \(3,\)"),
]


@pytest.mark.parametrize(("augment", "said"), AUGMENTS, ids=[said[:30] for _, said in AUGMENTS])
def test_augment_is_called_before_any_work(augment: Any, said: str, tmp_path: Path) -> None:
    data = Data(train=(X, Y), test=(OTHER, Y), augment=augment)
    model = sl.load(torch.nn.Linear(3, 2), X)
    with pytest.raises(SlimlineError, match=said) as error:
        sl.compress(model, data, recipe=TRAINED, output=tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(SlimlineError, match=said):
        sl.apply(model, TRAINED, data)


def test_augment_gets_arrays_and_may_change_them() -> None:
    def spoil(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        x *= 0
        return x

    rng, x, tokens = np.random.default_rng(0), X.copy(), np.arange(12).reshape(4, 3)
    (after,) = augmented(spoil, (x,), rng)
    assert not after.any()
    assert np.array_equal(x, X)
    assert augmented(lambda x, rng: torch.tensor(x).double(), (x,), rng)[0].dtype == np.float32
    assert augmented(lambda x, rng: (x,), (x,), rng)[0].shape == X.shape
    both = augmented(lambda pair, rng: [pair[0] + 1, pair[1]], (X[:4], tokens), rng)
    assert np.array_equal(both[0], X[:4] + 1)
    assert both[1].dtype == tokens.dtype
    with pytest.raises(SlimlineError, match="return integers"):
        augmented(lambda x, rng: x + 0.5, (tokens,), rng)
    with pytest.raises(SlimlineError, match="return a tuple of 2 arrays"):
        augmented(lambda pair, rng: pair[0], (X[:4], tokens), rng)


METRICS: list[tuple[Any, str]] = [
    (broken, r"The metric broken raised ZeroDivisionError \(division by\) on outputs \(4, 2\) and labels \(4,\)"),
    (lambda o, y: None, "returned None for 4 samples"),
    (lambda o, y: 0.5, r"gave one number for 4 samples"),
    (lambda o, y: o, r"gave shape \(4, 2\) for 4 samples"),
    (lambda o, y: o[:, 0] * np.nan, "NaN or infinite"),
    (lambda o, y: o[:, 0].astype(complex), "complex"),
    (lambda o, y: "good", "must be numbers"),
    (lambda o: o[:, 0], "raised TypeError"),
    (lambda o, y: o[:, 0] + 100, "outside the range 0 to 1 that was declared"),
]


@pytest.mark.parametrize(("metric", "said"), METRICS, ids=[said[:30] for _, said in METRICS])
def test_metric_is_called_before_any_work(metric: Any, said: str, tmp_path: Path) -> None:
    data = Data(train=(X, Y), test=(OTHER, Y), metric=metric, metric_range=(0, 1))
    with pytest.raises(SlimlineError, match=said) as error:
        sl.compress(torch.nn.Linear(3, 2), data, recipe=INTEGER, output=tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_metric_may_change_what_it_gets_and_return_tensors() -> None:
    def spoil(outputs: np.ndarray, labels: np.ndarray) -> Any:
        outputs[:], labels[:] = 0, 9
        return torch.ones(len(outputs))

    outputs, labels = X.copy(), Y.copy()
    assert evaluate(spoil, outputs, labels).tolist() == [1] * 40
    assert np.array_equal(outputs, X)
    assert np.array_equal(labels, Y)
    assert evaluate(lambda o, y: o[:, 0] > 0.5, outputs, labels).dtype == bool


def test_labels_that_do_not_fit_are_refused_before_any_work(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 2, (40, 3))
    data = Data(train=(X, labels), test=(OTHER, labels))
    with pytest.raises(SlimlineError, match="do not fit outputs"):
        sl.compress(torch.nn.Linear(3, 2), data, recipe=INTEGER, output=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_train_samples_among_the_test_ones_are_refused_before_any_work(tmp_path: Path) -> None:
    data = Data(train=(X, Y), test=(X[5:25], Y[5:25]))
    with pytest.raises(SlimlineError, match="Of the 20 test samples 20 are among the train samples"):
        sl.compress(torch.nn.Linear(3, 2), data, recipe=INTEGER, output=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_loaders() -> None:
    with pytest.raises(SlimlineError, match=r"loader of the train data raised RuntimeError \(worker died\)"):
        Data(train=Breaks())
    with pytest.raises(SlimlineError, match=r"loader of the test data raised RuntimeError \(worker died\)"):
        Data(test=Breaks())
    with pytest.raises(SlimlineError, match="can be read again"):
        Data(train=Once(), test=(OTHER, Y))
    batches: list[Any] = [(X[:20], Y[:20]), (X[20:], Y[20:])]
    train = Data(train=batches, test=(OTHER, Y)).split("train")
    batches[1] = (X[20:, :2], Y[20:])
    with pytest.raises(SlimlineError, match="make them alike"):
        list(train.batches(8, seed=0))
    batches[1] = X[20:]
    with pytest.raises(SlimlineError, match="some have none"):
        list(train.batches(8, seed=0))
    batches.clear()
    with pytest.raises(SlimlineError, match="gave 40 samples at first and none now"):
        list(train.batches(8, seed=0))
    with pytest.raises(SlimlineError, match="some have none"):
        Data(test=[(X, Y), X])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_example_inputs_of_another_precision(dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    example = torch.tensor(X).to(getattr(torch, dtype))
    with caplog.at_level(logging.WARNING, "slimline"):
        model = sl.load(torch.nn.Linear(3, 2), example)
    assert model.example[0].dtype == np.float32
    # numpy has no bfloat16: torch's becomes float32 as it is read.
    assert ("is cast to the float32 of the model" in caplog.text) == (dtype != "bfloat16")
    for bad, said in ((X.astype(complex), "complex"), (torch.empty(2, 3, device="meta"), "meta tensor")):
        with pytest.raises(SlimlineError, match=said):
            sl.load(torch.nn.Linear(3, 2), bad)


def closeness(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.abs(outputs[:, 0] - labels))


def test_a_metric_without_a_range_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    from slimline.training.trial import try_score

    model = sl.load(torch.nn.Linear(3, 2), X)

    def warned(max_drop: float | None, metric: Any = closeness, **options: Any) -> bool:
        caplog.clear()
        try_score(model, Data(train=(X, Y), test=(OTHER, Y), metric=metric, **options), max_drop)
        return "will be measured but not certified: give Data metric_range" in caplog.text

    with caplog.at_level(logging.WARNING, "slimline"):
        assert warned(0.1)
        assert not warned(None)
        assert not warned(0.1, metric_range=(0, 1))
        assert not warned(0.1, metric=lambda o, y: o.argmax(1) == y)
        assert not warned(0.1, metric=None)


@pytest.mark.slow
def test_a_run_certifies_what_is_declared_and_counts_its_uses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2)).eval()
    many, labels = np.random.default_rng(2).random((700, 3), np.float32), np.arange(700) % 2

    def certificate(name: str, ratio: float, **options: Any) -> Any:
        data = Data(calibration=X, selection=OTHER, test=(many, labels), metric=closeness, **options)
        steps, budget = [sl.ChannelPruning(ratio=ratio)], sl.Budget(max_drop=0.9)
        run = sl.compress(network, data, recipe=steps, budget=budget, output=tmp_path / name, batch_sizes=(1,))
        assert (tmp_path / name / "report.html").stat().st_size
        return run.certificate

    with caplog.at_level(logging.WARNING, "slimline"):
        plain = certificate("plain", 0.25)
    assert "The drop of closeness will be measured but not certified: give Data metric_range" in caplog.text
    assert plain.verdict == "measured"
    assert "metric_range" in plain.sentence()
    ranged = certificate("ranged", 0.25, metric_range=(0, 1))
    assert (ranged.verdict, ranged.method, ranged.use) == ("certified", "betting", 1)
    groups = certificate("groups", 0.5, metric_range=(0, 1), groups=np.arange(700) // 10)
    assert (groups.use, groups.groups, groups.n, groups.samples) == (2, 70, 70, 700)
    assert "model 2 certified on these samples" in groups.sentence()
