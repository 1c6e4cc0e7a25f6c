"""One file a command: parse the settings, chain the tasks, no arithmetic."""
