"""The settings of a run, and its folder: stages that know whether their work is done, files that are whole or absent.

Everything else stands on this room, which knows nothing of CT.
"""

from .files import digest, load_tensors, read_json, replacing, save_tensors, write_text
from .lock import occupy
from .settings import DENOISERS, PRESETS, Settings, from_yaml
from .stage import begin, check_intact, finish, is_done, progress, results_of, take_twin

__all__ = [
    "DENOISERS",
    "PRESETS",
    "Settings",
    "begin",
    "check_intact",
    "digest",
    "finish",
    "from_yaml",
    "is_done",
    "load_tensors",
    "occupy",
    "progress",
    "read_json",
    "replacing",
    "results_of",
    "save_tensors",
    "take_twin",
    "write_text",
]
