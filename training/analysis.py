"""A look at features: figures that tell what a training made of them, maps, and neighbours as pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from models.errors import DataError
from models.retrieval import embed_images
from training.figures import labelled_pictures
from training.progress import health

Projection = Literal["pca", "tsne", "umap"]


def analyze_features(
    features: Tensor, labels: Sequence[Any] | Tensor | None = None, positives: Tensor | None = None, *, k: int = 10
) -> dict[str, Any]:
    """Figures of features (N, D), any norm; all on the unit sphere.

    rankme, feature_std: as in the training log. effective_dimensions: of the covariance, (sum l)^2 / sum l^2 of its
    eigenvalues l. uniformity: log of the mean of exp(-2 |x - y|^2) over pairs, lower is more even; alignment: mean
    |x - y|^2 over positive pairs (arXiv:2005.10242, eqs. 2 and 1), which are the rows of `positives` (N, D), other
    views of the same pictures, or without them pairs of one class. hubness: skewness of how often a row is among the k
    nearest of others (Radovanovic et al., JMLR 11, 2010); never_found: share of rows that never are.
    With labels also, for each class: cohesion (mean cosine within), separation (mean cosine with the nearest other
    class) and its name. Raises DataError for fewer than three rows.
    """
    if len(features) < 3:
        raise DataError(f"{len(features)} features are too few to analyse; give three at least")
    rows = F.normalize(features.float(), dim=-1)
    spectrum = torch.linalg.eigvalsh(torch.cov(rows.T)).clamp(min=0)
    cosines = rows @ rows.T
    others = ~torch.eye(len(rows), dtype=torch.bool)
    nearest = cosines.masked_fill(~others, -2).topk(min(k, len(rows) - 1), dim=1).indices
    counts = torch.bincount(nearest.flatten(), minlength=len(rows)).float()
    skewness = ((counts - counts.mean()) ** 3).mean() / counts.std(unbiased=False).clamp(min=1e-12) ** 3
    result: dict[str, Any] = {
        **health(rows),
        "effective_dimensions": float(spectrum.sum() ** 2 / spectrum.square().sum().clamp(min=1e-12)),
        # |x - y|^2 = 2 - 2 cos on the sphere.
        "uniformity": float((-4 * (1 - cosines[others])).exp().mean().log()),
        "hubness": float(skewness),
        "never_found": float((counts == 0).float().mean()),
    }
    if positives is not None:
        result["alignment"] = float((rows - F.normalize(positives.float(), dim=-1)).square().sum(1).mean())
    if labels is not None:
        names, numbers = np.unique([str(label) for label in _values(labels)], return_inverse=True)
        same = torch.from_numpy(numbers[:, None] == numbers[None, :])
        if positives is None and bool((same & others).any()):
            result["alignment"] = float((2 - 2 * cosines[same & others]).mean())
        result["classes"] = _classes(rows, cosines, [str(name) for name in names], torch.from_numpy(numbers))
    return result


def _values(labels: Sequence[Any] | Tensor) -> Sequence[Any]:
    return labels.tolist() if isinstance(labels, Tensor) else labels


def _classes(rows: Tensor, cosines: Tensor, names: list[str], numbers: Tensor) -> dict[str, dict[str, Any]]:
    """Cohesion and separation by class."""
    sums = torch.zeros(len(names), rows.shape[1]).index_add_(0, numbers, rows)
    counts = torch.bincount(numbers, minlength=len(names)).float()
    between = (sums @ sums.T) / (counts[:, None] * counts[None, :])
    table = {}
    for place, name in enumerate(names):
        count = float(counts[place])
        within = (float(sums[place].square().sum()) - count) / (count * (count - 1)) if count > 1 else float("nan")
        entry: dict[str, Any] = {"count": int(count), "cohesion": within}
        if len(names) > 1:
            apart = between[place].clone()
            apart[place] = -2
            entry |= {"separation": float(apart.max()), "nearest_class": names[int(apart.argmax())]}
        table[name] = entry
    return table


def project_features(features: Tensor, method: Projection = "pca", *, seed: int = 0) -> np.ndarray:
    """Features (N, D) -> places in the plane (N, 2). t-SNE and UMAP need `pip install 'semblance[analysis]'`.

    Raises ValueError for an unknown method.
    """
    rows = F.normalize(features.float(), dim=-1)
    if method == "pca":
        centred = rows - rows.mean(0)
        _, _, directions = torch.linalg.svd(centred, full_matrices=False)
        # The sign of a direction is arbitrary: the largest coordinate is made positive, so that maps can be compared.
        largest = directions[:2].gather(1, directions[:2].abs().argmax(1, keepdim=True))
        return (centred @ (directions[:2] * largest.sign()).T).numpy()
    if method == "tsne":
        from sklearn.manifold import TSNE

        perplexity = min(30, max(2, (len(rows) - 1) // 3))
        return np.asarray(
            TSNE(perplexity=perplexity, metric="cosine", random_state=seed, init="random").fit_transform(rows.numpy())
        )
    if method == "umap":
        from umap import UMAP

        neighbours = min(15, len(rows) - 1)
        return np.asarray(
            UMAP(n_neighbors=neighbours, metric="cosine", random_state=seed, n_jobs=1).fit_transform(rows.numpy())
        )
    raise ValueError(f"unknown projection {method!r}; choose pca, tsne or umap")


def visualize_features(
    features: Tensor,
    labels: Sequence[Any] | Tensor | None = None,
    *,
    method: Projection = "pca",
    out: str | Path = "features.png",
    title: str = "",
    seed: int = 0,
) -> Path:
    """A map of features (N, D), coloured by label: a picture (.png, .svg, .pdf), or an interactive page (.html) that
    needs no network. Needs `pip install 'semblance[analysis]'`. -> the file."""
    places = project_features(features, method, seed=seed)
    names = [str(label) for label in _values(labels)] if labels is not None else [""] * len(places)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".html":
        from plotly.graph_objects import Figure as Page
        from plotly.graph_objects import Scattergl

        page = Page(layout={"title": title or method})
        for name in sorted(set(names)):
            rows = [row for row, other in enumerate(names) if other == name]
            texts = [f"{name} ({row})" for row in rows]
            page.add_trace(Scattergl(x=places[rows, 0], y=places[rows, 1], mode="markers", name=name, text=texts))
        page.write_html(out, include_plotlyjs=True)
        return out
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(title=title or method, xticks=[], yticks=[])
    for name in sorted(set(names)):
        mine = places[[other == name for other in names]]
        axes.scatter(mine[:, 0], mine[:, 1], s=6, label=name or None)
    if 1 < len(set(names)) <= 20:
        axes.legend(markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(out, dpi=120)
    return out


def neighbour_sheet(
    features: Tensor,
    images: Tensor,
    out: str | Path = "neighbours.png",
    *,
    queries: int = 10,
    k: int = 9,
    seed: int = 0,
) -> Path:
    """A sheet with a query a row, drawn at random, and its k nearest by cosine. images: uint8 (N, 3, H, W)."""
    rows = F.normalize(features.float(), dim=-1)
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:queries]
    cosines = rows[chosen] @ rows.T
    cosines[torch.arange(len(chosen)), chosen] = -2
    nearest = cosines.topk(min(k, len(rows) - 1), dim=1).indices
    return picture_sheet(
        [images[torch.cat([query[None], found])] for query, found in zip(chosen, nearest, strict=True)], out
    )


def analyze_model(
    model: Any,
    data: str,
    out: str | Path,
    *,
    data_root: str | None = None,
    maps: Sequence[Projection] = ("pca",),
    limit: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Figures, maps and a neighbour sheet of a model's features of a data set, as files in the folder `out`.

    data: a named set, of which the validation split is taken, or anything that training takes. limit: pictures, drawn
    at random. -> what is in `analysis.json`.
    """
    images, labels = labelled_pictures(model, data, data_root)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:limit]
    images, kept = images[chosen], [labels[row] for row in chosen.tolist()] if labels else None
    features = embed_images(model, images)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    result = {"data": data, "pictures": len(images), **analyze_features(features, kept)}
    (folder / "analysis.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for method in maps:
        for suffix in ("png", "html"):
            visualize_features(
                features, kept, method=method, out=folder / f"{method}.{suffix}", title=f"{data}, {method}"
            )
    neighbour_sheet(features, images, folder / "neighbours.png", seed=seed)
    return result


def picture_sheet(rows: Sequence[Tensor], out: str | Path, titles: Sequence[str] = (), *, side: int = 96) -> Path:
    """Rows of pictures, uint8 (N, 3, H, W) each, as one PNG; titles stand above their rows."""
    gap, line = 4, 18 if titles else 0
    width = max(len(row) for row in rows) * (side + gap) + gap
    sheet = Image.new("RGB", (width, len(rows) * (side + gap + line) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, row in enumerate(rows):
        top = index * (side + gap + line) + gap
        if titles:
            draw.text((gap, top), titles[index], fill="black")
        for place, pixels in enumerate(row):
            picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
            sheet.paste(
                picture.resize((side, side), Image.Resampling.LANCZOS), (gap + place * (side + gap), top + line)
            )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    return out
