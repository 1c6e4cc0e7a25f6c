"""The one exception a user is meant to read: a single sentence, no traceback."""


class LanceQuantError(Exception):
    """Bad input. The message says in one sentence what is wrong, in which file or key, and how to mend it."""
