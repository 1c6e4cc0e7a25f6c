"""What a script says of bad input."""

from collections.abc import Callable

import pytest


def sentence_of(main: Callable[[list[str]], None], words: list[str]) -> str:
    """That it ends in one sentence, and which."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = ended.value.code
    assert said.startswith("error: ") and "\n" not in said
    return said
