"""A checkpoint is whole or not there, whatever kills the process and whatever happens to the files."""

import logging
import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest
import torch

from kernelab.experiment.checkpoint import Checkpoints


def content(step):
    generator = torch.Generator().manual_seed(step)
    return {"weights": torch.randn(50_000, generator=generator), "step": step, "moments": {0: (step, None)}}


def assert_holds(checkpoint, step):
    loaded, expected = checkpoint.load(), content(step)
    assert torch.equal(loaded["weights"], expected["weights"])
    assert (checkpoint.step, loaded["step"], loaded["moments"]) == (step, step, {0: (step, None)})


def save_for_ever(folder, first, started):
    checkpoints = Checkpoints(folder)
    checkpoints.clean()
    for step in range(first, 10**6):
        checkpoints.save("train", step, content(step), {"position": step})
        started.set()


def test_kill_9_at_random_moments_loses_nothing(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.experiment.test_checkpoint"])
    moment = random.Random(0)
    last = 0
    for _ in range(12):
        started = context.Event()
        process = context.Process(target=save_for_ever, args=(tmp_path, last + 1, started))
        process.start()
        assert started.wait(60)
        time.sleep(moment.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        newest = Checkpoints(tmp_path).newest("train")
        assert newest.step > last
        assert newest.info == {"position": newest.step}
        assert_holds(newest, newest.step)
        last = newest.step
    assert len([folder for folder in tmp_path.iterdir() if not folder.name.startswith(".")]) <= 3


def damage(folder, how):
    tensors = folder / "tensors.safetensors"
    data = bytearray(tensors.read_bytes())
    if how == "truncated":
        tensors.write_bytes(data[:-1])
    elif how == "flipped bit":
        data[len(data) // 2] ^= 1
        tensors.write_bytes(data)
    elif how == "nothing":
        for file in folder.iterdir():
            file.unlink()
    elif how == "marker without content":
        (folder / "complete.json").write_text("")
    else:
        (folder / how).unlink()


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "flipped bit",
        "nothing",
        "marker without content",
        "complete.json",
        "state.json",
        "tensors.safetensors",
    ],
)
def test_a_torn_checkpoint_is_skipped_with_one_line(tmp_path, caplog, how):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save("train", step, content(step))
    damage(tmp_path / "train-00000002", how)
    with caplog.at_level(logging.WARNING, "kernelab"):
        newest = checkpoints.newest("train")
    assert_holds(newest, 1)
    assert len(caplog.records) == 1
    assert "train-00000002" in caplog.text
    checkpoints.save("train", 2, content(2))  # the same step is done again
    assert_holds(checkpoints.newest("train"), 2)


def test_the_last_of_each_phase_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for phase in ("sft", "ppo"):
        for step in (1, 2, 30):
            checkpoints.save(phase, step, {})
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["ppo-00000002", "ppo-00000030", "sft-00000030"]
    assert {(found.phase, found.step) for found in checkpoints.all()} == {("ppo", 30), ("sft", 30)}
    shutil.copytree(tmp_path / "ppo-00000030", tmp_path / "ppo-copy")
    checkpoints.save("ppo", 5, {})  # the run went back: what lay ahead is another future
    assert checkpoints.newest("ppo").step == 5


def test_what_cannot_be_saved_leaves_everything_as_it_was(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save("train", 1, content(1))
    with pytest.raises(TypeError, match="model"):
        checkpoints.save("train", 2, {"model": object()})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoints.save("train", 2, content(2))
    assert [folder.name for folder in tmp_path.iterdir()] == ["train-00000001"]
    assert_holds(checkpoints.newest("train"), 1)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="keep"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="phase"):
        Checkpoints(tmp_path).save("../up", 1, {})
