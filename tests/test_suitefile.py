"""Suite files: what they mean, and a clear error with the nearest right word for what means nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedkit.errors import SuiteError
from embedkit.suitefile import list_suites, read_suite

GOOD = """
heads = ["mlp"]
[[backbones]]
name = "embedkit/scattering"
[datasets.scans]
manifest = "scans/manifest.csv"
labels = "labels.csv"
columns = { double = "2 * size" }
extract = { tokens = "cls", slices = "count:4" }
[[tasks]]
name = "lesion"
dataset = "scans"
kind = "classification"
target = "lesion"
"""
TASK = '[[tasks]]\nname = "other"\ndataset = "scans"\n'


def read(folder: Path, text: str) -> object:
    file = folder / "brains.toml"
    file.write_text(text)
    return read_suite(file)


def test_paths_begin_at_the_file_and_defaults_are_filled_in(tmp_path: Path) -> None:
    (tmp_path / "brains.toml").write_text(GOOD)
    suite = read_suite(tmp_path / "brains.toml")
    dataset, task = suite.datasets["scans"], suite.tasks[0]
    assert (suite.name, suite.heads, suite.folds, suite.sweep) == ("brains", ("mlp",), 5, None)
    assert dataset.files == (tmp_path / "scans/manifest.csv", tmp_path / "labels.csv")
    assert dataset.extract == {"tokens": ["cls"], "slices": "count:4"}
    assert (task.metric, task.classes, dataset.columns) == ("auroc", (), {"double": "2 * size"})
    elsewhere = read_suite(tmp_path / "brains.toml", data=tmp_path / "data")
    assert elsewhere.datasets["scans"].manifest == tmp_path / "data" / "scans/manifest.csv"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("heads = [", "no TOML"),
        ("head = ['mlp']\n" + GOOD, "unknown key 'head'; did you mean heads"),
        (GOOD.replace("kind", "kinds"), "unknown key 'kinds'; did you mean kind"),
        (GOOD.replace('"classification"', '"classifcation"'), "kind is 'classifcation'; did you mean classification"),
        (GOOD.replace('target = "lesion"', "target = 3"), "target is 3, expected text"),
        (GOOD.replace('target = "lesion"', ""), "target is missing, expected text"),
        (GOOD.replace('dataset = "scans"', 'dataset = "scan"'), "no data set 'scan'; did you mean scans"),
        (GOOD.replace("slices =", "slice ="), "unknown key 'slice'; did you mean slices"),
        (GOOD + 'metric = "auc"', "metric is 'auc'; did you mean auprc|metric is 'auc'; did you mean auroc"),
        (GOOD + 'event = "dead"', "event is given, but the task is classification; event is for survival"),
        (GOOD + TASK + 'kind = "survival"\ntarget = "days"', "event is missing"),
        (GOOD + TASK.replace("other", "lesion") + 'kind = "regression"\ntarget = "size"', "two tasks are named lesion"),
        (GOOD.replace('name = "lesion"', 'name = "../lesion"'), "names a folder"),
        (GOOD.replace("labels =", "scan = 'here'\nlabels ="), "has manifest and scan; expected one of"),
        (GOOD.replace('manifest = "scans/manifest.csv"', ""), "has no images; expected one of manifest"),
        (GOOD.replace('manifest = "scans/manifest.csv"', "medmnist = 'a.npz'"), "labels are given"),
        (GOOD.replace('"2 * size"', "2"), "column double is 2, expected an SQL expression"),
        ("folds = 1\n" + GOOD, "folds is 1, expected 2 or more"),
        ("seed = true\n" + GOOD, "seed is True, expected a whole number"),
        ("sweep = 'big'\n" + GOOD, "sweep is 'big'"),
        ("heads = ['mlp', 'mlp']\n" + GOOD.replace('heads = ["mlp"]', ""), "expected a list of text, each once"),
        (GOOD + "[[published]]\nname = 'A'", "unknown key 'name'"),
        (GOOD + "[[published]]\nmethod='A'\nsource='B'\nscores={lesin={auroc=0.9}}", "no task 'lesin'; did you mean"),
        (GOOD + "[[published]]\nmethod='A'\nsource='B'\nscores={lesion={auroc='x'}}", "expected values by metric"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_named_with_the_nearest(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        read(tmp_path, text)


def test_a_suite_without_backbone_or_file_is_refused(tmp_path: Path) -> None:
    without = GOOD.replace('[[backbones]]\nname = "embedkit/scattering"\n', "")
    with pytest.raises(SuiteError, match="no backbone; expected at least one table"):
        read(tmp_path, without)
    with pytest.raises(SuiteError, match="cannot be read"):
        read_suite(tmp_path / "absent.toml")


def test_suites_that_come_along_are_read_by_name_and_need_data(tmp_path: Path) -> None:
    for name in list_suites():
        assert read_suite(name, data=tmp_path).name == name
    with pytest.raises(SuiteError, match="say where they are with --data"):
        read_suite("real")
    with pytest.raises(SuiteError, match=r"^no file that ends in \.toml, and no suite 'reel'; did you mean real\?$"):
        read_suite("reel")
    with pytest.raises(SuiteError, match=r"and no suite 'zzzz'; expected one of medmnist3d, real"):
        read_suite("zzzz")


def test_the_suite_of_real_scans_has_twelve_tasks_of_three_sorts(tmp_path: Path) -> None:
    suite = read_suite("real", data=tmp_path)
    assert len(suite.tasks) >= 12
    assert {task.kind for task in suite.tasks} == {"classification", "regression", "retrieval"}


def test_every_set_of_medmnist3d_has_figures_to_stand_beside(tmp_path: Path) -> None:
    suite = read_suite("medmnist3d", data=tmp_path)
    published = {each.method: each.scores for each in suite.published}
    assert set(published["ResNet-50 3D"]) == {task.name for task in suite.tasks}
    assert published["ResNet-50 3D"]["fracture"] == {"auroc": 0.725, "accuracy": 0.494}
