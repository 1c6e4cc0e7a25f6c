"""What a user meets when something is wrong or stopped: one sentence on stderr and an exit code, no traceback."""

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from lance_quant.errors import LanceQuantError

BAD_INPUT = 2
INTERRUPTED = 130
TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"  # what the user said; `run_command` sets it for Hydra
GRACE_SECONDS = 5  # between Ctrl-C and the end, for work that does not look at the stop event
KEPT = "stopped: finished stages and layers are kept, run the same command to go on"

# What Hydra and OmegaConf add to a message that is bookkeeping, or is no help where unknown keys are errors.
NOISE = (
    r"\n\s*(full_key|reference_type|object_type)[:=].*|\nTo append to your config use.*|\n\s*Config search path:(?s:.*)"
)

# Mistakes for which Hydra and Prefect raise a plain ValueError or RuntimeError: words of theirs -> our sentence.
NO_CLASS_OF_THEIR_OWN = {
    "Config group override must be": lambda: (
        f"{' '.join(word for word in sys.argv[1:] if word.endswith('=null'))} names no choice; "
        "--help lists the choices of each group"
    ),
    "Failed to reach API": lambda: (
        f"no Prefect server answers at PREFECT_API_URL={os.environ.get('PREFECT_API_URL', '')}: "
        "start it with `prefect server start`, or unset the variable"
    ),
}


def run_command(main: Callable[[], None]) -> None:
    """Run a `hydra.main` function whose body stands under `one_sentence` too."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints and exits by itself
    with one_sentence():
        main()


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Bad settings and bad input end the process with exit code 2 and one line, Ctrl-C with 130."""
    try:
        yield
    except (LanceQuantError, HydraException, OmegaConfBaseException) as error:
        if TRACEBACK:
            raise
        end(f"error: {sentence(error)}", BAD_INPUT)
    except (ValueError, RuntimeError) as error:
        known = [say for words, say in NO_CLASS_OF_THEIR_OWN.items() if words in str(error)]
        if not known:
            raise
        end(f"error: {known[0]()}", BAD_INPUT)
    except KeyboardInterrupt:
        end(KEPT, INTERRUPTED)


def end(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)


def sentence(error: BaseException) -> str:
    """An error's own words in one line, with the OmegaConf cause that Hydra wraps."""
    if isinstance(error, LanceQuantError):
        return str(error)
    parts = [error] + ([error.__cause__] if isinstance(error.__cause__, OmegaConfBaseException) else [])
    words = re.sub(NOISE, "", "\n".join(str(part) for part in parts))
    lines = [line.strip().rstrip(".") for line in words.splitlines() if line.strip()]
    return "; ".join(lines).replace(":;", ":")


@contextlib.contextmanager
def interruptible(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C inside sets `stop`, raises KeyboardInterrupt, and ends the process soon even if a thread works on."""

    def give_up() -> None:
        print(KEPT, file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)

    def on_interrupt(number, frame) -> None:
        stop.set()
        timer = threading.Timer(GRACE_SECONDS, give_up)
        timer.daemon = True
        timer.start()
        signal.default_int_handler(number, frame)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
