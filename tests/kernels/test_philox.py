"""Philox by its published words, and words that belong to the image."""

from __future__ import annotations

import pytest
import torch

from pbe_fast.kernels.philox import philox, random_words


# The known answers of the Random123 distribution (Salmon et al., 2011), philox 4x32, 10 rounds.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    result = philox((c0, c1, c2, c3), key[0] | key[1] << 32)
    assert tuple(word.item() for word in result) == words


def test_words_belong_to_seed_stream_and_image_and_not_to_the_batch() -> None:
    ids = torch.tensor([0, 1, 2**32, 2**62, -1])
    words = random_words(ids, 5, 7, 4001)
    assert words.shape == (5, 4001) and words.min() >= 0 and words.max() < 2**32
    for count in (1, 2, 3, 4, 4000):
        assert torch.equal(random_words(ids[[3, 1]], 5, 7, count), words[[3, 1], :count])
    for seed, stream in ((6, 7), (5 + 2**32, 7), (5, 8)):
        assert not torch.equal(random_words(ids, seed, stream, 4001), words)
    # As tensors, which a graph can be given anew for each replay.
    assert torch.equal(random_words(ids, torch.tensor(5), torch.tensor(7), 4001), words)
    high = 2**62 + 11
    assert torch.equal(random_words(ids, torch.tensor(high), 7, 9), random_words(ids, high, 7, 9))
