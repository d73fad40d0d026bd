"""Samples that occur again: copies, groups, and test samples that were used before."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimline.basics.errors import SlimlineError
from slimline.data import Data, repeats


def some(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(seed).random((n, 3), np.float32), np.arange(n) % 2


def test_a_hash_is_of_the_values() -> None:
    x = np.random.default_rng(0).integers(0, 255, (20, 4, 5))
    base = repeats.keys((x.astype(np.uint8),))
    for dtype in (np.float32, np.float64, np.int64, np.int32, np.uint16):
        assert np.array_equal(repeats.keys((x.astype(dtype),)), base)
    assert np.array_equal(repeats.keys((np.asfortranarray(x),)), base)
    assert len(np.unique(base)) == 20
    zeros = np.zeros((1, 3), np.float32)
    assert repeats.keys((zeros,)) == repeats.keys((-zeros,))
    wide = np.array([[2**40], [2**40 + 1]])
    assert len(np.unique(repeats.keys((wide,)))) == 2
    assert np.array_equal(repeats.keys((wide[:1],)), repeats.keys((wide,))[:1])
    assert len(np.unique(repeats.keys((x, x[::-1].copy())))) == 20
    assert len(np.unique(repeats.keys((np.zeros((3, 0)),)))) == 1


def test_many_chunks_are_hashed_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = some(50)
    base = repeats.keys((x,))
    monkeypatch.setattr(repeats, "_CHUNK_BYTES", 30)
    assert np.array_equal(repeats.keys((x,)), base)


@given(st.lists(st.integers(0, 8), min_size=4, max_size=60), st.integers(0, 99))
def test_division_never_divides_a_unit(units: list[int], seed: int) -> None:
    few = len(units) // 4
    parts = repeats.divide(len(units), np.array(units), [few, few], np.random.default_rng(seed))
    assert sorted(np.concatenate(parts)) == list(range(len(units)))
    held = [set(np.array(units)[part]) for part in parts]
    assert not (held[0] & held[1] or held[0] & held[2] or held[1] & held[2])


def test_units_join_copies_and_groups() -> None:
    hashes, groups = np.array([1, 2, 2, 3, 4], np.uint64), np.array(["a", "a", "b", "b", "c"])
    for labels in (groups, np.unique(groups, return_inverse=True)[1]):
        joined = repeats.units(hashes, labels)
        assert joined is not None
        assert len(set(joined[:4])) == 1
        assert joined[4] != joined[0]
    assert repeats.units(hashes[[0, 1, 3]], None) is None


@pytest.mark.parametrize("seed", range(3))
def test_no_split_divides_a_group(seed: int) -> None:
    groups = np.random.default_rng(seed).integers(0, 40, 400)
    x, y = some(400, seed)
    x[:, 0] = groups
    for data in (
        Data(test=(x, y), groups=groups, seed=seed),
        Data(test=(np.concatenate([x, x[:9]]), np.append(y, y[:9])), groups=np.append(groups, groups[:9]), seed=seed),
        Data(train=(x, y), test=some(30, 99), groups={"train": [f"g{g}" for g in groups]}, seed=seed),
    ):
        roles = ("train" if data.has("train") else "calibration", "selection", "certification")
        held = [set(data.split(r).inputs[0][:, 0]) for r in roles]  # type: ignore[arg-type]
        assert all(not one & other for i, one in enumerate(held) for other in held[:i])


def test_copies_stay_together_and_count_once() -> None:
    x, y = some(200)
    twice = np.concatenate([x, x[:60]]), np.concatenate([y, y[:60]])
    data = Data(test=twice, seed=3)
    roles = ("calibration", "selection", "certification")
    held = [set(map(bytes, data.split(r).inputs[0])) for r in roles]  # type: ignore[arg-type]
    assert not (held[0] & held[1] or held[0] & held[2] or held[1] & held[2])
    proof = data.proof()
    assert proof.copies > 0
    assert len(proof.index) + proof.copies == len(data.split("certification"))
    whole = Data(train=some(50, 9), test=twice).proof()
    assert (len(whole.index), whole.copies) == (200, 60)
    counted = Data(train=some(50, 9), test=twice, overlap="allow").proof()
    assert (len(counted.index), counted.copies) == (260, 0)


def test_train_samples_among_the_test_ones() -> None:
    x, y = some(100)
    x_t, y_t = some(80, 1)
    x_t[10:25] = x[:15]
    for train in ((x, y), [(x[i : i + 30], y[i : i + 30]) for i in range(0, 100, 30)], (x.astype(np.float64), y)):
        more = {"train": train, "selection": some(10, 5), "test": (x_t, y_t)}
        data = Data(**more)
        assert data.overlaps() == {"train": 15}
        with pytest.raises(SlimlineError, match=r"Of the 80 test samples 15 are among the train samples .*'drop'"):
            data.refuse_overlap()
        dropped = Data(**more, overlap="drop")
        dropped.refuse_overlap()
        assert len(dropped.split("certification")) == 65
        assert "15 test samples that were used before are left out." in dropped.proof().notes
        allowed = Data(**more, overlap="allow")
        allowed.refuse_overlap()
        assert allowed.proof().notes == ("15 of the samples are also among the train ones, as allowed.",)


def test_bytes_and_floats_of_one_image_are_one_sample() -> None:
    x = np.random.default_rng(0).integers(0, 255, (30, 2, 4, 4)).astype(np.uint8)
    data = Data(train=(x, np.arange(30) % 2), test=(x[20:].astype(np.float32), np.arange(10) % 2))
    assert data.overlaps() == {"train": 10}


def test_samples_of_selection_and_calibration_prove_nothing_either() -> None:
    x, y = some(60)
    data = Data(selection=(x[:20], y[:20]), calibration=(x[20:40], y[20:40]), test=(x, y))
    assert data.overlaps() == {"selection": 20, "calibration": 20}


def test_groups_in_train_and_test() -> None:
    train, test = some(40), some(20, 1)
    groups = {"train": np.arange(40) // 4, "test": np.arange(20) // 2 + 8}
    data = Data(train=train, test=test, groups=groups)
    assert data.overlaps() == {"train": 4}
    with pytest.raises(SlimlineError, match="or in their groups"):
        data.refuse_overlap()
    assert len(Data(train=train, test=test, groups=groups, overlap="drop").split("certification")) == 16


def test_a_test_that_is_all_train_cannot_be_dropped() -> None:
    with pytest.raises(SlimlineError, match="Every test sample is among the others"):
        Data(train=some(30), test=some(30), overlap="drop")


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        (np.arange(19), "groups of the test data have shape"),
        (np.full(20, np.nan), "miss labels"),
        ([None] * 20, "miss labels"),
        (np.ones((20, 2)), "give one label per sample"),
        ({"tset": np.arange(20)}, "did you mean 'test'"),
        (3, "give one label per sample"),
    ],
)
def test_mistakes_in_groups(groups: object, said: str) -> None:
    with pytest.raises(SlimlineError, match=said):
        Data(train=some(40, 1), test=some(20), groups=groups)


def test_groups_of_a_loader_are_refused() -> None:
    x, y = some(20)
    with pytest.raises(SlimlineError, match="Groups need the test data as arrays"):
        Data(test=[(x, y)], groups=np.arange(20))


def test_too_few_groups_to_cut() -> None:
    with pytest.raises(SlimlineError, match="too few groups"):
        Data(test=some(30), groups=np.arange(30) % 2)
    with pytest.raises(SlimlineError, match="a single group"):
        Data(train=some(30), groups={"train": np.zeros(30)})


def test_the_fingerprint_sees_groups() -> None:
    x, y = some(30)
    assert len({Data(test=(x, y), groups=g).fingerprint() for g in (None, np.arange(30), np.arange(30) // 2)}) == 3


def test_groups_of_a_file(tmp_path) -> None:
    from slimline.run.sources import DataSource, load_data

    (x, y), (x_t, y_t) = some(30), some(20, 1)
    names = np.arange(20) // 4
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x_t, y_test=y_t, groups_test=names)
    groups = load_data(DataSource(str(tmp_path / "d.npz"))).proof().groups
    assert groups is not None
    assert groups.tolist() == [str(n) for n in names]
