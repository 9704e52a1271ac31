"""Files and folders appear whole or not at all, whoever is killed; strangers' JSON is read with care."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from lm_eval_lora_ensemble import disk
from lm_eval_lora_ensemble.disk import parse_json, put_folder, read_json, write_folder, write_json
from lm_eval_lora_ensemble.errors import EnsembleError


def folder(place: Path, text: str) -> Path:
    place.mkdir(parents=True)
    (place / "file").write_text(text)
    return place


def fill(text: str):
    return lambda place: (place / "file").write_text(text)


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def in_child(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code that knows ``disk``, ``Path`` and ``kill``, in a process that it may kill."""
    opening = (
        "import os, signal, sys; from pathlib import Path; from lm_eval_lora_ensemble import disk\n"
        "def kill(*_, **__): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    words = [sys.executable, "-c", opening + code, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


# ------------------------------------------------------------------------------------------------ folders


def test_a_folder_replaces_an_older_one_and_leaves_nothing_else(tmp_path):
    write_folder(tmp_path / "a", None, fill("old"))
    (tmp_path / "a" / "stale").touch()
    write_folder(tmp_path / "a", None, fill("new"))
    assert (tmp_path / "a" / "file").read_text() == "new"
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["file"]


def test_an_error_while_a_folder_is_filled_leaves_the_older_one(tmp_path):
    folder(tmp_path / "a", "old")

    def half(place: Path) -> None:
        (place / "file").write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_folder(tmp_path / "a", None, half)
    assert (tmp_path / "a" / "file").read_text() == "old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("scratch", [None, "scratch"])
def test_what_a_killed_writer_left_goes_with_the_next_write_and_a_living_ones_stays(tmp_path, scratch):
    parent = tmp_path / scratch if scratch else None
    code = "disk.write_folder(Path(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2] else None, kill)"
    assert in_child(code, tmp_path / "a", parent or "").returncode == -signal.SIGKILL
    (half,) = [path for path in (parent or tmp_path).iterdir() if path.name != "a"]
    living = half.with_name(re.sub(r"\d+", str(os.getppid()), half.name))
    folder(living, "another process is writing this")
    others = half.with_name(f"{half.name}x")
    folder(others, "not ours")
    write_folder(tmp_path / "a", parent, fill("new"))
    assert not half.exists()
    assert living.exists() and others.exists()
    assert (tmp_path / "a" / "file").read_text() == "new"


# what a file system does that has no exchange; the kernel of a test machine has one everywhere
NO_EXCHANGE = "disk._exchanged = lambda one, other: False\n"
BETWEEN = """
real, calls = Path.rename, []
def rename(self, target):
    calls.append(self.name)
    kill() if len(calls) == 2 else real(self, target)
Path.rename = rename
"""


def test_what_a_living_writer_is_about_to_rename_stays(tmp_path):
    """Two processes that finish an ensemble together write the same files."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living = tmp_path / f".ensemble.json.{os.getppid()}.tmp"
    others = [tmp_path / f".ensemble.json.{dead.pid}.tmp", tmp_path / f".metrics.jsonl.{os.getpid()}.tmp"]
    kept = [living, tmp_path / ".notes.of-somebody.tmp", tmp_path / "plain.tmp"]
    for path in (*others, *kept):
        path.write_text("half")
    disk.remove_half_written(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_without_an_exchange_a_folder_is_replaced_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_exchanged", lambda one, other: False)
    put_folder(folder(tmp_path / ".scratch", "new"), folder(tmp_path / "a", "old"))
    assert (tmp_path / "a" / "file").read_text() == "new"
    assert names(tmp_path) == ["a"]


def test_without_an_exchange_a_kill_between_the_renames_is_put_right_by_the_next_write(tmp_path):
    folder(tmp_path / "a", "old")
    folder(tmp_path / ".scratch", "new")
    code = NO_EXCHANGE + BETWEEN + "disk.put_folder(Path(sys.argv[1]) / '.scratch', Path(sys.argv[1]) / 'a')"
    assert in_child(code, tmp_path).returncode == -signal.SIGKILL
    assert names(tmp_path) == [".a.replaced", ".scratch"]

    # the next write has the old one back before it writes anything, so that one that fails loses nothing
    def fails(place: Path) -> None:
        assert (tmp_path / "a" / "file").read_text() == "old"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_folder(tmp_path / "a", None, fails)
    assert names(tmp_path) == [".scratch", "a"]
    put_folder(tmp_path / ".scratch", tmp_path / "a")
    assert (tmp_path / "a" / "file").read_text() == "new"
    assert names(tmp_path) == ["a"]


def test_without_an_exchange_a_kill_behind_the_renames_leaves_the_new_one(tmp_path):
    folder(tmp_path / "a", "old")
    code = NO_EXCHANGE + (
        "import shutil; shutil.rmtree = kill\ndisk.put_folder(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    done = in_child(code, folder(tmp_path / ".scratch", "new"), tmp_path / "a")
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a" / "file").read_text() == "new"
    write_folder(tmp_path / "a", None, fill("newer"))
    assert (tmp_path / "a" / "file").read_text() == "newer"
    assert names(tmp_path) == ["a"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux's exchange can be tried here")
def test_an_exchange_never_leaves_a_name_without_a_folder(tmp_path):
    """Every rename would kill the process: the exchange is one system call and no rename of Python's."""
    code = "Path.rename = kill\ndisk.put_folder(Path(sys.argv[1]), Path(sys.argv[2]))"
    done = in_child(code, folder(tmp_path / ".scratch", "new"), folder(tmp_path / "a", "old"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a" / "file").read_text() == "new"
    assert names(tmp_path) == ["a"]


# -------------------------------------------------------------------------------------------------- files


def test_a_kill_while_a_file_is_written_leaves_the_older_one(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"before": True})
    code = "disk.flush = kill\ndisk.write_json(Path(sys.argv[1]), {'after': True})"
    assert in_child(code, file).returncode == -signal.SIGKILL
    assert json.loads(file.read_text()) == {"before": True}
    assert all(name.startswith(".") for name in names(tmp_path) if name != "a.json")


def test_a_file_is_copied_whole_or_not_at_all(tmp_path):
    (tmp_path / "source").write_bytes(b"new" * 1000)
    (tmp_path / "target").write_bytes(b"old")
    code = "disk.flush = kill\ndisk.copy_file(*map(Path, sys.argv[1:]))"
    words = [tmp_path / "source", tmp_path / "target", tmp_path]
    assert in_child(code, *words).returncode == -signal.SIGKILL
    assert (tmp_path / "target").read_bytes() == b"old"
    disk.copy_file(*words)
    assert (tmp_path / "target").read_bytes() == b"new" * 1000


def test_a_full_disk_is_one_line_with_the_place(tmp_path):
    said = rf"cannot write in {re.escape(str(tmp_path))}: No space left"
    with pytest.raises(EnsembleError, match=said), disk.writing(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_checksums_are_those_of_hashlib_and_of_files_only(tmp_path):
    content = os.urandom((1 << 20) + 17)  # longer than one read
    (folder(tmp_path / "a", "text") / "file").write_bytes(content)
    folder(tmp_path / "a" / "inner", "deeper")
    expected = {"a/file": hashlib.sha256(content).hexdigest()}
    assert disk.checksums(tmp_path / "a", relative_to=tmp_path) == expected


# --------------------------------------------------------------------------------------- strangers' JSON


def test_a_sampled_digest_changes_with_what_a_model_is(tmp_path):
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    content = bytearray(np.random.default_rng(0).bytes(9_000_000))
    weights.write_bytes(content)
    config.write_text("{}")
    (tmp_path / "README.md").write_text("one")
    first = disk.sampled_digest(tmp_path)
    (tmp_path / "README.md").write_text("another")
    assert disk.sampled_digest(tmp_path) == first
    config.write_text('{"a": 1}')
    assert disk.sampled_digest(tmp_path) != first
    config.write_text("{}")
    for start in (0, 4_400_000, 8_700_000):  # some layers only
        changed = content.copy()
        changed[start : start + 200_000] = bytes(200_000)
        weights.write_bytes(changed)
        assert disk.sampled_digest(tmp_path) != first
    weights.write_bytes(content + b"!")
    assert disk.sampled_digest(tmp_path) != first


def test_what_cannot_be_written_leaves_no_half_of_it(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        disk.write_text(tmp_path / "taken", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
        (b"[NaN]", "NaN is not a JSON number"),
        (b"[-Infinity]", "-Infinity is not a JSON number"),
        (b"[" * 33 + b"]" * 33, "nested deeper than 32 levels"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested deeper than 32 levels"),
        (b'"\xff"', "utf-8"),
        (b"{", "Expecting property name"),
    ],
    ids=["twice", "nan", "infinity", "deep", "very-deep", "bytes", "cut"],
)
def test_json_that_readers_disagree_on_is_refused_in_one_line(tmp_path, content, reason):
    with pytest.raises(EnsembleError, match=reason) as refused:
        parse_json(content, tmp_path / "a.json", "an adapter's configuration")
    assert str(refused.value).startswith(f"{tmp_path / 'a.json'} is not an adapter's configuration")
    assert "\n" not in str(refused.value)


def test_json_as_deep_as_allowed_is_read(tmp_path):
    assert parse_json(b"[" * 32 + b"]" * 32, tmp_path / "a.json") is not None
    assert parse_json('{"ä": [1, 2.5, null, "x"]}'.encode(), tmp_path / "a.json") == {
        "ä": [1, 2.5, None, "x"]
    }


def test_a_large_file_is_not_read_to_its_end(tmp_path):
    with (tmp_path / "a.json").open("wb") as stream:
        stream.truncate(1 << 30)
    tracemalloc.start()
    with pytest.raises(EnsembleError, match="larger than 1,000 bytes"):
        read_json(tmp_path / "a.json", 1000)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_pipe_and_a_missing_file_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EnsembleError, match="is not a file"):
        read_json(tmp_path / "pipe", 1000)
    with pytest.raises(EnsembleError, match="is not a file"):
        read_json(tmp_path / "missing", 1000)
