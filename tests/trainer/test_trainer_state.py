import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from towers.checkpoint import EpochFigures
from towers.errors import CorruptArtefactError, InvalidInputError
from trainer import state

STATE = state.RunState(
    progress=state.Progress(
        epoch=3,
        step=2,
        loss_sum=1.5,
        best_epoch=1,
        best_metric=0.25,
        epochs=(EpochFigures(2.5, 0.1, 0.01, 0.1, 0.25), EpochFigures(1.5, 0.1, 0.01, 0.09, None)),
        published={"/store": 4},
    ),
    origin={"config": {"training": {"seed": 1}}, "file": {"items": "abc"}},
    parameters={"a.weight": torch.arange(6.0).reshape(2, 3)},
    best_parameters={"a.weight": torch.ones(2, 3)},
    moments={"a.weight": {"step": torch.tensor(7.0), "exp_avg": torch.zeros(2, 3), "exp_avg_sq": torch.ones(2, 3)}},
    sources={"gaps": torch.arange(3.0)},
)


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "run" / state.STATE_FILE
    state.save_state(path, STATE)
    loaded = state.load_state(path)
    assert loaded.progress == STATE.progress
    assert loaded.origin == STATE.origin
    for found, expected in (
        (loaded.parameters, STATE.parameters),
        (loaded.sources, STATE.sources),
        (loaded.best_parameters, STATE.best_parameters),
        (loaded.moments["a.weight"], STATE.moments["a.weight"]),
    ):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [entry.name for entry in path.parent.iterdir()] == [state.STATE_FILE]


def test_a_state_from_before_epochs_were_kept_can_be_resumed(tmp_path: Path) -> None:
    path = tmp_path / state.STATE_FILE
    state.save_state(path, STATE)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    progress = json.loads(metadata["progress"])
    del progress["epochs"]
    save_file(tensors, path, metadata | {"progress": json.dumps(progress)})
    assert state.load_state(path).progress == dataclasses.replace(STATE.progress, epochs=())


def test_a_loaded_state_survives_the_next_save(tmp_path: Path) -> None:
    """Nor does a change of its tensors reach the file."""
    path = tmp_path / state.STATE_FILE
    state.save_state(path, STATE)
    loaded = state.load_state(path)
    state.save_state(path, dataclasses.replace(STATE, parameters={"a.weight": torch.zeros(2, 3)}))
    assert torch.equal(loaded.parameters["a.weight"], STATE.parameters["a.weight"])
    loaded.parameters["a.weight"].add_(1.0)
    assert not state.load_state(path).parameters["a.weight"].any()


def test_a_failed_save_leaves_the_old_state_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / state.STATE_FILE
    state.save_state(path, STATE)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state.os, "fsync", full)
    with pytest.raises(InvalidInputError, match="cannot be written \\(No space left on device\\); free space"):
        state.save_state(path, dataclasses.replace(STATE, parameters={}))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [state.STATE_FILE]


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="there is no run to resume; train without --resume"):
        state.load_state(tmp_path / state.STATE_FILE)


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, 0.999])
def test_a_truncated_state_is_refused(tmp_path: Path, kept: float) -> None:
    path = tmp_path / state.STATE_FILE
    state.save_state(path, STATE)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept if kept > 1 else kept * len(content))])
    with pytest.raises(CorruptArtefactError, match="not a readable training state"):
        state.load_state(path)


def test_another_origin_is_refused_by_name() -> None:
    path = Path("state")
    state.check_origin(path, STATE.origin, STATE.origin)
    now = {"config": {"training": {"seed": 2}, "model": {"dim": 3}}, "file": {"items": "abc"}}
    with pytest.raises(InvalidInputError, match=r"another config\.model\.dim, config\.training\.seed; restore it"):
        state.check_origin(path, STATE.origin, now)
    with pytest.raises(InvalidInputError, match=r"another file\.items"):
        state.check_origin(path, STATE.origin, {**STATE.origin, "file": {"items": "abd"}})


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    match = "another training is running there"
    with state.alone_in(tmp_path), pytest.raises(InvalidInputError, match=match), state.alone_in(tmp_path):
        pass
    with state.alone_in(tmp_path):
        pass
