"""A launch's part in a federation: what its configuration leaves open, and what sites cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainer.checkpoint.run_dir import RunDir
from trainer.config.schema import Config, read_config
from trainer.federation.options import COORDINATOR
from trainer.utils.errors import raise_errors
from trainer.utils.targets import declares
from trainer.utils.text import format_value

# Choices that work in one world alone, and one that works over sites.
REMEDIES = {"algorithm": "fedavg", "update_compression": "int8"}
ALL, NONE = ".*", "$^"  # patterns of shared parameters


def complete_site(tree: dict[str, Any]) -> None:
    """Fill in where the part of a launch in a federation leaves no choice, and check what is given.

    Args:
        tree: a valid configuration.

    Raises:
        ValueError: lists everything that sites cannot do, or that is missing.
    """
    site, launch = tree["site"], tree["launch"]
    if (count := site["simulate"]) is not None:
        site["members"] = site["members"] or [f"site-{client}" for client in range(count)]
        tree["clients"] = count if tree["clients"] == "auto" else tree["clients"]
    if launch["nproc_per_node"] == "auto" and (site["listen"] is not None or count is not None):
        launch["nproc_per_node"] = 1
    raise_errors([*_errors(read_config(tree))])


def _errors(config: Config) -> Iterator[str]:
    site = config.site
    yield from _monitor_errors(config)
    if not site.is_federated and not site.is_simulation:
        yield from _stray_errors(config)
        return
    yield from _name_errors(config)
    if site.is_simulation:
        yield from _simulation_errors(config)
    elif site.name is not None:
        yield from _site_errors(config)
    else:
        yield from _coordinator_errors(config)
    yield from _silo_errors(config)
    yield from _choice_errors(config)


def _stray_errors(config: Config) -> Iterator[str]:
    site = config.site
    if site.server is not None:
        yield f"site.server={site.server} without site.name\n  set site.name= to the name in this site's certificate"
    if site.members:
        yield (
            f"site.members={format_value(list(site.members))} without site.listen: they are the coordinator's\n"
            "  python -m trainer coordinator site.listen=0.0.0.0:7070 ..."
        )


def _monitor_errors(config: Config) -> Iterator[str]:
    site = config.site
    if site.monitor is None:
        return
    if site.listen is None and site.simulate is None:
        yield f"site.monitor={site.monitor} without site.listen: it is the coordinator's\n  leave site.monitor= out"
    yield from _endpoint_errors("site.monitor", site.monitor, "of this machine, such as 127.0.0.1:9090")


def _name_errors(config: Config) -> Iterator[str]:
    """Yield the errors of names, which have to be those of certificates."""
    from trainer.federation.certificates import name_errors  # with cryptography, which other runs do without

    site = config.site
    names = {"site.name": [site.name]} if site.name is not None else {}
    names |= {"site.members": list(site.members)} if site.members else {}
    for key, given in names.items():
        shown = given[0] if key == "site.name" else format_value(given)
        yield from (f"{key}={shown}: {error}" for error in name_errors(given))
        if COORDINATOR in given:
            yield f"{key}={shown}: {COORDINATOR} is the name of the one whom the sites meet\n  give the site another"


def _site_errors(config: Config) -> Iterator[str]:
    site = config.site
    if site.listen is not None:
        yield (
            f"site.name={site.name} with site.listen={site.listen}: a launch is a site or the coordinator\n"
            "  leave one of them out"
        )
    yield from _endpoint_errors("site.server", site.server, "of the coordinator, such as example.org:7070")
    if site.certificates is None:
        yield (
            f"site.name={site.name} without site.certificates: sites are known by their certificates\n"
            f"  set site.certificates= to the folder of ca.pem, {site.name}.pem and {site.name}.key"
        )
    if "training" not in site.allow and not declares(config.algorithm["_target_"], "skips_nonfinite_clients"):
        yield (
            f"site.allow={format_value(list(site.allow))} with algorithm={config.algorithm['_target_']}: it knows by "
            "the loss of training that a model is broken\n  add training to site.allow, or set algorithm=fedavg"
        )
    if site.simulate is None and config.data["files"] is not None:
        yield (
            f"data.files={format_value(config.data['files'])} with site.name={site.name}: a site is one client\n"
            "  set data.path= to its file, or start a site for each"
        )
    if site.simulate is None and not declares(config.partition["_target_"], "accepts_client_files"):
        yield (
            f"partition={config.partition['_target_']} with site.name={site.name}: a site is one client, which has all "
            "of its examples\n  leave partition= out"
        )


def _coordinator_errors(config: Config) -> Iterator[str]:
    site, launch = config.site, config.launch
    yield from _endpoint_errors("site.listen", site.listen, "of this machine, such as 0.0.0.0:7070")
    if not site.members:
        yield "site.members=[]\n  set site.members= to the names of all sites, such as [berlin,paris]"
    if site.certificates is None:
        yield (
            f"site.listen={site.listen} without site.certificates: plain text is not spoken\n"
            "  set site.certificates= to the folder that python -m trainer certify has written"
        )
    yield from _min_members_errors(config)
    for key, value in {"nproc_per_node": launch.nproc_per_node, "nodes": launch.nodes}.items():
        if value != 1:
            yield (
                f"launch.{key}={format_value(value)} with site.listen={site.listen}: the coordinator is one process\n"
                f"  leave launch.{key}= out"
            )


def _simulation_errors(config: Config) -> Iterator[str]:
    site, files = config.site, config.data["files"]
    counted = {"site.members": list(site.members), "data.files": files}
    for key, items in counted.items():
        if items is not None and len(items) != site.simulate:
            yield (
                f"{key}={format_value(items)} with site.simulate={site.simulate}: one for each site\n"
                f"  set site.simulate={len(items)}"
            )
    yield from _min_members_errors(config)
    if config.launch.nodes != 1:
        yield (
            f"launch.nodes={format_value(config.launch.nodes)} with site.simulate={site.simulate}: the sites are on "
            "this machine\n  leave launch.nodes= out"
        )


def _min_members_errors(config: Config) -> Iterator[str]:
    least, most = config.site.min_members, len(config.site.members)
    if least is not None and least > most > 0:
        yield (
            f"site.min_members={least}, and there are {most} members\n"
            f"  valid: 1 to {most}, or null for more than half of them"
        )


def _silo_errors(config: Config) -> Iterator[str]:
    site, silos = config.site, config.silos
    if (len(silos) if isinstance(silos, list) else config.launch.nodes if silos == "node" else silos) != 1:
        yield f"silos={format_value(config.silos)} with {_role(config)}: a site is one silo\n  set silos=1"
    for key in ("shard", "tensor"):
        if (given := getattr(config.silo, key)) != 1:
            yield (
                f"silo.{key}={given} with {_role(config)}: the leader of a site sends the model whole\n"
                f"  set silo.{key}=1"
            )
    members, folder = len(site.members) or None, config.run_dir and Path(config.run_dir).expanduser()
    saved = RunDir(folder).num_clients() if folder else None
    if config.clients not in ("auto", members, saved):
        yield (
            f"clients={config.clients} with {_role(config)}: a site is one client\n"
            f"  {'leave clients= out' if members is None else f'set clients={members}, or leave it out'}"
        )


def _choice_errors(config: Config) -> Iterator[str]:
    """Yield the errors of components that need all silos in one world."""
    for key, other in REMEDIES.items():
        target = getattr(config, key)["_target_"]
        if declares(target, "needs_one_world"):
            yield (
                f"{key}={target} with {_role(config)}: it needs its silos in one world; sites meet once a round, at "
                f"its end\n  set {key}={other}"
            )
    correction, compression = config.algorithm.get("drift_correction") or {}, config.update_compression["_target_"]
    if declares(correction.get("_target_", ""), "rescales_updates") and not declares(compression, "is_identity"):
        yield (
            f"update_compression={compression} with algorithm.drift_correction={correction['_target_']} and "
            f"{_role(config)}: what a site has not sent yet would be in the unit of its updates, which is not that of "
            "the parameters\n  set update_compression=fp32, or algorithm=fedavg"
        )
    pattern, has_newcomers = config.algorithm.get("shared_params", ALL), _newcomers(config)
    if pattern not in (ALL, NONE) and has_newcomers:
        yield (
            f"algorithm.shared_params={pattern} with {has_newcomers}: a site that trains for the first time would "
            "begin with the mean of the others' personal parameters, which do not leave their sites\n"
            "  set client_sampling=all and site.grace_seconds=null, or algorithm.shared_params='.*'"
        )


def _newcomers(config: Config) -> str:
    """Return the choice by which a site may train for the first time after the first round; empty without one."""
    site, sampling = config.site, config.client_sampling["_target_"]
    if not declares(sampling, "takes_all"):
        return f"client_sampling={sampling}"
    is_late = site.quorum < len(site.members) and site.grace_seconds is not None
    return f"site.grace_seconds={site.grace_seconds:g}" if is_late else ""


def _role(config: Config) -> str:
    """Return the key by which the launch has its part."""
    site = config.site
    key = "simulate" if site.is_simulation else "name" if site.name is not None else "listen"
    return f"site.{key}={getattr(site, key)}"


def _endpoint_errors(key: str, endpoint: str | None, what: str) -> Iterator[str]:
    try:
        parts = urlsplit(f"//{endpoint or ''}")
        is_valid = bool(parts.hostname and parts.port) and parts.netloc == endpoint and parts.username is None
    except ValueError:
        is_valid = False
    if not is_valid:
        yield f"{key}={format_value(endpoint)}\n  valid: host:port {what}"
