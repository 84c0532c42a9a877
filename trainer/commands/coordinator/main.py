"""`python -m trainer coordinator`: starts the launch that the sites of a federation dial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from trainer.commands.exit_codes import FINISHED
from trainer.commands.options import parse
from trainer.config.compose import compose_run, compose_tree
from trainer.distributed.environment import check_launcher, is_worker

USAGE = """\
python -m trainer coordinator [OPTION ...] [key=value ...]     meet the sites of a federation, until the run has ended

Takes the overrides of the run, those of the sites. It has the global model, the server optimizer, metrics, checkpoints
and the report, and needs no data: data.path= may be left out. It is one process, and begins when all sites have come.

  site.listen=0.0.0.0:7070        where it listens; the only port of the federation
  site.members=[berlin,paris]     the names of the sites, as in their certificates
  site.certificates=certs         folder of ca.pem, coordinator.pem and coordinator.key, by: python -m trainer certify
  site.min_members=2              how many sites a round needs; default: more than half of them
  site.grace_seconds=30           that a round waits for a site that has vanished; null: for ever
  site.monitor=127.0.0.1:9090     where it answers /healthz and Prometheus' /metrics; default: nowhere
  --cfg job, --config FILE, --config-dir DIR, -q, --log-level LEVEL     as of a run

  python -m trainer coordinator algorithm=fedavg data=npz site.listen=0.0.0.0:7070 site.members=[berlin,paris] \\
      site.certificates=certs
  python -m trainer coordinator run_dir=outputs/mine     the same again, after a stop

A site: python -m trainer ... site.name=berlin site.server=HOST:7070 site.certificates=certs data.path=berlin.npz
All of it on this machine: python -m trainer ... site.simulate=3
docs/sites.md explains it. Exit codes: 0 finished, 1 failed, 2 bad input, 75 preempted."""


def main(arguments: Sequence[str]) -> int:
    """Run the coordinator; its exit code. Raises ValueError for bad input."""
    options, overrides = parse(arguments)
    if options.multirun:
        raise ValueError("-m: a coordinator is one run\n  to sweep on this machine: -m with site.simulate=")
    if is_worker(overrides):
        raise ValueError("a coordinator is one process\n  start it without torchrun or srun")
    if options.cfg:
        print(yaml.safe_dump(compose_tree(overrides, check=_check_listens), sort_keys=False), end="")
        return FINISHED
    from trainer.commands.train.launcher import launch

    with compose_run(overrides, _check_listens) as tree:
        check_launcher(tree["launch"]["nodes"])
        return launch(tree)


def _check_listens(tree: dict[str, Any]) -> None:
    if tree["site"]["listen"] is None:
        raise ValueError("site.listen has no value\n  set site.listen=0.0.0.0:7070, or another address of this machine")
