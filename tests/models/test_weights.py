"""Weights files: tensors, and nothing that runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from underpaint import load_weights
from underpaint.errors import DataError


class Payload:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("beside", [False, True])
def test_a_payload_does_not_run(beside: bool, tmp_path: Path) -> None:
    payload = Payload(tmp_path / "run")
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": {"a": torch.ones(1)}, "extra": payload} if beside else payload, path)
    with pytest.raises(DataError, match=r"weights\.pt' is damaged, or holds objects beside tensors.*safetensors\.$"):
        load_weights(str(path))
    assert not payload.folder.exists()
    torch.load(path, weights_only=False)
    assert payload.folder.exists()


def test_other_damage_is_one_sentence(tmp_path: Path) -> None:
    for name, data in (("a.pt", b""), ("b.pt", b"PK\x03\x04 and no more"), ("c.safetensors", b"\x08")):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"{name}' is damaged") as caught:
            load_weights(f"file:{path}")
        assert "weights_only" not in str(caught.value)
    with pytest.raises(DataError, match=r"There is no weights file '.*d.pt'; check the path.$"):
        load_weights(str(tmp_path / "d.pt"))
    with pytest.raises(DataError, match="is a folder; name the weights file in it"):
        load_weights(f"file:{tmp_path}")
