"""In processes of their own: an import happens once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from pbe_fast import torchvision_compat
from pbe_fast.errors import InputError
{body}
"""


def run(body: str) -> str:
    program = PROGRAM.format(body=body)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_real_torchvision_works_whatever_its_wheel() -> None:
    body = """
tv = torchvision_compat.import_torchvision()
import torch, torchvision, torchvision.datasets, torchvision.transforms.v2
assert torchvision_compat.import_torchvision() is tv is torchvision
model = tv.models.get_model("resnet18", weights=None, num_classes=3).eval()
print(tuple(model(torch.rand(1, 3, 32, 32)).shape))
"""
    assert run(body) == "(1, 3)"


def test_other_installs_are_left_alone(tmp_path: Path) -> None:
    sources = {
        "good": "answer = 42",
        "broken": "raise RuntimeError('something else')",
        "lacking": "raise ModuleNotFoundError('no PIL', name='PIL')",
    }
    for name, source in sources.items():
        (tmp_path / name / "torchvision").mkdir(parents=True)
        (tmp_path / name / "torchvision" / "__init__.py").write_text(source)
    body = f"""
import torch
root = {str(tmp_path)!r}
def attempt(name):
    sys.modules.pop("torchvision", None)
    sys.path.insert(0, root + "/" + name)
    try:
        print(name, torchvision_compat.import_torchvision().answer)
    except Exception as error:
        print(name, type(error).__name__, error)
    assert not torchvision_compat._kept and not hasattr(torch.ops.torchvision, "nms")
for name in {list(sources)}:
    attempt(name)
sys.modules["torchvision"] = None
try:
    torchvision_compat.import_torchvision()
except InputError as error:
    print(error)
"""
    assert run(body).splitlines() == [
        "good 42",
        "broken RuntimeError something else",
        "lacking ModuleNotFoundError no PIL",
        "this needs torchvision; got no such package; accepted: pip install torchvision",
    ]
