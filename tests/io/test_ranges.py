"""Copies of ranges, by every way that a system may have: the same bytes, in the target and for the hash."""

from __future__ import annotations

import errno
import os
import random

import pytest

from surgery.io import ranges
from surgery.io.ranges import RangeCopier, write_all

WAYS = {"copy_file_range": (), "sendfile": ("copy_file_range",), "read and write": ("copy_file_range", "sendfile")}


def without(monkeypatch, names, how):
    """A system that lacks these calls, or refuses them for these files."""

    def refuse(*_, **__):
        raise OSError(how, os.strerror(how))

    for name in names:
        if how is None:
            monkeypatch.delattr(os, name, raising=False)
        else:
            monkeypatch.setattr(os, name, refuse, raising=False)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(random.Random(0).randbytes(300_000))
    return path


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "how", [None, errno.EXDEV, errno.ENOSYS, errno.EINVAL], ids=["none", "xdev", "nosys", "inval"]
)
@pytest.mark.parametrize("size", [8 << 20, 1000], ids=["large steps", "small steps"])
def test_every_way_copies_the_same(source, tmp_path, monkeypatch, way, how, size):
    without(monkeypatch, WAYS[way], how)
    monkeypatch.setattr(ranges, "COPIED", size)
    data = source.read_bytes()
    pieces = [(5, 100_000), (200_000, 100_000), (0, 1), (7, 0), (131_072, 131_072)]
    with open(source, "rb", 0) as origin, open(tmp_path / "target", "wb", 0) as target:
        write_all(target, b"header")
        copier, read = RangeCopier(origin, target), []
        for start, count in pieces:
            read.append(b"".join(bytes(chunk) for chunk in copier.copy(start, count)))
        write_all(target, b"end")
    expected = [data[start : start + count] for start, count in pieces]
    assert read == expected
    assert (tmp_path / "target").read_bytes() == b"header" + b"".join(expected) + b"end"


@pytest.mark.parametrize("way", WAYS)
def test_short_copies_and_a_source_that_ends(source, tmp_path, monkeypatch, way):
    """A call may copy less than it was asked for, and the file may have been cut since its header was read."""
    without(monkeypatch, WAYS[way], None)
    real = {name: getattr(os, name) for name in ("copy_file_range", "sendfile") if hasattr(os, name)}
    if "copy_file_range" in real:
        short = lambda s, t, count, **offsets: real["copy_file_range"](s, t, min(count, 777), **offsets)  # noqa: E731
        monkeypatch.setattr(os, "copy_file_range", short)
    if "sendfile" in real:
        monkeypatch.setattr(os, "sendfile", lambda t, s, start, count: real["sendfile"](t, s, start, min(count, 777)))
    data = source.read_bytes()
    with open(source, "rb", 0) as origin, open(tmp_path / "target", "wb", 0) as target:
        copier = RangeCopier(origin, target)
        assert b"".join(map(bytes, copier.copy(10, 50_000))) == data[10:50_010]
        with pytest.raises(EOFError):
            list(copier.copy(len(data) - 100, 200))
    assert (tmp_path / "target").read_bytes()[:50_000] == data[10:50_010]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EFBIG])
def test_a_disk_that_fails_is_not_tried_another_way(source, tmp_path, monkeypatch, number):
    without(monkeypatch, ["copy_file_range"], number)
    monkeypatch.setattr(os, "sendfile", lambda *_: pytest.fail("a second way"), raising=False)
    if not hasattr(os, "copy_file_range"):
        pytest.skip("this system has no copy_file_range")
    with (
        open(source, "rb", 0) as origin,
        open(tmp_path / "target", "wb", 0) as target,
        pytest.raises(OSError) as fault,
    ):
        list(RangeCopier(origin, target).copy(0, 10))
    assert fault.value.errno == number
