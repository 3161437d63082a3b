"""`reprune evaluate`."""

from __future__ import annotations

from rich.console import Console

from reprune.cli import common
from reprune.data import check_defence_data, check_model
from reprune.evaluation import evaluate
from reprune.report import Comparison


def command(
    model: common.Model,
    data: common.Data,
    trigger: common.TriggerFile = None,
    target: common.Target = None,
    arch: common.Arch = None,
    device: common.Device = "auto",
    num_classes: common.Classes = None,
    mean: common.Mean = None,
    std: common.Std = None,
    arch_args: common.ArchArgs = None,
    image_size: common.ImageSize = None,
    as_json: common.AsJson = False,
) -> None:
    """Measure clean accuracy, and with a known trigger its success rate and the robust accuracy."""
    known = common.known_trigger(trigger, target)
    place = common.find_device(device)
    loaded = common.load(
        model,
        arch=arch,
        arch_args=arch_args,
        num_classes=num_classes,
        mean=mean,
        std=std,
        device=place,
    )
    with common.progress_bars() as progress:
        images = common.read(data, loaded, image_size, progress).to(place)
    classes, shape = loaded.classifier.num_classes, loaded.card.input_shape
    check_defence_data(images, classes, min_per_class=0, min_images=1, input_shape=shape)
    if known is not None:
        known.check(images, classes)
    check_model(loaded.classifier, images, gradient=False)
    result = evaluate(
        loaded.classifier,
        images,
        trigger=known.trigger if known else None,
        target=known.goal if known else None,
    )
    console = Console(highlight=False, soft_wrap=True, emoji=False, stderr=as_json)
    if as_json:
        common.print_json(result)
    else:
        comparison = Comparison(f"{len(images):,} images", result)
        console.print(common.comparison_table(comparison))
    common.print_notes(loaded.notes, console)
