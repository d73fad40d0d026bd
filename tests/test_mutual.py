"""Students that teach each other, in both frameworks."""

from __future__ import annotations

import numpy as np
import pytest

import slimline as sl
from tests.test_features import FRAMEWORKS, LABELS, _softmax, convolutional, images


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_each_learns_from_what_the_others_are_by_then(framework: str) -> None:
    models, x = [convolutional(framework, width, width) for width in (3, 4, 5)], images(framework)
    step = sl.Distillation(alpha=1.0, temperature=1.0, optimizer="sgd", momentum=0.0, weight_decay=0.0)
    trainers = [model.adapter.trainer(model.native, None, step, 0, 1) for model in models]
    for trainer in trainers:
        trainer.follow([other for other in trainers if other is not trainer])
    losses, answers = [], [[t.outputs((x,))[0] for t in trainers]]
    for trainer in trainers:
        losses.append(trainer.step(((x,), None), 5.0))
        answers.append([t.outputs((x,))[0] for t in trainers])
    assert np.abs(answers[1][0] - answers[0][0]).max() > 0.01
    for number, loss in enumerate(losses):
        own, *others = [answers[number][i] for i in (number, (number + 1) % 3, (number + 2) % 3)]
        p, q = np.mean([_softmax(z) for z in others], 0), _softmax(own)
        assert loss == pytest.approx(np.mean(np.sum(p * np.log(p / q), 1)), rel=1e-3, abs=1e-5)

    data = sl.Data(train=(x, LABELS), selection=(x[:8], LABELS[:8]), test=(x, LABELS), overlap="allow")
    fields = sl.Distillation(alpha=0.5, epochs=1, batch_size=12, learning_rate=0.01)
    before = [model.predict(x) for model in models[:2]]
    learned, again = (sl.mutual(models[:2], fields, data, progress=False) for _ in range(2))
    for model, same, source, was in zip(learned, again, models, before, strict=False):
        np.testing.assert_array_equal(model.predict(x), same.predict(x))
        np.testing.assert_array_equal(source.predict(x), was)
        assert model.history[-1]["step"] == "Distillation"
    with pytest.raises(sl.SlimlineError, match="features, ema of Distillation is for one student"):
        sl.mutual(models, sl.Distillation(features=["hint"], ema=0.9), data)
    with pytest.raises(sl.SlimlineError, match="there are 1: give two"):
        sl.mutual(models[:1], fields, data)
    with pytest.raises(sl.SlimlineError, match="differ in shape"):
        sl.mutual([models[0], convolutional(framework, 3, classes=5)], fields, data)
