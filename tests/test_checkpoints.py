"""A checkpoint is what was written, or none; the one before it is still there."""

import errno
import json
import resource
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.results import checkpoints
from experiments.results.checkpoints import Checkpoints, spans
from experiments.results.folder import sealed
from fedlora_jax.rounds import Run

ABOUT = {"run": "abc", "method": "fedit", "seeds": (0, 1)}


@pytest.fixture
def store(tmp_path):
    made = Checkpoints(tmp_path / "0-2", ABOUT)
    for rounds in (2, 4, 6):
        made.save(rounds, {"x": jnp.full(4000, rounds), "key": jnp.arange(3)}, {"seconds_per_round": rounds})
    return made


@pytest.fixture
def path(store, tmp_path):
    return tmp_path / "0-2"


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_the_newest_two_are_kept(store, path):
    assert store.whole() == ([6, 4], [])
    assert sorted(p.name for p in path.iterdir()) == ["4", "6"]
    assert store.notes(4) == {"seconds_per_round": 4}
    back = store.restore(4, {"x": jnp.zeros(4000, int), "key": jnp.zeros(3, int)})
    np.testing.assert_array_equal(back["x"], np.full(4000, 4))


def test_arrays_have_names_and_those_that_had_numbers_are_read(tmp_path, monkeypatch):
    """Without any class of ours, by the names that Python reaches them by."""
    run = Run({"a.b": jnp.arange(3), "a": {"b": jnp.ones(2)}, "none": jnp.zeros((2, 0))}, {}, jax.random.key(7))
    store = Checkpoints(tmp_path / "0-2", ABOUT)
    store.save(2, run)
    held = ocp.StandardCheckpointer().restore(tmp_path / "0-2" / "2")
    assert held.keys() == {".state['a.b']", ".state['a']['b']", ".round"}
    np.testing.assert_array_equal(held[".state['a.b']"], np.arange(3))
    monkeypatch.setattr(checkpoints, "_names", lambda run: [f"{i:04d}" for i in range(4)])
    store.save(3, run)
    manifest = json.loads((tmp_path / "0-2" / "3" / "manifest.json").read_text())
    manifest = {key: x for key, x in manifest.items() if key not in ("named", "sum")}
    (tmp_path / "0-2" / "3" / "manifest.json").write_text(json.dumps(sealed(manifest)))
    monkeypatch.undo()
    like = jax.tree.map(jnp.zeros_like, run._replace(round=jax.random.key(0)))
    for rounds in (2, 3):
        assert store.whole() == ([3, 2], [])
        jax.tree.map(np.testing.assert_array_equal, *map(_plain, (store.restore(rounds, like), run)))


def _plain(run):
    return run._replace(round=jax.random.key_data(run.round))


def test_one_flipped_byte_in_any_file_is_noticed(store, path):
    for file in files(path / "6"):
        content = file.read_bytes()
        for at in {0, len(content) // 2, len(content) - 1} if content else ():
            file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            found, wrong = store.whole()
            assert found == [4], file
            assert len(wrong) == 1
            assert f"{path}/6 is " in wrong[0]
        file.write_bytes(content)
    assert store.whole() == ([6, 4], [])


def test_truncated_emptied_missing_and_added_files_are_noticed(store, path):
    for file in files(path / "6"):
        content = file.read_bytes()
        for damage in (
            lambda f: f.write_bytes(f.read_bytes()[:-1]),
            lambda f: f.write_bytes(b""),
            lambda f: f.unlink(),
        ):
            damage(file)
            assert store.whole()[0] == ([6, 4] if file.exists() and file.read_bytes() == content else [4]), file
            file.write_bytes(content)
    (path / "6" / "d" / "more").write_bytes(b"")
    assert store.whole()[0] == [4]


FOREIGN = {
    "emptied": lambda path: [shutil.rmtree(path / "6"), (path / "6").mkdir()],
    "misnumbered": lambda path: (path / "6").rename(path / "8"),
    "another's number": lambda path: [shutil.rmtree(path / "6"), shutil.copytree(path / "4", path / "6")],
    "a file": lambda path: [shutil.rmtree(path / "6"), (path / "6").write_text("thesis")],
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_is_no_checkpoint_of_its_number_is_passed_over_and_goes_with_the_next(case, store, path):
    FOREIGN[case](path)
    found, wrong = store.whole()
    assert (found, len(wrong)) == ([4], 1)
    store.keep(found)
    store.save(6, {"x": jnp.ones(3)})
    assert store.whole() == ([6, 4], [])


@pytest.mark.parametrize("key", ABOUT)
def test_a_checkpoint_of_another_run_is_none(key, store, path):
    found, wrong = Checkpoints(path, ABOUT | {key: "other"}).whole()
    assert found == []
    assert all("is of another run" in text for text in wrong)


def test_seeds_that_began_together_are_computed_together(tmp_path):
    assert spans(tmp_path / "nowhere", 5) == [(0, 5)]
    for name in ("0-3", "5-6", "tmp", "2-4", "7-9"):
        (tmp_path / name).mkdir()
    assert spans(tmp_path, 8) == [(0, 3), (3, 5), (5, 6), (6, 8)]


def test_a_full_disk_is_one_error_of_the_system_and_the_checkpoint_before_stays(tmp_path, capfd):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        store = Checkpoints(tmp_path / "0-1", ABOUT)
        store.save(2, {"x": jnp.arange(10.0)})
        noise = np.random.default_rng(0).normal(size=100_000)
        with pytest.raises(OSError, match="No space left") as failed:
            store.save(4, {"x": noise})
        assert failed.value.errno == errno.ENOSPC
        assert failed.value.filename == str(tmp_path / "0-1" / "4")
        assert store.whole()[0] == [2]
        store.save(4, {"x": jnp.arange(10.0)})
        assert store.whole() == ([4, 2], [])
        assert capfd.readouterr() == ("", "")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_where_one_array_is_refused_those_that_are_still_written_say_nothing(tmp_path, monkeypatch):
    """Sixty arrays, and a limit on the length of files: threads of the others end after the error has come."""
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: heard.append(str(unraisable.exc_value)))
    noise = np.random.default_rng(0).normal(size=(60, 2000)).astype(np.float32)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        for rounds in (1, 2, 3):
            with pytest.raises(OSError, match="File too large"):
                Checkpoints(tmp_path, ABOUT).save(rounds, dict(enumerate(noise)))
        time.sleep(0.5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not heard
    sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError("another")))
    assert heard == ["another"]
