"""The settings of `python -m flows.full_run`: one folder a group, one file a choice."""
