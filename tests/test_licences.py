"""What is installed to serve and to train: its licences let an Apache-2.0 project be used with it."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement

# Permissive ones, and those that ask only that changes to the package itself be shared (MPL, LGPL; used as they are).
ALLOWED = re.compile(
    r"apache|\bmit\b|\b0?bsd|\bisc\b|python software foundation|\bpsf|zlib|unlicense|cc0|mpl|mozilla|hpnd"
    r"|historical permission|boost|lgpl",
    re.IGNORECASE,
)
# What their metadata only hints at, read in their repositories.
READ = {"apsw": "any that the OSI approves", "umap-learn": "BSD-3-Clause"}
NVIDIA = re.compile("nvidia|cuda|triton")  # comes with torch's CUDA build, under NVIDIA's own terms


def closure(extras: set[str]) -> set[str]:
    """Every distribution that an installation of the project with these extras brings."""
    found: set[str] = set()
    waiting: list[tuple[str, frozenset[str]]] = [("semblance", frozenset(extras))]
    seen = set()
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            requirements = distribution(name).requires or []
        except PackageNotFoundError:  # for another system
            continue
        found.add(name)
        for line in requirements:
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*wanted, "")):
                waiting.append((requirement.name.lower().replace("_", "-"), frozenset(requirement.extras)))
    return found - {"semblance"}


def licence(name: str) -> str:
    data = distribution(name).metadata
    classified = [
        line.rpartition(":: ")[2] for line in data.get_all("Classifier") or [] if line.startswith("License ::")
    ]
    written = (data.get("License") or "").partition("\n")[0]
    return data.get("License-Expression") or "; ".join(classified) or written


def test_licences_are_compatible() -> None:
    names = closure({"analysis", "cpu", "milvus", "openvino", "postgres", "tracing", "train"})
    assert len(names) > 60
    wrong = {}
    for name in sorted(names):
        if name in READ or NVIDIA.search(name):
            continue
        if not ALLOWED.search(licence(name)):
            wrong[name] = licence(name)
    assert not wrong
