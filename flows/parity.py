"""Run recorded cases of the upstream model against this one; exits with 1 unless every one is within its tolerance.

    python -m flows.parity                        # the cases of tests/golden
    python -m flows.parity golden=/path/to/folder

One line a case: its largest relative L2 difference and where it is, or why it cannot be computed. docs/parity.md works
one case through and lists the exit codes.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from flows.command import one_sentence, run_command
from tasks.config import CONF, strict

MISSED = 1


@dataclass(kw_only=True)
class ParityConfig:
    """golden: folder with manifest.json, the recorded model's weights and a file a case."""

    golden: str = "tests/golden"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="parity")
def main(composed: DictConfig) -> None:
    with one_sentence():
        cfg = strict(ParityConfig, composed)
        from lance_quant.model.parity import Golden, run_cases

        failed = 0
        for outcome in run_cases(Golden(Path(cfg.golden))):
            print(outcome.line, flush=True)
            failed += not outcome.passed
        if failed:
            sys.exit(MISSED)


if __name__ == "__main__":
    ConfigStore.instance().store(name="parity_schema", node=ParityConfig)
    run_command(main)
