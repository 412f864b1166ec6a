"""Publishing: one run wins, a crash at any moment leaves whole snapshots, and what nobody needs is removed."""

import itertools
import json
import os
import pickle
import shutil
import socket
import tempfile
import threading
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from google.auth.transport.requests import AuthorizedSession
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from snapshot_helper import embedding, prepare, publish_rows

from transforms import storage
from transforms.publish import (
    ConcurrentRunError,
    abandon,
    check_not_overtaken,
    claim,
    publish,
    remove_leftovers,
    remove_old,
)
from transforms.schema import Rejected
from transforms.shards import BrokenShardError
from transforms.snapshots import (
    LatestVersion,
    check_shards,
    latest_version,
    list_published,
    manifest_path,
    read_latest,
    read_snapshot,
    snapshot_folder,
    snapshot_names,
    work_folder,
)

pytest_plugins = ["gcs_emulator"]

ROWS = [embedding(f"d{i}") for i in range(6)]
REJECTED = [Rejected("a.txt", 7, "", "empty_text", "nothing but spaces", "   ")]
NOW = datetime(2026, 11, 22, 18, 0, 0, 999_999, tzinfo=timezone.utc)


@pytest.fixture(params=["local", "gs"])
def output(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "output")
    return request.getfixturevalue("gcs_bucket") + "/output"


@pytest.fixture
def local(tmp_path) -> str:
    return str(tmp_path / "output")


@pytest.fixture
def dead(monkeypatch):
    """A context in which claims are made by a process of another machine, so that they count as a dead run's."""

    @contextmanager
    def elsewhere():
        with monkeypatch.context() as patch:
            patch.setattr(socket, "gethostname", lambda: "another-machine")
            yield

    return elsewhere


def assert_sound(output: str) -> list[str]:
    """Asserts that LATEST and all that is listed as published is whole; returns the names."""
    names = list_published(output)
    latest = read_latest(output)
    assert (latest.name if latest else None) == (names[-1] if names else None)
    for name in names:
        check_shards(read_snapshot(output, name))
    return names


def assert_nothing_else(output: str, names: list[str]) -> None:
    """Asserts that the output holds these snapshots, LATEST and no other file."""
    expected = {"LATEST"} if names else set()
    for name in names:
        manifest = read_snapshot(output, name).manifest
        files = [shard["file"] for shard in manifest["shards"]] + ["manifest.json"]
        if manifest["counts"]["rejected"]:
            files.append("rejected-00000-of-00001.jsonl")
        expected |= {f"snapshot={name}/{file}" for file in files}
    assert set(storage.list_files(output)) == expected
    if names:
        assert storage.list_folders(output) == [f"snapshot={name}" for name in names]


# Names.


def test_a_name_is_the_time_in_utc(output):
    token = latest_version(output)
    assert claim(output, NOW, token) == "20261122T180000Z"
    east = NOW.astimezone(timezone(timedelta(hours=5, minutes=30))) + timedelta(hours=1)
    assert claim(output, east, token) == "20261122T190000Z"


def test_runs_of_the_same_second_get_different_names(output):
    token = latest_version(output)
    names = []
    threads = [threading.Thread(target=lambda: names.append(claim(output, NOW, token))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(names) == [f"20261122T18000{i}Z" for i in range(6)]


def test_a_name_is_above_the_last_snapshots_even_when_the_clock_went_back(output):
    last = publish_rows(output, ROWS, now=NOW).name
    assert claim(output, NOW - timedelta(days=30), latest_version(output)) == "20261122T180001Z" > last


def test_a_folder_that_is_there_is_not_taken(output):
    storage.create_exclusively(f"{snapshot_folder(output, '20261122T180000Z')}/of-somebody", b"x")
    assert claim(output, NOW, latest_version(output)) == "20261122T180001Z"
    assert storage.list_files(f"{output}/.work/claims").keys() == {"20261122T180001Z.json"}


def test_the_year_turns(local):
    token = latest_version(local)
    last_second = datetime(2026, 12, 31, 23, 59, 59, tzinfo=timezone.utc)
    assert [claim(local, last_second, token) for _ in range(2)] == ["20261231T235959Z", "20270101T000000Z"]


# Publishing.


def test_a_published_snapshot_is_all_there_is(output):
    first = publish_rows(output, ROWS, rejected=REJECTED)
    second = publish_rows(output, ROWS[:2])
    assert storage.read_versioned(f"{output}/LATEST").data.decode() == second.name
    assert second.manifest["previous"] == first.name
    assert assert_sound(output) == [first.name, second.name]
    assert_nothing_else(output, [first.name, second.name])


def test_publishing_again_succeeds_and_changes_nothing(output):
    prepared = prepare(output, ROWS)
    first = publish(*prepared)
    before = storage.read_versioned(f"{first.folder}/manifest.json")
    later = prepared._replace(manifest=prepared.manifest | {"seconds": 99.0})
    assert publish(*prepared) == publish(*later) == first
    assert storage.read_versioned(f"{first.folder}/manifest.json") == before
    after = publish_rows(output, ROWS[:3])
    assert publish(*prepared) == first  # A straggler, after another run has published upon it.
    assert assert_sound(output) == [first.name, after.name]
    assert_nothing_else(output, [first.name, after.name])


def test_of_two_runs_one_publishes_and_the_other_leaves_nothing(output):
    old = publish_rows(output, ROWS[:1])
    slow = prepare(output, ROWS, rejected=REJECTED)
    storage.create_exclusively(f"{work_folder(output, slow.name)}/vectors", b"hours of work")
    fast = publish_rows(output, ROWS[:2])
    message = f"another run published snapshot {fast.name} .* had started from {old.name}: this one publishes nothing"
    with pytest.raises(ConcurrentRunError, match=message):
        check_not_overtaken(output, slow.token)
    for _ in range(2):
        with pytest.raises(ConcurrentRunError, match=message) as caught:
            publish(*slow)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert assert_sound(output) == [old.name, fast.name]
    assert storage.list_files(f"{output}/.work") == {f"run={slow.name}/vectors": 13}
    storage.delete_folder(f"{output}/.work")
    assert_nothing_else(output, [old.name, fast.name])


def test_of_two_first_runs_one_publishes(output):
    slow = prepare(output, ROWS)
    fast = publish_rows_upon(output, ROWS[:2], slow.token)
    with pytest.raises(ConcurrentRunError, match="had started from an empty folder"):
        publish(*slow)
    assert_nothing_else(output, [fast.name])


def publish_rows_upon(output, rows, token):
    prepared = prepare(output, rows)
    assert prepared.token == token
    return publish(*prepared)


def test_a_run_that_is_overtaken_between_its_manifest_and_latest_loses(output, monkeypatch):
    old = publish_rows(output, ROWS[:1])
    slow = prepare(output, ROWS)
    fast = prepare(output, ROWS[:2])
    replace = storage.replace_if_generation

    def publish_the_other_first(url, data, generation):
        if url.endswith("/LATEST"):
            monkeypatch.setattr(storage, "replace_if_generation", replace)
            assert storage.read_versioned(f"{snapshot_folder(output, slow.name)}/manifest.json") is not None
            publish(*fast)
            assert list_published(output) == [old.name, fast.name]
        replace(url, data, generation)

    monkeypatch.setattr(storage, "replace_if_generation", publish_the_other_first)
    with pytest.raises(ConcurrentRunError, match=fast.name):
        publish(*slow)
    assert assert_sound(output) == [old.name, fast.name]
    assert_nothing_else(output, [old.name, fast.name])


def test_many_runs_publish_at_once_and_exactly_one_wins(output):
    old = publish_rows(output, ROWS[:1])
    runs = [prepare(output, ROWS) for _ in range(6)]
    barrier = threading.Barrier(len(runs))
    outcomes = {}

    def attempt(run):
        barrier.wait()
        try:
            outcomes[run.name] = publish(*run)
        except ConcurrentRunError as error:
            outcomes[run.name] = error

    threads = [threading.Thread(target=attempt, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [name for name, outcome in outcomes.items() if not isinstance(outcome, ConcurrentRunError)]
    assert len(outcomes) == len(runs)
    assert len(winners) == 1
    assert assert_sound(output) == [old.name, *winners]
    assert_nothing_else(output, [old.name, *winners])


def test_many_processes_publish_at_once_and_exactly_one_wins(local):
    old = publish_rows(local, ROWS[:1])
    runs = [prepare(local, ROWS) for _ in range(4)]
    gate, opener = os.pipe()
    children = []
    for run in runs:
        child = os.fork()
        if child == 0:
            os.close(opener)
            os.read(gate, 1)  # Until the parent closes the other end.
            end_with(lambda run=run: publish(*run))
        children.append(child)
    os.close(opener)
    os.close(gate)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(statuses) == [0, 3, 3, 3]
    winner = runs[statuses.index(0)].name
    assert assert_sound(local) == [old.name, winner]
    assert_nothing_else(local, [old.name, winner])


def exit_status(action) -> int:
    """Returns 3 where another run won, 0 where the action succeeded; anything else ends in a traceback."""
    try:
        action()
    except ConcurrentRunError:
        return 3
    return 0


def end_with(action) -> None:
    """Ends this forked copy of the test run with an action's exit status, and without the cleaning up."""
    status = 1
    try:
        status = exit_status(action)
    finally:
        os._exit(status)


# What is refused.


def test_a_manifest_of_another_snapshot_is_refused(local):
    prepared = prepare(local, ROWS)
    for changes in ({"snapshot": "20000101T000000Z"}, {"previous": "20000101T000000Z"}):
        with pytest.raises(ValueError, match="the manifest is of snapshot"):
            publish(*prepared._replace(manifest=prepared.manifest | changes))
    with pytest.raises(ValueError, match="lacks runner"):
        publish(*prepared._replace(manifest={k: v for k, v in prepared.manifest.items() if k != "runner"}))
    assert list_published(local) == []


def test_a_missing_or_unfinished_shard_is_refused(output):
    for harm in ("missing", "unfinished"):
        prepared = prepare(output, ROWS)
        shard = f"{snapshot_folder(output, prepared.name)}/embeddings-00001-of-00002.parquet"
        storage.delete_files([shard])
        if harm == "unfinished":
            storage.create_exclusively(shard, b"PAR1")
        with pytest.raises(
            BrokenShardError, match=r"00001-of-00002\.parquet (is missing|has 4 bytes).*: nothing was published, and"
        ):
            publish(*prepared)
        abandon(output, prepared.name)
    assert list_published(output) == []
    assert_nothing_else(output, [])


def test_a_missing_or_unfinished_file_of_rejected_records_is_refused(output):
    for harm in ("missing", "unfinished"):
        prepared = prepare(output, ROWS, rejected=REJECTED)
        file = f"{snapshot_folder(output, prepared.name)}/rejected-00000-of-00001.jsonl"
        storage.delete_files([file])
        if harm == "unfinished":
            storage.create_exclusively(file, b"{")
        with pytest.raises(BrokenShardError, match=rf"{file} (is missing|has 1 bytes).*: nothing was published, and"):
            publish(*prepared)
        abandon(output, prepared.name)
    assert list_published(output) == []


def test_all_files_are_brought_to_disk_before_the_manifest(local, monkeypatch):
    prepared = prepare(local, ROWS, rejected=REJECTED)
    brought = []
    monkeypatch.setattr(storage, "make_durable", lambda folder, names: brought.append((folder, sorted(names))))
    publish(*prepared)
    folder = snapshot_folder(local, prepared.name)
    files = sorted(path.name for path in Path(folder).iterdir() if path.name != "manifest.json")
    assert brought == [(folder, files)]
    assert len(files) == 3


def test_a_name_that_is_not_claimed_is_refused(output):
    prepared = prepare(output, ROWS)
    abandon(output, prepared.name)
    with pytest.raises(ValueError, match="is not claimed: its run has been abandoned"):
        publish(*prepared)
    assert_nothing_else(output, [])


def test_another_try_with_other_shards_is_refused(local):
    prepared = prepare(local, ROWS)
    manifest = Path(snapshot_folder(local, prepared.name), "manifest.json")
    other = json.loads(json.dumps(prepared.manifest))
    other["shards"][0]["checksum"] = "sha256:" + "0" * 64
    manifest.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="written by an earlier try with other shards"):
        publish(*prepared)
    assert list_published(local) == []


# Crashes.


class CrashError(BaseException):
    """Not an Exception, so that no handler takes it for one."""


STORAGE_STEPS = (
    "check_url",
    "create_exclusively",
    "delete_files",
    "delete_folder",
    "delete_if_empty",
    "list_files",
    "list_folders",
    "make_durable",
    "read_versioned",
    "replace_if_generation",
)
SYSTEM_STEPS = ("open", "close", "replace", "fsync", "unlink", "makedirs", "ftruncate", "rmdir")


class Dying:
    """A module, with a step counted before each call of some of its functions."""

    def __init__(self, module, step):
        self._module = module
        self._step = step

    def __getattr__(self, name):
        value = getattr(self._module, name)
        return counted(value, self._step) if name in SYSTEM_STEPS else value

    def rmtree(self, folder):
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                self._step()
                path.unlink()
        self._module.rmtree(folder)


def counted(function, step):
    def call(*args, **kwargs):
        step()
        return function(*args, **kwargs)

    return call


def die_at(monkeypatch, number: int, die) -> None:
    """Has `die` called at the step of a number, counted from 1, of all calls of the storage and of the system."""
    steps = itertools.count(1)

    def step():
        if next(steps) == number:
            die()

    monkeypatch.setattr(storage, "os", Dying(os, step))
    monkeypatch.setattr(storage, "shutil", Dying(shutil, step))
    for name in STORAGE_STEPS:
        monkeypatch.setattr(storage, name, counted(getattr(storage, name), step))


def dies_at_step(monkeypatch, number: int, action) -> bool:
    """Runs an action in a process that is gone, as killed by kill -9, at a step; False where it ends before."""
    child = os.fork()
    if child == 0:
        die_at(monkeypatch, number, lambda: os._exit(9))
        end_with(action)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def test_a_kill_at_any_step_of_publishing_can_be_tried_again(tmp_path, monkeypatch):
    published_before_the_kill = []
    for number in itertools.count(1):
        output = str(tmp_path / str(number))
        old = publish_rows(output, ROWS[:1], now=NOW)
        run = prepare(output, ROWS, rejected=REJECTED, now=NOW)
        killed = dies_at_step(monkeypatch, number, lambda run=run: publish(*run))
        names = assert_sound(output)
        assert names in ([old.name], [old.name, run.name])
        published_before_the_kill.append(run.name in names)
        assert publish(*run).manifest == run.manifest
        assert assert_sound(output) == [old.name, run.name]
        assert_nothing_else(output, [old.name, run.name])
        if not killed:
            break
    assert number > 30
    # Published at one step, and never unpublished.
    assert published_before_the_kill == sorted(published_before_the_kill)
    assert set(published_before_the_kill) == {False, True}


def test_a_kill_at_any_step_of_a_run_leaves_nothing_that_the_next_run_does_not_remove(tmp_path, monkeypatch):
    for number in itertools.count(1):
        output = str(tmp_path / str(number))
        old = publish_rows(output, ROWS[:1], now=NOW)
        killed = dies_at_step(monkeypatch, number, lambda output=output: publish_rows(output, ROWS[:3], now=NOW))
        survived = [name for name in assert_sound(output) if name != old.name]
        assert len(survived) <= 1
        new = publish_rows(output, ROWS, rejected=REJECTED)
        assert assert_sound(output) == [old.name, *survived, new.name]
        remove_leftovers(output)
        assert remove_leftovers(output) == []
        assert assert_sound(output) == [old.name, *survived, new.name]
        assert_nothing_else(output, [old.name, *survived, new.name])
        if not killed:
            break
    assert survived
    assert number > 50


def test_a_kill_at_any_step_of_a_losing_run_leaves_nothing_that_is_read(tmp_path, monkeypatch):
    for number in itertools.count(1):
        output = str(tmp_path / str(number))
        loser = prepare(output, ROWS, now=NOW)
        winner = publish_rows(output, ROWS[:2], now=NOW)
        killed = dies_at_step(monkeypatch, number, lambda run=loser: exit_status(lambda: publish(*run)))
        assert assert_sound(output) == [winner.name]
        with pytest.raises(ConcurrentRunError):
            publish(*loser)
        assert_nothing_else(output, [winner.name])
        if not killed:
            break
    assert number > 8


def files_of(output: str, name: str) -> dict[str, int]:
    return storage.list_files(snapshot_folder(output, name))


def test_a_kill_at_any_step_of_removing_leaves_a_history_without_gaps(tmp_path, monkeypatch):
    for number in itertools.count(1):
        output = str(tmp_path / str(number))
        names = [publish_rows(output, ROWS[:1], now=NOW).name for _ in range(5)]
        killed = dies_at_step(monkeypatch, number, lambda output=output: remove_old(output, 2))
        left = assert_sound(output)
        assert left == [name for name in snapshot_names(output) if "manifest.json" in files_of(output, name)]
        remove_old(output, 2)
        assert assert_sound(output) == names[-2:]
        assert_nothing_else(output, names[-2:])
        if not killed:
            break
    assert number > 8


def test_an_error_at_any_request_to_gs_can_be_tried_again(gcs_bucket, monkeypatch, dead):
    request = AuthorizedSession.request
    for number in itertools.count(1):
        for before in (True, False):
            output = f"{gcs_bucket}/{number}-{before}"
            old = publish_rows(output, ROWS[:1], now=NOW)
            with dead():
                run = prepare(output, ROWS, rejected=REJECTED, now=NOW)
            requests = itertools.count(1)

            def crash(*args, requests=requests, before=before, number=number, **kwargs):
                dies = next(requests) == number
                if dies and before:
                    raise CrashError
                answer = request(*args, **kwargs)
                if dies:
                    raise CrashError
                return answer

            with monkeypatch.context() as patch:
                patch.setattr(AuthorizedSession, "request", crash)
                try:
                    publish(*run)
                    crashed = False
                except CrashError:
                    crashed = True
            names = assert_sound(output)
            assert names in ([old.name], [old.name, run.name])
            if before:
                publish(*run)
                assert assert_sound(output) == [old.name, run.name]
                assert_nothing_else(output, [old.name, run.name])
            else:
                new = publish_rows(output, ROWS[:2])
                assert remove_leftovers(output) == ([] if run.name in names else [run.name])
                assert assert_sound(output) == [*names, new.name]
                assert_nothing_else(output, [*names, new.name])
        if not crashed:
            break
    assert number > 8


# Removing.


def test_an_abandoned_run_leaves_what_a_person_may_want_to_read(output):
    old = publish_rows(output, ROWS[:1])
    run = prepare(output, ROWS, rejected=REJECTED)
    folder = snapshot_folder(output, run.name)
    storage.create_exclusively(f"{folder}/.parts/half-a-shard", b"PAR1")
    storage.create_exclusively(f"{work_folder(output, run.name)}/vectors", b"hours of work")
    abandon(output, run.name, keep=["rejected-*.jsonl", "report.json"])
    abandon(output, run.name, keep=["rejected-*.jsonl", "report.json"])
    assert list(storage.list_files(folder)) == ["rejected-00000-of-00001.jsonl"]
    assert storage.list_folders(folder) == []
    assert list(storage.list_files(f"{output}/.work")) == [f"run={run.name}/vectors"]
    assert assert_sound(output) == [old.name]
    abandon(output, run.name)
    storage.delete_folder(f"{output}/.work")
    assert_nothing_else(output, [old.name])


def test_a_published_snapshot_cannot_be_abandoned(output):
    old, new = (publish_rows(output, ROWS[:i]) for i in (1, 2))
    for name in (old.name, new.name):
        with pytest.raises(ValueError, match=f"snapshot {name} .* is published"):
            abandon(output, name)
    assert assert_sound(output) == [old.name, new.name]


def test_leftovers_of_the_dead_are_removed_but_not_of_those_that_live_or_may_publish(output, dead):
    with dead():
        overtaken = prepare(output, ROWS[:3])
    living = prepare(output, ROWS[:4])
    published = publish_rows(output, ROWS[:2])
    with dead():
        may_publish = prepare(output, ROWS[:5])
    assert remove_leftovers(output) == [overtaken.name]
    assert snapshot_names(output) == sorted([living.name, published.name, may_publish.name])
    assert publish(*may_publish).name == may_publish.name
    with pytest.raises(ConcurrentRunError):
        publish(*living)
    with pytest.raises(ConcurrentRunError):
        publish(*overtaken)
    assert remove_leftovers(output) == []
    assert_nothing_else(output, [published.name, may_publish.name])


def test_a_process_that_ended_is_dead_and_one_of_another_user_lives(local, monkeypatch):
    child = os.fork()
    if child == 0:
        end_with(lambda: prepare(local, ROWS))
    os.waitpid(child, 0)
    (dead_run,) = snapshot_names(local)
    publish_rows(local, ROWS[:1])

    def refuse(process, signal):
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", refuse)
        assert remove_leftovers(local) == []
    assert remove_leftovers(local) == [dead_run]


def test_leftovers_are_left_where_it_cannot_be_known_whether_they_were_published(local, dead):
    with dead():
        old = prepare(local, ROWS)
    storage.create_exclusively(manifest_path(local, old.name), json.dumps(old.manifest).encode())
    damaged, latest = (publish_rows(local, ROWS[:i]) for i in (1, 2))
    Path(damaged.folder, "manifest.json").unlink()
    assert remove_leftovers(local) == []
    assert old.name in snapshot_names(local)
    assert list_published(local) == [latest.name]


def test_a_run_during_which_others_publish_and_remove_what_is_older_is_overtaken_and_leaves_nothing(output, dead):
    publish_rows(output, ROWS[:1])
    living = prepare(output, ROWS)
    with dead():
        died = prepare(output, ROWS)
    names = []
    for count in range(4):
        names.append(publish_rows(output, ROWS[:count]).name)
        remove_old(output, 1)
    assert list_published(output) == names[-2:]  # The history ends above both runs.
    with pytest.raises(ConcurrentRunError, match=f"another run published snapshot {names[-1]}"):
        publish(*living)
    assert remove_leftovers(output) == [died.name]
    assert_nothing_else(output, names[-2:])


@pytest.mark.parametrize(("keep", "left"), [(1, 2), (2, 2), (3, 3), (5, 5), (9, 5)])
def test_old_snapshots_are_removed_but_never_the_last_two(local, keep, left):
    names = [publish_rows(local, ROWS[:1], now=NOW).name for _ in range(5)]
    assert remove_old(local, keep) == names[: 5 - left]
    assert assert_sound(local) == names[5 - left :]
    assert_nothing_else(local, names[5 - left :])


def test_old_snapshots_are_removed_on_gs(gcs_bucket):
    names = [publish_rows(gcs_bucket, ROWS, now=NOW).name for _ in range(3)]
    assert remove_old(gcs_bucket, 1) == names[:1]
    assert_nothing_else(gcs_bucket, names[1:])


def test_what_else_is_older_goes_with_old_snapshots_but_for_claimed_folders(local):
    rejected = prepare(local, ROWS, rejected=REJECTED, now=NOW)
    abandon(local, rejected.name, keep=["rejected-*.jsonl"])
    running = prepare(local, ROWS, now=NOW)
    damaged = publish_rows(local, ROWS, now=NOW)
    Path(damaged.folder, "manifest.json").write_text("{}")
    kept = [publish_rows(local, ROWS, now=NOW).name for _ in range(2)]
    assert remove_old(local, 2) == [rejected.name, damaged.name]
    assert snapshot_names(local) == [running.name, *kept]


def test_at_least_one_snapshot_must_be_kept(local):
    with pytest.raises(ValueError, match="at least 1 snapshot must be kept, not 0"):
        remove_old(local, 0)


# Any order of everything.


class Runs(RuleBasedStateMachine):
    """Runs begin, publish, crash, give up and are cleaned up after, in any order."""

    def __init__(self):
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(socket, "gethostname", lambda: f"machine-{next(self.machines)}")  # All claims seem dead.
        self.patch.setattr(os, "fsync", lambda descriptor: None)
        self.machines = itertools.count()
        self.output = tempfile.mkdtemp(prefix="runs-")
        self.runs = []
        self.published = []  # Names, oldest first, whether still there or removed as old.

    def teardown(self):
        self.patch.undo()
        shutil.rmtree(self.output, ignore_errors=True)

    @rule(rows=st.integers(0, 5))
    def begin(self, rows):
        self.runs.append(prepare(self.output, ROWS[:rows], now=NOW))

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), crash_at=st.none() | st.integers(1, 30))
    def publish(self, data, crash_at):
        run = data.draw(st.sampled_from(self.runs))
        before = latest_version(self.output)
        try:
            with pytest.MonkeyPatch.context() as patch:
                die_at(patch, crash_at or 0, crash)
                assert publish(*run).name == run.name
            assert run.name in self.published or before == run.token
        except CrashError:
            pass
        except ConcurrentRunError:
            assert run.name not in self.published
            assert before != run.token
        except ValueError:  # Abandoned, or its shards were.
            assert run.name not in self.published
            assert before == run.token
        self.note_latest(before)

    def note_latest(self, before: LatestVersion):
        after = latest_version(self.output)
        if after != before:
            self.published.append(after.name)

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def abandon(self, data):
        run = data.draw(st.sampled_from(self.runs))
        if run.name in self.published:
            if run.name in list_published(self.output):
                with pytest.raises(ValueError, match="is published"):
                    abandon(self.output, run.name)
        else:
            abandon(self.output, run.name)

    @rule()
    def remove_leftovers(self):
        remove_leftovers(self.output)

    @rule(keep=st.integers(1, 3))
    def remove_old(self, keep):
        removed = remove_old(self.output, keep)
        assert not set(removed) & set(self.published[-max(keep, 2) :])

    @invariant()
    def what_is_published_is_whole(self):
        names = list_published(self.output)
        assert names == self.published[len(self.published) - len(names) :]
        assert len(names) >= min(2, len(self.published))
        for name in names:
            check_shards(read_snapshot(self.output, name))


def crash():
    raise CrashError


TestRuns = Runs.TestCase
TestRuns.settings = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
