"""Reconstructive Neuron Pruning: unlearn, recover, prune."""

from reprune.rnp.finetune import FineTuning, finetune, tune
from reprune.rnp.label import backdoor_label
from reprune.rnp.method import RNP
from reprune.rnp.prune import Judge, Order, Pruning, prune, ranks, site_masks
from reprune.rnp.recover import Recovering, recover
from reprune.rnp.unlearn import (
    Unlearning,
    check_unlearning,
    unlearn,
    unlearn_neurons,
    unlearned_model,
    unlearning_passes,
    weight_change,
)

__all__ = [
    "RNP",
    "FineTuning",
    "Judge",
    "Order",
    "Pruning",
    "Recovering",
    "Unlearning",
    "backdoor_label",
    "check_unlearning",
    "finetune",
    "prune",
    "ranks",
    "recover",
    "site_masks",
    "tune",
    "unlearn",
    "unlearn_neurons",
    "unlearned_model",
    "unlearning_passes",
    "weight_change",
]
