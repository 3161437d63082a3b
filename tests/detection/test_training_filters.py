"""`SpectralSignatures` and `ActivationClustering` against other libraries, and on poisoned data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA, FastICA
from sklearn.metrics import silhouette_samples

import planted
from corner import auroc, coloured, joined, planted_by_hand, with_corner
from reprune.attacks import poison
from reprune.attacks.features import Features
from reprune.data import ImageSet
from reprune.detection.activations import penultimate, principal
from reprune.detection.clustering import ActivationClustering, silhouettes, two_means
from reprune.detection.spectral import SpectralSignatures
from reprune.types import silent


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    """Two groups of 200 and 60 points in 30 dimensions."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(260, 30, generator=generator) * torch.linspace(2, 0.1, 30)
    points[200:, 3] += 9.0
    return points


@pytest.fixture(scope="module")
def by_hand() -> tuple[ImageSet, torch.Tensor]:
    """600 clean images, and 60 of other classes with a white corner that are labelled 0."""
    bad = with_corner(coloured(90, seed=4))
    others = bad.images[bad.labels != 0]
    moved = ImageSet(others, torch.zeros(60, dtype=torch.int64))
    return joined(coloured(600, seed=3), moved), torch.arange(660) >= 600


# --- parts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (20, 20)])
def test_principal_directions_are_those_of_numpy(shape):
    points = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    points -= points.mean(0)
    directions, values = principal(points, 3)
    _, singular, right = np.linalg.svd(points.numpy(), full_matrices=False)
    assert values.numpy() == pytest.approx(singular[:3])
    assert (directions.T.numpy() * right[:3]).sum(1).__abs__() == pytest.approx(np.ones(3))


def test_penultimate_features_are_what_the_last_layer_reads(toy_model, toy_data):
    found = penultimate(toy_model, toy_data, silent)
    with torch.no_grad():
        expected = toy_model.network[:-1](toy_model.normalize(toy_data.images))
    assert torch.allclose(found, expected, atol=1e-5)
    assert Features(toy_model, toy_data.images[:2]).width == found.shape[1]


def test_two_means_are_those_of_scikit_learn(features):
    part, centres = two_means(features.double(), 10, 100, torch.Generator().manual_seed(0))
    theirs = KMeans(2, n_init=10, random_state=0).fit(features.double().numpy())
    agree = (part.numpy() == theirs.labels_).mean()
    assert agree in (0.0, 1.0)
    ours = sorted(centres[:, 3].tolist())
    assert ours == pytest.approx(sorted(theirs.cluster_centers_[:, 3]))


def test_two_means_of_equal_points():
    part, centres = two_means(torch.ones(9, 2), 3, 5, torch.Generator().manual_seed(0))
    assert part.sum() in (0, 9)
    assert centres.isfinite().all()


def test_silhouettes_are_those_of_scikit_learn(features, monkeypatch):
    monkeypatch.setattr("reprune.detection.clustering._ROWS", 77)
    part = torch.arange(260) >= 190
    found = silhouettes(features.double(), part)
    expected = silhouette_samples(features.double().numpy(), part.numpy())
    assert found.numpy() == pytest.approx(expected, abs=1e-6)
    alone = torch.arange(260) == 5
    expected = silhouette_samples(features.double().numpy(), alone.numpy())
    assert silhouettes(features.double(), alone).numpy() == pytest.approx(expected, abs=1e-6)
    assert (silhouettes(features, torch.zeros(260, dtype=torch.bool)) == 0).all()


@pytest.mark.filterwarnings("ignore:FastICA did not converge")
def test_reduced_features_have_the_distances_of_ica_and_of_pca(features):
    def distances(points):
        return torch.pdist(torch.as_tensor(points, dtype=torch.float64)).numpy()

    ours = ActivationClustering().reduce(features)
    theirs = FastICA(10, whiten="unit-variance", random_state=0, tol=0.1)
    independent = theirs.fit_transform(features.double().numpy())
    scale = np.sqrt(260 / 259)  # ours has the unbiased variance 1
    assert distances(ours) * scale == pytest.approx(distances(independent), rel=1e-6)
    plain = ActivationClustering(whiten=False).reduce(features)
    expected = PCA(10).fit_transform(features.double().numpy())
    assert distances(plain) == pytest.approx(distances(expected), rel=1e-6)


def test_reduced_features_of_low_rank_and_of_no_variance():
    line = torch.linspace(0, 1, 30)[:, None] * torch.ones(1, 8)
    assert ActivationClustering().reduce(line).shape == (30, 1)
    flat = ActivationClustering().reduce(torch.ones(30, 8))
    assert flat.shape == (30, 1)
    assert flat.isfinite().all()


# --- spectral signatures -------------------------------------------------------------------


def test_scores_are_squared_projections_on_numpys_first_singular_vector(
    toy_model, toy_data, generator
):
    found = SpectralSignatures()(toy_model, toy_data, generator=generator)
    features = penultimate(toy_model, toy_data, silent).double().numpy()
    for label in range(3):
        rows = (toy_data.labels == label).numpy()
        centred = features[rows] - features[rows].mean(0)
        right = np.linalg.svd(centred, full_matrices=False)[2][0]
        assert found.scores[rows].numpy() == pytest.approx((centred @ right) ** 2, rel=1e-3)
        assert found.flagged[rows].sum() == round(0.075 * 30)
        assert found.scores[rows][found.flagged[rows]].min() >= (
            found.scores[rows][~found.flagged[rows]].max()
        )


def test_the_ranking_is_that_of_art(toy_model, toy_data, generator):
    from art.defences.detector.poison import SpectralSignatureDefense

    found = SpectralSignatures()(toy_model, toy_data, generator=generator)
    rows = toy_data.labels == 1
    features = penultimate(toy_model, toy_data, silent)[rows].double().numpy()
    centred = features - features.mean(0)
    theirs = SpectralSignatureDefense.spectral_signature_scores(centred)[:, 0]
    assert found.scores[rows].argsort().tolist() == theirs.argsort().tolist()


def test_classes_of_a_few_images_are_not_decided(toy_model, toy_data, generator):
    keep = [*range(0, 90, 3), *range(1, 90, 3), 2, 5]
    few = toy_data.subset(keep)
    found = SpectralSignatures()(toy_model, few, generator=generator)
    assert found.scores[-2:].isnan().all()
    assert found.flagged[-2:].all()
    found = ActivationClustering()(toy_model, few, generator=generator)
    assert found.scores.isnan().nonzero().flatten().tolist() == [60, 61]
    assert found.flagged[-2:].all()
    assert found.reasons[-1] == "2 images could not be decided and are flagged"


# --- poisoned training sets ------------------------------------------------------------------


def test_spectral_signatures_find_a_poisoned_class(by_hand, generator):
    data, marked = by_hand
    found = SpectralSignatures(rate=0.2)(planted_by_hand(), data, generator=generator)
    target = data.labels == 0
    assert auroc(found.scores[target], marked[target]) > 0.99
    assert found.flagged[marked].all()
    assert found.flagged.sum() == round(0.3 * 260) + 2 * round(0.3 * 200)


def test_clustering_finds_a_poisoned_class_and_no_other(by_hand, generator):
    data, marked = by_hand
    found = ActivationClustering(components=3)(planted_by_hand(), data, generator=generator)
    assert torch.equal(found.flagged, marked)
    assert ((found.scores > 0) == marked)[data.labels == 0].all()
    assert [reason.split(":")[0] for reason in found.reasons] == ["class 0"]
    clean = data.subset((~marked).nonzero().flatten())
    found = ActivationClustering(components=3)(planted_by_hand(), clean, generator=generator)
    assert not found.flagged.any()
    assert found.reasons == ("no class falls into two unequal, well separated groups",)


def test_clustering_finds_poisons_of_a_trained_model(generator):
    train = planted.stripes(1600, seed=10)
    poisoned = poison(train, planted.ATTACK, torch.Generator().manual_seed(0))
    model, marked = planted.model(backdoored=True), poisoned.poisoned
    found = ActivationClustering()(model, poisoned.data, generator=generator)
    target = poisoned.data.labels == planted.TARGET
    assert auroc(found.scores[target], marked[target]) > 0.9
    assert found.flagged.any()
    assert marked[found.flagged].all()
    innocent = planted.model(backdoored=False)
    assert not ActivationClustering()(innocent, train, generator=generator).flagged.any()
