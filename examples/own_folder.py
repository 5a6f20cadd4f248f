"""From a folder of scans and a label table to scores and similar cases, in Python.

Usage: python examples/own_folder.py SCANS labels.csv TARGET OUT [BACKBONE]
"""

from __future__ import annotations

import sys
from pathlib import Path

import embedkit


def main(scans: Path, labels: Path, target: str, out: Path, backbone: str = "embedkit/scattering") -> None:
    out.mkdir(parents=True, exist_ok=True)
    found = embedkit.scan_folder(scans)
    embedkit.write_manifest(found.rows, out / "cases.csv")

    summary = embedkit.extract(out / "cases.csv", out / "cache", backbone=backbone)
    print(f"{summary.cases_done} cases, {summary.slices} slices, {len(summary.failures)} failed")

    trained = embedkit.train(out / "cache", labels, targets=[target], out=out / "runs")
    print(trained.table.select("head", "tokens", "^(auroc|spearman).*$"))

    index = embedkit.build_index(out / "cache", out / "index", labels=labels)
    query = index.cases["case_id"][0]
    found = embedkit.search(index, case_id=query, k=5, exclude_same="patient_id")
    print(found.select("rank", "case_id", "similarity"))


if __name__ == "__main__":
    scans, labels, target, out, *rest = sys.argv[1:]
    main(Path(scans), Path(labels), target, Path(out), *rest)
