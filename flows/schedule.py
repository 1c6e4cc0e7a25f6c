"""Serve the pipeline as a deployment of a running Prefect server, by hand from its UI or on a cron schedule.

    export PREFECT_API_URL=http://127.0.0.1:4200/api      # where `prefect server start` listens
    python -m flows.schedule                              # settings are typed fields of the run form
    python -m flows.schedule --cron "0 3 * * *" --name nightly checkpoint=image recipe=awq

Runs triggered there use the artifact folder of this machine, as `python -m flows.full_run` does. Ctrl-C stops serving.
"""

import argparse
from dataclasses import asdict

from flows import server

server.prepare()

from prefect import flow  # noqa: E402  (reads its environment when imported)
from prefect.settings import PREFECT_API_URL  # noqa: E402

from flows.command import one_sentence  # noqa: E402
from flows.pipeline import run  # noqa: E402
from lance_quant.errors import LanceQuantError  # noqa: E402
from tasks.config import RunConfig, compose_config  # noqa: E402


@flow(name="scheduled-run", persist_result=False)
def scheduled_run(cfg: RunConfig) -> None:
    """One run of the whole pipeline with the settings of the form."""
    run(cfg)


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m flows.schedule", description=__doc__.splitlines()[0])
    arguments.add_argument("--name", default="lance-quant", help="of the deployment")
    arguments.add_argument("--cron", help='when to run, such as "0 3 * * *"; without it only on request')
    arguments.add_argument("overrides", nargs="*", help="settings, as for python -m flows.full_run")
    given = arguments.parse_args()
    with one_sentence():
        cfg = compose_config(given.overrides)
        if not PREFECT_API_URL.value():
            raise LanceQuantError(
                "a schedule needs a Prefect server: run `prefect server start` and set "
                "PREFECT_API_URL=http://127.0.0.1:4200/api"
            )
        scheduled_run.serve(name=given.name, cron=given.cron, parameters={"cfg": asdict(cfg)})


if __name__ == "__main__":  # the runner's children import this file again
    main()
