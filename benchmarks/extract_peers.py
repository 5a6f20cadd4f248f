"""Time per slice of embedkit, slide2vec and kaiko-eva: same slices, backbone, weights (random), precision and cores.

Usage: python benchmarks/extract_peers.py [--cases N] [--backbone NAME] [--envs FOLDER] [--threads N] [--workers N ...]

Each peer is installed by pip into a virtual environment of its own below --envs and found there the next time. What
it needs and this environment has in a version that suits it, torch above all, is taken from here: all sides then run
the same torch, and nobody downloads it again. Every side runs in a process of its own, on the
CPU in fp32, with the library's own entry point: `extract`, `Model.embed_images` and `embed_images_dense`, `eva predict`
with its embeddings writer. Peers load pictures in their main process, which on two cores is faster than in loader
workers; with `--workers 0 2` both are measured, and the faster counts.

What differs, all of it to the peers' favour but the last: they are given PNG pictures, already windowed and 224 pixels
wide, where embedkit reads compressed NIfTI volumes, windows, resizes and also keeps a preview and checksums. They write
one file (slide2vec: two) per slice, embedkit one shard, in float16 instead of their float32. The class token is in
all of them, and `dense` is the full grid of the last block's patch tokens.

Seconds are from the loaded model to the last file on disk; those to import and load are printed beside them, and the
CPU seconds of the work (embedkit's include loading the model), which tell more on a machine that others use. The last
line is `ratio N.NN`: embedkit's time for class tokens over that of the fastest peer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import polars as pl
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from embedkit.backbones import load_backbone
from embedkit.manifest import read_manifest
from embedkit.phantoms import make_phantoms
from embedkit.planning import make_recipe
from embedkit.slices import plan_stacks, render_slices
from embedkit.sources import group_cases, read_case
from peers import DEFAULT_ENVS, make_environment, offline, run_program

PACKAGES = {"slide2vec": ("slide2vec==7.1.4",), "kaiko-eva": ("kaiko-eva[vision]==0.4.5",)}

EMBEDKIT = """
import json, sys, time
started = time.perf_counter()
from pathlib import Path
from embedkit.extraction import extract

task = json.loads(Path(sys.argv[1]).read_text())
before = time.process_time()
summary = extract(
    task["manifest"], task["out"], backbone=task["backbone"], weights=task["weights"],
    tokens=[f"{task['kind']}:{task['depth']}"],
    precision="fp32", device="cpu", batch_size=task["batch_size"], planes=["axial"],
)
whole = time.perf_counter() - started
print("RESULT", json.dumps({"seconds": summary.seconds, "cpu": time.process_time() - before,
                            "loading": whole - summary.seconds, "slices": summary.slices}))
"""

SLIDE2VEC = """
import json, os, sys, time
started = time.perf_counter()
from pathlib import Path
from slide2vec import ExecutionOptions, Model, register_encoder
from slide2vec.api import DenseImageOptions, ImageSpec
from slide2vec.encoders.base import TimmTileEncoder

task = json.loads(Path(sys.argv[1]).read_text())


@register_encoder("local", encode_dim=task["dim"], input_size=224, patch_size=16, supported_spacing_um=None,
                  default_spacing_um=1.0, supports_variable_input_size=False, precision="fp32")
class Local(TimmTileEncoder):
    def __init__(self, *, output_variant=None):
        super().__init__(task["backbone"], output_variant=output_variant, pretrained=False,
                         checkpoint_path=task["weights"])


model = Model.from_preset("local", device="cpu")


def embed(pictures, out):
    execution = ExecutionOptions(output_dir=Path(out), batch_size=task["batch_size"], num_gpus=1, precision="fp32",
                                 num_workers_per_gpu=task["workers"])
    if task["kind"] == "patch":
        model.embed_images_dense(pictures, dense=DenseImageOptions(target_size=224), execution=execution)
    else:
        model.embed_images(pictures, execution=execution)


spacing = 1.0 if task["kind"] == "patch" else None
pictures = [ImageSpec(sample_id=Path(file).stem, image_path=file, spacing_at_level_0=spacing)
            for file in task["files"]]
if __name__ == "__main__":
    embed(pictures[:1], task["out"] + "-first")
    loaded, before = time.perf_counter(), sum(os.times()[:4])
    embed(pictures, task["out"])
    done = time.perf_counter()
    print("RESULT", json.dumps({"seconds": done - loaded, "cpu": sum(os.times()[:4]) - before,
                                "loading": loaded - started, "slices": len(pictures)}))
"""

EVA = """
import json, os, time
from pathlib import Path
import torch
from lightning.pytorch.callbacks import Callback
from torchvision import tv_tensors
from eva.vision.data.datasets.vision import VisionDataset
from eva.vision.utils import io


class Pictures(VisionDataset[tv_tensors.Image, torch.Tensor]):
    def __init__(self, listing: str, transforms=None):
        super().__init__(transforms=transforms)
        self._files = json.loads(Path(listing).read_text())["files"]

    def filename(self, index):
        return Path(self._files[index]).name

    def load_data(self, index):
        return io.read_image_as_tensor(self._files[index])

    def load_target(self, index):
        return torch.tensor(0.0)

    def __len__(self):
        return len(self._files)


class Clock(Callback):
    def __init__(self, out: str):
        self._out = out

    def on_predict_start(self, trainer, module):
        Path(self._out, "started").write_text(f"{time.time()} {sum(os.times()[:4])}")

    def on_predict_end(self, trainer, module):
        Path(self._out, "ended").write_text(f"{time.time()} {sum(os.times()[:4])}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3)
    parser.add_argument("--backbone", default="vit_small_patch16_224")
    parser.add_argument("--envs", type=Path, default=DEFAULT_ENVS)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of torch, on every side")
    parser.add_argument("--workers", type=int, nargs="+", default=[0], help="loader processes of the peers, each tried")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    task = prepare(options, folder)
    print(
        f"{len(task['files'])} slices of {options.cases} cases, {options.backbone} with random weights, fp32,"
        f" {options.threads} threads"
    )
    seconds: dict[tuple[str, str], list[float]] = {}
    failed: set[tuple[str, str]] = set()
    for _ in range(options.repeats):  # the sides take turns, so that all meet the same noise
        for side, kind in SIDES:
            if (side, kind) in failed:
                continue
            try:
                seconds.setdefault((side, kind), []).append(time_side(options, folder, side, task | {"kind": kind}))
            except subprocess.CalledProcessError as error:
                failed.add((side, kind))
                why = " ".join((error.stderr or error.output or "").split())[-600:]
                print(f"{side} {kind} could not be run: {why}")
    least = {name: min(times) for name, times in seconds.items() if times}
    for (side, kind), time_per_slice in least.items():
        if side != "embedkit":
            print(f"embedkit over {side}, {NAMES[kind]}: {least['embedkit', kind] / time_per_slice:.2f}")
    fastest = [time_per_slice for (side, kind), time_per_slice in least.items() if side != "embedkit" and kind == "cls"]
    if not fastest:
        raise SystemExit("no peer could be run; see the reasons above")
    print(f"ratio {least['embedkit', 'cls'] / min(fastest):.2f}")


def prepare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The manifest of phantoms, the weights, and the slices of all cases as PNG files, as embedkit renders them."""
    phantoms = read_manifest(make_phantoms(folder / "phantoms", cases=max(16, options.cases)).manifest)
    chosen = phantoms["case_id"].unique(maintain_order=True).head(options.cases)
    manifest = phantoms.filter(pl.col("case_id").is_in(chosen.to_list()))
    manifest.write_parquet(folder / "cases.parquet")
    weights = folder / "random.safetensors"
    network = timm.create_model(options.backbone, pretrained=False, num_classes=0)
    save_file(network.state_dict(), weights)
    return {
        "manifest": str(folder / "cases.parquet"),
        "weights": str(weights),
        "backbone": options.backbone,
        "dim": network.num_features,
        "depth": len(network.blocks),
        "batch_size": options.batch_size,
        "files": write_pictures(manifest, options.backbone, weights, folder / "pictures"),
    }


def write_pictures(manifest: pl.DataFrame, backbone: str, weights: Path, folder: Path) -> list[str]:
    """Every slice that is not blank as an RGB file of the backbone's size."""
    folder.mkdir()
    info = load_backbone(backbone, weights=weights).info
    recipe = make_recipe(info, tokens=["cls"], precision="fp32")
    files = []
    for case in group_cases(manifest):
        volumes = read_case(case).volumes
        for stack in plan_stacks(volumes, recipe):
            images, blank = render_slices(stack, volumes, recipe, 0, len(stack.indices))
            for number, image in enumerate((images[~blank] * 255).round().to(torch.uint8).numpy()):
                file = folder / f"{case.case_id}-{stack.view}-{number:03d}.png"
                Image.fromarray(image[0]).convert("RGB").save(file)
                files.append(str(file))
    return files


def time_side(options: argparse.Namespace, folder: Path, side: str, task: dict[str, Any]) -> float:
    """Seconds per slice of one side, the faster of its numbers of loader workers, after printing what was measured."""
    found = []
    for workers in (None,) if side == "embedkit" else options.workers:
        place = Path(tempfile.mkdtemp(dir=folder)) / "run"
        result = RUNNERS[side](options, place, task | {"workers": workers})
        found.append(result["seconds"] / result["slices"])
        print(
            f"{side}, {NAMES[task['kind']]}{'' if workers is None else f', {workers} loader workers'}:"
            f" {1e3 * found[-1]:.1f} ms per slice, {result['seconds']:.1f} s"
            f" ({result['cpu']:.1f} s of CPU) and {result['loading']:.1f} s to import and load",
            flush=True,
        )
    return min(found)


def run_embedkit(_: argparse.Namespace, folder: Path, task: dict[str, Any]) -> dict[str, float]:
    return run_program(sys.executable, EMBEDKIT, folder, task)


def run_slide2vec(options: argparse.Namespace, folder: Path, task: dict[str, Any]) -> dict[str, float]:
    return run_program(make_environment(options.envs, "slide2vec", PACKAGES["slide2vec"]), SLIDE2VEC, folder, task)


def run_eva(options: argparse.Namespace, folder: Path, task: dict[str, Any]) -> dict[str, float]:
    python = make_environment(options.envs, "kaiko-eva", PACKAGES["kaiko-eva"])
    folder.mkdir()
    (folder / "pictures_for_eva.py").write_text(EVA)
    (folder / "task.json").write_text(json.dumps(task))
    (folder / "eva.yaml").write_text(json.dumps(eva_configuration(folder, task)))
    started = time.time()
    command = [str(python), "-m", "eva", "predict", "--config", "eva.yaml"]
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder, env=offline(PYTHONPATH=str(folder)))
    begun, ended = (list(map(float, (folder / name).read_text().split())) for name in ("started", "ended"))
    written = len(list((folder / "out").rglob("*.pt")))
    if written != len(task["files"]):
        raise SystemExit(f"kaiko-eva wrote {written} embeddings of {len(task['files'])}")
    seconds, cpu = (end - begin for begin, end in zip(begun, ended, strict=True))
    return {"seconds": seconds, "cpu": cpu, "loading": begun[0] - started, "slices": written}


def eva_configuration(folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    """What `eva predict` is told: JSON, which is YAML."""
    clock = {"class_path": "pictures_for_eva.Clock", "init_args": {"out": str(folder)}}
    writer = {
        "class_path": "eva.callbacks.ClassificationEmbeddingsWriter",
        "init_args": {"output_dir": str(folder / "out")},
    }
    model = {
        "class_path": "eva.vision.models.wrappers.TimmModel",
        "init_args": {
            "model_name": task["backbone"],
            "checkpoint_path": task["weights"],
            "model_kwargs": {"num_classes": 0},
        },
    }
    pictures = {
        "class_path": "pictures_for_eva.Pictures",
        "init_args": {
            "listing": f"{folder}/task.json",
            "transforms": {"class_path": "eva.vision.transforms.ResizeAndCrop", "init_args": {"size": 224}},
        },
    }
    loader = {"batch_size": task["batch_size"], "num_workers": task["workers"], "persistent_workers": False}
    loader["prefetch_factor"] = 2 if task["workers"] else None
    return {
        "trainer": {
            "class_path": "eva.Trainer",
            "init_args": {
                "accelerator": "cpu",
                "default_root_dir": f"{folder}/logs",
                "logger": False,
                "callbacks": [clock, writer, clock],
            },
        },
        "model": {"class_path": "eva.InferenceModule", "init_args": {"backbone": model}},
        "data": {
            "class_path": "eva.DataModule",
            "init_args": {
                "datasets": {"class_path": "eva.DatasetsSchema", "init_args": {"predict": pictures}},
                "dataloaders": {"class_path": "eva.DataloadersSchema", "init_args": {"predict": loader}},
            },
        },
    }


SIDES = (
    ("embedkit", "cls"),
    ("slide2vec", "cls"),
    ("kaiko-eva", "cls"),
    ("embedkit", "patch"),
    ("slide2vec", "patch"),
)
RUNNERS = {"embedkit": run_embedkit, "slide2vec": run_slide2vec, "kaiko-eva": run_eva}
NAMES = {"cls": "class token", "patch": "patch tokens"}


if __name__ == "__main__":
    main()
