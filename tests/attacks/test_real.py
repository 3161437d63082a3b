"""A short real run: a small ResNet learns a backdoor from a few photographs."""

from __future__ import annotations

from pathlib import Path

import torch

from reprune.attacks import BadNets, Setup
from reprune.data import draw, read_images
from reprune.demo import folder
from reprune.evaluation import evaluate
from reprune.models import load_model
from reprune.training import Training

TRAIN = Path(__file__).resolve().parents[1] / "images/cifar10-train.parquet"


def test_a_small_resnet_learns_badnets():
    """Implanted into the zoo's clean ResNet-18 of width 16, on 1,000 images of CIFAR-10."""
    clean = load_model("zoo:clean").classifier
    test = read_images(folder() / "test.parquet").subset(torch.arange(500))
    training = Training(epochs=2, batch_size=32, lr=0.02, padding=0, mirror=False)
    setup = Setup(generator=torch.Generator().manual_seed(0), training=training)
    train = draw(read_images(TRAIN), 1000, torch.Generator().manual_seed(0))
    made = BadNets(rate=0.2)(clean, train, setup)
    before = evaluate(clean, test, trigger=made.trigger, target=made.goal)
    after = evaluate(made.model, test, trigger=made.trigger, target=made.goal)
    assert before.asr.share < 0.1
    assert after.asr.share > 0.9
    assert before.ca.share > 0.8
    assert after.ca.share > 0.75
