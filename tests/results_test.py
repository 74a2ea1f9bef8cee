"""docs/results.md says what the results that are kept under docs/results say."""

import pathlib

import pytest

from mtl_sparse.report import study, study_tables

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PILOT = ("dense", "t70", "fixed", "free", "none", "ramp7", "dense16", "t70_16")


@pytest.mark.parametrize("make", [study_tables.summary, study_tables.against_dense])
def test_every_table_follows_from_the_results(make):
    rows = make(study.read([DOCS / "results" / "pilot" / name for name in PILOT]))
    assert len(rows) > len(PILOT)
    assert study_tables.to_markdown(rows) in (DOCS / "results.md").read_text()


def test_what_the_text_says_of_the_pilot():
    found = study.read([DOCS / "results" / "pilot" / name for name in PILOT])
    dense, t70, fixed, _, _, ramp, dense16, t70_16 = found.rows
    gain = study.compare_gain
    assert gain(t70, dense).mean < 0 and abs(gain(t70_16, dense16).mean) < 1, "behind, then about level"
    assert gain(dense16, dense).mean > 0 and gain(t70_16, t70).mean > 0
    assert gain(fixed, dense).mean > 0 and fixed.sparsity("group").mean == 0
    assert 0.025 < 0.7 - ramp.sparsity("group").mean < 0.035
