"""Extractions that are killed, stopped, starved of disk or run twice at once: the cache is right all the same."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from embedkit.errors import CacheError
from embedkit.failures import Failure, clear_failures, read_failures, record_failure
from embedkit.volumes import write_volume

AFFINE = np.array([[0.0, 0, -1, 0], [0, -1, 0, 0], [3, 0, 0, 0], [0, 0, 0, 1]])
OPTIONS: dict[str, Any] = {
    "backbone": "embedkit/scattering",
    "image_size": 32,
    "tokens": ["cls", "patch@2"],
    "preview": 8,
    "batch_size": 2,
    "workers": 1,
    "device": "cpu",
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "float16": {},
    "large volumes in files": {"planes": ("coronal",), "dtype": "int8", "spill": True},
    "int8": {"dtype": "int8"},
    "three planes": {"planes": ("axial", "coronal", "sagittal")},
}
"""Options of an extraction that is killed; with ``spill`` voxels and tokens lie in nameless files."""
FILE_EVENTS = {"open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.listdir", "os.scandir"}
CALL_MAIN = "from embedkit.cli.main import main; main()"
HANGING_S = 600
"""What takes longer hangs, even where many others use the machine."""
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def write_cases(folder: Path, count: int, *, missing: bool = True) -> Path:
    """A manifest of small cases of 1 to 6 slices, and of one whose file is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        array = np.random.default_rng(number).normal(100, 30, (1 + number % 6, 20, 24)).astype(np.float32)
        write_volume(folder / f"{number}.nii", array, AFFINE)
        rows.append({"case_id": f"case{number:02d}", "path": f"{number}.nii"})
    if missing:
        rows.insert(count // 2, {"case_id": "gone", "path": "gone.nii"})
    pl.DataFrame(rows).write_csv(folder / "cases.csv")
    return folder / "cases.csv"


def extract_small(manifest: Path, out: Path, **changes: Any) -> Any:
    """Extracts with a shard for about every second case."""
    from embedkit.extraction import extract

    return extract(manifest, out, **{**OPTIONS, "shard_bytes": 4096, **changes})


def extract_as(configuration: str, manifest: Path, out: Path) -> None:
    """Extracts in one of `CONFIGURATIONS`, in a process that does nothing else afterwards."""
    from embedkit import casework, sources

    options = dict(CONFIGURATIONS[configuration])
    if options.pop("spill", False):
        casework.SPILL_BYTES = sources.VOXEL_BYTES = 100
    extract_small(manifest, out, **options)


def content(cache_path: Path) -> dict[str, Any]:
    """All that a cache says, by stack, whichever shards it lies in."""
    from embedkit.cache import open_cache

    found: dict[str, Any] = {}
    with open_cache(cache_path) as cache:
        for row in cache.stacks.iter_rows(named=True):
            key, stack = "/".join((row["case_id"], row["view"], row["plane"])), row["stack"]
            tokens = {name: np.array(cache.read(stack, name)).tobytes() for name in cache.token_sets}
            slices = cache.slices(stack)
            table = [np.asarray(each).tolist() for each in (slices.indices, slices.positions_mm, slices.blank)]
            own = {
                name: value
                for name, value in row.items()
                if name not in ("stack", "shard", "shard_number", "first_row")
            }
            preview = cache.preview(stack)
            found[key] = (tokens, table, own, None if preview is None else np.array(preview).tobytes())
    return found


def duplicates(cache_path: Path) -> int:
    from embedkit.cache import open_cache

    with open_cache(cache_path) as cache:
        return len(cache.duplicates)


def finished(cache_path: Path) -> dict[str, tuple[int, int, list[str]]]:
    """Each shard's name with its size, time of change and cases."""
    from embedkit.shards import load_shard

    return {
        file.name: (
            file.stat().st_size,
            file.stat().st_mtime_ns,
            [text.decode() for text in load_shard(file).stacks["case_id"].tolist()],
        )
        for file in sorted(cache_path.glob("shards/*.h5"))
    }


def temporaries(cache_path: Path) -> list[Path]:
    return [path for path in cache_path.rglob("*") if path.name.endswith(".tmp")]


def fork_work(work: Callable[[], object], watched: Path, *, die_at: int | None = None) -> int:
    """A child of this process that does the work; its exit code is 0 if that succeeds.

    With ``die_at`` it kills itself just before its so many-th operation on a name below ``watched``, or fsync.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    signal.alarm(HANGING_S)
    try:
        fsync, seen = os.fsync, 0

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in FILE_EVENTS and str(watched) in str(arguments[0]):
                seen += 1
                if seen == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        def counted_fsync(descriptor: int) -> None:
            count("open", (watched,))
            fsync(descriptor)

        if die_at is not None:
            sys.addaudithook(count)
            os.fsync = counted_fsync
        work()
        code = 0
    finally:
        os._exit(code)


def fork_extraction(
    manifest: Path, cache: Path, reads: Path, *, die_at: int | None, configuration: str = "float16"
) -> int:
    """A child of this process that extracts and notes each file it reads; see `fork_work`."""

    def work() -> None:
        from embedkit import sources

        read_volume = sources.read_volume

        def noted(path: Path | str, **options: Any) -> Any:
            with reads.open("a") as file:
                file.write(f"{Path(path).stem}\n")
            return read_volume(path, **options)

        sources.read_volume = noted
        extract_as(configuration, manifest, cache)

    return fork_work(work, cache, die_at=die_at)


class Killer:
    """Kills children at random instants: by the clock, or before a random operation on a file."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.killed = 0

    def __call__(self, start: Callable[[int | None], int], *, events: int, seconds: float) -> int | None:
        """The exit code of the child that ``start`` makes from a number of operations; None where it was killed."""
        by_event = self.chance.random() < 0.5
        child = start(self.chance.randrange(1, events) if by_event else None)
        if not by_event:
            time.sleep(self.chance.uniform(0.0, seconds))
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        self.killed += code == -signal.SIGKILL
        return None if code == -signal.SIGKILL else code


def soak(manifest: Path, work: Path, kills: int, seed: int) -> dict[str, Any]:
    """Extracts to one new cache after another, and packs it, killing until there were enough kills.

    The configurations take turns. Runs in a process of its own that has imported everything and forks each child.
    """
    import torch

    torch.set_num_threads(1)
    kill, problems, stages, torn = Killer(seed), list[str](), dict[int, int](), 0
    caches: list[str] = []
    while kill.killed < kills or len(caches) < (len(CONFIGURATIONS) if kills >= 100 else 2):
        configuration = list(CONFIGURATIONS)[len(caches) % len(CONFIGURATIONS)]
        cache, reads = work / f"cache{len(caches)}", work / f"reads{len(caches)}"
        packed = packed_path(work, len(caches))
        packed.parent.mkdir()
        caches.append(configuration)
        code = None
        while code is None:
            before = finished(cache)
            reads.write_text("")
            code = kill(partial(start_extraction, manifest, cache, reads, configuration), events=120, seconds=0.4)
            after = finished(cache)
            known = {case for _, _, cases in before.values() for case in cases}
            repeated = known & {f"case{int(name):02d}" for name in reads.read_text().split() if name.isdigit()}
            if repeated:
                problems.append(f"{cache.name}: read again {sorted(repeated)}")
            if any(after.get(name) != shard for name, shard in before.items()):
                problems.append(f"{cache.name}: a finished shard changed")
            torn += bool(temporaries(cache))
            if code is None:
                stages[len(after)] = stages.get(len(after), 0) + 1
        extracted, packing = kill.killed, None
        for _ in range(2):
            if packing is None and not packed.exists():
                packing = kill(partial(start_packing, cache, packed), events=60, seconds=0.1)
                torn += bool(temporaries(packed.parent))
        if packing is None and not packed.exists():
            packing = os.waitstatus_to_exitcode(os.waitpid(start_packing(cache, packed, None), 0)[1])
        if code or packing:
            problems.append(f"{cache.name}: exit codes {code}, {packing}")
        if temporaries(packed.parent):  # killed between two names of one file
            os.waitpid(start_packing(cache, packed.with_name("again.h5"), None), 0)
            if temporaries(packed.parent):
                problems.append(f"{cache.name}: packing left {temporaries(packed.parent)}")
        stages[-1] = stages.get(-1, 0) + kill.killed - extracted
    return {"kills": kill.killed, "caches": caches, "problems": problems, "stages": stages, "torn": torn}


def packed_path(work: Path, number: int) -> Path:
    """Where a cache is packed to: one file, or a folder of few."""
    return work / f"packed{number}" / ("few" if (number + number // len(CONFIGURATIONS)) % 2 else "one.h5")


def start_extraction(manifest: Path, cache: Path, reads: Path, configuration: str, die_at: int | None) -> int:
    return fork_extraction(manifest, cache, reads, die_at=die_at, configuration=configuration)


def start_packing(cache: Path, packed: Path, die_at: int | None) -> int:
    from embedkit.packing import pack_cache

    shard_bytes = None if packed.suffix else 9000
    return fork_work(lambda: pack_cache(cache, packed, shard_bytes=shard_bytes), packed.parent, die_at=die_at)


class Warm:
    """A process that has imported everything, so that what it forks begins at once; see `serve`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ONE_THREAD
        )

    def __call__(self, task: str, *arguments: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([task, *map(str, arguments)]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process that forks extractions has died; its error is above"
        return json.loads(answer)

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    process = Warm()
    yield process
    process.close()


def test_an_extraction_killed_at_any_instant_resumes_to_the_same_cache(
    tmp_path: Path, warm: Warm, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    kills = request.config.getoption("--kills")
    manifest = write_cases(tmp_path / "scans", 10)
    result = warm("kill", manifest, tmp_path, kills)
    whole = {name: tmp_path / f"whole {name}" for name in dict.fromkeys(result["caches"])}
    assert [warm("extract", manifest, whole[name], name) for name in whole] == [0] * len(whole)
    packing = result["stages"].pop("-1")
    with capsys.disabled():
        sys.stdout.write(
            f"\n{result['kills']} kills over {len(result['caches'])} caches of {len(whole)} configurations,"
            f" {packing} of them in packing, {result['torn']} left a temporary file; in extraction by shards finished:"
            f" {dict(sorted(result['stages'].items(), key=lambda pair: int(pair[0])))}\n"
        )
    assert result["problems"] == []
    assert result["kills"] >= kills and len(result["stages"]) > 2 and packing > 0
    expected = {name: content(path) for name, path in whole.items()}
    assert {name: len(stacks) for name, stacks in expected.items()} == {
        name: 30 if name == "three planes" else 10 for name in whole
    }
    for number, configuration in enumerate(result["caches"]):
        cache, packed = tmp_path / f"cache{number}", packed_path(tmp_path, number)
        assert content(cache) == content(packed) == expected[configuration]
        assert duplicates(cache) == duplicates(packed) == 0
        log = read_failures(cache)
        assert [failure.case_id for failure in log.failures] == ["gone"] and log.unreadable_lines == ()
        assert temporaries(cache) == []


def program_arguments(manifest: Path, cache: Path, image_size: int) -> list[str]:
    arguments = ["extract", str(manifest), "-o", str(cache), "--image-size", str(image_size), "--device", "cpu"]
    arguments += ["--backbone", "embedkit/scattering", "--batch-size", "2", "--workers", "1", "--preview", "8"]
    return [*arguments, "--tokens", "cls,patch@2", "--shard-size", "4kB"]


def wait_for(condition: Callable[[], bool]) -> None:
    stop_at = time.monotonic() + HANGING_S
    while not condition():
        assert time.monotonic() < stop_at, "the program did nothing in ten minutes"
        time.sleep(0.02)


def test_the_installed_program_killed_cold_resumes_to_the_same_cache(tmp_path: Path) -> None:
    manifest = write_cases(tmp_path / "scans", 6, missing=False)
    installed = Path(sys.executable).parent / "embedkit"
    program = [str(installed)] if installed.exists() else [sys.executable, "-c", CALL_MAIN]
    command = [*program, *program_arguments(manifest, tmp_path / "cache", 32)]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ONE_THREAD)
    wait_for((tmp_path / "cache" / "recipe.json").exists)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert "6 cases extracted" in done.stdout
    extract_small(manifest, tmp_path / "whole")
    assert content(tmp_path / "cache") == content(tmp_path / "whole")
    assert temporaries(tmp_path / "cache") == []


def signal_program(manifest: Path, cache: Path, numbers: list[int], errors: Path) -> int:
    """Sends signals to the real program once it wrote its first shard; gives its exit code, negative if killed."""
    child = os.fork()
    if not child:
        code = 1
        signal.alarm(HANGING_S)
        try:
            with errors.open("w") as file:
                os.dup2(file.fileno(), 2)
                os.dup2(file.fileno(), 1)
            from embedkit.cli.main import main

            sys.argv = ["embedkit", *program_arguments(manifest, cache, 96)]
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            sys.stderr.flush()
            os._exit(code)
    wait_for(lambda: any(cache.glob("shards/[!.]*.h5")))
    for number in numbers:
        os.kill(child, number)
        time.sleep(0.1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_is_finished_and_the_rest_follows(
    tmp_path: Path, warm: Warm, number: signal.Signals, code: int
) -> None:
    manifest, cache = write_cases(tmp_path / "scans", 200, missing=False), tmp_path / "cache"
    assert warm("signal", manifest, cache, tmp_path / "errors", int(number)) == code
    errors = (tmp_path / "errors").read_text()
    assert "writing the finished cases" in errors and "resumes" in errors and "Traceback" not in errors
    done = [case for _, _, cases in finished(cache).values() for case in cases]
    assert 0 < len(done) < 200 and temporaries(cache) == []
    few = tmp_path / "scans" / "few.csv"
    pl.read_csv(manifest).head(len(done) + 3).write_csv(few)
    summary = extract_small(few, cache, image_size=96)
    assert (summary.cases_before, summary.cases_done) == (len(done), 3)
    extract_small(few, tmp_path / "whole", image_size=96)
    assert content(cache) == content(tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_at_once_and_damages_nothing(
    tmp_path: Path, warm: Warm, number: signal.Signals, code: int
) -> None:
    manifest, cache = write_cases(tmp_path / "scans", 200, missing=False), tmp_path / "cache"
    assert warm("signal", manifest, cache, tmp_path / "errors", int(number), int(number)) in (-number, code)
    assert 0 < sum(len(cases) for _, _, cases in finished(cache).values()) < 200
    few = tmp_path / "scans" / "few.csv"
    pl.read_csv(manifest).head(3).write_csv(few)
    extract_small(few, cache, image_size=96)
    extract_small(few, tmp_path / "whole", image_size=96)
    found, expected = content(cache), content(tmp_path / "whole")
    assert {case: found[case] for case in expected} == expected
    assert temporaries(cache) == []


def mount(*arguments: object) -> None:
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 120 KB."""
    if shutil.which("mount") is None:
        pytest.skip("no program to mount a file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=120k", "tmpfs", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_says_so_and_with_room_the_rest_follows(tmp_path: Path, small_disk: Path) -> None:
    manifest = write_cases(tmp_path / "scans", 10)
    with pytest.raises(CacheError, match="full; free some space or choose another place"):
        extract_small(manifest, small_disk / "cache")
    assert temporaries(small_disk / "cache") == []
    before = finished(small_disk / "cache")
    assert before
    mount("-o", "remount,size=8m", small_disk)
    done = {case for _, _, cases in before.values() for case in cases}
    assert extract_small(manifest, small_disk / "cache").cases_before == len(done)
    extract_small(manifest, tmp_path / "whole")
    assert content(small_disk / "cache") == content(tmp_path / "whole")
    assert before.items() <= finished(small_disk / "cache").items()


@pytest.mark.parametrize("name", ["cache", "other"])
def test_a_read_only_cache_is_read_and_not_written(tmp_path: Path, small_disk: Path, name: str) -> None:
    mount("-o", "remount,size=8m", small_disk)
    manifest = write_cases(tmp_path / "scans", 4, missing=False)
    extract_small(manifest, small_disk / "cache")
    mount("-o", "remount,ro", small_disk)
    assert extract_small(manifest, small_disk / "cache").cases_before == 4
    with pytest.raises(CacheError, match="is read-only or not permitted"):
        extract_small(write_cases(tmp_path / "scans", 6, missing=False), small_disk / name)
    with pytest.raises(CacheError, match=r"cannot record a failure.* is read-only"):
        record_failure(small_disk / "cache", Failure("a", "no reason"))


class FullDisk:
    """Lets a number of bytes through to files below a folder, then raises ENOSPC as a full disk does."""

    def __init__(self, folder: Path, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = room
        open_path, write = Path.open, os.write

        def guarded_open(path: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
            stream = open_path(path, mode, *rest, **named)
            return _Guarded(stream, self) if set(mode) & set("wxa") and path.is_relative_to(folder) else stream

        def guarded_write(descriptor: int, data: bytes) -> int:
            taken = self.take(len(data))
            if taken < len(data):
                write(descriptor, data[:taken])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(descriptor, data)

        monkeypatch.setattr(Path, "open", guarded_open)
        monkeypatch.setattr(os, "write", guarded_write)

    def take(self, count: int) -> int:
        taken = min(count, self.room)
        self.room -= taken
        return taken


class _Guarded:
    def __init__(self, stream: Any, disk: FullDisk) -> None:
        self._stream, self._disk = stream, disk

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        taken = self._disk.take(len(view))
        self._stream.write(view[:taken])
        if taken < len(view):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _Guarded:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


@pytest.mark.parametrize("room", [0, 100, 5_000, 20_000, 33_333, 50_000])
def test_wherever_a_disk_becomes_full_nothing_finished_is_lost(
    tmp_path: Path, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write_cases(tmp_path / "scans", 6)
    with monkeypatch.context() as patched:
        FullDisk(tmp_path / "cache", room, patched)
        with pytest.raises(CacheError, match="full; free some space or choose another place"):
            extract_small(manifest, tmp_path / "cache")
    assert temporaries(tmp_path / "cache") == []
    before = finished(tmp_path / "cache")
    done = {case for _, _, cases in before.values() for case in cases}
    assert extract_small(manifest, tmp_path / "cache").cases_before == len(done)
    extract_small(manifest, tmp_path / "whole")
    assert content(tmp_path / "cache") == content(tmp_path / "whole")
    assert before.items() <= finished(tmp_path / "cache").items()
    assert [failure.case_id for failure in read_failures(tmp_path / "cache").failures] == ["gone"]


def test_a_failure_record_cut_by_a_full_disk_is_read_past_and_written_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_failure(tmp_path, Failure("first", "truncated"))
    with monkeypatch.context() as patched:
        FullDisk(tmp_path, 20, patched)
        with pytest.raises(CacheError, match=r"cannot record a failure: the disk .* is full; free some space"):
            record_failure(tmp_path, Failure("second", "truncated"))
    record_failure(tmp_path, Failure("third", "empty"))
    log = read_failures(tmp_path)
    assert [failure.case_id for failure in log.failures] == ["first", "third"]
    assert log.unreadable_lines == (2,)
    clear_failures(tmp_path)
    assert read_failures(tmp_path).failures == ()


def rewrite(file: Path, value: float, slices: int) -> None:
    """Replaces an image by another, its time of change later."""
    array = np.random.default_rng(9).normal(value, 30, (slices, 20, 24)).astype(np.float32)
    write_volume(file, array, AFFINE)
    later = file.stat().st_mtime_ns + 10**9
    os.utime(file, ns=(later, later))


@pytest.mark.parametrize("slices", [3, 5])
def test_a_source_of_other_bytes_is_extracted_anew_and_reported(tmp_path: Path, slices: int) -> None:
    manifest = write_cases(tmp_path / "scans", 4, missing=False)
    extract_small(manifest, tmp_path / "cache")
    size = (tmp_path / "scans" / "2.nii").stat().st_size
    rewrite(tmp_path / "scans" / "2.nii", 300.0, slices)
    assert ((tmp_path / "scans" / "2.nii").stat().st_size == size) == (slices == 3)
    summary = extract_small(manifest, tmp_path / "cache")
    assert (summary.cases_done, summary.changed) == (1, ("case02",))
    extract_small(manifest, tmp_path / "whole")
    assert content(tmp_path / "cache") == content(tmp_path / "whole")
    assert duplicates(tmp_path / "cache") == 1


def test_a_source_touched_but_of_the_same_bytes_is_not_stored_twice(tmp_path: Path) -> None:
    manifest = write_cases(tmp_path / "scans", 3, missing=False)
    extract_small(manifest, tmp_path / "cache")
    os.utime(tmp_path / "scans" / "1.nii")
    summary = extract_small(manifest, tmp_path / "cache")
    assert (summary.cases_done, summary.cases_before) == (0, 3)
    assert duplicates(tmp_path / "cache") == 0


def test_other_bytes_behind_an_equal_size_and_time_are_noticed(tmp_path: Path) -> None:
    manifest, file = write_cases(tmp_path / "scans", 3, missing=False), tmp_path / "scans" / "1.nii"
    extract_small(manifest, tmp_path / "cache")
    before = file.stat()
    rewrite(file, 300.0, 2)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    summary = extract_small(manifest, tmp_path / "cache")
    assert (summary.cases_done, summary.changed) == (1, ("case01",))
    extract_small(manifest, tmp_path / "whole")
    assert content(tmp_path / "cache") == content(tmp_path / "whole")


def test_another_file_of_equal_size_and_time_in_its_place_is_noticed(tmp_path: Path) -> None:
    manifest, scans = write_cases(tmp_path / "scans", 14, missing=False), tmp_path / "scans"
    one, other = scans / "1.nii", scans / "7.nii"  # of two slices each
    os.utime(other, ns=(one.stat().st_atime_ns, one.stat().st_mtime_ns))
    few = scans / "few.csv"
    pl.read_csv(manifest).head(3).write_csv(few)
    extract_small(few, tmp_path / "cache")
    other.rename(one)
    assert extract_small(few, tmp_path / "cache").changed == ("case01",)


def test_files_that_were_touched_are_read_once_more_and_then_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedkit import sources

    manifest, read_volume = write_cases(tmp_path / "scans", 3, missing=False), sources.read_volume
    extract_small(manifest, tmp_path / "cache")
    read: list[str] = []

    def noted(path: Path | str, **options: Any) -> Any:
        read.append(Path(path).name)
        return read_volume(path, **options)

    monkeypatch.setattr(sources, "read_volume", noted)
    (tmp_path / "scans" / "1.nii").chmod(0o600)
    assert extract_small(manifest, tmp_path / "cache").cases_before == 3 and read == ["1.nii"]
    assert extract_small(manifest, tmp_path / "cache").cases_before == 3 and read == ["1.nii"]
    with (tmp_path / "cache" / "confirmed.jsonl").open("a") as file:
        file.write('{"case_id": "case01", "view"\n[]\n{"case_id": "case01", "view": "image", "bytes": "x"}\n')
    assert extract_small(manifest, tmp_path / "cache").cases_before == 3 and read == ["1.nii"]
    rewrite(tmp_path / "scans" / "1.nii", 300.0, 2)
    assert extract_small(manifest, tmp_path / "cache").changed == ("case01",)
    assert read == ["1.nii", "1.nii"] and duplicates(tmp_path / "cache") == 1


def test_a_source_that_changes_while_it_is_read_fails_and_is_read_again_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedkit import sources

    manifest, read_volume = write_cases(tmp_path / "scans", 3, missing=False), sources.read_volume

    def read_slowly(path: Path | str, **options: Any) -> Any:
        volume = read_volume(path, **options)
        if Path(path).name == "1.nii":
            rewrite(Path(path), 300.0, 2)
        return volume

    with monkeypatch.context() as patched:
        patched.setattr(sources, "read_volume", read_slowly)
        summary = extract_small(manifest, tmp_path / "cache")
    assert [failure.case_id for failure in summary.failures] == ["case01"]
    assert "changed while it was read; run the same command again" in summary.failures[0].reason
    assert extract_small(manifest, tmp_path / "cache").cases_done == 1
    extract_small(manifest, tmp_path / "whole")
    assert content(tmp_path / "cache") == content(tmp_path / "whole")
    assert read_failures(tmp_path / "cache").failures == ()


def test_two_extractions_at_once_make_one_right_cache(tmp_path: Path, warm: Warm) -> None:
    manifest = write_cases(tmp_path / "scans", 10)
    assert warm("two", manifest, tmp_path / "cache") == [0, 0]
    extract_small(manifest, tmp_path / "whole")
    assert content(tmp_path / "cache") == content(tmp_path / "whole")
    stored = [case for _, _, cases in finished(tmp_path / "cache").values() for case in cases]
    assert duplicates(tmp_path / "cache") == len(stored) - 10  # how many depends on who is first
    assert [failure.case_id for failure in read_failures(tmp_path / "cache").failures] == ["gone"]
    assert temporaries(tmp_path / "cache") == []


def extract_in_two(manifest: Path, cache: Path) -> list[int]:
    """The exit codes of two processes that extract to one cache at the same time."""
    children = [fork_extraction(manifest, cache, cache.parent / f"reads-{name}", die_at=None) for name in "ab"]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def serve() -> None:
    """Does the tasks that come as JSON lines: name and arguments; answers each with a line."""
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        task, manifest, place, *more = json.loads(line)
        if task == "extract":
            child = fork_work(partial(extract_as, more[0], Path(manifest), Path(place)), Path(place))
            answer: Any = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        elif task == "kill":
            answer = soak(Path(manifest), Path(place), int(more[0]), seed=int(more[0]))
        elif task == "two":
            answer = extract_in_two(Path(manifest), Path(place))
        else:
            answer = signal_program(Path(manifest), Path(place), [int(number) for number in more[1:]], Path(more[0]))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
