"""`python -m trainer doctor`: starts workers, which examine their hosts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from trainer.commands.doctor.checks import diagnose
from trainer.commands.doctor.console import show
from trainer.commands.doctor.examine import survey_hosts
from trainer.commands.exit_codes import FAILED, FINISHED
from trainer.commands.probe.workers import launch_workers, run_worker
from trainer.config.compose import compose_tree
from trainer.config.schema import Config, read_config
from trainer.distributed.environment import check_launcher, is_worker
from trainer.distributed.launch.processes import TRAINER
from trainer.distributed.peers import Peers

USAGE = """\
python -m trainer doctor [key=value ...]                        examine the machines of a run with these overrides
torchrun --nproc-per-node 4 -m trainer doctor [key=value ...]   the same with workers that torchrun or srun starts

Each rank reports its host, interface, versions, clock, threads and cores, memory, disk and GPU. Then the links are
measured. Of a federation, a site tries its way to the coordinator, and the coordinator its certificates, its port and
its disk; neither joins. The doctor lists what would go wrong, with remedies; docs/doctor.md has all of them.

Exit codes: 0 nothing would go wrong, 1 something would, 2 bad input."""


def main(arguments: Sequence[str]) -> int:
    """Run the launcher or one worker, and return its exit code.

    Raises ValueError for bad input that the launcher finds.
    """
    arguments = list(arguments)
    if is_worker(arguments):
        return run_worker(arguments, _examine)
    tree = compose_tree(arguments)
    check_launcher(tree["launch"]["nodes"])
    return launch_workers(tree, read_config(tree).launch, (*TRAINER, "doctor"))


def _examine(tree: dict[str, Any], peers: Peers) -> int:
    """Survey the hosts, and print the results on rank 0; the exit code."""
    config: Config = read_config(tree)
    survey = survey_hosts(config, peers)
    if peers.rank:
        return FINISHED
    rows, found = [], []
    if config.site.is_federated:
        from trainer.commands.doctor.federation import survey_federation  # with packages that other runs do without

        federation = survey_federation(config)
        rows, found = federation.rows, federation.diagnoses
    diagnoses = diagnose(survey, config, tree, found)
    show(survey, rows, diagnoses, Console())
    return FAILED if any(diagnosis.is_error for diagnosis in diagnoses) else FINISHED
