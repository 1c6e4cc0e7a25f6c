"""Scales, folds and 4-bit rounding of one layer at a time, and the packing of all layers into one folder."""
