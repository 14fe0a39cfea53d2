"""The floors of the package, read off the imports by plain `ast`.

A module imports only from lower floors, families on one floor do not import each other, and the lower
left (what the accountants and the command line start with) knows neither torch nor transformers.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_dp

ROOT = Path(hf_dp.__file__).parent
LONGEST = 350

FLOORS = {
    "_version": 0,
    "cache_folder": 0,
    "errors": 0,
    "_validate": 0.5,  # words its messages with errors
    "scale_law": 1,
    "events": 1.5,  # an event of mixed noise knows the law of its scale
    "coins": 1,
    "sums": 1,
    "accounting": 2,
    "ledger": 2,
    "sampling": 2,
    "clipping": 2,
    "noise": 2,
    "layers": 2,
    "plan": 3,
    "engines": 3,
    "reports": 4,
    "audit": 4,
    "testing": 4,
    "training": 5,
    "demo": 5.5,  # uses training as a person would
    "cli": 6,
    "__main__": 7,
}
WITHOUT_TORCH = {"_version", "errors", "_validate", "scale_law", "events", "accounting", "ledger"}
KNOW_THE_HOST = {"training", "demo"}
HOST = {"transformers", "datasets", "accelerate", "peft", "evaluate"}
VAGUE = {"utils", "util", "common", "misc", "helpers"}


def imported(source: str) -> Iterator[str]:
    """Dotted names of everything that is imported anywhere in the source, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            if start == "hf_dp":
                yield from (f"hf_dp.{alias.name}" for alias in node.names)
            else:
                yield start


def floor_faults(family: str, source: str) -> list[str]:
    """What in the source of a module of `family` breaks the floors."""
    return [fault for name in imported(source) if (fault := floor_fault(family, name))]


def floor_fault(family: str, name: str) -> str:
    """Why a module of `family` may not import `name`; empty if it may."""
    package, _, rest = name.partition(".")
    if not package:
        return f"{family}: relative import {name}"
    if package in HOST and family not in KNOW_THE_HOST:
        return f"{family}: only {sorted(KNOW_THE_HOST)} may import {package}"
    if package == "torch" and family in WITHOUT_TORCH:
        return f"{family}: must start without torch"
    if package != "hf_dp":
        return ""
    other = rest.partition(".")[0]
    if other not in FLOORS:
        return f"{family}: {name} is on no floor"
    if other == family:
        return ""
    if FLOORS[other] >= FLOORS[family]:
        return f"{family}: {name} is not below it"
    if family in WITHOUT_TORCH and other not in WITHOUT_TORCH:
        return f"{family}: {name} may import torch"
    return ""


def family_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    found = sorted(ROOT.rglob("*.py"))
    assert len(found) > 40
    return [path for path in found if path != ROOT / "__init__.py"]


def test_modules_import_only_from_lower_floors() -> None:
    faults = [
        fault
        for path in modules()
        for fault in floor_faults(family_of(path), path.read_text("utf-8"))
    ]
    assert faults == []


def test_every_module_is_on_a_floor() -> None:
    assert {family_of(path) for path in modules()} <= FLOORS.keys()


@pytest.mark.parametrize(
    ("family", "source", "fault"),
    [
        ("accounting", "import torch", "must start without torch"),
        ("ledger", "def f():\n    from torch import Tensor", "must start without torch"),
        ("accounting", "from hf_dp.sums import ClippedSum", "may import torch"),
        ("ledger", "from hf_dp.coins import Coins", "may import torch"),
        ("accounting", "from hf_dp.ledger import Ledger", "is not below it"),
        ("clipping", "from hf_dp.noise.base import NoiseMechanism", "is not below it"),
        ("sampling", "import hf_dp.plan", "is not below it"),
        ("engines", "from hf_dp.plan import PrivacyPlan", "is not below it"),
        ("events", "from hf_dp.accounting.base import Guarantee", "is not below it"),
        ("reports", "from hf_dp.training.arguments import DPArguments", "is not below it"),
        ("training", "from hf_dp.demo import data", "is not below it"),
        ("training", "from hf_dp import cli", "is not below it"),
        ("demo", "from hf_dp import DPTrainer", "is on no floor"),
        ("layers", "import transformers.pytorch_utils", "may import transformers"),
        ("engines", "from peft import LoraConfig", "may import peft"),
        ("cli", "def f():\n    import transformers", "may import transformers"),
        ("plan", "from . import events", "relative import"),
        ("accounting", "from hf_dp.helpers import f", "is on no floor"),
    ],
)
def test_a_planted_import_is_found(family: str, source: str, fault: str) -> None:
    found = floor_faults(family, source)
    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize(
    ("family", "source"),
    [
        ("accounting", "import math\nfrom hf_dp.events import Gaussian\nimport dp_accounting"),
        ("clipping", "import torch\nfrom hf_dp.sums import ClippedSum"),
        ("clipping", "from hf_dp.clipping.base import ClippingPolicy"),
        ("training", "from transformers import Trainer\nfrom hf_dp.engines import tap"),
        ("cli", "def f():\n    from hf_dp.demo.run import main"),
        ("layers", "import torchvision_like_name"),
    ],
)
def test_a_fair_import_is_left_alone(family: str, source: str) -> None:
    assert floor_faults(family, source) == []


def test_accountants_ledger_and_command_line_start_without_torch() -> None:
    code = (
        "import sys, hf_dp, hf_dp.accounting, hf_dp.ledger, hf_dp.events, hf_dp.cli.main;"
        "print(sorted({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    assert done.stdout.strip() == "[]"


def test_files_are_short() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in modules()
        if (lines := len(path.read_text("utf-8").splitlines())) > LONGEST
    }
    assert long == {}


def vague_names(paths: list[Path]) -> list[Path]:
    return [
        path for path in paths if VAGUE & {part.strip("_") for part in path.with_suffix("").parts}
    ]


def test_names_say_what_is_inside() -> None:
    assert vague_names([path.relative_to(ROOT) for path in modules()]) == []


def test_a_planted_vague_name_is_found() -> None:
    planted = [Path("engines/_utils.py"), Path("common/tensors.py"), Path("layers/linear.py")]
    assert vague_names(planted) == planted[:2]


@pytest.mark.parametrize("name", hf_dp.__all__)
def test_public_name_resolves(name: str) -> None:
    value = getattr(hf_dp, name)
    assert value is getattr(hf_dp, name)
    assert name == "__version__" or value.__name__ == name


def test_public_names_are_the_same_in_all_three_places() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text("utf-8"))
    for_type_checkers = {
        alias.name: node.module
        for block in ast.walk(tree)
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert for_type_checkers == hf_dp._HOME
    assert sorted([*hf_dp._HOME, "__version__"]) == sorted(hf_dp.__all__) == dir(hf_dp)


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'hf_dp' has no attribute 'DPTrianer'"):
        hf_dp.DPTrianer  # noqa: B018


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_module_has_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text("utf-8")))


def test_package_and_distribution_agree_on_the_version() -> None:
    metadata = importlib.import_module("importlib.metadata")
    assert metadata.version("hf_dp") == hf_dp.__version__
