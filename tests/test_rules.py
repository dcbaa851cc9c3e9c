"""The rules of the house that a tool can keep: imports, names, the size of rooms."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [file for package in ("app", "models", "training") for file in (ROOT / package).rglob("*.py")]
TESTS = list((ROOT / "tests").rglob("test_*.py"))
NAMES = {
    "models.clip": ["CLIPModel", "CLIPImageEncoder", "CLIPTextEncoder"],
    "models.dalle": ["DALLETransformer"],
    "models.dvae": ["DiscreteVAE"],
    "models.generation": ["generate_image"],
    "models.tokenizers": ["ImageTokenizer", "TextTokenizer"],
    "models.retrieval": [
        "zero_shot_classification", "image_text_retrieval", "text_to_image_retrieval", "image_to_text_retrieval",
        "compute_similarity", "rank_results",
    ],
    "models.checkpoint": ["load_checkpoint", "save_checkpoint"],
    "training.methods.clip": ["CLIPLoss", "CLIPDataset", "train_clip", "evaluate_clip"],
    **{
        f"training.methods.{name.lower()}": [
            f"{name}Model", f"{name}Transform", f"{name}Loss", f"{name}Dataset", f"train_{name.lower()}",
            f"evaluate_{name.lower()}",
        ]
        for name in ("SimCLR", "MoCo", "BYOL")
    },
    "training.evaluation": ["extract_features", "linear_evaluation"],
    "training.analysis": ["visualize_features", "analyze_features"],
}  # fmt: skip

_WITHOUT = """
import importlib.abc, pkgutil, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import {package}
for module in pkgutil.walk_packages({package}.__path__, "{package}."):
    if not module.name.endswith("__main__"):
        __import__(module.name)
assert not {blocked!r} & {{name.split(".")[0] for name in sys.modules}}
"""


@pytest.mark.parametrize(
    ("package", "blocked"),
    [
        ("app", {"training", "tensorboard", "pyarrow", "datasets"}),
        ("app", {"faiss", "training"}),
        ("models", {"app", "training", "fastapi", "faiss", "open_clip", "timm", "argparse_nothing"}),
        ("training", {"app", "fastapi", "faiss", "open_clip", "timm", "uvicorn", "apsw"}),
    ],
)
def test_packages_import_without_what_they_do_not_need(package: str, blocked: set[str]) -> None:
    code = _WITHOUT.format(package=package, blocked=blocked)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_a_collection_works_without_faiss(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["faiss"] = None
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "faiss" else real(name, *a)
import numpy as np
from app.collection import NewItem
from app.sqlite_collections import SQLiteCollections
with SQLiteCollections({str(tmp_path)!r}) as collections:
    made = collections.create("c", model="m", fingerprint="f", dimensions=3)
    made.add([NewItem("text", np.array([1, 2, 3], "f4"), "a"), NewItem("text", np.array([3, 2, 1], "f4"), "b")])
    assert [hit.item.id for hit in made.search(np.array([1, 2, 3], "f4"), 5)] == ["a", "b"]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", NAMES)
def test_promised_names_are_importable(module: str) -> None:
    assert all(hasattr(importlib.import_module(module), name) for name in NAMES[module])


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_rooms_stay_small_and_public_things_explain_themselves(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= 460, "asking to be two files"
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not text.strip(), "a module says what it is for"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno <= 75, f"{node.name} is asking to be two functions"
    for node in tree.body:
        public = isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)) and node.name[0] != "_"
        if public:
            assert ast.get_docstring(node), f"{node.name} has no docstring"  # type: ignore[arg-type]


def test_nothing_unpickles_in_the_server() -> None:
    for package in ("app", "models"):
        for file in (ROOT / package).rglob("*.py"):
            text = file.read_text()
            assert "import pickle" not in text
            assert "torch.load(" not in text


def test_no_address_of_a_registry_and_no_private_path_is_committed() -> None:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    texts = [
        ROOT / name for name in listed if name.endswith((".py", ".md", ".toml", ".txt", ".json", "Makefile", "run"))
    ]
    assert texts
    for file in texts:
        if file != Path(__file__) and file.is_file():
            content = file.read_text()
            assert "/work/" not in content, file
            assert "--index-url" not in content, file


def test_every_bad_input_and_fault_has_a_test_by_its_number() -> None:
    """The rows of the table of answers; a name like `test_rows_15_and_16_...` stands for several."""
    sources = "".join(file.read_text() for file in TESTS)
    names = re.findall(r"def test_rows?((?:_[0-9]+)+(?:_and_[0-9]+)?)", sources)
    assert {int(number) for name in names for number in re.findall(r"[0-9]+", name)} == set(range(1, 45))
