"""Models of the package transformers, built from a configuration."""

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
    """Any architecture of the package transformers: tokens [B, T] or images to its logits. Nothing is downloaded.

    architecture  its `model_type` there, such as gpt2, llama, bert or vit
    head          its output: the `next_token` [B, T, vocabulary], or the class of a sequence or an image [B, classes]
    config        the fields of its configuration; the others are as the package has them

    Weights are new; `model.init` puts those of a file in their place.
    """

    def __init__(
        self, architecture: str, head: Literal["next_token", "sequence_class", "image_class"], config: dict[str, Any]
    ):
        super().__init__()
        try:
            package = import_module("transformers")
        except ModuleNotFoundError as error:
            raise ValueError(
                "model=transformers needs a package that is not there.\n  pip install transformers"
            ) from error
        settings = package.AutoConfig.for_model(architecture, **config)
        self.model = getattr(package, HEADS[head]).from_config(settings)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs).logits
