"""The Wasserstein game: the critic, its loss and its step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from taskloss.checks import InputError, check_callable, check_image, check_same, readable, shape
from taskloss.constraints import Constraint, WeightClipping
from taskloss.diagnosis import explains_double_backward, told
from taskloss.distributed import (
    ReplicaCheck,
    average_gradients_,
    n_processes,
    shards_itself,
    share_weights_,
    to_the_input_alone,
)
from taskloss.finite import greatest, not_finite
from taskloss.precision import full_precision, no_autocast
from taskloss.trees import lent
from taskloss.values import LossValue, check_finite, zero_loss


class WassersteinCritic(nn.Module):
    r"""A critic whose score should be high for reference images and low for restored ones.

    .. math:: L_D = E[D(\hat x)] - E[D(x^*)] + \mathrm{penalty}

    minimised by the critic; the denoiser minimises :math:`-E[D(\hat x)]` (:class:`AdversarialLoss`). The paper
    prints both signs reversed in Eq. 1 and 2, which is the same game under D -> -D.

    By default the network is the paper's: three 3x3x3 convolutions (32, 64, 128 channels), each with batch norm
    and leaky ReLU, and one linear output. Strides 2, 2, 1 and a final 2x average pool are taken from the authors'
    code, where the paper is silent. Its linear layer fixes the patch size.

    Args:
        in_channels: Channels of the images.
        spatial_dims: 1, 2 or 3.
        patch_size: Spatial size of the images, one number per axis.
        channels: Channels of the three convolutions.
        network: Any network that gives each sample at least one number, in place of the paper's.
        constraint: :class:`WeightClipping` (the paper's) or :class:`GradientPenalty`.

    Attributes:
        check_finite: Raise an error that names the culprit when the loss, or in :meth:`step` its gradient, is NaN or
            infinite (default), with the critic and its statistics left as they were. Costs one device sync, shared
            with ``floats()``; False trains without any.

    Raises:
        InputError: For images of another patch size, device or dtype, or a network that mixes samples.
        FloatingPointError: For a loss that is not finite.
        ValueError: If neither ``patch_size`` nor ``network`` is given, or both are.

    Example:
        >>> critic = WassersteinCritic(spatial_dims=2, patch_size=(16, 16), constraint=WeightClipping(0.01))
        >>> optimizer = torch.optim.RMSprop(critic.parameters(), lr=5e-4)
        >>> value = critic.step(optimizer, torch.rand(4, 1, 16, 16), torch.rand(4, 1, 16, 16))
        >>> sorted(value.terms)
        ['fake', 'real']

    Reference:
        Task-Oriented Low-Dose CT Image Denoising, Eq. 1 and section 3.3; Arjovsky et al., Wasserstein GAN, 2017.
    """

    def __init__(
        self,
        in_channels: int = 1,
        spatial_dims: int = 3,
        *,
        patch_size: Sequence[int] | None = None,
        channels: Sequence[int] = (32, 64, 128),
        network: nn.Module | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        super().__init__()
        if network is not None and not isinstance(network, nn.Module):
            check_callable("wasserstein_critic", network, "network must be an nn.Module")
            raise TypeError(
                f"wasserstein_critic: network must be an nn.Module, got {type(network).__name__}; "
                "wrap the function in an nn.Module"
            )
        if isinstance(constraint, type):
            check_callable("wasserstein_critic", constraint, "constraint must be an object")
        if (network is None) == (patch_size is None):
            raise ValueError(
                "wasserstein_critic: give either patch_size, for the paper's network, or network=..., for your own"
            )
        if isinstance(patch_size, int):
            raise ValueError(
                f"wasserstein_critic: patch_size must have a number for each spatial axis, got {patch_size}; "
                f"patch_size={(patch_size,) * spatial_dims}"
            )
        self.patch_size = None if patch_size is None else tuple(patch_size)
        if network is None:
            assert self.patch_size is not None
            network = paper_critic(in_channels, spatial_dims, self.patch_size, channels)
        self.network = network
        self.constraint: Constraint = WeightClipping(0.01) if constraint is None else constraint
        self.constraint.check(network)
        self.check_finite = True
        self._weights_shared = False
        self.replicas = ReplicaCheck()

    def forward(self, images: Tensor) -> Tensor:
        """One score per sample, ``(N,)``, in float32 or wider.

        Shape:
            images ``(N, C, *spatial)``; the scores ``(N,)``.
        """
        return self._scores(self.network, images)

    def loss(self, x_hat: Tensor, reference: Tensor) -> Tensor:
        """The critic's loss (Eq. 1), a scalar; x_hat is detached inside.

        Shape:
            x_hat and reference ``(N, C, *spatial)``; a scalar comes back.
        """
        return self.breakdown(x_hat, reference).total

    def breakdown(self, x_hat: Tensor, reference: Tensor) -> LossValue:
        """The critic's loss seen whole: ``fake`` = E[D(x_hat)], ``real`` = E[D(reference)], and the penalty.

        Shape:
            x_hat and reference ``(N, C, *spatial)``; total and terms are scalars.
        """
        value = self._value(x_hat, reference)
        if self.check_finite and readable(x_hat):
            check_finite(
                value,
                within="wasserstein_critic/",
                x_hat=x_hat,
                reference=reference,
                weights=self.network.parameters(),
            )
        return value

    def _value(self, x_hat: Tensor, reference: Tensor) -> LossValue:
        check_image("wasserstein_critic", x_hat)
        check_same("wasserstein_critic", x_hat, reference)
        if x_hat.shape[0] == 0:
            return self._nothing()
        x_hat, reference = x_hat.detach(), reference.detach()
        reference = self._alike(reference, x_hat)
        terms = {"fake": self(x_hat).mean(), "real": self(reference).mean()}
        weights = {"fake": 1.0, "real": -1.0}
        total = terms["fake"] - terms["real"]
        penalty = self.constraint.penalty(self, x_hat, reference)
        if penalty is not None:
            terms["penalty"], weights["penalty"] = penalty, self.constraint.weight
            total = total + self.constraint.weight * penalty
        return LossValue(total, terms, weights)

    def _nothing(self) -> LossValue:
        """The loss of an empty batch: zeros that back-propagate, for other processes may have samples."""
        zero = torch.stack([full_precision(p.flatten()[:0]).sum() for p in self.network.parameters()]).sum()
        weights = {"fake": 1.0, "real": -1.0, "penalty": self.constraint.weight}
        names = ["fake", "real", *(["penalty"] if self.constraint.weight else [])]
        return LossValue(zero, dict.fromkeys(names, zero), {name: weights[name] for name in names})

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        x_hat: Tensor,
        reference: Tensor,
        *,
        backward: Callable[[Tensor], object] | None = None,
    ) -> LossValue:
        """One step of the critic: zero_grad, backward, average over processes, step, constraint.

        Args:
            optimizer: The critic's own optimiser.
            x_hat: Restored images; detached inside.
            reference: Reference images.
            backward: In place of ``loss.backward()``, for instance ``fabric.backward``.

        Under ``torch.distributed`` the gradients are averaged over the processes here, so the critic needs no
        ``DistributedDataParallel`` around it (whose hooks a gradient penalty would break); the first step gives every
        process the first one's weights. Denoisers that drift apart, because nothing averages their gradients, get a
        warning. A ``GradScaler``'s ``backward`` must unscale the gradients too, because the optimiser steps without it.

        Shape:
            x_hat and reference ``(N, C, *spatial)``; total and terms are scalars.
        """
        if not self._weights_shared:
            share_weights_(self.network)
            self._weights_shared = True
        self.replicas.compare("wasserstein_critic", x_hat.device)
        before = [buffer.clone() for buffer in self.network.buffers()] if self.check_finite else []
        value = self._value(x_hat, reference)
        if x_hat.shape[0] == 0 and n_processes() == 1:
            return value  # a step of zeros would still move the weights, by momentum and decay
        optimizer.zero_grad(set_to_none=True)
        try:
            (backward or torch.Tensor.backward)(value.total)
        except RuntimeError as error:
            if explains_double_backward(error) and "penalty" in value.terms:
                raise InputError(
                    "gradient_penalty",
                    "the critic cannot be differentiated twice, which the penalty needs; take out what torch names "
                    "above, or use WeightClipping(0.01)",
                ) from error
            raise
        average_gradients_(self.parameters())
        if self.check_finite:
            self._check_step(value, x_hat, reference, before)
        optimizer.step()
        self.constraint.apply_(self.network)
        return value

    def _check_step(self, value: LossValue, x_hat: Tensor, reference: Tensor, before: list[Tensor]) -> None:
        """Name a loss or gradient that is not finite; weights and statistics then are as before the step."""
        parameters = list(self.network.parameters())
        worst = greatest(p.grad for p in parameters)
        gradient = 0.0 if worst is None else value.floats_and(worst)
        bad = [name for name, number in value.floats().items() if not math.isfinite(number)]
        if not bad and math.isfinite(gradient):
            return
        with torch.no_grad():
            for buffer, old in zip(self.network.buffers(), before, strict=True):
                buffer.copy_(old)
        for parameter in parameters:
            parameter.grad = None
        names = [name for name in bad if name != "total"] or ["total"]
        raise not_finite(
            [f"wasserstein_critic/{name}" for name in names],
            value.floats()[names[0]],
            gradient,
            at="the weights",
            inputs={"x_hat": x_hat, "reference": reference, "weights": parameters},
        )

    @torch.no_grad()
    def distance(self, x_hat: Tensor, reference: Tensor) -> Tensor:
        """The Wasserstein estimate ``E[D(reference)] - E[D(x_hat)]``, a scalar for the log; nothing moves.

        Shape:
            x_hat and reference ``(N, C, *spatial)``; a scalar comes back.
        """
        check_same("wasserstein_critic", x_hat, reference)
        if x_hat.shape[0] == 0:
            return zero_loss(x_hat)
        reference = self._alike(reference, x_hat)
        return (self.judge(reference) - self.judge(x_hat)).mean()

    def judge(self, images: Tensor) -> Tensor:
        """The scores ``(N,)`` as a function of the images alone.

        Parameters are detached and buffers are copies: a gradient reaches the images, while none reaches the
        critic, no batch statistic moves and no flag is touched.

        Shape:
            images ``(N, C, *spatial)``; the scores ``(N,)``.
        """
        still = {name: parameter.detach() for name, parameter in self.network.named_parameters()}
        still.update((name, buffer.clone()) for name, buffer in self.network.named_buffers())
        if shards_itself(self.network):  # then it puts its whole weights in by itself
            still = {name: still[name] for name, _ in self.network.named_buffers()}
            return to_the_input_alone(
                lambda x: self._scores(lambda y: functional_call(self.network, still, (y,)), x), images
            )
        return self._scores(lambda x: functional_call(self.network, still, (x,)), images)

    def _alike(self, reference: Tensor, x_hat: Tensor) -> Tensor:
        """The reference in the critic's precision, where the data came in another than x_hat."""
        weight = next((p for p in self.network.parameters() if p.is_floating_point()), x_hat)
        if reference.dtype == x_hat.dtype or torch.is_autocast_enabled(reference.device.type):
            return reference
        return reference.to(weight.dtype)

    def _scores(self, network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        check_image("wasserstein_critic", images)
        if self.patch_size is not None and tuple(images.shape[2:]) != self.patch_size:
            mend = f"build it with patch_size={tuple(images.shape[2:])}"
            if tuple(images.shape[1:]) == self.patch_size:
                mend = "add the batch axis with x_hat[None]"
            raise InputError(
                "wasserstein_critic",
                f"built for patches of {self.patch_size}, got images {shape(images)}; {mend}",
            )
        images = lent(images)
        scores = told(
            "wasserstein_critic", self.network, images, lambda: network(images), who="the critic", owner="critic"
        )
        if scores.dim() == 0 or scores.shape[0] != images.shape[0]:
            raise InputError(
                "wasserstein_critic",
                f"{images.shape[0]} samples came in and scores of shape {tuple(scores.shape)} went out; "
                "the network must keep the batch axis",
            )
        with no_autocast(images.device):
            rows: Tensor = full_precision(scores).flatten(1).mean(1) if scores.dim() > 1 else full_precision(scores)
        return rows


def paper_critic(
    in_channels: int, spatial_dims: int, patch_size: Sequence[int], channels: Sequence[int] = (32, 64, 128)
) -> nn.Sequential:
    """The paper's critic (section 3.3) for one patch size, as a plain network ``(N, C, *patch) -> (N, 1)``."""
    if spatial_dims not in (1, 2, 3) or len(patch_size) != spatial_dims:
        raise ValueError(
            f"wasserstein_critic: patch_size {tuple(patch_size)} must have spatial_dims={spatial_dims} numbers, "
            "and spatial_dims must be 1, 2 or 3"
        )
    if len(channels) != 3:
        raise ValueError(f"wasserstein_critic: channels must be three numbers, got {tuple(channels)}")
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial_dims - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[spatial_dims - 1]
    pool = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[spatial_dims - 1]

    def layers() -> Iterator[nn.Module]:
        before = in_channels
        for after, stride in zip(channels, (2, 2, 1), strict=True):
            yield conv(before, after, 3, stride=stride, padding=1)
            yield norm(after)
            yield nn.LeakyReLU(0.2)
            before = after

    features = channels[-1]
    for size in patch_size:
        features *= (size + 3) // 4 // 2  # two strides that round up, one pool that rounds down
    if features == 0:
        raise ValueError(f"wasserstein_critic: patch_size {tuple(patch_size)} is too small; give at least 5 per axis")
    return nn.Sequential(*layers(), pool(2), nn.Flatten(), nn.Linear(features, 1))
