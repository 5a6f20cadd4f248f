"""Images of every format come back as the same volume, and bad ones as an error that says what to do."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import math
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from embedkit.errors import VolumeError
from embedkit.volumes import (
    Volume,
    canonical_axes,
    check_volume,
    read_mask,
    read_volume,
    to_canonical,
    to_source,
    write_volume,
)

LPS = np.array([[0.0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])  # of an array that is canonical already


def ramp(shape: tuple[int, ...] = (3, 4, 5), dtype: Any = np.int16) -> np.ndarray[Any, Any]:
    return np.arange(math.prod(shape), dtype=dtype).reshape(shape)


def nifti(
    array: np.ndarray[Any, Any],
    *,
    order: str = "<",
    code: int | None = None,
    dim: tuple[int, ...] | None = None,
    pixdim: tuple[float, ...] = (1, 1, 1, 1, 0, 0, 0, 0),
    slope: float = 0.0,
    intercept: float = 0.0,
    qform: int = 0,
    quaternion: tuple[float, ...] = (0, 0, 0, 0, 0, 0),
    sform: int = 1,
    rows: Any = ((-1, 0, 0, 0), (0, -1, 0, 0), (0, 0, 1, 0)),
    offset: int = 352,
    version: int = 1,
) -> bytes:
    """A NIfTI file of an array ``[k j i]``, every field at hand."""
    codes = {"u1": 2, "i2": 4, "i4": 8, "f4": 16, "f8": 64, "i1": 256, "u2": 512, "u4": 768, "i8": 1024, "u8": 1280}
    code = codes[array.dtype.str[1:]] if code is None else code
    dim = (array.ndim, *array.shape[::-1]) if dim is None else dim
    dim = (*dim, *[1] * (8 - len(dim)))
    if version == 1:
        head = bytearray(352)
        struct.pack_into(f"{order}i", head, 0, 348)
        struct.pack_into(f"{order}8h", head, 40, *dim)
        struct.pack_into(f"{order}2h", head, 70, code, array.itemsize * 8)
        struct.pack_into(f"{order}8f", head, 76, *pixdim)
        struct.pack_into(f"{order}3f", head, 108, offset, slope, intercept)
        struct.pack_into(f"{order}2h6f12f", head, 252, qform, sform, *quaternion, *np.ravel(rows))
        head[344:348] = b"n+1\0"
    else:
        offset = 544
        head = bytearray(544)
        struct.pack_into(f"{order}i8s2h", head, 0, 540, b"n+2\0\r\n\032\n", code, array.itemsize * 8)
        struct.pack_into(f"{order}8q", head, 16, *dim)
        struct.pack_into(f"{order}8d", head, 104, *pixdim)
        struct.pack_into(f"{order}q2d", head, 168, offset, slope, intercept)
        struct.pack_into(f"{order}2i6d12d", head, 344, qform, sform, *quaternion, *np.ravel(rows))
    values = array.astype(array.dtype.newbyteorder(order)).tobytes()
    return bytes(head) + bytes(offset - len(head)) + values


def save(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def itk_image(array: np.ndarray[Any, Any], affine: np.ndarray[Any, Any]) -> sitk.Image:
    """Built from an affine of our convention by ITK's own means, independently of the library."""
    image = sitk.GetImageFromArray(array)
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    columns = [lps[:3, axis] for axis in (2, 1, 0)]
    image.SetSpacing([float(np.linalg.norm(column)) for column in columns])
    image.SetDirection(np.stack([column / np.linalg.norm(column) for column in columns], axis=1).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def itk_affine(image: sitk.Image) -> np.ndarray[Any, Any]:
    """Indices (slice, row, column, 1) to RAS+ by asking ITK for the place of voxels."""
    corner = np.array(image.TransformContinuousIndexToPhysicalPoint((0.0, 0.0, 0.0)))
    affine = np.eye(4)
    for axis in range(3):
        index = [0.0, 0.0, 0.0]
        index[2 - axis] = 1.0
        affine[:3, axis] = np.array(image.TransformContinuousIndexToPhysicalPoint(index)) - corner
    affine[:3, 3] = corner
    return np.diag([-1.0, -1, 1, 1]) @ affine


def rotation(angles: tuple[float, float, float]) -> np.ndarray[Any, Any]:
    turn = np.eye(3)
    for axis, angle in enumerate(angles):
        one = np.eye(3)
        i, j = [other for other in range(3) if other != axis]
        one[i, i] = one[j, j] = math.cos(angle)
        one[i, j], one[j, i] = -math.sin(angle), math.sin(angle)
        turn = one @ turn
    return turn


OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = rotation((0.3, -0.2, 2.0)) * [2.5, 1.25, 0.75]
OBLIQUE[:3, 3] = 31.5, -12.25, 7.0


@st.composite
def affines(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Any rotation, reflection, spacing and origin whose orientation rounding cannot change."""
    angle = st.floats(-math.pi, math.pi)
    turn = rotation(draw(st.tuples(angle, angle, angle))) * np.array(
        draw(st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3))
    )
    values = np.sort(np.abs(turn).ravel())
    if np.diff(values).min() < 1e-5:
        turn = rotation((0.3, -0.2, 0.11))
    affine = np.eye(4)
    affine[:3, :3] = turn * draw(st.tuples(*[st.floats(0.3, 6)] * 3))
    affine[:3, 3] = draw(st.tuples(*[st.floats(-300, 300)] * 3))
    return affine


# ---- orientation ----


@given(affine=affines(), shape=st.tuples(*[st.integers(1, 5)] * 3))
@settings(max_examples=150, deadline=None)
def test_the_canonical_order_is_what_itk_calls_lps(affine: np.ndarray[Any, Any], shape: tuple[int, int, int]) -> None:
    array = ramp(shape, np.int32)
    oriented = sitk.DICOMOrient(itk_image(array, affine), "LPS")
    turned, turned_affine = to_canonical(array, affine)
    np.testing.assert_array_equal(turned, sitk.GetArrayFromImage(oriented))
    np.testing.assert_allclose(turned_affine, itk_affine(oriented), atol=1e-6)


@given(affine=affines(), array=hnp.arrays(np.int16, hnp.array_shapes(min_dims=3, max_dims=3, max_side=5)))
@settings(max_examples=100, deadline=None)
def test_putting_an_array_back_into_file_order_undoes_the_turn(
    affine: np.ndarray[Any, Any], array: np.ndarray[Any, Any]
) -> None:
    turned, _ = to_canonical(array, affine)
    back = to_source(turned, affine)
    np.testing.assert_array_equal(back, array)
    assert turned.flags.c_contiguous
    assert turned.flags.writeable
    assert back.flags.c_contiguous


@pytest.mark.parametrize("flips", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_every_axis_order_and_flip_gives_the_same_canonical_array(
    order: tuple[int, int, int], flips: tuple[bool, bool, bool]
) -> None:
    canonical = ramp((2, 3, 4))
    stored = canonical.transpose(order)
    affine = LPS[:, [*order, 3]].copy()
    for axis in np.flatnonzero(flips):
        stored = np.flip(stored, axis)
        affine[:, 3] += affine[:, axis] * (stored.shape[axis] - 1)
        affine[:, axis] *= -1
    turned, turned_affine = to_canonical(stored, affine)
    np.testing.assert_array_equal(turned, canonical)
    np.testing.assert_array_equal(turned_affine, LPS)
    permutation, flipped = canonical_axes(affine)
    assert [order[axis] for axis in permutation] == [0, 1, 2]
    assert flipped == tuple(flips[axis] for axis in permutation)


def test_rounding_does_not_decide_the_orientation_of_a_grid_at_45_degrees() -> None:
    tilted = np.eye(4)
    tilted[:3, :3] = rotation((math.pi / 4, 0, 0))
    for noise in (0.0, 1e-9, -1e-9, 3e-8):
        noisy = tilted.copy()
        noisy[1, 1] += noise
        assert canonical_axes(noisy) == canonical_axes(tilted)


@pytest.mark.parametrize("bad", [np.zeros((4, 4)), np.diag([1.0, 1, 0, 1]), np.full((4, 4), np.nan), np.ones((4, 4))])
def test_a_singular_affine_has_no_orientation(bad: np.ndarray[Any, Any]) -> None:
    with pytest.raises(VolumeError, match="is singular, expected three independent axes"):
        canonical_axes(bad)


def test_the_axes_run_from_feet_to_head_front_to_back_and_right_to_left(tmp_path: Path) -> None:
    # RAS file: i to the right, j to the front, k to the head
    rows = ((2, 0, 0, 0), (0, 3, 0, 0), (0, 0, 5, 0))
    volume = read_volume(save(tmp_path / "ras.nii", nifti(ramp(), rows=rows)))
    first, head, back, left = (volume.affine @ [*index, 1] for index in [(0, 0, 0), (2, 0, 0), (0, 3, 0), (0, 0, 4)])
    assert (head - first)[:3].tolist() == [0, 0, 10]
    assert (back - first)[:3].tolist() == [0, -9, 0]
    assert (left - first)[:3].tolist() == [-8, 0, 0]
    np.testing.assert_array_equal(volume.array, ramp()[:, ::-1, ::-1])
    assert volume.spacing_mm == (5.0, 3.0, 2.0)


# ---- formats ----


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".npz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32])
def test_every_format_gives_back_values_types_and_geometry(tmp_path: Path, suffix: str, dtype: Any) -> None:
    path = tmp_path / f"scan.v2{suffix}"
    array = (ramp(dtype=np.int32) * 3 + 1).astype(dtype)
    write_volume(path, array, OBLIQUE)
    volume = read_volume(path)
    assert volume.array.dtype == dtype
    assert volume.source_shape == (3, 4, 5)
    np.testing.assert_allclose(volume.source_affine, OBLIQUE, atol=1e-4)
    np.testing.assert_array_equal(to_source(volume.array, volume.source_affine), array)
    assert volume.source_bytes == path.stat().st_size
    assert volume.source_digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert volume.spacing_mm == pytest.approx(np.linalg.norm(volume.affine[:3, :3], axis=0), rel=1e-5)
    assert list(tmp_path.iterdir()) == [path]
    check_volume(path)


@given(affine=affines())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nifti_geometry_agrees_with_itk(tmp_path: Path, affine: np.ndarray[Any, Any]) -> None:
    path = tmp_path / "scan.nii"
    sitk.WriteImage(itk_image(ramp(), affine), str(path))
    image = sitk.ReadImage(str(path))
    volume = read_volume(path)
    np.testing.assert_allclose(volume.source_affine, itk_affine(image), atol=2e-4)
    np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(sitk.DICOMOrient(image, "LPS")))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4", "f8", "i1", "u2", "u4", "i8", "u8"])
def test_nifti_values_of_every_type_and_byte_order_agree_with_itk(
    tmp_path: Path, dtype: str, order: str, version: int
) -> None:
    path = save(tmp_path / "scan.nii", nifti(ramp(dtype=dtype), order=order, version=version))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, ramp())
    if version == 1:  # ITK reads no other
        np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(sitk.ReadImage(str(path))))
    assert volume.array.dtype.isnative
    assert volume.array.dtype.name in {"uint8", "int16", "uint16", "int32", "float32"}


@pytest.mark.parametrize(
    ("slope", "intercept", "values"),
    [
        (2.0, -1024.0, [-1024, -1022, -1020]),
        (0.5, 0.25, [0.25, 0.75, 1.25]),
        (1.0, 5.0, [5, 6, 7]),
        (0.0, 5.0, [5, 6, 7]),
        (1.0, 0.0, [0, 1, 2]),
        (0.0, 0.0, [0, 1, 2]),
        (float("nan"), float("nan"), [0, 1, 2]),
    ],
)
def test_nifti_scaling_is_applied_as_itk_applies_it(
    tmp_path: Path, slope: float, intercept: float, values: list[float]
) -> None:
    path = save(tmp_path / "scan.nii", nifti(ramp(), slope=slope, intercept=intercept))
    volume = read_volume(path)
    assert volume.array.ravel()[:3].tolist() == values
    image = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    np.testing.assert_array_equal(volume.array, image)
    assert volume.array.dtype == image.dtype


def test_the_sform_of_a_nifti_counts_where_its_voxel_sizes_contradict_it(tmp_path: Path) -> None:
    rows = ((-5, 0, 0, 1), (0, -5, 0, 2), (0, 0, 5, 3))
    volume = read_volume(save(tmp_path / "scan.nii", nifti(ramp(), pixdim=(1, 2, 3, 4, 0, 0, 0, 0), rows=rows)))
    assert volume.spacing_mm == (5.0, 5.0, 5.0)
    assert volume.affine[:3, 3].tolist() == [1, 2, 3]


def test_the_qform_of_a_nifti_stands_in_for_a_missing_or_skewed_sform(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"pixdim": (-1, 2, 3, 4, 0, 0, 0, 0), "qform": 1, "quaternion": (0, 0, 1, 10, 20, 30)}
    skewed = ((2, 0, 1, 0), (0, 3, 0, 0), (0, 0, 4, 0))
    for content in (nifti(ramp(), sform=0, **fields), nifti(ramp(), sform=1, rows=skewed, **fields)):
        path = save(tmp_path / "scan.nii", content)
        volume = read_volume(path)
        np.testing.assert_allclose(volume.source_affine, itk_affine(sitk.ReadImage(str(path))), atol=1e-6)
        # half a turn about z, and k reversed by the negative qfac
        assert volume.source_affine[:3, :3].tolist() == [[0, 0, -2], [0, -3, 0], [-4, 0, 0]]
        assert volume.source_affine[:3, 3].tolist() == [10, 20, 30]


def test_a_nifti_without_orientation_is_placed_as_itk_places_it(tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nii", nifti(ramp(), sform=0, pixdim=(1, 2, 3, 4, 0, 0, 0, 0)))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.source_affine, itk_affine(sitk.ReadImage(str(path))))
    np.testing.assert_array_equal(volume.array, ramp())
    assert volume.spacing_mm == (4.0, 3.0, 2.0)


def test_nifti_voxels_start_where_the_header_says(tmp_path: Path) -> None:
    volume = read_volume(save(tmp_path / "scan.nii", nifti(ramp(), offset=416)))
    np.testing.assert_array_equal(volume.array, ramp())


def test_a_gzip_file_of_several_members_is_one_file(tmp_path: Path) -> None:
    content = nifti(ramp())
    packed = gzip.compress(content[:100]) + gzip.compress(content[100:400]) + gzip.compress(content[400:])
    np.testing.assert_array_equal(read_volume(save(tmp_path / "scan.nii.gz", packed)).array, ramp())


def test_a_header_with_its_voxels_in_a_second_file_reads_both(tmp_path: Path) -> None:
    for suffix, voxels in ((".mhd", "scan.raw"), (".nhdr", "scan.raw")):
        path = tmp_path / f"scan{suffix}"
        sitk.WriteImage(itk_image(ramp(), OBLIQUE), str(path))
        volume = read_volume(path)
        np.testing.assert_array_equal(to_source(volume.array, volume.source_affine), ramp())
        content = path.read_bytes() + (tmp_path / voxels).read_bytes()
        assert volume.source_bytes == len(content)
        assert volume.source_digest == hashlib.sha256(content).hexdigest()


def test_a_numpy_array_is_taken_as_canonical_with_1_mm_voxels(tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", np.asfortranarray(ramp(dtype=">f8")))
    volume = read_volume(tmp_path / "scan.npy")
    np.testing.assert_array_equal(volume.array, ramp())
    assert volume.array.dtype == np.float32
    assert volume.spacing_mm == (1.0, 1.0, 1.0)
    np.testing.assert_array_equal(volume.affine, LPS)
    np.savez(tmp_path / "scan.npz", anything=ramp())
    np.testing.assert_array_equal(read_volume(tmp_path / "scan.npz").affine, LPS)


@pytest.mark.parametrize(
    ("stored", "kept"),
    [
        (np.array([0, 1, 1], bool), np.array([0, 1, 1], np.uint8)),
        (np.array([-128, 0, 127], np.int8), np.array([-128, 0, 127], np.int16)),
        (np.array([-(2**31), 0, 2**31 - 1], np.int64), np.array([-(2**31), 0, 2**31 - 1], np.int32)),
        (np.array([0, 1, 2**31 - 1], np.uint64), np.array([0, 1, 2**31 - 1], np.int32)),
        (np.array([0, 1, 2**32 - 1], np.uint32), np.array([0, 1, 2**32], np.float32)),
        (np.array([0, -1, 2**40], np.int64), np.array([0, -1, 2**40], np.float32)),
        (np.array([0, 0.1, -3], np.float64), np.array([0, 0.1, -3], np.float32)),
        (np.array([0, 0.5, -3], np.float16), np.array([0, 0.5, -3], np.float32)),
    ],
)
def test_other_types_become_the_nearest_of_the_five(
    tmp_path: Path, stored: np.ndarray[Any, Any], kept: np.ndarray[Any, Any]
) -> None:
    np.save(tmp_path / "scan.npy", stored.reshape(1, 1, 3))
    array = read_volume(tmp_path / "scan.npy").array
    assert array.dtype == kept.dtype
    np.testing.assert_array_equal(array.ravel(), kept)


def test_constant_and_one_slice_images_and_a_trailing_axis_of_one_are_read(tmp_path: Path) -> None:
    flat = read_volume(save(tmp_path / "flat.nii", nifti(np.full((1, 4, 5), -1000, np.int16))))
    assert flat.array.shape == (1, 4, 5)
    assert (flat.array == -1000).all()
    four = read_volume(save(tmp_path / "four.nii", nifti(ramp(), dim=(5, 5, 4, 3, 1, 1))))
    np.testing.assert_array_equal(four.array, ramp())
    np.save(tmp_path / "four.npy", ramp((3, 4, 5, 1)))
    np.testing.assert_array_equal(read_volume(tmp_path / "four.npy").array, ramp())
    sitk.WriteImage(sitk.JoinSeries([itk_image(ramp(), LPS)]), str(tmp_path / "four.mha"))
    np.testing.assert_array_equal(read_volume(tmp_path / "four.mha").array, ramp())


def test_reading_does_not_share_memory_that_cannot_be_written(tmp_path: Path) -> None:
    volume = read_volume(save(tmp_path / "scan.nii", nifti(ramp())))
    volume.array[0, 0, 0] = 7
    assert volume.array[0, 0, 0] == 7


# ---- what is refused ----

GOOD = nifti(ramp())
NRRD = (
    b"NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 5 4 3\n"
    b"space directions: (1,0,0) (0,2,0) (0,0,3)\nendian: little\nencoding: raw\n\n" + ramp().tobytes()
)
META = (
    b"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n"
    b"TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nElementSpacing = 1 2 3\nDimSize = 5 4 3\n"
    b"ElementType = MET_SHORT\nElementDataFile = LOCAL\n" + ramp().tobytes()
)


def npy_header(shape: tuple[int, ...], descr: str = "<i2") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


REFUSED = {
    "empty": ("scan.nii.gz", b"", r"is empty \(0 bytes\); copy the file again"),
    "gzip named nii": ("scan.nii", gzip.compress(GOOD), r"is named \.nii but holds nifti data; rename it to \.nii\.gz"),
    "nii named gzip": ("scan.nii.gz", GOOD, r"is named \.nii\.gz but holds nifti data; rename it to \.nii"),
    "nrrd named nii": ("scan.nii", NRRD, r"is named \.nii but holds nrrd data; rename it to \.nrrd"),
    "nii without a name": ("scan.img", GOOD, r"holds nifti data under an unknown ending; rename it to \.nii"),
    "text": ("notes.txt", b"hello", "not a format that embedkit reads; expected .nii, .nii.gz"),
    "text named nii": ("scan.nii", b"hello" * 200, r"is named \.nii but does not begin like one"),
    "text named mha": ("scan.mha", b"hello" * 200, r"is named \.mha but does not begin like one"),
    "not gzip inside": ("scan.nii.gz", gzip.compress(b"hello" * 200), "holds no NIfTI header"),
    "truncated nii": ("scan.nii", GOOD[:-20], "promises 120 bytes of voxels but the file holds 100; it is truncated"),
    "truncated header": ("scan.nii", GOOD[:200], r"is named \.nii but does not begin like one"),
    "truncated gzip": ("scan.nii.gz", gzip.compress(GOOD)[:-30], "compressed data end after .* truncated"),
    "too short inside": ("scan.nii.gz", gzip.compress(GOOD[:-20]), "hold 452 bytes, its header promises 472"),
    "four axes": ("scan.nii", nifti(ramp((2, 3, 4, 5))), r"has 4 axes \(2, 3, 4, 5\), expected one grey 3D image"),
    "two axes": ("scan.nii", nifti(ramp((4, 5))), r"has 2 axes \(4, 5\), expected 3; save a slice as a volume of one"),
    "colour": ("scan.nii", nifti(ramp(dtype=np.uint8), code=128), r"are colour \(RGB\) \(NIfTI datatype 128\)"),
    "complex": ("scan.nii", nifti(ramp(dtype=np.int64), code=32), "are complex .* expected one real number per voxel"),
    "unknown type": ("scan.nii", nifti(ramp(), code=99), "are unknown"),
    "bad dimension": ("scan.nii", nifti(ramp(), dim=(9, 5, 4, 3)), "says 9 axes, expected 3; the header is damaged"),
    "no voxel": ("scan.nii", nifti(ramp(), dim=(3, 5, 0, 3)), "expected at least one voxel along each axis"),
    "zero spacing": (
        "scan.nii",
        nifti(ramp(), sform=0, pixdim=(0,) * 8),
        "its geometry is singular .* repair the header",
    ),
    "zero sform": ("scan.nii", nifti(ramp(), rows=np.zeros((3, 4))), "its geometry is singular"),
    "NaN sform": ("scan.nii", nifti(ramp(), rows=np.full((3, 4), np.nan)), "its geometry is singular"),
    "skewed": ("scan.nii", nifti(ramp(), rows=((1, 0, 0.5, 0), (0, 1, 0, 0), (0, 0, 1, 0))), "its axes are skewed"),
    "huge": ("scan.nii", nifti(ramp(), dim=(3, 32767, 32767, 32767)), r"= 35181150961663 voxels, more than 2147483648"),
    "big for its bytes": ("scan.nii", nifti(ramp(), dim=(3, 1000, 1000, 1000)), "promises 2000000000 bytes of voxels"),
    "big for its gzip": (
        "scan.nii.gz",
        gzip.compress(nifti(ramp(), dim=(3, 1000, 1000, 1000))),
        "promises 2000000000 bytes of voxels but the file holds .* compressed; it is truncated",
    ),
    "truncated nrrd": ("scan.nrrd", NRRD[:-20], "promises 120 bytes of voxels but the file holds 100"),
    "huge nrrd": ("scan.nrrd", NRRD.replace(b"5 4 3", b"9999 9999 9999"), "voxels, more than 2147483648"),
    "endless nrrd": ("scan.nrrd", NRRD[:100], "its header does not end"),
    "zero nrrd": ("scan.nrrd", NRRD.replace(b"(0,0,3)", b"(0,0,0)"), "its geometry is singular"),
    "skewed nrrd": ("scan.nrrd", NRRD.replace(b"(0,0,3)", b"(1,0,3)"), "its axes are skewed"),
    "broken nrrd": (
        "scan.nrrd",
        NRRD.replace(b"short", b"shart"),
        r"cannot be read by ITK; check its header \(ITK: .*",
    ),
    "escaping nrrd": (
        "scan.nhdr",
        NRRD.replace(b"raw\n\n", b"raw\ndata file: /etc/passwd\n\n"),
        r"names a file for its voxels that lies outside its own folder .* \(it names '/etc/passwd'\)",
    ),
    "lost nrrd": (
        "scan.nhdr",
        NRRD.replace(b"raw\n\n", b"raw\ndata file: gone.raw\n\n"),
        r"names a second file for its voxels, which is missing; copy both files \(it names 'gone.raw'\)",
    ),
    "scattered nrrd": (
        "scan.nhdr",
        NRRD.replace(b"raw\n\n", b"raw\ndata file: LIST\na.raw\n\n"),
        r"spreads its voxels over several files; save it as one .* \(it names 'LIST'\)",
    ),
    "truncated mha": ("scan.mha", META[:-20], "promises 120 bytes of voxels but the file holds 100"),
    "endless mha": ("scan.mha", META[:100], "its header does not end"),
    "escaping mhd": (
        "scan.mhd",
        META.replace(b"LOCAL", b"../scan.raw"),
        r"lies outside its own folder .* \(it names '\.\./scan\.raw'\)",
    ),
    "zero mha": ("scan.mha", META.replace(b"1 2 3", b"1 2 0"), "its geometry is singular"),
    "huge mha": ("scan.mha", META.replace(b"5 4 3", b"9999 9999 9999"), "voxels, more than 2147483648"),
    "colour mha": (
        "scan.mha",
        META.replace(b"MET_SHORT", b"MET_UCHAR").replace(
            b"ElementDataFile", b"ElementNumberOfChannels = 2\nElementDataFile"
        ),
        "with 2 components, expected one real number per voxel",
    ),
    "truncated npy": (
        "scan.npy",
        npy_header((3, 4, 5)) + bytes(100),
        "promises 120 bytes of voxels but the file holds 100",
    ),
    "huge npy": ("scan.npy", npy_header((9999, 9999, 9999)), "voxels, more than 2147483648"),
    "broken npy": ("scan.npy", npy_header((3, 4, 5))[:60], "its header is damaged; save the array again"),
    "object npy": ("scan.npy", npy_header((3, 4, 5), "|O") + bytes(480), "holds values of type object"),
    "two axes npy": ("scan.npy", npy_header((4, 5)) + bytes(40), "has 2 axes"),
    "broken npz": ("scan.npz", b"PK\x03\x04" + bytes(100), "damaged or unreadable; copy the file again"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_files_are_refused_in_words(tmp_path: Path, case: str, capfd: pytest.CaptureFixture[str]) -> None:
    name, content, message = REFUSED[case]
    path = save(tmp_path / name, content)
    with pytest.raises(VolumeError, match=message) as caught:
        read_volume(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_headers_alone_show_most_of_what_is_wrong(tmp_path: Path) -> None:
    seen_in_voxels = {"truncated gzip", "too short inside"}
    for case, (name, content, message) in REFUSED.items():
        path = save(tmp_path / name, content)
        if case in seen_in_voxels:
            check_volume(path)
        else:
            with pytest.raises(VolumeError, match=message):
                check_volume(path)


def test_a_missing_file_is_named_with_where_paths_start(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"gone.nii: no such file .* relative to the manifest's folder"):
        read_volume(tmp_path / "gone.nii")


def test_a_folder_without_dicom_is_no_volume(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="holds no DICOM image directly; give the folder"):
        read_volume(tmp_path)


def test_values_that_are_no_numbers_are_counted(tmp_path: Path) -> None:
    array = ramp(dtype=np.float32)
    array[0, 0, :2], array[1, 1, 1] = np.nan, np.inf
    for name, content in (("scan.nii", nifti(array)), ("scan.nii.gz", gzip.compress(nifti(array)))):
        with pytest.raises(VolumeError, match=r"3 of 60 values are NaN or infinite .*; repair or fill them first"):
            read_volume(save(tmp_path / name, content))
    with pytest.raises(VolumeError, match=r"1 of 60 values are NaN or infinite \(or too large for float32\)"):
        wide = ramp(dtype=np.float64)
        wide[0, 0, 0] = 1e300
        read_volume(save(tmp_path / "wide.nii", nifti(wide)))


@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".npz"])
def test_a_flipped_bit_in_compressed_voxels_never_gives_other_voxels(
    tmp_path: Path, suffix: str, at: int, bit: int
) -> None:
    path = tmp_path / f"scan{suffix}"
    array = np.random.default_rng(0).integers(0, 999, (6, 7, 8)).astype(np.int16)
    if suffix == ".nii.gz":
        content = bytearray(gzip.compress(nifti(array), mtime=0))
    else:
        write_volume(path, array, OBLIQUE)
        content = bytearray(path.read_bytes())
    start = content.find(b"ElementDataFile") + 24 if suffix == ".mha" else 12
    content[start + at % (len(content) - start)] ^= 1 << bit
    path.write_bytes(content)
    try:
        volume = read_volume(path)
    except VolumeError:
        return
    np.testing.assert_array_equal(to_source(volume.array, volume.source_affine), array)


@given(data=st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize(("name", "content"), [("s.nii", GOOD), ("s.nrrd", NRRD), ("s.mha", META)])
def test_damaged_bytes_give_a_volume_or_a_volume_error(
    tmp_path: Path, name: str, content: bytes, data: st.DataObject
) -> None:
    damaged = bytearray(content[: data.draw(st.integers(1, len(content)))])
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        volume = read_volume(save(tmp_path / name, bytes(damaged)))
    except VolumeError:
        return
    assert volume.array.ndim == 3


def test_npz_files_need_an_array_and_a_fitting_affine(tmp_path: Path) -> None:
    path = tmp_path / "scan.npz"
    np.savez(path, first=ramp(), second=ramp())
    with pytest.raises(
        VolumeError,
        match=r"holds 2 entries; expected one array, .*, and at most an affine \(it holds first\.npy, second\.npy\)",
    ):
        read_volume(path)
    np.savez(path, array=ramp(), affine=np.eye(3))
    with pytest.raises(VolumeError, match=r"expected \[4 4\] with 0 0 0 1 as the last row"):
        read_volume(path)
    np.savez(path, array=ramp(), affine=np.zeros((100, 100)))
    with pytest.raises(VolumeError, match=r"its affine is not \[4 4\]; save it as such"):
        read_volume(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("array.npy", npy_header((3, 4, 5)) + ramp().tobytes())
        archive.writestr("affine.npy", b"\x93NUMPY\x01\x00nonsense")
    with pytest.raises(VolumeError, match=r"its affine cannot be read; save it as float64 \[4 4\]"):
        read_volume(path)


def test_an_npz_that_unpacks_to_more_than_it_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scan.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("array.npy", npy_header((1000, 1000, 1000)) + bytes(1000))
    with pytest.raises(VolumeError, match="promises 2000000000 bytes of voxels but the file holds 1000"):
        read_volume(path)


# ---- masks ----


def make_image(tmp_path: Path, affine: np.ndarray[Any, Any] = LPS, shape: tuple[int, ...] = (4, 6, 8)) -> Volume:
    write_volume(tmp_path / "image.nii.gz", ramp(shape), affine)
    return read_volume(tmp_path / "image.nii.gz")


def test_a_mask_in_another_file_order_lands_on_the_same_voxels(tmp_path: Path) -> None:
    image = make_image(tmp_path)
    labels = np.zeros((4, 6, 8), np.uint8)
    labels[1, 2, 3], labels[3, 5, 7] = 1, 2
    for order, flips in ((("k", "j", "i"), (1, 2)), (("j", "i", "k"), (0,))):
        axes = ["kji".index(name) for name in order]
        stored, affine = labels.transpose(axes), LPS[:, [*axes, 3]].copy()
        for axis in flips:
            stored = np.flip(stored, axis)
            affine[:, 3] += affine[:, axis] * (stored.shape[axis] - 1)
            affine[:, axis] *= -1
        write_volume(tmp_path / "mask.nii.gz", np.ascontiguousarray(stored), affine)
        mask = read_mask(tmp_path / "mask.nii.gz", image)
        np.testing.assert_array_equal(mask, labels)
        assert mask.dtype == np.int32


def test_a_mask_on_another_grid_gives_each_voxel_its_nearest_label(tmp_path: Path) -> None:
    image = make_image(tmp_path, shape=(2, 4, 4))
    coarse = np.zeros((1, 2, 4), np.int16)  # twice the depth and height, shifted so that each covers two voxels
    coarse[0, 1, 1], coarse[0, 0, 3] = 5, 300
    affine = LPS @ np.array([[2.0, 0, 0, 0.5], [0, 2, 0, 0.5], [0, 0, 1, 0], [0, 0, 0, 1]])
    write_volume(tmp_path / "mask.nrrd", coarse, affine)
    expected = np.zeros((2, 4, 4), np.int32)
    expected[:, 2:, 1], expected[:, :2, 3] = 5, 300
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.nrrd", image), expected)


def test_a_mask_that_reaches_a_part_of_the_image_leaves_the_rest_empty(tmp_path: Path) -> None:
    image = make_image(tmp_path)
    write_volume(tmp_path / "mask.mha", np.ones((2, 6, 8), np.uint8), LPS)
    mask = read_mask(tmp_path / "mask.mha", image)
    assert mask.sum(axis=(1, 2)).tolist() == [48, 48, 0, 0]


def test_a_mask_without_geometry_lies_on_the_file_order_of_its_image(tmp_path: Path) -> None:
    flipped = LPS.copy()
    flipped[:, 0] *= -1
    image = make_image(tmp_path, flipped)
    labels = np.zeros((4, 6, 8), np.uint8)
    labels[0, 2, 3] = 1
    np.save(tmp_path / "mask.npy", labels)
    assert np.argwhere(read_mask(tmp_path / "mask.npy", image)).tolist() == [[3, 2, 3]]
    np.save(tmp_path / "mask.npy", labels[:2])
    with pytest.raises(
        VolumeError, match=r"of shape \(2, 6, 8\), but its image has \(4, 6, 8\); save the mask as NIfTI"
    ):
        read_mask(tmp_path / "mask.npy", image)


def test_a_mask_of_fractions_or_of_another_place_is_refused(tmp_path: Path) -> None:
    image = make_image(tmp_path)
    half = np.zeros((4, 6, 8), np.float32)
    half[0, 0, :3] = 0.5
    write_volume(tmp_path / "mask.nii.gz", half, LPS)
    with pytest.raises(VolumeError, match="3 of 192 values are not whole numbers, expected a label per voxel"):
        read_mask(tmp_path / "mask.nii.gz", image)
    far = LPS.copy()
    far[0, 3] = 1000
    write_volume(tmp_path / "mask.nii.gz", np.ones((4, 6, 8), np.uint8), far)
    with pytest.raises(VolumeError, match="every labelled voxel of the mask lies outside its image"):
        read_mask(tmp_path / "mask.nii.gz", image)
    write_volume(tmp_path / "mask.nii.gz", np.zeros((4, 6, 8), np.uint8), far)
    assert not read_mask(tmp_path / "mask.nii.gz", image).any()


def test_whole_numbers_stored_as_floats_are_labels(tmp_path: Path) -> None:
    image = make_image(tmp_path)
    write_volume(tmp_path / "mask.nii.gz", np.full((4, 6, 8), 2.0000002, np.float32), LPS)
    assert (read_mask(tmp_path / "mask.nii.gz", image) == 2).all()


# ---- writing ----


def test_a_map_written_back_has_the_geometry_of_its_source(tmp_path: Path) -> None:
    sitk.WriteImage(itk_image(ramp(), OBLIQUE), str(tmp_path / "scan.nii.gz"))
    volume = read_volume(tmp_path / "scan.nii.gz")
    heat = volume.array.astype(np.float32) / 2
    write_volume(tmp_path / "heat.nii.gz", to_source(heat, volume.source_affine), volume.source_affine)
    source, written = (sitk.ReadImage(str(tmp_path / name)) for name in ("scan.nii.gz", "heat.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(written), sitk.GetArrayFromImage(source) / 2)
    assert written.GetSize() == source.GetSize()
    assert written.GetSpacing() == pytest.approx(source.GetSpacing())
    assert written.GetOrigin() == pytest.approx(source.GetOrigin())
    assert written.GetDirection() == pytest.approx(source.GetDirection(), abs=1e-6)


def test_writing_is_refused_in_words_and_leaves_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"cannot write this format; name it \.nii\.gz"):
        write_volume(tmp_path / "scan.mhd", ramp(), LPS)
    with pytest.raises(VolumeError, match="cannot write an array of 2 axes"):
        write_volume(tmp_path / "scan.nii", ramp((4, 5)), LPS)
    with pytest.raises(VolumeError, match="its geometry is singular"):
        write_volume(tmp_path / "scan.nii", ramp(), np.diag([1.0, 1, 0, 1]))
    with pytest.raises(VolumeError, match=r"cannot be written .*; check the folder, its space and its rights"):
        write_volume(tmp_path / "gone" / "scan.nii", ramp(), LPS)
    path = save(tmp_path / "scan.nii.gz", b"what was there")
    with pytest.raises(VolumeError, match="cannot be written"):
        write_volume(path, ramp().astype(np.float16), LPS)
    assert path.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [path]


# ---- real scans ----


@pytest.mark.realdata
def test_real_scans_read_as_itk_reads_and_orients_them(real_data: Path) -> None:
    files = [*sorted(real_data.glob("*/volumes/*.nii.gz"))[::17], *sorted(real_data.glob("sts/nifti/*/*.nii.gz"))]
    assert len(files) > 30
    for file in files:
        image = sitk.ReadImage(str(file))
        oriented = sitk.DICOMOrient(image, "LPS")
        volume = read_volume(file)
        np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(oriented))
        np.testing.assert_allclose(volume.affine, itk_affine(oriented), atol=1e-4)
        assert volume.spacing_mm == pytest.approx(oriented.GetSpacing()[::-1], rel=1e-5)
        np.testing.assert_array_equal(to_source(volume.array, volume.source_affine), sitk.GetArrayFromImage(image))


@pytest.mark.realdata
def test_the_same_image_as_dicom_and_as_nifti_is_the_same_volume(real_data: Path) -> None:
    series = sorted((real_data / "sts" / "dicom").glob("*/*/image"))
    assert len(series) == 6
    for folder in series:
        patient, view = folder.parts[-3:-1]
        file = real_data / "sts" / "nifti" / patient / f"{view}_image.nii.gz"
        dicom, converted = read_volume(folder), read_volume(file)
        np.testing.assert_array_equal(dicom.array, converted.array)
        assert dicom.spacing_mm == converted.spacing_mm
        assert canonical_axes(dicom.source_affine) == canonical_axes(converted.source_affine)
        np.testing.assert_allclose(dicom.affine, converted.affine, atol=1e-4)
        mask = file.with_name(f"{view}_mask.nii.gz")
        np.testing.assert_array_equal(read_mask(mask, dicom), read_mask(mask, converted))
        assert read_mask(mask, dicom).any()
