"""What keeps a critic Lipschitz: weights clipped after each step, or a gradient penalty in its loss."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from taskloss.checks import InputError
from taskloss.distributed import shards_itself
from taskloss.precision import full_precision, no_autocast

_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_TORCH_NORMS = (_BATCH_NORM, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)
_NORM_NAMES = re.compile(r"norm|abn|grn", re.IGNORECASE)  # RmsNorm, ActNorm, InPlaceABN, GlobalResponseNorm, GRN
_BATCH_NORM_NAMES = re.compile(r"batch_?norm|abn|syncbn", re.IGNORECASE)


class Constraint(Protocol):
    """What :class:`WassersteinCritic` asks of a constraint."""

    weight: float

    def check(self, network: nn.Module) -> None:
        """Refuse a network that the constraint does not suit."""

    def penalty(self, critic: Callable[[Tensor], Tensor], x_hat: Tensor, reference: Tensor) -> Tensor | None:
        """An unweighted penalty for the critic's loss, or None."""

    def apply_(self, network: nn.Module) -> None:
        """Change the weights after a step."""


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer, torch's or another library's: it holds scales and shifts alone."""
    if isinstance(module, _TORCH_NORMS):
        return True
    own = list(module.parameters(recurse=False))
    vectors = all(p.numel() == max(p.shape, default=1) for p in own)  # (C,) or (1, C, 1, 1); a convolution is none
    return bool(own) and vectors and _NORM_NAMES.search(type(module).__name__) is not None


def mixes_samples(module: nn.Module) -> bool:
    """Whether a module is a batch norm, torch's or another library's."""
    name = type(module).__name__
    if isinstance(module, _BATCH_NORM):
        return True
    return is_norm(module) and _BATCH_NORM_NAMES.search(name) is not None and "frozen" not in name.lower()


@contextlib.contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Attention by matrix products and compiled functions eagerly: their fast kernels have one derivative only."""
    if torch.compiler.is_compiling():
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with contextlib.ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # Before anything is compiled dynamo is not imported, and that would cost seconds. The stance came in torch 2.6.
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


class WeightClipping:
    r"""Clamp every parameter of the critic to ``[-clip, clip]`` after each step.

    The paper writes :math:`\|\theta_D\|_1 \le \epsilon` and its code clamps element by element; this does the
    latter, batch-norm scales and all, unless ``skip_norm`` leaves normalisation layers alone (a batch norm whose
    scale is clamped to 0.01 passes on a hundredth of its input).

    Args:
        clip: The bound, 0.01 in the paper.
        skip_norm: Leave the scales and shifts of normalisation layers as they are: torch's, and those of other
            libraries that are called so and hold nothing but scales and shifts.

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
        """Nothing is added to the loss.

        Shape:
            x_hat and reference ``(N, C, *spatial)``; a scalar comes back.
        """
        return

    @torch.no_grad()
    def apply_(self, network: nn.Module) -> None:
        """Clamp the weights in place."""
        for module in network.modules():
            if self.skip_norm and is_norm(module):
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
            if mixes_samples(module):
                raise InputError(
                    "gradient_penalty",
                    f"{name!r} is a {type(module).__name__}, which mixes the samples of a batch; "
                    "use InstanceNorm, GroupNorm or no norm, or WeightClipping(0.01)",
                )

    def penalty(self, critic: Callable[[Tensor], Tensor], x_hat: Tensor, reference: Tensor) -> Tensor:
        """The unweighted penalty, a scalar.

        Shape:
            x_hat and reference ``(N, C, *spatial)``; a scalar comes back.
        """
        if isinstance(critic, nn.Module) and shards_itself(critic):
            raise InputError(
                "gradient_penalty",
                "the critic is sharded, and fully_shard frees the weights that the penalty's second derivative needs; "
                "leave the critic whole (critic.step averages its gradients itself), or use WeightClipping(0.01)",
            )
        weights = critic.parameters() if isinstance(critic, nn.Module) else iter(())
        dtype = next((p.dtype for p in weights if p.is_floating_point()), None)
        # Validation under inference mode wants the penalty too, and it is made of a gradient.
        with torch.inference_mode(False), no_autocast(x_hat.device), _twice_differentiable():
            x_hat, reference = full_precision((x_hat.detach(), reference.detach()))
            alpha_shape = (x_hat.shape[0],) + (1,) * (x_hat.dim() - 1)
            device = x_hat.device if self.generator is None else self.generator.device
            alpha = torch.rand(alpha_shape, generator=self.generator, device=device, dtype=torch.float32)
            between = torch.lerp(x_hat, reference, alpha.to(x_hat)).requires_grad_()
            with torch.enable_grad():
                scores = critic(between if dtype is None else between.to(dtype))
                (gradient,) = torch.autograd.grad(scores.sum(), between, create_graph=True)
            excess: Tensor = torch.linalg.vector_norm(gradient.flatten(1), dim=1) - 1
            return excess.square().mean()

    def apply_(self, network: nn.Module) -> None:
        """The weights are free."""
