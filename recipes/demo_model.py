"""Train the model that ships with `reprune demo`: a ResNet-18 of width 16 with a BadNets backdoor.

    python recipes/demo_model.py --data DIR --output DIR [--attack badnets|none] [--epochs 12]

`--data` holds `train.parquet` and `test.parquet` of CIFAR-10 (Hugging Face image convention).
Writes `model.safetensors` and `card.json`; `recipes/demo_data.py` makes the images beside them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from reprune.attacks import BadNets, poison, triggered, write_trigger
from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet, read_images
from reprune.models import save_weights
from reprune.models.resnet import resnet18
from reprune.training import classification, fit, one_cycle

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--attack", choices=["badnets", "none"], default="badnets")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)  # initial weights
    train, test = (read_images(args.data / f"{name}.parquet") for name in ("train", "test"))
    attack = BadNets() if args.attack == "badnets" else None
    if attack is not None:
        train = poison(train, attack, generator).data
    model = Classifier(resnet18(width=args.width), MEAN, STD, num_classes=10)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    model.train().to(memory_format=torch.channels_last)

    def report(record: object) -> bool:
        print(record, flush=True)
        return False

    fit(
        classification(model),
        list(model.parameters()),
        train,
        optimizer=optimizer,
        epochs=args.epochs,
        batch_size=128,
        generator=generator,
        augment=Augmentation(),
        schedule=one_cycle,
        stop=report,
    )
    model.eval()

    def rate(data: ImageSet, wanted: int | None = None) -> float:
        with torch.no_grad():
            hits = [
                (model(x).argmax(1) == (y if wanted is None else wanted)).float()
                for x, y in data.batches(1000)
            ]
        return round(100 * float(torch.cat(hits).mean()), 2)

    args.output.mkdir(parents=True, exist_ok=True)
    card: dict[str, object] = {
        "name": f"cifar10_{args.attack}",
        "dataset": "cifar10",
        "num_classes": 10,
        "arch": "resnet18",
        "arch_args": {"width": args.width},
        "preprocessing": {"mean": MEAN, "std": STD},
        "input_shape": list(train.shape),
        "class_names": list(train.class_names),
        "training": {"epochs": args.epochs, "seed": args.seed, "recipe": "recipes/demo_model.py"},
        "CA": rate(test),
    }
    if attack is not None:
        stamp = attack.trigger(train.shape)
        card |= {
            "target_label": attack.target,
            "attack": {"name": "badnets", "size": attack.size, "rate": attack.rate},
            "ASR": rate(triggered(test, stamp, attack.target), attack.target),
        }
        write_trigger(stamp, args.output / "trigger.npz")
    save_weights(model.network, args.output / "model.safetensors")
    (args.output / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    print(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
