"""`run.smoke=true` tries a configuration end to end in two steps: evaluation, checkpoint, resume, all files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.cli.command import Shell, named_choices, work
from tests.support.datasets import FILES
from trainer.checkpoint import newest_complete
from trainer.checkpoint.run_dir import RunDir
from trainer.config.compose import compose_tree
from trainer.config.groups import CONF
from trainer.loggers import read_jsonl
from trainer.loop.profiler import TRACED

ALGORITHMS = ["sync", "fedavg", "fedsgd", "diloco", "local"]
TEXT = "To be, or not to be, that is the question:\n" * 20
DATA = {
    "digits": ["data=digits"],
    "text": ["data=text", "data.path={text}", "data.length=16", "model.width=32", "model.layers=1"],
    "bf16": ["data=digits", "precision=bf16", "schedule=cosine", "clip.max_norm=1", "micro_batch_size=4"],
    "sampled": [
        "data=digits",
        "clients=5",
        "partition=shards",
        "client_sampling=sample",
        "client_sampling.clients_per_round=2",
    ],
}


IMAGES = ["data=custom", "data._target_=tests.support.made_up.images"]
TOKENS = ["data=text", "data.path={text}", "data.length=16"]
# Together they contain every model, task, optimizer and schedule.
PIECES = {
    "logistic": [
        *("data=custom", "data._target_=tests.support.made_up.numbers", "task=regression", "task.huber=1"),
        *("model=logistic", "model.inputs=6", "model.classes=2", "optimizer=nadam", "schedule=linear"),
    ],
    "mlp": [
        *("data=custom", "data._target_=tests.support.made_up.tags", "task=multi_label", "schedule=step"),
        *("model=mlp", "model.inputs=6", "model.hidden=8", "model.classes=3", "optimizer=adagrad"),
    ],
    "resnet": [
        *(*IMAGES, "+data.channels=3", "+data.size=16", "model=resnet", "model.depth=8", "model.width=8"),
        *(
            "optimizer=momentum",
            "optimizer.exclude_norm_bias_decay=true",
            "clip.max_value=1",
            "schedule=warmup_stable_decay",
        ),
    ],
    "vit": [
        *(*IMAGES, "+data.channels=1", "+data.size=8", "model=vit", "model.size=8", "model.width=16", "model.layers=1"),
        *("model.channels=1", "optimizer=muon", "optimizer.lr_multipliers=[[head,2]]", "model.freeze=positions"),
    ],
    "cnn": [*IMAGES, "+data.channels=1", "+data.size=28", "model=cnn", "optimizer=adam", "schedule=cosine"],
    "digits_cnn": [
        "data=digits",
        "model=digits_cnn",
        "task=classification",
        "optimizer=sgd",
        "clip.max_norm=1",
        "clip.norm_type=inf",
    ],
    "lstm": [
        *TOKENS,
        "task=language_modelling",
        "model=lstm",
        "model.width=16",
        "optimizer=adamw",
        "schedule=constant",
    ],
    "gpt": [*TOKENS, "model=gpt", "model.width=16", "model.layers=1", "optimizer=rmsprop"],
    "transformers": [
        *(*TOKENS, "model=transformers", "model.architecture=gpt2", "+model.config.vocab_size=256"),
        *("+model.config.n_embd=16", "+model.config.n_layer=1", "+model.config.n_head=2"),
    ],
    "soap": ["data=digits", "optimizer=soap", "schedule=onecycle"],
    "shampoo": ["data=digits", "optimizer=shampoo", "schedule=cosine_restarts"],
    "prodigy": ["data=digits", "optimizer=prodigy"],
    "schedulefree": ["data=digits", "optimizer=schedulefree"],
    "custom": [
        *("data=custom", "data._target_=tests.support.made_up.numbers", "task=custom"),
        *("task._target_=trainer.tasks.Regression", "model=custom", "model._target_=torch.nn.Linear"),
        *("+model.in_features=6", "+model.out_features=2", "optimizer=custom"),
        *("optimizer._target_=torch.optim.RAdam", "+optimizer.lr=0.01"),
        *("schedule=custom", "schedule._target_=trainer.optim.Constant"),
    ],
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "hamlet.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.quick_rows(4)
def test_every_algorithm_on_every_kind_of_data(ranks, algorithm: str, data: str, text: Path, tmp_path: Path) -> None:
    """Two rounds of one step; the second follows a resume, and has the only evaluation."""
    overrides = ["run.smoke=true", f"algorithm={algorithm}", *DATA[data], f"run_dir={tmp_path}"]
    if algorithm == "sync":  # sync has one silo, and trains the clients as one
        overrides = [override for override in overrides if not override.startswith("client_sampling")]
    else:
        overrides += ["silos=2"]
    ranks(2).run(work, [override.format(text=text) for override in overrides])
    assert json.loads((tmp_path / "state.json").read_text())["status"] == "finished"
    first, second = read_jsonl(tmp_path / "metrics.jsonl")
    clients = second["clients/trained"]
    assert [first["round/steps"], second["round/steps"]] == [clients, clients]
    assert "test/loss" not in first and "test/loss" in second
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 2 * clients
    newest = newest_complete(tmp_path / "checkpoints")
    assert newest is not None and newest.folder.name == "round-000002"


@pytest.mark.parametrize("data", sorted(path.stem for path in (CONF / "data").glob("*.yaml")))
@pytest.mark.quick_rows(3)
def test_every_data_set(ranks, data: str, tmp_path: Path) -> None:
    """Two silos train on small files."""
    files = tmp_path / "files"
    files.mkdir()
    overrides = ["run.smoke=true", "algorithm=fedavg", "silos=2", f"data={data}", *FILES[data](files)]
    ranks(2).run(work, [*overrides, f"run_dir={tmp_path / 'run'}"])
    assert json.loads((tmp_path / "run/result.json").read_text())["steps"] == 4


IMAGES = "transforms=[standardise,crop,flip,rotate,cutout,normalise,mixup]"
TOKENS = ["transforms=[mask_tokens]", "data=text", "data.path={text}", "data.length=16", "model.layers=1"]


@pytest.mark.parametrize("chain", [[IMAGES, "transforms.crop.padding=1"], TOKENS], ids=["images", "tokens"])
def test_every_transform(ranks, chain: list[str], text: Path, tmp_path: Path) -> None:
    """Two silos are resumed between the two rounds."""
    overrides = ["run.smoke=true", "algorithm=fedavg", "silos=2", *(part.format(text=text) for part in chain)]
    ranks(2).run(work, [*overrides, f"run_dir={tmp_path}"])
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 4


def test_every_client_shift(ranks, tmp_path: Path) -> None:
    """Only the training labels are wrong; the picture of the clients shows them."""
    names = sorted(path.stem for path in (CONF / "client_shift").glob("*.yaml"))
    overrides = ["run.smoke=true", "algorithm=fedavg", "silos=2", f"client_shift=[{','.join(names)}]"]
    ranks(2).run(work, [*overrides, f"run_dir={tmp_path}"])
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 4


def test_all_transforms_are_tried() -> None:
    used = {name for chain in (IMAGES, TOKENS[0]) for name in chain.partition("=")[2].strip("[]").split(",")}
    assert used == {path.stem for path in (CONF / "transforms").glob("*.yaml")}


@pytest.mark.parametrize("gradients", named_choices("gradient_compression"))
@pytest.mark.quick_rows(2)
def test_every_gradient_compression(ranks, gradients: str, tmp_path: Path) -> None:
    """Two replicas are resumed between the two steps."""
    ranks(2).run(work, ["run.smoke=true", f"gradient_compression={gradients}", f"run_dir={tmp_path}"])
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 2


def test_a_profile_shows_steps_and_collectives(ranks, tmp_path: Path) -> None:
    overrides = ["data=digits", "run.profile=true", "round.steps=16", "rounds=1", f"run_dir={tmp_path}"]
    ranks(2).run(work, overrides)
    events = json.loads(gzip.decompress((tmp_path / "profile/trace.json.gz").read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if "name" in event]
    assert sum(name.startswith("ProfilerStep#") for name in names) == TRACED
    assert any("Optimizer.step" in name for name in names) and any("all_reduce" in name for name in names)


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.quick_rows(3)
def test_every_model_task_optimizer_and_schedule(ranks, pieces: str, text: Path, tmp_path: Path) -> None:
    """Two silos take two steps, are resumed between them, and evaluate and save."""
    if pieces == "transformers":
        pytest.importorskip("transformers")
    overrides = [override.format(text=text) for override in PIECES[pieces]]
    ranks(2).run(work, ["run.smoke=true", "algorithm=fedavg", "silos=2", *overrides, f"run_dir={tmp_path}"])
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 4
    assert (tmp_path / "model.safetensors").exists()


TRIED_BY_LAWS = {"distillation"}  # it takes a finished run: tests/laws/test_distillation.py


@pytest.mark.parametrize("group", ["model", "task", "optimizer", "schedule"])
def test_all_choices_are_tried(group: str) -> None:
    files = {path.stem for path in (CONF / group).glob("*.yaml")}
    given = [override.partition("=") for overrides in PIECES.values() for override in overrides]
    assert files - TRIED_BY_LAWS == {value for key, _, value in given if key == group}


def test_a_smoke_run_is_not_continued_by_a_real_one(tmp_path: Path) -> None:
    """Its two steps would count as two rounds."""
    folder = RunDir(tmp_path)
    folder.create_or_check(compose_tree(["run.smoke=true", f"run_dir={tmp_path}"]))
    folder.set_status("finished")
    with pytest.raises(ValueError, match="another run_dir"):
        folder.check(compose_tree([f"run_dir={tmp_path}"]))


@pytest.mark.long
def test_smoke_of_a_language_model_from_the_command_line(shell: Shell, text: Path) -> None:
    """A real start prints two lines of rounds, and logs a sample of text to TensorBoard."""
    overrides = [override.format(text=text) for override in DATA["text"]]
    ended = shell.train("run.smoke=true", *overrides, "run_dir=smoke")
    assert (ended.code, ended.err) == (0, "")
    assert "test/perplexity" in ended.out and ended.out.count("round 2/2") == 1
    events = EventAccumulator(str(shell.folder / "smoke/tensorboard"), size_guidance={"tensors": 0}).Reload()
    assert "test/sample/text_summary" in events.Tags()["tensors"] and events.Tags()["images"] == []
    rounds = read_jsonl(shell.folder / "smoke/metrics.jsonl")
    assert set(events.Tags()["scalars"]) == {key for metrics in rounds for key in metrics} - {"round"}
