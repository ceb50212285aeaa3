"""Networks that the configuration describes: their size, and which levels have attention."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from dpldm_dist.config import load_config
from dpldm_dist.errors import ConfigError
from dpldm_dist.models import unet as unet_module
from dpldm_dist.models.trainable import transformer_blocks
from dpldm_dist.models.unet import build_unet, spare_idle_attention

CONFIGS = Path(__file__).parent.parent.parent / "configs"


def unet_of(attention_levels: int | None, **sizes):
    sizes = {"block_channels": (16, 16, 32), "layers_per_block": 1, "context_dim": 8} | sizes
    return build_unet(
        latent_channels=3,
        latent_size=16,
        heads=sizes.pop("heads", 2),
        norm_groups=sizes.pop("norm_groups", 4),
        attention_levels=attention_levels,
        seed=0,
        **sizes,
    )


def test_the_network_for_cifar_is_the_papers():
    """Liu et al. (2023), arXiv 2305.15759: 90.29 M parameters in all, 16 transformer blocks."""
    model = load_config(CONFIGS / "cifar10.toml").model
    names = ("block_channels", "layers_per_block", "heads", "context_dim", "norm_groups")
    with torch.device("meta"):
        unet = unet_of(model.attention_levels, **{name: getattr(model, name) for name in names})
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6, 2) == 90.29
    assert len(transformer_blocks(unet)) == 16


@pytest.mark.parametrize(("levels", "blocks"), [(1, 4), (2, 7), (3, 10), (None, 10)])
def test_attention_is_on_the_largest_maps_and_in_the_middle(levels, blocks):
    """A level has one block on the way down and two on the way up."""
    unet = unet_of(levels)
    assert len(transformer_blocks(unet)) == blocks
    row = torch.randn(1, 3, 16, 16)
    out = unet(row, torch.tensor([3]), encoder_hidden_states=torch.randn(1, 1, 8)).sample
    assert out.shape == row.shape


@pytest.mark.parametrize("levels", [0, 4])
def test_more_levels_of_attention_than_there_are_levels_are_refused(levels):
    with pytest.raises(ConfigError, match="attention_levels = .: expected 1 to 3"):
        unet_of(levels)


@pytest.mark.parametrize("tokens", [1, 3])
def test_spared_attention_computes_what_diffusers_computes(tokens):
    check_spared_attention(tokens)


BUGS = {
    "value alone": (1, lambda attn, context: attn.to_v(context)),
    "key for value": (1, lambda attn, context: attn.to_out[0](attn.to_k(context))),
    "no gradient": (1, lambda attn, context: attn.to_out[0](attn.to_v(context)).detach()),
    "first of three tokens": (3, lambda attn, context: attn.to_out[0](attn.to_v(context[:, :1]))),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_of_spared_attention_is_caught(bug, monkeypatch):
    tokens, answer = BUGS[bug]

    def planted(processor, attn, hidden_states, encoder_hidden_states=None, *rest, **more):
        return answer(attn, encoder_hidden_states)

    monkeypatch.setattr(unet_module._CrossAttention, "__call__", planted)
    with pytest.raises(AssertionError):
        check_spared_attention(tokens)


def check_spared_attention(tokens: int) -> None:
    """Same answers and, for what can learn, same gradients; with several tokens the same bits."""
    stock, spared = unet_of(None), unet_of(None)
    spare_idle_attention(spared)
    rows, context = torch.randn(4, 3, 16, 16), torch.randn(4, tokens, 8)
    found = [u(rows, torch.arange(4), context).sample for u in (stock, spared)]
    gradients = []
    for unet, answer in zip((stock, spared), found, strict=True):
        names, parameters = zip(*unet.named_parameters(), strict=True)
        got = torch.autograd.grad(answer.square().sum(), parameters, allow_unused=True)
        gradients.append(dict(zip(names, got, strict=True)))
    if tokens > 1:
        assert torch.equal(*found)
    assert torch.allclose(*found, atol=1e-5)
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        if other is None:  # nothing depends on it
            assert tokens == 1 and gradient.abs().max() < 1e-5
        else:
            assert torch.allclose(gradient, other, atol=1e-3 * float(gradient.abs().max()))


def test_blocks_that_use_the_answer_otherwise_are_left_alone():
    """K blocks lay the answer out as a map of its own."""
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(64, 64),
        layers_per_block=1, attention_head_dim=2, cross_attention_dim=8, norm_num_groups=4,
        down_block_types=("KCrossAttnDownBlock2D", "KDownBlock2D"), mid_block_type=None,
        up_block_types=("KUpBlock2D", "KCrossAttnUpBlock2D"),
    )  # fmt: skip
    rows, context = torch.randn(2, 4, 8, 8), torch.randn(2, 1, 8)
    stock = unet(rows, torch.arange(2), context).sample
    spare_idle_attention(unet)
    assert torch.equal(unet(rows, torch.arange(2), context).sample, stock)


def test_attention_to_one_token_computes_neither_query_nor_key():
    unet = unet_of(None)
    spare_idle_attention(unet)
    used = []
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_q", "attn2.to_k", "attn2.to_v")):
            module.register_forward_hook(lambda *_, name=name: used.append(name[-4:]))
    for tokens, wanted in ((1, {"to_v"}), (2, {"to_q", "to_k", "to_v"})):
        used.clear()
        unet(torch.randn(1, 3, 16, 16), torch.tensor([3]), torch.randn(1, tokens, 8))
        assert set(used) == wanted
