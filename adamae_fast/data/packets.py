"""What a video file's packets say without decoding them: how many frames there are, when, and where decoding can begin.

Times are in the stream's own unit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

Buffer: TypeAlias = bytes | memoryview

DECORD_CONTAINERS = frozenset(("mp4", "matroska"))
"""FFmpeg's names of containers in which decord finds frames exactly; it was seen to miss in AVI, FLV and MPEG-TS."""

_START_CODE = re.compile(rb"\x00\x00\x01")
"""In front of each unit of H.264 that is not stored with lengths."""

_SLICES = (1, 5)
"""Types of H.264 units that hold a part of the picture; 5 begins a new group of pictures."""

_WITHOUT_EFFECT = (1, 6, 9, 12)
"""Types of H.264 units without which the pictures that follow decode alike: slices, remarks, delimiters, filling."""


class Packet(NamedTuple):
    """What is known of a packet without decoding it."""

    pts: int | None
    """Time at which its picture is shown."""

    is_key: bool
    """The container calls it a key frame."""

    restarts: bool
    """A key frame that needs nothing from before, so that decoding can begin here."""

    is_discard: bool
    """An edit list hides it."""

    is_disposable: bool
    """No other picture is made from it, so that a decoder need not see it; known for H.264 only."""


def presentation_times(packets: list[Packet], first_pts: int | None) -> tuple[list[int] | None, list[int]]:
    """Times of the frames, and of the key frames at which decoding can begin; both ascending.

    Several packets of one time are one picture (hidden frames of VP8). What comes before the first key frame and before
    ``first_pts``, the time of the first frame that decodes, does not count, nor does what an edit list discards. The
    times of the frames are None where a packet has no time.
    """
    first_key = next((place for place, packet in enumerate(packets) if packet.is_key), 0)
    usable = packets[first_key:]
    pts = [packet.pts for packet in usable if packet.pts is not None]
    if first_pts is None or not pts or len(pts) < len(usable):
        return None, []
    begin = max(first_pts, pts[0])
    times = {t for t, packet in zip(pts, usable, strict=True) if not packet.is_discard and t >= begin}
    keys = {t for t, packet in zip(pts, usable, strict=True) if packet.restarts}
    return sorted(times), sorted(keys | {pts[0]})


def find_decord_trap(packets: list[Packet], pts: list[int] | None, container: str, turns: int) -> str | None:
    """Why decord would return other frames than those asked for; None if it would not.

    decord takes the n-th packet of the file, in the order of time stamps, for frame n, and the n-th packet, in the
    order of decoding, for key frame n. ``pts`` are the frames' times, ``container`` is FFmpeg's name for the file's
    format, ``turns`` are the quarter turns that its metadata ask for.
    """
    if not DECORD_CONTAINERS.intersection(container.split(",")):
        return f"it seeks inaccurately in {container}"
    if pts is None:
        return "time stamps are missing or guessed"
    if len(packets) != len(pts):
        return f"{len(packets)} packets hold {len(pts)} frames (edit list, hidden packets or a cut-off start)"
    for place, packet in enumerate(packets):
        if packet.is_key and not packet.restarts:
            return "key frames that only begin to refresh the picture"
        if packet.is_key and packet.pts != pts[place]:
            return "open groups of pictures: frames that follow a key frame in the file are shown before it"
    if turns and "mp4" not in container:
        return f"it ignores the rotation in {container}"
    return None


def inspect_h264(packet: Buffer, extradata: bytes | None) -> tuple[bool, bool]:
    """Whether a packet begins with an I slice, and whether it is disposable.

    A packet that is marked as a key frame does not begin with one where the picture is refreshed periodically: it is
    complete only some frames later. A packet is disposable if ``nal_ref_idc`` of all its slices is 0 (H.264, 7.4.1)
    and nothing else in it matters. ``extradata`` begins with 1 where units have their length in front (mp4, Matroska);
    elsewhere they have start codes.
    """
    units = list(_units(packet, extradata))
    slices = [unit for unit in units if unit[0] & 31 in _SLICES]
    is_disposable = all(unit[0] & 31 in _WITHOUT_EFFECT for unit in units) and not any(
        unit[0] >> 5 & 3 for unit in slices
    )
    return bool(slices) and _is_intra_slice(bytes(slices[0][:9])), bool(slices) and is_disposable


def _units(packet: Buffer, extradata: bytes | None) -> Iterator[memoryview]:
    """The units of an H.264 packet that are not empty, from their header on."""
    view = memoryview(packet)
    if extradata and extradata[0] == 1 and len(extradata) > 4:
        prefix = (extradata[4] & 3) + 1
        place = 0
        while place + prefix < len(view):
            end = place + prefix + int.from_bytes(view[place : place + prefix])
            if end > place + prefix:
                yield view[place + prefix : end]
            place = end
    else:
        for match in _START_CODE.finditer(view):
            if match.end() < len(view):
                yield view[match.end() :]


def _is_intra_slice(slice_: bytes) -> bool:
    """Read the type of the slice: the second of two Exp-Golomb numbers behind a header of one byte."""
    bits = f"{int.from_bytes(slice_[1:9].ljust(8, bytes(1))):064b}"
    for _ in range(2):
        zeros = len(bits) - len(bits.lstrip("0"))
        number, bits = bits[zeros : 2 * zeros + 1], bits[2 * zeros + 1 :]
    return bool(number) and (int(number, 2) - 1) % 5 == 2
