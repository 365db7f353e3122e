"""What stands behind ``target=`` in a guest's ``disk`` line: a path and options, as text.

::

    /images/disk.raw
    /images/gold.raw,backend=cow,cow-limit=1G
    /images/gold.raw,overlay=/images/web.overlay,on-error=hold
    /srv/mydisk.py,option.colour=blue,indirect-segments=32
    /images/disk.raw,filter=delay:read=5ms;write=10ms,filter=log:file=/var/log/requests

libxl hands the text to the backend as it stands, behind the format and a colon (``params`` is
``aio:…`` for ``format=raw``, ``vhd:…`` for ``format=vhd``); nothing in it is escaped, so a comma
always ends the path, and a filter's options have semicolons between them. The options are those
of ``connect``.
"""

from __future__ import annotations

from ..backends.finding import choose, is_file
from ..errors import UsageError

# What libxl makes of format=raw and format=vhd (libxl__device_disk_string_of_format)
_FORMATS = {"aio": None, "vhd": "vhd"}
_OPTIONS = (
    "backend",
    "cow-limit",
    "format",
    "grants",
    "indirect-segments",
    "latency",
    "on-error",
    "overlay",
    "persistent-grants",
    "queues",
    "queues-in",
    "sector-size",
    "size",
)
_OWN = "option."
_KNOWN = f"known are {', '.join(_OPTIONS)}, filter and {_OWN}NAME"


def arguments(params: str) -> list[str]:
    """Translate the ``params`` key that libxl wrote into arguments of ``connect``.

    A path is persistent (``raw``) unless it says otherwise: a line with ``access=rw`` has always
    meant that. With ``overlay=`` its changes are. A ``.py`` file is a disk of the user's own.

    Raises:
        UsageError: it is none of ours; the message says what to write instead.
    """
    name, _, text = params.partition(":")
    if name not in _FORMATS:
        raise UsageError(
            f"{name!r} images are not served: write format=raw or format=vhd in the disk line"
        )
    path, *items = text.split(",")
    if not path.startswith("/") and is_file(path):
        raise UsageError(f"target={path}: give an absolute path, such as target=/images/disk.raw")
    image_format = _FORMATS[name]
    given = {} if image_format is None else {"format": image_format}
    own: list[str] = []
    for item in items:
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(
                f"target=: {item!r} is no option ({_KNOWN}); "
                "a path with a comma needs a symbolic link without one"
            )
        if key.startswith(_OWN):
            own.append(f"--option={item[len(_OWN) :]}")
        elif key == "filter":
            own.append(f"--filter={_filter(value)}")
        elif key not in _OPTIONS:
            raise UsageError(f"target=: there is no option {key}=; {_KNOWN}")
        elif key in given:
            raise UsageError(f"target=: {key} is given twice")
        else:
            given[key] = value
    overlay = given.get("overlay")
    if overlay is not None and not overlay.startswith("/"):
        raise UsageError(
            f"overlay={overlay}: give an absolute path, such as overlay=/images/web.ov"
        )
    if overlay is None and choose(None, path) == "cow" and given.get("format", "raw") == "raw":
        given.setdefault("backend", "raw")
    return [f"--path={path}", *(f"--{key}={value}" for key, value in given.items()), *own]


def _filter(text: str) -> str:
    """Return a filter as ``--filter`` takes it."""
    name, colon, options = text.partition(":")
    if name.endswith(".py") and not name.startswith("/"):
        raise UsageError(f"filter={name}: give an absolute path, such as filter=/srv/mine.py")
    return name + colon + options.replace(";", ",")
