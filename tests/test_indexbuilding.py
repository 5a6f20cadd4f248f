"""Building an index from a cache, adding to it, withdrawing from it, levels, regions and ranking by slices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from embedkit import indexseals, pictures
from embedkit.cache import StackTokens, create_cache, open_cache, write_shard
from embedkit.casevectors import join_embeddings
from embedkit.embeddings import Embedding, embed_cases, parse_embeddings
from embedkit.errors import CacheError, OptionError, RecipeError, SearchError
from embedkit.index import open_index
from embedkit.indexbuilding import build_index
from embedkit.indexchanging import add_cases, remove_cases
from embedkit.indexlabels import list_unlabelled
from embedkit.indexwriting import rewrite_index
from embedkit.queries import open_slices
from embedkit.recipe import Recipe
from embedkit.regions import Region
from embedkit.retrieval import match_cases, search
from embedkit.slicescores import score_slices

RECIPE = Recipe("made up", "builtin:0", ("cls:2", "patch@2:1"), 32, (0.0,), (1.0,), preview=8)
CASES = 40
DIM = 6


def stack(number: int, view: str = "t1", *, slices: int = 9) -> StackTokens:
    """Cases 2 n and 2 n + 1 are of one patient and alike; slices drift along the stack."""
    shared = np.random.default_rng(number // 2 + 100 * len(view))
    own = np.random.default_rng(1000 + number)
    drift = np.linspace(0, 1, slices)[:, None, None] * shared.standard_normal((1, 4, DIM))
    patches = shared.standard_normal((1, 4, DIM)) + drift + 0.3 * own.standard_normal((slices, 4, DIM))
    return StackTokens(
        case_id=f"c{number:02}",
        patient_id=f"p{number // 2:02}",
        view=view,
        plane="axial",
        sources=(view,),
        indices=np.arange(slices, dtype=np.int32),
        positions_mm=np.arange(slices, dtype=np.float32),
        blank=np.arange(slices) == 0,
        plane_shape=(8, 8),
        box=(0, 0, 8, 8),
        source_shape=(slices, 8, 8),
        source_affine=np.array([[0, 0, 2.0, 10], [0, 2, 0, 20], [3, 0, 0, 30], [0, 0, 0, 1]]),
        source_bytes=1,
        source_digest="0",
        tokens={"cls:2": patches.mean(1).astype(np.float16), "patch@2:1": patches.astype(np.float16)},
        preview=np.full((slices, 8, 8), number, np.uint8),
    )


def make_cache(path: Path, numbers: Any, recipe: Recipe = RECIPE) -> Path:
    if not path.exists():
        create_cache(path, recipe)
    write_shard(path, recipe, [stack(number) for number in numbers])
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("cache") / "cache", range(CASES))


def test_what_is_fitted_follows_how_much_there_is(cache: Path, tmp_path: Path) -> None:
    index = build_index(cache, tmp_path / "index")
    assert index.embedding == "aligned:patch@2:1" and index.dim == 8 * 4 * DIM
    assert index.whitening is not None and index.whitening.shape[1] == CASES // 3
    assert index.extras["slice_whitening"].shape == (4 * DIM, 4 * DIM)
    assert index.extras["slices"].shape == (CASES * 8, 4 * DIM)
    plain = build_index(cache, tmp_path / "plain", embedding="mean:cls", whiten=0, slices="mean:cls")
    assert plain.whitening is None and plain.embedding == "mean:cls:2" and plain.mean is None


def test_slices_kept_in_the_index_are_those_of_the_cache(cache: Path, tmp_path: Path) -> None:
    index = build_index(cache, tmp_path / "index")
    reader = open_slices(index, open_cache(cache))
    others = [f"c{number:02}" for number in range(1, 9)]
    scores = score_slices(reader.read("c00"), [reader.read(case_id) for case_id in others], order="ordered")
    found = search(index, case_id="c00", k=39, rerank="ordered")
    by_case = dict(found.select("case_id", "similarity").iter_rows())
    np.testing.assert_allclose([by_case[case_id] for case_id in others], scores, atol=2e-3)
    match = match_cases(index, "c00", ["c01"], order="ordered")[0]
    assert match.similarity == pytest.approx(by_case["c01"], abs=2e-3)


def test_ranking_by_slices_finds_the_other_case_of_the_patient(cache: Path, tmp_path: Path) -> None:
    index = build_index(cache, tmp_path / "index")
    for rerank in ("none", "free", "ordered", "both"):
        first = [search(index, case_id=f"c{n:02}", k=1, rerank=rerank)["case_id"][0] for n in range(0, CASES, 2)]
        assert np.mean([case == f"c{n + 1:02}" for case, n in zip(first, range(0, CASES, 2), strict=True)]) > 0.9
    found = search(index, case_id="c00", k=3, candidates=5, rerank="ordered")
    assert found.columns == ["rank", "case_id", "patient_id", "similarity", "recall_rank"]
    assert found["rank"].to_list() == [1, 2, 3] and found["recall_rank"].max() <= 5
    assert found["similarity"].is_sorted(descending=True)
    others = search(index, case_id="c00", k=3, exclude_same="patient_id", where="case_id < 'c10'")
    assert "c01" not in others["case_id"].to_list() and others.height == 3


def test_both_is_the_mean_of_what_vectors_and_slices_say_and_ordered_the_default(cache: Path, tmp_path: Path) -> None:
    index = build_index(cache, tmp_path / "index")
    parts = {how: search(index, case_id="c00", k=39, rerank=how) for how in ("none", "ordered", "both")}
    assert search(index, case_id="c00", k=39).equals(parts["ordered"])
    assert not parts["both"]["case_id"].equals(parts["ordered"]["case_id"])
    assert parts["both"].columns[:6] == [
        "rank",
        "case_id",
        "patient_id",
        "similarity",
        "recall_rank",
        "vectors_similarity",
    ]
    said = {how: dict(found.select("case_id", "similarity").iter_rows()) for how, found in parts.items()}
    for row in parts["both"].iter_rows(named=True):
        case = row["case_id"]
        assert row["vectors_similarity"] == pytest.approx(said["none"][case], abs=1e-6)
        assert row["similarity"] == pytest.approx((said["none"][case] + said["ordered"][case]) / 2, abs=1e-6)
    assert parts["both"]["similarity"].is_sorted(descending=True)
    for other in ({"by_patch": True}, {"region": Region.parse("voxels:0,0,0,4,4,9")}):
        ordered = search(index, case_id="c00", k=5, rerank="ordered", **other)
        assert search(index, case_id="c00", k=5, **other).equals(ordered)


def test_cases_added_later_stand_where_they_would_have_stood(cache: Path, tmp_path: Path) -> None:
    grown = make_cache(tmp_path / "cache", range(30))
    labels = pl.DataFrame({"case_id": [f"c{n:02}" for n in range(CASES)], "age": range(CASES)})
    index = build_index(grown, tmp_path / "index", labels=labels)
    assert add_cases(index) == (index, [])
    make_cache(grown, range(30, CASES))
    added, new = add_cases(tmp_path / "index", labels=labels)
    assert new == [f"c{n}" for n in range(30, CASES)] and len(added) == CASES and added.cases["age"].null_count() == 0
    np.testing.assert_array_equal(added.whitening, index.whitening)
    parts = parse_embeddings(index.embedding, open_cache(cache))
    alone = embed_cases(open_cache(cache), parts[0]).vectors[:, 0] - index.extras["view_means"][0]
    np.testing.assert_allclose(added.read_vectors(), alone, atol=1e-5)
    assert search(added, case_id="c30", k=1)["case_id"].to_list() == ["c31"]
    assert search(open_index(tmp_path / "index"), case_id="c38", k=1)["case_id"].to_list() == ["c39"]


def test_a_case_added_must_not_lack_the_labels_of_the_others_unless_that_is_said(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", range(4))
    labels = pl.DataFrame({"case_id": ["c00", "c01", "c02", "c03"], "age": [1, 2, 3, 4], "sex": list("fmfm")})
    index = build_index(cache, tmp_path / "index", labels=labels)
    make_cache(cache, range(4, 6))
    new = pl.DataFrame({"case_id": ["c04", "c05"], "age": [5, 6], "sex": ["f", "m"]})
    refused: list[tuple[Any, str]] = [
        (None, r"has age, sex of its cases, and 2 new cases \(c04, c05\) would have none of it; give their labels"),
        (new.filter(pl.col("age") < 6), r"nothing of 1 new case \(c05\); add them to the table, or say .*--unlabelled"),
        (new.drop("sex"), "labels have columns age, but the index has age, sex: a filter would know only some cases"),
        (new.rename({"sex": "Sex"}), "labels have columns age, Sex, but the index has age, sex"),
        (new.with_columns(age=pl.Series(["old", "young"])), "age is String in the labels and Int64 in the index"),
    ]
    for table, message in refused:
        with pytest.raises(SearchError, match=message):
            add_cases(index, labels=table)
    assert len(open_index(index.path)) == 4
    half = new.with_columns(sex=pl.Series([None, None], dtype=pl.String), age=pl.Series([5.5, None]))
    added, taken = add_cases(index, labels=half, unlabelled=True)
    assert taken == ["c04", "c05"] and added.cases["age"].to_list() == [1, 2, 3, 4, 5.5, None]
    assert list_unlabelled(added.cases) == ["c05"]
    make_cache(cache, range(6, 7))
    more, _ = add_cases(added, unlabelled=True)
    assert list_unlabelled(more.cases) == ["c05", "c06"] and more.cases["sex"].null_count() == 3
    make_cache(cache, range(7, 8))
    assert add_cases(build_index(cache, tmp_path / "plain", cases=["c00"]), cache=cache)[1][-1] == "c07"


@pytest.mark.parametrize(
    ("level", "embedding"),
    [
        ("case", "aligned:patch@2"),
        ("case", "grid:patch@2"),
        ("case", "mean:cls+mean:patch@2"),
        ("slice", "mean:cls"),
        ("slice", "grid:patch@2"),
    ],
)
def test_blank_constant_and_one_slice_cases_are_left_out_or_found(tmp_path: Path, level: str, embedding: str) -> None:
    """A case of blank slices alone has no direction; of one slice, or of equal slices, it has."""
    cache = make_cache(tmp_path / "cache", range(30))
    equal = stack(31)
    tokens = {name: np.repeat(values[:1], 9, 0) for name, values in equal.tokens.items()}
    odd = [
        replace(stack(30), blank=np.ones(9, bool)),
        replace(equal, tokens=tokens, blank=np.zeros(9, bool)),
        replace(stack(32, slices=2)),  # the first of the two is blank
    ]
    write_shard(cache, RECIPE, odd)
    index = build_index(cache, tmp_path / "index", level=level, embedding=embedding)
    assert len(index) == 32 and index.details["without_usable_slice"] == ["c30"]
    for case_id in ("c31", "c32"):
        for rerank in ("none", "ordered"):
            found = search(index, case_id=case_id, k=3, rerank=rerank)
            assert found.height == 3 and found["similarity"].is_finite().all() and case_id not in set(found["case_id"])
    with pytest.raises(SearchError, match="has no case c30"):
        search(index, case_id="c30")
    write_shard(cache, RECIPE, [replace(stack(33), blank=np.ones(9, bool)), stack(34)])
    more, taken = add_cases(index)
    assert taken == ["c34"] and more.details["without_usable_slice"] == ["c30", "c33"] and len(more) == 33
    again, taken = add_cases(more)
    assert taken == [] and again is more
    write_shard(cache, RECIPE, [replace(stack(35), blank=np.ones(9, bool))])
    assert add_cases(more)[0].details["without_usable_slice"] == ["c30", "c33", "c35"]
    zero = np.zeros(index.dim, np.float32)
    with pytest.raises(SearchError, match="the vector of query 0 is zero: it has no direction to compare"):
        index.search(zero, 3)


def test_cases_that_show_nothing_in_an_older_index_are_withdrawn_by_name(cache: Path, tmp_path: Path) -> None:
    index = build_index(cache, tmp_path / "index")
    vectors = np.array(index.read_vectors())
    vectors[[7, 30]] = 0  # whitened, they had a direction and were let in
    older = rewrite_index(index, vectors, index.cases, kept=np.arange(CASES))
    message = (
        r"holds cases that show nothing, their vectors are zero: c07,c30; .*-o .*index --remove c07,c30\), then add"
    )
    with pytest.raises(SearchError, match=message):
        add_cases(older)
    left = remove_cases(open_index(tmp_path / "index"), ["c07", "c30"])
    back, taken = add_cases(left, cache=cache)
    assert taken == ["c07", "c30"] and len(back) == CASES
    assert np.abs(back.read_vectors()).sum(1).min() > 0


def test_cases_left_out_stay_told_until_another_cache_shows_them(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", range(8))
    write_shard(cache, RECIPE, [replace(stack(number), blank=np.ones(9, bool)) for number in (8, 9)])
    index = build_index(cache, tmp_path / "index")
    assert index.details["without_usable_slice"] == ["c08", "c09"]
    other = make_cache(tmp_path / "other", [3, 8, 10])
    write_shard(other, RECIPE, [replace(stack(4), blank=np.ones(9, bool)), replace(stack(11), blank=np.ones(9, bool))])
    more, taken = add_cases(index, cache=other)
    assert taken == ["c08", "c10"]
    assert more.details["without_usable_slice"] == ["c09", "c11"]  # c04 is held as the first cache shows it
    assert add_cases(more)[0].details["without_usable_slice"] == ["c09", "c11"]


@pytest.mark.parametrize("by_patch", [False, True])
def test_no_heat_is_drawn_beside_the_image(tmp_path: Path, by_patch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    create_cache(tmp_path / "cache", RECIPE)
    boxed = [replace(stack(number), box=(-4, 0, 16, 16)) for number in range(4)]
    write_shard(tmp_path / "cache", RECIPE, boxed)
    index = build_index(tmp_path / "cache", tmp_path / "index")
    drawn: list[Any] = []
    monkeypatch.setattr(pictures, "plot_montage", lambda *_, overlays, **__: drawn.extend(overlays) or b"")
    found = search(index, case_id="c00", k=2, by_patch=by_patch)
    matches = match_cases(index, "c00", found["case_id"].to_list(), by_patch=by_patch)
    pictures.draw_similar_cases(index, found, tmp_path / "m.png", query="c00", matches=matches, pairs=2)
    inside = np.zeros((8, 8), bool)
    inside[2:6, :4] = True
    assert len(drawn) == 8
    assert all((heat[~inside] == 0).all() for heat in drawn) and max(heat[inside].max() for heat in drawn) > 0.5


def test_a_cache_that_shows_nothing_gives_no_index(tmp_path: Path) -> None:
    create_cache(tmp_path / "cache", RECIPE)
    write_shard(tmp_path / "cache", RECIPE, [replace(stack(n), blank=np.ones(9, bool)) for n in range(2)])
    with pytest.raises(SearchError, match=r"every slice of the 2 cases in .*cache is blank; there is nothing to comp"):
        build_index(tmp_path / "cache", tmp_path / "index")


def test_damage_does_not_pass_into_a_changed_index(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexseals, "_CHECKED_WHOLE_BYTES", 1000)
    index = build_index(cache, tmp_path / "index", whiten=0)
    file = index.path / "vectors.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for change in (lambda: remove_cases(index, ["c00"]), lambda: add_cases(index)):
        with pytest.raises(SearchError, match=r"vectors.npy is damaged: it is not what was written; build the index"):
            change()


@pytest.mark.parametrize("level", ["case", "slice"])
def test_a_case_withdrawn_is_nowhere_left(cache: Path, tmp_path: Path, level: str) -> None:
    index = build_index(cache, tmp_path / "index", level=level, embedding=None if level == "case" else "grid:patch@2")
    before = search(index, case_id="c20", k=5)
    left = remove_cases(index, ["c00", "c21", "c39"], cache=cache)
    assert len(left) == CASES - 3 and not {"c00", "c21", "c39"} & set(left.cases["case_id"])
    after = search(left, case_id="c20", k=5)
    kept = before.filter(pl.col("case_id") != "c21")["case_id"].to_list()
    assert after["case_id"].to_list()[: len(kept)] == kept
    if level == "case":
        assert left.extras["slice_places"][:, 0].max() == CASES - 4 and len(left.extras["slices"]) == 37 * 8
    else:
        assert left.rows is not None and left.rows["case"].n_unique() == CASES - 3
    with pytest.raises(SearchError, match="has no case c00, so it cannot be withdrawn"):
        remove_cases(left, ["c00"])
    with pytest.raises(SearchError, match="would hold no case any more; delete the folder instead"):
        remove_cases(left, left.cases["case_id"].to_list())


def test_an_index_of_slices_says_where_each_slice_is(cache: Path, tmp_path: Path) -> None:
    index = build_index(cache, tmp_path / "index", level="slice", embedding="grid:patch@2")
    assert index.level == "slice" and index.count == CASES * 8 and len(index) == CASES
    hit = index.search(np.asarray(index.read_vectors()[5], np.float32), 1).row(0, named=True)
    assert (hit["case_id"], hit["view"], hit["plane"], hit["slice"]) == ("c00", "t1", "axial", 6)
    assert hit["similarity"] == pytest.approx(1, abs=1e-3)
    assert search(index, case_id="c06", k=1)["case_id"].to_list() == ["c07"]
    assert search(index, case_id="c06", k=4, where="case_id >= 'c30'").height == 4
    again, alone = (search(index, case_id="c06", k=12, rerank=how) for how in ("free", "none"))
    assert "recall_rank" in again.columns and "recall_rank" not in alone.columns  # nothing ranked these again
    assert alone["similarity"].is_sorted(descending=True)
    assert again.sort("recall_rank")["case_id"].to_list()[:3] == alone["case_id"].to_list()[:3]
    grown = make_cache(tmp_path / "grown", range(20))
    small = build_index(grown, tmp_path / "small", level="slice", embedding="grid:patch@2")
    make_cache(grown, range(20, 22))
    added, _ = add_cases(small)
    assert added.count == 22 * 8 and search(added, case_id="c20", k=1)["case_id"].to_list() == ["c21"]


def test_embeddings_side_by_side_weigh_alike(cache: Path) -> None:
    opened = open_cache(cache)
    joined = join_embeddings(opened, parse_embeddings("mean:cls + grid:patch@2", opened))
    assert joined.vectors.shape == (CASES, DIM + 4 * DIM)
    for part in (joined.vectors[:, :DIM], joined.vectors[:, DIM:]):
        np.testing.assert_allclose(np.linalg.norm(part, axis=1), 1, rtol=1e-5)


def test_an_aligned_vector_is_the_mean_of_each_equal_part() -> None:
    tokens = np.arange(16, dtype=np.float32)[:, None]
    aligned = Embedding.parse("aligned:cls:2")
    np.testing.assert_allclose(aligned.stack_vector(tokens), np.arange(8) * 2 + 0.5)
    np.testing.assert_allclose(aligned.stack_vector(tokens[:4]), np.repeat(np.arange(4), 2))
    mean = aligned.stack_vector(tokens[:, None])
    np.testing.assert_allclose(aligned.stack_vector(aligned.subtract(tokens[:, None], mean)), 0, atol=1e-6)


# --- regions ---------------------------------------------------------------------------------------------------------


def covered(region: Region, number: int = 0) -> Any:
    """[slices 4], with the source's axes turned: rows and columns of the file run against the canonical ones."""
    source = stack(number)
    from embedkit.catalogue import StackRecord

    record = StackRecord(
        source.case_id,
        source.patient_id,
        "t1",
        "axial",
        ("t1",),
        source.plane_shape,
        source.box,
        source.source_shape,
        source.source_affine,
        1,
        0,
        "0",
    )
    return region.measure_cover(record, source.indices, 4)


def test_a_box_in_voxels_and_the_same_in_mm_cover_the_same_patches() -> None:
    voxels = covered(Region.parse("voxels:0,0,2,4,4,5"))
    # The affine runs to the patient's right and to anterior; canonical axes to the left and to posterior.
    assert voxels[2:5].tolist() == [[0, 0, 0, 1]] * 3 and voxels.sum() == 3
    mm = covered(Region.parse("mm:9,19,36,16.5,26.5,42"))
    np.testing.assert_array_equal(voxels, mm)
    half = covered(Region.parse("voxels:0,0,0,2,4,1"))
    assert half[0].tolist() == [0, 0, 0, 0.5]


def test_a_mask_covers_its_patches(tmp_path: Path) -> None:
    mask = np.zeros((9, 8, 8), np.uint8)
    mask[3, :4, 4:] = 2
    np.save(tmp_path / "mask.npy", mask)
    cover = covered(Region.parse(str(tmp_path / "mask.npy")))
    assert cover[3].tolist() == [0, 0, 1, 0] and cover.sum() == 1


def test_only_the_patches_of_a_region_vote(cache: Path, tmp_path: Path) -> None:
    index = build_index(cache, tmp_path / "index")
    region = Region.parse("voxels:0,0,3,4,4,8")
    found = search(index, case_id="c08", k=1, region=region)
    assert found["case_id"].to_list() == ["c09"]
    reader = open_slices(index, open_cache(cache))
    part = reader.read("c08", region=region)["t1/axial"]
    assert part.rows.tolist() == [3, 4, 5, 6, 7] and part.votes is not None and part.votes[:, :3].max() == 0
    expected = (part.patches[:, 3] @ reader.read("c09")["t1/axial"].patches.reshape(-1, DIM).T).reshape(5, 8, 4).max(2)
    assert search(index, case_id="c08", k=1, region=region, rerank="free")["similarity"][0] == pytest.approx(
        float(expected.max(1).mean()), abs=1e-5
    )


@pytest.mark.parametrize("text", ["voxels:1,2,3", "voxels:1,2,3,1,5,6", "mm:a,b,c,d,e,f", "voxels:0,0,0,1.5,2,2"])
def test_a_region_that_is_no_box_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match=r"is no box: give six numbers, the lower corner and then the upper"):
        Region.parse(text)


def test_regions_that_cannot_be_searched_for_are_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"'nowhere.nii' is no file and no box; give a mask, voxels:I,J,K"):
        Region.parse("nowhere.nii")
    inside, outside = Region.parse("voxels:0,0,0,4,4,9"), Region.parse("mm:500,500,500,600,600,600")
    index = build_index(cache, tmp_path / "index")
    with pytest.raises(SearchError, match="the region touches no patch of c00: it lies outside"):
        search(index, case_id="c00", region=outside)
    by_class = build_index(cache, tmp_path / "cls", embedding="mean:cls")
    with pytest.raises(SearchError, match="holds mean:cls:2 of each case, in which a region has no part of its own"):
        search(by_class, case_id="c00", region=inside)
    one = build_index(cache, tmp_path / "one", slices="mean:cls")
    with pytest.raises(SearchError, match="the slices of this index are compared by a single vector; build it with"):
        search(one, case_id="c00", region=inside)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_options_that_mean_nothing_are_refused(cache: Path, tmp_path: Path) -> None:
    index = build_index(cache, tmp_path / "index")
    with pytest.raises(OptionError, match="rerank 'some' is unknown; give none, free, ordered, both"):
        search(index, case_id="c00", rerank="some")
    with pytest.raises(OptionError, match="candidates is 0, expected at least 1"):
        search(index, case_id="c00", candidates=0)
    for count in (0, -2):
        with pytest.raises(SearchError, match=f"k is {count}, expected at least 1 case"):
            search(index, case_id="c00", k=count)
    with pytest.raises(SearchError, match="a vector has no slices to rank by"):
        search(index, vector=np.ones(index.dim, np.float32), rerank="free")
    for name in ("cls", "middle:cls", "aligned", "mean:"):
        with pytest.raises(OptionError, match=f"embedding '{name}' is not mean:TOKEN_SET"):
            build_index(cache, tmp_path / "other", embedding=name)
    with pytest.raises(OptionError, match="level 'row' is unknown; give case or slice"):
        build_index(cache, tmp_path / "x", level="row")
    with pytest.raises(OptionError, match="embedding 'mean:cls' was given beside run here, whose pooled vector"):
        build_index(cache, tmp_path / "x", embedding="mean:cls", run="here")
    with pytest.raises(OptionError, match="an index of slices takes one embedding, mean or grid, and no run"):
        build_index(cache, tmp_path / "x", level="slice", embedding="aligned:patch@2")
    with pytest.raises(SearchError, match="holds vectors of each slice, but this asks for an index of each case"):
        build_index(cache, tmp_path / "s", level="slice", embedding="mean:cls").search_cases(["c00"], 1)


def test_a_cache_of_another_recipe_is_not_taken(cache: Path, tmp_path: Path) -> None:
    index = build_index(cache, tmp_path / "index")
    other = make_cache(tmp_path / "other", range(2), replace(RECIPE, image_size=64))
    for call in (lambda: add_cases(index, cache=other), lambda: remove_cases(index, ["c00"], cache=other)):
        with pytest.raises(RecipeError, match="image_size is 64 there and 32 here"):
            call()
    more = make_cache(tmp_path / "more", range(2))
    write_shard(more, RECIPE, [stack(50, "flair")])
    with pytest.raises(SearchError, match=r"has view flair/axial, but the index knows t1/axial; build the index anew"):
        add_cases(index, cache=more)


def test_an_index_of_some_cases_fits_on_them_alone_and_takes_the_others_later(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", range(CASES))
    half = [f"c{number:02}" for number in range(0, CASES, 2)]
    part = build_index(cache, tmp_path / "part", cases=half)
    alone = build_index(make_cache(tmp_path / "half", range(0, CASES, 2)), tmp_path / "alone")
    assert part.cases["case_id"].to_list() == half
    for name in ("slice_centres", "view_means"):
        np.testing.assert_array_equal(part.extras[name], alone.extras[name])
    whole, taken = add_cases(part)
    assert len(taken) == CASES // 2 and len(whole) == CASES
    np.testing.assert_array_equal(whole.mean, alone.mean)


@pytest.mark.parametrize(
    ("cases", "message"), [([], "was asked for no case at all; it holds 2"), (["c77"], "has no case c77; it holds 2")]
)
def test_cases_that_the_cache_lacks_are_named(tmp_path: Path, cases: list[str], message: str) -> None:
    cache = make_cache(tmp_path / "cache", range(2))
    with pytest.raises(SearchError, match=message):
        build_index(cache, tmp_path / "index", cases=cases)


def test_a_flipped_bit_is_never_indexed(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", range(CASES))
    (shard,) = open_cache(cache).shards
    place, data = shard.arrays["tokens/patch@2:1"], bytearray(shard.path.read_bytes())
    data[place.offset + place.bytes - 2] ^= 1  # the last token stays a number like the others
    shard.path.write_bytes(data)
    with pytest.raises(CacheError, match=f"{shard.path.name} is damaged: tokens/patch@2:1 is not what was written"):
        build_index(cache, tmp_path / "index")
    assert not (tmp_path / "index").exists()
