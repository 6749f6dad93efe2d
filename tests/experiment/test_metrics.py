import json
import math
import os

import numpy as np
import pytest
import torch

from kernelab._core.errors import KernelabError
from kernelab.experiment.metrics import LineFile, Metrics, encode


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def test_numbers_of_every_kind_come_back(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl", LineFile(tmp_path / "m.jsonl", 0), 0)
    values = {
        "a": 0.1,
        "b": torch.tensor(0.5),
        "c": np.float32(2),
        "d": 3,
        "e": True,
        "f": -math.inf,
        "g": torch.tensor(math.nan),
    }
    metrics.append("fit", 7, values)
    line = (tmp_path / "m.jsonl").read_text()
    json.loads(line, parse_constant=refuse)
    metrics.rewind(len(line))
    (record,) = metrics.records
    assert math.isnan(record.pop("g"))
    assert record == {"phase": "fit", "step": 7, "a": 0.1, "b": 0.5, "c": 2.0, "d": 3, "e": True, "f": -math.inf}


def test_what_is_logged_again_before_the_committed_point_is_not_written_twice(tmp_path):
    path = tmp_path / "m.jsonl"
    lines = [encode("fit", step, {"loss": step / 3}) for step in range(4)]
    path.write_bytes(b"".join(lines) + b'{"torn')
    committed = sum(map(len, lines[:3]))
    metrics = Metrics(path, LineFile(path, committed), committed)
    metrics.rewind(len(lines[0]))
    for step in range(1, 5):
        metrics.append("fit", step, {"loss": step / 3})
    assert path.read_bytes() == b"".join([*lines, encode("fit", 4, {"loss": 4 / 3})])
    assert [record["step"] for record in metrics.records] == list(range(5))


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"step": 1}, ValueError),
        ({"x": torch.zeros(2)}, TypeError),
        ({"x": [1]}, TypeError),
        ({"x": object()}, TypeError),
    ],
)
def test_bad_metrics_name_themselves_and_write_nothing(tmp_path, values, error):
    path = tmp_path / "m.jsonl"
    metrics = Metrics(path, LineFile(path, 0), 0)
    with pytest.raises(error, match=f"'{next(iter(values))}'"):
        metrics.append("fit", 0, {"fine": 1, **values})
    assert path.read_bytes() == b""
    assert metrics.offset == 0


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    file = LineFile(tmp_path / "m.jsonl")
    file.append(b"whole\n")
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    with pytest.raises(KernelabError, match="disk is full"):
        file.append(b"torn line\n")
    assert (tmp_path / "m.jsonl").read_bytes() == b"whole\n"


def test_opening_cuts_off_a_torn_line_and_notices_a_shortened_file(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"whole\ntorn")
    LineFile(path)
    assert path.read_bytes() == b"whole\n"
    with pytest.raises(KernelabError, match="shorter"):
        LineFile(path, keep=100)
