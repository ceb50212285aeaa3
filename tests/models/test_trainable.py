"""Which parameters learn, by name, on a real diffusers UNet; and that each of them can."""

from __future__ import annotations

import copy

import pytest
import torch

from dpldm_dist.errors import ConfigError, PrivacyError
from dpldm_dist.models.conditioning import ClassEmbedder, random_rows
from dpldm_dist.models.denoiser import Denoiser
from dpldm_dist.models.diffusion import Diffusion
from dpldm_dist.models.trainable import (
    fold_adapters,
    freeze_idle,
    select_trainable,
    transformer_blocks,
    verify_all_learn,
)
from dpldm_dist.models.unet import build_unet

DELTA = "embedder.delta.weight"
IN_ONE_BLOCK = {
    "norm",
    "proj_in",
    "proj_out",
    "transformer_blocks.0.norm1",
    "transformer_blocks.0.norm2",
    "transformer_blocks.0.norm3",
    "transformer_blocks.0.ff.net.0.proj",
    "transformer_blocks.0.ff.net.2",
    *(f"transformer_blocks.0.attn{i}.to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out.0")),
}


def new_denoiser(*, tokens: int = 1, channels=(16, 32), size: int = 4, kind="class") -> Denoiser:
    unet = build_unet(
        latent_channels=4,
        latent_size=size,
        block_channels=channels,
        layers_per_block=1,
        heads=2,
        context_dim=8,
        norm_groups=4,
        seed=0,
    )
    rows = random_rows(4 if kind == "class" else 1, tokens, 8, seed=0)
    return Denoiser(unet, ClassEmbedder(rows, kind=kind))


def modules(selected: dict) -> set[str]:
    return {name.rpartition(".")[0] for name in selected}


def check(denoiser: Denoiser, size: int = 4) -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(8, 4, size, size, generator=generator)
    verify_all_learn(denoiser, Diffusion(), latents_BCHW=latents, condition=torch.arange(8) % 4)


def test_blocks_are_counted_input_middle_output():
    assert transformer_blocks(new_denoiser().unet) == [
        "down_blocks.0.attentions.0",
        "down_blocks.1.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1",
        "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1",
    ]


def test_transformer_means_whole_blocks_as_in_the_paper():
    denoiser = new_denoiser(tokens=2)
    selected = select_trainable(denoiser, trainable="transformer")
    blocks = transformer_blocks(denoiser.unet)
    expected = {f"unet.{block}.{name}" for block in blocks for name in IN_ONE_BLOCK}
    assert modules(selected) == expected | {"embedder.delta"}
    check(denoiser)


def test_attention_means_the_projections_of_both_attentions():
    denoiser = new_denoiser(tokens=2)
    selected = select_trainable(denoiser, trainable="attention")
    blocks = transformer_blocks(denoiser.unet)
    wanted = {name for name in IN_ONE_BLOCK if ".attn" in name}
    expected = {f"unet.{block}.{name}" for block in blocks for name in wanted}
    assert modules(selected) == expected | {"embedder.delta"}
    check(denoiser)


def test_output_blocks_start_at_the_given_number():
    denoiser = new_denoiser(tokens=2)
    selected = select_trainable(denoiser, trainable="output-blocks", first_block=6)
    blocks = ["up_blocks.1.attentions.0", "up_blocks.1.attentions.1"]
    expected = {f"unet.{block}.{name}" for block in blocks for name in IN_ONE_BLOCK}
    assert modules(selected) == expected | {"embedder.delta"}
    everything = select_trainable(new_denoiser(), trainable="output-blocks", first_block=1)
    assert list(everything) == list(select_trainable(new_denoiser(), trainable="transformer"))


def test_a_first_block_beyond_the_last_is_refused():
    with pytest.raises(ConfigError, match="7 transformer blocks"):
        select_trainable(new_denoiser(), trainable="output-blocks", first_block=8)


@pytest.mark.parametrize("trainable", ["transformer", "attention", "output-blocks", "lora"])
def test_one_context_token_freezes_what_has_no_gradient(trainable):
    denoiser = new_denoiser(tokens=1)
    selected = select_trainable(denoiser, trainable=trainable)
    assert not [n for n in selected if "attn2.to_q" in n or "attn2.to_k" in n or "norm2" in n]
    assert any("attn2.to_v" in name for name in selected)
    check(denoiser)


@pytest.mark.parametrize("tokens", [1, 3])
def test_public_training_leaves_out_only_what_no_answer_depends_on(tokens):
    denoiser = new_denoiser(tokens=tokens).requires_grad_(True)
    freeze_idle(denoiser)
    z, t = torch.randn(2, 4, 4, 4), torch.tensor([3, 500])
    denoiser(z, t, torch.arange(2)).square().sum().backward()
    without = {name for name, p in denoiser.named_parameters() if p.grad is None}
    assert without == {name for name, p in denoiser.named_parameters() if not p.requires_grad}
    assert bool(without) == (tokens == 1)


@pytest.mark.parametrize("trainable", ["transformer", "attention", "output-blocks", "lora"])
def test_exactly_the_selected_parameters_require_a_gradient(trainable):
    denoiser = new_denoiser()
    selected = select_trainable(denoiser, trainable=trainable)
    assert DELTA in selected
    for name, parameter in denoiser.named_parameters():
        assert parameter.requires_grad == (name in selected)
        if name in selected:
            assert parameter is selected[name]


def test_selecting_again_forgets_the_first_selection():
    denoiser = new_denoiser()
    select_trainable(denoiser, trainable="transformer")
    selected = select_trainable(denoiser, trainable="attention")
    assert {n for n, p in denoiser.named_parameters() if p.requires_grad} == set(selected)


def test_with_captions_the_table_does_not_learn():
    selected = select_trainable(new_denoiser(kind="caption", tokens=3), trainable="attention")
    assert DELTA not in selected


def test_adapters_start_without_effect_and_equal_on_every_worker():
    plain = new_denoiser()
    first, second = copy.deepcopy(plain), copy.deepcopy(plain)
    selected = select_trainable(first, trainable="lora", lora_rank=2)
    other = select_trainable(second, trainable="lora", lora_rank=2)
    assert all(".lora_" in name for name in selected if name != DELTA)
    assert all(torch.equal(selected[name], other[name]) for name in selected)
    z, t, labels = torch.randn(4, 4, 4, 4), torch.tensor([1, 10, 500, 999]), torch.arange(4)
    assert torch.allclose(first(z, t, labels), plain(z, t, labels), atol=1e-6)


def test_folded_adapters_give_a_stock_unet_that_answers_alike():
    denoiser = new_denoiser()
    names = set(denoiser.unet.state_dict())
    for parameter in select_trainable(denoiser, trainable="lora", lora_rank=2).values():
        torch.nn.init.normal_(parameter.data, std=0.3)
    folded = fold_adapters(denoiser.unet)
    assert set(folded.state_dict()) == names
    z, t, labels = torch.randn(4, 4, 4, 4), torch.tensor([1, 10, 500, 999]), torch.arange(4)
    with torch.no_grad():
        adapted = denoiser(z, t, labels)
        assert torch.allclose(Denoiser(folded, denoiser.embedder)(z, t, labels), adapted, atol=1e-5)
        assert not torch.allclose(new_denoiser()(z, t, labels), adapted, atol=1e-2)


def test_parameters_that_cannot_learn_are_refused_by_name():
    denoiser = new_denoiser(tokens=1)
    select_trainable(denoiser, trainable="transformer")
    for name, parameter in denoiser.unet.named_parameters():
        if "attn2.to_k" in name or "norm2" in name:
            parameter.requires_grad_(True)
    with pytest.raises(PrivacyError, match="norm2.* more is identically zero"):
        check(denoiser)


def test_the_check_leaves_the_parameters_as_they_were():
    denoiser = new_denoiser()
    select_trainable(denoiser, trainable="lora")
    before = copy.deepcopy(denoiser.state_dict())
    check(denoiser)
    assert all(torch.equal(before[name], value) for name, value in denoiser.state_dict().items())
    assert all(p.grad is None for p in denoiser.parameters())


def test_rows_of_the_denoiser_do_not_mix():
    denoiser = new_denoiser()
    z = torch.randn(4, 4, 4, 4, requires_grad=True)
    answer = denoiser(z, torch.tensor([1, 10, 500, 999]), torch.arange(4))
    (gradient,) = torch.autograd.grad(answer[1].sum(), z)
    assert gradient[1].abs().max() > 0
    assert gradient[[0, 2, 3]].abs().max() == 0


def test_nothing_in_the_denoiser_is_random_or_keeps_batch_statistics():
    for module in new_denoiser().unet.modules():
        assert not isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
        assert not isinstance(module, torch.nn.Dropout) or module.p == 0.0


def test_a_unet_that_does_not_fit_its_latent_is_refused_in_words():
    with pytest.raises(ConfigError, match="2 x 2"):
        new_denoiser(channels=(16, 16, 16))
    with pytest.raises(ConfigError, match="norm_groups = 4"):
        new_denoiser(channels=(18, 16))
