"""Copy ranges of files inside the kernel where possible, and read the same bytes for a hash."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from io import FileIO

# Bytes per call. After each call a thread waits for Python's lock, up to 5 ms where another thread computes or
# imports. Copies are therefore few and large. Copies through Python take fewer bytes, which stay in the CPU's cache.
COPIED, THROUGH_HERE = 8 << 20, 1 << 17
NOT_SUPPORTED = {
    getattr(errno, name)
    for name in (
        "ENOSYS",
        "EXDEV",
        "EINVAL",
        "EOPNOTSUPP",
        "ENOTSOCK",
        "EBADF",
        "EPERM",
        "EACCES",
        "ENOTTY",
        "ETXTBSY",
    )
    if hasattr(errno, name)
}


_OF_THREAD = threading.local()  # a buffer that all copies of a thread use: fresh memory costs as much as the read


class RangeCopier:
    """Copies ranges of one open file into another, inside the kernel where the system can do that.

    File systems that share blocks (Btrfs, XFS) move no data. The first way that works for the two files is kept:
    `copy_file_range`, `sendfile`, or a read and a write.

    Args:
        source, target: unbuffered files (`open(..., buffering=0)`). Bytes go to the current position of `target`.
    """

    def __init__(self, source: FileIO, target: FileIO):
        self.source, self.target = source, target
        self._ways = [self._through_here]
        if hasattr(os, "sendfile"):
            self._ways.insert(0, self._sent)
        if hasattr(os, "copy_file_range"):
            self._ways.insert(0, self._in_kernel)
        if not hasattr(_OF_THREAD, "buffer"):
            _OF_THREAD.buffer = memoryview(bytearray(COPIED))
        self._buffer = _OF_THREAD.buffer

    def copy(self, start: int, size: int) -> Iterator[memoryview]:
        """Copy a range of the source and yield its bytes, in a buffer that is reused.

        Raises:
            EOFError: the source ends before the range does.
        """
        position, end = start, start + size
        while position < end:
            copied = self._copy_some(position, min(COPIED, end - position))
            if not copied:
                raise EOFError
            yield self._read(position, copied)
            position += copied

    def _copy_some(self, start: int, size: int) -> int:
        """Copy some bytes and return their number, which is 0 only at the end of the source."""
        while True:
            try:
                copied = self._ways[0](start, size)
            except OSError as error:
                if error.errno not in NOT_SUPPORTED or len(self._ways) == 1:
                    raise
            else:  # some file systems report 0 bytes before the end
                if copied or len(self._ways) == 1:
                    return copied
            del self._ways[0]

    def _in_kernel(self, start: int, size: int) -> int:
        return os.copy_file_range(self.source.fileno(), self.target.fileno(), size, offset_src=start)

    def _sent(self, start: int, size: int) -> int:
        return os.sendfile(self.target.fileno(), self.source.fileno(), start, size)

    def _through_here(self, start: int, size: int) -> int:
        data = self._read(start, min(size, THROUGH_HERE))
        write_all(self.target, data)
        return len(data)

    def _read(self, start: int, size: int) -> memoryview:
        """Exactly `size` bytes of the source."""
        self.source.seek(start)
        read = 0
        while read < size:
            count = self.source.readinto(self._buffer[read:size])
            if not count:
                raise EOFError
            read += count
        return self._buffer[:size]


def write_all(file: FileIO, data: memoryview | bytes) -> None:
    """Write all of `data`; one system call may write only a part."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
