"""A finished job: its report, its pictures, and the folder that it is written to."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from reprune.classifier import Classifier
from reprune.data import ImageSet, draw
from reprune.defense import Purified
from reprune.detection import Inverted, trigger_images, write_inverted
from reprune.evaluation import predict
from reprune.files import atomic_directory
from reprune.layers import default_layers
from reprune.models import LoadedModel, model_file, portable_arch, save_weights
from reprune.report import Example, FeatureMaps, Report, Weights, feature_maps, render_html
from reprune.results import to_json
from reprune.sample import KnownTrigger, Sample

EXAMPLES = 12


@dataclass(frozen=True)
class Job:
    """A finished job: the report, its pictures, and what the methods returned."""

    report: Report
    examples: Tensor | None
    recovered: Tensor | None = None
    maps: FeatureMaps | None = None
    purified: Purified | None = None
    inverted: Inverted | None = None


def write(job: Job, loaded: LoadedModel, output: str | Path) -> Report:
    """Write `report.json` and `report.html`; the repaired model; the recovered triggers.

    The folder appears whole or not at all. A repaired model comes with its card and `model.py`,
    so that the folder is itself a MODEL.

    Returns:
        The report, completed with the hash of the weights that were written.

    Raises:
        OutputError: the folder holds other files, cannot be written, or the disk is full.
    """
    report = job.report
    with atomic_directory(output) as folder:
        if job.purified is not None:
            weights = folder / "model.safetensors"
            save_weights(job.purified.model.network, weights, prefix=loaded.prefix)
            digest = hashlib.sha256(weights.read_bytes()).hexdigest()
            repaired = Weights("model.safetensors", digest, report.model.original.parameters)
            report = replace(report, model=replace(report.model, repaired=repaired))
            _write_card(loaded, report, folder)
        if job.inverted is not None:
            write_inverted(job.inverted, folder / "triggers")
        text = json.dumps(to_json(report), indent=1, allow_nan=False)
        (folder / "report.json").write_text(text + "\n", "utf-8")
        page = render_html(
            report,
            example_images=job.examples,
            feature_maps=job.maps,
            recovered_trigger=job.recovered,
        )
        (folder / "report.html").write_text(page, "utf-8")
    return report


def _write_card(loaded: LoadedModel, report: Report, folder: Path) -> None:
    model = loaded.classifier
    content = {
        "num_classes": model.num_classes,
        "arch": portable_arch(loaded.arch),
        "arch_args": dict(loaded.arch_args),
        "preprocessing": {
            "mean": model.mean.flatten().tolist(),
            "std": model.std.flatten().tolist(),
        },
        "input_shape": list(report.model.input_shape),
        "repaired_from_sha256": loaded.sha256,
    }
    if report.model.class_names:
        content["class_names"] = list(report.model.class_names)
    (folder / "card.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    file = model_file(loaded.arch)
    if file is not None:
        shutil.copyfile(file, folder / "model.py")


def example_images(
    sample: Sample, before: Classifier, after: Classifier | None, known: KnownTrigger | None
) -> tuple[Tensor | None, tuple[Example, ...]]:
    """A few images, the second half with the trigger where it is known.

    None where images are neither grey nor RGB and cannot be shown.
    """
    if sample.test.shape[0] not in (1, 3):
        return None, ()
    shown = draw(sample.test, EXAMPLES, torch.Generator().manual_seed(sample.seed))
    pixels, marked = shown.pixels().clone(), torch.zeros(len(shown), dtype=torch.bool)
    if known is not None:
        marked[len(shown) // 2 :] = True
        pixels[marked] = known.trigger(pixels[marked])
    data = ImageSet(pixels, shown.labels)
    was = predict(before, data).argmax(1).tolist()
    now = [None] * len(data) if after is None else predict(after, data).argmax(1).tolist()
    rows = zip(shown.labels.tolist(), was, now, marked.tolist(), strict=True)
    return _bytes(pixels), tuple(Example(*row) for row in rows)


def trigger_picture(inverted: Inverted | None, target: int | None) -> Tensor | None:
    """The trigger recovered for `target` on black, uint8 `(c, h, w)`; `None` if none was found."""
    place = None if inverted is None else inverted.place(target)
    if inverted is None or place is None or inverted.patterns.shape[1] not in (1, 3):
        return None
    return trigger_images(inverted)[place]


def example_maps(
    stages: dict[str, Classifier], sample: Sample, known: KnownTrigger
) -> FeatureMaps | None:
    """Channel means of one image with the trigger, model by model (RNP, Figure 2)."""
    others = known.goal.victims(sample.test.labels).nonzero().flatten()[:1]
    images = known.trigger(sample.test.pixels(others))
    layers = default_layers(stages["original"], images)
    if not layers:
        return None
    maps = {name: feature_maps(model, images, layers) for name, model in stages.items()}
    return FeatureMaps(maps, _bytes(images))


def _bytes(pixels: Tensor) -> Tensor:
    return pixels.detach().mul(255).round().byte().cpu()
