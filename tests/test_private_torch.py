"""Private torch is reached through ``pocketize._torch`` alone, and each function there works."""

from __future__ import annotations

import torch

from pocketize._torch import storage_key, transforms_active, version_of


def test_a_write_raises_a_tensors_version_and_inference_tensors_have_none() -> None:
    tensor = torch.zeros(2)
    before = version_of(tensor)
    tensor.add_(1)
    assert version_of(tensor) > before
    with torch.inference_mode():
        assert version_of(torch.zeros(2)) == 0


def test_views_share_the_key_of_their_storage_and_other_tensors_have_another() -> None:
    tensor = torch.zeros(4)
    assert storage_key(tensor) == storage_key(tensor[1:]) == storage_key(tensor.untyped_storage())
    assert storage_key(tensor) != storage_key(torch.zeros(4))


def test_function_transforms_are_seen() -> None:
    seen = []
    torch.func.grad(lambda x: (seen.append(transforms_active()), x.sum())[1])(torch.ones(2))
    assert seen == [True]
    assert not transforms_active()
