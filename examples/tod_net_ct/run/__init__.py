"""The settings of a run, and its folder: stages that know whether their work is done, files that are whole or absent.

Everything else stands on this room, which knows nothing of CT.
"""

from .files import digest, is_intact, load_tensors, read_json, replacing, save_tensors, write_text
from .lock import occupy
from .presets import PRESETS, from_yaml
from .settings import (
    Budget,
    Choice,
    Data,
    Dose,
    Guidance,
    Machine,
    Networks,
    Patches,
    Seed,
    Settings,
    Split,
    TaskLoss,
    TaskNetworks,
    Training,
    decisive,
    only,
)
from .stage import begin, check_intact, finish, is_done, one_thread, progress, results_of, take_twin

__all__ = [
    "Budget",
    "Choice",
    "Data",
    "Dose",
    "Patches",
    "Guidance",
    "Machine",
    "Networks",
    "PRESETS",
    "Seed",
    "Settings",
    "Split",
    "TaskLoss",
    "TaskNetworks",
    "Training",
    "begin",
    "check_intact",
    "decisive",
    "digest",
    "finish",
    "from_yaml",
    "is_done",
    "is_intact",
    "load_tensors",
    "occupy",
    "one_thread",
    "only",
    "progress",
    "read_json",
    "replacing",
    "results_of",
    "save_tensors",
    "take_twin",
    "write_text",
]
