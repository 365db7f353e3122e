"""What stands behind ``target=``: read as meant, or refused with what to write instead."""

from __future__ import annotations

import pytest

from xen_disk_py.errors import UsageError
from xen_disk_py.libxl.target import arguments


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/d.raw", ["--path=/d.raw", "--backend=raw"]),
        ("/with space=and%20x", ["--path=/with space=and%20x", "--backend=raw"]),
        ("/d.raw,backend=cow", ["--path=/d.raw", "--backend=cow"]),
        (
            "/d.raw,cow-limit=1G,backend=cow,indirect-segments=32",
            ["--path=/d.raw", "--cow-limit=1G", "--backend=cow", "--indirect-segments=32"],
        ),
        (
            "/d.raw,option.colour=a=b,backend=mine,size=2M,option.b=",
            ["--path=/d.raw", "--backend=mine", "--size=2M", "--option=colour=a=b", "--option=b="],
        ),
        ("/mine.py:Second,option.a=1", ["--path=/mine.py:Second", "--option=a=1"]),
        ("/d.raw,backend=/mine.py", ["--path=/d.raw", "--backend=/mine.py"]),
        ("/d.raw,backend=", ["--path=/d.raw", "--backend="]),
        ("/d.raw,overlay=/d.ov", ["--path=/d.raw", "--overlay=/d.ov"]),
        (
            "/d.raw,on-error=hold,overlay=/d.ov,cow-limit=1G",
            ["--path=/d.raw", "--on-error=hold", "--overlay=/d.ov", "--cow-limit=1G"],
        ),
        ("/d.raw,on-error=hold", ["--path=/d.raw", "--on-error=hold", "--backend=raw"]),
        ("/d.raw,format=raw", ["--path=/d.raw", "--format=raw", "--backend=raw"]),
        ("/d.vhd,format=vhd", ["--path=/d.vhd", "--format=vhd"]),
        (
            "/d.raw,filter=delay:read=5ms;write=1ms-2ms,filter=/mine.py:Second:a=b",
            [
                *("--path=/d.raw", "--backend=raw", "--filter=delay:read=5ms,write=1ms-2ms"),
                "--filter=/mine.py:Second:a=b",
            ],
        ),
        ("nbd://h/d,filter=log:file=/l", ["--path=nbd://h/d", "--filter=log:file=/l"]),
    ],
)
def test_what_is_meant(text, expected):
    assert expected == arguments(f"aio:{text}")


def test_a_vhd():
    assert ["--path=/d.vhd", "--format=vhd"] == arguments("vhd:/d.vhd")
    words = arguments("vhd:/d.vhd,option.parents=/images")
    assert ["--path=/d.vhd", "--format=vhd", "--option=parents=/images"] == words


def test_every_option_is_one_of_connect():
    from xen_disk_py.commands.arguments import build_parser

    text = "backend=cow,cow-limit=1G,grants=map,indirect-segments=3,persistent-grants=4,queues=2"
    text += ",on-error=hold,overlay=/o"
    words = arguments(f"aio:/a b,{text},sector-size=4096,size=5,option.c=d")
    args = vars(build_parser().parse_args(["connect", "7", *words]))
    assert {
        "path": "/a b",
        "backend": "cow",
        "cow_limit": 1 << 30,
        "grants": "map",
        "indirect_segments": 3,
        "persistent_grants": 4,
        "on_error": "hold",
        "overlay": "/o",
        "queues": 2,
        "sector_size": 4096,
        "size": 5,
        "option": ["c=d"],
        "read_only": False,
    }.items() <= args.items()


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ("vhd:/d.vhd,format=raw", "format is given twice"),
        ("", "write format=raw"),
        ("aio:", "give an absolute path"),
        ("aio:disk.raw", "give an absolute path"),
        ("aio:,backend=cow", "give an absolute path"),
        ("aio:/a,b.raw", "'b.raw' is no option (known are backend, cow-limit,"),
        ("aio:/a,b.raw", "a path with a comma needs a symbolic link"),
        ("aio:/a,", "'' is no option"),
        ("aio:/a,colour=blue", "there is no option colour=; known are backend,"),
        ("aio:/a,path=/b", "there is no option path="),
        ("aio:/a,read-only=1", "there is no option read-only="),
        ("aio:/a,overlay=web.overlay", "overlay=web.overlay: give an absolute path"),
        ("aio:/a,overlay=", "give an absolute path"),
        ("aio:/a,backend=cow,backend=raw", "backend is given twice"),
        ("aio:/a,filter=./mine.py:a=b", "filter=./mine.py: give an absolute path"),
    ],
)
def test_what_is_wrong(params, said):
    with pytest.raises(UsageError) as caught:
        arguments(params)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
