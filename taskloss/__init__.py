"""Task-oriented losses: a frozen downstream network guides an image restorer towards what the task needs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from taskloss._version import __version__

if TYPE_CHECKING:
    from taskloss.adversarial import AdversarialLoss
    from taskloss.algebra import LossSum, Term
    from taskloss.audit import Finding, audit_task_model
    from taskloss.balancing import GradientBalancer
    from taskloss.checks import InputError
    from taskloss.consistency import TaskConsistencyLoss, soft_kl
    from taskloss.constraints import GradientPenalty, WeightClipping
    from taskloss.critic import WassersteinCritic
    from taskloss.fidelity import Fidelity
    from taskloss.figures import plot_gradient_maps
    from taskloss.frozen import Frozen
    from taskloss.gradients import Focus, GradientMaps, gradient_maps
    from taskloss.history import History
    from taskloss.task import TaskOrientedLoss
    from taskloss.transfer import Interval, Transfer, TransferMeter
    from taskloss.values import LossValue

__all__ = [
    "AdversarialLoss",
    "Fidelity",
    "Finding",
    "Focus",
    "Frozen",
    "GradientBalancer",
    "GradientMaps",
    "GradientPenalty",
    "History",
    "InputError",
    "Interval",
    "LossSum",
    "LossValue",
    "TaskConsistencyLoss",
    "TaskOrientedLoss",
    "Term",
    "Transfer",
    "TransferMeter",
    "WassersteinCritic",
    "WeightClipping",
    "__version__",
    "audit_task_model",
    "gradient_maps",
    "plot_gradient_maps",
    "soft_kl",
]

# Where each name lives, as type checkers read it above. A name is imported when it is first asked for, so that
# `import taskloss` costs nothing and a training does not wait for figures, pages and audits.
_HOMES = {
    "adversarial": ("AdversarialLoss",),
    "algebra": ("LossSum", "Term"),
    "audit": ("Finding", "audit_task_model"),
    "balancing": ("GradientBalancer",),
    "checks": ("InputError",),
    "consistency": ("TaskConsistencyLoss", "soft_kl"),
    "constraints": ("GradientPenalty", "WeightClipping"),
    "critic": ("WassersteinCritic",),
    "fidelity": ("Fidelity",),
    "figures": ("plot_gradient_maps",),
    "frozen": ("Frozen",),
    "gradients": ("Focus", "GradientMaps", "gradient_maps"),
    "history": ("History",),
    "task": ("TaskOrientedLoss",),
    "transfer": ("Interval", "Transfer", "TransferMeter"),
    "values": ("LossValue",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'taskloss' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"taskloss.{_HOME[name]}"), name)
    return found


def __dir__() -> list[str]:
    return list(__all__)
