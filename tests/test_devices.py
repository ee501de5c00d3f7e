"""Where work is done: the accelerator that PyTorch sees, and where there is float64."""

from __future__ import annotations

import pytest
import torch

from orthomerge.models.loading import exact_device, preferred_device


@pytest.mark.parametrize(
    ("cuda", "mps", "preferred", "exact"),
    [(False, False, "cpu", "cpu"), (False, True, "mps", "cpu"), (True, False, "cuda", "cuda")],
)
def test_float64_is_worked_out_where_there_is_any(monkeypatch, cuda, mps, preferred, exact):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert preferred_device().type == preferred
    assert exact_device().type == exact
    assert exact_device(torch.device("cpu")).type == "cpu"
