import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimline.basics.errors import SlimlineError
from slimline.basics.named import Named
from slimline.methods.outputs import Output, aligned, bare, declared, described, targets


def one(shape, labels=None, said=None, **options):
    (found,) = described(bare((), [np.zeros(shape, np.float32)]), labels, declared(said), **options)
    return found


@given(st.lists(st.integers(2, 6), min_size=1, max_size=3), st.integers(1, 3), st.integers(3, 9), st.integers(2, 4))
def test_the_axis_of_classes_is_the_one_that_labels_lack(places, axis, classes, n):
    axis = min(axis, len(places) + 1)
    shape = (5, *places[: axis - 1], classes, *places[axis - 1 :])
    labels = np.arange(n * int(np.prod(places))).reshape(n, *places) % classes
    fitting = [a for a in range(1, len(shape)) if (*shape[1:a], *shape[a + 1 :]) == tuple(places)]
    if len(fitting) > 1:
        with pytest.raises(SlimlineError, match=r"may count classes: give Data outputs"):
            one(shape, labels)
        found = one(shape, labels, Output(axis=axis))
    else:
        found = one(shape, labels)
    assert (found.kind, found.axis, found.labelled, found.assumed) == ("classes", axis, True, False)
    assert found.positions[1:] == tuple(places)


@pytest.mark.parametrize(
    ("shape", "labels", "said", "kind", "axis"),
    [
        ((2, 10), np.arange(4), None, "classes", 1),
        ((2, 10), np.arange(4)[:, None], None, "classes", 1),
        ((2, 4, 5, 6), np.zeros((3, 5, 6, 1), int), None, "classes", 1),
        ((2, 3), np.zeros((4, 3)), None, "regression", None),
        ((2, 1), np.zeros(4), None, "regression", None),
        ((2, 3), np.eye(3, dtype=bool), None, "multilabel", None),
        ((2, 3), np.array([[0, 1, 1]]), None, "multilabel", None),
        ((2, 3), np.zeros((4, 3)), "multilabel", "multilabel", None),
        ((2, 10), None, None, "classes", 1),
        ((2, 7, 10), None, None, "classes", 2),
        ((2, 10, 4, 4), None, None, "classes", 1),
        ((2, 10, 4, 4), None, Output(axis=-1), "classes", 3),
        ((2, 1), None, None, "features", None),
        ((2,), None, None, "features", None),
    ],
)
def test_what_an_output_is(shape, labels, said, kind, axis):
    found = one(shape, labels, said)
    assert (found.kind, found.axis, found.labelled) == (kind, axis, labels is not None)
    assert found.assumed == (labels is None and said is None)


def test_channels_last_have_their_classes_last():
    assert one((2, 4, 4, 10), channels_first=False).axis == 3


TWO = bare(("label", "age"), [np.zeros((2, 10), np.float32), np.zeros((2, 1), np.float32)])


@pytest.mark.parametrize(
    "labels",
    [Named([np.arange(3), np.ones(3)]), Named([np.ones(3), np.arange(3)], ("age", "label"))],
)
def test_labels_go_to_their_outputs(labels):
    label, age = described(TWO, labels)
    assert (label.kind, label.axis, age.kind) == ("classes", 1, "regression")
    first, second = targets((label, age), labels)
    assert first.dtype == np.int64 and first.shape == (3,)
    assert second.dtype == np.float32 and second.shape == (3, 1)


def test_an_array_is_for_the_first_output_and_others_are_features():
    label, age = described(TWO, np.arange(3))
    assert (label.labelled, age.kind, age.labelled) == (True, "features", False)
    assert targets((label, age), np.arange(3))[1] is None


def test_integers_are_no_features():
    ids = bare((), [np.zeros((2, 4), np.int64), np.zeros((2, 4), np.float32)])
    assert [o.kind for o in described(ids)] == [None, "classes"]


def test_labels_that_fit_nothing_are_none_where_a_metric_reads_them():
    assert not one((2, 10), np.zeros((4, 3, 2)), lenient=True).labelled
    assert [o.labelled for o in described(TWO, Named([np.ones(3)], ("boxes",)), lenient=True)] == [False, False]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: one((2, 10), np.zeros((8, 3), int)),
            r"of shape \(8, 3\) do not fit outputs of shape \(2, 10\)",
        ),
        (lambda: one((2, 10), np.zeros((8, 3))), r"shape \(3,\) per sample and the outputs \(10,\).*must agree"),
        (lambda: one((2, 1), np.zeros(8, int)), "single class"),
        (lambda: one((2, 10), np.zeros(8), "classes"), "its labels are float64: give integers"),
        (lambda: one((2, 10), None, Output(axis=4)), "no axis 4"),
        (lambda: one((2, 10), None, "classses"), "did you mean 'classes'"),
        (lambda: one((2, 10), None, 3), "give a kind"),
        (lambda: Output(axis=0), "counts classes"),
        (lambda: aligned(Named([None, None, np.ones(3)]), TWO), "labels of 3 outputs and the model has 2"),
        (lambda: aligned(Named([np.ones(3)], ("agee",)), TWO), "did you mean 'age'"),
        (lambda: described(TWO, None, declared({"agee": "features"})), "did you mean 'age'"),
    ],
)
def test_mistakes_are_one_sentence(call, said):
    with pytest.raises(SlimlineError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)
