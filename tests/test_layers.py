"""Imports point to lower layers only, and importing the package starts nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pbe_fast

ROOT = Path(pbe_fast.__file__).parent

# A module may import what stands in a line above its own, and its own package.
LAYERS = (
    ("errors",),
    ("kernels", "options"),
    ("config",),
    ("engine", "torchvision_compat", "baselines"),
    ("data", "models", "smoothness", "triggers"),
    ("attack_batch", "calibration", "poison", "pgd", "waves", "metrics"),
    ("attacker",),
    ("attraction", "finetune", "forgetting", "leading_waves", "mirroring", "ranking", "steadiness"),
    ("extra_set", "input_aware", "result"),
    ("steps",),
    ("rounds",),
    ("purify", "attack", "defenses"),
    ("export", "report"),
    ("runs", "scan_result"),
    ("scan",),
    ("reproduce",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}


def _imports(path: Path) -> set[str]:
    """The parts of pbe_fast that a file imports, wherever in it the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "pbe_fast" else {module}
    return {name.split(".")[1] for name in names if name.startswith("pbe_fast.")}


def _part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _sources() -> list[Path]:
    # In a source tree kernels/ is a link, which rglob does not follow by itself.
    found = {*ROOT.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")}
    return sorted(found - {ROOT / "__init__.py"})


def test_every_import_points_to_a_lower_layer() -> None:
    wrong = []
    for path in _sources():
        part = _part(path)
        assert part in LAYER, f"{part} has no layer yet: give it one in LAYERS"
        for target in _imports(path) - {part, "__version__"}:
            if LAYER.get(target, -1) >= LAYER[part]:
                wrong.append(f"{path.relative_to(ROOT)} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_every_part_that_has_a_layer_is_there() -> None:
    assert LAYER.keys() == {_part(path) for path in _sources()}


def test_the_map_for_contributors_has_every_part() -> None:
    page = Path(__file__).parents[1] / "CONTRIBUTING.md"
    missing = [name for name in LAYER if not any(f"{name}{end}`" in page.read_text("utf-8") for end in ("/", ".py"))]
    assert not missing


def test_kernels_know_nothing_of_the_package() -> None:
    used = {target for path in _sources() if _part(path) == "kernels" for target in _imports(path)}
    assert used == {"kernels"}


def test_what_the_documentation_uses_is_there_and_loads_nothing_before() -> None:
    code = (
        "import sys, pbe_fast\n"
        "heavy = {'torch', 'numpy'} & sys.modules.keys()\n"
        "print(sorted(heavy), pbe_fast.defenses.nad.method, pbe_fast.PGDConfig(eps=0.5).eps)\n"
        "print(callable(pbe_fast.runs.load_trigger), callable(pbe_fast.purify), callable(pbe_fast.scan))\n"
        "print(sorted(set(pbe_fast.__all__) - set(dir(pbe_fast))), {'defenses', 'runs'} <= set(dir(pbe_fast)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["[] nad 0.5", "True True True", "[] True"]
    assert len(pbe_fast.__all__) <= 14


@pytest.mark.parametrize("name", ["config", "errors", "models", "data", "baselines", "scan_result"])
def test_a_submodule_is_there_without_an_import_of_its_own(name: str) -> None:
    code = f"import pbe_fast; print(pbe_fast.{name}.__name__, pbe_fast.{name} is __import__('pbe_fast.{name}').{name})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == f"pbe_fast.{name} True\n"


@pytest.mark.parametrize("name", ["nothing", "_private", "__main__", "__wrapped__"])
def test_what_is_no_submodule_is_no_attribute(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'pbe_fast' has no attribute '{name}'"):
        getattr(pbe_fast, name)


def test_importing_the_package_loads_no_triton_and_touches_no_cuda() -> None:
    code = (
        "import sys, pbe_fast, torch\n"
        "import pbe_fast.kernels.pgd_step, pbe_fast.kernels.warp, pbe_fast.kernels.cosine_rank\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] == 'triton'), torch.cuda.is_initialized())\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] False"
