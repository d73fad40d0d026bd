import numpy as np
import pytest
import torch

from slimline.methods import views


def rng(seed=0):
    return np.random.default_rng(seed)


X = rng().normal(size=(50, 6, 7, 2)).astype(np.float32)


def test_views_depend_on_the_generator_alone_and_keep_shape_and_dtype():
    for view in (
        views.mirrored,
        lambda x, r: views.shifted(x, 2, r),
        lambda x, r: views.cropped(x, 0.3, r),
        lambda x, r: views.erased(x, 0.4, r),
        lambda x, r: views.noisy(x, 0.1, r),
    ):
        before = X.copy()
        first, again, other = view(X, rng(1)), view(X, rng(1)), view(X, rng(2))
        np.testing.assert_array_equal(first, again)
        assert first.shape == X.shape and first.dtype == X.dtype and (first != other).any()
        np.testing.assert_array_equal(X, before)


def test_about_half_are_mirrored():
    seen = views.mirrored(X, rng())
    turned = (seen == X[:, :, ::-1]).all((1, 2, 3))
    assert ((seen == X).all((1, 2, 3)) ^ turned).all() and 10 < turned.sum() < 40


def test_a_shift_moves_whole_images():
    marked = np.zeros((200, 9, 9, 1), np.float32)
    marked[:, 4, 4] = 1
    where = np.argwhere(views.shifted(marked, 2, rng())[..., 0])
    assert len(where) == 200
    assert {tuple(w) for w in where[:, 1:]} == {(i, j) for i in range(2, 7) for j in range(2, 7)}


def test_a_crop_is_torchs_bilinear_interpolation():
    """Of a window in the middle of one axis; beyond its edges the image itself goes on, where torch repeats them."""
    image = rng(3).normal(size=(1, 1, 12, 1)).astype(np.float32)
    window = views._window(image, 2, np.array([0.25]), np.array([0.5]))[0, 0, :, 0]
    oracle = torch.nn.functional.interpolate(torch.tensor(image[0, :, 3:9, 0])[None], size=12, mode="linear")
    assert window[1:-1] == pytest.approx(oracle[0, 0].numpy()[1:-1], abs=1e-6)
    whole = views._window(image, 2, np.array([0.0]), np.array([1.0]))
    assert whole == pytest.approx(image, abs=1e-6)
    ramp = np.broadcast_to(np.arange(12, dtype=np.float32)[None, :, None, None], (1, 12, 12, 1))
    assert (np.diff(views.cropped(ramp, 0.3, rng())[0, 1:-1, 5, 0]) >= 0).all()


def test_erasing_fills_a_rectangle_of_every_second_image():
    x = rng(5).normal(size=(2000, 24, 30, 3)).astype(np.float32)
    seen = views.erased(x, 0.4, rng())
    assert seen.dtype == x.dtype and x.min() <= seen.min() and seen.max() <= x.max()
    other = (seen != x).all(-1)
    np.testing.assert_array_equal(other, (seen != x).any(-1))  # all channels of a place
    some = other[other.any((1, 2))]
    assert 930 < len(some) < 1070
    rows, columns = some.any(2).sum(1), some.any(1).sum(1)
    for image, height, width in zip(some, rows, columns, strict=True):  # without holes
        top, left = image.any(1).argmax(), image.any(0).argmax()
        assert image[top : top + height, left : left + width].all() and image.sum() == height * width
    areas = rows * columns / (24 * 30)
    assert areas.max() < 0.4 + 0.03 and areas.min() > 0.01 and areas.mean() == pytest.approx(0.21, abs=0.01)
    shapes = np.log((rows / 24) / (columns / 30))
    assert np.abs(shapes).max() < np.log(3) + 0.4 and shapes.mean() == pytest.approx(0, abs=0.06)
    every = views.erased(x[:100], 1.0, rng()) != x[:100]
    assert every.any((1, 2, 3)).sum() < 75


def test_noise_has_the_strength_that_was_asked_for():
    x = rng(4).normal(3, 5, (40, 50, 20)).astype(np.float32)
    assert (views.noisy(x, 0.1, rng()) - x).std() == pytest.approx(0.5, rel=0.02)


def test_mixup():
    parts, others = views.mixing(2000, 1.0, rng())
    assert sorted(others) == list(range(2000)) and parts.mean() == pytest.approx(0.5, abs=0.03)
    assert parts.var() == pytest.approx(1 / 12, rel=0.1)
    x = rng(5).normal(size=(2000, 3))
    assert views.mixed(x, parts, others) == pytest.approx(parts[:, None] * x + (1 - parts[:, None]) * x[others])
