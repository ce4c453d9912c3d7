from __future__ import annotations

import torch

from monteclora.training.validation import _Kept


def test_what_validation_keeps_is_moved_in_few_pieces(monkeypatch) -> None:
    monkeypatch.setattr("monteclora.training.validation._MOST_NUMBERS", 10)
    kept, batches = _Kept(), [torch.rand(size, 2) for size in (3, 2, 1, 4)]
    moved = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: moved.append(len(self)) or self)
    for batch in batches:
        kept.add(batch)
    found = kept.finish()
    assert moved == [5, 5]
    assert all((each == batch.double().numpy()).all() for each, batch in zip(found, batches, strict=True))
    assert _Kept().finish() == []
