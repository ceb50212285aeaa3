"""Captions to context tokens by a frozen text encoder of a local diffusers directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from dpldm_dist.errors import DataError

SUPPORTED = ("CLIPTextModel", "T5EncoderModel")


class CaptionEncoder(nn.Module):
    """The tokenizer and text encoder of ``folder``, as a stock StableDiffusionPipeline uses them.

    Nothing in it trains. Files only: never a download, never code from the directory.
    Raises: DataError if one of them is missing or of another kind.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        text_encoder, tokenizer = Path(folder, "text_encoder"), Path(folder, "tokenizer")
        name = _architecture(text_encoder)
        try:
            self.model = getattr(transformers, name).from_pretrained(
                text_encoder, local_files_only=True, use_safetensors=True
            )
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                tokenizer, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"Cannot load the text encoder of {folder}: {reason}") from None
        self.tokens = int(min(self._tokenizer.model_max_length, _positions(self.model)))
        self.width = int(self.model.config.hidden_size)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> Tensor:
        """Last hidden states (B, tokens, width), float32; longer captions are cut."""
        found = self._tokenizer(
            list(captions),
            padding="max_length",
            max_length=self.tokens,
            truncation=True,
            return_tensors="pt",
        )
        device = next(self.model.parameters()).device
        return self.model(found.input_ids.to(device))[0].float()


def _architecture(folder: Path) -> str:
    try:
        names = json.loads((folder / "config.json").read_text())["architectures"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise DataError(
            f"No text encoder at {folder}: captions need a model.init with text_encoder/ and "
            "tokenizer/. Set model.conditioning to class or none, or choose such a model."
        ) from None
    if not names or names[0] not in SUPPORTED:
        raise DataError(f"The text encoder at {folder} is {names}: expected one of {SUPPORTED}.")
    return names[0]


def _positions(model: nn.Module) -> int:
    return getattr(model.config, "max_position_embeddings", 512)
