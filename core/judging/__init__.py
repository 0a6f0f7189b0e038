"""Anytime-valid judging of a target beside its source: pure folds over health samples. Knows no switch and no clock."""
