from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.data import ImageSet, at_once, check_defence_data, check_model
from reprune.errors import DataError, ModelError


def clean(count: int = 60, classes: int = 3, shape: tuple[int, int, int] = (3, 4, 4)) -> ImageSet:
    """Random images whose first pixel tells the class."""
    images = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % classes
    images[:, 0, 0, 0] = labels / classes
    return ImageSet(images, labels)


def with_images(data: ImageSet, **changes: float) -> ImageSet:
    images = data.images.clone()
    for index, value in changes.items():
        images[int(index[1:])] = value
    return ImageSet(images, data.labels)


# --- data ----------------------------------------------------------------------------------


def test_good_data_passes():
    check_defence_data(clean(), 3, input_shape=(3, 4, 4))
    uint8 = ImageSet((clean().images * 255).byte(), clean().labels)
    check_defence_data(uint8, 3)


@pytest.mark.parametrize(
    ("data", "classes", "options", "message"),
    [
        (clean(classes=5), 3, {}, r"3 classes, labels 0\.\.2, but the data has the labels 3, 4;"),
        (clean(49), 3, {}, "too few images: got 49, at least 50 are needed for 3 classes"),
        (clean(60), 31, {}, "got 60, at least 62 are needed for 31 classes"),
        (clean(60), 3, {"min_images": 61}, "got 60, at least 61"),
        (clean(0), 3, {"min_images": 0}, "got 0, at least 1"),
        (clean(), 5, {}, r"2 of 5 classes have no image: 3, 4; at least 1 of each"),
        (clean(), 3, {"min_per_class": 21}, "too few images: 0 has 20, 1 has 20, 2 has 20; at"),
        (clean(), 3, {"input_shape": (1, 4, 4)}, r"takes .* \(1, 4, 4\), got \(3, 4, 4\); convert"),
        (clean(), 3, {"input_shape": (3, 8, 6)}, r"got \(3, 4, 4\); pass size=\(8, 6\) or --image"),
        (with_images(clean(), i7=torch.nan), 3, {}, "1 of 60 images .* NaN or infinite: images 7;"),
        (with_images(clean(), i7=3.5), 3, {}, r"must lie in \[0, 1\], got pixels from 0 to 3\.5"),
        (
            with_images(clean(), i0=0, i1=1, i5=0.5, i9=0),
            3,
            {},
            "4 of 60 images are a single colour: images 0, 1, 5, 9;",
        ),
    ],
)
def test_bad_data(data, classes, options, message):
    with pytest.raises(DataError, match=message):
        check_defence_data(data, classes, **options)


def test_missing_classes_are_named_and_can_be_allowed():
    data = ImageSet(clean().images, clean().labels, ("cat", "dog", "ship", "frog"))
    with pytest.raises(DataError, match=r"1 of 4 classes have no image: 3 \(frog\)"):
        check_defence_data(data, 4)
    check_defence_data(data, 4, min_per_class=0)


def test_a_few_constant_images_pass():
    check_defence_data(with_images(clean(), i0=0, i1=1, i5=0.5), 3)


# --- model ---------------------------------------------------------------------------------


class Reader(nn.Module):
    """Reads the class off the first pixel of `clean`."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("levels", torch.arange(classes) / classes)

    def forward(self, x: Tensor) -> Tensor:
        self.norm(x)
        return -50 * (x[:, 0, 0, 0, None] - self.levels).abs()


class Returns(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor):
        return self.function(x)


def test_accuracy_and_the_model_is_untouched():
    model = Classifier(Reader(), num_classes=3)
    model.train()
    model.network.norm.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    generator = torch.get_rng_state()
    data = clean(300)
    labels = data.labels.clone()
    labels[:75] = (labels[:75] + 1) % 3
    assert check_model(model, ImageSet(data.images, labels)) == 0.75
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


def test_batch_norm_does_not_learn_from_the_check():
    model = Classifier(Reader(), num_classes=3).train()
    check_model(model, clean())
    assert model.network.norm.num_batches_tracked == 0
    assert model.training
    assert model.network.norm.training


def test_large_data_is_sampled_over_all_classes():
    data = clean(4000, classes=4)
    order = data.labels.argsort()
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(len(x))
        return Reader(4).eval()(x)

    model = settled(Classifier(Returns(look), num_classes=4))
    assert check_model(model, data.subset(order), gradient=False) == 1
    assert sum(seen) == 1000
    assert max(seen) == 256


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: (x, x), r"tensor of shape \(60, 3\), got a tuple; wrap the network"),
        (lambda x: {"logits": x}, "got a dict"),
        (lambda x: x.flatten(1), r"logits of shape \(60, 3\), got \(60, 48\); check num_classes"),
        (lambda x: x.flatten(1).argmax(1), r"got \(60,\)"),
        (lambda x: x.flatten(1)[:, :3] / 0, "NaN or infinite on 60 of 60 images"),
        (lambda x: Reader().eval()(x).softmax(1), "returns probabilities .* remove the softmax"),
        (
            lambda x: x.flatten(1) @ torch.ones(5, 3),
            r"fails on images of .*\(3, 4, 4\), torch.floa",
        ),
        (lambda x: nn.BatchNorm2d(5)(x), r"fails on images .*RuntimeError"),
        (lambda x: Reader().eval()(x).roll(1, 1), r"at chance on this data \(0\.0 % of 60 images"),
        (lambda x: torch.ones(len(x), 3) * 2, r"at chance .*\(33\.3 % of 60 .*wrong preprocessing"),
    ],
)
def test_models_that_do_not_fit(function, message):
    model = Classifier(Returns(function), num_classes=3).train()
    with pytest.raises(ModelError, match=message):
        check_model(model, clean())
    assert model.training


def test_assertions_inside_a_network_become_model_errors():
    def picky(x: Tensor) -> Tensor:
        raise AssertionError(f"Input width ({x.shape[-1]}) doesn't match model (224)")

    with pytest.raises(ModelError, match=r"AssertionError: Input width .*--image-size"):
        check_model(Classifier(Returns(picky), num_classes=3), clean())


def test_independent_probabilities_are_refused_and_small_logits_are_not():
    def sigmoid(x: Tensor) -> Tensor:
        return (Reader(4).eval()(x) + 5).sigmoid()

    with pytest.raises(ModelError, match=r"probabilities of single classes .* remove the sigmoid"):
        check_model(Classifier(Returns(sigmoid), num_classes=4), clean(classes=4))
    small = Returns(lambda x: 1 + Reader(4).eval()(x) / 50)
    assert check_model(Classifier(small, num_classes=4), clean(classes=4)) == 1


def test_gradients_have_to_reach_the_pixels():
    class Frozen(Reader):
        """A head that learns on features that do not."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                features = super().forward(x)
            return self.head * features

    model = Classifier(Frozen(), num_classes=3)
    with pytest.raises(ModelError, match="gradient"):
        check_model(model, clean())
    assert check_model(model, clean(), gradient=False) == 1


@pytest.mark.parametrize("kind", [tuple, list, lambda pair: {"logits": pair[0]}])
def test_what_a_network_returns_while_it_trains(kind):
    class Training(Reader):
        def forward(self, x: Tensor):
            logits = super().forward(x)
            return kind((logits, logits)) if self.training else logits

    model = Classifier(Training(), num_classes=3)
    assert check_model(model, clean()) == 1
    if kind in (tuple, list):
        assert check_model(model, clean(), training=True) == 1
        return
    with pytest.raises(ModelError, match=r"in training mode, .* needs: .* got a dict"):
        check_model(model, clean(), training=True)


def test_a_network_that_breaks_its_gradients():
    class InPlace(Reader):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            powers = logits.exp()
            powers += 1
            return powers.log()

    with pytest.raises(ModelError, match=r"gradients do not pass .* inplace operation"):
        check_model(Classifier(InPlace(), num_classes=3), clean())


def test_of_large_images_fewer_are_taken_at_once():
    assert at_once(512, (3, 32, 32)) == at_once(512, (3, 64, 64)) == 512
    assert at_once(512, (3, 128, 64)) == 256
    assert at_once(512, (1, 224, 224)) == 41
    assert at_once(16, (3, 4096, 4096)) == 1


def test_log_probabilities_are_logits():
    model = Classifier(Returns(lambda x: Reader().eval()(x).log_softmax(1)), num_classes=3)
    assert check_model(model, clean()) == 1


def answering(predicted: Tensor, classes: int) -> Classifier:
    """A model that gives these answers to 1000 images or fewer, in their order."""
    batches = iter(predicted.split(256))
    answer = Returns(lambda x: 9.0 * nn.functional.one_hot(next(batches), classes))
    return settled(Classifier(answer, num_classes=classes))


def settled(model: Classifier) -> Classifier:
    """So that nothing is asked of it to learn its layout."""
    model.layout = torch.contiguous_format
    return model


def labelled(labels: Tensor) -> ImageSet:
    return ImageSet(torch.rand(len(labels), 3, 2, 2), labels)


def test_chance_is_three_standard_errors_wide():
    labels = torch.arange(1000) % 2
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    for wrong, fine in ((227, False), (226, True)):  # 0.5 + 3 * sqrt(0.25 / 1000) = 0.5474
        predicted = labels.clone()
        for label in (0, 1):
            predicted[2 * order[:wrong] + label] = 1 - label
        if fine:
            assert check_model(answering(predicted, 2), labelled(labels), gradient=False) == 0.548
        else:
            with pytest.raises(ModelError, match=r"at chance on this data \(54\.6 % of 1000"):
                check_model(answering(predicted, 2), labelled(labels), gradient=False)


def test_one_frequent_class_for_every_image_is_chance():
    labels = torch.arange(200) % 43
    labels[:60] = 7
    with pytest.raises(ModelError, match=r"31\.5 % of 200 images, chance is 31\.5 %"):
        check_model(answering(torch.full((200,), 7), 43), labelled(labels), gradient=False)


def test_good_models_pass_on_uneven_labels():
    labels = torch.zeros(50, dtype=torch.int64)
    assert check_model(answering(labels, 2), labelled(labels), gradient=False) == 1
    labels[3] = 1
    assert check_model(answering(labels, 2), labelled(labels), gradient=False) == 1


def test_no_images():
    with pytest.raises(DataError, match="no images to check the model on"):
        check_model(Classifier(Reader(), num_classes=3), clean(0))


def test_labels_in_another_order_are_named():
    """As folders of numbers sorted as text, or names in alphabetical order."""
    data = clean()
    order = torch.tensor([0, 2, 1])
    moved = ImageSet(data.images, order[data.labels], ("cat", "dog", "fox"))
    model = Classifier(Reader().eval(), num_classes=3)
    check_model(model, data)
    with pytest.raises(ModelError, match=r"order.*100\.0 % would.*1 \(dog\) as 2, 2 \(fox\) as 1"):
        check_model(model, moved)
    few = moved.subset([int((moved.labels == label).nonzero()[0]) for label in range(3)])
    with pytest.raises(ModelError, match="wrong preprocessing"):  # too few to tell
        check_model(model, few)


def test_labels_that_begin_with_one_are_told():
    with pytest.raises(DataError, match="has the labels 3; count them from 0, not from 1"):
        check_defence_data(ImageSet(clean().images, clean().labels + 1), 3)
