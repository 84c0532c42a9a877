"""Each kind of data may be a site's: a coordinator without examples builds the same run of what the site says."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch

from tests.support.datasets import FILES
from trainer.config.build import build, read_data
from trainer.config.compose import compose_tree
from trainer.config.schema import read_config
from trainer.data.loading.silo_files import DatasetInfo, describe_example, join_clients, kind_error
from trainer.data.sources.agreement import Alone
from trainer.data.sources.signature import DataSignature
from trainer.distributed.topology import distributed
from trainer.utils.tensor_trees import first_tensor

LANGUAGE = ("chat", "shakespeare", "text", "tokens")


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.quick_rows(4)
def test_a_coordinator_makes_up_examples_of_every_kind(kind, tmp_path):
    overrides = FILES[kind](tmp_path)
    if kind in LANGUAGE:
        overrides = ["model=gpt", "task=language_modelling", *overrides]
    config = read_config(compose_tree([f"data={kind}", "algorithm=fedavg", *overrides]))
    with distributed(device="cpu") as topology:
        own = read_data(config, topology)
        info = DatasetInfo.from_tree(asdict(DatasetInfo.of(own)))
        site, coordinator = (
            build(
                config,
                replace(topology, silo=silo, silo_sizes=(1, 1)),
                join_clients("the sites", ["berlin"], [0], local, [info], Alone()),
            )
            for silo, local in enumerate(({0: own}, {}))
        )
    assert describe_example(coordinator.data.train) == describe_example(site.data.train)
    assert DataSignature.of(coordinator.data) == DataSignature.of(site.data)
    assert [part.size for part in coordinator.clients.train] == [part.size for part in site.clients.train]
    widths = []
    for run in (site, coordinator):
        inputs, targets = run.transforms.for_evaluation(run.data.test.fetch(torch.arange(1)), topology.device)
        model = run.make_model().eval()
        outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        widths.append(run.task.score_sums(outputs, targets).shape[1])
        assert first_tensor(inputs).dtype == first_tensor(site.data.test.fetch(torch.arange(1))[0]).dtype
    assert widths[0] == widths[1]  # sums of sites are added to those of the coordinator


def test_other_tokenizers_are_refused():
    described = {"train": 1, "test": 1, "validation": None, "inputs": "int64 [8]", "targets": "int64 [8]"}
    described |= {"classes": 256, "label_names": [], "checksum": 0, "has_weights": False}
    infos = [DatasetInfo(**described, token_sizes=size) for size in (1, None)]
    assert "token_sizes: berlin has 1, but paris None\n  set data.tokenizer= to the same tokenizer" in kind_error(
        "the sites", ["berlin", "paris"], infos
    )
