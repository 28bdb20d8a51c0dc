"""Sets that lack some classes: numbered as the model's were, by the names that its config.json holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from command_line import run
from PIL import Image

from pbe_fast.data import ImageSet, as_image_set, save_npz
from pbe_fast.models import load_model
from pbe_fast.runs import Source, shared_names

NAMES = tuple(f"c{k}" for k in range(10))


def accuracy(*args: object) -> float:
    result = run("evaluate", *args, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    return float(json.loads(result.stdout)["infected"]["acc"])


def write_tree(root: Path, data: ImageSet, classes: Iterable[int], names: tuple[str, ...] = NAMES) -> Path:
    for k in classes:
        (root / names[k]).mkdir(parents=True)
        for i in (data.labels == k).nonzero()[:, 0].tolist():
            Image.fromarray(data.images[i, 0].numpy()).save(root / names[k] / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained on c0 ... c9, and trees of all classes, of the upper half, and of other ones."""
    root = tmp_path_factory.mktemp("names")
    train, test = as_image_set("digits:train"), as_image_set("digits:test")
    write_tree(root / "train", train.select(range(600)), range(10))
    write_tree(root / "all", test, range(10))
    write_tree(root / "half", test, range(5, 10))
    write_tree(root / "other", test, range(5), tuple("vwxyz"))
    arch = ("--arch", "small_cnn", "--width", 8, "--epochs", 6, "--lr", 0.05, "--batch-size", 32, "--precision", "fp32")
    result = run("attack", "--data", root / "train", "--test", root / "half", *arch, "--out", root / "infected")
    assert result.exit_code == 0, result.output
    return root


def test_a_model_says_what_its_logits_stand_for(place: Path) -> None:
    assert load_model(place / "infected")[1].class_names == NAMES
    assert as_image_set(place / "infected" / "test.npz").class_names == NAMES


def test_a_set_that_lacks_classes_is_numbered_by_the_model(place: Path) -> None:
    # Of the images of the whole set whose class is in the half, the same must be right.
    half = as_image_set(place / "half", class_names=NAMES)
    save_npz(half, place / "half.npz")
    model, wanted = ("--model", place / "infected"), accuracy("--model", place / "infected", "--test", place / "all")
    found = accuracy(*model, "--test", place / "half")
    assert found == accuracy(*model, "--test", place / "half.npz")
    assert wanted > 0.5 and found > 0.5


def test_other_names_are_refused(place: Path) -> None:
    result = run("evaluate", "--model", place / "infected", "--test", place / "other")
    assert result.exit_code == 2
    assert "not among the class names; got v, w, x, y, z; accepted: c0, c1, c2" in result.stderr
    other = as_image_set(place / "other")
    save_npz(other, place / "other.npz")
    result = run("scan", "--model", place / "infected", "--data", place / "other.npz")
    assert result.exit_code == 2
    assert "got 'v' as class 0; accepted: the model's or the training set's, in their order: c0, c1" in result.stderr


def test_purify_numbers_all_sets_alike(place: Path, tmp_path: Path) -> None:
    # A model that knows no names, as those saved before they were written: the training set's hold.
    nameless = tmp_path / "nameless"
    shutil.copytree(place / "infected", nameless, ignore=shutil.ignore_patterns("*.npz"))
    config = json.loads((nameless / "config.json").read_text())
    del config["model"]["class_names"]
    (nameless / "config.json").write_text(json.dumps(config))
    few = ("--adversarial-steps", 1, "--clean-steps", 1, "--clean-epochs", 0, "--steps", 1, "--precision", "fp32")
    sets = ("--train", place / "train", "--clean", place / "half", "--test", place / "half")
    result = run("purify", "--model", nameless, *sets, *few, "--out", tmp_path / "out", "--json", "--quiet")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["infected"]["acc"] == accuracy("--model", place / "infected", "--test", place / "half")
    assert load_model(tmp_path / "out")[1].class_names == NAMES


def test_a_file_that_lacks_classes_is_numbered_by_their_names(tmp_path: Path) -> None:
    save_npz(ImageSet(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.arange(2), ("c3", "c5")), tmp_path / "two.npz")
    data = Source.read(tmp_path / "two.npz", class_names=NAMES).data
    assert (data.labels.tolist(), data.class_names) == ([3, 5], NAMES)


def test_numbers_are_no_names(tmp_path: Path) -> None:
    images = torch.zeros(6, 1, 4, 4, dtype=torch.uint8)
    numbered = ImageSet(images, torch.arange(6) % 3)
    save_npz(numbered, tmp_path / "numbered.npz")
    save_npz(ImageSet(images, torch.arange(6) % 3, ("ape", "bee", "cow")), tmp_path / "named.npz")
    ten = tuple(str(k) for k in range(10))
    # A file without names, before a model with and without them.
    assert Source.read(tmp_path / "numbered.npz", class_names=NAMES).data.class_names == NAMES
    assert Source.read(tmp_path / "numbered.npz", class_names=ten).data.class_names == ten
    # Names before a model that knows none: as they are.
    assert Source.read(tmp_path / "named.npz", class_names=ten).data.class_names == ("ape", "bee", "cow")
    tree = write_tree(tmp_path / "tree", numbered, range(2), ("ape", "bee", "cow"))
    assert Source.read(tree, class_names=ten).data.class_names == ("ape", "bee")
    # Folders that are called by numbers are.
    upper = write_tree(tmp_path / "upper", ImageSet(images, torch.arange(6) + 4), range(7, 10), ten)
    assert sorted(set(Source.read(upper, class_names=ten).data.labels.tolist())) == [7, 8, 9]


def test_two_models_must_agree(place: Path) -> None:
    spec = load_model(place / "infected")[1]
    other = type(spec)("small_cnn", 10, 1, class_names=NAMES[::-1])
    assert shared_names({Path("a"): type(spec)("small_cnn", 10, 1), Path("b"): spec}) == NAMES
    with pytest.raises(Exception, match=r"class names of b; got c9, c8.*; accepted: c0, .*, as a has"):
        shared_names({Path("a"): spec, Path("b"): other})
