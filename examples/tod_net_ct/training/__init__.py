"""Stages 3 and 4: task networks on normal dose, then every denoiser in one loop; a killed training resumes.

`RECIPES` says what one denoiser does not share with the others.
"""

from .denoiser import train_denoiser
from .loop import machine
from .recipes import FILTERS, RECIPES, parse, restorer
from .task_network import dice_loss, folder_of, load_task, train_task

__all__ = [
    "FILTERS",
    "RECIPES",
    "dice_loss",
    "folder_of",
    "load_task",
    "machine",
    "parse",
    "restorer",
    "train_denoiser",
    "train_task",
]
