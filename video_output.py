"""Write a video: encode frames, and join them with the other streams of their source.

    python -c "from video_output import read_mark; print(read_mark('results/sample.jpg'))"

prints what this program has noted in a video that it made, and None for any other file.

A video is written so that it survives being stopped:

1. The packets of the frames (a packet is an encoded frame) go to a file of their own beside the output
   (``PacketFile``).
2. At the end, or when it is stopped, these packets are joined with the other streams of the source in a temporary
   file, which then replaces the output.
3. The output carries a mark in its metadata: of which source it is, with which options, and how many frames are
   done. By the mark, a result of this program is told from a file of the user, and a video that was stopped can be
   gone on with: the packets are taken over from it.
"""
import json
import math
import os
import re
import struct
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import av
from av.bitstream import BitStreamFilterContext
from av.codec.context import Flags as CodecFlags

from utils import InputError, RunError, atomic_write, printable, remove_leftovers, temporary_name
from video_form import CODECS, Converter
from video_input import DEMUXERS, Clock, VideoFile, is_cover, reason_of

os.environ.setdefault("SVT_LOG", "1")  # errors only: the AV1 encoder would print its settings

SUFFIXES = {"mp4": ".mp4", "matroska": ".mkv", "mov": ".mov"}
NOT_COPIED = re.compile(  # metadata that are about the source's file, not about its content
    "major_brand|minor_version|compatible_brands|encoder|encoding_tool|sapnet|duration|vendor_id|alpha_mode"
    "|(bps|number_of_frames|number_of_bytes|_statistics.*)(-.*)?", re.IGNORECASE,
)
MARK = "SAPNet "


def read_mark(path):
    """The mark of a video that this program has made, or None.

    It is {"task": what it was made of and how, "library": the version of PyAV, "frames": how many, "complete"}.
    """
    try:
        with av.open(f"file:{path}", metadata_errors="replace", options={"format_whitelist": DEMUXERS}) as container:
            texts = [text for text in container.metadata.values() if text.startswith(MARK)]
        mark = json.loads(texts[0].removeprefix(MARK))
        return mark if {"task", "library", "frames", "complete"} <= mark.keys() else None
    except Exception:  # no video at all, or a text of another kind
        return None


class PacketFile:
    """The packets of a video that is being made, in a file that survives the program.

    The first line is the task, as JSON. Then, for each packet in the order of decoding: the number of its frame in
    the order of showing, whether it is a key frame, its length (``HEADER``), its data.

    Args:
        path: of the file. If there is one with this task, it is gone on with, and ``index`` has its packets up to
            the last one at which the frames have no gap.
        task: what the packets are of.
    """

    HEADER = struct.Struct("<q?I")

    def __init__(self, path, task):
        self.path, self.index = path, []  # of (number of the frame, whether it is a key frame, offset, length)
        line = json.dumps([task, av.__version__]).encode() + b"\n"
        self.start = self.end = len(line)
        self.file = open(path, "r+b" if path.exists() else "w+b")
        if self.file.readline() == line:
            self.read_index()
        else:
            self.file.seek(0)
            self.file.write(line)
            self.clear()

    def read_index(self):
        size, found, highest, whole = os.fstat(self.file.fileno()).st_size, [], -1, 0
        while len(header := self.file.read(self.HEADER.size)) == self.HEADER.size:
            number, key, length = self.HEADER.unpack(header)
            offset = self.file.tell()
            if not length or offset + length > size:
                break
            found.append((number, key, offset, length))
            highest = max(highest, number)
            if highest == len(found) - 1:
                whole, self.end = len(found), offset + length
            self.file.seek(offset + length)
        self.index = found[:whole]

    def clear(self):
        """Forget all packets."""
        self.index, self.end = [], self.start
        self.file.truncate(self.start)

    def add(self, number, key, data):
        self.file.seek(self.end)
        self.file.write(self.HEADER.pack(number, key, len(data)) + data)
        self.file.flush()
        self.index.append((number, key, self.end + self.HEADER.size, len(data)))
        self.end += self.HEADER.size + len(data)

    def data(self, offset, length):
        self.file.seek(offset)
        return self.file.read(length)

    def close(self):
        with suppress(OSError):  # on a full disk, closing tries to write once more
            self.file.close()

    def remove(self):
        self.close()
        self.path.unlink(missing_ok=True)


def kept_metadata(metadata, all_of_it=True):
    """Those of a source's or stream's metadata that its result has too: if not ``all_of_it``, the language alone."""
    kept = {name: text for name, text in metadata.items() if not NOT_COPIED.fullmatch(name)}
    if not all_of_it:
        return {name: text for name, text in kept.items() if name.lower() == "language"}
    if "name" in kept:  # MP4's name of a track, which the library reads under this key and writes from the other
        kept.setdefault("title", kept["name"])
    return kept


def add_copy(container, stream, all_metadata=True):
    """Add a stream to an output container that takes the packets of ``stream`` as they are."""
    copy = container.add_stream_from_template(stream, opaque=True)
    copy.time_base = stream.time_base
    copy.metadata.update(kept_metadata(stream.metadata, all_metadata))
    copy.disposition = stream.disposition
    return copy


def takes(container_name, stream):
    """Whether a container takes a stream as it is."""
    container = av.open(BytesIO(), "w", format=container_name, metadata_errors="replace")
    try:
        copy = add_copy(container, stream)
        container.start_encoding()
        if stream.type == "audio" and stream.codec_context.name.startswith("pcm_"):
            # MP4 takes no samples of several channels without places, as from AVI, which it says only at its end.
            silence = av.Packet(bytes(48 * stream.codec_context.layout.nb_channels))
            silence.stream, silence.pts, silence.dts, silence.time_base = copy, 0, 0, stream.time_base
            container.mux(silence)
        container.close()
        return True
    except (av.FFmpegError, ValueError, LookupError):
        return False
    finally:
        with suppress(av.FFmpegError, ValueError):
            container.close()


def choose_container(codec, others, square):
    """The first container of a codec that takes most of the other streams, and the indices of those that it takes.

    PyAV lets Matroska know of the shape of the pixels only where the codec does, so it comes last for other pixels
    than ``square`` ones.
    """
    names = sorted(CODECS[codec].containers, key=lambda name: not square and name == "matroska")
    taken = {name: [stream.index for stream in others if takes(name, stream)] for name in names}
    name = max(taken, key=lambda name: len(taken[name]))
    return name, taken[name]


def describe_stream(stream):
    codec = stream.codec_context.name if stream.codec_context else getattr(stream, "name", None) or "unknown"
    return f"#{stream.index} ({stream.type}, {codec})"


class StreamCopy:
    """A stream of the source on its way into the output.

    Args:
        container: the output.
        stream: of the source.
        zero: the time in seconds that is 0 in the output.
        begin, end: the seconds of the source between which packets are taken.
        writer: the ``VideoWriter``.
    """

    def __init__(self, container, stream, zero, begin, end, writer):
        self.target = add_copy(container, stream, writer.options.metadata)
        self.cover = is_cover(stream)
        self.clock = Clock(stream.time_base, zero, writer.source.resets)
        self.begin, self.end, self.refused = begin / stream.time_base, end / stream.time_base, 0

    def fit(self, packet):
        """Give a packet of the source its time and place in the output; False if it is to be left out."""
        stamp = packet.dts if packet.pts is None else packet.pts
        if self.cover:
            packet.pts = packet.dts = 0
        elif stamp is None or not self.begin <= stamp < self.end:
            return False
        else:
            dts = stamp if packet.dts is None else packet.dts
            if packet.duration and packet.duration > self.clock.limit:  # a subtitle's without a known end
                packet.duration = 0
            packet.dts = self.clock.place(dts, packet.duration or 1)
            packet.pts = packet.dts + stamp - dts
        packet.stream = self.target
        return True


class VideoWriter:
    """Encodes frames and, at the end, joins them with the other streams of their source.

    Args:
        source: a ``VideoFile`` or ``PictureSequence``.
        form: of its pictures.
        options: ``VideoOptions``.
        output: the file to write.
        taken: name of its container, and the indices of the source's streams that it takes.
        task: goes into the mark.

    Raises:
        InputError: the encoder does not take such frames.
    """

    def __init__(self, source, form, options, output, taken, task):
        self.source, self.form, self.options, self.output, self.task = source, form, options, output, task
        self.container_name, self.taken = taken
        self.choice, self.converter = CODECS[options.codec], Converter(form)
        self.metadata = kept_metadata(source.metadata, options.metadata)
        self.first, self.last = options.frames or (1, None)
        self.times = []  # (time, duration) of each frame
        self.numbers = {}  # {time: number} of the frames that are in the encoder
        self.encoder = av.CodecContext.create(self.choice.encoder, "w")
        self.configure(self.encoder)
        try:
            self.encoder.open()
        except (av.FFmpegError, ValueError) as error:
            raise InputError(
                f"--test_data_path {source.path}: --codec {options.codec} takes no frames of {form.width}x{form.height}"
                f" in {form.target}, {float(source.rate):.6g} a second ({reason_of(error)}); expected another --codec"
            ) from None
        self.packets = PacketFile(packets_path(output), task)
        try:
            self.take_up(options.overwrite)
        except BaseException:
            self.put_down()
            raise

    def configure(self, context):
        """Set up an encoder; twice the same, so that the container knows what the packets were encoded with."""
        form, options = self.form, self.options
        context.width, context.height, context.pix_fmt = form.width, form.height, form.target
        context.time_base, context.framerate = self.source.time_base, self.source.rate
        if form.aspect:
            context.sample_aspect_ratio = form.aspect
        context.colorspace, context.color_range = form.matrix, form.range
        context.color_primaries, context.color_trc = form.primaries, form.transfer
        context.flags |= CodecFlags.global_header
        crf = self.choice.crf if options.crf is None else options.crf
        context.options = {**self.choice.settings, **({} if crf is None else {"crf": str(crf)})}

    def take_up(self, overwrite):
        """Take over the packets of an earlier run: of one that was killed, or of one that was stopped."""
        if overwrite:
            self.packets.clear()
        elif (mark := read_mark(self.output)) and mark["frames"] > len(self.packets.index):
            self.packets.clear()
            if mark["library"] == av.__version__:
                self.take_packets(mark["frames"])
            if not self.packets.index:
                print(f"{printable(self.output)}: is of another version of PyAV, or damaged, so it is started again")
        self.done = len(self.packets.index)

    def take_packets(self, frames):
        """Take over the packets of the output, or none if there are not as many as its mark says."""
        with av.open(f"file:{self.output}") as container:
            stamps = sorted(packet.pts for packet in container.demux(video=0) if packet.size)
        if len(stamps) != frames:
            return
        numbers = {stamp: number for number, stamp in enumerate(stamps)}
        with av.open(f"file:{self.output}") as container:
            stream = container.streams.video[0]
            name = stream.codec_context.name
            # MP4 and Matroska keep these codecs in another form than the encoder gives.
            bits = BitStreamFilterContext(f"{name}_mp4toannexb", stream) if name in ("h264", "hevc") else None
            for packet in container.demux(stream):
                if packet.size:
                    for part in bits.filter(packet) if bits else [packet]:
                        self.packets.add(numbers[part.pts], part.is_keyframe, bytes(part))

    def skip(self, shot):
        """Take note of a frame that an earlier run has encoded."""
        self.times.append((shot.time, shot.duration))

    def add(self, picture, shot):
        """Encode a picture at the time of ``shot``."""
        picture.pts, picture.time_base = shot.time, self.source.time_base
        self.numbers[shot.time] = len(self.times)
        self.times.append((shot.time, shot.duration))
        try:
            self.encode(picture)
        except RunError:  # the frames before are as good as they were
            del self.numbers[shot.time], self.times[-1]
            raise

    def encode(self, picture):
        """Give the encoder the next picture, or None after the last, and keep what it has ready.

        Raises:
            RunError: it failed.
        """
        try:
            self.keep(self.encoder.encode(picture))
        except av.FFmpegError as error:
            if isinstance(error, OSError):
                raise
            raise RunError(f"{self.output}: could not be encoded ({reason_of(error)})") from None

    def keep(self, packets):
        for packet in packets:
            time = min(self.numbers, key=lambda time: abs(time - packet.pts))
            self.packets.add(self.numbers.pop(time), packet.is_keyframe, bytes(packet))

    def finish(self, complete):
        """Write the output, of the frames that there are.

        Args:
            complete: whether these are all; the other streams are cut where the frames end if they are not.

        Raises:
            RunError: it cannot be written; what was there is there still.
        """
        if len(self.times) > self.done:
            self.encode(None)
        remove_leftovers(self.output.parent, self.output.name)
        with atomic_write(self.output) as temporary:
            try:
                self.join(temporary, complete)
            except (av.FFmpegError, ValueError) as error:
                if isinstance(error, OSError):
                    raise
                raise RunError(f"{self.output}: could not be written ({reason_of(error)})") from None
            self.report_lost_metadata(temporary)

    def report_lost_metadata(self, path):
        """Name the metadata that the container has no place for, such as where an MP4 file was recorded."""
        with av.open(f"file:{path}", metadata_errors="replace") as container:
            written = {name.lower() for name in container.metadata}
        lost = [name for name in self.metadata if name.lower() not in written]
        if lost:
            print(f"{printable(self.output)}: has no place for the source's {printable(', '.join(lost))}")

    def put_down(self):
        """End without writing the output. The packets stay if a later run can go on from more frames than the output's.

        Returns:
            The number of frames that they are of, or 0 if they do not stay.
        """
        mark, done = read_mark(self.output), len(self.packets.index)
        if done and (not mark or mark["task"] == self.task and mark["frames"] < done):
            self.packets.close()
            return done
        self.packets.remove()
        return 0

    def join(self, path, complete):
        """Write the output to a path."""
        source = VideoFile(self.source.path) if self.source.others else None
        # The index of an MP4 file goes to its beginning, so that a browser can play it while it is loading.
        options = {}
        if self.container_name in ("mp4", "mov"):
            flags = "+faststart" + "+use_metadata_tags" * (self.container_name == "mov")
            options = {"movflags": flags, "movie_timescale": str(self.movie_timescale())}
        container = av.open(
            f"file:{path}", "w", format=self.container_name, metadata_errors="replace", container_options=options
        )
        try:
            stream = self.add_video(container)
            zero, begin, end = self.span(complete)
            copies = {}
            for other in source.others if source else []:
                if other.index in self.taken:
                    copies[other.index] = StreamCopy(container, other, zero, begin, end, self)
            container.metadata.update(self.metadata)
            container.metadata.update(self.mark(complete))
            container.set_chapters(kept_chapters(self.source.chapters(), zero, end - zero))
            self.mux(container, stream, source, copies)
            container.close()
        finally:
            if source:
                source.close()
            with suppress(Exception):  # closing it a second time does nothing
                container.close()

    def movie_timescale(self):
        """Units a second in which MP4 says by how much a stream starts late; its usual 1000 are too coarse."""
        units = [self.source.time_base.denominator]
        units += [stream.time_base.denominator for stream in self.source.others if stream.index in self.taken]
        exact = math.lcm(*units)
        exact = exact if exact < 2**31 else units[0]
        return exact * -(-1000 // exact)

    def add_video(self, container):
        """Add the stream of the derained frames to the output container."""
        stream = container.add_stream(self.choice.encoder, rate=self.source.rate)
        self.configure(stream.codec_context)
        stream.time_base = self.source.time_base
        if self.options.codec == "hevc" and self.container_name == "mp4":
            stream.codec_context.codec_tag = "hvc1"  # players by Apple know no other
        if self.form.turn:
            stream.set_display_matrix(self.form.turn)
        if isinstance(self.source, VideoFile):
            stream.metadata.update(kept_metadata(self.source.stream.metadata, self.options.metadata))
            stream.disposition = self.source.stream.disposition
        return stream

    def span(self, complete):
        """(zero, begin, end), in seconds: the time of the source that is 0 in the output, and those that are kept."""
        base, zero = self.source.time_base, self.source.zero
        begin, end = -float("inf"), float("inf")
        if self.first > 1:
            zero = begin = zero + self.times[0][0] * base
        if self.options.frames or not complete:
            end = self.source.zero + (self.times[-1][0] + self.last_duration()) * base
        return zero, begin, end

    def last_duration(self):
        """The duration of the last frame; that of the others is known from the frame that follows."""
        usual = max(1, round(1 / self.source.rate / self.source.time_base))
        return self.times[-1][1] or usual

    def mark(self, complete):
        state = {"library": av.__version__, "frames": len(self.times), "complete": complete}
        mark = MARK + json.dumps({"task": self.task, **state})
        # MP4 has places for a few kinds of metadata only; this one is for the program that made the file.
        return {"encoding_tool" if self.container_name == "mp4" else "sapnet": mark}

    def ordered_packets(self, stream):
        """Yield the packets of the frames in the order of decoding, with the times of the output.

        The decoder needs a frame a number of frames before it is shown if others refer to it. So each packet is to
        be decoded at the time at which the frame that many places before is shown.
        """
        first = self.times[0][0] if self.first > 1 else 0
        shown = [time - first for time, _ in self.times]
        ahead = max(place - number for place, (number, *_) in enumerate(self.packets.index))
        step = shown[1] - shown[0] if len(shown) > 1 else 1
        ends = [*shown[1:], shown[-1] + self.last_duration()]
        for place, (number, key, offset, length) in enumerate(self.packets.index):
            packet = av.Packet(self.packets.data(offset, length))
            packet.stream, packet.time_base, packet.is_keyframe = stream, self.source.time_base, key
            packet.pts, packet.duration = shown[number], ends[number] - shown[number]
            packet.dts = shown[place - ahead] if place >= ahead else shown[0] - (ahead - place) * step
            if place == len(shown) - 1 and self.container_name in ("mp4", "mov"):
                packet.duration = self.last_duration()  # these have no other place for how long the last frame is shown
            yield packet

    def mux(self, container, stream, source, copies):
        """Write all packets, those of all streams by time."""
        frames = self.ordered_packets(stream)
        frame = next(frames)
        for packet in source.packets(*(source.container.streams[index] for index in copies)) if copies else []:
            copy = copies[packet.stream.index]
            if not copy.fit(packet):
                continue
            while frame and frame.dts * frame.time_base <= packet.dts * packet.time_base:
                container.mux(frame)
                frame = next(frames, None)
            try:
                container.mux(packet)
            except (av.FFmpegError, ValueError) as error:
                if isinstance(error, OSError):
                    raise
                copy.refused += 1
        while frame:
            container.mux(frame)
            frame = next(frames, None)
        for index, copy in copies.items():
            if copy.refused:
                print(f"{describe_stream(source.container.streams[index])}: {copy.refused} packets are left out")


def kept_chapters(chapters, zero, length):
    """The chapters between ``zero``, in seconds, and ``length`` seconds later, at their times in the output."""
    kept = []
    for chapter in chapters:
        unit = chapter["time_base"]
        if unit:
            start, end = max(0, chapter["start"] * unit - zero), min(length, chapter["end"] * unit - zero)
            if start < end or start == end and chapter["start"] == chapter["end"]:  # some mark a moment
                kept.append({**chapter, "start": round(start / unit), "end": round(end / unit)})
    return kept


def beside(output):
    """The path, without its suffix, of files that belong to the making of ``output``."""
    return output.with_name(temporary_name(output.name, "")[: -len("-.tmp")])


def packets_path(output):
    """Where the packets of an unfinished ``output`` are."""
    return Path(f"{beside(output)}.packets")


def unfinished_task(output):
    """The task of the packets that a killed run has left of ``output``, or None."""
    try:
        with open(packets_path(output), "rb") as file:
            task, library = json.loads(file.readline())
        return task if library == av.__version__ else None
    except (OSError, ValueError, TypeError):
        return None
