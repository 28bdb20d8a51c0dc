from __future__ import annotations

import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

import pbe_fast

ROOT = Path(__file__).parent.parent


def test_one_version_everywhere() -> None:
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited is not None
    assert metadata.version("pbe_fast") == pbe_fast.__version__ == cited[1]


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(pbe_fast.__file__).parent / "py.typed").is_file()


def test_the_two_builds_of_onnxruntime_are_in_different_extras() -> None:
    requirements = metadata.requires("pbe_fast") or []
    extras = {}
    for line in requirements:
        if match := re.match(r"(onnxruntime[a-z-]*).*extra == ['\"](\w+)['\"]", line):
            extras[match[1]] = match[2]
    assert extras == {"onnxruntime": "cpu", "onnxruntime-gpu": "gpu"}
    assert not [line for line in requirements if line.startswith("onnxruntime") and "extra" not in line]


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="not a git checkout")
def test_no_source_file_is_ignored_by_git() -> None:
    # An ignored source is missing from commits, and from wheels as well, since the build honours .gitignore.
    sources = [str(path) for folder in ("pbe_fast", "kernels", "tests") for path in (ROOT / folder).rglob("*.py")]
    ignored = subprocess.run(
        ["git", "-C", str(ROOT), "check-ignore", "--stdin"],
        input="\n".join(sources),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ignored.stdout == ""
    assert ignored.returncode == 1, ignored.stderr  # 1: none is ignored
