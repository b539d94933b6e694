"""The settings of a run, and its folder: stages that know whether their work is done, files that are whole or absent.

Everything else stands on this room, which knows nothing of CT.
"""

from .files import digest, load_tensors, replacing, save_tensors, write_text
from .settings import DENOISERS, PRESETS, Settings, from_yaml
from .stage import begin, finish, is_done, progress, results_of, take_twin

__all__ = [
    "DENOISERS",
    "PRESETS",
    "Settings",
    "begin",
    "digest",
    "finish",
    "from_yaml",
    "is_done",
    "load_tensors",
    "progress",
    "replacing",
    "results_of",
    "save_tensors",
    "take_twin",
    "write_text",
]
