"""Models of the package transformers, built from their configurations."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

from torch import Tensor, nn

HEADS = {
    "next_token": "AutoModelForCausalLM",
    "sequence_class": "AutoModelForSequenceClassification",
    "image_class": "AutoModelForImageClassification",
}


class Transformers(nn.Module):
    """Any architecture of the package transformers, with new weights: tokens [B, T] or images to its logits.

    Nothing is downloaded; `model.init` loads weights from a file.

    architecture: `model_type` of the package, such as gpt2, llama, bert or vit.
    head: the output, `next_token` [B, T, vocabulary], or the class of a sequence or an image [B, classes].
    config: fields of the configuration that differ from the package's defaults.

    Raises:
        ValueError: the package is not installed.
    """

    def __init__(
        self, architecture: str, head: Literal["next_token", "sequence_class", "image_class"], config: dict[str, Any]
    ):
        super().__init__()
        try:
            package = import_module("transformers")
        except ModuleNotFoundError as error:
            raise ValueError("model=transformers needs the package transformers\n  pip install transformers") from error
        settings = package.AutoConfig.for_model(architecture, **config)
        self.model = getattr(package, HEADS[head]).from_config(settings)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs).logits
