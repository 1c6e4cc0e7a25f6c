"""Running a packed Lance: int4 linears, swapped into a model by name."""
