"""Models of the package transformers: from a folder as `save_pretrained` writes it, or by a configuration."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.utils.text import first_few, suggest

log = logging.getLogger("trainer")

MAX_NAMED = 5  # tensors in an error
MAX_SUGGESTED = 5  # architectures and classes in an error, of hundreds


def from_transformers(
    path: str | None = None,
    architecture: str | None = None,
    auto: str = "AutoModelForCausalLM",
    config: dict[str, Any] | None = None,
) -> nn.Module:
    """Make a model of the package transformers, which keeps its class and the names of its parameters.

    Nothing is downloaded, and no code from a folder is executed. The parameters are float32, whatever they were saved
    in. Those that the folder lacks, such as a new head, have new values.

    Args:
        path: a folder with a config.json and safetensors, in one file or in several with an index.
        architecture: `model_type` of the package, such as gpt2, llama, bert or vit, instead of a path; weights are new.
        auto: the class that knows the head: AutoModelForCausalLM, AutoModelForSequenceClassification, ...
        config: fields of the configuration that differ from those of the folder, or from the package's defaults.

    Raises:
        ValueError: the package is not installed, the folder is none of this kind, or it does not fit the class.
    """
    package, given = _import_quietly("transformers"), config or {}
    if (path is None) == (architecture is None):
        raise ValueError(
            "model=transformers has both model.path and model.architecture\n  set one of them"
            if path
            else "model=transformers has neither model.path nor model.architecture\n  set model.path=FOLDER, which "
            "save_pretrained has written, or model.architecture=llama +model.config.num_hidden_layers=2 for new weights"
        )
    _check_auto(package, auto)
    with _plain_errors(f"model.path={path}" if path else f"model.architecture={architecture}"):
        if path is not None:
            return _load(package, auto, Path(path).expanduser(), given)
        settings = package.AutoConfig.for_model(_known(package, str(architecture)))
        _check_fields(type(settings), given)
        settings = type(settings)(**given)
        factory = _factory(package, auto, settings)
        return _for_training(factory.from_config(settings, dtype=torch.float32, trust_remote_code=False))


def _load(package: Any, auto: str, path: Path, given: dict[str, Any]) -> nn.Module:
    _check_folder(path)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    settings = package.AutoConfig.from_pretrained(path, **options)
    _check_fields(type(settings), given)
    settings = package.AutoConfig.from_pretrained(path, **options, **given)
    options |= {"dtype": torch.float32, "use_safetensors": True, "ignore_mismatched_sizes": True}  # named below
    factory = _factory(package, auto, settings)
    if torch.get_default_device().type == "meta":  # another rank reads the tensors
        return _for_training(factory.from_config(settings, dtype=torch.float32, trust_remote_code=False))
    module, report = factory.from_pretrained(path, config=settings, output_loading_info=True, **options)
    if misshapen := sorted(report["mismatched_keys"]):
        named = [f"{name} {list(found)} instead of {list(wanted)}" for name, found, wanted in misshapen]
        raise ValueError(
            f"model.path={path} has tensors of other shapes: {', '.join(first_few(named, MAX_NAMED))}\n"
            "  leave model.config as it is in its config.json"
        )
    missing = sorted(report["missing_keys"])
    if len(missing) == len(module.state_dict()):
        raise ValueError(
            f"model.path={path} has no tensor of a {type(module).__name__}: it lacks "
            f"{', '.join(first_few(missing, MAX_NAMED))}\n  set model.auto=, or another folder"
        )
    if missing:
        log.info("model.path=%s lacks %s: they have new values", path, ", ".join(first_few(missing, MAX_NAMED)))
    return _for_training(module)


def _for_training(module: nn.Module) -> nn.Module:
    settings: Any = module.config
    if hasattr(settings, "use_cache"):
        settings.use_cache = False  # of keys and values, for generation alone, which sets it by itself
    return module.train()


def _import_quietly(name: str) -> Any:
    """Import the package, without its progress bars and tables, which each rank would print."""
    try:
        package: Any = import_module(name)
        package.utils.logging.disable_progress_bar()
        package.utils.logging.set_verbosity_error()
        return package
    except ModuleNotFoundError as error:
        raise ValueError(
            f"model=transformers needs the package {error.name}\n  pip install silotrain[transformers]"
        ) from error


def _check_auto(package: Any, name: str) -> None:
    valid = _autos(package)
    if name not in valid:
        raise ValueError(f"model.auto={name} is no class of the package transformers{_close(name, valid)}")


def _factory(package: Any, auto: str, settings: Any) -> Any:
    """Return the Auto class `auto`; raise ValueError if it has no model for this configuration."""
    _check_local(settings)
    factory, kind = getattr(package, auto), type(settings)
    if kind not in factory._model_mapping:
        valid = [name for name in _autos(package) if kind in getattr(package, name)._model_mapping]
        raise ValueError(f"model.auto={auto} has no head for {settings.model_type}\n  valid: {', '.join(valid)}")
    return factory


def _autos(package: Any) -> list[str]:
    return [name for name in dir(package) if name.startswith("AutoModel")]


def _known(package: Any, architecture: str) -> str:
    valid = list(package.CONFIG_MAPPING)
    if architecture not in valid:
        raise ValueError(
            f"model.architecture={architecture} is unknown to transformers {package.__version__}"
            f"{_close(architecture, valid)}"
        )
    return architecture


def _close(name: str, valid: list[str]) -> str:
    found = difflib.get_close_matches(name, valid, n=MAX_SUGGESTED, cutoff=0.4)
    return f"\n  valid: {', '.join(found)}, and others" if found else ""


def _check_folder(path: Path) -> None:
    """Raise ValueError if a folder is not what `save_pretrained` has written."""
    if (path / "adapter_config.json").exists():
        raise ValueError(f"model.path={path} is an adapter\n  set the folder of its base model")
    if not (path / "config.json").is_file():
        found = "has no config.json" if path.is_dir() else "is no folder"
        raise ValueError(f"model.path={path} {found}\n  valid: a folder that save_pretrained has written")
    if not any(path.glob("*.safetensors")):
        raise ValueError(
            f"model.path={path} has no safetensors: other files of weights are not read, because they can execute code"
            "\n  save it again: AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )


def _check_fields(kind: Any, given: Mapping[str, Any]) -> None:
    """Raise ValueError for fields that a class of configurations does not have."""
    own = {field.name for field in fields(kind) if not field.name.startswith("_")}
    valid = sorted(own | set(kind.attribute_map) | {"num_labels"})
    errors = [
        f"model.config.{name} is no field of {kind.__name__}"
        f"{suggest(f'model.config.{name}', [f'model.config.{other}' for other in valid])}"
        for name in given
        if name not in valid
    ]
    if errors:
        raise ValueError("\n".join(errors))


def _check_local(settings: Any) -> None:
    """Raise ValueError if a configuration asks for kernels of the Hub, which are code that would be downloaded."""
    for part in (settings, *(getattr(settings, name, None) for name in settings.sub_configs)):
        for name in ("_attn_implementation", "_experts_implementation"):
            if "/" in str(getattr(part, name, "")):
                raise ValueError(
                    f"config.json names code to download: {name[1:]}={getattr(part, name)}\n  remove it from the file"
                )


@contextmanager
def _plain_errors(given: str) -> Iterator[None]:
    """Raise the package's errors as ValueErrors of few lines that name what was given."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith("model.") or "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{given} needs code of its own, which is not executed\n  set a model of the package's own architectures"
        ) from error
    except Exception as error:  # it documents none, and has many
        raise ValueError(f"{given}: {' '.join(str(error).split())}") from error
