"""The losses of the self-supervised methods: plain loops of the papers' equations, and lightly's, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.torchvision import load_torchvision
from training.methods.byol import BYOLLoss
from training.methods.moco import MoCoLoss
from training.methods.simclr import SimCLRLoss
from training.methods.vicreg import VICRegLoss

Loss = Callable[..., Tensor]


def _rows(count: int = 2, batch: int = 6, size: int = 5, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, size, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(count)]


def _agree(ours: Tensor, theirs: Tensor, rows: list[Tensor], tolerance: float = 1e-10) -> None:
    assert abs(float((ours - theirs).detach())) < tolerance
    for a, b in zip(torch.autograd.grad(ours, rows), torch.autograd.grad(theirs, rows), strict=True):
        assert (a - b).abs().max() < tolerance


def _lightly() -> object:
    load_torchvision()
    import lightly.loss

    return lightly.loss


def _contrastive(views: list[Tensor], term: Callable[[Tensor, Tensor], Tensor], temperature: float) -> Tensor:
    """The mean over anchors and their positives of term(positive similarity, negatives' similarities), by loops."""
    unit = [F.normalize(view, dim=-1) for view in views]
    terms = []
    for v, anchors in enumerate(unit):
        for i in range(len(anchors)):
            negatives = torch.stack(
                [anchors[i] @ other[j] / temperature for other in unit for j in range(len(other)) if j != i]
            )
            terms += [term(anchors[i] @ unit[u][i] / temperature, negatives) for u in range(len(unit)) if u != v]
    return torch.stack(terms).mean()


def _ntxent(positive: Tensor, negatives: Tensor) -> Tensor:
    return -(positive.exp() / (positive.exp() + negatives.exp().sum())).log()


def _dcl(positive: Tensor, negatives: Tensor) -> Tensor:
    return -(positive.exp() / negatives.exp().sum()).log()


def _debiased(positive: Tensor, negatives: Tensor, tau: float = 0.1, beta: float = 0.0, floor: float = 0.5) -> Tensor:
    """Eq. 8 of arXiv:2007.00224, with the weights of eq. 4 of arXiv:2010.04592; floor is the temperature."""
    number = len(negatives)
    weights = (beta * negatives).exp()
    weighted = (weights * negatives.exp()).sum() / weights.mean()
    estimate = torch.clamp((weighted - tau * number * positive.exp()) / (1 - tau), min=number * math.exp(-1 / floor))
    return -(positive.exp() / (positive.exp() + estimate)).log()


def _hard(positive: Tensor, negatives: Tensor) -> Tensor:
    return _debiased(positive, negatives, beta=1.0)


@pytest.mark.parametrize("views", [2, 3, 4])
@pytest.mark.parametrize(
    ("variant", "term"), [("ntxent", _ntxent), ("dcl", _dcl), ("debiased", _debiased), ("hard", _hard)]
)
def test_simclr_is_the_plain_loop(variant: str, term: Callable[[Tensor, Tensor], Tensor], views: int) -> None:
    rows = _rows(views)
    _agree(SimCLRLoss(0.5, variant=variant)(*rows), _contrastive(rows, term, 0.5), rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.07, 0.5, 2.0])
def test_simclr_is_lightlys(temperature: float) -> None:
    rows = _rows(batch=12, size=9)
    theirs = _lightly().NTXentLoss(temperature=temperature)  # type: ignore[attr-defined]
    _agree(SimCLRLoss(temperature)(*rows), theirs(*rows), rows)
    decoupled = _lightly().DCLLoss(temperature=temperature)  # type: ignore[attr-defined]
    _agree(SimCLRLoss(temperature, variant="dcl")(*rows), decoupled(*rows), rows)


def test_moco_with_a_queue_is_lightlys_with_a_memory_bank() -> None:
    q, k = _rows(batch=8, size=6)
    theirs = _lightly().NTXentLoss(temperature=0.2, memory_bank_size=(16, 6))  # type: ignore[attr-defined]
    bank = F.normalize(torch.randn(16, 6, dtype=torch.float64), dim=-1)
    theirs.memory_bank.bank = bank.clone()
    _agree(MoCoLoss(0.2)(q, k, bank), theirs(q, k.detach()), [q])
    assert k.grad is None


def test_moco_v3_is_the_plain_loop() -> None:
    q, k = _rows(batch=7)
    unit_q, unit_k = F.normalize(q, dim=-1), F.normalize(k.detach(), dim=-1)
    terms = [-(unit_q[i] @ unit_k[i] / 0.2) + (unit_q[i] @ unit_k.T / 0.2).exp().sum().log() for i in range(7)]
    _agree(MoCoLoss(0.2)(q, k, None), 2 * 0.2 * torch.stack(terms).mean(), [q])


def test_byol_is_lightlys() -> None:
    p1, p2, z1, z2 = _rows(4)
    cosine = _lightly().NegativeCosineSimilarity()  # type: ignore[attr-defined]
    theirs = (2 + 2 * cosine(p1, z2.detach())) + (2 + 2 * cosine(p2, z1.detach()))
    _agree(BYOLLoss()(p1, p2, z1, z2), theirs, [p1, p2])
    assert float(BYOLLoss()(p1, p2, 3 * p2, 0.1 * p1).detach()) == pytest.approx(0, abs=1e-12)


def test_vicreg_is_lightlys() -> None:
    rows = _rows(batch=16, size=7)
    theirs = _lightly().VICRegLoss(lambda_param=25.0, mu_param=25.0, nu_param=1.0)  # type: ignore[attr-defined]
    _agree(VICRegLoss()(*rows), theirs(*rows), rows)


LOSSES: dict[str, tuple[Loss, int]] = {
    "ntxent": (SimCLRLoss(0.5), 2),
    "dcl": (SimCLRLoss(0.5, variant="dcl"), 2),
    "debiased": (SimCLRLoss(0.5, variant="debiased"), 2),
    "hard": (SimCLRLoss(0.5, variant="hard"), 3),
    "moco": (lambda q, k: MoCoLoss()(q, k, F.normalize(torch.ones(4, 5, dtype=q.dtype), dim=-1)), 2),
    "moco v3": (lambda q, k: MoCoLoss()(q, k, None), 2),
    "byol": (BYOLLoss(), 4),
    "vicreg": (VICRegLoss(), 2),
}


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_losses_compile_whole(name: str) -> None:
    loss, views = LOSSES[name]
    rows = _rows(views)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(*rows), loss(*rows), atol=1e-12)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_losses_do_not_see_the_order_of_the_batch_nor_change_it(name: str) -> None:
    loss, views = LOSSES[name]
    rows = [row.detach() for row in _rows(views)]
    before = [row.clone() for row in rows]
    value, order = loss(*rows), torch.randperm(6, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(loss(*(row[order] for row in rows)), value, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(rows, before, strict=True))
    if name != "vicreg":
        assert torch.allclose(loss(*(7 * row for row in rows)), value, atol=1e-12)


def test_views_may_be_swapped() -> None:
    for loss in (SimCLRLoss(0.3), SimCLRLoss(0.3, variant="hard"), VICRegLoss()):
        one, two = _rows()
        assert torch.allclose(loss(one, two), loss(two, one), atol=1e-12)


def test_temperature_can_be_learned() -> None:
    rows = _rows()
    loss = SimCLRLoss(0.5, learnable=True)
    loss(*rows).backward()
    (learned,) = loss.parameters()
    assert learned.grad is not None
    assert float(torch.as_tensor(loss.temperature).detach()) == pytest.approx(0.5)
    assert not list(SimCLRLoss(0.5).parameters())


def test_wrong_settings_are_refused() -> None:
    for make in (lambda: SimCLRLoss(0), lambda: SimCLRLoss(variant="x"), lambda: MoCoLoss(0)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="temperature"):
            make()
