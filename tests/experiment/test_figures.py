import subprocess
import sys

import pytest

from kernelab.experiment.figures import curves, figure, save

RECORDS = [{"step": step, "loss": 1 / (step + 1)} for step in range(5)] + [{"step": 4, "accuracy": 0.5}]


def test_equal_figures_are_equal_files(tmp_path):
    for name in ("a.png", "b.png"):
        save(curves(RECORDS, ["loss", "accuracy"], title="Toy"), tmp_path / name)
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert data == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_curves_draw_the_records():
    made = curves(RECORDS, ["loss", "accuracy"])
    loss, accuracy = made.axes
    assert loss.lines[0].get_xydata().tolist() == [[step, 1 / (step + 1)] for step in range(5)]
    assert accuracy.lines[0].get_xydata().tolist() == [[4, 0.5]]


def test_a_grid_of_axes():
    made, axes = figure(2, 3)
    assert axes.shape == (2, 3)
    assert len(made.axes) == 6


@pytest.mark.parametrize("names", [["nothing"], []])
def test_missing_metrics_are_named(names):
    with pytest.raises(ValueError, match="names"):
        curves(RECORDS, names)


def test_pyplot_is_never_imported():
    program = "import sys, kernelab.experiment.figures as f; f.figure(); sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
