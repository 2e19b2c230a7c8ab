"""Studies: methods × seeds × measures, from one file to one table, in cells that are computed once."""

from analysis.study.run import StudyRun, run_study
from analysis.study.spec import MeasureEntry, MethodEntry, StudySpec, read_study

__all__ = ["MeasureEntry", "MethodEntry", "StudyRun", "StudySpec", "read_study", "run_study"]
