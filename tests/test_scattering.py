"""The scattering bank: what it answers to, where, by stored values, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from embedkit.backbones import load_backbone
from embedkit.errors import BackboneError
from embedkit.scattering import ORIENTATIONS, SCALES, ScatteringBackbone

FLOOR = 0.003
FIRST = 1 + SCALES * ORIENTATIONS


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small operations on several threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def coefficients(images: Tensor, layer: int = 2) -> Tensor:
    """[batch numbers grid_height grid_width] before the logarithm."""
    backbone = ScatteringBackbone(image_size=images.shape[-1])
    patches = backbone.forward_layers(images, [layer]).layers[layer].patches
    side = images.shape[-1] // 16
    return (torch.expm1(patches) * FLOOR).transpose(1, 2).unflatten(2, (side, side))


def waves(frequency: float, angle: float, side: int = 128) -> Tensor:
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    phase = frequency * (x * math.cos(angle) + y * math.sin(angle))
    return (0.5 + 0.4 * torch.cos(phase)).view(1, 1, side, side)


def smooth_noise(side: int = 128, *, batch: int = 1) -> Tensor:
    noise = torch.rand(batch, 1, side, side, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.avg_pool2d(noise, 5, 1, 2)


def test_a_constant_image_answers_in_order_zero_alone() -> None:
    found = coefficients(torch.full((1, 1, 64, 64), 0.7))
    torch.testing.assert_close(found[:, 0], torch.full((1, 4, 4), 0.7))
    assert float(found[:, 1:].max()) < 1e-5


@pytest.mark.parametrize("scale", range(SCALES))
@pytest.mark.parametrize("orientation", [0, 3, 6])
def test_waves_answer_in_the_wavelet_of_their_scale_and_orientation(scale: int, orientation: int) -> None:
    image = waves(3 * math.pi / 4 / 2**scale, math.pi * orientation / ORIENTATIONS)
    middle = coefficients(image, layer=1)[0, :, 3:5, 3:5].mean((1, 2))
    assert int(middle[1:].argmax()) == scale * ORIENTATIONS + orientation
    # a cosine of amplitude a has half of it at the wavelet's frequency, where the filter's gain is about 1
    assert 0.9 * 0.2 < float(middle[1:].max()) < 1.1 * 0.2


def test_layers_hold_the_orders_that_they_say() -> None:
    image = smooth_noise()
    first, both = coefficients(image, 1), coefficients(image, 2)
    assert first.shape[1] == FIRST
    assert both.shape[1] == FIRST + SCALES * (SCALES - 1) // 2 * ORIENTATIONS**2
    torch.testing.assert_close(both[:, :FIRST], first)


def test_second_order_sees_how_the_first_swells() -> None:
    even = waves(3 * math.pi / 8, 0.0)
    swell = 0.5 + 0.5 * torch.cos(3 * math.pi / 16 * torch.arange(128)).view(1, 1, 128, 1)  # down the rows
    plain, swelling = (
        coefficients(image)[0, FIRST:, 2:6, 2:6].mean((1, 2)) for image in (even, 0.5 + (even - 0.5) * swell)
    )
    assert float(plain.max()) < 0.002
    assert float(swelling.max()) > 0.015
    assert int(swelling.argmax()) % ORIENTATIONS == ORIENTATIONS // 2


def test_moving_the_image_by_a_patch_moves_the_tokens_by_one_place() -> None:
    wide = smooth_noise(160)
    here, moved = wide[..., :128, :128], wide[..., :128, 16:144]
    torch.testing.assert_close(
        coefficients(here)[..., 2:6, 3:6], coefficients(moved)[..., 2:6, 2:5], atol=2e-3, rtol=0.02
    )


def test_a_small_shift_changes_tokens_less_than_it_changes_the_image() -> None:
    wide = smooth_noise(144)
    here, moved = wide[..., :128, :128], wide[..., :128, 2:130]
    before, after = coefficients(here), coefficients(moved)
    change = (after[:, 1:] - before[:, 1:]).norm() / before[:, 1:].norm()
    detail = (moved - moved.mean()).norm()
    assert float(change) < 0.25 * float((moved - here).norm() / detail)


def test_mirroring_the_image_mirrors_the_grid_and_the_orientations() -> None:
    image = smooth_noise()
    first, mirrored = coefficients(image, 1)[0, 1:], coefficients(image.flip(-1), 1)[0, 1:].flip(-1)
    turned = [
        scale * ORIENTATIONS + (-number) % ORIENTATIONS for scale in range(SCALES) for number in range(ORIENTATIONS)
    ]
    interior = slice(1, 7)
    torch.testing.assert_close(
        mirrored[:, interior, interior], first[turned][:, interior, interior], atol=1e-3, rtol=0.05
    )


def test_energy_falls_with_the_order() -> None:
    found = coefficients(smooth_noise())
    energy = [float(part.square().sum()) for part in (found[:, :1], found[:, 1:FIRST], found[:, FIRST:])]
    assert energy[0] > energy[1] > energy[2] > 0


def test_values_are_the_stored_ones_on_every_machine() -> None:
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    image = (
        (0.5 + 0.3 * torch.sin(0.02 * x * y / 8) + 0.2 * torch.cos(0.9 * x + 0.4 * y)).clamp(0, 1).view(1, 1, 64, 64)
    )
    output = ScatteringBackbone(image_size=64).forward_layers(image, [1, 2])
    summary = output.layers[2].summary
    assert summary is not None
    picked = summary[0, [0, 1, 9, 12, 20, 32, 33, 100, 250, 416]]
    torch.testing.assert_close(picked, torch.tensor(STORED_SUMMARY), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        output.layers[1].patches[0, [0, 5, 15], 10], torch.tensor(STORED_PATCHES), atol=1e-4, rtol=1e-4
    )


STORED_SUMMARY = [5.25489, 2.42756, 2.6589, 1.58001, 1.96355, 1.71367, 0.26376, 0.08748, 0.2017, 0.55251]
STORED_PATCHES = [3.18808, 3.43595, 3.20657]


def test_tokens_do_not_depend_on_the_rest_of_the_batch() -> None:
    images = smooth_noise(64, batch=7)
    backbone = ScatteringBackbone(image_size=64)
    together = backbone.forward_layers(images, [2]).layers[2].patches
    alone = backbone.forward_layers(images[5:6], [2]).layers[2].patches
    torch.testing.assert_close(together[5:6], alone, atol=1e-5, rtol=1e-5)


def test_three_channels_are_scattered_one_by_one() -> None:
    images = smooth_noise(64, batch=3).view(1, 3, 64, 64)
    joined = ScatteringBackbone(image_size=64, channels=3)
    single = ScatteringBackbone(image_size=64)
    patches = joined.forward_layers(images, [1]).layers[1].patches
    for number in range(3):
        expected = single.forward_layers(images[:, number : number + 1], [1]).layers[1].patches
        torch.testing.assert_close(patches[..., number * FIRST : (number + 1) * FIRST], expected, atol=1e-5, rtol=1e-5)
    assert joined.info.dims == (3 * FIRST, 3 * single.info.dims[1])


def test_the_summary_is_the_mean_over_places() -> None:
    layer = ScatteringBackbone(image_size=64).forward_layers(smooth_noise(64), [2]).layers[2]
    torch.testing.assert_close(layer.summary, layer.patches.mean(1))
    assert layer.sequence is None


def test_autocast_changes_nothing() -> None:
    backbone, images = ScatteringBackbone(image_size=64), smooth_noise(64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = backbone.forward_layers(images, [2]).layers[2].patches
    assert torch.equal(inside, backbone.forward_layers(images, [2]).layers[2].patches)


def test_it_loads_by_name_without_any_file() -> None:
    info = load_backbone("embedkit/scattering", channels=3).info
    assert (info.weights, info.image_size, info.depth, info.grids) == ("builtin:1", 128, 2, ((8, 8), (8, 8)))
    assert len(info.mean) == 3
    assert load_backbone("embedkit/scattering", image_size=224).info.grids[0] == (14, 14)


def test_what_it_cannot_give_is_refused() -> None:
    backbone = ScatteringBackbone(image_size=64)
    for size in (0, 16, 100):
        with pytest.raises(
            BackboneError, match=f"image size {size} does not fit embedkit/scattering; give a multiple of 16"
        ):
            ScatteringBackbone(image_size=size)
    with pytest.raises(BackboneError, match="gives no attention"):
        backbone.forward_layers(torch.zeros(1, 1, 64, 64), [1], attention=True)
    with pytest.raises(BackboneError, match="no token sequence runs through its layers"):
        backbone.run_tail(torch.zeros(1, 4, 3), 1)
    with pytest.raises(BackboneError, match="has no layer 3; its layers are 1 to 2"):
        backbone.forward_layers(torch.zeros(1, 1, 64, 64), [3])
    with pytest.raises(BackboneError, match=r"expected \[batch, 1 channels, 64, 64\]"):
        backbone.forward_layers(torch.zeros(1, 3, 64, 64), [1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_tokens() -> None:
    images = smooth_noise(batch=3)
    here = ScatteringBackbone().forward_layers(images, [2]).layers[2].patches
    there = ScatteringBackbone(device="cuda").forward_layers(images.cuda(), [2]).layers[2].patches
    torch.testing.assert_close(there.cpu(), here, atol=1e-3, rtol=1e-3)
