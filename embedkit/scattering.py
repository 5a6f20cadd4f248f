"""Owns the built-in backbone, a fixed two-order wavelet scattering bank; knows no learned weights.

The transform is that of Bruna and Mallat (Invariant Scattering Convolution Networks, IEEE TPAMI 2013): an image is
convolved with complex Morlet wavelets of J scales and L orientations and the modulus is taken, which is done once more
with the coarser wavelets; every order is averaged by a Gaussian and read on a grid of 2**J pixels. The filters'
shapes are those of Kymatio (Andreux et al., JMLR 2020). Each convolution is a product in the Fourier domain. Only the
window of frequencies around the wavelet's own is kept, which makes the band as coarse as it may be; the window's shift
changes the phase alone, which the modulus drops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from embedkit.errors import BackboneError
from embedkit.features import BackboneInfo, BackboneOutput, LayerTokens
from embedkit.images import check_layers, normalize_images

__all__ = ["SCATTERING", "ScatteringBackbone"]

SCATTERING = "embedkit/scattering"
SCALES = 4
ORIENTATIONS = 8
_STRIDE = 2**SCALES
_SIGMA = 0.8  # width of the finest wavelet in pixels (Kymatio)
_XI = 3 * math.pi / 4  # frequency of the finest wavelet in radians per pixel (Kymatio)
_SLANT = 4 / ORIENTATIONS  # how much wider a wavelet is across its waves (Kymatio)
_SIGMA_AVERAGE = 0.8 * 2 ** (SCALES - 1)  # width of the averaging Gaussian in pixels (Kymatio)
_FLOOR = 0.003  # tokens are log(1 + coefficient / floor); of the floors tried on real scans, the one that served best
_CHUNK = {"cpu": 8}  # images at a time, so that the bands stay in the processor's cache
_TURN = 2 * math.pi


class ScatteringBackbone:
    """Wavelet scattering as a backbone; see `embedkit.features.Backbone` for what its methods give.

    Layer 1 holds orders 0 and 1 (1 + J L numbers per place), layer 2 orders 0 to 2 (J (J - 1) / 2 L**2 more); three
    channels are scattered one by one and joined. A patch is a place of the grid, ``cls`` the mean over the places.

    Attributes:
        info: What it is.
    """

    def __init__(self, *, image_size: int = 128, channels: int = 1, device: str | torch.device = "cpu") -> None:
        if image_size < 2 * _STRIDE or image_size % _STRIDE:
            raise BackboneError(
                f"image size {image_size} does not fit {SCATTERING};"
                f" give a multiple of {_STRIDE} of at least {2 * _STRIDE}"
            )
        first = 1 + SCALES * ORIENTATIONS
        second = SCALES * (SCALES - 1) // 2 * ORIENTATIONS**2
        grid = (image_size // _STRIDE,) * 2
        self.info = BackboneInfo(
            name=SCATTERING,
            weights="builtin:1",
            image_size=image_size,
            mean=(0.0,) * channels,
            std=(1.0,) * channels,
            depth=2,
            dims=(channels * first, channels * (first + second)),
            grids=(grid, grid),
            summary_layers=(1, 2),
        )
        padded = image_size + 2 * _STRIDE
        self._wavelets = [_make_wavelets(padded, scale).to(device) for scale in range(SCALES)]
        self._averages = [_make_average(image_size, padded, scale).to(device) for scale in range(SCALES)]
        self._corners = [[_corner(padded, scale, angle) for angle in _angles()] for scale in range(SCALES)]

    def forward_layers(self, images: Tensor, layers: Sequence[int], *, attention: bool = False) -> BackboneOutput:
        """See `embedkit.features.Backbone.forward_layers`."""
        check_layers(layers, self.info)
        if attention:
            raise BackboneError(f"{SCATTERING} gives no attention: it has no class token; leave attention out")
        if not layers:
            return BackboneOutput()
        images = normalize_images(images.float(), self.info).contiguous()
        chunk = _CHUNK.get(images.device.type, 64)
        with torch.autocast(images.device.type, enabled=False):
            places = torch.cat([self._scatter(part, orders=max(layers)) for part in torch.split(images, chunk)])
        tokens = {layer: self._tokens(places, layer) for layer in sorted(set(layers))}
        return BackboneOutput({layer: LayerTokens(item.mean(1), item) for layer, item in tokens.items()})

    def run_tail(self, sequence: Tensor, layer: int) -> LayerTokens:
        """Always raises BackboneError: scattering is no token sequence."""
        raise BackboneError(
            f"{SCATTERING} has no tail for {list(sequence.shape)} tokens of layer {layer}: no token sequence runs"
            " through its layers; choose a vision transformer for cut tokens"
        )

    def _tokens(self, places: Tensor, layer: int) -> Tensor:
        """[batch patches dim] from [batch channels numbers grid_height grid_width]."""
        width = self.info.dims[layer - 1] // places.shape[1]
        return torch.log1p(places[:, :, :width] / _FLOOR).flatten(3).flatten(1, 2).transpose(1, 2)

    def _scatter(self, images: Tensor, *, orders: int) -> Tensor:
        """Coefficients [batch channels numbers grid_height grid_width], by order, then scale, then orientation."""
        batch, channels = images.shape[:2]
        padded = F.pad(images, (_STRIDE,) * 4, mode="reflect").flatten(0, 1)
        found: list[list[Tensor]] = [[self._average(padded[:, None], 0)], [], []]
        spectra = [torch.fft.fft2(padded)[:, None]]
        for scale in range(SCALES):
            for order, source in enumerate(spectra if orders > 1 else spectra[:1]):
                band = self._filter(source, scale)
                found[min(order, 1) + 1].append(self._average(band, scale).flatten(1, -3))
                if order == 0:
                    first = band[:, 0]
            if orders > 1 and scale < SCALES - 1:
                spectra.append(torch.fft.fft2(first))
        numbers = torch.cat([part for parts in found for part in parts], dim=1)
        return numbers.view(batch, channels, *numbers.shape[1:]).clamp_min_(0)

    def _filter(self, spectra: Tensor, scale: int) -> Tensor:
        """Modulus of the bands of one scale, [images sources orientations side side].

        Args:
            spectra: [images sources height width], Fourier transforms of images as fine as the wavelets or finer.
            scale: Of the wavelets.
        """
        wavelets = self._wavelets[scale]
        side = wavelets.shape[-1]
        if scale == 0:
            windows = spectra.unsqueeze(2) * wavelets
        else:
            near = torch.cat((spectra[..., -side:, :], spectra[..., :side, :]), dim=-2)
            near = torch.cat((near[..., -side:], near[..., :side]), dim=-1) * (side / spectra.shape[-1]) ** 2
            windows = near.new_empty(*near.shape[:2], ORIENTATIONS, side, side)
            for number, (row, column) in enumerate(self._corners[scale]):
                window = near[..., row : row + side, column : column + side]
                torch.mul(window, wavelets[number], out=windows[:, :, number])
        parts = torch.view_as_real(torch.fft.ifft2(windows)).square_()
        return (parts[..., 0] + parts[..., 1]).sqrt_()

    def _average(self, bands: Tensor, scale: int) -> Tensor:
        """[... grid_height grid_width]: Gaussian averages of [... side side] around the patches' centres."""
        average = self._averages[scale]
        return average @ (bands @ average.T)


def _angles() -> list[float]:
    return [math.pi * number / ORIENTATIONS for number in range(ORIENTATIONS)]


def _corner(padded: int, scale: int, angle: float) -> tuple[int, int]:
    """Top left of a wavelet's window within the frequencies -side to side - 1, zero in the middle."""
    side, centre = padded // 2**scale, _XI / 2**scale * padded / _TURN
    return side // 2 + round(centre * math.sin(angle)), side // 2 + round(centre * math.cos(angle))


def _make_wavelets(padded: int, scale: int) -> Tensor:
    """Fourier transforms of the Morlet wavelets of a scale, float32 [orientations side side] on their windows."""
    transforms, side, centre = [], padded // 2**scale, _XI / 2**scale
    for angle in _angles():
        if scale == 0:  # the whole spectrum, in the order of the Fourier transform
            rows = columns = torch.fft.fftfreq(side, dtype=torch.float64) * _TURN
        else:
            row, column = _corner(padded, scale, angle)
            rows = (torch.arange(side, dtype=torch.float64) + (row - side)) * _TURN / padded
            columns = (torch.arange(side, dtype=torch.float64) + (column - side)) * _TURN / padded
        shift = (centre * math.sin(angle), centre * math.cos(angle))
        nothing = torch.zeros(1, dtype=torch.float64)
        waves, envelope = _envelope(rows, columns, shift, scale, angle), _envelope(rows, columns, (0, 0), scale, angle)
        mean = _envelope(nothing, nothing, shift, scale, angle) / _envelope(nothing, nothing, (0, 0), scale, angle)
        transforms.append(waves - mean * envelope)  # no response to a constant image
    return torch.stack(transforms).float()


def _envelope(rows: Tensor, columns: Tensor, shift: tuple[float, float], scale: int, angle: float) -> Tensor:
    """Fourier transform of an oriented Gaussian at ``rows`` x ``columns`` (radians per pixel), moved by ``shift``."""
    total = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    for turn_y in (-_TURN, 0.0, _TURN):  # an image sampled at pixels has a periodic spectrum
        for turn_x in (-_TURN, 0.0, _TURN):
            y, x = (rows - shift[0] + turn_y)[:, None], (columns - shift[1] + turn_x)[None]
            along = x * math.cos(angle) + y * math.sin(angle)
            across = y * math.cos(angle) - x * math.sin(angle)
            total += torch.exp(-0.5 * (_SIGMA * 2**scale) ** 2 * (along**2 + (across / _SLANT) ** 2))
    return total


def _make_average(image_size: int, padded: int, scale: int) -> Tensor:
    """float32 [grid side]: Gaussian weights, each row summing to 1, around the centre of each patch."""
    pixels = torch.arange(padded // 2**scale, dtype=torch.float64) * 2**scale - _STRIDE
    centres = (torch.arange(image_size // _STRIDE, dtype=torch.float64) + 0.5) * _STRIDE - 0.5
    weights = torch.exp(-0.5 * ((pixels - centres[:, None]) / _SIGMA_AVERAGE) ** 2)
    return (weights / weights.sum(1, keepdim=True)).float()
