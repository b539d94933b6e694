"""The denoiser's side of the Wasserstein game, as a term."""

from __future__ import annotations

import torch
from torch import Tensor

from taskloss.algebra import Term
from taskloss.checks import check_callable, check_image
from taskloss.critic import WassersteinCritic
from taskloss.values import zero_loss


class AdversarialLoss(Term):
    r"""What the critic thinks of the restored image, with the sign that the denoiser minimises.

    .. math:: L_{gan}(\hat x) = -E[D(\hat x)]

    It leaves no gradient in the critic, moves no batch statistic and flips no flag there. The critic is not part of
    this module: it is not in its ``parameters()`` or ``state_dict()``, and you train, move and save it yourself.

    Args:
        critic: The critic, which must be the one that is trained.

    Shape:
        x_hat ``(N, C, *spatial)``; the result is a scalar.

    Raises:
        TypeError: If ``critic`` is not a :class:`WassersteinCritic`.

    Example:
        >>> import torch
        >>> critic = WassersteinCritic(spatial_dims=2, patch_size=(8, 8))
        >>> x_hat = torch.rand(2, 1, 8, 8)
        >>> loss = AdversarialLoss(critic)
        >>> bool(torch.isclose(loss(x_hat), -critic(x_hat).mean()))
        True

    Reference:
        Task-Oriented Low-Dose CT Image Denoising, Eq. 2, with the sign convention of :class:`WassersteinCritic`.
    """

    def __init__(self, critic: WassersteinCritic) -> None:
        super().__init__()
        if not isinstance(critic, WassersteinCritic):
            if isinstance(critic, type):
                check_callable("adversarial_loss", critic, "expected a WassersteinCritic")
            raise TypeError(
                f"adversarial_loss: expected a WassersteinCritic, got {type(critic).__name__}; "
                "wrap the network in WassersteinCritic(network=...)"
            )
        self._hidden = [critic]  # a list keeps it out of the module registry

    @property
    def critic(self) -> WassersteinCritic:
        """The critic that judges."""
        return self._hidden[0]

    def forward(self, x_hat: Tensor) -> Tensor:
        """``-E[D(x_hat)]``, a scalar; see the class.

        Shape:
            x_hat ``(N, C, *spatial)`` as the critic takes it; a scalar comes back.
        """
        check_image(self.where, x_hat)
        if not torch.compiler.is_compiling():
            self.critic.replicas.note(x_hat)
        if x_hat.shape[0] == 0:
            return zero_loss(x_hat)
        return -self.critic.judge(x_hat).mean()
