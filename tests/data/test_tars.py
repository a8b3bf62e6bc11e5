from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentae.data.tars import DamagedTar, Problem, Reader, group, walk
from latentae.errors import ShardError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def tar(members, form: int = tarfile.PAX_FORMAT, **rest) -> bytes:
    """`members`: (name, data) or a TarInfo."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form, **rest) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return file.getvalue()


def entry(name: str, kind: bytes, size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, "/etc/passwd"
    return info


def reader(data: bytes, **rest) -> Reader:
    return Reader(lambda start, stop: data[start:stop], len(data), **rest)


def members(data: bytes):
    return list(walk(reader(data), "x.tar"))


def samples(data: bytes):
    problems: list[Problem] = []
    return list(group(walk(reader(data), "x.tar"), problems.append)), problems


def with_checksum(header: bytes) -> bytes:
    total = sum(header[:148]) + 8 * 32 + sum(header[156:512])
    return header[:148] + b"%06o\0 " % total + header[156:]


names = st.lists(st.text("ab1._-é東 ", min_size=1, max_size=60), min_size=1, max_size=4).map("/".join)
contents = st.one_of(
    st.binary(max_size=20), st.sampled_from([b"", bytes(512), bytes(1500), b"x" * 511, b"x" * 513])
)


@given(
    st.lists(st.tuples(names, contents), max_size=8),
    st.sampled_from(["gnu", "pax"]),
    st.sampled_from([512, 700, 1 << 20]),
)
@settings(max_examples=60, deadline=None)
def test_every_member_is_where_tarfile_finds_it(files, form, chunk):
    data = tar(files, FORMATS[form])
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = [(info.name, info.offset, info.offset_data, info.size) for info in archive]
    for observe in (None, bytearray().extend):
        found = list(walk(reader(data, chunk=chunk, observe=observe), "x.tar"))
        assert [(member.name, member.start, member.offset, member.size) for member in found] == [
            (name.rstrip("/") if name.endswith("/") else name, *rest) for name, *rest in expected
        ]
        assert [data[member.offset : member.offset + member.size] for member in found] == [
            content for _, content in files
        ]


@given(st.lists(st.tuples(names, contents), max_size=5), st.integers(1, 3000))
@settings(max_examples=60, deadline=None)
def test_an_observer_sees_every_byte_once(files, chunk):
    data, seen = tar(files), bytearray()
    watched = reader(data, chunk=chunk, observe=seen.extend)
    for number, member in enumerate(walk(watched, "x.tar")):
        if number % 2:
            assert watched.take(member.size // 2) == data[member.offset : member.offset + member.size // 2]
    assert bytes(seen) == data


@pytest.mark.parametrize("form", FORMATS)
def test_long_names_and_large_owners_are_read(form):
    name = f"{'d' * 90}/{'e' * 60}/a.jpg" if form == "ustar" else f"{'d' * 200}/{'é' * 120}.jpg"
    info = tarfile.TarInfo(name)
    info.size = 3
    if form == "gnu":
        info.uid = 1 << 40
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[form]) as archive:
        archive.addfile(info, io.BytesIO(b"abc"))
    (member,) = members(file.getvalue())
    assert member.name == name
    assert file.getvalue()[member.offset : member.offset + 3] == b"abc"
    assert member.start == 0


def test_old_headers_without_a_magic_are_read():
    data = bytearray(tar([("a.jpg", b"abc"), ("b/", b"")], tarfile.USTAR_FORMAT))
    for at in (0, 1024):
        data[at + 257 : at + 512] = bytes(255)
        data[at + 156] = 0
        data[at : at + 512] = with_checksum(bytes(data[at : at + 512]))
    assert [(member.name, member.kind) for member in members(bytes(data))] == [
        ("a.jpg", "file"),
        ("b/", "folder"),
    ]


def test_sizes_beyond_eight_gigabytes_are_read():
    info = tarfile.TarInfo("a.jpg")
    info.size = 9 << 30
    header = info.tobuf(tarfile.GNU_FORMAT)
    end = bytes(1024)
    whole = len(header) + info.size + len(end)

    def fetch(start: int, stop: int) -> bytes:
        return (header if start < 512 else bytes(stop - start))[: stop - start]

    (member,) = walk(Reader(fetch, whole, chunk=512), "x.tar")
    assert member.size == 9 << 30


@pytest.mark.parametrize(
    ("pack", "says"),
    [
        (gzip.compress, "gzip"),
        (bz2.compress, "bzip2"),
        (lzma.compress, "xz"),
        (lambda data: b"PK\3\4" + data, "zip"),
    ],
)
def test_compressed_tars_are_called_by_their_name(pack, says):
    with pytest.raises(DamagedTar, match=f"compressed with {says}"):
        members(pack(tar([("a.jpg", b"abc" * 1000)])) + bytes(1024))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty file"),
        (b"<html>", "not a complete"),
        (b"<html>" * 1000, "not a complete"),
        (b"x" * 512, "not a complete"),
        (tar([("a.jpg", b"x")])[:1024], "byte 1024 .*end-of-archive"),
        (tar([("a.jpg", b"x" * 600)])[:1000], "byte 0 .*past the end"),
        (tar([("a.jpg", b"x")])[:1024] + tar([("b.jpg", b"x")])[:100], "byte 1024"),
        (tar([("a.jpg", b"x")]) + tar([("b.jpg", b"x")]), "two joined tars"),
        (tar([("a.jpg", b"x")])[:1024] + bytes(512) + tar([("b.jpg", b"x")]), "byte 1024 .*damaged header"),
        (tar([("d" * 300 + ".jpg", b"x")], tarfile.GNU_FORMAT)[:512] + bytes(1024), "byte"),
    ],
)
def test_damage_is_found_and_its_place_is_named(data, says):
    with pytest.raises(DamagedTar, match=says) as caught:
        members(data)
    assert "x.tar" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_size_neither_fills_the_memory_nor_walks_in_circles():
    good = tar([("a.jpg", b"x")], tarfile.GNU_FORMAT)
    for field in (
        b"77777777777\0",
        b"-0000000001\0",
        b"\xff" * 12,
        b"\x80" + b"\xff" * 11,
        b"0_1        \0",
        b"9" * 12,
    ):
        with pytest.raises(DamagedTar):
            members(with_checksum(good[:124] + field + good[136:512]) + good[512:])
    long = tar([("d" * 300 + ".jpg", b"x")], tarfile.GNU_FORMAT)
    with pytest.raises(DamagedTar, match="at most"):
        members(with_checksum(long[:124] + b"00010000000\0" + long[136:512]) + long[512:] + bytes(1 << 22))


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"9 path=a",
        b"x path=a\n",
        b"99 path=a.jpg\n",
        b"0 path=a\n",
        b"14 path=a.jpg\n",
        b"11 size=-1\n",
        b"10 sizes\n",
    ],
)
def test_a_damaged_pax_header_is_an_error_or_says_nothing(record):
    data = bytearray(tar([("é" * 200 + ".jpg", b"x")], tarfile.PAX_FORMAT))
    data[512:1024] = record.ljust(512, b"\0")
    try:
        (member,) = members(bytes(data))
    except DamagedTar as error:
        assert "PAX" in str(error)  # noqa: PT017
    else:
        assert record in (b"", b"14 path=a.jpg\n")
        assert member.size == 1
    assert len(members(tar([("a.jpg", b"x")], pax_headers={"comment": "made by git"}))) == 1
    with pytest.raises(DamagedTar, match="global"):  # it would rename everything
        members(tar([("a.jpg", b"x")], pax_headers={"path": "b.jpg"}))


def test_what_is_no_file_is_reported_and_never_followed():
    kinds = [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        tarfile.DIRTYPE,
        b"Z",
    ]
    data = tar([*(entry(f"{number}.jpg", kind) for number, kind in enumerate(kinds)), ("a.jpg", b"x")])
    found, problems = samples(data)
    assert [sample.key for sample in found] == ["a"]
    # Folders hold nothing.
    assert [problem.name for problem in problems] == [f"{number}.jpg" for number in (0, 1, 2, 3, 4, 6)]
    assert {problem.code for problem in problems} == {"left_out"}
    assert "symbolic link" in problems[0].reason


def test_a_sparse_file_is_left_out_whole():
    data = bytearray(tar([("s.jpg", b"x" * 600), ("a.jpg", b"y")], tarfile.GNU_FORMAT))
    data[156:157] = b"S"
    data[482] = 1  # its map continues in its own block
    data[0:512] = with_checksum(bytes(data[:512]))
    data[512:512] = bytes(512)
    found, problems = samples(bytes(data))
    assert [(sample.key, data[sample.members[0][1]]) for sample in found] == [("a", ord("y"))]
    assert [problem.name for problem in problems] == ["s.jpg"]
    pax = tarfile.TarInfo("p.jpg")
    pax.pax_headers = {"GNU.sparse.major": "1"}
    assert [problem.name for problem in samples(tar([pax, ("a.jpg", b"y")]))[1]] == ["p.jpg"]


@pytest.mark.parametrize(
    ("files", "keys", "codes"),
    [
        (["a.jpg", "a.txt", "b.jpg"], ["a", "b"], []),
        (["a.jpg", "a.jpg", "a.txt"], ["a"], ["twice"]),
        (["a.jpg", "a.JPG"], ["a"], ["twice"]),
        (["a.jpg", "b.jpg", "a.txt"], ["a", "b"], ["twice"]),
        (["a.jpg", "../a.jpg", "/etc/b.jpg", "c/../d.jpg", ".."], ["a"], ["outside"] * 4),
        (["__meta__/x.jpg", "__x__", "README", ".DS_Store", "d/._a.jpg", "a.jpg"], ["a"], ["left_out"] * 5),
        (["a\nb.jpg", "a\tb.jpg", "a\x7f.jpg", "a.__key__", "b.__url__", "c.jpg"], ["c"], ["name"] * 5),
        (["./b/a.jpg", "d.e/f.g.png", "bad\udcff.jpg"], ["./b/a", "d.e/f", "bad\udcff"], []),
    ],
)
def test_what_is_not_used_is_reported(files, keys, codes):
    found, problems = samples(tar([(name, b"x") for name in files]))
    assert [sample.key for sample in found] == keys
    assert [problem.code for problem in problems] == codes
    assert len({problem.byte for problem in problems}) == len(problems)


KEYS, EXTENSIONS = ("a", "b", "c/a", "c/b1", "d.x/a", "./e"), ("jpg", "JPG", "txt", "seg.png", "json")
ordinary = st.lists(
    st.tuples(st.sampled_from(KEYS), st.sampled_from(EXTENSIONS)), max_size=12, unique=True
).map(sorted)


@given(ordinary, st.sampled_from(list(FORMATS.values())), st.booleans())
@settings(max_examples=60, deadline=None)
def test_ordinary_tars_are_grouped_as_webdataset_groups_them(pairs, form, with_folders):
    from webdataset.tariterators import group_by_keys, tar_file_expander

    lower = {(key, extension.lower()) for key, extension in pairs}
    kept = [
        pair
        for pair in pairs
        if pair[1] == "jpg" or (pair[0], pair[1].lower()) not in lower or pair[1].islower()
    ]
    files = [(f"{key}.{extension}", f"{key}{extension}".encode()) for key, extension in kept]
    extra = [entry("c", tarfile.DIRTYPE)] if with_folders else []
    data = tar([*extra, ("__meta__", b"x"), *files], form)
    expected = list(group_by_keys(tar_file_expander([{"url": "x.tar", "stream": io.BytesIO(data)}])))
    found, _ = samples(data)
    assert [
        {
            "__key__": sample.key,
            "__url__": "x.tar",
            **{extension: data[at : at + size] for extension, at, size in sample.members},
        }
        for sample in found
    ] == expected


@given(st.binary(max_size=3000).filter(lambda data: any(data[:512])))  # blocks of zeros would be an empty tar
@settings(max_examples=100, deadline=None)
def test_noise_is_an_error(data):
    with pytest.raises(ShardError):
        members(data)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_header_with_a_good_checksum_is_walked_or_refused(data):
    """Headers that somebody wrote on purpose: every field at random, the checksum right."""
    good = tar(
        [("a.jpg", b"x" * 40), ("d" * 300 + ".jpg", b"y"), ("b.txt", b"z")],
        data.draw(st.sampled_from([1, 2])),
    )
    tampered = bytearray(good)
    at = 512 * data.draw(st.integers(0, len(good) // 512 - 1))
    for _ in range(data.draw(st.integers(1, 4))):
        place = at + data.draw(st.integers(0, 511))
        tampered[place] = data.draw(st.integers(0, 255))
    tampered[at : at + 512] = with_checksum(bytes(tampered[at : at + 512]))
    try:
        found, problems = samples(bytes(tampered))
    except DamagedTar:
        return
    assert len(found) + len(problems) <= 8
    for sample in found:
        assert all(
            at >= sample.start and at + size <= sample.end <= len(good) for _, at, size in sample.members
        )
