"""k-NN and linear probe against scikit-learn, and the features that they classify."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from beit_fast.training.evaluation import FeatureTable, LinearProbe, knn, knn_scores, pooled_features
from beit_fast.training.evaluation.linear_probe import held_out

from ...support.models import build, images


def clusters(count: int, classes: int = 4, size: int = 6, seed: int = 0) -> FeatureTable:
    """Overlapping clusters of features of different scales."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, size, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (count,), generator=generator)
    scales = torch.logspace(-1, 1, size)
    return FeatureTable((centers[labels] + torch.randn(count, size, generator=generator)) * scales + 3, labels)


@pytest.mark.parametrize("block", [2**26, 1])
def test_knn_scores_equal_those_of_scikit_learn(block, monkeypatch):
    monkeypatch.setattr(knn, "_SIMILARITIES", block)
    train, test = clusters(120), clusters(30, seed=1)
    weights = lambda distances: np.exp((1 - distances) / 0.07)  # noqa: E731
    reference = KNeighborsClassifier(20, metric="cosine", weights=weights, algorithm="brute")
    wanted = reference.fit(train.features.numpy(), train.labels.numpy()).predict_proba(test.features.numpy())
    found = knn_scores(train, test.features, 4)
    np.testing.assert_allclose(found.softmax(1).numpy(), wanted, rtol=2e-3, atol=1e-5)
    assert (found.isneginf().numpy() == (wanted == 0)).all()


def test_knn_with_few_features_and_a_small_temperature_takes_the_nearest():
    train = FeatureTable(torch.eye(3), torch.tensor([2, 0, 1]))
    scores = knn_scores(train, torch.tensor([[9.0, 1.0, 0.0]]), 4, k=20, temperature=1e-3)
    assert scores.argmax(1).tolist() == [2]
    assert scores[0, 3].isneginf()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0, "temperature": 0.0}, "2 errors"),
        ({"train": FeatureTable(torch.zeros(0, 3), torch.zeros(0).long())}, "no training features"),
        ({"train": FeatureTable(torch.ones(1, 3), torch.tensor([4]))}, "training labels include 4"),
    ],
)
def test_knn_with_arguments_that_do_not_fit_raises(arguments, message):
    values = {"train": FeatureTable(torch.eye(3), torch.arange(3)), "features": torch.eye(3), "num_classes": 3}
    with pytest.raises(ValueError, match=message):
        knn_scores(**values | arguments)


@pytest.mark.parametrize("strength", [1e-3, 1e-1])
def test_linear_probe_equals_logistic_regression_of_scikit_learn(strength):
    train, test = clusters(150), clusters(40, seed=1)
    probe = LinearProbe.fit(train, 4, strengths=(strength,))
    scaler = StandardScaler().fit(train.features.double().numpy())
    reference = LogisticRegression(C=1 / (strength * 150), tol=1e-10, max_iter=5000)
    reference.fit(scaler.transform(train.features.double().numpy()), train.labels.numpy())
    wanted = reference.predict_proba(scaler.transform(test.features.double().numpy()))
    np.testing.assert_allclose(probe.logits(test.features).softmax(1).numpy(), wanted, atol=1e-5)
    np.testing.assert_allclose(probe.weight.t().numpy(), reference.coef_, atol=1e-4)


def test_linear_probe_chooses_the_strength_that_classifies_held_out_images_best():
    noise = torch.randn(100, 40, generator=torch.Generator().manual_seed(5))
    train = clusters(100, size=40)
    train = train._replace(features=train.features + 2 * torch.logspace(-1, 1, 40) * noise)
    probe = LinearProbe.fit(train, 4, seed=3)
    again = LinearProbe.fit(train, 4, seed=3)
    assert torch.equal(probe.weight, again.weight)
    is_out = held_out(train.labels, 3)
    scores = {}
    for strength in (1.0, 1e-2, 1e-6):
        kept = FeatureTable(train.features[~is_out], train.labels[~is_out])
        logits = LinearProbe.fit(kept, 4, strengths=(strength,)).logits(train.features[is_out])
        scores[strength] = (logits.argmax(1) == train.labels[is_out]).sum().item()
    assert len(set(scores.values())) > 1  # the choice matters
    chosen = LinearProbe.fit(train, 4, strengths=tuple(scores), seed=3).strength
    assert scores[chosen] == max(scores.values())


def test_held_out_images_are_a_fifth_of_each_class():
    labels = torch.cat([torch.zeros(10), torch.ones(25), torch.full((4,), 2)]).long()
    mask = held_out(labels, 0)
    assert torch.equal(mask, held_out(labels, 0))
    assert not torch.equal(mask, held_out(labels, 1))
    assert labels[mask].bincount(minlength=3).tolist() == [2, 5, 0]
    assert held_out(torch.tensor([0, 0, 1, 1]), 0).sum() == 2


def test_constant_features_do_not_change_the_probe():
    train = clusters(60)
    wider = FeatureTable(torch.cat([train.features, torch.full((60, 1), 7.0)], 1), train.labels)
    probe = LinearProbe.fit(wider, 4, strengths=(0.1,))
    assert probe.weight[-1].abs().max() == 0
    torch.testing.assert_close(probe.weight[:-1], LinearProbe.fit(train, 4, strengths=(0.1,)).weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (FeatureTable(torch.zeros(0, 2), torch.zeros(0).long()), "linear probe of 0 features"),
        (FeatureTable(torch.zeros(2, 2), torch.tensor([0, 1])), "no class has two images"),
        (FeatureTable(torch.zeros(2, 2), torch.tensor([0, 9])), "training labels include 9"),
    ],
)
def test_linear_probe_that_cannot_be_fitted_raises(train, message):
    with pytest.raises(ValueError, match=message):
        LinearProbe.fit(train, 2)


@pytest.mark.parametrize("pooling", ["patches", "cls"])
def test_pooled_features_are_those_of_the_named_tokens(pooling):
    model, pixels = build("BeitModel", use_mean_pooling=False), images()
    with torch.no_grad():
        output = model(pixels, output_hidden_states=True)
        for layer, tokens in ((None, output.last_hidden_state), (1, output.hidden_states[1])):
            wanted = tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(1)
            assert torch.equal(pooled_features(model, pixels, pooling, layer), wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"pooling": "max"}, "'patches' or 'cls'"), ({"layer": 9}, "layer=9"), ({"layer": -1}, "-1")],
)
def test_pooled_features_with_wrong_arguments_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        pooled_features(build("BeitModel"), images(), **arguments)
