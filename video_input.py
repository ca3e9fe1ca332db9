"""Read videos, and numbered pictures as a video: frames with their time stamps, and what lies beside them.

    python -c "from pathlib import Path; from video_input import open_source; print(
        open_source(Path('datasets/test/RainSample/rainy/rain-%03d.png')).count)"

prints the number of frames.
"""
import heapq
import math
import os
import re
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.format import Flags as FormatFlags
from av.stream import Discard, Disposition

from images import image_size, read_image, read_metadata
from utils import InputError, counted, natural_key, printable

# What is read. FFmpeg knows more, among them playlists, which name other files, and text, which it draws.
DEMUXERS = (
    "apng,asf,av1,avi,dv,flv,gif,gxf,h264,hevc,ivf,m4v,matroska,mov,mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg,rm,vc1,wtv,"
    "yuv4mpegpipe"
)
MAX_PIXELS = 2**25  # of a frame; 8K has 33 million
DECLARE_LENGTH = ("matroska,webm", "flv", "mxf")  # file formats whose header says how long the video is
MAX_FAILURES = 100  # errors of the file format in a row after which a video is over
SEQUENCE_RATE = 25  # frames a second of numbered pictures
UNSPECIFIED = {"color_primaries": 2, "color_trc": 2, "colorspace": 2, "color_range": 0}  # numbers of H.273 and FFmpeg
NUMBER = re.compile(r"%(?:0(\d+))?d")  # as in frame_%05d.png


class Shot(NamedTuple):
    """A frame of the source: its time and duration in units of the source's time base.

    ``picture`` is the ``av.VideoFrame``, or None if it cannot be read. A ``duration`` of 0 is unknown.
    """

    time: int
    duration: int
    picture: object


class Clock:
    """Time stamps that go forward, whatever those of a file do.

    A stamp that is up to a second too early is put just behind the one before. One that jumps back by more, or
    forward by more than a day, is taken as a clock that was set anew, as where recordings were put one after the other:
    the time goes on from there, in all streams of a file by the same offset, or sound and picture would drift apart.

    Args:
        time_base: unit of the stamps and times, in seconds.
        zero: the stamp, in seconds, whose time is 0.
        resets: those of the stream that goes first; they are followed where they fit.

    Attributes:
        resets: (stamp, offset), in seconds, of each time that the clock was set anew.
    """

    def __init__(self, time_base, zero=0, resets=()):
        self.time_base, self.second = time_base, 1 / time_base
        self.limit = min(86400 * self.second, 2**31 - 1)  # longer than that, MP4 cannot show a frame
        self.last, self.offset = None, -round(zero / time_base)
        self.resets, self.to_follow = [], list(resets)

    def place(self, stamp, step, not_before=-math.inf):
        """The time for a stamp.

        Args:
            stamp: None if it is missing.
            step: how much later than the last one it should be.
            not_before: the earliest time, in seconds, if the clock was set anew here.
        """
        if self.last is None:
            stamp = -self.offset if stamp is None else stamp
            if abs(stamp + self.offset) > self.limit:
                self.offset = -stamp
            self.last = stamp + self.offset
            return self.last
        time = self.last + step if stamp is None else stamp + self.offset
        gap = time - self.last
        if gap < -self.second or gap > self.limit:
            self.set_anew(stamp, max(self.last + step, not_before * self.second))
            time = stamp + self.offset
        self.last = max(time, self.last + 1)
        return self.last

    def set_anew(self, stamp, time):
        """Let ``stamp`` be at about ``time``: exactly, or by the next offset to follow from a stamp near this one."""
        self.offset = math.ceil(time - stamp)
        seconds = stamp * self.time_base
        for number, (near, offset) in enumerate(self.to_follow):
            if abs(near - seconds) < 2:
                self.offset, self.to_follow = round(offset * self.second), self.to_follow[number + 1 :]
                break
        self.resets.append((seconds, self.offset * self.time_base))


def is_cover(stream):
    """Whether a stream is a still picture that goes with the file, such as an album's cover."""
    return bool(stream.disposition & Disposition.attached_pic)


def reason_of(error):
    """What a library says of an error, on one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return printable(text.splitlines()[0])


class VideoFile:
    """A video file that is open for reading.

    Attributes:
        stream: the stream with the pictures; ``others`` are the streams that are copied.
        time_base: unit of the time stamps, in seconds (a ``Fraction``).
        rate: mean number of frames a second (a ``Fraction``).
        count: the number of frames that the file declares or 0.
        colours: what the container says of them, by the names in ``UNSPECIFIED``.
        transparent: whether the file says that its pictures have alpha.
        losses: sentences on what is not read of the source.
        resets: of the clock of ``stream`` (``Clock``), up to the last of its ``shots``.
        zero: seconds that are subtracted from all times: the time at which the file begins where its clock may have
            any time then, as in MPEG-TS, and else 0.
        faults: sentences on what was not as it should be, once all frames have been read.

    Raises:
        InputError: not a video.
    """

    def __init__(self, path):
        self.path = Path(path)
        if self.path.is_fifo():
            raise InputError(f"--test_data_path {path}: a pipe; expected a file, as it is read more than once")
        options = {"max_pixels": str(MAX_PIXELS), "format_whitelist": DEMUXERS, "protocol_whitelist": "file"}
        try:
            self.container = av.open(f"file:{path}", metadata_errors="replace", options=options)
        except Exception as error:  # a damaged file can fail at any point
            raise InputError(
                f"--test_data_path {path}: neither an image nor a video that can be read ({reason_of(error)})"
            ) from None
        try:
            self.choose_streams()
        except BaseException:
            self.close()
            raise

    def choose_streams(self):
        container = self.container
        videos = [stream for stream in container.streams.video if not is_cover(stream)]
        readable = [stream for stream in videos if stream.codec_context and stream.time_base]
        if not readable:
            what = "its pictures are in a format that cannot be read" if videos else "it has no pictures"
            raise InputError(f"--test_data_path {self.path}: no video ({what})")
        best = container.streams.best("video")
        self.faults, self.complaints = [], []
        self.stream = stream = best if best in readable else readable[0]
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        # Now, as some decoders forget what only the container says.
        self.colours = {name: getattr(stream.codec_context, name) for name in UNSPECIFIED}
        container.flags &= ~av.container.Flags.gen_pts.value  # times of display that are guessed may go back and forth
        # In MP4, chapters and time codes are streams too. They are made again from the list and the metadata.
        self.others = [
            other for other in container.streams
            if other != stream and other.time_base and other.discard != Discard.all
            and not (other.type == "data" and "timecode" in other.metadata)
        ]
        self.transparent, self.losses, self.resets = stream.metadata.get("alpha_mode") == "1", [], []
        self.time_base = stream.time_base
        has_times = not container.format.flags & FormatFlags.no_timestamps.value
        rate = stream.average_rate if has_times else stream.codec_context.framerate
        rate = rate or stream.guessed_rate or 0
        self.rate = Fraction(rate).limit_denominator(100_000) if 0.001 <= rate <= 1000 else Fraction(25)
        self.count = stream.frames or int((container.duration or 0) * self.rate / av.time_base)
        starts = [each.start_time * each.time_base for each in (stream, *self.others) if each.start_time is not None]
        if container.format.flags & FormatFlags.ts_discont.value:
            self.zero = min(starts, default=0)
        else:
            self.zero = min(0, (stream.start_time or 0) * stream.time_base)

    metadata = property(lambda self: self.container.metadata)

    def identity(self):
        """What tells the file from another one, in the mark of the result."""
        status = self.path.stat()
        return {"bytes": status.st_size, "modified": int(status.st_mtime)}

    def packets(self, *streams):
        """Yield the packets of some streams. What the file format's reader complains of goes to ``complaints``."""
        failures, packets = 0, self.container.demux(*streams)
        while failures < MAX_FAILURES:
            # The library logs only while it is asked for a packet here: from its other threads it might wait for this.
            av.logging.set_level(av.logging.ERROR)
            av.logging.set_skip_repeated(False)  # or of two files with the same damage one would seem sound
            try:
                with av.logging.Capture() as log:
                    packet = next(packets, None)
            except (av.FFmpegError, ValueError):
                failures, packets = failures + 1, self.container.demux(*streams)
                continue
            finally:
                av.logging.set_level(None)
                self.complaints += [text.strip() for _, name, text in log if name == self.container.format.name]
            if packet is None:
                return
            if packet.size:  # an empty one would tell the decoder that the video is over
                failures = 0
                yield packet

    def shots(self):
        """Yield a ``Shot`` for each frame, in the order in which they are shown.

        After an error of the decoder, each time stamp for which it gives no picture is a frame that cannot be read.
        Without an error it is none: some formats have packets that are not to be shown. ``self.faults`` is complete
        at the end.
        """
        clock, step = Clock(self.time_base, self.zero), max(1, round(1 / self.rate / self.time_base))
        self.resets = clock.resets
        waiting, failed, seen, damaged, reached = [], False, 0, 0, 0
        end = -math.inf  # of the streams that are seen or heard, as it was since the clock was set anew
        for packet in chain(self.packets(*self.container.streams), [None]):
            if packet is not None:
                stamp = packet.dts if packet.pts is None else packet.pts
                if stamp is not None:
                    ends = (stamp + (packet.duration or 0)) * packet.time_base
                    reached = max(reached, ends)
                    if packet.stream.type in ("audio", "video"):
                        end = max(end, ends)
                if packet.stream != self.stream:
                    continue
                seen += 1
                if packet.pts is not None and not packet.is_discard:
                    heapq.heappush(waiting, packet.pts)
            try:
                pictures = self.stream.decode(packet)
            except (av.FFmpegError, ValueError):
                pictures, failed = [], True
            for picture in pictures:
                stamp = picture.dts if picture.pts is None else picture.pts
                while waiting and stamp is not None and waiting[0] <= stamp:
                    lost = heapq.heappop(waiting)
                    if failed and lost < stamp:
                        yield Shot(clock.place(lost, step), 0, None)
                failed = False
                damaged += picture.is_corrupt
                number = len(clock.resets)
                time = clock.place(stamp, step, end + clock.offset * self.time_base)
                if len(clock.resets) > number:
                    end = -math.inf
                yield Shot(time, picture.duration or 0, picture)
        for lost in sorted(waiting) if failed else []:
            yield Shot(clock.place(lost, step), 0, None)
        self.faults = self.describe_faults(seen, damaged, reached)

    def describe_faults(self, seen, damaged, reached):
        """Sentences on damaged frames and on an end that is missing.

        Args:
            seen: number of packets of the video stream; ``damaged``: number of pictures with damage.
            reached: time in seconds at which the last packet of any stream ends.
        """
        number = counted(damaged, "damaged frame")
        faults = [f"{number}, taken as mended by the decoder"] if damaged else []
        declared = Fraction(self.container.duration or 0, av.time_base)
        missing = self.stream.frames - seen
        if missing > (0 if "mp4" in self.container.format.name else self.rate):
            faults.append(f"the file ends early, without {missing} of {counted(self.stream.frames, 'frame')}")
        elif self.container.format.name in DECLARE_LENGTH and declared - reached > Fraction(1, 2):
            faults.append(f"the file ends early: after {float(reached):.1f} of {float(declared):.1f} s")
        elif self.complaints:
            faults.append(f"the file is damaged ({printable(self.complaints[0])})")
        return faults

    def chapters(self):
        return self.container.chapters()

    def close(self):
        self.container.close()


class PictureSequence:
    """Numbered pictures as a video, with the attributes of ``VideoFile`` that apply.

    Args:
        pattern: a path whose name has one %d or %0Nd, where the number stands.

    Raises:
        InputError: there are no such pictures, or they have several sizes.
    """

    def __init__(self, pattern):
        before, width, after = NUMBER.split(pattern.name)
        fits, folder = re.compile(re.escape(before) + r"(\d+)" + re.escape(after)), pattern.parent
        names = [
            path for path in (folder.iterdir() if folder.is_dir() else ())
            if (match := fits.fullmatch(path.name)) and len(match[1]) >= int(width or 1)
        ]
        if not names:
            raise InputError(f"--test_data_path {pattern}: no such file, and no pictures that are numbered so")
        self.path, self.paths = pattern, sorted(names, key=natural_key)
        self.others, self.metadata, self.faults, self.zero = [], {}, [], 0
        self.colours = UNSPECIFIED
        self.rate, self.count = Fraction(SEQUENCE_RATE), len(self.paths)
        self.time_base, self.transparent, self.losses = 1 / self.rate, False, []

    def identity(self):
        states = [path.stat() for path in self.paths]
        return {
            "files": len(states), "bytes": sum(state.st_size for state in states),
            "modified": max(int(state.st_mtime) for state in states),
        }

    def shots(self):
        size = None
        for number, path in enumerate(self.paths):
            try:
                if size and image_size(path) != size:
                    raise InputError(f"{path}: expected {size[1]}x{size[0]} as in the pictures before")
                image = read_image(path)
                if size is None:
                    self.look_at_first(path, image)
                size = image.shape[:2]
            except InputError as error:
                print(printable(error))
                yield Shot(number, 1, None)
                continue
            kind = "rgb24" if image.dtype == np.uint8 else "rgb48le"
            yield Shot(number, 1, av.VideoFrame.from_ndarray(np.ascontiguousarray(image[..., :3]), kind))

    def look_at_first(self, path, image):
        """Note what the video does not keep of the first picture that can be read, and so perhaps of all."""
        metadata = read_metadata(path)
        self.transparent = image.shape[2] == 4
        if metadata.profile or metadata.foreign:
            self.losses.append("the pictures' colour profile is left out, so the video may look different")

    def chapters(self):
        return []

    def close(self):
        pass


def is_pattern(path):
    """Whether a path stands for numbered pictures."""
    return len(NUMBER.findall(path.name)) == 1 and not path.exists()


def clip_name(path):
    """What the video that is made of ``path`` is called, without a suffix."""
    if not is_pattern(path):
        return path.stem
    return NUMBER.split(path.name)[0].rstrip("-_. ") or Path(os.path.abspath(path)).parent.name


def open_source(path):
    """A ``VideoFile`` or ``PictureSequence``, to be closed."""
    return PictureSequence(path) if is_pattern(path) else VideoFile(path)
