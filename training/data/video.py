"""One video file: which frames it holds, and any of them, exactly.

Frame numbers times the average rate is wrong for variable rates, edit lists and MPEG program streams, so a file is first
scanned for the time stamps of its packets (about 2 ms for a ten-second clip; nothing is decoded), and frame i is the i-th time
stamp in order. A seek is always verified: the first frame it yields is checked, and where it lies after the target the seek is
repeated further back. What a header announces is not taken for granted either: a truncated file has the frames that could be
read, and a recording that begins in the middle of a group of pictures has the frames from the first that can be decoded. A
frame that cannot be decoded further on is shown as the last one before it, as a player does.

Only regular files are opened, only by the demuxers in FORMATS, and only within the limits MAX_FRAME_PIXELS, MAX_CLIP_PIXELS
and MAX_SECONDS.

No decoder outlives the ``with`` block it is opened in, so none is ever inherited by a forked worker.
"""

import os
import stat
import time
from bisect import bisect_left, bisect_right

import av
import av.error
import numpy as np

from ..config.wording import counted
from .frame_index import LONG, FrameIndex
from .pixels import ClipWriter, FrameConverter, match_size

_MPEG = ".mp4 .m4v .mov .3gp .3g2 .mpg .mpeg .m2v .vob .ts .mts .m2ts"
EXTENSIONS = frozenset(f"{_MPEG} .mkv .webm .avi .flv .f4v .wmv .asf .ogv .ogg .mxf .gif".split())

# The demuxers that a file may be read by, whatever its name: containers and raw streams. Playlists (hls, dash, concat), image
# sequences, devices and subtitles are none of them, and no protocol but ``file`` may be opened by one.
FORMATS = (
    "mov,mp4,matroska,webm,avi,flv,asf,ogg,mpeg,mpegts,mpegvideo,mxf,gif,h264,hevc,m4v,mjpeg,dv,ivf,nut,yuv4mpegpipe,av1,obu,vc1"
)
MAX_FRAME_PIXELS = 2**27  # 134 million, four times 8K: as RGB, 0.4 GB
MAX_CLIP_PIXELS = 2**29  # of all frames asked for at once: 16 frames of 8K, 64 of 4K: as RGB, 1.6 GB
MAX_SECONDS = 60.0  # of a processor, to find out what a file holds, and again to decode a clip: not of the clock, which counts
# what else the machine does. A day of one picture in two megabytes would take hours

# Whose frames that nothing refers to are not decoded where no clip holds them: the others' bytes stay the same. Of other codecs
# they do not: AV1's come out wrong. VP9 and Theora gain nothing.
SKIPPED_BY = frozenset(["h264", "hevc", "mpeg4", "mpeg2video"])
PROGRESSIVE = (0, 1)  # FFmpeg's AVFieldOrder: unknown, or marked progressive

BACK_OFF_SECONDS = (0.0, 1.0, 4.0, 16.0)  # how far before the target a repeated seek aims; then from the start


class VideoError(RuntimeError):
    """A video that cannot give the frames asked of it. ``path`` names the file and ``reason`` says why, in one line.

    file: the path itself, where ``path`` has escapes for what cannot be printed.
    errno: of the operating system's error, where it was one and not the file's contents; else None.
    """

    def __init__(self, path, reason, errno=None):
        self.file, self.errno = os.fspath(path), errno
        self.path, self.reason = printable(path), printable(reason)
        super().__init__(f"{self.path}: {self.reason}")

    def __reduce__(self):  # crosses from a data worker to the loop
        return type(self), (self.file, self.reason, self.errno)


class _UnorderedTimestamps(Exception):
    """Decoded frames whose time stamps do not grow."""


class _Damaged(Exception):
    """Frames that do not come as the packets promise."""


class Video:
    """An open video; use as a context manager.

    ``len(video)`` is the number of frames that can be shown, ``video.times`` [len] their time stamps in seconds,
    ``video.size`` the (height, width) as stored, before rotation, and ``video.rate`` the average frames a second.

    exact: of the pixels of clips, whether they are made straight from the decoder's planes (see ``pixels``). index_name: stands
    for the file's bytes in the index, where its path does not last.

    Raises VideoError when there is nothing to decode: no such file, empty, not a video, audio only.
    """

    still = False  # as of an image, from which a clip of any length can be taken

    def __init__(self, path, *, exact=False, index_name=None):
        self.path, self._index_name = os.fspath(path), index_name
        self._container = None
        self._until = time_limit()
        self._open()
        try:
            self._read_times()
        except BaseException:
            self.close()
            raise
        self.converter = FrameConverter(self._stream.codec_context.name, exact=exact)

    def _open(self):
        self.close()
        self._tainted = False  # whether its decoder has seen damage
        options = {"protocol_whitelist": "file", "format_whitelist": FORMATS, "max_pixels": str(MAX_FRAME_PIXELS)}
        try:
            if file_size(self.path) == 0:
                raise VideoError(self.path, "the file is empty")
            # "file:" so that a name with a colon is a name and no protocol.
            self._container = av.open(f"file:{self.path}", metadata_errors="replace", options=options)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise VideoError(self.path, f"cannot be opened ({reason_of(error)})", system_errno(error, self.path)) from error
        self._stream = _best_stream(self._container)
        if self._stream is None:
            kinds = sorted({s.type for s in self._container.streams}) or ["nothing"]
            self.close()
            raise VideoError(self.path, f"no video stream (it holds {', '.join(kinds)})")
        if self._stream.codec_context is None:
            self.close()
            raise VideoError(self.path, "no decoder for its video stream")
        self._stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # for frames that grow on the way
        # Clips are decoded in many workers at once: more threads for one of them do not pay at these sizes.
        self._stream.codec_context.thread_count = 1

    def _read_times(self):
        """The frames' time stamps, from the index (see ``frame_index``) or by a scan."""
        versions = [list(av.library_versions[name]) for name in ("libavformat", "libavcodec")]
        what = versions, self._container.format.name, self._stream.codec_context.name, self._stream.index
        index = FrameIndex(self.path, *what, name=self._index_name)
        found = index.read()
        if found is None:
            packets = self._scan()
        else:
            facts, arrays = found
            self._skips, self._average_rate, self._seconds = facts["skips"], facts["rate"], facts["seconds"]
            self._stamps, self._key_stamps = arrays.get("stamps"), arrays.get("key_stamps")
            self.times = np.arange(facts["length"]) / self._average_rate
        context = self._stream.codec_context
        self.size = (context.height, context.width)
        if self.size[0] == 0 or self.size[1] == 0:
            raise VideoError(self.path, "its frames have no size")
        require_pixels(self.path, self.size)
        if self._stamps is not None:
            self.times = np.asarray(self._stamps, dtype=np.float64) * self._seconds
        elif found is None:
            self._count()
        self._length = len(self.times)
        span = self.times[-1] - self.times[0]
        self.rate = (len(self) - 1) / span if span > 0 else self._average_rate
        # A seek must lead to the same place with and without a scan: to where an mp4's own tables say. The scan of others adds
        # to what the demuxer knows of them; counted files are read from their start.
        if found is None and (self._stamps is None or (packets >= LONG and self._container.format.name.startswith("mov"))):
            arrays = {} if self._stamps is None else {"stamps": self._stamps, "key_stamps": self._key_stamps}
            facts = {"skips": self._skips, "rate": self._average_rate, "seconds": self._seconds, "length": len(self)}
            index.write(facts, **arrays)

    def _scan(self):
        """Read every packet's time stamp, without decoding. Returns their number."""
        stamps, key_stamps, packets, stamped, last, first = [], [], 0, True, None, None
        self._skips = self._may_skip()
        try:
            for packet in self._container.demux(self._stream):
                self._require_time()
                if first is None and packet.size:  # one that an edit list cuts away is decoded too
                    first = packet.pts if packet.is_keyframe else float("inf")
                if packet.size == 0 or packet.is_discard:  # the flush packet; frames that an edit list cuts away
                    continue
                packets += 1
                self._skips = self._skips and not packet.is_corrupt
                if packet.pts is None or (last is not None and packet.dts is not None and packet.dts <= last):
                    stamped = False  # none, or a clock that jumps back
                    continue
                last = packet.dts
                stamps.append(packet.pts)
                if packet.is_keyframe:
                    key_stamps.append(packet.pts)
        except av.error.FFmpegError as error:
            self._require_bytes(error)  # else a damaged tail: what came before it counts
        if packets == 0:
            raise VideoError(self.path, "its video stream has no frames")
        base = self._stream.time_base
        self._average_rate = float(self._stream.average_rate or self._stream.guessed_rate or 25)
        self._stamps, self._key_stamps, self._seconds = None, None, float(base or 0)
        if stamped and base and len(set(stamps)) == packets and not self._is_doubtful():
            self._stamps = sorted(stamps)
            self._key_stamps = sorted(key_stamps)
            if first is None or first > self._stamps[0]:
                self._drop_undecodable_start()
        return packets

    def _drop_undecodable_start(self):
        """Of a file that does not begin with a key frame (a recording that was joined), or shows frames before its first (cut at
        an open group of pictures), the frames before the first that comes out of the decoder are none: they refer to pictures
        that the file does not hold. Decodes up to that frame, at most to the file's first complete group of pictures."""
        self._open()
        try:
            shown = next(self._decode(), None)
        except _UnorderedTimestamps:
            self._stamps = None
            return
        if shown is None:
            raise VideoError(self.path, "none of its frames can be decoded")
        self._stamps = self._stamps[bisect_left(self._stamps, shown.pts) :]
        self._key_stamps = self._key_stamps[bisect_left(self._key_stamps, shown.pts) :]
        if not self._stamps:
            self._stamps = None  # stamped otherwise than its packets

    def _is_doubtful(self):
        """AVI has no presentation time stamps: those of reordered frames are guessed. A seek in an MPEG program
        stream can land inside a
        packet, and the frames after it then carry their neighbours' time stamps."""
        name = self._container.format.name
        return name == "mpeg" or (name == "avi" and self._stream.codec_context.has_b_frames)

    def _count(self):
        """Without reliable time stamps (raw streams, MPEG program streams, some AVI) frames are counted from the
        start by decoding: slow,
        and right."""
        self._stamps = None
        self._open()
        length = sum(1 for _ in self._decode())
        if length == 0:
            raise VideoError(self.path, "none of its frames can be decoded")
        self.times = np.arange(length) / self._average_rate

    def __len__(self):
        return self._length

    @property
    def codec(self):
        """FFmpeg's name of it."""
        return self._stream.codec_context.name

    @property
    def gop(self):
        """Frames from one key frame to the next, on average; None: frames are counted from the start, whatever they are."""
        return None if self._stamps is None else len(self._stamps) / max(1, len(self._key_stamps))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        if self._container is not None:
            self._container.close()
        self._container = self._stream = None

    def frames(self, indices):
        """The frames numbered ``indices`` (any order, repeats allowed), decoded in one pass over the file.

        Returns uint8 [len(indices), H, W, 3], RGB, turned as the file's display matrix says. Raises VideoError when a frame
        cannot be decoded, IndexError when there is no such frame.
        """
        indices = [int(i) for i in indices]
        if not indices:
            raise ValueError("Video.frames: expected at least one frame index, got none")
        if min(indices) < 0 or max(indices) >= len(self):
            raise IndexError(
                f"Video.frames: expected indices in [0, {len(self)}), got {min(indices)}..{max(indices)} ({self.path})"
            )
        require_pixels(self.path, self.size, len(indices))
        found = {}
        self._read(indices, found.clear, lambda index, frame: found.update({index: self.converter.rgb(frame)}))
        first = found[min(found)]
        return np.stack([match_size(found[i], first.shape[:2]) for i in indices])

    def clips(self, indices, crops, out):
        """Clips of the frames numbered ``indices``, decoded in one pass and cropped as they come: no more than one whole frame is
        held.

        indices: for each clip its frames [T]. crops: called with the frames' (height, width) as shown, gives a Crop for each
        clip, and the same ones when it is called again. out: uint8 [clips, T, h, w, 3]. Raises as ``frames``.
        """
        together = np.concatenate(indices)
        require_pixels(self.path, self.size, len(together))
        writer = ClipWriter(indices, crops, out, self.converter)
        self._read(together.tolist(), writer.restart, writer.write)

    def each_frame(self, restart, take):
        """Calls take(index, av.VideoFrame) for every frame in order; restart() before them, and where all begins anew. The limit
        on time is for each frame."""

        def take_one(index, frame):
            take(index, frame)
            self._until = time_limit()

        self._read(range(len(self)), restart, take_one)

    def _read(self, indices, restart, take):
        """Calls take(index, frame) for each of ``indices`` once, in order; restart() before them, and where all begins anew."""
        self._until = time_limit()
        wanted = sorted(set(indices))
        if self._stamps is not None:
            try:
                return self._by_stamp(wanted, restart, take)
            except _UnorderedTimestamps:
                self._count()
        restart()
        self._by_count(wanted, take)

    def _by_stamp(self, wanted, restart, take):
        """``_read`` where time stamps can be trusted. A frame's bytes are those that decoding every frame gives: where one that
        was decoded shows damage, the request begins anew with every frame. So they depend on the file and the request alone.
        """
        for skip in [True, False] if self._skips else [False]:
            if self._tainted:  # a decoder fills a damaged picture with what it has of earlier ones, from before a seek too
                self._open()
            restart()
            try:
                return self._walk(wanted, take, skip)
            except _Damaged:
                self._tainted = True

    def _walk(self, wanted, take, skip):
        needed = {int(self._stamps[index]) for index in wanted} if skip else None
        decoded, current, previous = None, None, None
        for index in wanted:
            target = int(self._stamps[index])
            key = bisect_right(self._key_stamps, target) - 1
            ahead = current is not None and (key < 0 or self._key_stamps[key] <= current.pts)
            if not ahead:  # nothing decoded yet, or a later key frame is a shorter way
                decoded, previous = self._from(target, needed), None
                current = next(decoded, None)
            while current is not None and current.pts < target:
                previous, current = current, next(decoded, None)
            if current is not None and current.pts == target:
                take(index, current)
            elif skip:
                raise _Damaged
            elif previous is not None and (current is not None or index > 0 and previous.pts >= self._stamps[index - 1]):
                # A hole, or the last frame: a player goes on showing the one before. Where several are missing at the end, the
                # file is reported as damaged instead: nothing defines how long a still picture would be shown.
                take(index, previous)
            elif current is not None:
                take(index, current)  # a key frame at the very start that is damaged
            else:
                raise VideoError(self.path, f"frame {index} of {len(self)} cannot be decoded")

    def _by_count(self, wanted, take):
        self._open()  # from the very start: without time stamps there is nothing to seek by
        last = len(self.times) - 1
        if wanted[-1] > last + 1:
            raise VideoError(self.path, f"announces {counted(len(self), 'frame')} and has {len(self.times)}")
        missing = set(wanted)
        for number, frame in enumerate(self._decode()):
            if number in missing:
                take(number, frame)
                missing.discard(number)
            if number == last and last + 1 in missing:  # the one missing last frame, as by time stamps
                take(last + 1, frame)
                missing.discard(last + 1)
            if not missing:
                return
        raise VideoError(self.path, f"frame {min(missing)} of {len(self)} cannot be decoded")

    def _from(self, target, needed=None):
        """Frames in order, beginning at or before ``target`` (a time stamp in the stream's units).

        Aims at the key frame and not at the target, so that all frames of its group are decoded from the same place: what a
        decoder makes of a damaged one depends on where it began."""
        key = bisect_right(self._key_stamps, target) - 1
        start = int(self._key_stamps[key]) if key >= 0 else target
        for seconds in BACK_OFF_SECONDS:
            aim = start - int(seconds / self._seconds)
            if aim < self._stamps[0] and seconds > 0:
                break
            try:
                self._container.seek(aim, stream=self._stream, backward=True)
            except av.error.FFmpegError:
                continue
            decoded = self._decode(needed)
            first = next(decoded, None)
            if first is not None and first.pts <= target:
                yield first
                yield from decoded
                return
        self._open()
        yield from self._decode(needed)

    def _require_time(self):
        require_time(self.path, self._until)

    def _require_bytes(self, error):
        """Raises VideoError where ``error`` is not for what the file holds, but since the disk did not give it."""
        number = system_errno(error, self.path)
        if number is not None:
            raise VideoError(self.path, f"cannot be read ({os.strerror(number)})", number) from error

    def _decode(self, needed=None):
        """The frames from here on. needed: the time stamps of those that are needed; of the others, those that nothing refers to
        are left out, and _Damaged is raised where anything is amiss. None: all, as far as they can be decoded."""
        context, packets, last = self._stream.codec_context, self._container.demux(self._stream), None
        skipping = False
        context.skip_frame = "DEFAULT"  # whatever a decoding that was broken off left
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.error.FFmpegError as error:
                self._require_bytes(error)
                if needed is not None:
                    raise _Damaged from error
                return  # a damaged tail
            self._require_time()
            if needed is not None:
                unneeded = packet.pts is not None and packet.pts not in needed and packet.size > 0 and not packet.is_keyframe
                if unneeded != skipping:
                    context.skip_frame = "NONREF" if unneeded else "DEFAULT"
                    skipping = unneeded
            try:
                frames = packet.decode()
            except av.error.FFmpegError as error:
                self._tainted = True
                if needed is not None:
                    raise _Damaged from error
                continue  # one bad packet: the decoder resumes at the next good one
            for frame in frames:
                if self._stamps is not None:
                    if frame.pts is None or (last is not None and frame.pts <= last):
                        raise _UnorderedTimestamps  # the packets' time stamps are not those of the frames
                    last = frame.pts
                self._tainted = self._tainted or frame.is_corrupt
                if needed is not None and (frame.is_corrupt or frame.interlaced_frame):
                    raise _Damaged  # a field may be a packet of its own
                yield frame

    def _may_skip(self):
        """Whether frames that nothing refers to can be told, by the file's header alone."""
        context = self._stream.codec_context
        if context.name not in SKIPPED_BY or getattr(context, "field_order", 0) not in PROGRESSIVE:
            return False
        if context.name == "mpeg2video" and self._container.format.name == "mpegts":
            return False  # damage may hide a picture within the packet before it, which shows in the order of the others alone
        return context.name != "hevc" or has_one_temporal_layer(context.extradata)


def printable(text):
    """A file's name may hold bytes that are no UTF-8, which no log or terminal takes: written as escapes."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def has_one_temporal_layer(parameters):
    """Whether an HEVC stream has no more, as its parameter sets say: bytes as in mp4 (hvcC) or as in a raw stream. In one with
    more, a frame that none of its own layer refers to may be needed by another layer's."""
    parameters = bytes(parameters or b"")
    if len(parameters) > 21 and parameters[0] == 1:
        return parameters[21] >> 3 & 7 == 1
    start = parameters.find(b"\0\0\1\x40")  # the video parameter set
    return 0 <= start < len(parameters) - 6 and parameters[start + 6] >> 1 & 7 == 0


def file_size(path):
    """Bytes of a regular file. Raises VideoError for a pipe, socket, device or folder, whose opening might block or never end;
    OSError where there is none."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(path, "not a regular file")
    return status.st_size


def require_pixels(path, size, frames=1):
    """Raises VideoError where ``frames`` frames of ``size`` (height, width) are more than is decoded at once."""
    height, width = size
    if height * width > MAX_FRAME_PIXELS:
        raise VideoError(path, f"frames of {width}x{height} are over the limit of {MAX_FRAME_PIXELS:,} pixels")
    if frames * height * width > MAX_CLIP_PIXELS:
        most = MAX_CLIP_PIXELS // (height * width)
        raise VideoError(
            path,
            f"{counted(frames, 'frame')} of {width}x{height} at once: over the limit of {MAX_CLIP_PIXELS:,} pixels "
            f"({counted(most, 'frame')})",
        )


def time_limit():
    """The processor time of this thread that reading a file may go on to."""
    return time.thread_time() + MAX_SECONDS


def require_time(path, until):
    """Raises VideoError where this thread's processor time is past ``until``."""
    if time.thread_time() > until:
        raise VideoError(path, f"takes more than {MAX_SECONDS:g} s of a processor to read")


def _best_stream(container):
    """FFmpeg's own choice among several video streams (default flag, bit rate, frames seen), for every decoder the same; never
    a cover picture; None where there is no video."""
    best = container.streams.best("video")
    if best is not None and not _is_cover_picture(best):
        return best
    return next((stream for stream in container.streams.video if not _is_cover_picture(stream)), None)


def _is_cover_picture(stream):
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def system_errno(error, path):
    """The number of the operating system's error that ``error`` is; None where it is about what the file holds. FFmpeg has the
    system's words for both ("Input/output error" for a file that was cut off), so the file is read once more to tell."""
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if isinstance(error, av.error.FFmpegError):
        try:
            with open(path, "rb", buffering=0) as file:
                while file.read(2**20):
                    pass
        except OSError as failure:
            return failure.errno
        return None
    return error.errno


def reason_of(error):
    """Why, in one line."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).partition("\n")[0]
