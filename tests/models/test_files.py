"""Files that are whole or not there: whatever fails while they are written, what had the name before stays, and nothing else is left."""

import errno
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from llm_diffusion import UserError
from llm_diffusion.evaluation.report import write_report
from llm_diffusion.generation.self_generated import GenerationCache
from llm_diffusion.models.files import atomic, locked, read_json, write_text
from llm_diffusion.models.record import save_generation_config, save_record
from llm_diffusion.reasoning.pairs import write_rows
from llm_diffusion.training.stages import plot_loss


@contextmanager
def no_space_beyond(n_bytes):
    """As on a full disk: a file stops growing, with an OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


HISTORY = {"sft": [{"step": 1, "nelbo": 2.0}]}
RESULTS = {"settings": {"model": "m" * 300}, "provenance": {}, "models": {}, "notes": []}
WRITERS = {
    "text": (lambda p, tiny: write_text(p / "a.json", "x" * 300), "a.json"),
    "preferences": (lambda p, tiny: write_rows(p / "a.jsonl", [{"chosen": "x" * 300}]), "a.jsonl"),
    "report": (lambda p, tiny: write_report(RESULTS, p), "results.json"),
    "record": (lambda p, tiny: save_record(tiny, p), "diffusion_config.json"),
    "decoding": (lambda p, tiny: save_generation_config(tiny, p), "generation_config.json"),
    "picture": (lambda p, tiny: plot_loss(HISTORY, p / "loss.png"), "loss.png"),
}


@pytest.mark.parametrize("case", WRITERS)
def test_a_full_disk_leaves_what_was_there(case, tmp_path, tiny):
    write, name = WRITERS[case]
    model, _ = tiny
    (tmp_path / name).write_text("before")
    with no_space_beyond(100), pytest.raises(OSError):
        write(tmp_path, model)
    assert contents(tmp_path) == {name: b"before"} and not list(tmp_path.glob(".*"))
    write(tmp_path, model)
    assert contents(tmp_path)[name] != b"before" and not list(tmp_path.glob(".*"))


def test_answers_that_were_kept_survive_a_full_disk(tmp_path, tiny):
    file = tmp_path / "generated.jsonl"
    file.write_text('["a", [1, 2, 3]]\n' * 40)
    with no_space_beyond(10), pytest.raises(OSError):
        GenerationCache(tiny[0], file)
    assert len(file.read_text().splitlines()) == 40


def test_a_folder_has_its_name_when_it_is_whole(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "model") as aside:
        (aside / "deep").mkdir(parents=True)
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"model/old": b"old"}
    with atomic(tmp_path / "model") as aside:
        (aside / "deep").mkdir(parents=True)
        (aside / "deep" / "new").write_text("new")
        assert contents(tmp_path / "model") == {"old": b"old"}
    assert contents(tmp_path) == {"model/deep/new": b"new"}


def test_what_gets_its_name_is_on_the_disk(tmp_path, monkeypatch):
    """Of a folder every file is synced before the rename, and the rename itself behind it."""
    synced, sync = [], os.fsync

    def fsync(number):
        synced.append((os.readlink(f"/proc/self/fd/{number}"), (tmp_path / "model").exists()))
        sync(number)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic(tmp_path / "model") as aside:
        aside.mkdir()
        (aside / "weights").write_text("w")
    assert [named for _, named in synced] == [False, False, True]
    assert synced[1][0].endswith("/model/weights") and synced[2][0] == str(tmp_path)


def test_a_disk_that_loses_what_was_written_is_an_error(tmp_path, monkeypatch):
    """Some say so when the file is synced, and not before."""
    (tmp_path / "a").write_text("before")

    def lost(number):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", lost)
    with pytest.raises(OSError, match="quota"):
        write_text(tmp_path / "a", "after")
    assert contents(tmp_path) == {"a": b"before"}


def test_a_link_stays_one(tmp_path):
    (tmp_path / "real.json").write_text("1")
    (tmp_path / "link.json").symlink_to("real.json")
    write_text(tmp_path / "link.json", "2")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real.json").read_text() == "2"


def test_json_that_is_none_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"a\.json' is damaged"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[]")
    assert read_json(tmp_path / "a.json", list) == []
    with pytest.raises(UserError, match="no dict is in it"):
        read_json(tmp_path / "a.json", dict)


def test_permissions_are_as_usual(tmp_path):
    write_text(tmp_path / "a", "")
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


HOLDER = """
import multiprocessing, sys, time
from pathlib import Path
from llm_diffusion.models.files import locked
with locked(Path(sys.argv[1]), "`output_dir`"):
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_ends_even_by_a_crash(tmp_path):
    """Whose data workers live on for some seconds, and hold no lock."""
    file = tmp_path / "new" / "out" / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(file)], stdout=subprocess.PIPE, text=True)
    try:
        worker = int(holder.stdout.readline())
        with (
            pytest.raises(UserError, match=f"`output_dir` is in use by process {holder.pid};"),
            locked(file, "`output_dir`"),
        ):
            pass
        holder.kill()
        holder.wait()
        with locked(file, "`output_dir`"):
            assert file.read_text() == str(os.getpid())
    finally:
        holder.kill()
        holder.wait()
        os.kill(worker, signal.SIGKILL)


def test_a_lock_leaves_nothing(tmp_path):
    (tmp_path / "kept").mkdir()
    for folder in (tmp_path / "kept", tmp_path / "new" / "out"):
        with locked(folder / ".lock", "`output_dir`"):
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]
    with locked(tmp_path / "new" / "out" / ".lock", "`output_dir`"):
        (tmp_path / "new" / "out" / "result").write_text("")
    assert [path.name for path in (tmp_path / "new" / "out").iterdir()] == ["result"]
