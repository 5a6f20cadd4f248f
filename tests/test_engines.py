"""Extraction shared out: parts of a manifest, processes on one machine, actors of a Ray cluster, and their losses."""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import shutil
import signal
import socket
import struct
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from embedkit import engines, rayengine
from embedkit.cache import create_cache, open_cache
from embedkit.engines import dispatch_cases
from embedkit.errors import BackboneError, CacheError, ExtractionError, OptionError, RecipeError, VolumeError
from embedkit.extraction import ExtractionProgress, ExtractionSummary, extract, extract_cases
from embedkit.failures import Stray, read_failures
from embedkit.ledger import MOST_LOSSES
from embedkit.manifest import read_manifest
from embedkit.orders import (
    Begin,
    Broken,
    Computed,
    Done,
    Drain,
    Drained,
    Event,
    Looked,
    Lost,
    Order,
    Quit,
    Ready,
    Stop,
    Wanted,
)
from embedkit.parts import take_part
from embedkit.pipeline import fail_case
from embedkit.planning import make_recipe
from embedkit.processes import ProcessTransport, split_devices
from embedkit.rayengine import RayTransport, share_cpus
from embedkit.sources import Case, group_cases
from embedkit.volumes import write_volume
from embedkit.worker import ExtractionJob, serve

OPTIONS: dict[str, Any] = {
    "backbone": "embedkit/scattering",
    "image_size": 32,
    "tokens": ["cls", "patch@2"],
    "preview": 8,
    "batch_size": 4,
}
AFFINE = np.array([[0.0, 0, -1, 0], [0, -1, 0, 0], [3, 0, 0, 0], [0, 0, 0, 1]])
CASES = 16
BAD = "case_05"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen cases of 3 to 7 slices (the first slice of each is blank); the file of `BAD` is no image."""
    folder = tmp_path_factory.mktemp("scans")
    generator, rows = np.random.default_rng(0), []
    for number in range(CASES):
        array = generator.normal(100, 30, (3 + number % 5, 20, 24)).astype(np.float32)
        array[0] = 0
        name = f"case_{number:02}"
        write_volume(folder / f"{name}.nii.gz", array, AFFINE)
        rows.append({"case_id": name, "path": f"{name}.nii.gz"})
    (folder / f"{BAD}.nii.gz").write_bytes(b"no image")
    pl.DataFrame(rows).write_csv(folder / "cases.csv")
    return folder / "cases.csv"


@pytest.fixture(scope="module")
def single(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache that one process makes of the manifest."""
    out = tmp_path_factory.mktemp("single") / "cache"
    extract(manifest, out, **OPTIONS)
    return out


def read_all(cache_path: Path) -> dict[str, np.ndarray]:
    with open_cache(cache_path) as cache:
        return {
            f"{case}/{name}": np.array(cache.read(stack, name))
            for stack, case in cache.stacks.select("stack", "case_id").iter_rows()
            for name in cache.token_sets
        }


def require_equal(cache_path: Path, single: Path) -> None:
    found, expected = read_all(cache_path), read_all(single)
    assert found.keys() == expected.keys()
    for name, tokens in expected.items():
        np.testing.assert_array_equal(found[name], tokens, err_msg=name)


def good_slices() -> int:
    return sum(3 + number % 5 for number in range(CASES) if f"case_{number:02}" != BAD)


# parts of a manifest


@given(st.integers(0, 60), st.integers(1, 70))
def test_parts_are_disjoint_balanced_and_together_everything(count: int, parts: int) -> None:
    taken = [take_part(range(count), f"{number}/{parts}") for number in range(1, parts + 1)]
    assert sorted(item for part in taken for item in part) == list(range(count))
    assert max(map(len, taken)) - min(map(len, taken)) <= 1
    assert all(part == sorted(part) for part in taken)


@pytest.mark.parametrize("text", ["", "3", "0/4", "5/4", "1/0", "-1/4", "1/4/2", "one/two", "1.5/3", " 1/2", "1/2\n"])
def test_a_part_without_meaning_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match=r"expected i/n with i from 1 to n, as 3/8"):
        take_part(range(10), text)


def test_parts_on_one_cache_make_the_cache_of_a_single_run(manifest: Path, single: Path, tmp_path: Path) -> None:
    parts = [extract(manifest, tmp_path / "cache", part=f"{number}/3", **OPTIONS) for number in (3, 1)]
    assert [(each.cases, each.cases_done, len(each.failures)) for each in parts] == [(5, 4, 1), (6, 6, 0)]
    rest = [extract(manifest, tmp_path / "cache", part=f"{number}/2", **OPTIONS) for number in (1, 2)]
    assert [(each.cases_before + len(each.failures) + each.cases_done) for each in rest] == [8, 8]
    assert sum(each.cases_done for each in rest) == 5
    require_equal(tmp_path / "cache", single)
    with open_cache(tmp_path / "cache") as cache:
        assert cache.duplicates.is_empty()


def test_an_empty_part_does_nothing_and_says_so(manifest: Path, tmp_path: Path) -> None:
    from embedkit.cli.main import app

    args = ["extract", str(manifest), "-o", str(tmp_path / "cache"), "--backbone", "embedkit/scattering"]
    done = CliRunner().invoke(app, [*args, "--image-size", "32", "--tokens", "cls", "--part", "20/20"])
    assert done.exit_code == 0
    assert "part 20/20 holds no case" in done.output
    assert "0 cases extracted" in done.output


# what may be asked for


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"part": "4/3"}, r"part is '4/3', expected i/n"),
        ({"engine": "dask"}, r"engine 'dask' is unknown; expected local or ray"),
        ({"ray_workers": 2}, r"the engine is local; use engine ray"),
        ({"device": "cpu,cuda:0"}, r"expected devices of one kind"),
        ({"device": "auto,auto"}, r"expected devices of one kind"),
        ({"device": "cpu,cuda:all"}, r"device is 'cpu,cuda:all', but cuda:all stands alone"),
        ({"device": " , "}, r"expected auto, cpu, cuda, cuda:all"),
        ({"engine": "ray", "device": "cuda:1"}, r"expected auto, cuda or cpu with engine ray"),
    ],
)
def test_an_option_without_meaning_is_refused(
    manifest: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        extract(manifest, tmp_path / "cache", **{**OPTIONS, **changes})
    assert not (tmp_path / "cache").exists()


def test_all_cuda_devices_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert split_devices("cuda:all") == ["cuda:0", "cuda:1", "cuda:2"]
    assert split_devices("cuda:0, cuda:2") == ["cuda:0", "cuda:2"]
    for mixed in ("cpu,cuda:all", "cuda:all, cuda:0", "cuda:all,cuda:all"):
        with pytest.raises(OptionError, match=r"stands alone for every CUDA device .*; name each one instead"):
            split_devices(mixed)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(OptionError, match="torch finds no CUDA device"):
        split_devices("cuda:all")


def test_without_ray_the_error_says_what_to_install(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OptionError, match=r"pip install 'embedkit\[ray\]'"):
        extract(manifest, tmp_path / "cache", engine="ray", **OPTIONS)


def test_a_cluster_that_does_not_answer_is_told_at_once(manifest: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OptionError, match=f"cannot reach Ray at {address}: .*refused; see `ray status`"):
            extract(manifest, tmp_path / "cache", engine="ray", ray_address=address, **OPTIONS)


@given(st.lists(st.integers(0, 70), min_size=1, max_size=6), st.none() | st.integers(1, 40))
def test_shares_of_cpus_fit_on_the_machines(node_cpus: list[int], workers: int | None) -> None:
    if (workers or 1) > sum(node_cpus):
        with pytest.raises(OptionError, match="the CPUs of the cluster"):
            share_cpus(node_cpus, workers)
        return
    count, each = share_cpus(node_cpus, workers)
    assert count == (workers or count) and each >= 1
    assert sum(cpus // each for cpus in node_cpus) >= count
    assert sum(cpus // (each + 1) for cpus in node_cpus) < count


def test_by_default_there_is_a_worker_per_four_cpus_and_at_least_one() -> None:
    assert share_cpus([16, 8], None) == (6, 4)
    assert share_cpus([2], None) == (1, 2)
    assert share_cpus([32], 1) == (1, 32)


def test_a_cluster_with_gpus_gets_an_actor_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 32.0, "GPU": 4.0}},
        {"Alive": True, "Resources": {"CPU": 16.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    fake = SimpleNamespace(nodes=lambda: nodes, remote=lambda **_: lambda actor: actor)
    monkeypatch.setattr(rayengine, "_connect", lambda _: (fake, False))
    assert [
        (transport.size, transport.name(0))
        for device, workers in [("auto", None), ("cuda", 3), ("cpu", None), ("cpu", 5)]
        for transport in [RayTransport(make_job(), device, address=None, workers=workers)]
    ] == [(4, "1 (Ray, cuda)"), (3, "1 (Ray, cuda)"), (12, "1 (Ray, cpu)"), (5, "1 (Ray, cpu)")]
    with pytest.raises(OptionError, match="5 Ray workers on CUDA are asked for, but the cluster has 4 GPUs"):
        RayTransport(make_job(), "auto", address=None, workers=5)


# sharing out, with workers whose every step is given


class ScriptedTransport:
    """Workers of one thread that settle a case as `behave` says; see `embedkit.orders.Transport`."""

    def __init__(self, size: int, behave: Callable[[int, Case, Begin], list[Event]], **recipe: Any) -> None:
        job = make_job()
        self.backbone, self.recipe = job.load(torch.device("cpu"))
        self.size, self.behave, self.changed = size, behave, recipe
        self.events: deque[tuple[int, Event]] = deque()
        self.given: list[tuple[int, str]] = []
        self.starts: list[int] = []
        self.begins: dict[int, Begin] = {}

    def name(self, number: int) -> str:
        return f"{number + 1} (scripted)"

    def start(self, number: int) -> None:
        self.starts.append(number)
        recipe = make_recipe(self.backbone.info, **self.changed) if number and self.changed else self.recipe
        self.events.append((number, Ready(recipe, 1, "host")))

    def send(self, number: int, order: Order) -> None:
        if isinstance(order, Begin):
            self.begins[number] = order
        elif isinstance(order, Case):
            self.given.append((number, order.case_id))
            events = self.behave(number, order, self.begins[number])
            self.events.extend((number, event) for event in events)
        elif isinstance(order, Drain | Stop):
            self.events.append((number, Drained({"backbone for slices": 0.5})))

    def poll(self, timeout_s: float) -> list[tuple[int, Event]]:
        assert self.events or timeout_s < 1
        return [self.events.popleft()] if self.events else []

    def kill(self, number: int) -> None:
        self.events = deque(each for each in self.events if each[0] != number)

    def close(self) -> None:
        self.events.clear()

    def write_all(self, cases: list[Case], cache: Path, *, batch_size: int) -> ExtractionSummary:
        """Extracts cases to disk."""
        cpu = torch.device("cpu")
        return extract_cases(cases, cache, self.backbone, self.recipe, device=cpu, batch_size=batch_size)

    def write(self, case: Case, begin: Begin) -> Done:
        """Extracts a case to disk, as a worker does."""
        summary = self.write_all([case], begin.cache, batch_size=4)
        return Done(case.case_id, summary.slices, summary.blank_slices, changed=False)


def make_job(**changes: Any) -> ExtractionJob:
    options: dict[str, Any] = {
        "backbone": "embedkit/scattering",
        "weights": None,
        "image_size": 32,
        "precision": "auto",
        "compiled": False,
        "recipe_options": {"tokens": ["cls", "patch@2"], "preview": 8, "channels": (), "window": "percentile:0.5:99.5"},
        "batch_size": 4,
        "workers": 2,
        "shard_bytes": 1 << 20,
        "shard_seconds": 60.0,
    }
    return ExtractionJob(**{**options, **changes})


def good_cases(manifest: Path) -> list[Case]:
    return [case for case in group_cases(read_manifest(manifest)) if case.case_id != BAD]


def test_who_asks_more_often_gets_more_cases(manifest: Path, single: Path, tmp_path: Path) -> None:
    def behave(number: int, case: Case, begin: Begin) -> list[Event]:
        done = transport.write(case, begin)
        return [done, Wanted()] if number == 1 else [done]  # the first worker is slow: it asks for no second case

    transport = ScriptedTransport(2, behave)
    slow: list[tuple[int, Event]] = []

    def poll(timeout_s: float) -> list[tuple[int, Event]]:
        if not transport.events and not slow:
            slow.append((0, Drained({})))
            return slow
        return [transport.events.popleft()] if transport.events else []

    transport.poll = poll  # type: ignore[method-assign]
    summary = dispatch_cases(good_cases(manifest), tmp_path / "cache", transport)
    shares = [sum(number == each for number, _ in transport.given) for each in (0, 1)]
    assert shares == [1, CASES - 2]
    assert (summary.cases_done, summary.slices, summary.blank_slices) == (CASES - 1, good_slices(), CASES - 1)
    assert summary.waits == {"backbone for slices": 0.5}
    require_equal(tmp_path / "cache", single)


def test_slices_of_cases_in_work_are_gathered(manifest: Path, tmp_path: Path) -> None:
    def behave(number: int, case: Case, begin: Begin) -> list[Event]:
        done = transport.write(case, begin)
        return [Computed(2), Computed(done.slices - done.blank_slices - 2), done, Wanted()]

    transport, seen = ScriptedTransport(1, behave), list[int]()
    summary = dispatch_cases(
        good_cases(manifest), tmp_path / "cache", transport, on_progress=lambda each: seen.append(each.slices)
    )
    assert seen[0] == 2 and sorted(seen) == seen and seen[-1] == summary.slices == good_slices()


def test_only_what_is_not_on_disk_is_done_again(manifest: Path, single: Path, tmp_path: Path) -> None:
    """The first worker says done of `case_00`, which it never writes, writes `case_01` untold, and is gone."""

    def behave(number: int, case: Case, begin: Begin) -> list[Event]:
        if transport.starts == [0] and case.case_id == "case_00":
            return [Done("case_00", 3, 1, changed=False), Wanted()]
        done = transport.write(case, begin)
        if transport.starts == [0]:
            return [Lost("killed in a test")]
        return [done, Wanted()]

    transport = ScriptedTransport(1, behave)
    notices: list[str] = []
    summary = dispatch_cases(good_cases(manifest), tmp_path / "cache", transport, on_notice=notices.append)
    given = [case_id for _, case_id in transport.given]
    assert given.count("case_00") == 2 and given.count("case_01") == 1
    assert notices == [
        "worker 1 (scripted) was lost (killed in a test), 1 cases taken back; another is started in its place"
    ]
    assert (summary.cases_done, summary.slices, summary.blank_slices) == (CASES - 1, good_slices(), CASES - 1)
    assert not summary.interrupted
    require_equal(tmp_path / "cache", single)


def test_copies_that_a_lost_worker_wrote_are_known_as_those_of_their_case(manifest: Path, tmp_path: Path) -> None:
    """The first worker writes the two copies of `case_00` untold, and is gone."""

    def behave(number: int, case: Case, begin: Begin) -> list[Event]:
        done = transport.write(case, begin)
        return [Lost("killed in a test")] if transport.starts == [0] else [done, Wanted()]

    transport = ScriptedTransport(1, behave)
    transport.recipe = replace(transport.recipe, augment="2")
    cases = good_cases(manifest)[:3]
    summary = dispatch_cases(cases, tmp_path / "cache", transport)
    assert [case_id for _, case_id in transport.given] == ["case_00", "case_01", "case_02"]
    assert (summary.cases_done, summary.slices, summary.blank_slices) == (3, 2 * (3 + 4 + 5), 2 * 3)
    create_cache(tmp_path / "alone", transport.recipe)
    transport.write_all(cases, tmp_path / "alone", batch_size=32)
    require_equal(tmp_path / "cache", tmp_path / "alone")
    assert open_cache(tmp_path / "cache").stacks["case_id"].to_list()[:3] == ["case_00#1", "case_00#2", "case_01#1"]


def test_a_case_that_takes_two_workers_down_is_put_on_record_and_the_others_land(
    manifest: Path, tmp_path: Path
) -> None:
    def behave(number: int, case: Case, begin: Begin) -> list[Event]:
        if case.case_id == "case_03":
            return [Lost("killed by SIGKILL")]
        return [transport.write(case, begin), Wanted()]

    transport = ScriptedTransport(2, behave)
    summary = dispatch_cases(good_cases(manifest), tmp_path / "cache", transport)
    assert [failure.case_id for failure in summary.failures] == ["case_03"]
    assert "2 workers were lost with this case in work, the last one: killed by SIGKILL" in summary.failures[0].reason
    assert [failure.case_id for failure in read_failures(tmp_path / "cache").failures] == ["case_03"]
    assert (summary.cases_done, summary.interrupted) == (CASES - 2, False)


class ForesightedTransport(ScriptedTransport):
    """Workers that have three cases before them while they work on the first, and are lost at `poison`."""

    def __init__(self, size: int, poison: str) -> None:
        super().__init__(size, lambda *_: [])
        self.poison = poison
        self.ahead: dict[int, deque[Case]] = {}
        self.at_loss: list[list[str]] = []

    def start(self, number: int) -> None:
        self.ahead[number] = deque()
        super().start(number)

    def send(self, number: int, order: Order) -> None:
        if isinstance(order, Case):
            self.ahead[number].append(order)
            if len(self.ahead[number]) == 3:
                self.work(number)
            self.tell(number, Wanted())
        elif isinstance(order, Drain | Stop):
            while self.ahead[number]:
                self.work(number)
            self.tell(number, Drained({}))
        else:
            super().send(number, order)

    def work(self, number: int) -> None:
        case = self.ahead[number].popleft()
        if case.case_id == self.poison:
            self.at_loss.append([case.case_id, *(each.case_id for each in self.ahead[number])])
            self.ahead[number].clear()
            self.tell(number, Lost("killed by SIGKILL"))
        else:
            self.tell(number, self.write(case, self.begins[number]))

    def tell(self, number: int, event: Event) -> None:
        if (number, Lost("killed by SIGKILL")) not in self.events:  # a lost worker tells no more
            self.events.append((number, event))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("poison", ["case_00", "case_03", "case_08"])
def test_cases_read_ahead_of_one_that_takes_workers_down_are_done(
    manifest: Path, tmp_path: Path, size: int, poison: str
) -> None:
    cases, transport = good_cases(manifest)[:8], ForesightedTransport(size, poison)
    summary = dispatch_cases(cases, tmp_path / "cache", transport)
    assert [failure.case_id for failure in summary.failures] == [poison]
    assert (summary.cases_done, summary.interrupted) == (7, False)
    assert transport.at_loss[-1] == [poison] and len(transport.at_loss) == MOST_LOSSES
    with open_cache(tmp_path / "cache") as cache:
        assert {*cache.stacks["case_id"]} == {case.case_id for case in cases} - {poison}


def test_strays_that_workers_saw_are_told_once_beside_all_cases_of_their_folder(manifest: Path, tmp_path: Path) -> None:
    cases = good_cases(manifest)[:3]
    strays = {name: Stray(name * 16, "damaged", path=str(manifest.parent / name)) for name in ("a", "b")}

    def behave(number: int, case: Case, begin: Begin) -> list[Event]:
        seen = [[strays["a"]]] if case.case_id == "case_00" else [[strays["a"]], [strays["b"]]]
        looked = Looked({manifest.parent: seen, tmp_path: [[strays["b"]]]})
        return [looked, transport.write(case, begin), Wanted()]

    transport = ScriptedTransport(1, behave)
    summary = dispatch_cases(cases, tmp_path / "cache", transport)
    beside = tuple(case.case_id for case in cases)
    assert summary.strays == tuple(replace(strays[name], beside=beside) for name in ("a", "b"))
    assert read_failures(tmp_path / "cache").strays == tuple(replace(each, path="") for each in summary.strays)


def test_what_a_lost_worker_wrote_is_changed_only_where_it_was_cached_from_other_bytes(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)

    def write(name: str) -> Path:
        path = tmp_path / f"{name}.nii.gz"
        write_volume(path, generator.normal(100, 30, (3, 20, 24)).astype(np.float32), AFFINE)
        return path

    def behave(number: int, case: Case, begin: Begin) -> list[Event]:
        transport.write(case, begin)
        return [Lost("killed in a test")]

    transport = ScriptedTransport(2, behave)
    before = [Case("rewritten", "p1", {"t1": write("a_t1")}), Case("grown", "p2", {"t1": write("b_t1")})]
    cache = tmp_path / "cache"
    create_cache(cache, transport.recipe)
    for case in before:
        transport.write(case, Begin(cache, transport.recipe, None))
    write("a_t1")
    grown = replace(before[1], images={**before[1].images, "t2": write("b_t2")})
    summary = dispatch_cases([before[0], grown], cache, transport)
    assert (summary.cases_done, summary.changed, summary.interrupted) == (2, ("rewritten",), False)


def test_the_record_of_a_lost_worker_keeps_nothing_that_a_library_says(manifest: Path, tmp_path: Path) -> None:
    cases = good_cases(manifest)[:2]
    paths = [path for case in cases for path in case.images.values()]

    def behave(number: int, case: Case, begin: Begin) -> list[Event]:
        if case.case_id == "case_01":
            return [Broken("OSError", None, found=f"cannot map {paths[0]} nor {paths[1]}")]
        return [Wanted()]

    notices: list[str] = []
    summary = dispatch_cases(cases, tmp_path / "cache", ScriptedTransport(2, behave), on_notice=notices.append)
    recorded = {failure.case_id: failure.reason for failure in read_failures(tmp_path / "cache").failures}
    assert "the last one: OSError; it may take" in recorded["case_01"]
    assert str(manifest.parent) not in (tmp_path / "cache" / "failures.jsonl").read_text()
    assert {failure.case_id: failure.reason for failure in summary.failures} == recorded
    assert f"was lost (OSError: cannot map {paths[0]} nor {paths[1]})" in notices[0]


def test_only_files_that_the_manifest_names_are_named_on_record(tmp_path: Path) -> None:
    for name in ("t1.nii", "t2.nii", "IM1", "IM10_DOE"):
        (tmp_path / name).touch()
    (tmp_path / "DOE").mkdir()
    names = ("t1.nii", "t2.nii", "IM1", "DOE", "gone.nii", "GONE_DOE")
    case = Case("c", "p", {name: tmp_path / name for name in names})

    def keep(name: str, view: str = "") -> str:
        error = VolumeError("damaged", file=tmp_path / name, view=view, found="DOE^JOHN")
        failed = fail_case(case, error)
        assert failed.told == f"{f'view {view}: ' if view else ''}{tmp_path / name}: damaged (DOE^JOHN)"
        return failed.kept

    assert keep("t2.nii", "t2.nii") == "view t2.nii: t2.nii: damaged"
    assert keep("t1.nii") == "t1.nii: damaged"
    assert keep("IM1") == "IM1: damaged"
    assert keep("IM10_DOE") == "one of its files: damaged"  # begins as IM1 does
    assert keep("DOE JOHN.dcm") == "one of its files: damaged"  # gone by now
    assert keep("DOE/0.dcm") == "one of its files: damaged"
    assert keep("DOE", "DOE") == "view DOE: its folder: damaged"
    assert keep("") == "its folder: damaged"
    assert keep("gone.nii") == "gone.nii: damaged"
    assert keep("GONE_DOE") == "its folder: damaged"  # may have been one
    paths = [fail_case(case, VolumeError("damaged", view=view)).path for view in ("", *names)]
    assert paths == ["", "t1.nii", "t2.nii", "IM1", "", "gone.nii", ""]


def test_workers_that_are_lost_again_and_again_end_the_call_with_the_reason(manifest: Path, tmp_path: Path) -> None:
    transport = ScriptedTransport(2, lambda *_: [Broken("RuntimeError: no memory", None)])
    with pytest.raises(ExtractionError, match=r"every worker was lost \(2, .* 15 of 15 cases are left.*no memory"):
        dispatch_cases(good_cases(manifest), tmp_path / "cache", transport)
    assert sorted(transport.starts) == [0, 0, 1, 1]


def test_an_error_that_stops_one_process_stops_all_with_the_finished_cases_kept(manifest: Path, tmp_path: Path) -> None:
    def behave(number: int, case: Case, begin: Begin) -> list[Event]:
        if case.case_id == "case_04":
            error = CacheError("cannot write shard: no space left")
            return [Broken(str(error), error)]
        return [transport.write(case, begin), Wanted()]

    transport = ScriptedTransport(2, behave)
    with pytest.raises(CacheError, match="no space left"):
        dispatch_cases(good_cases(manifest), tmp_path / "cache", transport)
    with open_cache(tmp_path / "cache") as cache:
        assert cache.stacks["case_id"].to_list() == ["case_00", "case_01", "case_02", "case_03", "case_06"]


def test_workers_of_different_recipes_are_refused_with_the_field(manifest: Path, tmp_path: Path) -> None:
    transport = ScriptedTransport(2, lambda *_: [], tokens=["cls", "patch@2"], preview=8, precision="bf16")
    with pytest.raises(RecipeError, match=r"worker 2 \(scripted\) on host has recipe .*precision is 'bf16' there"):
        dispatch_cases(good_cases(manifest), tmp_path / "cache", transport)


def test_a_stop_keeps_what_is_finished_and_says_so(manifest: Path, tmp_path: Path) -> None:
    stop = threading.Event()

    def after_three(progress: ExtractionProgress) -> None:
        if progress.cases_done == 3:
            stop.set()

    transport = ScriptedTransport(2, lambda _, case, begin: [transport.write(case, begin), Wanted()])
    summary = dispatch_cases(good_cases(manifest), tmp_path / "cache", transport, on_progress=after_three, stop=stop)
    assert summary.interrupted
    with open_cache(tmp_path / "cache") as cache:
        assert len(cache) >= 3 and len(cache) < CASES - 1


class AbsentTransport(ScriptedTransport):
    """Workers that find no room to start in, until `polls` polls have been made."""

    def __init__(self, size: int, polls: int, in_poll: Callable[[], None] = lambda: None) -> None:
        super().__init__(size, lambda _, case, begin: [self.write(case, begin), Wanted()])
        self.polls, self.in_poll = polls, in_poll
        self.killed: list[int] = []

    def poll(self, timeout_s: float) -> list[tuple[int, Event]]:
        self.polls -= 1
        self.in_poll()
        return [] if self.polls >= 0 else super().poll(timeout_s)

    def kill(self, number: int) -> None:
        self.killed.append(number)
        super().kill(number)


def test_a_stop_before_any_worker_has_started_ends_the_call(manifest: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    transport = AbsentTransport(2, 50, stop.set)
    summary = dispatch_cases(good_cases(manifest), tmp_path / "cache", transport, stop=stop)
    assert (summary.interrupted, summary.cases, summary.cases_done, summary.slices) == (True, CASES - 1, 0, 0)
    assert (summary.failures, summary.changed, summary.fingerprint) == ((), (), "")
    assert transport.killed == [0, 1]
    assert not (tmp_path / "cache").exists()


def test_a_long_wait_for_the_first_worker_is_told_once(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dispatch(name: str) -> list[str]:
        notices: list[str] = []
        summary = dispatch_cases(
            good_cases(manifest)[:3], tmp_path / name, AbsentTransport(2, 4), on_notice=notices.append
        )
        assert summary.cases_done == 3
        return notices

    assert dispatch("at_once") == []
    monkeypatch.setattr(engines, "_LONG_START_S", 0.0)
    assert dispatch("after_a_while") == ["still waiting for 2 workers to start"]


# one worker, spoken to directly


class QueueChannel:
    """A worker's end of two queues; see `embedkit.orders.Channel`."""

    def __init__(self) -> None:
        self.orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def send(self, event: Event) -> None:
        self.events.put(event)

    def receive(self) -> Order:
        order = self.orders.get()
        if order is None:
            raise EOFError
        return order


@pytest.fixture
def worker() -> Iterator[Callable[..., QueueChannel]]:
    """Starts a worker in a thread for a job."""
    started: list[tuple[threading.Thread, QueueChannel]] = []

    def start(job: ExtractionJob) -> QueueChannel:
        channel = QueueChannel()
        thread = threading.Thread(target=serve, args=(job, "cpu", None, channel))
        thread.start()
        started.append((thread, channel))
        return channel

    yield start
    for thread, channel in started:
        channel.orders.put(Quit())
        thread.join(30)
        assert not thread.is_alive()


def begin_work(channel: QueueChannel, cache: Path, probe: Path | None = None) -> None:
    ready = channel.events.get(timeout=30)
    assert isinstance(ready, Ready) and ready.pid == os.getpid()
    create_cache(cache, ready.recipe)
    channel.orders.put(Begin(cache, ready.recipe, probe))


def test_a_worker_keeps_its_shard_open_until_it_is_told_that_there_is_no_more(
    manifest: Path, tmp_path: Path, worker: Callable[..., QueueChannel]
) -> None:
    channel = worker(make_job())
    begin_work(channel, tmp_path / "cache", manifest)
    cases = good_cases(manifest)
    channel.orders.put(cases[0])
    told: list[Event] = []
    for case in [*cases[1:], None]:
        while not isinstance(event := channel.events.get(timeout=30), Wanted):
            told.append(event)
        channel.orders.put(Drain() if case is None else case)
    while not isinstance(event := channel.events.get(timeout=30), Drained):
        told.append(event)
    assert [each.case_id for each in told if isinstance(each, Done)] == [case.case_id for case in cases]
    assert len(list((tmp_path / "cache" / "shards").glob("*.h5"))) == 1


def test_a_worker_whose_line_is_cut_writes_what_it_has_finished(
    manifest: Path, tmp_path: Path, worker: Callable[..., QueueChannel]
) -> None:
    channel = worker(make_job())
    begin_work(channel, tmp_path / "cache")
    cases = good_cases(manifest)
    channel.orders.put(cases[0])
    for case in cases[1:6]:
        while not isinstance(channel.events.get(timeout=30), Wanted):
            continue
        channel.orders.put(case)
    channel.orders.put(None)
    while not isinstance(channel.events.get(timeout=30), Drained):
        continue
    with open_cache(tmp_path / "cache") as cache:
        assert 1 <= len(cache) <= 6


def test_a_worker_without_the_weights_or_the_cache_or_the_images_says_where(
    tmp_path: Path, worker: Callable[..., QueueChannel]
) -> None:
    weights = worker(make_job(weights=tmp_path / "missing.safetensors")).events.get(timeout=30)
    assert isinstance(weights, Broken) and isinstance(weights.error, BackboneError)
    assert "missing.safetensors do not exist on" in weights.found and "every machine" in weights.found

    channel = worker(make_job())
    begin_work(channel, tmp_path / "cache", tmp_path / "scan.nii.gz")
    images = channel.events.get(timeout=30)
    assert isinstance(images, Broken) and isinstance(images.error, VolumeError)
    assert "scan.nii.gz: does not exist on" in images.found and "under the same path" in images.found

    channel = worker(make_job())
    ready = channel.events.get(timeout=30)
    assert isinstance(ready, Ready)
    channel.orders.put(Begin(tmp_path / "elsewhere", ready.recipe, None))
    cache = channel.events.get(timeout=30)
    assert isinstance(cache, Broken) and isinstance(cache.error, CacheError)
    assert "elsewhere does not exist on" in cache.found


def test_what_a_worker_did_not_foresee_is_told_and_is_no_error_of_the_call(
    worker: Callable[..., QueueChannel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: ExtractionJob, device: torch.device) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ExtractionJob, "load", load)
    event = worker(make_job()).events.get(timeout=30)
    assert isinstance(event, Broken) and event.error is None
    assert (event.reason, event.found) == ("OutOfMemoryError", "CUDA out of memory")


# real processes and a real cluster


def test_a_process_killed_in_the_middle_of_a_message_is_lost_and_no_error_of_the_call() -> None:
    transport = ProcessTransport(make_job(), ["cpu"])
    here, there = multiprocessing.Pipe()
    os.write(there.fileno(), struct.pack("!i", 1000) + b"the first bytes of a thousand")
    there.close()
    transport._workers[0] = (SimpleNamespace(join=lambda _: None, exitcode=-signal.SIGKILL), here)  # type: ignore[assignment]
    assert transport.poll(1.0) == [(0, Lost("killed by SIGKILL, as the kernel does when memory runs out"))]
    assert transport.poll(0.0) == []


def extract_with_a_kill(
    manifest: Path, out: Path, monkeypatch: pytest.MonkeyPatch, transport: type, **options: Any
) -> tuple[ExtractionSummary, list[str]]:
    """Extracts, kills one worker once five cases are settled, and gives the notices of lost workers as well."""
    pids: dict[int, int] = {}
    receive, notices = transport._receive, []

    def spy(self: Any, number: int, *rest: Any) -> list[Event]:
        events: list[Event] = receive(self, number, *rest)
        pids.update((number, event.pid) for event in events if isinstance(event, Ready))
        return events

    def kill_one(progress: ExtractionProgress) -> None:
        if progress.cases_done >= 5 and not killed:
            killed.append(next(iter(pids.values())))
            os.kill(killed[0], signal.SIGKILL)

    killed: list[int] = []
    monkeypatch.setattr(transport, "_receive", spy)
    summary = extract(manifest, out, on_progress=kill_one, on_notice=notices.append, **OPTIONS, **options)
    assert killed and killed[0] != os.getpid()
    return summary, [notice for notice in notices if " was lost " in notice]  # not that a busy machine starts slowly


def require_whole(summary: ExtractionSummary, cache: Path, single: Path) -> None:
    assert [failure.case_id for failure in summary.failures] == [BAD]
    assert (summary.cases_done, summary.slices, summary.blank_slices) == (CASES - 1, good_slices(), CASES - 1)
    assert not summary.interrupted
    require_equal(cache, single)


def test_a_process_killed_half_way_loses_nothing_and_is_reported(
    manifest: Path, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cache"
    summary, notices = extract_with_a_kill(manifest, out, monkeypatch, ProcessTransport, device="cpu,cpu")
    require_whole(summary, out, single)
    assert len(notices) == 1
    assert "(cpu) was lost (killed by SIGKILL, as the kernel does when memory runs out)" in notices[0]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster of two CPUs on this machine; its sockets need a short path."""
    for name, value in {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}.items():
        monkeypatch.setenv(name, value)
    import ray

    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    before = signal.getsignal(signal.SIGTERM)
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        object_store_memory=80 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=folder,
    )
    yield ray
    ray.shutdown()
    signal.signal(signal.SIGTERM, before)
    gc.collect()  # what Ray left open is warned of here, not in another test
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning",
    r"ignore:subprocess \d+ is still running:ResourceWarning",
    "ignore:Tip. In future versions of Ray:FutureWarning",
)
def test_an_actor_killed_half_way_loses_nothing_and_a_second_run_repeats_nothing(
    manifest: Path, single: Path, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cache"
    options = {"engine": "ray", "ray_workers": 2}
    summary, notices = extract_with_a_kill(manifest, out, monkeypatch, RayTransport, **options)
    require_whole(summary, out, single)
    assert len(notices) == 1 and "(Ray, cpu) was lost (" in notices[0]
    shards = sorted((out / "shards").iterdir())
    again = extract(manifest, out, engine="ray", ray_workers=1, **OPTIONS)
    assert (again.cases_before, again.cases_done, again.slices) == (CASES - 1, 0, 0)
    assert [failure.case_id for failure in again.failures] == [BAD]
    assert sorted((out / "shards").iterdir()) == shards
    assert cluster.is_initialized()
    with pytest.raises(OptionError, match=r"3 Ray workers are asked for, expected 1 to 2, the CPUs of the cluster"):
        extract(manifest, out, engine="ray", ray_workers=3, **OPTIONS)
    with pytest.raises(OptionError, match=r"Ray workers on CUDA are asked for, but the cluster has 0 GPUs"):
        extract(manifest, out, engine="ray", device="cuda", **OPTIONS)
