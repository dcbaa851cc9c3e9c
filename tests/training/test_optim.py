"""Schedules and optimizers against their formulas and timm."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from models.torchvision import load_torchvision
from training.optim import LARS, build_optimizer, warmup_cosine


def test_schedule_rises_linearly_and_falls_as_a_cosine() -> None:
    assert [warmup_cosine(step, 100, 4) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    for step in range(4, 101):
        assert warmup_cosine(step, 100, 4) == pytest.approx(0.5 * (1 + math.cos(math.pi * (step - 4) / 96)))
    assert warmup_cosine(100, 100, 4) == pytest.approx(0, abs=1e-12)


def test_lars_takes_the_steps_of_timm() -> None:
    load_torchvision()
    from timm.optim import Lars

    torch.manual_seed(0)
    mine, theirs = (nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(2))
    ours = LARS([mine], lr=0.3, weight_decay=1e-2, trust=1e-3)
    reference = Lars([theirs], lr=0.3, weight_decay=1e-2, trust_coeff=1e-3, momentum=0.9)
    for _ in range(5):
        gradient = torch.randn(3, 4)
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        ours.step()
        reference.step()
        assert torch.allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_norms_biases_and_scales_are_not_decayed(name: str) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = build_optimizer(module, name, 0.1, 0.5)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(module[0].weight)}


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_each_lowers_a_quadratic(name: str) -> None:
    torch.manual_seed(0)
    module = nn.Linear(4, 4)
    optimizer = build_optimizer(module, name, {"lars": 5.0}.get(name, 0.05), 0.0)
    rows = torch.randn(16, 4)
    losses = []
    for _ in range(60):
        loss = (module(rows) - rows).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_unknown_optimizer() -> None:
    with pytest.raises(ValueError, match="adamw, lars, sgd"):
        build_optimizer(nn.Linear(1, 1), "adam", 0.1, 0)
