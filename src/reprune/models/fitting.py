"""Weights and a network: fitted strictly, and the number of classes that they tell."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from reprune.errors import WeightsError
from reprune.models.weights import listed

COUNTERS = ("num_batches_tracked", "n_averaged", "total_ops", "total_params")
"""What no evaluation uses: of batch norms, of averaged models, of profilers."""

_HEADS = ("fc", "linear", "classifier", "head", "heads", "output", "logits")


def without_prefix(
    network: nn.Module, weights: Mapping[str, Tensor], *, source: str
) -> tuple[dict[str, Tensor], str]:
    """Weights whose names fit the network's, and what stood before each of these in the file.

    Lightning puts `model.` there, a normalisation before the network `1.`; what else has no use
    (`COUNTERS`) is left out.

    Raises:
        WeightsError: the file holds other weights, too.
    """
    used = {k: v for k, v in weights.items() if not k.endswith(COUNTERS)}
    own = [key for key in network.state_dict() if not key.endswith(COUNTERS)]
    if not own or own[0] in used:
        return dict(weights), ""
    heads = (key.removesuffix(own[0]) for key in used if key.endswith("." + own[0]))
    prefixes = [head for head in heads if all(head + key in used for key in own)]
    if len(prefixes) != 1:
        return dict(weights), ""
    (prefix,) = prefixes
    others = [key for key in used if not key.startswith(prefix)]
    if others:
        raise WeightsError(
            f"the weights in {source} fit {type(network).__name__} with {prefix!r} before each "
            f"name, but there are others: {listed(others)}. If they are those of a normalisation, "
            "give its values with --mean and --std; save the network's own weights alone"
        )
    kept = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    return kept, prefix


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Fills `network` in place from `weights`: every key must be there, and none may be left over.

    Floating-point weights are converted to the network's own dtype. Only what no evaluation uses
    (`COUNTERS`) may be missing, or be left over. A network that does not fit stays untouched.

    Args:
        network: receives the weights.
        weights: parameter and buffer names to tensors of the same shapes.
        source: where the weights came from, for the message.

    Raises:
        WeightsError: missing, unexpected or mis-shaped keys; the message lists them.
    """
    own = network.state_dict()
    missing = [k for k in own if k not in weights and not k.endswith(COUNTERS)]
    unexpected = [key for key in weights if key not in own and not key.endswith(COUNTERS)]
    misfits = [
        f"{key}: expected {_form(own[key])}, got {_form(tensor)}"
        for key, tensor in weights.items()
        if key in own and not _fits(key, own[key], tensor)
    ]
    problems = [
        f"  {len(keys)} {label}: {listed(keys, '; ' if keys is misfits else ', ')}"
        for label, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of the wrong shape or kind", misfits),
        )
        if keys
    ]
    if problems:
        raise WeightsError(
            f"the weights in {source} do not fit {type(network).__name__}:\n"
            + "\n".join(problems)
            + "\nCheck the architecture, its arguments (such as width) and the number of classes"
        )
    network.load_state_dict(dict(weights), strict=False)  # strict above, but for the counters


def _fits(key: str, own: Tensor, given: Tensor) -> bool:
    if key.endswith("num_batches_tracked"):  # a float when every tensor of a dict was halved
        return own.shape == given.shape
    return own.shape == given.shape and own.is_floating_point() == given.is_floating_point()


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}" + ("" if tensor.is_floating_point() else " integer")


def infer_num_classes(weights: Mapping[str, Tensor], *, source: str) -> int:
    """The number of classes, read off the last linear layer's weight `(classes, features)`.

    Several 2-D weights are told apart by their names: the last one inside of `fc`, `linear`,
    `classifier`, `head` and the like.

    Raises:
        WeightsError: no such weight, or several that may be it.
    """
    flat = [key for key, tensor in weights.items() if tensor.ndim == 2 and key.endswith("weight")]
    heads = [key for key in flat if key.split(".")[0] in _HEADS]
    chosen = flat if len(flat) == 1 else sorted(heads, key=_natural)[-1:]
    if not chosen or weights[chosen[0]].shape[0] < 2:
        raise WeightsError(
            f"cannot tell the number of classes from {source} (2-D weights: {listed(flat) or '-'}"
            "): give it with --num-classes or as num_classes in card.json"
        )
    return int(weights[chosen[0]].shape[0])


def _natural(key: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]
