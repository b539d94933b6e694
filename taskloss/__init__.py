"""Task-oriented losses: a frozen downstream network guides an image restorer towards what the task needs."""

from taskloss._version import __version__
from taskloss.adversarial import AdversarialLoss
from taskloss.algebra import LossSum, LossValue, Term
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
