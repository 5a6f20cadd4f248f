"""Owns `embedkit scan`: parses, calls `embedkit.scan_folder`, writes the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["run"]


def scan_command(
    folder: Annotated[Path, typer.Argument(help="Folder with NIfTI, NRRD, MetaImage, DICOM or .npy/.npz images.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The manifest to write: .csv, .tsv or .parquet.")],
) -> None:
    """Find every image in a folder and write a manifest."""
    from embedkit import scan_folder, write_manifest

    found = scan_folder(folder)
    write_manifest(found.rows, out)
    cases = found.rows["case_id"].n_unique()
    typer.echo(f"{out}: {len(found.rows)} images of {cases} cases, {len(found.skipped)} files left out")
    for path, reason in found.skipped:
        typer.echo(f"  left out {path}: {reason}", err=True)


run = scan_command
