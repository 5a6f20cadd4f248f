"""The explore page's server: what it tells, whom it refuses, and what it takes of a new scan."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
from starlette.testclient import TestClient

import embedkit
from embedkit.cohort import Subject, column_kind, open_cohort
from embedkit.errors import OptionError, RecipeError, RequestError, SearchError, VolumeError
from embedkit.overlays import BoundedStore
from embedkit.projection import list_projections, project_vectors
from embedkit.queryjob import QueryDesk
from embedkit.retrieval import open_index
from embedkit.runs import open_run
from embedkit.serving import serve
from embedkit.uploads import Upload
from embedkit.webapp import make_app

if TYPE_CHECKING:
    from conftest import Explored

TOKEN = "a-token-for-tests"
ORIGIN = "http://127.0.0.1:8000"
LIMIT = 3_000_000


@pytest.fixture(scope="module")
def desk(explored: Explored) -> Iterator[QueryDesk]:
    with QueryDesk(open_index(explored.index), limit_bytes=LIMIT, device="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def stranger(explored: Explored, desk: QueryDesk) -> TestClient:
    """A client that was not given the token."""
    cohort = open_cohort(explored.cache, explored.index, explored.runs)
    return TestClient(make_app(cohort, desk, token=TOKEN), base_url=ORIGIN, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(stranger: TestClient) -> TestClient:
    page = TestClient(stranger.app, base_url=ORIGIN, raise_server_exceptions=False)
    assert "embedkit" in page.get("/", params={"token": TOKEN}).text
    return page


def ask(client: TestClient, path: str, code: int = 200, **parameters: object) -> Any:
    response = client.get(path, params={name: str(value) for name, value in parameters.items()})
    assert response.status_code == code, response.text
    return response.json()


# ---- who may ask ----


@pytest.mark.parametrize("path", ["/", "/static/main.js", "/api/cohort", "/api/case?case=phantom_001", "/?token=wrong"])
def test_who_lacks_the_token_is_shown_nothing(stranger: TestClient, path: str) -> None:
    response = stranger.get(path)
    assert response.status_code == 403
    assert "embedkit serve printed" in response.text and "phantom" not in response.text.replace(path, "")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::bad"])
def test_a_name_that_was_rebound_to_this_machine_is_refused(client: TestClient, host: str) -> None:
    response = client.get("/api/cohort", headers={"host": host})
    assert response.status_code == 421 and "127.0.0.1 and localhost only" in response.json()["error"]


def test_an_ssh_tunnel_under_another_port_works(stranger: TestClient) -> None:
    tunnel = TestClient(stranger.app, base_url="http://localhost:9999")
    assert tunnel.get("/", params={"token": TOKEN}).status_code == 200
    assert tunnel.get("/api/cohort").status_code == 200


@pytest.mark.parametrize(
    "headers", [{"origin": "http://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}]
)
def test_another_page_in_the_same_browser_changes_nothing(client: TestClient, headers: dict[str, str]) -> None:
    response = client.post("/api/upload", json={"view": None, "sizes": [1]}, headers=headers)
    assert response.status_code == 403 and "did not come from the page itself" in response.json()["error"]


def test_the_browser_is_forbidden_every_request_elsewhere(client: TestClient) -> None:
    for path in ("/", "/static/main.js", "/api/cohort", "/api/case?case=nobody"):
        headers = client.get(path).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "http" not in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store" and headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers


def test_no_asset_names_another_origin() -> None:
    static = Path(embedkit.__file__).parent / "static"
    files = sorted(static.iterdir())
    assert {"index.html", "main.js", "style.css"} <= {file.name for file in files}
    for file in files:
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text and "innerHTML" not in text, file.name


@pytest.mark.parametrize(
    "path", ["/static/../webapp.py", "/static/%2e%2e/webapp.py", "/static/..%2fwebapp.py", "/nothing"]
)
def test_what_is_no_asset_is_not_found(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 404 and "error" in response.json()


def test_an_unforeseen_error_is_told_without_its_insides(
    explored: Explored, desk: QueryDesk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cohort = open_cohort(explored.cache, explored.index)
    monkeypatch.setattr(cohort, "describe", lambda: 1 / 0)
    page = TestClient(make_app(cohort, desk, token=TOKEN), base_url=ORIGIN, raise_server_exceptions=False)
    page.get("/", params={"token": TOKEN})
    response = page.get("/api/cohort")
    assert response.status_code == 500
    assert response.json()["error"] == "unforeseen ZeroDivisionError; the terminal of embedkit serve says more"
    assert "ZeroDivisionError" in caplog.text


# ---- the cohort ----


def test_the_cohort_is_told_without_patients_or_paths(client: TestClient, explored: Explored) -> None:
    told = client.get("/api/cohort").text + client.get("/api/case", params={"case": "phantom_003"}).text
    told += client.get("/api/neighbours", params={"case": "phantom_003"}).text
    assert "phantom_003" in told and "lesion.logistic" in told
    assert "patient_0" not in told and str(explored.cache.parent) not in told


def test_columns_are_those_of_the_labels_and_what_each_run_said_out_of_fold(
    client: TestClient, explored: Explored
) -> None:
    labels = pl.read_csv(explored.labels)
    cohort = ask(client, "/api/cohort")
    kinds = {column["name"]: column["kind"] for column in cohort["columns"]}
    assert kinds["lesion"] == "category" and kinds["side"] == "category" and kinds["volume_mm3"] == "number"
    column = ask(client, "/api/column", name="side")
    assert dict(zip(cohort["cases"], column["values"], strict=True)) == dict(
        labels.select("case_id", "side").iter_rows()
    )
    said = ask(client, "/api/column", name="lesion.logistic (out of fold)")["values"]
    run = open_run(next(path for path in explored.runs if path.name == "lesion.logistic"))
    expected = dict(run.predictions.select("case_id", "score").iter_rows())
    assert dict(zip(cohort["cases"], said, strict=True)) == pytest.approx(expected)
    assert (
        "there is no column 'patient_id'; there are lesion"
        in ask(client, "/api/column", 404, name="patient_id")["error"]
    )


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2, 1, None], "category"),
        (list(range(9)), "number"),
        ([0.5, 0.25], "number"),
        (["a", "b"], "category"),
        ([f"name {number}" for number in range(41)], "text"),
        ([None], "category"),
    ],
)
def test_a_column_is_a_number_a_category_or_text(values: list[Any], kind: str) -> None:
    assert column_kind(pl.Series(values)) == kind


def test_a_filter_allows_what_polars_allows_and_a_wrong_one_is_explained(
    client: TestClient, explored: Explored
) -> None:
    labels = pl.read_csv(explored.labels)
    cases = ask(client, "/api/cohort")["cases"]
    allowed = ask(client, "/api/filter", where="lesion = 1 AND volume_mm3 > 20000")["allowed"]
    expected = labels.filter((pl.col("lesion") == 1) & (pl.col("volume_mm3") > 20000))["case_id"]
    assert sorted(cases[row] for row in allowed) == sorted(expected) and 0 < len(expected) < len(cases)
    assert len(ask(client, "/api/filter")["allowed"]) == len(cases)
    assert "lesoin" in ask(client, "/api/filter", 400, where="lesoin = 1")["error"]
    assert "write an SQL condition over" in ask(client, "/api/filter", 400, where="lesion = = 1")["error"]


@pytest.mark.parametrize("case", ["nobody", "../../../etc/passwd", "", "phantom_001\0"])
def test_an_id_is_looked_up_and_never_a_path(client: TestClient, case: str) -> None:
    for path in ("/api/case", "/api/neighbours", "/api/preview?view=ct/axial", "/api/overlay?run=lesion.logistic"):
        parameters = dict(part.split("=") for part in path.partition("?")[2].split("&") if part)
        assert "there is no case" in ask(client, path.partition("?")[0], 404, case=case, **parameters)["error"]
    assert ask(client, "/api/case", 400)["error"] == "the address lacks case=..."


def test_a_case_tells_its_labels_stacks_and_what_runs_said_of_it_out_of_fold(
    client: TestClient, explored: Explored
) -> None:
    told = ask(client, "/api/case", case="phantom_001")
    labels = (
        pl.read_csv(explored.labels).drop("patient_id").row(by_predicate=pl.col("case_id") == "phantom_001", named=True)
    )
    assert told["labels"] | {"case_id": "phantom_001"} == labels
    (stack,) = told["stacks"]
    assert (stack["view"], stack["slices"], stack["preview"]) == ("ct/axial", 4, 32)
    assert stack["image"] == [0, 0, 1, 1]
    assert len(stack["indices"]) == len(stack["positions_mm"]) == len(stack["blank"]) == 4
    said = {each["run"]: each for each in told["predictions"]}["lesion.logistic"]
    run = open_run(next(path for path in explored.runs if path.name == "lesion.logistic"))
    row = run.predictions.row(by_predicate=pl.col("case_id") == "phantom_001", named=True)
    assert (said["source"], said["folds"], said["truth"]) == ("out_of_fold", [row["fold"]], labels["lesion"])
    assert said["scores"] == [{"name": "score", "value": pytest.approx(row["score"])}]
    assert said["probability"] == pytest.approx(max(row["score"], 1 - row["score"]))
    assert said["answer"].startswith(f"lesion = {int(row['score'] >= 0.5)}")


def test_a_case_that_no_fold_tested_is_said_to_be_new_or_seen(explored: Explored) -> None:
    cohort = open_cohort(explored.cache, explored.index, explored.runs)
    run = cohort.runs["lesion.logistic"]
    subject = cohort.subject("phantom_001")
    patient = cohort.cache.stacks.row(by_predicate=pl.col("case_id") == "phantom_001", named=True)["patient_id"]
    others = run.predictions.filter(pl.col("patient_id") != patient)
    object.__setattr__(run, "predictions", others)
    (said,) = [each for each in cohort.predictions(subject) if each["run"] == "lesion.logistic"]
    expected = embedkit.predict(run, cohort.cache, case_ids=["phantom_001"], device="cpu")["score"][0]
    assert (said["source"], said["folds"]) == ("ensemble", [])
    assert said["scores"][0]["value"] == pytest.approx(expected)
    run.record.cases["untested_patients"] = [patient]
    (said,) = [each for each in cohort.predictions(subject) if each["run"] == "lesion.logistic"]
    assert said["source"] == "seen"


def test_a_run_that_does_not_know_the_view_says_so_beside_the_others(explored: Explored, tmp_path: Path) -> None:
    table = embedkit.read_manifest(explored.scans / "manifest.csv").head(2).with_columns(view=pl.lit("mr"))
    embedkit.extract(
        table, tmp_path / "cache", backbone="embedkit/scattering", slices="count:4", image_size=64, preview=32
    )
    cohort = open_cohort(explored.cache, explored.index, explored.runs)
    with embedkit.open_cache(tmp_path / "cache") as cache:
        new = Subject(cache, "phantom_001", "new scan", np.zeros(1, np.float32))
        said = cohort.predictions(new)
    assert len(said) == 2 and all("needs one or more of the views ct/axial" in each["answer"] for each in said)
    assert [each["probability"] for each in said] == [None, None]


def test_previews_are_the_bytes_of_the_cache(client: TestClient, explored: Explored) -> None:
    with embedkit.open_cache(explored.cache) as cache:
        stack = int(cache.stacks.filter(pl.col("case_id") == "phantom_002")["stack"][0])
        previews = np.array(cache.preview(stack))
    where = {"case": "phantom_002", "view": "ct/axial"}
    assert client.get("/api/preview", params=where).content == previews.tobytes()
    assert client.get("/api/preview", params={**where, "row": 2}).content == previews[2].tobytes()
    assert (
        "row is '4', expected a whole number from 0 to 3" in ask(client, "/api/preview", 400, **where, row=4)["error"]
    )
    assert (
        "has no view 'mr/axial'; it has ct/axial"
        in ask(client, "/api/preview", 404, case="phantom_002", view="mr/axial")["error"]
    )


def test_a_cache_without_previews_says_so(explored: Explored, desk: QueryDesk, tmp_path: Path) -> None:
    table = embedkit.read_manifest(explored.scans / "manifest.csv").head(4)
    embedkit.extract(
        table, tmp_path / "cache", backbone="embedkit/scattering", slices="count:2", image_size=64, preview=0
    )
    embedkit.build_index(tmp_path / "cache", tmp_path / "index")
    cohort = open_cohort(tmp_path / "cache", tmp_path / "index")
    page = TestClient(make_app(cohort, desk, token=TOKEN), base_url=ORIGIN)
    page.get("/", params={"token": TOKEN})
    assert ask(page, "/api/case", case="phantom_001")["stacks"][0]["preview"] is None
    assert ask(page, "/api/neighbours", case="phantom_001")["neighbours"][0]["thumbnail"] is None
    refused = page.get("/api/preview", params={"case": "phantom_001", "view": "ct/axial"})
    assert refused.status_code == 404 and "extract with --preview" in refused.json()["error"]


@pytest.mark.parametrize("gone", [True, False])
def test_a_cache_that_goes_or_changes_while_it_is_served_is_named(
    explored: Explored, desk: QueryDesk, tmp_path: Path, gone: bool
) -> None:
    for name in ("cache", "index"):
        shutil.copytree(getattr(explored, name), tmp_path / name)
    cohort = open_cohort(tmp_path / "cache", tmp_path / "index")
    cohort.cache.close()  # whatever is mapped already stays readable
    page = TestClient(make_app(cohort, desk, token=TOKEN), base_url=ORIGIN)
    page.get("/", params={"token": TOKEN})
    for shard in (tmp_path / "cache" / "shards").iterdir():
        shard.unlink() if gone else shard.write_bytes(shard.read_bytes()[:-1])
    shutil.rmtree(tmp_path / "index")
    assert len(ask(page, "/api/cohort")["cases"]) == 12  # the table of cases was read at the start
    told = ask(page, "/api/compare", 400, case="phantom_001", **{"with": "phantom_002"})["error"]
    expected = "cannot map shard: .*: No such file" if gone else "changed since the cache was opened: it has"
    assert re.search(expected, told) and ".h5" in told


def test_neighbours_are_those_of_search(client: TestClient, explored: Explored) -> None:
    options: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"k": 3, "where": "lesion = 1"}, {"k": 3, "where": "lesion = 1"}),
        ({"exclude_same_patient": 1}, {"exclude_same": "patient_id"}),
    ]
    for asked, given in options:
        found = ask(client, "/api/neighbours", case="phantom_003", **asked)["neighbours"]
        expected = embedkit.search(explored.index, case_id="phantom_003", **given)
        assert [each["case_id"] for each in found] == expected["case_id"].to_list()
        assert [each["similarity"] for each in found] == pytest.approx(expected["similarity"].to_list())
    patients = dict(pl.read_csv(explored.labels).select("case_id", "patient_id").iter_rows())
    every = ask(client, "/api/neighbours", case="phantom_003", k=20)["neighbours"]
    assert {each["case_id"]: each["same_patient"] for each in every} == {
        case: patient == patients["phantom_003"] for case, patient in patients.items() if case != "phantom_003"
    }
    assert any(each["same_patient"] for each in every)
    assert "k is '0', expected" in ask(client, "/api/neighbours", 400, case="phantom_003", k=0)["error"]
    assert "lesoin" in ask(client, "/api/neighbours", 400, case="phantom_003", where="lesoin = 1")["error"]


def test_a_heatmap_is_the_evidence_of_the_fold_model_that_never_saw_the_case(
    client: TestClient, explored: Explored
) -> None:
    path = next(path for path in explored.runs if path.name == "lesion.raptor")
    with embedkit.open_cache(explored.cache) as cache:
        evidence = open_run(path).find_evidence(cache, "phantom_001", held_out=True)
    scores = np.maximum(evidence.scores["ct/axial"], 0)
    told = ask(client, "/api/overlay", case="phantom_001", run="lesion.raptor")
    view = told["views"]["ct/axial"]
    heat = np.frombuffer(base64.b64decode(view["heat"]), np.uint8).reshape(scores.shape)
    assert told["held_out"] and told["answer"] == evidence.answer and view["grid"] == list(scores.shape[1:])
    np.testing.assert_array_equal(heat, np.round(scores / scores.max() * 255))
    assert view["weights"] == pytest.approx((scores.sum((1, 2)) / scores.sum()).tolist(), abs=1e-4)
    against = ask(client, "/api/overlay", case="phantom_001", run="lesion.raptor", **{"class": "0"})
    assert against["views"]["ct/axial"]["heat"] != view["heat"]
    assert (
        "no class '7'"
        in ask(client, "/api/overlay", 400, case="phantom_001", run="lesion.raptor", **{"class": "7"})["error"]
    )
    assert (
        "there is no run 'x'; there are lesion.logistic"
        in ask(client, "/api/overlay", 404, case="phantom_001", run="x")["error"]
    )


def test_what_was_made_is_kept_within_a_bound() -> None:
    store, made = BoundedStore(10), []

    def make(name: str) -> str:
        return str(store.get(name, lambda: made.append(name) or name, lambda _: 4))

    assert [make(name) for name in ("a", "b", "a", "c", "a", "b")] == ["a", "b", "a", "c", "a", "b"]
    assert made == ["a", "b", "c", "b"] and store.bytes == 8  # b was the longest unused when c came


def test_matched_slices_are_those_most_alike(client: TestClient, explored: Explored) -> None:
    told = ask(client, "/api/compare", case="phantom_003", **{"with": "phantom_004"})
    view = told["views"]["ct/axial"]
    assert view["rows"] == [0, 1, 2, 3] and set(view["matches"]) <= {0, 1, 2, 3}
    assert told["embedding"] == "grid:patch@4:2" and told["patches"]
    assert told["similarity"] == pytest.approx(np.mean(view["similarities"]), abs=1e-3)
    near = ask(client, "/api/neighbours", case="phantom_003")["neighbours"]
    (similar,) = [row["similarity"] for row in near if row["case_id"] == "phantom_004"]
    assert told["similarity"] == pytest.approx(similar, abs=2e-3)
    itself = ask(client, "/api/compare", case="phantom_003", **{"with": "phantom_003"})["views"]["ct/axial"]
    assert itself["matches"] == [0, 1, 2, 3] and itself["similarities"] == pytest.approx([1] * 4, abs=1e-3)
    heat = ask(client, "/api/heat", case="phantom_003", **{"with": "phantom_003", "view": "ct/axial", "row": 1})
    assert (heat["match"], heat["grid"], heat["low"]) == (1, [4, 4], 0)
    assert heat["similarity"] == pytest.approx(1)
    parts = np.frombuffer(base64.b64decode(heat["query"]), np.uint8)
    assert parts.size == 16 and parts.max() == 255 and heat["query"] == heat["other"]
    assert heat["high"] * parts.sum() / 255 == pytest.approx(1, abs=0.15)  # what is below 0 is shown as 0
    assert (
        "no slice 9"
        in ask(client, "/api/heat", 404, case="phantom_003", **{"with": "phantom_003", "view": "ct/axial", "row": 9})[
            "error"
        ]
    )


# ---- the map ----


def test_the_map_lays_out_the_vectors_of_the_index(client: TestClient, explored: Explored) -> None:
    told = ask(client, "/api/map")
    expected = project_vectors(np.asarray(open_index(explored.index).read_vectors()))
    np.testing.assert_allclose(np.stack([told["x"], told["y"]], 1), expected, atol=1e-6)
    assert (
        "no projection 'sphere'; expected one of pca, tsne"
        in ask(client, "/api/map", 400, projection="sphere")["error"]
    )


def test_pca_keeps_the_two_directions_of_most_variance() -> None:
    angles = np.linspace(0, 1, 50)
    vectors = np.stack([np.cos(angles), np.sin(angles), np.zeros(50), 0.01 * np.cos(40 * angles)], 1).astype(np.float32)
    places = project_vectors(vectors, "pca")
    assert places.shape == (50, 2) and np.abs(places).max() == pytest.approx(1)
    assert np.all(np.diff(places[:, 0]) > 0) or np.all(np.diff(places[:, 0]) < 0)


@pytest.mark.parametrize("projection", ["pca", "tsne"])
def test_two_groups_stay_apart_on_the_map_and_the_map_is_the_same_every_time(projection: str) -> None:
    draw = np.random.default_rng(0)
    centres = np.repeat(np.eye(2, 16), 20, axis=0)
    vectors = (centres + 0.05 * draw.normal(size=(40, 16))).astype(np.float32)
    places = project_vectors(vectors, projection)
    np.testing.assert_array_equal(places, project_vectors(vectors, projection))
    inner = np.linalg.norm(places[:20] - places[:20].mean(0), axis=1).max()
    assert np.linalg.norm(places[:20].mean(0) - places[20:].mean(0)) > 2 * inner


def test_a_map_reads_a_memory_map_of_many_cases_in_batches(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    vectors = np.lib.format.open_memmap(tmp_path / "vectors.npy", "w+", np.float16, (3000, 8))
    vectors[:] = np.repeat(np.eye(2, 8), 1500, axis=0) + 0.05 * draw.normal(size=(3000, 8))
    asked: list[int] = []

    class Watched:
        """Tells how many rows are asked for at once."""

        shape = vectors.shape

        def __len__(self) -> int:
            return len(vectors)

        def __getitem__(self, rows: Any) -> Any:
            asked.append(len(vectors[rows]))
            return vectors[rows]

    places = project_vectors(Watched())  # type: ignore[arg-type]
    assert max(asked) == 1024 and places.shape == (3000, 2)
    np.testing.assert_array_equal(places, project_vectors(vectors))
    first, second = places[:1500, 0], places[1500:, 0]
    assert first.max() < second.min() or second.max() < first.min()


@pytest.mark.parametrize("cases", [1, 2, 3])
def test_a_map_of_a_few_cases_sets_them_side_by_side(cases: int) -> None:
    places = project_vectors(np.eye(3, dtype=np.float32)[:cases])
    assert np.isfinite(places).all() and len(np.unique(places[:, 0])) == cases


def test_umap_is_offered_where_it_is_installed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    monkeypatch.setattr("embedkit.projection.find_spec", lambda _: None)
    assert list_projections() == ["pca", "tsne"]
    with pytest.raises(OptionError, match=r"pip install 'embedkit\[umap\]'"):
        project_vectors(np.eye(5, dtype=np.float32), "umap")

    class Umap:
        def __init__(self, **options: object) -> None:
            assert options == {"n_neighbors": 4, "metric": "cosine", "random_state": 0}

        def fit_transform(self, vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            return vectors[:, :2]

    module = types.ModuleType("umap")
    module.UMAP = Umap  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "umap", module)
    monkeypatch.setattr("embedkit.projection.find_spec", lambda _: True)
    assert list_projections() == ["pca", "umap", "tsne"]
    assert project_vectors(np.eye(5, dtype=np.float32), "umap").shape == (5, 2)


def test_too_many_cases_for_tsne_are_refused() -> None:
    with pytest.raises(OptionError, match="t-SNE takes too long for 20001 cases, at most 20000; use pca or umap"):
        project_vectors(np.ones((20_001, 2), np.float32), "tsne")


# ---- a new scan ----


def send(client: TestClient, files: dict[str, bytes], code: int = 202, patient: str | None = None) -> Any:
    """Sends files as the page does; gives the job once it is done, or the answer that refused it."""
    announced = {"view": None, "sizes": [len(each) for each in files.values()], "patient": patient}
    opened = client.post("/api/upload", json=announced)
    if opened.status_code != 201:
        assert opened.status_code == code, opened.text
        return opened.json()
    key = opened.json()["upload"]
    for name, content in files.items():
        sent = client.post(f"/api/upload/{key}/file", params={"name": name}, content=content)
        if sent.status_code != 200:
            assert sent.status_code == code, sent.text
            return sent.json()
    started = client.post(f"/api/upload/{key}/start")
    assert started.status_code == code, started.text
    while (job := client.get(f"/api/upload/{key}").json())["state"] in ("receiving", "running"):
        time.sleep(0.02)
    return job


def pack(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return packed.getvalue()


def dicom_files(explored: Explored) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((explored.scans / "volumes" / "phantom_000").iterdir())}


def nearest(client: TestClient, job: dict[str, Any]) -> tuple[str, float]:
    found = ask(client, "/api/neighbours", upload=job["upload"], k=1)["neighbours"][0]
    return found["case_id"], found["similarity"]


def test_a_new_scan_finds_itself_and_can_be_looked_at_like_a_case(
    client: TestClient, explored: Explored, desk: QueryDesk
) -> None:
    job = send(client, {"../../scan of Mrs X.nii.gz": (explored.scans / "volumes" / "phantom_001.nii.gz").read_bytes()})
    assert (job["state"], job["error"], job["done"], job["total"]) == ("done", "", 4, 4)
    case, similarity = nearest(client, job)
    assert case == "phantom_001" and similarity == pytest.approx(1, abs=1e-3)
    told = ask(client, "/api/case", upload=job["upload"])
    assert told["labels"] == {} and told["stacks"][0]["slices"] == 4
    assert {said["source"] for said in told["predictions"]} == {"new_image"}
    assert told["predictions"][0]["truth"] is None
    here = {"upload": job["upload"], "view": "ct/axial"}
    there = {"case": "phantom_001", "view": "ct/axial"}
    assert client.get("/api/preview", params=here).content == client.get("/api/preview", params=there).content
    overlay = ask(client, "/api/overlay", upload=job["upload"], run="lesion.raptor")
    assert not overlay["held_out"] and overlay["views"]["ct/axial"]["weights"]
    view = ask(client, "/api/compare", upload=job["upload"], **{"with": "phantom_001"})["views"]["ct/axial"]
    assert view["matches"] == [0, 1, 2, 3]
    names = [path.name for path in desk.folder.rglob("*")]
    assert not [name for name in names if "Mrs" in name or name.startswith("part-")], "the scan itself is gone"


def test_the_patient_of_a_new_scan_may_be_told_and_is_then_left_out_and_known_to_runs(
    client: TestClient, explored: Explored
) -> None:
    scan = {"a.nii.gz": (explored.scans / "volumes" / "phantom_001.nii.gz").read_bytes()}
    cases = open_index(explored.index).cases
    (patient,) = cases.filter(pl.col("case_id") == "phantom_001")["patient_id"]
    own = set(cases.filter(pl.col("patient_id") == patient)["case_id"])
    job = send(client, scan, patient=f" {patient} ")
    told = ask(client, "/api/case", upload=job["upload"])
    assert told["patient_known"] and {said["source"] for said in told["predictions"]} == {"seen"}
    assert patient not in json.dumps(told).replace("phantom_", "")
    found = ask(client, "/api/neighbours", upload=job["upload"], k=20)["neighbours"]
    assert {each["case_id"] for each in found if each["same_patient"]} == own
    others = ask(client, "/api/neighbours", upload=job["upload"], k=20, exclude_same_patient=1)["neighbours"]
    assert {each["case_id"] for each in others} == set(cases["case_id"]) - own
    job = send(client, scan, patient="someone new")
    told = ask(client, "/api/case", upload=job["upload"])
    assert {said["source"] for said in told["predictions"]} == {"ensemble"}
    job = send(client, scan)
    assert not ask(client, "/api/case", upload=job["upload"])["patient_known"]
    refused = ask(client, "/api/neighbours", 404, upload=job["upload"], exclude_same_patient=1)
    assert "nobody told whose scan this is" in refused["error"]


def test_an_index_of_slices_is_no_cohort(explored: Explored, tmp_path: Path) -> None:
    embedkit.build_index(explored.cache, tmp_path / "slices", level="slice")
    with pytest.raises(SearchError, match="holds vectors of each slice, but a page shows cases; build one of level"):
        open_cohort(explored.cache, tmp_path / "slices")


def test_a_dicom_series_comes_as_files_or_as_an_archive(client: TestClient, explored: Explored) -> None:
    files = dicom_files(explored)
    archive = {
        "series.zip": pack({f"study/series/{name}": content for name, content in files.items()} | {"__MACOSX/x": b""})
    }
    for sent in (files, archive):
        job = send(client, sent)
        assert job["state"] == "done", job["error"]
        assert nearest(client, job)[0] == "phantom_000"


def test_a_wrong_file_is_explained_by_the_name_it_was_sent_under(client: TestClient, desk: QueryDesk) -> None:
    job = send(client, {"notes.nii.gz": b"these are notes, no scan"})
    assert job["state"] == "failed"
    assert job["error"].startswith("notes.nii.gz: is named .nii.gz but does not begin like one")
    assert str(desk.folder) not in job["error"] and "part-" not in job["error"]
    assert "notes.txt: not a format that embedkit reads" in send(client, {"notes.txt": b"some notes"})["error"]
    assert send(client, {"empty.nii": b""})["error"].startswith("empty.nii")
    assert "nothing was sent" in send(client, {})["error"]
    gone = ask(client, "/api/case", 404, upload=job["upload"])
    assert "another one took its place" in gone["error"]


def test_two_images_at_once_are_refused(client: TestClient, explored: Explored) -> None:
    image = (explored.scans / "volumes" / "phantom_001.nii.gz").read_bytes()
    job = send(client, {"a.nii.gz": image, "b.nii.gz": image})
    assert job["error"] == "2 images were sent (a.nii.gz, b.nii.gz); send one image or one series"


def test_a_scan_beyond_the_limit_is_refused_before_it_is_sent_and_while(client: TestClient) -> None:
    refused = send(client, {"a.nii": b"0" * (LIMIT + 1)}, 413)
    assert refused["error"] == "the upload is larger than 3 MB; start embedkit serve with a larger --upload-limit"
    key = client.post("/api/upload", json={"view": None, "sizes": [1]}).json()["upload"]  # a liar
    chunks = (b"0" * 100_000 for _ in range(40))
    sent = client.post(f"/api/upload/{key}/file", params={"name": "a.nii"}, content=chunks)
    assert sent.status_code == 413 and "larger than 3 MB" in sent.json()["error"]


def test_an_archive_that_unpacks_beyond_the_limit_is_refused(client: TestClient, desk: QueryDesk) -> None:
    bomb = pack({"scan.nii": b"0" * (LIMIT * 3)})
    assert len(bomb) < LIMIT / 100
    assert "what bomb.zip unpacks to is larger than 3 MB" in send(client, {"bomb.zip": bomb})["error"]
    assert sum(path.stat().st_size for path in desk.folder.rglob("*")) < LIMIT


def linked_archive() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        link = zipfile.ZipInfo("scan.nii")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    return packed.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pack({"../../escape.nii": b"x"}), "leads out of its folder ('../../escape.nii')"),
        (pack({"/etc/escape.nii": b"x"}), "leads out of its folder"),
        (pack({"..\\escape.nii": b"x"}), "leads out of its folder"),
        (linked_archive(), "holds a link"),
        (pack({"inner.zip": pack({"a.nii": b"x"})}), "holds another archive"),
        (pack({}), "nothing was sent"),
        (pack({"readme.txt": b"hello"}), "readme.txt: not a format"),
        (b"PK\x03\x04 not really", "cannot be unpacked"),
    ],
)
def test_an_archive_that_tries_something_is_refused(
    client: TestClient, desk: QueryDesk, content: bytes, words: str
) -> None:
    job = send(client, {"sent.zip": content})
    assert job["state"] == "failed" and words in job["error"]
    assert not list(desk.folder.parent.glob("escape*")) and not list(desk.folder.rglob("escape*"))


def test_a_header_that_names_another_file_is_refused(client: TestClient, tmp_path: Path) -> None:
    assert "keeps its voxels in a second file" in send(client, {"scan.mhd": b"NDims = 3"}, 400)["error"]
    header = (
        "ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = part-00001.npy\n"
    )
    array = io.BytesIO()
    np.save(array, np.zeros((2, 2, 2), np.uint8))
    job = send(client, {"scan.mha": header.encode(), "b.npy": array.getvalue()})
    assert job["state"] == "failed" and "images were sent" in job["error"]
    outside = header.replace("part-00001.npy", str(tmp_path / "secret"))
    (tmp_path / "secret").write_bytes(bytes(8))
    job = send(client, {"scan.mha": outside.encode()})
    assert job["state"] == "failed" and "outside" in job["error"]
    own = Upload(tmp_path / "upload", limit_bytes=10_000)
    path = own.begin_file("scan.mha")
    own.append(path, header.replace("part-00001.npy", "beside").encode())
    (path.parent / "beside").write_bytes(bytes(8))
    with pytest.raises(VolumeError, match=r"scan\.mha: keeps its voxels in a second file"):
        own.resolve()


def test_one_scan_is_computed_at_a_time_and_can_be_cancelled(
    client: TestClient, explored: Explored, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    hold, entered = threading.Event(), threading.Event()

    def slow(self: Upload) -> Path:
        entered.set()
        assert hold.wait(30)
        return explored.scans / "volumes" / "phantom_001.nii.gz"

    monkeypatch.setattr(Upload, "resolve", slow)
    key = client.post("/api/upload", json={"view": "ct", "sizes": [1]}).json()["upload"]
    client.post(f"/api/upload/{key}/file", params={"name": "a.nii"}, content=b"1")
    assert client.post(f"/api/upload/{key}/start").json()["state"] == "running"
    assert entered.wait(30)
    busy = client.post("/api/upload", json={"view": "ct", "sizes": [1]})
    assert busy.status_code == 409 and "another scan is being computed" in busy.json()["error"]
    late = client.post(f"/api/upload/{key}/file", params={"name": "b.nii"}, content=b"1")
    assert late.status_code == 409 and "takes no more files" in late.json()["error"]
    assert "not ready" in ask(client, "/api/case", 404, upload=key)["error"]
    client.post(f"/api/upload/{key}/cancel")
    hold.set()
    while (job := ask(client, f"/api/upload/{key}"))["state"] == "running":
        time.sleep(0.02)
    assert job["state"] == "cancelled"


def test_a_wrong_view_or_announcement_is_refused(client: TestClient) -> None:
    wrong = client.post("/api/upload", json={"view": "mr", "sizes": [1]})
    assert wrong.status_code == 400 and "one of the index's: ct" in wrong.json()["error"]
    for body in (
        b"no json",
        b"[]",
        b'{"sizes": ["x"]}',
        b'{"sizes": [-5]}',
        b'{"view": 3, "sizes": [1]}',
        b'{"view": null, "sizes": [1], "patient": 7}',
    ):
        answer = client.post("/api/upload", content=body)
        assert answer.status_code == 400 and "expected" in answer.json()["error"], body
    assert "another one took its place" in ask(client, "/api/upload/nothing", 404)["error"]


def test_leaving_the_desk_removes_every_file(explored: Explored) -> None:
    with QueryDesk(open_index(explored.index), limit_bytes=100) as desk:
        job = desk.open_job(view=None, sizes=[])
        job.upload.append(job.upload.begin_file("a.nii"), b"12")
        assert list(desk.folder.rglob("part-*")) and stat.S_IMODE(desk.folder.stat().st_mode) == 0o700
    assert not desk.folder.exists()


# ---- what is opened ----


def test_parts_that_do_not_belong_together_are_refused(explored: Explored, tmp_path: Path) -> None:
    table = embedkit.read_manifest(explored.scans / "manifest.csv").head(4)
    options: dict[str, Any] = {"backbone": "embedkit/scattering", "slices": "count:2", "image_size": 64}
    embedkit.extract(table, tmp_path / "other", **options)
    with pytest.raises(RecipeError, match="give the cache that was indexed, or index this one"):
        open_cohort(tmp_path / "other", explored.index)
    embedkit.extract(table, tmp_path / "part", **options | {"slices": "count:4", "preview": 32})
    with pytest.raises(SearchError, match="holds 8 cases that"):
        open_cohort(tmp_path / "part", explored.index)
    with pytest.raises(OptionError, match="is given twice"):
        open_cohort(explored.cache, explored.index, [explored.runs[0], explored.runs[0]])


def test_labels_add_columns_or_take_their_places(explored: Explored, tmp_path: Path) -> None:
    cases = open_index(explored.index).cases["case_id"].to_list()
    pl.DataFrame({"case_id": cases, "lesion": ["yes"] * len(cases), "age": list(range(len(cases)))}).write_csv(
        tmp_path / "more.csv"
    )
    cohort = open_cohort(explored.cache, explored.index, labels=tmp_path / "more.csv")
    assert cohort.labels(cases[3]).keys() == {"side", "volume_mm3", "lesion", "age"}
    assert cohort.labels(cases[3])["lesion"] == "yes" and cohort.labels(cases[3])["age"] == 3
    found = cohort.neighbours(cohort.subject(cases[0]), where="age > 9")
    assert {each["case_id"] for each in found} == set(cases[10:])
    with pytest.raises(RequestError, match="there is no run 'x'; there are none"):
        cohort.run("x")


# ---- the server itself ----


def test_a_port_that_is_taken_or_does_not_exist_is_explained(explored: Explored) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OptionError, match=f"port {port} is taken by another program; choose another --port"):
            serve(explored.cache, explored.index, port=port)
    with pytest.raises(OptionError, match="port 70000 does not exist"):
        serve(explored.cache, explored.index, port=70_000)
    with pytest.raises(OptionError, match=r"weights nowhere.pt are no file; give the one that extract was given"):
        serve(explored.cache, explored.index, weights="nowhere.pt")
    with pytest.raises(OptionError, match="device 'abacus' cannot be used here"):
        serve(explored.cache, explored.index, device="abacus")
    with pytest.raises(OptionError, match="limit of uploads is 0 bytes"):
        serve(explored.cache, explored.index, upload_limit_bytes=0)


def test_what_is_not_installed_is_named_with_its_extra(explored: Explored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(OptionError, match=r"needs uvicorn, which is not installed; pip install 'embedkit\[serve\]'"):
        serve(explored.cache, explored.index)


def test_a_server_that_is_told_to_end_removes_what_was_sent(explored: Explored, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from embedkit.cli.main import main; main()", "serve", "--no-browser"]
    server = subprocess.Popen(
        [*command, str(explored.cache), str(explored.index)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert server.stdout is not None and server.stdout.readline().startswith("http://127.0.0.1:")
    assert list(tmp_path.glob("embedkit-serve-*"))
    server.terminate()
    server.communicate(timeout=60)
    assert server.returncode == 143 and not list(tmp_path.glob("embedkit-serve-*"))
