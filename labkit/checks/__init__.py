"""The checks of the exercises: check.py is their frame, lessonNN.py holds those of a lesson in its dict CHECKS.

worked.py finds the worked answers.
"""

from labkit.checks.check import STUB_SAYS, CheckResult, Failures, alike, check, diagnoses, has_parts, ids, is_mask

__all__ = ["STUB_SAYS", "CheckResult", "Failures", "alike", "check", "diagnoses", "has_parts", "ids", "is_mask"]
