"""Captions through a frozen text encoder, as the stock pipeline embeds them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline

from dpldm_dist.errors import DataError
from dpldm_dist.models.autoencoder import decode
from dpldm_dist.models.captions import CaptionEncoder
from dpldm_dist.models.conditioning import ClassEmbedder
from dpldm_dist.models.denoiser import Denoiser
from dpldm_dist.models.directory import load_model
from tests.models import sd_shaped

CAPTIONS = ["a red cat", "dog", "a caption that is far too long for eight tokens"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sd_shaped.make_sd_shaped(tmp_path_factory.mktemp("sd") / "model")


def test_captions_become_tokens_of_fixed_number_and_width(folder):
    encoder = CaptionEncoder(folder)
    context = encoder(CAPTIONS)
    assert context.shape == (3, sd_shaped.TOKENS, sd_shaped.WIDTH)
    assert not torch.allclose(context[0], context[1], atol=1e-3)
    assert torch.allclose(encoder(CAPTIONS[:1])[0], context[0], atol=1e-5)
    assert not any(p.requires_grad for p in encoder.parameters())


def test_the_stock_pipeline_draws_the_same_images_from_prompts(folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 4, 4)
    stock_BCHW = pipeline(
        CAPTIONS[:2], latents=noise, num_inference_steps=5, guidance_scale=2.0, output_type="pt"
    ).images
    loaded, encoder = load_model(folder), CaptionEncoder(folder)
    denoiser = Denoiser(loaded.unet, ClassEmbedder(encoder([""]), kind="caption"))
    z0 = loaded.diffusion.ddim_sample(
        denoiser, encoder(CAPTIONS[:2]), noise, steps=5, guidance_scale=2.0
    )
    ours_BCHW = (decode(loaded.autoencoder, z0).detach() + 1) / 2
    assert torch.allclose(stock_BCHW, ours_BCHW, atol=1e-4)


def test_a_directory_without_text_encoder_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/text_encoder")
    with pytest.raises(DataError, match="captions need a model.init"):
        CaptionEncoder(tmp_path / "copy")


def test_a_text_encoder_of_another_kind_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    config = tmp_path / "copy/text_encoder/config.json"
    other = {**json.loads(config.read_text()), "architectures": ["GPT2Model"]}
    config.write_text(json.dumps(other))
    with pytest.raises(DataError, match="GPT2Model"):
        CaptionEncoder(tmp_path / "copy")
