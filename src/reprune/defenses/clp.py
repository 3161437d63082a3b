"""`CLP`: prune the channels of a layer that react most strongly, read off the weights alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.defense import Need
from reprune.defenses.pruning import Fit, PruningDefense, Ranking
from reprune.errors import ConfigurationError
from reprune.results import Trace
from reprune.rnp import Pruning
from reprune.sites import Site


@dataclass(frozen=True, kw_only=True)
class CLP(PruningDefense):
    r"""Channel Lipschitzness based pruning: per layer, the channels far above the others.

    A channel that answers to a trigger changes a lot for a small change of its input. For channel
    k of a layer, with `lipschitz_bounds` $\sigma_k$ and their mean $\mu$ and standard deviation
    $s$ over the layer,

    $$z_k = \frac{\sigma_k - \mu}{s}, \qquad k \text{ is suspicious if } z_k > u.$$

    The ranking reads the weights only; the clean images judge how many of the suspicious channels
    are pruned, the largest z first. `CLP.paper()` prunes all of them, whatever they cost.

    No z of a layer of n channels can exceed $(n - 1) / \sqrt n$: with u = 3, layers of up to 10
    channels lose none.

    Source: Zheng et al., "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022.

    Choices, where the paper is silent: the sample standard deviation (n - 1); hidden linear layers
    are treated like 1x1 convolutions; scale and shift of a channel are pruned together; layers
    without running statistics as in `lipschitz_bounds`.

    Attributes:
        u: standard deviations above the mean from which a channel is suspicious; the paper's 3.
    """

    u: float = 3.0

    title: ClassVar[str] = "Channel Lipschitzness based Pruning"
    source_paper: ClassVar[str] = "Zheng et al., ECCV 2022"
    needs: ClassVar[tuple[Need, ...]] = ("clean labels",)

    @classmethod
    def paper(cls) -> CLP:
        """All channels above u = 3, without an accuracy guard; convolutions only."""
        return cls(pruning=Pruning(by="threshold", amount=0.5), linear=False)

    def check(self) -> None:
        super().check()
        if not math.isfinite(self.u):
            raise ConfigurationError(f"u must be a finite number, got {self.u}")

    def rank_passes(self, images: int, classes: int) -> float:
        return 0.0

    def rank(self, model: Classifier, fit: Fit) -> Ranking:
        scores, masks, short = [], [], []
        with fit.clock("score"):
            for done, site in enumerate(fit.sites, start=1):
                z = standard_scores(lipschitz_bounds(model, site))
                scores.append(-z)
                masks.append((z <= self.u).float())
                if (site.channels - 1) / math.sqrt(site.channels) <= self.u:
                    short.append(site.name)
                fit.progress("score", done, len(fit.sites), suspicious=int((z > self.u).sum()))
        return Ranking(tuple(scores), tuple(masks), Trace(notes=self._notes(fit.sites, short)))

    def _notes(self, sites: Sequence[Site], short: Sequence[str]) -> tuple[str, ...]:
        if not short:
            return ()
        return (
            f"{len(short)} of {len(sites)} layers have too few channels for one to lie "
            f"{self.u:g} standard deviations above the mean",
        )


@torch.no_grad()
def lipschitz_bounds(model: Classifier, site: Site) -> Tensor:
    r"""How strongly each channel of `site` can react to its input: $\sigma_k$, `(channels,)`.

    $$\sigma_k = \lVert W_k \rVert_2 \, \frac{|\gamma_k|}{\sqrt{v_k + \epsilon}}$$

    $W_k$ is the kernel of channel k as a matrix (inputs, height x width), $\lVert\cdot\rVert_2$ its
    largest singular value; for linear layers and depthwise convolutions that is the length of the
    weights. $\gamma$ and the running variance $v$ are those of the batch norm that alone reads the
    convolution. Normalisations without a running variance (group, layer, instance norm) count as
    $v + \epsilon = 1$, for their variance belongs to the image; without a normalisation the second
    factor is 1.

    The paper uses $\lVert W_k \rVert_2$ for the norm of the whole convolution (the matrix that
    maps all pixels to all pixels of the channel). For a kernel of $q$ positions these are related
    by $\lVert W_k \rVert_2 \le \lVert W_k \rVert_F \le \lVert \mathrm{conv}_k \rVert_2 \le
    \sqrt q \, \lVert W_k \rVert_2$, as long as one output sees the whole kernel: so
    $\sigma_k$ is a bound up to the factor $\sqrt q$, which is the same for all channels of a layer.

    Args:
        model: the classifier; it is not changed.
        site: where the channels are, from `reprune.sites.find_sites`.

    Returns:
        Non-negative float32 on the CPU.

    Source: Zheng et al., ECCV 2022 (there: UCLC).
    """
    network = model.network
    kernels = network.get_submodule(site.layer).weight
    bounds = spectral_norms(kernels)  # type: ignore[arg-type]
    if site.name != site.layer:
        norm = network.get_submodule(site.name)
        bounds *= network.get_parameter(site.weight).detach().cpu().double().abs()
        variance = getattr(norm, "running_var", None)
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and variance is not None:
            bounds /= (variance.detach().cpu().double() + norm.eps).sqrt()
    return bounds.float()


def spectral_norms(kernels: Tensor) -> Tensor:
    """The largest singular value of each kernel as a matrix (inputs, positions).

    Args:
        kernels: `(channels, inputs, ...)`, the weights of a convolution or linear layer.

    Returns:
        `(channels,)`, float64 on the CPU.
    """
    weights = kernels.detach().cpu().double()
    if weights.ndim == 2:
        lengths: Tensor = torch.linalg.vector_norm(weights, dim=1)
        return lengths
    matrices = weights.flatten(2)
    if matrices.shape[1] < matrices.shape[2]:
        matrices = matrices.mT
    squares: Tensor = torch.linalg.eigvalsh(matrices.mT @ matrices)
    return squares[:, -1].clamp_min(0).sqrt()


def standard_scores(values: Tensor) -> Tensor:
    """Standard deviations above the mean, `(n,)`; zero where all values are equal."""
    centred = values - values.mean()
    spread = values.std() if len(values) > 1 else values.new_zeros(())
    if not spread > 1e-6 * values.abs().max():
        return torch.zeros_like(values)
    return centred / spread
