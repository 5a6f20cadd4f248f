"""A target column becomes the right kind, codes and cases; splits never part a patient and never lose a class."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedGroupKFold

from embedkit.errors import OptionError, TaskError
from embedkit.folds import _Dealer
from embedkit.manifest import read_labels, read_manifest
from embedkit.tasks import (
    Task,
    encode_targets,
    folds_from_column,
    folds_from_groups,
    infer_kind,
    inner_split,
    make_folds,
    make_task,
    repeat_folds,
)


def labels_of(values: Sequence[Any], **kinds: Any) -> pl.DataFrame:
    ids = [f"c{number}" for number in range(len(values))]
    return pl.DataFrame({"case_id": ids, "y": pl.Series(values, **kinds)})


def cases_of(patients: Sequence[str] | int) -> pl.DataFrame:
    if isinstance(patients, int):
        patients = [f"p{number}" for number in range(patients)]
    return pl.DataFrame({"case_id": [f"c{number}" for number in range(len(patients))], "patient_id": patients})


def task_of(values: Sequence[Any], patients: Sequence[str] | None = None, **options: Any) -> Task:
    return make_task(labels_of(values), "y", cases_of(patients or len(values)), **options)[0]


def patients_are_whole(patients: Sequence[str], parts: np.ndarray) -> bool:
    return len(set(zip(patients, parts.tolist(), strict=True))) == len(set(patients))


# --- kinds


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([True, False, None], "binary"),
        (["odd", "even", "odd"], "binary"),
        ([1, 2, 2], "binary"),
        ([0.0, 1.0, None], "binary"),
        (["a", "b", "c"], "multiclass"),
        ([1, 2, 3], "multiclass"),
        ([1.0, 2.0, 3.0, None], "multiclass"),
        (list(range(20)) * 5, "multiclass"),
        (list(range(20)) * 4, "regression"),
        (list(range(21)) * 9, "regression"),
        ([1324, 2314, 1912], "regression"),
        ([0.5, 1.0, 2.0], "regression"),
        ([str(number) for number in range(30)], "regression"),
        (["a;b", "b", None], "multilabel"),
        (["a|b", "b", None], "multilabel"),
        ([["a"], [], ["a", "b"]], "multilabel"),
    ],
)
def test_kind_follows_from_the_values(values: list[Any], kind: str) -> None:
    assert infer_kind(pl.Series(values), "y") == kind


def test_many_different_texts_are_refused_as_classes() -> None:
    texts = [f"note {number}" for number in range(21)]
    with pytest.raises(TaskError, match=r"y has 21 different texts in 21 cases \(note 0, note 1, .*at most 20 classes"):
        task_of(texts)


def test_dates_are_refused() -> None:
    dates = [date(2024, 1, day) for day in (1, 2, 3)]
    with pytest.raises(TaskError, match="y holds Date, expected text, numbers, truth values or lists of text"):
        task_of(dates)
    with pytest.raises(TaskError, match="y holds Date, expected numbers for a regression"):
        task_of(dates, kind="regression")


def test_an_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(OptionError, match="'ranking' is unknown; expected one of binary, multiclass, multilabel, reg"):
        task_of([0, 1, 0, 1], kind="ranking")


# --- codes


def test_the_last_sorted_value_is_positive() -> None:
    task = task_of(["no", "yes", "yes", "no"])
    assert (task.kind, task.classes, task.outputs) == ("binary", ("no", "yes"), 1)
    assert task.targets.tolist() == [0, 1, 1, 0]
    assert task.targets.dtype == np.int64


def test_truth_values_and_whole_floats_get_plain_names() -> None:
    assert task_of([True, False, True, False]).classes == ("false", "true")
    assert task_of([2.0, 1.0, 2.0, 1.0]).classes == ("1", "2")
    assert task_of([0.25, 0.5, 0.25, 0.5]).classes == ("0.25", "0.5")


def test_numbers_sort_as_numbers_even_as_text() -> None:
    task = task_of(["10", "9", "2", "2", "9", "10"])
    assert task.classes == ("2", "9", "10")
    assert task.targets.tolist() == [2, 1, 0, 0, 1, 2]
    assert task.outputs == 3


def test_text_is_stripped_and_blank_text_is_unknown() -> None:
    task, report = make_task(labels_of([" a", "b ", "a", "b", "  "]), "y", cases_of(5))
    assert task.classes == ("a", "b")
    assert task.targets.tolist() == [0, 1, 0, 1]
    assert report.unlabelled == ("c4",)


def test_categories_are_text() -> None:
    assert task_of(pl.Series(["b", "a", "b", "a"], dtype=pl.Categorical)).classes == ("a", "b")


def test_regression_keeps_the_numbers() -> None:
    task = task_of([1.5, None, 2.5, 1e6])
    assert (task.kind, task.classes, task.outputs) == ("regression", (), 1)
    assert task.targets.tolist() == [1.5, 2.5, 1e6]
    assert task.case_ids == ("c0", "c2", "c3")


def test_regression_can_be_forced_on_codes_and_on_text() -> None:
    assert task_of([1, 2, 1], kind="regression").targets.tolist() == [1.0, 2.0, 1.0]
    assert task_of(["1", "2.5"], kind="regression").targets.tolist() == [1.0, 2.5]


def test_multilabel_text_gives_a_column_per_label() -> None:
    task = task_of(["b; a", "a", ";", "b", None])
    assert (task.kind, task.classes, task.outputs) == ("multilabel", ("a", "b"), 2)
    assert task.targets.tolist() == [[1, 1], [1, 0], [0, 0], [0, 1]]


def test_semicolons_win_over_bars() -> None:
    assert task_of(["x|y;z", "z", ";", "x|y"]).classes == ("x|y", "z")


def test_multilabel_lists_equal_multilabel_text() -> None:
    lists = task_of([["b", "a"], ["a"], [], ["b", None], None])
    assert lists.targets.tolist() == task_of(["b|a", "a", "|", "b", None]).targets.tolist()
    assert lists.classes == ("a", "b")


def test_named_classes_set_the_order_and_leave_the_others_out() -> None:
    table = labels_of([1, 2, 3, 3, 1, None])
    task, report = make_task(table, "y", cases_of(6), classes=["3", "1"])
    assert (task.kind, task.classes) == ("binary", ("3", "1"))
    assert task.targets.tolist() == [1, 0, 0, 1]
    assert task.case_ids == ("c0", "c2", "c3", "c4")
    assert task.patient_ids == ("p0", "p2", "p3", "p4")
    assert report.left_out == ("c1",)
    assert report.unlabelled == ("c5",)


def test_named_classes_pick_labels_of_a_multilabel_task_and_keep_every_case() -> None:
    task, report = make_task(labels_of(["a;b", "b;c", "c", "a"]), "y", cases_of(4), classes=["b"])
    assert task.targets.tolist() == [[1], [1], [0], [0]]
    assert report.left_out == ()


def test_numbers_become_classes_when_classes_are_named() -> None:
    assert task_of([100, 200, 300, 100, 200, 300], classes=["100", "200", "300"]).kind == "multiclass"


@pytest.mark.parametrize(
    ("classes", "kind", "message"),
    [
        ([], None, "classes are none; expected one or more, each named once"),
        (["1", "1"], None, "classes are 1, 1; expected one or more, each named once"),
        (["1"], "regression", "classes 1 were named for a regression task, which has none"),
    ],
)
def test_senseless_classes_are_refused(classes: list[str], kind: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        task_of([1, 2, 1, 2], classes=classes, kind=kind)


def test_classes_that_no_case_has_are_refused() -> None:
    with pytest.raises(TaskError, match=r"no case has a label among x, y; labels found \(1, 2\)"):
        task_of([1, 2, 1, 2], classes=["x", "y"])


# --- cases


def test_cases_follow_the_case_table_and_its_several_rows() -> None:
    labels = pl.DataFrame({"case_id": ["b", "a", "c", "z"], "y": [1, 0, 1, 0]})
    cases = pl.DataFrame({"case_id": ["a", "a", "b", "d", "c"], "patient_id": ["p", "p", "q", "r", "s"]})
    task, report = encode_targets(labels, "y", cases)
    assert task.case_ids == ("a", "b", "c")
    assert task.patient_ids == ("p", "q", "s")
    assert task.targets.tolist() == [0, 1, 1]
    assert report.unlabelled == ("d",)
    assert report.unknown == ("z",)


def test_numeric_case_ids_match_text_ones() -> None:
    labels = pl.DataFrame({"case_id": [1, 2], "y": [0, 1]})
    cases = pl.DataFrame({"case_id": ["2", "1"], "patient_id": ["p", "q"]})
    assert encode_targets(labels, "y", cases)[0].targets.tolist() == [1, 0]


def test_an_unknown_case_without_label_is_not_reported() -> None:
    labels = pl.DataFrame({"case_id": ["c0", "c1", "x"], "y": [0, 1, None]})
    assert encode_targets(labels, "y", cases_of(2))[1].unknown == ()


def test_targets_of_new_cases_keep_the_given_classes_even_if_absent() -> None:
    task, _ = encode_targets(labels_of(["b", "b"]), "y", cases_of(2), kind="multiclass", classes=["a", "b", "c"])
    assert task.targets.tolist() == [1, 1]
    assert task.classes == ("a", "b", "c")


def test_a_missing_target_names_near_and_all_columns() -> None:
    labels = pl.DataFrame({"case_id": ["c0"], "laterality": [1], "Gender": [2]})
    with pytest.raises(
        TaskError, match="no column lateralty; did you mean laterality\\? it has case_id, laterality, G"
    ):
        make_task(labels, "lateralty", cases_of(1))
    with pytest.raises(TaskError, match="no column gender; did you mean Gender\\?"):
        make_task(labels, "gender", cases_of(1))
    with pytest.raises(TaskError, match="no column qqq; it has case_id, laterality, Gender"):
        make_task(labels, "qqq", cases_of(1))


def test_tables_without_ids_are_refused() -> None:
    with pytest.raises(TaskError, match="the label table has no column case_id; it has y"):
        make_task(pl.DataFrame({"y": [1]}), "y", cases_of(1))
    with pytest.raises(TaskError, match="the case table has no column patient_id"):
        make_task(labels_of([1]), "y", pl.DataFrame({"case_id": ["c0"]}))


def test_two_labels_or_two_patients_of_a_case_are_refused() -> None:
    labels = pl.DataFrame({"case_id": ["c0", "c0"], "y": [1, 2]})
    with pytest.raises(TaskError, match=r"1 case \(c0\) with several rows in the label table, expected one each"):
        make_task(labels, "y", cases_of(1))
    cases = pl.DataFrame({"case_id": ["c0", "c0"], "patient_id": ["p", "q"]})
    with pytest.raises(TaskError, match=r"1 case \(c0\) with several patients, expected one each"):
        make_task(labels_of([1]), "y", cases)


def test_another_patient_in_the_label_table_is_refused_and_an_unknown_one_is_not() -> None:
    labels = labels_of([0, 1, 0, 1])
    cases = cases_of(["p0", "p1", "2", "p3"])
    agreeing = labels.with_columns(patient_id=pl.Series(["p0", None, " 2 ", ""]))
    assert make_task(agreeing, "y", cases)[0].patient_ids == ("p0", "p1", "2", "p3")
    elsewhere = pl.concat([agreeing, pl.DataFrame({"case_id": ["c9"], "y": [1], "patient_id": ["p0"]})])
    assert make_task(elsewhere, "y", cases)[1].unknown == ("c9",)
    differing = labels.with_columns(patient_id=pl.Series(["p0", "p0", None, "p4"]))
    with pytest.raises(
        TaskError,
        match=r"case c1 is of patient p0 in the label table but of p1 in the cache \(and 1 case more\).* put patient_id"
        r" into the manifest and extract again to a new --out, or drop the column patient_id from the label table",
    ):
        make_task(differing, "y", cases)


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "target"), [("lgg", "death01"), ("hippocampus", "anterior_mm3")])
def test_real_label_tables_agree_with_their_manifests(real_data: Path, name: str, target: str) -> None:
    labels = read_labels(real_data / name / "labels.csv")
    assert "patient_id" in labels.columns
    assert len(encode_targets(labels, target, read_manifest(real_data / name / "manifest.csv"))[0].case_ids) > 20


def test_no_labelled_case_is_refused_and_says_where_the_labels_are() -> None:
    labels = pl.DataFrame({"case_id": ["x1", "x2"], "y": [0, 1]})
    with pytest.raises(TaskError, match=r"none of the 3 cases has a label, and 2 labels \(x1, x2\) belong to unknown"):
        make_task(labels, "y", cases_of(3))


def test_constant_labels_are_refused() -> None:
    with pytest.raises(TaskError, match="y is 7 in all 3 labelled cases, expected at least two values"):
        task_of([7, 7, 7])
    with pytest.raises(TaskError, match=r"y is 7\.5 in all 3 labelled cases"):
        task_of([7.5, 7.5, 7.5], kind="regression")
    with pytest.raises(TaskError, match="y is empty in all 2 labelled cases"):
        task_of([";", ";"])


def test_a_class_with_one_member_is_refused() -> None:
    with pytest.raises(
        TaskError, match=r"class 3 has 1 case \(c4\) of 1 patient, .* at least 2 patients; leave it out"
    ):
        task_of([1, 2, 1, 2, 3])


def test_a_class_of_one_patient_with_many_cases_is_refused() -> None:
    with pytest.raises(TaskError, match=r"class b has 2 cases \(c2, c3\) of 1 patient"):
        task_of(["a", "a", "b", "b"], ["p", "q", "r", "r"])


def test_a_label_that_all_but_one_have_is_refused() -> None:
    with pytest.raises(TaskError, match=r"class without a has 1 case \(c2\) of 1 patient"):
        task_of(["a;b", "a", "b", "a;b", "a"])


def test_three_values_are_not_binary() -> None:
    with pytest.raises(TaskError, match=r"y has 3 values \(1, 2, 3\), expected 2 for a binary task; name the two"):
        task_of([1, 2, 3], kind="binary")


def test_lists_are_not_classes() -> None:
    with pytest.raises(TaskError, match="y holds lists, expected one value per case for a binary task; use multilabel"):
        task_of([["a"], ["b"]], kind="binary")


def test_text_in_a_forced_regression_names_the_cases() -> None:
    with pytest.raises(TaskError, match=r"y has 1 label that is no finite number \(c1: 'tall'\), expected numbers"):
        task_of(["1.5", "tall", "2"], kind="regression")
    with pytest.raises(TaskError, match="2 labels that are no finite number"):
        task_of(["1.5", "nan", "inf"], kind="regression")


def test_nan_labels_are_refused_whatever_the_kind() -> None:
    with pytest.raises(TaskError, match=r"y is NaN or infinite in 2 cases \(c1, c3\), .* leave the cell empty"):
        task_of([0.0, float("nan"), 1.0, float("inf")])


# --- folds


def test_folds_keep_patients_whole_and_classes_even() -> None:
    patients = [f"p{number // 2}" for number in range(80)]
    task = task_of([int(number % 8 < 2) for number in range(80)], patients)
    folds = make_folds(task, 5, seed=0)
    assert patients_are_whole(patients, folds)
    assert np.bincount(folds).tolist() == [16] * 5
    assert [int(task.targets[folds == fold].sum()) for fold in range(5)] == [4] * 5


def test_folds_depend_on_the_seed_alone() -> None:
    task = task_of([number % 2 for number in range(40)])
    assert make_folds(task, 4, seed=3).tolist() == make_folds(task, 4, seed=3).tolist()
    assert make_folds(task, 4, seed=3).tolist() != make_folds(task, 4, seed=4).tolist()


def test_regression_folds_have_like_targets() -> None:
    values = np.random.default_rng(0).permutation(100).astype(float)
    task = task_of(values.tolist(), kind="regression")
    folds = make_folds(task, 5, seed=0)
    assert np.bincount(folds).tolist() == [20] * 5
    for fold in range(5):
        deciles = (task.targets[folds == fold] // 10).astype(int)
        assert np.bincount(deciles, minlength=10).tolist() == [2] * 10


def test_a_rare_label_is_even_over_the_folds() -> None:
    sets = ["common;rare" if number < 8 else "common" if number % 2 else ";" for number in range(40)]
    task = task_of(sets)
    folds = make_folds(task, 4, seed=0)
    assert [int(task.targets[folds == fold, 1].sum()) for fold in range(4)] == [2, 2, 2, 2]


@settings(max_examples=30, deadline=None)
@given(
    patients=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2)), min_size=12, max_size=60),
    n=st.integers(2, 4),
    seed=st.integers(0, 9),
)
def test_folds_hold_every_class_and_no_split_patient(patients: list[tuple[int, int]], n: int, seed: int) -> None:
    classes = [label for size, label in patients for _ in range(size)]
    owners = [f"p{number}" for number, (size, _) in enumerate(patients) for _ in range(size)]
    table = pl.DataFrame({"case_id": [f"c{number}" for number in range(len(classes))], "y": classes})
    task, _ = encode_targets(table, "y", cases_of(owners), kind="multiclass", classes=["0", "1", "2"])
    if min(task.patients_per_state) < n:
        with pytest.raises(TaskError, match="fewer than the"):
            make_folds(task, n, seed=seed)
        return
    folds = make_folds(task, n, seed=seed)
    assert patients_are_whole(owners, folds)
    for fold in range(n):
        assert set(task.targets[folds == fold]) == {0, 1, 2}


def test_fewer_than_two_folds_are_refused() -> None:
    with pytest.raises(OptionError, match="1 fold asked for, expected 2 or more"):
        make_folds(task_of([0, 1, 0, 1]), 1, seed=0)


def test_more_folds_than_patients_are_refused() -> None:
    with pytest.raises(TaskError, match="2 labelled patients cannot fill 3 folds; ask for fewer folds"):
        make_folds(task_of([0, 1, 0, 1], ["p", "p", "q", "q"]), 3, seed=0)


def test_a_class_rarer_than_the_folds_names_class_count_folds_and_ways_out() -> None:
    task = task_of(["a"] * 9 + ["b"] * 3)
    with pytest.raises(
        TaskError,
        match="class b occurs in 3 patients, fewer than the 5 folds, so a fold would lack it; ask for at most 3 folds,"
        " leave it out by naming the classes to learn, merge it with another class in the label table, or add cases",
    ):
        make_folds(task, 5, seed=0)


def test_patients_of_several_classes_can_rule_every_deal_out() -> None:
    task = task_of(["x", "y", "x", "z", "y", "z"], ["p", "p", "q", "q", "r", "r"])
    with pytest.raises(TaskError, match=r"no deal of 3 patients into 2 folds .* \(fold \d lacked class [xyz]\)"):
        make_folds(task, 2, seed=0)


# --- a given split


def test_repeated_folds_are_deals_of_their_own_and_begin_with_the_single_one() -> None:
    patients = [f"p{number // 2}" for number in range(40)]
    task = task_of([number // 2 % 2 for number in range(40)], patients)
    deals = repeat_folds(task, 4, repeats=3, seed=7)
    assert deals.shape == (3, 40)
    np.testing.assert_array_equal(deals[0], make_folds(task, 4, seed=7))
    np.testing.assert_array_equal(deals, repeat_folds(task, 4, repeats=3, seed=7))
    for repeat, deal in enumerate(deals):
        assert set(deal.tolist()) == set(range(4 * repeat, 4 * repeat + 4))
        assert patients_are_whole(patients, deal)
        assert all(set(task.targets[deal == fold]) == {0, 1} for fold in set(deal.tolist()))
    assert len(np.unique(deals % 4, axis=0)) == 3


def test_no_repeat_is_refused() -> None:
    with pytest.raises(OptionError, match="0 repeats of the folds asked for, expected 1 or more"):
        repeat_folds(task_of([0, 1] * 6), 2, repeats=0, seed=0)


def split_table(values: Sequence[Any]) -> pl.DataFrame:
    return pl.DataFrame({"case_id": [f"c{number}" for number in range(len(values))], "split": values})


def test_a_published_split_tests_only_its_test_part() -> None:
    task = task_of([0, 1, 0, 1, 0, 1])
    table = split_table(["Train", "train", "val", "val", "test", "test"])
    assert folds_from_column(task, table, "split").tolist() == [-1, -1, -1, -1, 0, 0]


def test_every_site_is_a_fold_in_sorted_order() -> None:
    task = task_of([0, 1, 0, 1, 0, 1])
    assert folds_from_column(task, split_table(["s", "s", "b", "b", "k", "k"]), "split").tolist() == [2, 2, 0, 0, 1, 1]
    assert folds_from_column(task, split_table([10, 10, 9, 9, 2, 2]), "split").tolist() == [2, 2, 1, 1, 0, 0]


def test_leaving_a_group_out_takes_every_value_for_a_site_whatever_it_is_called() -> None:
    task = task_of([0, 1, 0, 1, 0, 1])
    table = split_table(["train", "train", "test", "test", "dev", "dev"])
    assert folds_from_groups(task, table, "split").tolist() == [2, 2, 1, 1, 0, 0]
    one_sided = task_of([0, 0, 0, 1, 1, 1, 0, 1])
    sites = split_table(["a", "a", "b", "b", "c", "c", "d", "d"])
    assert folds_from_groups(one_sided, sites, "split").tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_patient_at_two_sites_is_refused() -> None:
    task = task_of([0, 1, 0, 1, 0, 1], ["p0", "p1", "p1", "p2", "p3", "p4"])
    with pytest.raises(
        TaskError, match="split column split puts cases of patient p1 into a and b, expected all in one"
    ):
        folds_from_groups(task, split_table(["a", "a", "b", "b", "c", "c"]), "split")


def test_rows_of_cases_that_the_task_lacks_are_passed_over() -> None:
    task = task_of([0, 1, 0, 1])
    table = pl.concat([split_table(["a", "a", "b", "b"]), pl.DataFrame({"case_id": ["x"], "split": ["c"]})])
    assert folds_from_column(task, table, "split").tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", "a", "a", "a"], "split column split is a for all labelled cases, expected two or more values"),
        (["a", "a", "b", None], r"has no value for 1 labelled case \(c3\); fill it in"),
        (["a", "b", "b", "b"], "puts cases of patient p into a and b, expected all in one"),
    ],
)
def test_unfit_split_columns_are_refused(values: list[str | None], message: str) -> None:
    task = task_of([0, 1, 0, 1], ["p", "p", "q", "r"])
    with pytest.raises(TaskError, match=message):
        folds_from_column(task, split_table(values), "split")


def test_a_split_that_takes_a_class_from_training_is_refused() -> None:
    task = task_of(["a", "b", "a", "b"])
    with pytest.raises(TaskError, match="without test the training part lacks class b of target y; merge folds"):
        folds_from_column(task, split_table(["train", "test", "train", "test"]), "split")


def test_a_split_that_contradicts_itself_or_is_missing_is_refused() -> None:
    task = task_of([0, 1, 0, 1])
    table = pl.concat([split_table(["a", "a", "b", "b"]), split_table(["b"])])
    with pytest.raises(TaskError, match="gives case c0 both a and b, expected one"):
        folds_from_column(task, table, "split")
    with pytest.raises(TaskError, match="no column site to split by; the table has case_id, split"):
        folds_from_column(task, table, "site")


# --- the inner split


def test_an_inner_split_is_part_of_training_grouped_and_stratified() -> None:
    patients = [f"p{number // 2}" for number in range(100)]
    task = task_of([int(number % 10 < 2) for number in range(100)], patients)
    training = np.arange(100) < 80
    held = inner_split(task, training, fraction=0.25, seed=0)
    assert held.sum() == 20
    assert not held[~training].any()
    assert patients_are_whole(patients[:80], held[:80])
    assert task.targets[held].sum() == 4


def test_a_class_of_one_training_patient_stays_in_training() -> None:
    task = task_of(["a"] * 8 + ["b", "b"])
    training = np.arange(10) < 9
    for seed in range(5):
        held = inner_split(task, training, fraction=0.5, seed=seed)
        assert held.any()
        assert not held[8]


def test_a_rare_class_is_on_both_sides_of_an_inner_split() -> None:
    task = task_of(["a"] * 30 + ["b", "b"])
    for seed in range(5):
        held = inner_split(task, np.ones(32, dtype=bool), fraction=0.2, seed=seed)
        assert held[30:].sum() == 1


def test_an_inner_split_of_a_regression_spans_its_range() -> None:
    task = task_of([float(number) for number in range(100)], kind="regression")
    held = inner_split(task, np.ones(100, dtype=bool), fraction=0.2, seed=1)
    assert np.bincount((task.targets[held] // 10).astype(int)).tolist() == [2] * 10


def test_an_inner_split_of_two_patients_holds_one_out() -> None:
    task = task_of([0, 1, 0, 1], ["p", "p", "q", "q"])
    held = inner_split(task, np.ones(4, dtype=bool), fraction=0.2, seed=0)
    assert held.tolist() in ([True, True, False, False], [False, False, True, True])


def test_impossible_inner_splits_are_refused() -> None:
    task = task_of([0, 1, 0, 1], ["p", "p", "q", "q"])
    with pytest.raises(OptionError, match=r"an inner split of 0\.8 was asked for, expected above 0 and at most 0.5"):
        inner_split(task, np.ones(4, dtype=bool), fraction=0.8, seed=0)
    with pytest.raises(TaskError, match="y: 1 patient in training, expected 2 or more"):
        inner_split(task, np.array([True, True, False, False]), fraction=0.2, seed=0)
    lone = task_of([0, 1, 0, 1])
    with pytest.raises(TaskError, match="no inner split of 2 training patients keeps every class in training"):
        inner_split(lone, np.array([True, True, False, False]), fraction=0.2, seed=0)


# --- real labels


@pytest.mark.realdata
def test_the_glioma_labels_make_tasks(real_data: Path) -> None:
    labels = pl.read_csv(real_data / "lgg" / "labels.csv")
    cases = labels.select("case_id", "patient_id")
    gender, _ = make_task(labels, "gender", cases)
    assert (gender.kind, gender.classes, np.bincount(gender.targets).tolist()) == ("binary", ("1", "2"), [23, 31])
    assert make_task(labels, "tumour_slices", cases)[0].kind == "regression"
    with pytest.raises(TaskError, match=r"class 2 has 1 case .* of 1 patient"):
        make_task(labels, "laterality", cases)
    laterality, report = make_task(labels, "laterality", cases, classes=["1", "3"])
    assert np.bincount(laterality.targets).tolist() == [28, 25]
    assert len(report.left_out) == 1
    folds = make_folds(laterality, 5, seed=0)
    assert np.bincount(folds).min() >= 10


@pytest.mark.realdata
def test_both_sides_of_a_hippocampus_stay_in_one_fold(real_data: Path) -> None:
    labels = pl.read_csv(real_data / "hippocampus" / "labels.csv")
    task, _ = make_task(labels, "side", labels.select("case_id", "patient_id"))
    folds = make_folds(task, 5, seed=0)
    assert task.classes == ("even", "odd")
    assert patients_are_whole(task.patient_ids, folds)
    assert np.ptp([task.targets[folds == fold].mean() for fold in range(5)]) < 0.05


@pytest.mark.parametrize("seed", range(12))
def test_cases_are_dealt_as_scikit_learn_deals_them(seed: int) -> None:
    """The faster choice of a patient's fold is the same choice, ties included."""
    rng = np.random.default_rng(seed)
    cases, parts = 30 + 8 * seed, 2 + seed % 4
    patients = rng.integers(0, max(6, cases // (1 + seed % 3)), cases)
    classes = rng.integers(0, 2 + seed % 3, cases)

    def deal(dealer: type[StratifiedGroupKFold]) -> list[list[int]]:
        splits = dealer(parts, shuffle=True, random_state=seed).split(classes, classes, patients)
        return [tested.tolist() for _, tested in splits]

    assert deal(_Dealer) == deal(StratifiedGroupKFold)
