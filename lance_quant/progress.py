"""`Progress`: what a long stage calls as it goes on: progress(done, total, what)."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
