"""Which layers the engine works on, and where their parameters lie among the P."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from dpldm_dist.errors import PrivacyError

Kind = Literal["linear", "conv", "group_norm", "layer_norm", "embedding"]

_KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: "linear",
    nn.Conv2d: "conv",
    nn.GroupNorm: "group_norm",
    nn.LayerNorm: "layer_norm",
    nn.Embedding: "embedding",
}


@dataclass(frozen=True)
class Layer:
    """A module with trainable parameters, and where they lie among the P."""

    name: str
    module: nn.Module
    kind: Kind
    weight: slice | None
    bias: slice | None


def find_layers(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], places: Mapping[str, slice]
) -> list[Layer]:
    """The modules that own ``parameters``. Raises: PrivacyError for what cannot be handled."""
    place_of = {id(parameter): places[name] for name, parameter in parameters.items()}
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    owner_of: dict[int, str] = {}
    layers = []
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise PrivacyError(
                f"Module {path} is a batch norm, which couples records: use GroupNorm."
            )
        own = {n: p for n, p in module._parameters.items() if p is not None and id(p) in place_of}
        for name, parameter in own.items():
            if id(parameter) in owner_of:
                raise PrivacyError(
                    f"Parameter {name_of[id(parameter)]} is shared by {owner_of[id(parameter)]} and"
                    f" {path}.{name}: expected one module per parameter. Freeze it or untie it."
                )
            owner_of[id(parameter)] = f"{path}.{name}"
        if own:
            layers.append(_layer(path, module, {n: place_of[id(p)] for n, p in own.items()}))
    lost = [name_of[key] for key in place_of if key not in owner_of]
    if lost:
        raise PrivacyError(
            f"Parameter {lost[0]} is not in the model: expected parameters of its modules."
        )
    return layers


def _layer(path: str, module: nn.Module, own: Mapping[str, slice]) -> Layer:
    """A layer of a kind that the engine knows. Raises: PrivacyError with the reason otherwise."""
    kind = next(
        (
            k
            for t, k in _KINDS.items()
            if isinstance(module, t) and type(module).forward is t.forward
        ),
        None,
    )
    if kind is None or not set(own) <= {"weight", "bias"}:
        raise PrivacyError(
            f"Module {path} ({type(module).__name__}) has trainable parameters of its own: expected"
            " Linear, Conv2d, GroupNorm, LayerNorm or Embedding. Freeze it."
        )
    if kind == "conv" and (
        module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str)
    ):
        raise PrivacyError(
            f"Module {path} is a convolution with groups = {module.groups}, padding = "
            f"{module.padding!r} ({module.padding_mode}): expected one group and zeros, in numbers."
        )
    if kind == "embedding" and (module.max_norm is not None or module.scale_grad_by_freq):
        raise PrivacyError(
            f"Module {path} has max_norm or scale_grad_by_freq, which couple records: expected "
            "neither."
        )
    return Layer(path, module, kind, own.get("weight"), own.get("bias"))


def places_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, slice]:
    """Where each parameter lies in the flattened vector."""
    if not parameters or len({id(p) for p in parameters.values()}) < len(parameters):
        raise PrivacyError("Trainable parameters: expected at least one, and each only once.")
    places, start = {}, 0
    for name, parameter in parameters.items():
        places[name] = slice(start, start + parameter.numel())
        start += parameter.numel()
    return places
