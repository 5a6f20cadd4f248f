"""`embedkit search` as a user types it: by vector, by manifest, by a region, by a text; and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
from embedkit.cli.main import app
from typer.testing import CliRunner

import embedkit
from embedkit.errors import EmbedkitError, ExtractionError, ManifestError, OptionError, SearchError
from embedkit.indexwriting import write_index

if TYPE_CHECKING:
    from conftest import Explored


def call(*arguments: object, code: int = 0) -> tuple[str, str]:
    """Runs a command in this process and gives what it printed to stdout and to stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return str(result.stdout), str(result.stderr)


def ask(index: Path, *arguments: object) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(call("search", index, *arguments, "--json")[0])
    return rows


def refused(*arguments: object) -> str:
    return " ".join(call("search", *arguments, code=2)[1].replace("│", " ").split())


@pytest.fixture(scope="module")
def asked(explored: Explored) -> pl.DataFrame:
    """A manifest of two scans of the index under new names, by NIfTI files."""
    rows = pl.read_csv(explored.scans / "manifest.csv").filter(pl.col("path").str.ends_with(".nii.gz")).head(2)
    return rows.with_columns(
        path=str(explored.scans) + "/" + pl.col("path"), case_id=pl.format("new_{}", "case_id")
    ).select("case_id", "path", "view")


def test_a_vector_of_the_index_finds_its_own_case_first(explored: Explored, tmp_path: Path) -> None:
    index = embedkit.open_index(explored.index)
    np.save(tmp_path / "vector.npy", index.read_vectors()[4])
    found = ask(explored.index, "--vector", tmp_path / "vector.npy", "-k", 2)
    assert found[0]["case_id"] == index.cases["case_id"][4] and found[0]["similarity"] == pytest.approx(1, abs=1e-4)
    assert "matches" not in found[0]


def test_a_vector_that_is_not_there_is_named(explored: Explored, tmp_path: Path) -> None:
    with pytest.raises(SearchError, match=r"none.npy is not there; give the .npy file of the query vector"):
        call("search", explored.index, "--vector", tmp_path / "none.npy")


def test_a_search_for_nothing_says_what_can_be_searched_for(explored: Explored) -> None:
    assert "--case, --volume, --vector, --manifest or --text" in refused(explored.index, "-k", 2)


def test_what_is_no_vector_of_the_index_is_refused(explored: Explored, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_text("no array")
    with pytest.raises(SearchError, match=r"a.npy is no readable .npy array; write the query vector with numpy.save"):
        call("search", explored.index, "--vector", tmp_path / "a.npy")
    np.save(tmp_path / "short.npy", np.ones(3, np.float32))
    with pytest.raises(SearchError, match=r"query vectors have shape \[1, 3\], index .* holds vectors of length"):
        call("search", explored.index, "--vector", tmp_path / "short.npy")
    for wrong, what in (
        (np.ones((2, 3)), r"float64 of shape \[2, 3\]"),
        (np.ones(3, complex), "complex128"),
        (np.array(["a"]), "<U1"),
        (np.ones(3, "M8[s]"), r"datetime64\[s\]"),
    ):
        np.save(tmp_path / "wrong.npy", wrong)
        with pytest.raises(
            SearchError, match=f"the query vector is {what}.* numbers in a row; make it with the index's"
        ):
            call("search", explored.index, "--vector", tmp_path / "wrong.npy")
    for value in (1e38, 1e300):  # the first too long for float32 as a whole, the second in each place
        np.save(tmp_path / "huge.npy", np.full(embedkit.open_index(explored.index).dim, value))
        with pytest.raises(SearchError, match=r"query 0 is not finite \(NaN or too large\)"):
            call("search", explored.index, "--vector", tmp_path / "huge.npy")
    np.savez(tmp_path / "several.npz", a=np.ones(3))
    with pytest.raises(SearchError, match=r"several.npz is no readable .npy array"):
        call("search", explored.index, "--vector", tmp_path / "several.npz")
    np.save(tmp_path / "good.npy", embedkit.open_index(explored.index).read_vectors()[0])
    with pytest.raises(SearchError, match="a vector has no slices to rank by"):
        call("search", explored.index, "--vector", tmp_path / "good.npy", "--rerank", "ordered")
    message = refused(explored.index, "--vector", tmp_path / "good.npy", "--montage", tmp_path / "m.png")
    assert "a vector has no slices to draw or to compare; leave out --montage" in message


def test_every_case_of_a_manifest_finds_itself_in_the_index(
    explored: Explored, asked: pl.DataFrame, tmp_path: Path
) -> None:
    asked.write_csv(tmp_path / "new.csv")
    found = ask(explored.index, "--manifest", tmp_path / "new.csv", "-k", 2)
    assert [row["query"] for row in found] == [name for name in asked["case_id"] for _ in range(2)]
    assert [row["case_id"] for row in found if row["rank"] == 1] == [name[4:] for name in asked["case_id"]]
    shown = embedkit.search_manifest(explored.index, tmp_path / "new.csv", k=2)
    assert shown["case_id"].to_list() == [row["case_id"] for row in found]
    assert shown["similarity"].to_list() == pytest.approx([row["similarity"] for row in found])


def test_a_case_that_cannot_be_read_stops_no_other_and_is_told(
    explored: Explored, asked: pl.DataFrame, tmp_path: Path
) -> None:
    (tmp_path / "bad.nii.gz").write_bytes(b"no image")
    both = pl.concat(
        [pl.DataFrame({"case_id": ["bad"], "path": [str(tmp_path / "bad.nii.gz")], "view": ["ct"]}), asked.head(1)]
    )
    both.write_csv(tmp_path / "new.csv")
    printed, told = call("search", explored.index, "--manifest", tmp_path / "new.csv", "-k", 1, "--json", code=1)
    assert [row["query"] for row in json.loads(printed)] == [asked["case_id"][0]]
    assert told.startswith("failed bad: ") or "\nfailed bad: " in told
    with pytest.raises(ExtractionError, match="1 cases of the manifest cannot be queries: bad: "):
        embedkit.search_manifest(explored.index, tmp_path / "new.csv", k=1)


def test_a_view_that_the_index_does_not_know_is_named(explored: Explored, asked: pl.DataFrame, tmp_path: Path) -> None:
    asked.with_columns(view=pl.lit("mr")).write_csv(tmp_path / "new.csv")
    with pytest.raises(SearchError, match=r"the manifest has view mr, but index .* knows ct; name the views in its"):
        embedkit.search_manifest(explored.index, tmp_path / "new.csv")


def test_a_manifest_of_which_no_case_can_be_read_says_why_of_each(explored: Explored, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("case_id,path,view\na,none.nii.gz,ct\nb,neither.nii.gz,ct\n")
    printed, told = call("search", explored.index, "--manifest", tmp_path / "new.csv", "--json", code=1)
    assert json.loads(printed) == []
    assert [line[:9] for line in told.splitlines() if line.startswith("failed")] == ["failed a:", "failed b:"]
    assert "none.nii.gz" in told and "embedding" not in told


def test_a_manifest_without_views_is_of_the_one_view_of_the_index(
    explored: Explored, asked: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = embedkit.search_manifest(explored.index, asked.drop("view").head(1), k=2)
    assert found.equals(embedkit.search_manifest(explored.index, asked.head(1), k=2))
    index = embedkit.open_index(explored.index)
    monkeypatch.setitem(index.details, "views", ["ct/axial", "mr/axial"])
    with pytest.raises(SearchError, match=r"the manifest has no column view, but index .* knows ct, mr; add the col"):
        embedkit.search_manifest(index, asked.drop("view"))


def test_a_frame_is_a_manifest_as_a_file_is(explored: Explored, asked: pl.DataFrame) -> None:
    whole = embedkit.search_manifest(explored.index, asked.with_columns(patient_id=pl.lit(None, pl.String)), k=2)
    assert embedkit.search_manifest(explored.index, asked, k=2).equals(whole)
    with pytest.raises(ManifestError, match="the manifest: lacks the column path; found case_id, view"):
        embedkit.search_manifest(explored.index, asked.drop("path"))


def test_more_cases_than_there_are_may_be_asked_for(explored: Explored) -> None:
    cases = embedkit.open_index(explored.index).cases
    count, case = len(cases), cases["case_id"][3]
    for rerank in ("none", "ordered"):
        assert len(ask(explored.index, "--case", case, "-k", "9" * 22, "--rerank", rerank)) == count - 1
    found = embedkit.search(explored.index, case_id=case, k=10**22, exclude_same="patient_id", rerank="none")
    assert len(found) == (cases["patient_id"] != cases["patient_id"][3]).sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--case", "a", "--view", "ct"], "only a new image has a view and needs a backbone; leave out --view"),
        (["--case", "a", "--weights", "w.pt"], "only a new image has a view and needs a backbone; leave out --weights"),
        (["--manifest", "m.csv", "--view", "ct"], "a manifest names the views itself; leave out --view"),
        (["--case", "a", "--pairs", "-1"], "-1 pairs are none; give 0 or more"),
        (["--case", "a", "--pairs", "0", "--montage", "m.png"], "a picture of 0 pairs shows nothing; give 1 or more"),
        (
            ["--vector", "v.npy", "--region", "mm:0,0,0,1,1,1"],
            "has no slices to draw or to compare; leave out --region",
        ),
    ],
)
def test_options_that_would_be_passed_over_are_refused(explored: Explored, options: list[str], message: str) -> None:
    assert message in refused(explored.index, *options)


def test_a_filter_that_fails_is_told_in_short_and_without_the_columns_of_the_inside(explored: Explored) -> None:
    case = embedkit.open_index(explored.index).cases["case_id"][3]
    with pytest.raises(SearchError, match=r'unable to find column "xx+\.\.\.\)') as long:
        call("search", explored.index, "--case", case, "--where", "x" * 5000)
    assert len(str(long.value)) < 1000
    with pytest.raises(SearchError, match=r'valid columns: \["case_id"'):
        call("search", explored.index, "--case", case, "--where", "nowhere = 1")


def test_an_index_that_exists_takes_no_options_of_a_new_one(explored: Explored) -> None:
    def told(*options: str) -> str:
        arguments = ("index", explored.cache, "-o", explored.index, *options)
        return " ".join(call(*arguments, code=2)[1].replace("│", " ").split())

    for options, message in (
        (
            ("--add", "--embedding", "mean:cls", "--kind", "flat"),
            "keeps how it was made; leave out --embedding, --kind",
        ),
        (("--remove", "a", "--whiten", "8"), "keeps how it was made; leave out --whiten"),
        (("--remove", "a", "--labels", "l.csv"), "are withdrawn with all that is known of them; leave out --labels"),
        (("--remove", " , "), "' , ' names no case; give ID,ID,..."),
    ):
        assert message in told(*options)


def test_a_manifest_is_asked_for_alone(explored: Explored, tmp_path: Path) -> None:
    message = refused(
        explored.index, "--manifest", tmp_path / "new.csv", "--case", "a", "--region", "voxels:0,0,0,1,1,1"
    )
    assert "a manifest is a query of its own; leave out --case, --region" in message


def test_cases_of_the_patient_of_a_new_query_are_left_out_once_the_patient_is_told(
    explored: Explored, asked: pl.DataFrame, tmp_path: Path
) -> None:
    index = embedkit.open_index(explored.index)
    path, case = asked["path"][0], asked["case_id"][0].removeprefix("new_")
    (patient,) = index.cases.filter(pl.col("case_id") == case)["patient_id"]
    own = index.cases.filter(pl.col("patient_id") == patient)["case_id"].to_list()
    assert ask(explored.index, "--volume", path, "-k", 1)[0]["case_id"] == case

    def others(rows: list[dict[str, Any]]) -> bool:
        return len(rows) == len(index) - len(own) and not {row["case_id"] for row in rows} & set(own)

    told = ("--exclude-same", f"patient_id={patient}", "-k", len(index), "--pairs", 0)
    assert others(ask(explored.index, "--volume", path, *told))
    np.save(tmp_path / "vector.npy", index.read_vectors()[3])
    assert others(ask(explored.index, "--vector", tmp_path / "vector.npy", *told))
    asked.head(1).with_columns(patient_id=pl.lit(patient)).write_csv(tmp_path / "new.csv")
    assert others(ask(explored.index, "--manifest", tmp_path / "new.csv", *told[:1], "patient_id", *told[2:]))
    _, said = call("search", explored.index, "--volume", path, "--exclude-same", "patient_id=nobody", "-k", 1)
    assert "no case of the index has patient_id 'nobody', so none is left out" in said


def test_a_query_whose_value_nobody_told_leaves_nobody_out_in_silence(
    explored: Explored, asked: pl.DataFrame, tmp_path: Path
) -> None:
    path, case = asked["path"][0], asked["case_id"][0].removeprefix("new_")
    for query, column, message in (
        (("--volume", path), "patient_id", r"no case of the index; say its value \(--exclude-same patient_id=VALUE\)"),
        (("--volume", path), "site=a", "exclude_same names 'site', but the cases have case_id, patient_id"),
        (("--volume", path), "volume_mm3=big", "'big' is no value of column 'volume_mm3', which holds Float64"),
        (
            ("--case", case),
            "patient_id=p",
            rf"case {case} of the index has its own patient_id; leave the value out \(--exclude-same patient_id\)",
        ),
    ):
        with pytest.raises(SearchError, match=message):
            call("search", explored.index, *query, "--exclude-same", column)
    asked.write_csv(tmp_path / "new.csv")
    with pytest.raises(SearchError, match="'patient_id', but the manifest has case_id, path, view; add the column"):
        call("search", explored.index, "--manifest", tmp_path / "new.csv", "--exclude-same", "patient_id")
    twice = pl.concat([asked.head(1)] * 2).with_columns(view=pl.Series(["ct", "mr"]), site=pl.Series(["a", "b"]))
    with pytest.raises(SearchError, match=r"has 'a' and 'b' in column 'lesion' of the manifest, expected one value"):
        embedkit.search_manifest(explored.index, twice.rename({"site": "lesion"}), exclude_same="lesion")
    with pytest.raises(SearchError, match=r"exclude_value 'p' is of no column; name it"):
        embedkit.search(explored.index, volume=path, exclude_value="p")


def test_an_image_that_cannot_be_a_query_is_told_by_its_name_once(explored: Explored, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "study").mkdir()
    for name in ("CT", "PET"):
        (tmp_path / "patient" / name).mkdir(parents=True)
    for name, message in (
        ("gone.nii", r"gone.nii is not there; give an image file, or the folder of one DICOM series$"),
        ("notes.txt", r"notes.txt cannot be a query: not a format that embedkit reads"),
        ("study", r"study cannot be a query: [^/]*DICOM[^/]*lie$"),
        ("patient", r"patient cannot be a query: holds no DICOM image directly; .* files lie \(CT, PET\)$"),
    ):
        with pytest.raises(SearchError, match=message):
            call("search", explored.index, "--volume", tmp_path / name)


def test_a_picture_that_cannot_be_is_refused_before_the_search(explored: Explored, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    for place, message in (
        (tmp_path / "gone" / "m.png", r"m.png lies in .*gone, which is not there; name a file in a folder that is"),
        (tmp_path / "folder.png", "folder.png is a folder; name a file"),
        (tmp_path / "m.jpg", "does not end in .png, the only kind"),
    ):
        with pytest.raises(OptionError, match=message):
            call("search", explored.index, "--case", "no such case", "--montage", place)
    index = embedkit.build_index(explored.cache, tmp_path / "index")
    write_index(
        index.read_vectors(),
        index.cases,
        embedding="m",
        recipe=replace(index.recipe, preview=0),
        out=tmp_path / "bare",
    )
    with pytest.raises(SearchError, match="keeps no pictures of slices to draw; extract with --preview 64"):
        call("search", tmp_path / "bare", "--case", "no such case", "--montage", tmp_path / "m.png")


def test_a_search_that_leaves_nothing_says_what_left_nothing(explored: Explored) -> None:
    case = embedkit.open_index(explored.index).cases["case_id"][3]
    out, told = call("search", explored.index, "--case", case, "--where", "case_id = 'x'", "--json")
    assert json.loads(out) == [] and told == "no case is left by --where \"case_id = 'x'\"\n"


def test_the_vector_of_a_slice_finds_the_cases_of_slices_like_it(explored: Explored, tmp_path: Path) -> None:
    index = embedkit.build_index(explored.cache, tmp_path / "index", level="slice", embedding="grid:patch@4")
    np.save(tmp_path / "slice.npy", np.asarray(index.read_vectors()[20], np.float32))
    found = ask(tmp_path / "index", "--vector", tmp_path / "slice.npy", "-k", 3)
    assert index.rows is not None and len({row["case_id"] for row in found}) == 3
    assert found[0]["case_id"] == index.cases["case_id"][index.rows["case"][20]]
    assert found[0]["similarity"] == pytest.approx(1, abs=1e-3)
    own = ask(tmp_path / "index", "--vector", tmp_path / "slice.npy", "--where", f"case_id != '{found[0]['case_id']}'")
    assert found[0]["case_id"] not in {row["case_id"] for row in own} and len(own) > 3


def test_judging_an_index_of_a_run_says_what_it_is_worth(explored: Explored, tmp_path: Path) -> None:
    run = next(path for path in explored.runs if path.name.endswith("raptor"))
    embedkit.build_index(explored.cache, tmp_path / "index", run=run, labels=explored.labels)
    _, told = call("search-eval", tmp_path / "index", "--relevant", "lesion")
    assert "the vectors are of a run: cases that it was trained on are found more easily" in told
    assert "of a run" not in call("search-eval", explored.index, "--relevant", "lesion")[1]


def test_why_a_case_was_found_is_told_only_where_its_slices_still_are(explored: Explored, tmp_path: Path) -> None:
    case = embedkit.open_index(explored.index).cases["case_id"][3]
    gone = ("--case", case, "--cache", tmp_path / "gone")
    for options in (("--json",), ("--montage", tmp_path / "m.png")):
        with pytest.raises(SearchError, match=r"is gone; say where it is \(--cache\), or leave them out \(--pairs 0"):
            call("search", explored.index, *gone, *options)
    assert "matches" not in ask(explored.index, "--case", case, "--pairs", 0)[0]


def test_the_patches_of_a_region_alone_vote(explored: Explored) -> None:
    case = embedkit.open_index(explored.index).cases["case_id"][3]
    whole = ask(explored.index, "--case", case, "-k", 3, "--by-patch")
    part = ask(explored.index, "--case", case, "-k", 3, "--region", "voxels:0,0,0,12,12,100")
    assert [row["rank"] for row in part] == [1, 2, 3] and case not in [row["case_id"] for row in part]
    assert [row["similarity"] for row in part] != [row["similarity"] for row in whole]
    assert all(pair["patches"] for row in part for pair in row["matches"])


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ("voxels:0,0,0,1,1", "is no box: give six numbers"),
        ("nowhere.nii", "is no file and no box"),
        ("mm:9000,9000,9000,9001,9001,9001", r"the region touches no patch of .* within the query's own image, mm:-"),
        ("voxels:900,0,0,901,1,1", r"within the query's own image, voxels:0,0,0,\d+,\d+,\d+$"),
    ],
)
def test_a_region_that_is_none_is_refused(explored: Explored, region: str, message: str) -> None:
    case = embedkit.open_index(explored.index).cases["case_id"][3]
    with pytest.raises(EmbedkitError, match=message):
        call("search", explored.index, "--case", case, "--region", region)


def test_texts_are_searched_for_by_their_vectors_where_the_user_vouches_for_them(
    explored: Explored, tmp_path: Path
) -> None:
    index = embedkit.build_index(explored.cache, tmp_path / "index", embedding="mean:cls", whiten=0)
    np.save(tmp_path / "texts.npy", np.asarray(index.read_vectors()[[2, 5]], np.float32))
    texts = ["--text", "a large lesion", "--text", "none", "--text-vectors", tmp_path / "texts.npy"]
    with pytest.raises(SearchError, match="nothing tells whether tokens of embedkit/scattering and these"):
        call("search", tmp_path / "index", *texts)
    found = ask(tmp_path / "index", *texts, "--shared-space", "-k", 1)
    assert [row["query"] for row in found] == ["a large lesion", "none"]
    assert [row["case_id"] for row in found] == index.cases["case_id"].gather([2, 5]).to_list()
    with pytest.raises(SearchError, match="by embedkit/scattering, which learned nothing and so shares no space"):
        call("search", tmp_path / "index", "--text", "a large lesion")
    with pytest.raises(SearchError, match="holds aligned:patch@4:2 of each case, a space that no text shares"):
        call("search", explored.index, *texts, "--shared-space")
    message = refused(tmp_path / "index", *texts, "--case", "a", "--by-patch")
    assert "a text is a query of its own; leave out --case, --by-patch" in message
    assert "leave out --case" in refused(tmp_path / "index", "--case", "a", "--shared-space")
    beside = ["--text-model", "ViT-B-16", "--text-weights", "openai", "--text-vectors", "t.npy", "--shared-space"]
    message = refused(tmp_path / "index", "--manifest", "new.csv", *beside)
    assert "leave out --text-model, --text-weights, --text-vectors, --shared-space" in message
