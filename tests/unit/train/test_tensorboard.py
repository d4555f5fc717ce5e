from __future__ import annotations

import sys

import pytest

from amphista.errors import ConfigError
from amphista.train.tensorboard import open_writer, scalars, write_record


def test_records_become_named_numbers():
    record = {"step": 3, "loss": 1.5, "validation": {"tau": {4: 1.25}, "top": [[0.5, 0.75], [0.25]]}, "note": "text"}
    assert dict(scalars(record)) == {
        "step": 3.0,
        "loss": 1.5,
        "validation/tau/4": 1.25,
        "validation/top/1/1": 0.5,
        "validation/top/1/2": 0.75,
        "validation/top/2/1": 0.25,
    }


def test_what_is_written_is_read_and_what_comes_again_is_dropped(tmp_path):
    """A killed run that goes on from step 2 writes step 3 anew: TensorBoard shows it once."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, losses in ((0, {1: 5.0, 2: 4.0, 3: 9.0}), (2, {3: 3.0, 4: 2.0})):
        writer = open_writer(tmp_path, start)
        for step, loss in losses.items():
            write_record(writer, {"step": step, "loss": loss})
        writer.flush()
        writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 5.0), (2, 4.0), (3, 3.0), (4, 2.0)]
    assert events.Tags()["scalars"] == ["loss"]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'amphista\[train\]'"):
        open_writer(tmp_path, 0)
