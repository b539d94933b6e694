"""TOD-Net on CT: the whole paper, from files to a report. Rooms by subject; `__main__` is the command line over them.

From the ground up: `run`; `scans` and `dose`; `networks` and `metrics`; `inference`; `training`; `evaluation`; `report`
and `study`. A room imports those below it, by their front.
"""

import os

# Threads that wait sleep, where the user says nothing else: beside another busy process those that spin slow both down
# more than fivefold. OpenMP reads this when torch is imported, which nothing here has done yet.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
