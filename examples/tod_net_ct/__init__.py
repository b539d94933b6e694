"""TOD-Net on CT: the whole paper, from files to a report. Rooms by subject; `__main__` is the command line over them.

From the ground up: `run`; `scans` and `dose`; `networks` and `metrics`; `inference`; `training`; `evaluation`; `report`
and `study`. A room imports those below it, by their front.
"""
