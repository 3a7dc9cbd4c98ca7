"""What a video file's packets say without decoding them: how many frames there are, when, and where decoding can begin.

Times are in the stream's own unit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

Buffer: TypeAlias = bytes | memoryview

DECORD_CONTAINERS = frozenset(("mp4", "matroska"))
"""FFmpeg's names of containers in which decord finds frames exactly; it was seen to miss in AVI, FLV and MPEG-TS.
DALI is trusted with the same ones."""

_START_CODE = re.compile(rb"\x00\x00\x01")
"""In front of each unit of H.264 that is not stored with lengths."""

_PLAIN_SLICE, _RESTARTING_SLICE = 1, 5
"""Types of H.264 units that hold a part of a picture, of any one and of one that begins a group."""

_WITHOUT_EFFECT = (_PLAIN_SLICE, 6, 9, 12)
"""Slices, remarks, delimiters and filling: no later picture decodes otherwise for want of the last three."""


class Packet(NamedTuple):
    """What is known of a packet without decoding it."""

    pts: int | None
    """Time at which its picture is shown."""

    is_key: bool
    """The container calls it a key frame."""

    restarts: bool
    """A key frame that needs nothing from before, so that decoding can begin here. In H.264 it begins with an I slice:
    with periodic intra refresh it does not, and the picture is complete only some frames later."""

    is_discard: bool
    """An edit list hides it."""

    is_misplaced: bool = False
    """It has a time before that of one that precedes it in the file, which only B pictures can have: times are wrong.
    Known of H.264 only."""


def presentation_times(packets: list[Packet], first_pts: int | None) -> tuple[list[int] | None, list[int]]:
    """Times of the frames, and of the key frames at which decoding can begin; both ascending.

    Several packets of one time are one picture (hidden frames of VP8). What comes before the first key frame and before
    ``first_pts``, the time of the first frame that decodes, does not count, nor does what an edit list discards. The
    times of the frames are None where a packet has no time, or where the times are wrong.
    """
    if any(packet.is_misplaced for packet in packets):
        return None, []
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
    trap = _find_order_trap(packets, pts)
    if trap is None and turns and "mp4" not in container:
        return f"it ignores the rotation in {container}"
    return trap


def find_dali_trap(packets: list[Packet], pts: list[int] | None, container: str, turns: int) -> str | None:
    """Why DALI would return other pictures than those asked for; None if it would not. Arguments as above.

    DALI takes the n-th packet in the order of time stamps for frame n, leaves out packets before time 0, and decodes
    from the last key frame before a frame in that order.
    """
    if not DECORD_CONTAINERS.intersection(container.split(",")):
        return "a container other than MP4 and Matroska"
    if turns:
        return "a rotation in the metadata"
    if pts and pts[0] < 0:
        return "frames before time 0"
    return _find_order_trap(packets, pts)


def _find_order_trap(packets: list[Packet], pts: list[int] | None) -> str | None:
    """What in the order of packets misleads a reader that takes each one for a frame."""
    if pts is None:
        return "time stamps are missing or guessed"
    if len(packets) != len(pts):
        return f"{len(packets)} packets hold {len(pts)} frames (edit list, hidden packets or a cut-off start)"
    for place, packet in enumerate(packets):
        if packet.is_key and not packet.restarts:
            return "key frames that only begin to refresh the picture"
        if packet.is_key and packet.pts != pts[place]:
            return "open groups of pictures: frames that follow a key frame in the file are shown before it"
    return None


def shows_old_vp9(first_byte: int) -> bool:
    """Whether a VP9 packet only shows a picture decoded before, by the first byte of its header."""
    profile_3 = first_byte & 0b110000 == 0b110000  # has one bit more before the flag
    return bool(first_byte & (0b000100 if profile_3 else 0b001000))


P_SLICE, B_SLICE, I_SLICE = range(3)
"""H.264's kinds of slices that matter here."""


def h264_slice_kind(packet: Buffer, extradata: bytes | None) -> int | None:
    """The kind of a packet's first slice, 0 to 4; None where it holds none that can be read."""
    for unit in _h264_units(packet, extradata):
        if unit[0] & 31 in (_PLAIN_SLICE, _RESTARTING_SLICE):
            return _slice_kind(bytes(unit[:9]))
    return None


def is_h264_disposable(packet: Buffer, extradata: bytes | None) -> bool:
    """Whether no later packet needs this one: its slices have ``nal_ref_idc`` 0 (H.264, 7.4.1), and it sets nothing."""
    headers = [unit[0] for unit in _h264_units(packet, extradata)]
    references = [header & 96 for header in headers if header & 31 == _PLAIN_SLICE]
    return bool(references) and not any(references) and all(header & 31 in _WITHOUT_EFFECT for header in headers)


def _h264_units(packet: Buffer, extradata: bytes | None) -> Iterator[memoryview]:
    """The units of a packet that are not empty, from their header of one byte on.

    ``extradata`` begins with 1 where they have their length in front (mp4, Matroska); elsewhere they have start codes.
    """
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


def _slice_kind(slice_: bytes) -> int | None:
    """Read the kind of the slice: the second of two Exp-Golomb numbers behind a header of one byte."""
    bits = f"{int.from_bytes(slice_[1:9].ljust(8, bytes(1))):064b}"
    for _ in range(2):
        zeros = len(bits) - len(bits.lstrip("0"))
        number, bits = bits[zeros : 2 * zeros + 1], bits[2 * zeros + 1 :]
    return (int(number, 2) - 1) % 5 if number else None
