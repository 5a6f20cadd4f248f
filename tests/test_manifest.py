"""Manifests and labels are read as written, scanned folders give sensible ones, and contradictions are named."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedkit.errors import ManifestError
from embedkit.manifest import read_labels, read_manifest, write_manifest
from embedkit.phantoms import make_phantoms
from embedkit.scanning import scan_folder
from embedkit.volumes import write_volume

LPS = np.array([[0.0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])


def save(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# ---- the manifest ----


def test_a_frame_is_read_as_a_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    frame = pl.DataFrame({"case_id": [7, 8], "path": ["a.nii", "/data/b.nii"], "site": ["x", None]})
    read = read_manifest(frame)
    assert read.rows() == [
        ("7", "7", "image", str(tmp_path / "a.nii"), None, "x"),
        ("8", "8", "image", "/data/b.nii", None, None),
    ]
    assert read_manifest(read).equals(read)
    assert read_labels(pl.DataFrame({"case_id": ["a"], "age": [" 3 "]})).rows() == [("a", 3)]


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pl.DataFrame({"case_id": ["a"]}), "the manifest: lacks the column path; found case_id; add or rename it"),
        (pl.DataFrame({"case_id": [], "path": []}), "the manifest: has no rows, expected one per image or case"),
        (pl.DataFrame({"case_id": [1.5], "path": ["x"]}), "the manifest: column case_id is of type Float64"),
        (pl.DataFrame({"case_id": ["a"], "path": [None]}), "the manifest: path is empty in row 1; fill it in"),
        (
            pl.DataFrame({"case_id": ["a"], "path": ["x"], "z": [[1, 2]]}),
            r"column z is of type List\(Int64\), expected text; leave it out",
        ),
    ],
)
def test_a_frame_that_is_no_manifest_is_refused(frame: pl.DataFrame, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        read_manifest(frame)


def test_labels_without_cases_are_refused() -> None:
    with pytest.raises(ManifestError, match="the labels: lacks the column case_id; found age"):
        read_labels(pl.DataFrame({"age": [3]}))


def test_a_manifest_of_two_columns_is_filled_up(tmp_path: Path) -> None:
    frame = read_manifest(save(tmp_path / "cases.csv", "case_id,path\n007,scans/a.nii\n8,/data/b.nii\n9,../c.nii\n"))
    assert frame.columns == ["case_id", "patient_id", "view", "path", "mask"]
    assert frame.rows() == [
        ("007", "007", "image", str(tmp_path / "scans" / "a.nii"), None),
        ("8", "8", "image", "/data/b.nii", None),
        ("9", "9", "image", str(tmp_path.parent / "c.nii"), None),
    ]


def test_every_column_is_kept_and_ids_stay_text(tmp_path: Path) -> None:
    text = "site,case_id,mask,path,view,patient_id\nA , 01 ,m.nii,a.nii,t1,p1\n,01,,b.nii,,\n\n  \nB,02,,c.nii,,\n"
    frame = read_manifest(save(tmp_path / "cases.csv", text))
    assert frame.columns == ["case_id", "patient_id", "view", "path", "mask", "site"]
    assert frame.select("case_id", "patient_id", "view", "site").rows() == [
        ("01", "p1", "t1", "A "),
        ("01", "p1", "image", None),
        ("02", "02", "image", "B"),
    ]
    assert frame["mask"].to_list() == [str(tmp_path / "m.nii"), None, None]


def test_tsv_parquet_windows_lines_and_a_byte_order_mark_read_the_same(tmp_path: Path) -> None:
    rows = [("01", "a.nii"), ("2", "b c.nii")]
    (tmp_path / "sub").mkdir()
    save(tmp_path / "cases.csv", b"\xef\xbb\xbfcase_id , path\r\n01,a.nii\r\n2,b c.nii\r\n")
    save(tmp_path / "cases.tsv", "case_id\tpath\n01\ta.nii\n2\tb c.nii\n")
    pl.DataFrame(rows, ["case_id", "path"], orient="row").write_parquet(tmp_path / "cases.parquet")
    first, *others = (read_manifest(tmp_path / f"cases.{kind}") for kind in ("csv", "tsv", "parquet"))
    assert first["case_id"].to_list() == ["01", "2"]
    for other in others:
        assert other.equals(first)
    pl.DataFrame({"case_id": [1, 2], "path": ["a", "b"]}).write_parquet(tmp_path / "numbers.parquet")
    assert read_manifest(tmp_path / "numbers.parquet")["case_id"].to_list() == ["1", "2"]


REFUSED = {
    "empty": (b"", "is empty, expected a line of column names"),
    "no rows": (b"case_id,path\n", "has no rows, expected one per image or case"),
    "blank rows": (b"case_id,path\n,\n", "has no rows, expected one per image or case"),
    "missing column": (b"case,path\n1,a\n", "lacks the column case_id; found case, path; add or rename it"),
    "semicolons": (
        b"case_id;path\n1;a\n",
        "lacks the column case_id, path; .* the columns must be separated by commas",
    ),
    "column twice": (b"case_id,path,path\n1,a,b\n", "column 'path' appears more than once; rename or remove one"),
    "long row": (b"case_id,path\n1,a,b\n", r"cannot be read as csv .*; save it again as csv in UTF-8"),
    "not utf-8": (b"case_id,path\n1,\xff\xfe\n", r"cannot be read as csv \(.*utf-8.*\); save it again as csv in UTF-8"),
    "no case": (b"case_id,path,x\n1,a,\n ,b,\n,c,1\n", "case_id is empty in rows 2, 3; fill it in"),
    "no path": (b"case_id,path\n1,a\n2,\n", "path is empty in row 2; fill it in"),
    "line break": (b'case_id,path\n"1\n2",a\n', "case_id holds a control character in row 1; remove it"),
    "slash": (b"case_id,path,view\n1,a,t1/post\n", "view holds a slash or a comma in row 1; rename the view"),
    "view twice": (
        b"case_id,path,view\n1,a,t1\n2,b,t1\n1,c,t1\n",
        "case_id 1, view t1 appears in rows 1, 3; give each image of a case a view of its own",
    ),
    "two patients": (
        b"case_id,path,view,patient_id\n1,a,x,p\n1,b,y,q\n",
        "case 1 has the patients p, q; give all its rows the same one",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_are_refused_in_words(tmp_path: Path, case: str) -> None:
    content, message = REFUSED[case]
    path = save(tmp_path / "cases.csv", content)
    with pytest.raises(ManifestError, match=message) as caught:
        read_manifest(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_files_that_are_no_tables_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"gone\.csv: no such file; check the path"):
        read_manifest(tmp_path / "gone.csv")
    with pytest.raises(ManifestError, match=r"ends in \.csv, \.tsv or \.parquet, not \.xlsx; rename it"):
        read_manifest(tmp_path / "cases.xlsx")
    with pytest.raises(ManifestError, match="cannot be read as parquet"):
        read_manifest(save(tmp_path / "cases.parquet", b"PAR1 no PAR1"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ManifestError, match=r"folder\.csv: cannot be read \(Is a directory\)"):
        read_manifest(tmp_path / "folder.csv")
    pl.DataFrame({"case_id": [1.5], "path": ["a"]}).write_parquet(tmp_path / "floats.parquet")
    with pytest.raises(ManifestError, match="column case_id is of type Float64, expected text; save it as text"):
        read_manifest(tmp_path / "floats.parquet")


def test_a_long_manifest_is_read_at_once(tmp_path: Path) -> None:
    lines = "".join(f"case{number // 2},view{number % 2},scans/{number}.nii\n" for number in range(20_000))
    frame = read_manifest(save(tmp_path / "cases.csv", "case_id,view,path\n" + lines))
    assert len(frame) == 20_000
    assert frame["path"][19_999] == str(tmp_path / "scans" / "19999.nii")


# ---- the labels ----


def test_numbers_become_numbers_and_text_stays_text(tmp_path: Path) -> None:
    text = "case_id,grade,size,side,code,empty\n01,1,1.5,left,7,\n02, 2 ,NA,,x,\n03,nan,-3e2,right,,\n"
    frame = read_labels(save(tmp_path / "labels.csv", text))
    assert frame.schema == {
        "case_id": pl.String,
        "grade": pl.Int64,
        "size": pl.Float64,
        "side": pl.String,
        "code": pl.String,
        "empty": pl.String,
    }
    assert frame.rows() == [
        ("01", 1, 1.5, "left", "7", None),
        ("02", 2, None, None, "x", None),
        ("03", None, -300.0, "right", None, None),
    ]


def test_labels_of_parquet_keep_their_types(tmp_path: Path) -> None:
    table = pl.DataFrame({"case_id": ["a", "b"], "dead": [True, False], "size": [1.0, float("nan")], "n": [1, None]})
    table.write_parquet(tmp_path / "labels.parquet")
    frame = read_labels(tmp_path / "labels.parquet")
    assert frame.rows() == [("a", True, 1.0, 1), ("b", False, None, None)]


def test_contradicting_labels_are_refused_in_words(tmp_path: Path) -> None:
    for content, message in (
        (
            "case_id,x\na,1\nb,2\na,3\nb,4\n",
            r"case_id a appears in rows 1, 3 \(and 1 more repeats\); keep one row per case",
        ),
        ("case_id,x\n,1\n", "case_id is empty in row 1; fill it in"),
        ("case,x\na,1\n", "lacks the column case_id; found case, x"),
        ("case_id,x\na,1\nb,-inf\n", "x is infinite in row 2; give a finite number"),
    ):
        with pytest.raises(ManifestError, match=message):
            read_labels(save(tmp_path / "labels.csv", content))


# ---- writing ----


@given(
    ids=st.lists(
        st.text(st.characters(exclude_categories=["Cc", "Cs", "Z"]), min_size=1, max_size=8),
        min_size=1,
        max_size=5,
        unique=True,
    ),
    kind=st.sampled_from(["csv", "tsv", "parquet"]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_reads_back(tmp_path: Path, ids: list[str], kind: str) -> None:
    rows = [(name, name, "image", str(tmp_path / f"{number}, x.nii"), None) for number, name in enumerate(ids)]
    frame = pl.DataFrame(
        rows, dict.fromkeys(["case_id", "patient_id", "view", "path", "mask"], pl.String), orient="row"
    )
    path = tmp_path / f"cases.{kind}"
    write_manifest(frame, path)
    assert read_manifest(path).equals(frame)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []
    path.unlink()


def test_paths_below_the_manifest_are_written_relative_to_it(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {
            "case_id": ["1", "2"],
            "path": [str(tmp_path / "a" / "b.nii"), "/data/c.nii"],
            "mask": [None, str(tmp_path / "m")],
        }
    )
    write_manifest(frame, tmp_path / "cases.csv")
    assert (tmp_path / "cases.csv").read_text() == "case_id,path,mask\n1,a/b.nii,\n2,/data/c.nii,m\n"


def test_writing_to_nowhere_is_refused_in_words(tmp_path: Path) -> None:
    frame = pl.DataFrame({"case_id": ["1"], "path": ["/a"]})
    with pytest.raises(ManifestError, match=r"cases\.csv: cannot be written \(No such file or directory\)"):
        write_manifest(frame, tmp_path / "gone" / "cases.csv")
    with pytest.raises(ManifestError, match=r"ends in \.csv, \.tsv or \.parquet, not \.txt"):
        write_manifest(frame, tmp_path / "cases.txt")
    with pytest.raises(ManifestError, match="lacks the column path; found case_id"):
        write_manifest(frame.drop("path"), tmp_path / "cases.csv")


# ---- scanning a folder ----


def put(root: Path, *names: str) -> None:
    """Small images under the given names."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_volume(root / name, np.full((2, 3, 4), number, np.uint8), LPS)


def scan(root: Path) -> tuple[list[tuple[Any, ...]], dict[str, str]]:
    """(case, view, path, mask) of every row, and the reason of every file left out, paths relative to ``root``."""
    result = scan_folder(root)
    assert result.rows["patient_id"].equals(result.rows["case_id"].alias("patient_id"))

    def short(path: str | None) -> str | None:
        return None if path is None else str(Path(path).relative_to(root))

    rows = result.rows.select("case_id", "view", "path", "mask").rows()
    return (
        [(case, view, short(path), short(mask)) for case, view, path, mask in rows],
        {str(short(path)): reason for path, reason in result.skipped},
    )


def test_files_in_one_folder_are_cases(tmp_path: Path) -> None:
    put(
        tmp_path,
        "volumes/knee_001.nii.gz",
        "volumes/knee_002.nrrd",
        "volumes/knee_003.mha",
        "volumes/knee_001_mask.nii.gz",
    )
    rows, skipped = scan(tmp_path)
    assert rows == [
        ("knee_001", "image", "volumes/knee_001.nii.gz", "volumes/knee_001_mask.nii.gz"),
        ("knee_002", "image", "volumes/knee_002.nrrd", None),
        ("knee_003", "image", "volumes/knee_003.mha", None),
    ]
    assert skipped == {}


def test_recurring_last_words_are_views(tmp_path: Path) -> None:
    put(
        tmp_path,
        "TCGA_1_pre.nii",
        "TCGA_1_flair.nii",
        "TCGA_2_flair.nii",
        "TCGA_2_pre.nii",
        "TCGA_3_flair.nii",
        "TCGA_1_mask.nii",
    )
    rows, skipped = scan(tmp_path)
    assert [row[:2] for row in rows] == [
        ("TCGA_1", "flair"),
        ("TCGA_1", "pre"),
        ("TCGA_2", "flair"),
        ("TCGA_2", "pre"),
        ("TCGA_3", "flair"),
    ]
    assert skipped == {
        "TCGA_1_mask.nii": "a mask that fits 2 images (TCGA_1_flair.nii, TCGA_1_pre.nii); write it into the manifest "
        "where it belongs"
    }


def test_names_that_do_not_recur_are_no_views(tmp_path: Path) -> None:
    put(tmp_path, "study_alice.nii", "study_bob.nii")
    assert [row[:2] for row in scan(tmp_path)[0]] == [("study_alice", "image"), ("study_bob", "image")]


def test_the_first_folder_is_the_case_and_the_rest_the_view(tmp_path: Path) -> None:
    put(
        tmp_path,
        "P1/CT_image.nii.gz",
        "P1/PET_image.nii.gz",
        "P1/CT_mask.nii.gz",
        "P2/CT_image.nii.gz",
        "P2/PET_seg.nii.gz",
    )
    rows, skipped = scan(tmp_path)
    assert rows == [
        ("P1", "CT", "P1/CT_image.nii.gz", "P1/CT_mask.nii.gz"),
        ("P1", "PET", "P1/PET_image.nii.gz", None),
        ("P2", "CT", "P2/CT_image.nii.gz", None),
    ]
    assert skipped == {"P2/PET_seg.nii.gz": "a mask, but no image shares the rest of its name"}


def test_a_case_repeated_in_the_file_name_is_not_repeated_in_the_view(tmp_path: Path) -> None:
    put(tmp_path, "all/B_01/B_01_t1.nii", "all/B_01/B_01_flair.nii", "all/B_02/B_02_t1.nii")
    assert [row[:2] for row in scan(tmp_path)[0]] == [("B_01", "flair"), ("B_01", "t1"), ("B_02", "t1")]


def test_masks_in_a_folder_of_their_own_are_paired(tmp_path: Path) -> None:
    put(
        tmp_path,
        "imagesTr/liver_1.nii.gz",
        "imagesTr/liver_2.nii.gz",
        "labelsTr/liver_1.nii.gz",
        "labelsTr/liver_9.nii.gz",
    )
    rows, skipped = scan(tmp_path)
    assert [(row[0], row[3]) for row in rows] == [("liver_1", "labelsTr/liver_1.nii.gz"), ("liver_2", None)]
    assert skipped == {"labelsTr/liver_9.nii.gz": "a mask, but no image shares the rest of its name"}


def test_two_masks_of_one_image_are_left_to_the_user(tmp_path: Path) -> None:
    put(tmp_path, "a.nii", "a_mask.nii", "a_seg.nii")
    rows, skipped = scan(tmp_path)
    assert rows == [("a", "image", "a.nii", None)]
    assert skipped == dict.fromkeys(["a_mask.nii", "a_seg.nii"], "one of 2 masks that fit a.nii; keep one")


def test_the_same_case_and_view_twice_is_told_apart(tmp_path: Path) -> None:
    put(tmp_path, "dicom/P1/CT.nii", "nifti/P1/CT.nii", "P1/CT.nii", "P1/CT.nrrd")
    rows, _ = scan(tmp_path)
    assert len({row[:2] for row in rows}) == 4
    assert {row[0] for row in rows} == {"P1"}
    write_manifest(scan_folder(tmp_path).rows, tmp_path / "cases.csv")
    assert len(read_manifest(tmp_path / "cases.csv")) == 4


def test_what_cannot_be_read_is_left_out_with_its_reason(tmp_path: Path) -> None:
    put(tmp_path, "good.nii.gz", "twin.nii.gz")
    save(tmp_path / "broken.nii.gz", gzip.compress(b"no NIfTI" * 100))
    save(tmp_path / "empty.nrrd", b"")
    save(tmp_path / "bad.dcm", b"hello")
    save(tmp_path / "notes.txt", "hello")
    save(tmp_path / ".hidden", "hello")
    rows, skipped = scan(tmp_path)
    assert [row[0] for row in rows] == ["good", "twin"]
    assert skipped.keys() == {"broken.nii.gz", "empty.nrrd", "bad.dcm", "notes.txt"}
    assert skipped["broken.nii.gz"].startswith("holds no NIfTI header")
    assert skipped["empty.nrrd"].startswith("is empty (0 bytes)")
    assert skipped["bad.dcm"].startswith("damaged, truncated or not DICOM")
    assert skipped["notes.txt"].startswith("not a format that embedkit reads")


def test_the_voxels_beside_a_header_are_no_image_of_their_own(tmp_path: Path) -> None:
    save(
        tmp_path / "a.mhd",
        "ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = a.raw\n",
    )
    save(tmp_path / "a.raw", bytes(8))
    save(tmp_path / "b.raw", bytes(8))
    rows, skipped = scan(tmp_path)
    assert rows == [("a", "image", "a.mhd", None)]
    assert skipped.keys() == {"b.raw"}


def test_a_link_in_circles_is_listed_with_what_was_left_out(tmp_path: Path) -> None:
    make_phantoms(tmp_path / "scans", cases=4, seed=0)
    (tmp_path / "scans" / "round.dcm").symlink_to("again.dcm")
    (tmp_path / "scans" / "again.dcm").symlink_to("round.dcm")
    skipped = dict(scan_folder(tmp_path / "scans").skipped)
    for name in ("round.dcm", "again.dcm"):
        assert skipped[str(tmp_path / "scans" / name)] == "no regular file, or a link that leads nowhere"


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    put(tmp_path, "outside/secret.nii", "scans/here.nii")
    (tmp_path / "scans" / "file.nii").symlink_to(tmp_path / "outside" / "secret.nii")
    (tmp_path / "scans" / "file.dcm").symlink_to(tmp_path / "outside" / "secret.nii")
    (tmp_path / "scans" / "folder").symlink_to(tmp_path / "outside")
    (tmp_path / "scans" / "again.nii").symlink_to("here.nii")
    rows, skipped = scan(tmp_path / "scans")
    assert [row[2] for row in rows] == ["again.nii", "here.nii"]
    out = "a link that leads out of the scanned folder; copy the file into it"
    assert skipped == {
        "file.nii": out,
        "file.dcm": out,
        "folder": "a link to a folder, which is not followed; scan the folder itself",
    }


def test_special_files_are_not_opened(tmp_path: Path) -> None:
    put(tmp_path, "a.nii")
    os.mkfifo(tmp_path / "pipe.nii")
    rows, skipped = scan(tmp_path)
    assert [row[2] for row in rows] == ["a.nii"]
    assert skipped == {"pipe.nii": "no regular file, or a link that leads nowhere"}


def test_names_that_a_manifest_refuses_are_made_fit(tmp_path: Path) -> None:
    put(tmp_path, "P1/T1, post.nii", "P2/x.nii")
    assert scan(tmp_path)[0][0][:2] == ("P1", "T1_ post")
    write_manifest(scan_folder(tmp_path).rows, tmp_path / "cases.csv")
    assert len(read_manifest(tmp_path / "cases.csv")) == 2


def test_a_folder_without_images_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="gone: no such folder; give the folder that holds the images"):
        scan_folder(tmp_path / "gone")
    save(tmp_path / "notes.txt", "hello")
    with pytest.raises(
        ManifestError, match=r"holds no image that embedkit reads; 1 files were left out, the first: .*notes"
    ):
        scan_folder(tmp_path)


def test_a_scan_of_phantoms_finds_them_all(tmp_path: Path) -> None:
    made = make_phantoms(tmp_path, cases=4)
    rows, skipped = scan(tmp_path)
    assert [(row[0], row[1]) for row in rows] == [
        ("phantom_000", "CT"),
        ("phantom_001", "image"),
        ("phantom_002", "image"),
        ("phantom_003", "image"),
    ]
    assert skipped.keys() == {"labels.csv", "manifest.csv"}
    written = read_manifest(made.manifest)
    assert scan_folder(tmp_path).rows["path"].to_list() == written["path"].to_list()
    assert scan_folder(tmp_path).rows["mask"].to_list() == written["mask"].to_list()


def copy_series(source: Path, target: Path, **tags: str) -> None:
    """A DICOM series again, with other header values."""
    import pydicom

    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        data = pydicom.dcmread(file)
        for name, value in tags.items():
            setattr(data, name, value)
        data.save_as(target / f"{tags.get('Modality', 'CT')}-{file.name}")


def test_dicom_series_are_named_by_folder_or_else_by_modality(tmp_path: Path) -> None:
    made = make_phantoms(tmp_path / "made", cases=4)
    series = Path(read_manifest(made.manifest)["path"][0])
    root = tmp_path / "study"
    # folders named by date and number, as archives export them, tell no view
    copy_series(series, root / "P1" / "2001-01-01" / "100", SeriesInstanceUID="1.1", PatientName="DOE^JANE")
    copy_series(series, root / "P1" / "2001-01-01" / "200", SeriesInstanceUID="1.2", Modality="PT")
    copy_series(series, root / "P2" / "2002-02-02" / "300", SeriesInstanceUID="1.3")
    rows, _ = scan(root)
    assert [row[:2] for row in rows] == [("P1", "CT"), ("P1", "PT"), ("P2", "CT")]
    # a folder of two series, and one that lies in two folders
    copy_series(series, root / "P3", SeriesInstanceUID="1.4")
    copy_series(series, root / "P3", SeriesInstanceUID="1.5", Modality="MR")
    copy_series(series, root / "P4" / "copy", SeriesInstanceUID="1.3")
    rows, skipped = scan(root)
    assert [row[:3] for row in rows if row[0] == "P3"] == [("P3", "CT", "P3/CT-000.dcm"), ("P3", "MR", "P3/MR-000.dcm")]
    reason = "files of one DICOM series lie in P2/2002-02-02/300 and P4/copy; bring them together or remove one"
    assert skipped == {"P2/2002-02-02/300": reason, "P4/copy": reason}
    # a series that cannot be read as one stack
    next((root / "P3").glob("MR-01*.dcm")).unlink()
    rows, skipped = scan(root)
    assert ("P3", "CT") in [row[:2] for row in rows]
    assert "1 slice is missing between" in skipped["P3/MR-000.dcm"]
    assert "DOE" not in str((rows, skipped))


@pytest.mark.realdata
def test_the_real_folders_give_their_cases_and_views(real_data: Path) -> None:
    six = [(case, view) for case in ("STS_001", "STS_004") for view in ("CT", "MR_T1", "PET")]
    rows, skipped = scan(real_data / "sts" / "dicom")
    assert [row[:3] for row in rows] == [(case, view, f"{case}/{view}/image") for case, view in six]
    assert skipped == {f"{case}/{view}/mask/RS.dcm": "a DICOM RTSTRUCT, not an image" for case, view in six}
    rows, skipped = scan(real_data / "sts" / "nifti")
    assert rows == [(*one, f"{one[0]}/{one[1]}_image.nii.gz", f"{one[0]}/{one[1]}_mask.nii.gz") for one in six]
    assert skipped == {}
    for name in ("hippocampus", "lgg"):
        given_rows = read_manifest(real_data / name / "manifest.csv").sort("path")
        found = scan_folder(real_data / name).rows.sort("path")
        assert found["path"].to_list() == given_rows["path"].to_list()
        assert found["case_id"].to_list() == given_rows["case_id"].to_list()
        if name == "hippocampus":
            assert found["mask"].to_list() == given_rows["mask"].to_list()
        else:
            assert found["view"].to_list() == given_rows["view"].to_list()


@pytest.mark.realdata
def test_the_real_tables_are_read_with_their_gaps(real_data: Path) -> None:
    labels = read_labels(real_data / "lgg" / "labels.csv")
    assert labels["case_id"].dtype == pl.String
    assert labels["gender"].dtype == pl.Int64
    assert labels["race"].null_count() > 0
    sides = read_labels(real_data / "hippocampus" / "labels.csv")
    assert set(sides["side"]) == {"odd", "even"}
    assert sides["anterior_mm3"].dtype == pl.Int64
