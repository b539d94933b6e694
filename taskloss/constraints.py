"""What keeps a critic Lipschitz: weights clipped after each step, or a gradient penalty in its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from taskloss.checks import InputError
from taskloss.precision import full_precision, no_autocast

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
_NORMS = (*_BATCH_NORMS, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)


class Constraint(Protocol):
    """What :class:`WassersteinCritic` asks of a constraint."""

    weight: float

    def check(self, network: nn.Module) -> None:
        """Refuse a network that the constraint does not suit."""

    def penalty(self, critic: Callable[[Tensor], Tensor], x_hat: Tensor, reference: Tensor) -> Tensor | None:
        """An unweighted penalty for the critic's loss, or None."""

    def apply_(self, network: nn.Module) -> None:
        """Change the weights after a step."""


class WeightClipping:
    r"""Clamp every parameter of the critic to ``[-clip, clip]`` after each step.

    The paper writes :math:`\|\theta_D\|_1 \le \epsilon` and its code clamps element by element; this does the
    latter, batch-norm scales and all, unless ``skip_norm`` leaves normalisation layers alone (a batch norm whose
    scale is clamped to 0.01 passes on a hundredth of its input).

    Args:
        clip: The bound, 0.01 in the paper.
        skip_norm: Leave the scales and shifts of normalisation layers as they are.

    Reference:
        Task-Oriented Low-Dose CT Image Denoising, Eq. 1; Arjovsky et al., Wasserstein GAN, 2017, algorithm 1.
    """

    weight = 0.0

    def __init__(self, clip: float = 0.01, *, skip_norm: bool = False) -> None:
        if not clip > 0:
            raise ValueError(f"weight_clipping: clip must be positive, got {clip!r}")
        self.clip = clip
        self.skip_norm = skip_norm

    def check(self, network: nn.Module) -> None:
        """Any network can be clipped."""

    def penalty(self, critic: Callable[[Tensor], Tensor], x_hat: Tensor, reference: Tensor) -> None:
        """Nothing is added to the loss."""
        return

    @torch.no_grad()
    def apply_(self, network: nn.Module) -> None:
        """Clamp the weights in place."""
        for module in network.modules():
            if self.skip_norm and isinstance(module, _NORMS):
                continue
            for parameter in module.parameters(recurse=False):
                parameter.clamp_(-self.clip, self.clip)


class GradientPenalty:
    r"""Pull the norm of the critic's gradient to one on lines between restored and reference images.

    .. math:: E\big[(\|\nabla_{\tilde x} D(\tilde x)\|_2 - 1)^2\big], \quad
        \tilde x = \alpha x^* + (1 - \alpha) \hat x,\; \alpha \sim U(0, 1) \text{ per sample}

    The norm is taken per sample over all its axes, whatever the rank. Batch norm is refused: through it one
    sample's score depends on the others, and the penalty loses its meaning.

    Args:
        weight: The penalty's weight, 10 by convention.
        generator: Draws alpha; None draws from torch's global generator.

    Reference:
        Gulrajani et al., Improved Training of Wasserstein GANs, 2017, Eq. 3.
    """

    def __init__(self, weight: float = 10.0, *, generator: torch.Generator | None = None) -> None:
        if not weight >= 0:
            raise ValueError(f"gradient_penalty: weight must not be negative, got {weight!r}")
        self.weight = weight
        self.generator = generator

    def check(self, network: nn.Module) -> None:
        """Refuse batch norm."""
        for name, module in network.named_modules():
            if isinstance(module, _BATCH_NORMS):
                raise InputError(
                    "gradient_penalty",
                    f"{name!r} is a {type(module).__name__}, which mixes the samples of a batch; "
                    "use InstanceNorm, GroupNorm or no norm, or WeightClipping(0.01)",
                )

    def penalty(self, critic: Callable[[Tensor], Tensor], x_hat: Tensor, reference: Tensor) -> Tensor:
        """The unweighted penalty, a scalar."""
        # Validation under inference mode wants the penalty too, and it is made of a gradient.
        with torch.inference_mode(False), no_autocast(x_hat.device):
            x_hat, reference = full_precision((x_hat.detach(), reference.detach()))
            alpha_shape = (x_hat.shape[0],) + (1,) * (x_hat.dim() - 1)
            device = x_hat.device if self.generator is None else self.generator.device
            alpha = torch.rand(alpha_shape, generator=self.generator, device=device, dtype=torch.float32)
            between = torch.lerp(x_hat, reference, alpha.to(x_hat)).requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
            excess: Tensor = torch.linalg.vector_norm(gradient.flatten(1), dim=1) - 1
            return excess.square().mean()

    def apply_(self, network: nn.Module) -> None:
        """The weights are free."""
