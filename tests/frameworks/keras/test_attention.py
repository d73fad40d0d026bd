"""Attention of every kind, and masks, which reach whoever is told by them."""

from __future__ import annotations

import numpy as np
import pytest

import slimline as sl
from tests.frameworks.keras.blocks import agree, frozen, model_of, pruned, series, tokens, words

import keras  # isort: skip
from keras import layers as L  # isort: skip
from keras import ops  # isort: skip


def pool(y):
    return L.GlobalAveragePooling1D()(y)


def scored(y):
    z, scores = L.MultiHeadAttention(2, 8)(y, y, return_attention_scores=True)
    return ops.concatenate([pool(z), ops.reshape(scores, (-1, 128))], axis=-1)


def three(y):
    return [L.Dense(24, name="query")(y), L.Dense(20, name="value")(y), L.Dense(24, name="key")(y)]


def bare(y, **more):
    q, k, v = (ops.reshape(L.Dense(n * 6)(y), (-1, 8, n, 6)) for n in (4, 2, 2))
    return ops.reshape(ops.dot_product_attention(q, k, v, **more), (-1, 8, 24))


MODELS = {
    "scores": lambda: series(scored),
    "gate": lambda: tokens(L.Dense(16)) and tokens(lambda y: L.MultiHeadAttention(4, 4, use_gate=True)(y, y)),
    "window": lambda: tokens(lambda y: L.MultiHeadAttention(4, 4, sliding_window=2)(y, y, use_causal_mask=True)),
    "groups": lambda: tokens(lambda y: L.GroupQueryAttention(4, 6, 2)(y, y, use_causal_mask=True)),
    "groups with scores": lambda: tokens(
        lambda y: L.GroupQueryAttention(4, 6, 2, dropout=0.1, use_gate=True)(y, y, return_attention_scores=True)[0]
    ),
    "one layer": lambda: tokens(lambda y: L.Attention(use_scale=True)(three(y))),
    "one layer, concatenated": lambda: tokens(lambda y: L.Attention(use_scale=True, score_mode="concat")(three(y))),
    "one layer, causal": lambda: tokens(lambda y: L.Attention()(three(y)[:1] * 2, use_causal_mask=True)),
    "additive": lambda: tokens(lambda y: L.AdditiveAttention()(three(y))),
    "bare": lambda: tokens(lambda y: bare(y, scale=0.3)),
    "bare, causal": lambda: tokens(lambda y: bare(y, is_causal=True)),
    "bare, biased and masked": lambda: tokens(
        lambda y: bare(y, bias=np.eye(8, dtype="float32"), mask=np.tri(8, dtype=bool))
    ),
    "padding": lambda: words(lambda y: pool(L.LayerNormalization()(y + L.MultiHeadAttention(4, 4)(y, y)))),
    "padding, in two layers": lambda: words(
        lambda y: pool(L.Add()([y, L.MultiHeadAttention(4, 4)(L.MultiHeadAttention(2, 8)(y, y), y)]))
    ),
    "padding, and what is to come": lambda: words(
        lambda y: pool(L.MultiHeadAttention(4, 4, dropout=0.1)(y, y, use_causal_mask=True))
    ),
    "padding, one layer": lambda: words(lambda y: pool(L.Attention()([y, L.Dense(16)(y)]))),
    "padding, pooled": lambda: words(lambda y: pool(L.BatchNormalization()(L.Dense(24, activation="relu")(y)))),
    "padding, softmax": lambda: words(
        lambda y: ops.sum(y * L.Softmax(axis=1)(L.Dense(16)(y), mask=ops.expand_dims(y[..., 0] < 0.2, 2)), axis=1)
    ),
    "tables both ways": lambda: words(
        lambda y: pool(tied(ops.relu(L.Dense(16)(y)), reverse=True)) if (tied := L.ReversibleEmbedding(30, 16)) else y
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_attention_is_pruned_exactly(name):
    source = MODELS[name]()
    model = model_of(source)
    agree(source, model)
    assert not any(node.kind == "unknown" for node in model.graph.nodes)
    pruned(model, 0.2)


def test_heads_that_share_keys_stay_in_groups():
    model = model_of(tokens(lambda y: L.GroupQueryAttention(4, 6, 2, name="attention")(y, y)))
    small = pruned(model)
    q, k, v = (small.graph.values[f"attention.{name}/kernel"].shape[1] for name in ("query", "key", "value"))
    assert k == v < 4
    assert q % k == 0


def test_a_mean_over_what_is_not_padding_is_not_one_over_all():
    model = model_of(words(pool))
    some = np.array([[3, 4, 0, 0, 0, 0, 0, 0]], "int32")
    table, kernel, bias = (model.parameters()[n] for n in ("embed/embeddings", "head/kernel", "head/bias"))
    np.testing.assert_allclose(model.predict(some)[0], table[[3, 4]].mean(axis=0) @ kernel + bias, rtol=1e-4, atol=1e-6)


def test_a_query_that_may_look_at_nothing_answers_as_keras_does():
    x, seen = keras.Input((5, 8)), keras.Input((5, 5), dtype="bool")
    model = keras.Model([x, seen], L.MultiHeadAttention(2, 4)(x, x, attention_mask=seen))
    mask = np.ones((2, 5, 5), bool)
    mask[0, 2:] = mask[1] = False
    inputs = (np.random.default_rng(0).normal(size=(2, 5, 8)).astype("float32"), mask)
    loaded = sl.load(model, (inputs[0], np.ones((2, 5, 5), bool)))
    np.testing.assert_allclose(loaded.outputs(*inputs)[0], model(list(inputs)), atol=1e-5)


def test_names_do_not_depend_on_what_the_process_made_before():
    one, two = (model_of(MODELS["padding, in two layers"]()) for _ in range(2))
    kinds = [[(n.kind, n.name.partition(".")[0] == "mask") for n in m.graph.nodes] for m in (one, two)]
    assert kinds[0] == kinds[1]
    assert [n.name for n in one.graph.nodes if n.name.startswith("mask")] == ["mask.0"]


def test_features_that_masking_looks_at_stay():
    model = model_of(series(lambda y: L.LSTM(8)(L.Masking(name="masking")(L.ReLU()(y)))))
    assert "all features of a step" in frozen(model)["embed (o)"]


def test_random_scores_keep_the_layer_whole():
    model = model_of(tokens(lambda y: L.Attention(dropout=0.1, name="attention")(three(y))))
    assert frozen(model)["query (o)"].startswith("Attention in attention")
