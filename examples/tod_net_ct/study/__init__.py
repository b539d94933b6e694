"""Many runs with one answer: the seeds of the study, real scans, the cost at the paper's settings, the calibrated dose.

What was measured lies in `results/`, and `summary` writes it up.
"""
