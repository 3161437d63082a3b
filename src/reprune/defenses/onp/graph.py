"""A network as graphs: a node per channel, channels that a residual stream ties as one node.

Which channels hang together and which layer reads them comes from the dependency graph that
physical pruning uses (`reprune.coupling`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from reprune.classifier import Classifier
from reprune.coupling import reads, tied_group, trace
from reprune.errors import PruningError
from reprune.layers import channels_last, layer_outputs
from reprune.sites import Site

FEATURES = (
    "strength in",
    "strength out",
    "clean activation",
    "change of activation",
    "scale",
    "shift",
    "recovered mask",
    "own",
    "depth",
)
"""What a node knows; the environment appends whether the channel is kept."""

BATCH = 64  # of all layers at once

LIMIT = 4.0
"""Of standardised features, either way."""


@dataclass(frozen=True)
class Layer:
    """Channels that act together: those of one site, or of all sites that a stream ties.

    Attributes:
        name: of its first site.
        sites: positions among the network's sites.
        channels: number of channels, one node each.
        pixels: positions of its maps, height times width.
    """

    name: str
    sites: tuple[int, ...]
    channels: int
    pixels: int


@dataclass(frozen=True)
class Kernel:
    """The weights between two layers.

    Attributes:
        source, target: positions among the layers; `target` is `None` for the head.
        norms: L1 norms of the kernels, `(channels of the target, channels of the source)`.
    """

    source: int
    target: int | None
    norms: Tensor


@dataclass(frozen=True)
class Network:
    """All layers in order of execution, and the kernels between them."""

    sites: tuple[Site, ...]
    layers: tuple[Layer, ...]
    kernels: tuple[Kernel, ...]

    def stages(self) -> tuple[tuple[int, ...], ...]:
        """Layers in runs of equal map size: the stages of a residual network, blocks of a VGG."""
        runs: list[list[int]] = []
        for position, layer in enumerate(self.layers):
            if runs and self.layers[runs[-1][-1]].pixels == layer.pixels:
                runs[-1].append(position)
            else:
                runs.append([position])
        return tuple(tuple(run) for run in runs)


def read_network(model: Classifier, sites: Sequence[Site], images: Tensor) -> Network:
    """The layers of a classifier with what ties and what reads them.

    Args:
        model: the classifier; a copy is traced.
        sites: where its channels are, in order of execution.
        images: a few pixels `(n, c, h, w)` to trace with.

    Raises:
        PruningError: the network cannot be traced; the message is the tracer's.
    """
    with torch.inference_mode(False):
        twin = model.clone().eval()
        graph = trace(twin.network, twin.normalize(images[:2]))
    names = {module: name for name, module in twin.network.named_modules()}
    position = {name: k for k, site in enumerate(sites) for name in (site.layer, site.name)}
    home = list(range(len(sites)))  # the first site that each one is tied to
    groups = []
    for k, site in enumerate(sites):
        groups.append(tied_group(graph, twin.network.get_submodule(site.layer)))
        whole = list(range(site.channels))
        for item in groups[k]:
            other = position.get(names.get(item.dep.target.module, ""))
            if other is None or reads(graph, item.dep):
                continue
            alike = sites[other].channels == site.channels
            if not (alike and list(item.idxs) == whole and list(item.root_idxs) == whole):
                raise PruningError(
                    f"the channels of {site.name} and {sites[other].name} are tied only in part"
                )
            old, new = sorted((home[k], home[other]))
            home = [old if first == new else first for first in home]
    pixels = _map_sizes(twin, [site.layer for site in sites], images[:2])
    firsts = sorted(set(home))
    layers = tuple(
        Layer(
            sites[first].name,
            tuple(k for k, h in enumerate(home) if h == first),
            sites[first].channels,
            pixels[first],
        )
        for first in firsts
    )
    kernels: list[Kernel] = []
    for source, first in enumerate(firsts):
        seen: set[str] = set()
        for item in groups[first]:
            reader = item.dep.target.module
            name = names.get(reader, "")
            known = isinstance(reader, nn.modules.conv._ConvNd | nn.Linear)
            if not known or name in seen or not reads(graph, item.dep):
                continue
            seen.add(name)
            read = _norms(reader)
            norms = torch.zeros(len(read), layers[source].channels)
            channels = torch.tensor(list(item.root_idxs))
            norms.index_add_(1, channels, read[:, list(item.idxs)])
            target = position.get(name)
            at = None if target is None else firsts.index(home[target])
            kernels.append(Kernel(source, at, norms))
    return Network(tuple(sites), layers, tuple(kernels))


def _norms(module: nn.Module) -> Tensor:
    """L1 norms `(out, in)` of a convolution's or linear layer's kernels."""
    weight: Tensor = module.weight.detach().float().cpu()  # type: ignore[operator]
    norms = weight.flatten(2).abs().sum(2) if weight.ndim > 2 else weight.abs()
    blocks = norms.chunk(getattr(module, "groups", 1))
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        blocks = tuple(block.t() for block in blocks)
    whole: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return whole


@torch.no_grad()
def _map_sizes(model: Classifier, layers: Sequence[str], images: Tensor) -> list[int]:
    with layer_outputs(model, layers) as outputs:
        model(images)
    shapes = [outputs[name].shape for name in layers]
    return [shape[2:].numel() if len(shape) != 3 else shape[1] for shape in shapes]


@dataclass(frozen=True)
class ChannelGraph:
    """The graph that one agent sees.

    Attributes:
        data: PyTorch Geometric; `x` features `(nodes, len(FEATURES))`, `edge_index` both ways,
            `edge_attr` `(edges, 1)`.
        layers: positions in `Network.layers` of the agent's own layers.
        nodes: `(nodes, 2)`, position of the layer and channel of each node; the agent's own come
            first.
        own: how many nodes the agent may prune; the rest are what its layers read.
        total: channels of the agent's layers, nodes or not.
    """

    data: Data
    layers: tuple[int, ...]
    nodes: Tensor
    own: int
    total: int


def channel_graph(
    network: Network,
    layers: Sequence[int],
    features: Sequence[Tensor],
    *,
    keep_nodes: float,
    keep_edges: float,
    order: Sequence[Tensor] | None = None,
) -> ChannelGraph:
    r"""The graph of some layers and of the layers that they read.

    $\delta$ keeps the share `keep_nodes` of each layer's channels, those with the largest L1
    norms in and out (relative to the layer's mean); $\epsilon$ keeps the share `keep_edges` of
    each kernel's connections, the largest L1 norms among those between kept nodes.

    Args:
        network: from `read_network`.
        layers: the agent's own.
        features: `(channels, len(FEATURES) - 2)` a layer of the network, see `node_features`.
        keep_nodes, keep_edges: shares in (0, 1].
        order: `(channels,)` a layer; of the agent's own layers all channels where it is finite are
            kept instead of the strongest.
    """
    sources = {k.source for k in network.kernels if k.target in layers} - set(layers)
    shown = [*layers, *sorted(sources)]
    kept: dict[int, Tensor] = {}
    for position in shown:
        if order is not None and position in layers:
            chosen = order[position].isfinite().nonzero().flatten()
        else:
            count = max(1, round(keep_nodes * network.layers[position].channels))
            chosen = (-strength(network, position)).argsort(stable=True)[:count]
        kept[position] = chosen.sort().values
    start: dict[int, int] = {}
    nodes: list[Tensor] = []
    rows: list[Tensor] = []
    for position in shown:
        start[position] = sum(len(part) for part in nodes)
        channels = kept[position]
        nodes.append(torch.stack([torch.full_like(channels, position), channels], 1))
        depth = position / max(1, len(network.layers) - 1)
        place = torch.tensor([[float(position in layers), depth]]).expand(len(channels), 2)
        rows.append(torch.cat([features[position][channels], place], 1))
    edges, weights = [torch.empty(2, 0, dtype=torch.long)], [torch.empty(0, 1)]
    for kernel in network.kernels:
        if kernel.target not in layers or kernel.target is None:
            continue
        within = kernel.norms[kept[kernel.target]][:, kept[kernel.source]]
        there = int((kernel.norms > 0).sum())  # a grouped convolution connects few
        count = min(int((within > 0).sum()), round(keep_edges * there))
        best = within.flatten().topk(count).indices
        to, frm = best // max(1, within.shape[1]), best % max(1, within.shape[1])
        edges.append(torch.stack([frm + start[kernel.source], to + start[kernel.target]]))
        scale = kernel.norms.mean().clamp_min(1e-12)
        weights.append((within.flatten()[best] / scale).unsqueeze(1))
    index, weight = torch.cat(edges, 1), torch.cat(weights)
    data = Data(
        x=torch.cat(rows),
        edge_index=torch.cat([index, index.flip(0)], 1),
        edge_attr=torch.cat([weight, weight]),
    )
    return ChannelGraph(
        data,
        tuple(layers),
        torch.cat(nodes),
        sum(len(kept[position]) for position in layers),
        sum(network.layers[position].channels for position in layers),
    )


def strength(network: Network, layer: int) -> Tensor:
    """L1 norms in plus out of each channel, each relative to the layer's mean."""
    return sum(_strengths(network, layer), torch.zeros(network.layers[layer].channels))


def _strengths(network: Network, layer: int) -> tuple[Tensor, Tensor]:
    found = []
    for side, dim in (("target", 1), ("source", 0)):
        norms = torch.zeros(network.layers[layer].channels)
        for kernel in network.kernels:
            if getattr(kernel, side) == layer:
                norms += kernel.norms.sum(dim)
        found.append(norms / norms.mean().clamp_min(1e-12))
    return found[0], found[1]


@torch.no_grad()
def node_features(
    network: Network,
    model: Classifier,
    clean: Tensor,
    stamped: Sequence[Tensor],
    masks: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """What a channel is known by: `(channels, len(FEATURES) - 2)` a layer.

    Norms in and out, mean positive activation on clean images and its mean absolute change under
    the recovered triggers, scale and shift, all standardised over the layer and clipped to
    [-4, 4]; and the mask that RNP recovered (1 where there is none). Of tied channels the means.

    Args:
        network: from `read_network`.
        model: the classifier in evaluation mode.
        clean: pixels `(n, c, h, w)`.
        stamped: the same images under each recovered trigger.
        masks: `(channels,)` a site, in [0, 1].
    """
    usual = _activations(model, network.sites, clean)
    changed = [_activations(model, network.sites, images) for images in stamped]
    parameters = dict(model.network.named_parameters(remove_duplicate=False))
    rows = []
    for position, layer in enumerate(network.layers):
        columns = list(_strengths(network, position))
        columns.append(_mean([usual[k] for k in layer.sites]))
        moves = [(run[k] - usual[k]).abs() for run in changed for k in layer.sites]
        columns.append(_mean(moves) if moves else torch.zeros(layer.channels))
        for kind in ("weight", "bias"):
            chosen = [getattr(network.sites[k], kind) for k in layer.sites]
            values = [
                p.mean(tuple(range(1, p.ndim))) if p.ndim > 1 else p
                for name in chosen
                if name is not None
                for p in [parameters[name].detach().float().cpu()]
            ]
            columns.append(_mean(values) if values else torch.zeros(layer.channels))
        table = torch.stack(columns, 1)
        spread = table.std(0, correction=0).clamp_min(1e-6)
        table = ((table - table.mean(0)) / spread).clamp(-LIMIT, LIMIT)
        recovered = (
            torch.ones(layer.channels)
            if masks is None
            else _mean([masks[k].float().cpu() for k in layer.sites])
        )
        rows.append(torch.cat([table, recovered.unsqueeze(1)], 1))
    return rows


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean(0)


def _activations(model: Classifier, sites: Sequence[Site], images: Tensor) -> list[Tensor]:
    """Mean positive output of each channel, `(channels,)` a site."""
    modules = dict(model.network.named_modules())
    sums = [torch.zeros(site.channels) for site in sites]
    for batch in torch.split(images, BATCH):
        with layer_outputs(model, [site.name for site in sites]) as outputs:
            model(batch)
        for total, site in zip(sums, sites, strict=True):
            out = channels_last(outputs[site.name], modules[site.name], site.channels)
            means = out.float().relu().reshape(len(out), -1, site.channels).mean(1)
            total += means.sum(0).cpu()
    return [total / len(images) for total in sums]
