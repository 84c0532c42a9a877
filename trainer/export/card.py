"""The model card of a version: README.md, as Hugging Face and GitHub show it, and its pictures."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import yaml

from trainer.loggers.tensorboard import confusion_figure
from trainer.service.version import CARD, EXAMPLE_REQUEST, ModelDescription, TensorSpec
from trainer.utils.text import first_few, format_bytes, format_seconds

if TYPE_CHECKING:  # matplotlib takes a second
    from matplotlib.figure import Figure
    from torch import Tensor

LEARNING_CURVE = "learning_curve.svg"
CONFUSION = "confusion.svg"

# The sets that models are evaluated on. Other figures, such as those of single clients, are not in a card.
EVALUATION_SETS = ("test", "validation", "global", "personal", "ema")

MAX_LABELS = 100  # in the text; model.json has all

MAX_CHARACTERS = 24  # of a label in a picture


@dataclass(frozen=True)
class CardFacts:
    """Facts of a model for its card, besides its description.

    Attributes:
        name: of the model, under which it is served.
        version: its number.
        architecture: the class of the model.
        parameters: their number.
        data: the class or name of the data set, without a path.
        examples: their number, by part of the data, such as `training`.
        algorithm: in words.
        silos: their number.
        clients: their number.
        seed: of the run.
        round: after which the model was saved.
        rounds: the metrics of the run's rounds, for the learning curve.
        confusion: counts over the test set, int64 [classes, classes], rows are the truth; None to leave it out, as with
            `metrics.per_client=none`, which keeps the numbers of labels private.
        license: as Hugging Face names it.
    """

    name: str
    version: int
    architecture: str
    parameters: int
    data: str
    examples: Mapping[str, int]
    algorithm: str
    silos: int
    clients: int
    seed: int
    round: int
    rounds: Sequence[Mapping[str, float | None]] = ()
    confusion: Tensor | None = None
    license: str = "unknown"


def model_card(description: ModelDescription, facts: CardFacts) -> dict[str, str]:
    """Return the files of a model card by their names: README.md, and the pictures that it shows.

    Names that users have chosen are escaped: none of them becomes markup.
    """
    curve = _learning_curve(description.headline, facts.rounds)
    pictures = {LEARNING_CURVE: _svg(curve)} if curve else {}
    if facts.confusion is not None:
        names = tuple(_one_line(name)[:MAX_CHARACTERS] for name in description.label_names)
        pictures[CONFUSION] = _svg(confusion_figure(facts.confusion, names))
    front = yaml.safe_dump(_front_matter(description, facts), sort_keys=False, allow_unicode=True)
    text = "\n\n".join(_sections(description, facts, pictures))
    return {CARD: f"---\n{front}---\n\n{text}\n", **pictures}


def _front_matter(description: ModelDescription, facts: CardFacts) -> dict[str, Any]:
    tags = ["silotrain"]
    if facts.clients > 1:
        tags.append("federated-learning")
    if description.quantisation:
        tags.append(description.quantisation["type"])
    return {
        "license": facts.license,
        "library_name": "onnx",
        "tags": tags,
        "model-index": [{"name": facts.name, "results": _results(description, facts)}],
    }


def _results(description: ModelDescription, facts: CardFacts) -> list[dict[str, Any]]:
    """Return the figures in the form of Hugging Face's model-index, one entry for each set of examples."""
    by_set: dict[str, list[dict[str, Any]]] = {}
    for name, value in _figures(description):
        part, _, kind = name.partition("/")
        by_set.setdefault(part, []).append({"type": kind, "name": name, "value": value})
    task = {"type": description.task.replace(" ", "-"), "name": description.task}
    return [
        {"task": {**task}, "dataset": {"type": facts.data, "name": facts.data, "split": part}, "metrics": metrics}
        for part, metrics in by_set.items()
    ]


def _figures(description: ModelDescription) -> Iterator[tuple[str, float]]:
    """Yield the finite figures of whole sets of examples."""
    for name, value in description.metrics.items():
        if (
            value is not None
            and math.isfinite(value)
            and name.startswith(tuple(f"{part}/" for part in EVALUATION_SETS))
        ):
            yield name, value


def _sections(description: ModelDescription, facts: CardFacts, pictures: Mapping[str, str]) -> Iterator[str]:
    yield f"# {escape(facts.name)}, version {facts.version}"
    yield (
        f"{escape(facts.architecture)} with {facts.parameters:,} parameters, for {escape(description.task)}, trained "
        f"with silotrain by the algorithm {escape(facts.algorithm)}. Inputs are raw: the graph contains what prepares "
        "them for the model."
    )
    yield from _tensors(description)
    yield from _calls(description, facts.name)
    yield "## Training"
    examples = [(f"{part} examples", f"{count:,}") for part, count in facts.examples.items()]
    counts = [("silos", f"{facts.silos:,}"), ("clients", f"{facts.clients:,}"), ("seed", str(facts.seed))]
    yield _table(("", ""), [("data", facts.data), *examples, *counts])
    yield from _evaluation(description, facts, pictures)
    if description.quantisation:
        yield from _quantisation(description.quantisation)
    yield "## Limits"
    yield (
        "* The figures hold for data like those above. On other data they are unknown: evaluate the model there.\n"
        "* Any input of the right type and shape gets an answer, also one unlike all examples of training.\n"
        "* A model may reveal something of the examples that it was trained on."
    )


def _tensors(description: ModelDescription) -> Iterator[str]:
    yield "## Inputs and outputs"
    tensors = [("input", spec) for spec in description.inputs] + [("output", spec) for spec in description.outputs]
    rows = [(kind, spec.name, spec.datatype, " x ".join(map(_size, spec.shape))) for kind, spec in tensors]
    yield _table(("", "name", "type", "shape"), rows)
    if description.label_names:
        named = enumerate(description.label_names)
        labels = (name if name == str(label) else f"{label} {escape(name)}" for label, name in named)
        yield f"Labels: {', '.join(first_few(labels, MAX_LABELS))}."


def _size(size: int) -> str:
    return "any" if size < 0 else str(size)


def _calls(description: ModelDescription, name: str) -> Iterator[str]:
    yield "## Use"
    yield (
        "Servers of the Open Inference Protocol answer, such as `python -m trainer serve`. "
        f"`{EXAMPLE_REQUEST}` is a request with made-up inputs."
    )
    yield _code("bash", f"curl -d @{EXAMPLE_REQUEST} http://localhost:8080/v2/models/{quote(name, safe='')}/infer")
    inputs = "\n".join(f"    {_infer_input(spec)}," for spec in description.inputs)
    yield _code(
        "python",
        "import numpy as np\n"
        "from tritonclient.http import InferenceServerClient, InferInput\n"
        "from tritonclient.utils import triton_to_np_dtype\n\n"
        f"inputs = [\n{inputs}\n]\n"
        "for each in inputs:\n"
        "    each.set_data_from_numpy(np.zeros(each.shape(), triton_to_np_dtype(each.datatype())))\n"
        f'answer = InferenceServerClient("localhost:8080").infer({name!r}, inputs)\n'
        f"print(answer.as_numpy({description.outputs[-1].name!r}))",
    )


def _infer_input(spec: TensorSpec) -> str:
    return f"InferInput({spec.name!r}, {[max(size, 1) for size in spec.shape]}, {spec.datatype!r})"


def _evaluation(description: ModelDescription, facts: CardFacts, pictures: Mapping[str, str]) -> Iterator[str]:
    yield "## Figures"
    of = "of the model before it was quantised, " if description.quantisation else ""
    yield f"After round {facts.round}, {of}one run with seed {facts.seed}."
    yield _table(("", ""), [(name, f"{value:.4g}") for name, value in _figures(description)])
    if LEARNING_CURVE in pictures:
        yield f"![Learning curve]({LEARNING_CURVE})"
    if CONFUSION in pictures:
        yield f"![Confusion matrix of the test set]({CONFUSION})"


def _quantisation(found: Mapping[str, Any]) -> Iterator[str]:
    before, after = found["before"], found["after"]
    yield "## Quantisation"
    yield (
        f"{escape(found['method'])}, calibrated on {found['calibration_examples']} training examples. "
        f"Seconds are those of one thread for {found['batch_size']} examples."
    )
    rows = [
        ("bytes", format_bytes(before["bytes"]), format_bytes(after["bytes"])),
        (found["metric"], f"{before['figure']:.4g}", f"{after['figure']:.4g}"),
        ("seconds", format_seconds(before["cpu_seconds"]), format_seconds(after["cpu_seconds"])),
    ]
    yield _table(("", "before", str(found["type"])), rows)


def _learning_curve(headline: str, rounds: Sequence[Mapping[str, float | None]]) -> Figure | None:
    """Draw the headline by round, a line for each set of examples; None if no round has it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    score = headline.rpartition("/")[2]
    curves = {
        name: [(metrics["round"], metrics[name]) for metrics in rounds if metrics.get(name) is not None]
        for name in (f"{part}/{score}" for part in EVALUATION_SETS)
    }
    if not any(curves.values()):
        return None
    figure = Figure((6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        if points:
            (line,) = axes.plot(*zip(*points, strict=True), marker="o" if len(points) == 1 else None)
            line.set_label(_one_line(name).replace("$", r"\$"))  # a name is no formula
    axes.set_xlabel("round")
    axes.set_ylabel(_one_line(score), parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def _svg(figure: Figure) -> str:
    from matplotlib import rc_context

    content = io.StringIO()
    # Pictures of the same figures are the same bytes. Text stays text, in the reader's own font.
    with rc_context({"svg.hashsalt": "silotrain", "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's font may have it
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return content.getvalue()


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def escape(text: str) -> str:
    r"""Escape a text for Markdown, as one line.

    >>> escape("a_b*|<b>\n# `c`")
    'a\\_b\\*\\|\\<b\\> \\# \\`c\\`'
    """
    return re.sub(r"[!-+.:-@\[-`{-~]", r"\\\g<0>", _one_line(text))


def _one_line(text: str) -> str:
    """Return the printable characters of a text, spaces in place of line breaks."""
    return "".join(character for character in " ".join(text.split()) if character.isprintable())
