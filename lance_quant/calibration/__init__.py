"""What the linears of Lance see: calibration samples, hooks at the four input sites of a layer, Parquet."""
