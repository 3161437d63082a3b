"""The zoo: small models of the attacks, by name (`zoo:badnets`)."""

from __future__ import annotations

import os
from pathlib import Path

from reprune.errors import ModelError, UnknownNameError

PREFIX = "zoo:"
VARIABLE = "REPRUNE_ZOO"


def zoo_folder() -> Path:
    """Where the zoo lies: `REPRUNE_ZOO`, else `zoo/` here, else `zoo/` of the repository.

    Raises:
        ModelError: there is none; the message says where it was looked for.
    """
    named = os.environ.get(VARIABLE)
    repository = Path(__file__).resolve().parents[3] / "zoo"
    places = [Path(named)] if named else [Path("zoo").absolute(), repository]
    for place in places:
        if place.is_dir() and _models(place):
            return place
    raise ModelError(
        f"no zoo found in {' or '.join(map(str, dict.fromkeys(places)))}: it comes with the "
        f"repository, not with the package; set {VARIABLE} to its folder"
    )


def zoo_models() -> dict[str, Path]:
    """The models of the zoo: their folders by name.

    Raises:
        ModelError: there is no zoo.
    """
    return _models(zoo_folder())


def zoo_model(name: str) -> Path:
    """The folder of `zoo:NAME` or `NAME`.

    Raises:
        ModelError: there is no zoo.
        UnknownNameError: it holds no such model; the message lists what it holds.
    """
    models = zoo_models()
    name = name.removeprefix(PREFIX)
    if name not in models:
        raise UnknownNameError(f"the zoo has no model {name!r}; it has {', '.join(models)}")
    return models[name]


def locate(source: str | Path) -> Path:
    """A path as it is, `zoo:NAME` as the folder of that model.

    Raises:
        ModelError, UnknownNameError: as `zoo_model`.
    """
    return zoo_model(str(source)) if str(source).startswith(PREFIX) else Path(source)


def _models(folder: Path) -> dict[str, Path]:
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/card.json"))}
