"""The moving average against its formula, and across a restart."""

from __future__ import annotations

import pytest
import torch

from dpldm_dist.errors import DataError
from dpldm_dist.models.ema import EMA


def test_the_average_follows_its_formula_with_a_ramp():
    value = torch.zeros(3)
    ema, expected = EMA({"w": value}, decay=0.9), 0.0
    for n in range(1, 200):
        value.fill_(float(n))
        ema.update()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
        assert torch.allclose(ema.averages["w"], torch.full((3,), expected), rtol=1e-5)


def test_a_restored_average_goes_on_as_the_unbroken_one():
    value = torch.zeros(2)
    unbroken = EMA({"w": value}, decay=0.9)
    for n in range(5):
        value.fill_(float(n))
        unbroken.update()
    resumed = EMA({"w": value}, decay=0.9)
    resumed.load(unbroken.state())
    value.fill_(100.0)
    unbroken.update()
    resumed.update()
    assert torch.equal(unbroken.averages["w"], resumed.averages["w"])


def test_copy_to_writes_the_average_into_the_followed_parameters():
    layer = torch.nn.Linear(2, 2)
    ema = EMA(dict(layer.named_parameters()), decay=0.5)
    kept = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1.0)
    ema.copy_to()
    assert torch.equal(layer.weight, kept)


def test_a_state_that_lacks_a_parameter_is_refused():
    ema = EMA({"w": torch.zeros(2)}, decay=0.5)
    with pytest.raises(DataError, match="lacks w"):
        ema.load({"ema_updates": torch.tensor(1)})
