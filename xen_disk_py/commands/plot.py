"""``plot``: a picture of what a guest asked of its disk."""

from __future__ import annotations

import argparse
import base64
import html
import io
import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..backends.newfile import NewFile, why
from ..errors import ImageError, UsageError, XenUnavailable
from ..exit_status import ExitStatus
from ..text import printable
from ..trace.format import FLUSH, READ, WRITE
from ..trace.picture import Picture, span_of
from ..trace.reader import TraceReader
from ..units import format_size
from .environment import Environment
from .trace import duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("svg", "png", "html")
_MANY, _LARGE = (300, 160), (120, 64)  # columns, rows
_FEW = 3000  # requests
_NAMES = {READ: "read", WRITE: "write"}
_COLOURS = {READ: "#2b6cb0", WRITE: "#c05621"}
_SHADES = " ░▒▓█"


def run(args: argparse.Namespace, env: Environment) -> ExitStatus:
    """Make the picture, in a file or on the terminal; status 1 if the trace is damaged."""
    if args.force and args.output is None:
        raise UsageError("--force is for -o NEW: give that, too, or leave it out")
    form = _format(args.output)
    if form is not None and not args.force and os.path.lexists(args.output):
        raise ImageError(f"{args.output}: exists: give another name, or --force")
    with TraceReader(args.trace) as reader:
        span = span_of(reader.records())
        if span is None:
            raise ImageError(f"{printable(args.trace)}: there is no request in it: nothing to show")
        start, end, furthest, requests = span
        size = max(reader.header.size, furthest)
        if form is None:
            width = min(120, shutil.get_terminal_size().columns) - 12
            picture = Picture(size, start, end, max(20, width), 32)
        else:
            cells = _MANY if requests > _FEW else _LARGE  # a cell must be seen
            picture = Picture(size, start, end, *cells)
        for record in reader.records():
            picture.add(record)
        ending = reader.ending
        assert ending is not None
        env.tell_all(reader.notes)
        title = args.title or os.path.basename(args.trace)
    if form is None:
        env.say("\n".join(_in_text(picture, title)))
    else:
        _write(args.output, _drawn(picture, title, form), force=args.force)
    return ExitStatus.ERROR if ending.is_damaged else ExitStatus.OK


def _format(output: str | None) -> str | None:
    if output is None:
        return None
    form = os.path.splitext(output)[1][1:].lower()
    if form not in FORMATS:
        raise UsageError(f"-o {output}: the name must end in .{', .'.join(FORMATS)}")
    return form


def _write(path: str, content: bytes, *, force: bool) -> None:
    try:
        with NewFile(path) as new:
            view = memoryview(content)
            while view:
                view = view[os.write(new.fd, view) :]
            os.fchmod(new.fd, 0o644)
            os.fsync(new.fd)
            new.put(path, replacing=force)
    except FileExistsError:
        raise ImageError(f"{path}: exists: give another name, or --force") from None
    except OSError as error:
        raise ImageError(f"{path}: {why(error, path)}; nothing was changed") from error


# -- with matplotlib ---------------------------------------------------------------------------


def _drawn(picture: Picture, title: str, form: str) -> bytes:
    figure = _figure(picture, title)
    out = io.BytesIO()
    if form == "html":
        figure.savefig(out, format="png", dpi=110)
        return _page(picture, title, out.getvalue())
    figure.savefig(out, format=form, dpi=110, metadata={"Date": None} if form == "svg" else None)
    return out.getvalue()


def _page(picture: Picture, title: str, image: bytes) -> bytes:
    """One file with the picture in it."""
    shown = html.escape(printable(title))
    encoded = base64.b64encode(image).decode()
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{shown}</title>'
        "<style>body{margin:1em auto;max-width:1300px;font-family:sans-serif}img{width:100%}"
        f"</style></head><body><h1>{shown}</h1><p>{html.escape(_headline(picture))}</p>"
        f'<img alt="{shown}" src="data:image/png;base64,{encoded}"></body></html>\n'
    )
    return text.encode()


def _headline(picture: Picture) -> str:
    total, moved = picture.total, {each: sum(picture.moved[each]) for each in _NAMES}
    parts = [
        f"{picture.seconds:.3g} s",
        *(f"{total[each]:,} {_NAMES[each]}s ({format_size(moved[each])})" for each in _NAMES),
        f"{total[FLUSH]:,} flushes",
    ]
    if picture.errors:
        parts.append(f"{picture.errors:,} errors")
    return ", ".join(parts)


def _figure(picture: Picture, title: str) -> Figure:
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise XenUnavailable(
            f"a picture in a file needs matplotlib ({error}): pip install matplotlib, or "
            "leave out -o for one in the terminal"
        ) from error
    # It has read a matplotlibrc of the current directory, which may be a stranger's: that can have
    # LaTeX run on what he likes.
    mpl.rcdefaults()
    mpl.rcParams["svg.hashsalt"] = "xen-disk"  # the same picture is the same file
    mpl.rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(12, 9.5), layout="constrained")
    figure.suptitle(f"{printable(title)}\n{_headline(picture)}", fontsize=11)
    grid = figure.add_gridspec(4, 2, height_ratios=(3.2, 1.5, 1.3, 1.3), width_ratios=(5, 1))
    where = figure.add_subplot(grid[0, 0])
    latency = figure.add_subplot(grid[1, 0], sharex=where)
    iops = figure.add_subplot(grid[2, 0], sharex=where)
    rate = figure.add_subplot(grid[3, 0], sharex=where)
    sizes = figure.add_subplot(grid[0, 1])
    _draw_heat(where, picture)
    _draw_latency(latency, picture)
    _draw_rates(iops, rate, picture)
    _draw_sizes(sizes, picture)
    return figure


def _draw_heat(axes: Any, picture: Picture) -> None:
    from matplotlib.colors import LogNorm, to_rgb
    from matplotlib.patches import Patch

    unit, name = _unit(picture.size)
    most = max((max(column) for heat in picture.heat.values() for column in heat), default=1)
    norm = LogNorm(512, max(most, 1024), clip=True)
    cells = []
    for row in range(picture.rows):
        line = []
        for column in range(picture.columns):
            read, wrote = (picture.heat[each][column][row] for each in (READ, WRITE))
            line.append(_mixed(read, wrote, norm, to_rgb))
        cells.append(line)
    axes.imshow(
        cells,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(0, picture.seconds, 0, picture.size / unit),
    )
    axes.set_ylabel(f"place on the disk, {name}")
    axes.set_title("where: darker is more bytes", loc="left", fontsize=10)
    handles: list[Any] = [Patch(color=_COLOURS[each], label=_NAMES[each]) for each in _NAMES]
    handles.append(Patch(color=_mixed(most, most, norm, to_rgb), label="both"))
    axes.legend(handles=handles, loc="upper right", fontsize=8, ncols=3)


def _mixed(read: int, wrote: int, norm: Any, to_rgb: Any) -> tuple[float, float, float]:
    """The colour of a cell: white where nothing was."""
    colour = [1.0, 1.0, 1.0]
    for many, operation in ((read, READ), (wrote, WRITE)):
        if many:
            strength = 0.35 + 0.65 * float(norm(many))
            hue = to_rgb(_COLOURS[operation])
            colour = [old * (1 - strength * (1 - new)) for old, new in zip(colour, hue)]
    return colour[0], colour[1], colour[2]


def _draw_latency(axes: Any, picture: Picture) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter

    bounds, columns = picture.latency_cells()
    used = [row for column in columns for row, many in enumerate(column) if many]
    low, high = max(0, min(used) - 2), max(used) + 3
    edges = [number * picture.column_seconds for number in range(picture.columns + 1)]
    cells = [[column[row] or float("nan") for column in columns] for row in range(low, high)]
    axes.pcolormesh(
        edges, bounds[low : high + 1], cells, cmap="Greys", norm=LogNorm(0.3), rasterized=True
    )
    middle = [(left + right) / 2 for left, right in zip(edges, edges[1:])]
    for part, style in ((50, "-"), (99, ":")):
        values = [each or float("nan") for each in picture.latency(part)]
        axes.plot(middle, values, style, color="#276749", linewidth=1.1, label=f"p{part}")
    axes.set_yscale("log")
    axes.set_ylim(bounds[low], bounds[high])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
    axes.set_ylabel("latency")
    axes.set_title("latency: darker is more requests", loc="left", fontsize=10)
    axes.legend(loc="upper right", fontsize=8, ncols=2)


def _draw_rates(iops: Any, rate: Any, picture: Picture) -> None:
    edges = [number * picture.column_seconds for number in range(picture.columns + 1)]
    for axes, values, scale in ((iops, picture.requests, 1.0), (rate, picture.moved, 1e6)):
        for each, name in _NAMES.items():
            shown = [value / picture.column_seconds / scale for value in values[each]]
            axes.stairs(shown, edges, fill=True, alpha=0.55, color=_COLOURS[each], label=name)
        axes.set_xlim(0, picture.seconds)
        axes.margins(y=0.25)  # for the legend
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper right", fontsize=8, ncols=3)
    if any(picture.flushes):
        shown = [value / picture.column_seconds for value in picture.flushes]
        iops.stairs(shown, edges, color="#1a202c", linewidth=0.9, label="flush")
        iops.legend(loc="upper right", fontsize=8, ncols=3)
    iops.set_ylabel("requests/s")
    rate.set_ylabel("MB/s")
    rate.set_xlabel("seconds")


def _draw_sizes(axes: Any, picture: Picture) -> None:
    powers = sorted({power for sizes in picture.sizes.values() for power in sizes})
    for shift, each in ((-0.2, READ), (0.2, WRITE)):
        places = [number + shift for number in range(len(powers))]
        counts = [picture.sizes[each].get(power, 0) for power in powers]
        axes.barh(places, counts, height=0.38, color=_COLOURS[each], label=_NAMES[each])
    axes.set_yticks(range(len(powers)), [f"≤ {format_size(power)}" for power in powers], fontsize=8)
    axes.set_xlabel("requests")
    axes.set_title("sizes", loc="left", fontsize=10)
    axes.legend(fontsize=8)


def _unit(size: int) -> tuple[int, str]:
    for power, name in ((40, "TiB"), (30, "GiB"), (20, "MiB")):
        if size >= 2 << power:
            return 1 << power, name
    return 1 << 10, "KiB"


# -- without -------------------------------------------------------------------------------------


def _in_text(picture: Picture, title: str) -> Iterator[str]:
    yield title
    yield _headline(picture)
    for each, name in _NAMES.items():
        yield ""
        yield f"{name}s: where on the disk, over time"
        heat = picture.heat[each]
        most = max(map(max, heat))
        step = picture.rows // 16
        for row in reversed(range(0, picture.rows, step)):
            place = format_size(picture.size * row // picture.rows) if row % 4 == 0 else ""
            line = "".join(_shade(sum(column[row : row + step]), most) for column in heat)
            yield f"{place:>10} │{line}"
        yield f"{'':>10} └{'─' * picture.columns}"
    busy = [sum(both) for both in zip(*picture.requests.values())]
    moved = [sum(both) for both in zip(*picture.moved.values())]
    slow = [int(each or 0) for each in picture.latency(99)]
    second = picture.column_seconds
    yield _row("requests/s", busy, f"{max(busy) / second:,.0f}")
    yield _row("bytes/s", moved, format_size(int(max(moved) / second)))
    yield _row("p99", slow, duration(max(slow)))
    seconds = f"{picture.seconds:.3g} s"
    yield f"{'':>12}0{seconds:>{picture.columns - 1}}"


def _row(name: str, values: list[int], most: str) -> str:
    """A row of bars."""
    highest = max(values) or 1
    bars = "".join(" ▁▂▃▄▅▆▇█"[-(-value * 8 // highest)] for value in values)
    return f"{name:>10} │{bars}  max {most}"


def _shade(value: int, most: int) -> str:
    """A cell: each step is eight times as much."""
    if not value:
        return _SHADES[0]
    below = max(0, (most // value).bit_length() - 1) // 3
    return _SHADES[max(1, len(_SHADES) - 1 - below)]
