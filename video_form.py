"""What the frames of a video are like: codecs, pixel formats and colours, and RGB arrays of them and back.

    python -c "from video_form import choose_target; print(choose_target('h264', 'yuv420p10le', 1920, 1080))"

prints the pixel format in which H.264 keeps a video of 10 bits.
"""
import math
import re
import struct
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from utils import InputError
from video_input import MAX_PIXELS, UNSPECIFIED

# Colours, by their numbers in ITU-T H.273. The network has seen pictures for common screens (SDR) only.
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
DOLBY_VISION = {"DOVI_RPU_BUFFER", "DOVI_METADATA"}  # by which players turn its colours into known ones
LOST = {  # what a decoder tells beside a picture, which the output does not
    "A53_CC": "the closed captions within the pictures are left out",
    "SPHERICAL": "the mark of a 360-degree video is left out",
    "STEREO3D": "the mark of a stereoscopic video is left out",
}
MATRICES = {1, 4, 5, 6, 7, 9}  # BT.709, FCC, BT.601 of PAL and of NTSC, SMPTE 240M, BT.2020
UNKNOWN_MATRICES = {0, 2, 3}  # 0 is RGB, which a picture in YUV cannot be
LIMITED, FULL = 1, 2  # range: black and white are 16 and 235, or 0 and 255
# Each chroma sample serves its whole block of pixels, and is the mean of the block on the way back: what is not changed
# in between comes back as it was, apart from rounding and from colours that RGB does not have.
EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
FROM_YUV, TO_YUV, RESIZE = Interpolation.POINT | EXACT, Interpolation.AREA | EXACT, Interpolation.BICUBIC | EXACT


class CodecChoice(NamedTuple):
    """An encoder behind a name of --codec.

    ``crf`` is the quality it takes unless --crf is given, and ``worst`` the largest crf; both are None where it has
    none. ``containers`` are the file formats in order of preference.
    """

    encoder: str
    crf: int | None
    worst: int | None
    settings: dict
    containers: tuple


CODECS = {
    "h264": CodecChoice("libx264", 16, 51, {}, ("mp4", "matroska")),
    "hevc": CodecChoice("libx265", 18, 51, {"x265-params": "log-level=none:open-gop=0"}, ("mp4", "matroska")),
    "vp9": CodecChoice("libvpx-vp9", 20, 63, {"b": "0", "cpu-used": "2", "row-mt": "1"}, ("mp4", "matroska")),
    "av1": CodecChoice("libsvtav1", 20, 63, {"preset": "6"}, ("mp4", "matroska")),
    "ffv1": CodecChoice("ffv1", None, None, {"level": "3"}, ("matroska", "mp4")),
    "prores": CodecChoice("prores_ks", None, None, {}, ("mov", "matroska")),
}


@dataclass(frozen=True)
class Form:
    """What the frames of a video are like: decided by the first readable one, and kept for all.

    Attributes:
        width, height: in px.
        source, target: names of the pixel formats of the source and of the output.
        deep: whether frames are derained in 16 bits a sample.
        matrix, primaries, transfer: of the colours, as H.273 numbers them, in source and output.
        source_range, range: LIMITED or FULL, of the values in source and output.
        aspect: width of a pixel divided by its height, or None.
        turn: how the picture is to be turned when it is shown, nine numbers as MP4 has them, or None.
    """

    width: int
    height: int
    source: str
    target: str
    deep: bool
    matrix: int
    source_range: int
    range: int
    primaries: int
    transfer: int
    aspect: Fraction | None
    turn: tuple | None


class Sampling(NamedTuple):
    """How a pixel format stores colours: "rgb", "grey" or "yuv", bits, pixels across and down a chroma sample."""

    kind: str
    bits: int
    across: int
    down: int


def sampling(name):
    """The ``Sampling`` of a pixel format."""
    pixels = av.VideoFormat(name, 64, 64)
    parts = [part for part in pixels.components if not part.is_alpha]
    kind = "rgb" if pixels.is_rgb or pixels.has_palette or name.startswith("xyz") else "yuv"
    bits, chroma = max(part.bits for part in parts), parts[-1]
    if len(parts) == 1 and kind == "yuv":
        return Sampling("grey", bits, 2, 2)  # any chroma is enough
    return Sampling(kind, bits, 64 // chroma.width, 64 // chroma.height)


def choose_target(codec, source, width, height):
    """The pixel format of an encoder that keeps most of a source's: chroma first, then bits, and no more than that."""
    has = sampling(source)
    encoder = CODECS[codec].encoder
    costs = {}
    for target in av.Codec(encoder, "w").video_formats:
        name = target.name
        if not re.fullmatch(r"(yuv4\d\dp|gbrp|gray)(\d+le)?|bgr0", name):
            continue
        gets = sampling(name)
        # Few players know RGB or grey in a video, so these are for FFV1 alone, which is for keeping.
        if gets.kind != "yuv" and (codec != "ffv1" or gets.kind != has.kind):
            continue
        # x264 and x265 take no half chroma samples.
        if encoder.startswith("libx26") and (width % gets.across or height % gets.down):
            continue
        costs[name] = (
            gets.kind != has.kind, max(0, gets.across - has.across) + max(0, gets.down - has.down),
            max(0, has.bits - gets.bits), has.across - gets.across + has.down - gets.down, gets.bits - has.bits,
        )
    return min(costs, key=costs.get)


def colours_of(picture, source):
    """{name: number} of a picture's colours for the names in ``UNSPECIFIED``, from the container if it does not say."""
    own = {name: getattr(picture, name) for name in UNSPECIFIED}
    return {name: source.colours[name] if value == UNSPECIFIED[name] else value for name, value in own.items()}


def tags_of(picture, source):
    """What the samples of a picture mean, for ``same_tags``: matrix, whether the range is full, transfer."""
    colours = colours_of(picture, source)
    return colours["colorspace"], is_full(picture, colours), colours["color_trc"]


def is_full(picture, colours):
    return colours["color_range"] == FULL or picture.format.name.startswith("yuvj")


def same_tags(one, other):
    """Whether two results of ``tags_of`` agree; 2 is unspecified."""
    return one[1] == other[1] and all(2 in (a, b) or a == b for a, b in zip(one[::2], other[::2]))


def choose_matrix(picture, colours, kind, path):
    """The numbers of matrix and range for a picture, as players take them where ``colours`` do not say."""
    usual = 1 if picture.height >= 720 else 6
    if kind == "rgb":
        return usual, LIMITED
    matrix = colours["colorspace"]
    if matrix not in MATRICES | UNKNOWN_MATRICES:
        raise InputError(
            f"--test_data_path {path}: its colours have a form that is not known here (matrix {matrix} of H.273);"
            " expected BT.601, BT.709 or BT.2020"
        )
    return (matrix if matrix in MATRICES else usual), FULL if is_full(picture, colours) else LIMITED


def side_data_of(picture):
    """{name: data} of what the decoder tells beside a picture, such as "DISPLAYMATRIX", in FFmpeg's names.

    PyAV fails where FFmpeg tells of what it does not know yet, such as EXIF. Then only the rotation can be had.
    """
    try:
        return {data.type.name: bytes(data) for data in picture.side_data}
    except ValueError:
        angle = math.radians(picture.rotation)
        cosine, sine = (round(2**16 * value) for value in (math.cos(angle), math.sin(angle)))
        matrix = struct.pack("=9i", cosine, -sine, 0, sine, cosine, 0, 0, 0, 2**30)
        return {"DISPLAYMATRIX": matrix} if picture.rotation else {}


def choose_form(picture, source, codec):
    """The ``Form`` of the output for the first readable picture of a source.

    Raises:
        InputError: the video is HDR or has colours in another form that is not known here, or is too large.
    """
    path, kind, colours = source.path, sampling(picture.format.name).kind, colours_of(picture, source)
    beside = side_data_of(picture)
    hdr = HDR_TRANSFERS.get(colours["color_trc"])
    if colours["color_trc"] == UNSPECIFIED["color_trc"] and beside.keys() & DOLBY_VISION:
        hdr = "Dolby Vision"
    if hdr:
        raise InputError(
            f"--test_data_path {path}: an HDR video ({hdr}); expected one in SDR, as the network has seen no other"
        )
    if picture.width * picture.height > MAX_PIXELS:
        size = f"{picture.width}x{picture.height}"
        raise InputError(f"--test_data_path {path}: {size}; expected at most {MAX_PIXELS:,} pixels")
    matrix, value_range = choose_matrix(picture, colours, kind, path)
    target = choose_target(codec, picture.format.name, picture.width, picture.height)
    source_range = value_range
    if sampling(target).kind == "rgb":
        matrix, value_range = 0, FULL
    elif codec == "prores":
        value_range = LIMITED  # it has no other
    stream = getattr(source, "stream", None)
    turn = beside.get("DISPLAYMATRIX")
    return Form(
        width=picture.width, height=picture.height, source=picture.format.name, target=target,
        deep=sampling(picture.format.name).bits > 8, matrix=matrix, source_range=source_range, range=value_range,
        primaries=colours["color_primaries"], transfer=colours["color_trc"],
        aspect=stream and stream.sample_aspect_ratio,
        turn=turn and struct.unpack("=9i", turn),
    )


def describe_form(form, codec, picture, source):
    """Sentences on what the output does not keep of the source's pictures, or keeps in a way that not all can play."""
    has, gets = sampling(form.source), sampling(form.target)
    sentences = []
    if gets.bits < has.bits or (gets.across, gets.down) > (has.across, has.down):
        sentences.append(f"{form.source} becomes {form.target}: {codec} has nothing closer; ffv1 keeps more")
    # FFmpeg's own decoder of VP8 and VP9 leaves it out; a WebM file says that there is some.
    if source.transparent or any(part.is_alpha for part in picture.format.components):
        sentences.append("the transparency of the frames is left out")
    sentences += [sentence for name, sentence in LOST.items() if name in side_data_of(picture)]
    sentences += source.losses
    common = ((8, 2, 2),) if codec == "h264" else ((8, 2, 2), (10, 2, 2))
    if codec in ("h264", "hevc") and gets[1:] not in common:
        why = "keeps the odd size" if form.width % 2 or form.height % 2 else "keeps all of the colours"
        which = "; Chromium does" if codec == "h264" else ""
        sentences.append(f"{form.target} {why}, but many players do not play it{which}")
    if picture.interlaced_frame:
        sentences.append("the video is interlaced, and its fields are derained as one; better deinterlace it first")
    return sentences


def read_planes(picture):
    """The samples of a planar picture: for each plane an (H, W) array that shares its memory."""
    dtype = np.uint8 if picture.format.components[0].bits <= 8 else np.uint16
    return [np.frombuffer(plane, dtype).reshape(plane.height, -1)[:, : plane.width] for plane in picture.planes]


def write_planes(picture, planes):
    """Set the samples of a planar picture."""
    for plane, values in zip(picture.planes, planes):
        rows = np.zeros((plane.height, plane.line_size // values.itemsize), values.dtype)
        rows[:, : plane.width] = values
        plane.update(rows)


def resize_planes(picture, width, height):
    """A planar picture cut to a size, or continued to it by its last row and column."""
    result, planes = av.VideoFrame(width, height, picture.format.name), []
    for old, new in zip(read_planes(picture), result.planes):
        cut = old[: new.height, : new.width]
        planes.append(np.pad(cut, ((0, new.height - cut.shape[0]), (0, new.width - cut.shape[1])), "edge"))
    write_planes(result, planes)
    result.colorspace, result.color_range = picture.colorspace, picture.color_range
    return result


class Converter:
    """Between the pictures of a video and RGB arrays, by the matrix and range of its ``Form``."""

    def __init__(self, form):
        self.form, self.reformatter = form, VideoReformatter()

    def full_size(self, name):
        """(width, height) up to which a size with half chroma samples is continued, as the library misplaces those."""
        form, chroma = self.form, sampling(name)
        return -(-form.width // chroma.across) * chroma.across, -(-form.height // chroma.down) * chroma.down

    def to_rgb(self, picture):
        """(H, W, 3) array of a picture, uint16 if the form is deep, else uint8."""
        form, name = self.form, picture.format.name
        size = form.width, form.height
        if sampling(name).kind != "rgb":
            picture.colorspace, picture.color_range = form.matrix, form.source_range
        full, way = size, FROM_YUV
        if (picture.width, picture.height) != size:
            way = RESIZE
        elif name.startswith("yuv") and picture.format.is_planar:
            full = self.full_size(name)
            if full != size:
                picture = resize_planes(picture, *full)
        result = self.reformatter.reformat(
            picture, *full, "rgb48le" if form.deep else "rgb24", interpolation=way, dst_color_range=FULL
        )
        return np.ascontiguousarray(result.to_ndarray()[: form.height, : form.width])

    def from_rgb(self, rgb):
        """The inverse of ``to_rgb``, in the pixel format of the output."""
        form = self.form
        size, full = (form.width, form.height), self.full_size(form.target)
        if full != size:
            rgb = np.pad(rgb, ((0, full[1] - size[1]), (0, full[0] - size[0]), (0, 0)), "edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), "rgb48le" if form.deep else "rgb24")
        picture.colorspace, picture.color_range = form.matrix, FULL
        result = self.reformatter.reformat(
            picture, format=form.target, interpolation=TO_YUV, dst_color_range=form.range
        )
        result = result if full == size else resize_planes(result, *size)
        result.colorspace, result.color_range = form.matrix, form.range
        result.color_primaries, result.color_trc = form.primaries, form.transfer
        return result

    def change(self, picture, rainy, derained):
        """The picture of the output for one of the source, given what ``to_rgb`` made of it and the network of that.

        Where both have the same pixel format, the difference of the two is added to the samples of the source. So
        what the network leaves alone stays as it was, even colours that RGB does not have.
        """
        form, name = self.form, picture.format.name.replace("yuvj", "yuv")
        result = self.from_rgb(derained)
        same = name == form.target and form.range == form.source_range and sampling(name).kind != "rgb"
        if same and (picture.width, picture.height) == (form.width, form.height):
            planes = []
            for source, before, after in zip(*map(read_planes, (picture, self.from_rgb(rainy), result))):
                changed = source.astype(np.int32) + after - before
                planes.append(changed.clip(0, 2 ** sampling(name).bits - 1).astype(source.dtype))
            write_planes(result, planes)
        return result
