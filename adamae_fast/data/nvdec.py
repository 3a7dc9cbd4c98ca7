"""What the GPU's video decoder (NVDEC) can decode, asked from NVIDIA's driver library libnvcuvid."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch

LIBRARY = "libnvcuvid.so.1"

CODECS = {"mpeg4": 2, "h264": 4, "hevc": 8, "vp8": 9, "vp9": 10, "av1": 11, "libdav1d": 11}
"""FFmpeg's names of decoders and the driver's numbers of their codecs. MJPEG is left to the CPU: its colours span
another range than those of the rest, and what becomes of that was not verified."""

_CHROMA_420 = 1


class Limits(NamedTuple):
    """Sizes in pixels of the frames that are decoded."""

    min_width: int
    min_height: int
    max_width: int
    max_height: int
    max_macroblocks: int
    """Largest area, in blocks of 16 × 16 pixels."""

    def admit(self, width: int, height: int) -> bool:
        """Whether frames of this size are decoded."""
        fits = self.min_width <= width <= self.max_width and self.min_height <= height <= self.max_height
        return fits and width * height <= 256 * self.max_macroblocks


class _Capabilities(ctypes.Structure):
    """CUVIDDECODECAPS of the Video Codec SDK."""

    _fields_ = [
        ("codec", ctypes.c_int),
        ("chroma_format", ctypes.c_int),
        ("bit_depth_minus_8", ctypes.c_uint),
        ("reserved_1", ctypes.c_uint * 3),
        ("is_supported", ctypes.c_ubyte),
        ("num_engines", ctypes.c_ubyte),
        ("output_formats", ctypes.c_ushort),
        ("max_width", ctypes.c_uint),
        ("max_height", ctypes.c_uint),
        ("max_macroblocks", ctypes.c_uint),
        ("min_width", ctypes.c_ushort),
        ("min_height", ctypes.c_ushort),
        ("histogram", ctypes.c_ubyte * 4),
        ("reserved_3", ctypes.c_uint * 10),
    ]


def reason_missing() -> str | None:
    """Why NVDEC cannot be used here; None if its library loads."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return f"the driver's library {LIBRARY} is not there; NVIDIA_DRIVER_CAPABILITIES of a container must name video"
    return None


def decodable(device: torch.device) -> dict[str, Limits]:
    """For each codec that ``device`` decodes as 8-bit 4:2:0, by FFmpeg's name: the sizes of frames."""
    with torch.cuda.device(device):
        torch.zeros(1, device=device)  # makes the CUDA context, which the library needs
        return _ask(ctypes.CDLL(LIBRARY))


def _ask(library: Any) -> dict[str, Limits]:
    found = {}
    for name, number in CODECS.items():
        capabilities = _Capabilities(codec=number, chroma_format=_CHROMA_420)
        status = library.cuvidGetDecoderCaps(ctypes.byref(capabilities))
        if status == 0 and capabilities.is_supported:
            found[name] = Limits(*(int(getattr(capabilities, field)) for field in Limits._fields))
    return found
