"""What all pictures share: the sheet, its colours, titles and legends, and how it becomes a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerskip.errors import UserError, hint_of

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#666666"
WIDTH, DPI = 11.0, 150  # inches; twice the pixels that a README shows
MARGIN = 6  # pixels of white around what is drawn; the rest is cut off
GAP = 0.055  # between two names at the ends of lines, in heights of the panel


def canvas(height: float) -> Any:
    """Make a figure that no window system knows of. Raises: UserError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("pictures need matplotlib", 'pip install "layerskip[measure]"') from error
    figure = Figure(figsize=(WIDTH, height), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def written(figure: Any, file: Path) -> Path:
    """Crop a figure to what is drawn and save it. Raises: UserError where the file cannot be written."""
    import warnings

    try:
        with warnings.catch_warnings():  # scripts that the font lacks are drawn as boxes
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            if file.suffix.lower() != ".png":
                figure.savefig(file, bbox_inches="tight", pad_inches=MARGIN / DPI)
                return file
            import numpy as np
            from PIL import Image, ImageChops, ImageOps  # come with matplotlib

            figure.canvas.draw()
            pixels = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
            pixels = ImageOps.expand(pixels.crop(ImageChops.invert(pixels).getbbox()), MARGIN, "white")
            # 256 colours are plenty and half the bytes; dithering would roughen what is flat.
            pixels.quantize(256, dither=Image.Dither.NONE).save(file, optimize=True, dpi=(DPI, DPI))
    except (OSError, ValueError) as error:
        hint = hint_of(error, "--output names another .png, .svg or .pdf file")
        raise UserError(f"cannot write {file}: {error}", hint) from error
    return file


def dress(panel: Any, title: str, across: str, up: str, grid: str | None = "y") -> None:
    """Give a panel its title, the names of its axes, and lines to read them by."""
    panel.set_title(title, loc="left", fontsize=11)
    panel.set_xlabel(across)
    panel.set_ylabel(up)
    panel.spines[["top", "right"]].set_visible(False)
    if grid is not None:
        panel.grid(axis=grid, color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)


def say(panel: Any, x: float, y: float, text: str, colour: str, family: str = "monospace") -> None:
    """Write a text of any origin into a panel."""
    place = {"ha": "center", "va": "center", "clip_on": True, "parse_math": False}
    panel.text(x, y, text, color=colour, fontsize=7.5, family=family, **place)


def below(panel: Any, x: float, first: str, second: str, **style: Any) -> None:
    """Write two lines under the axis on fixed baselines: an underscore is lower than a letter."""
    place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "parse_math": False}
    for text, depth in ((first, -11), (second, -21)):
        panel.annotate(text, (x, 0), (0, depth), va="baseline", fontsize=8, **place, **style)


def cut(shown: str, room: int) -> str:
    """Shorten a text to so many characters."""
    return shown if len(shown) <= room else shown[: room - 1] + "…"


def signs(names: Mapping[str, str], more: str = "") -> list[Any]:
    """Explain colours; black is a line."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    signs: list[Any] = [
        Line2D([], [], color=colour, linewidth=1.8, label=name)
        if colour == "black"
        else Patch(facecolor=colour, edgecolor="black" if colour == "white" else "none", label=name)
        for colour, name in names.items()
    ]
    return [*signs, Line2D([], [], linestyle="none", label=more)] if more else signs


def legend(figure: Any, signs: Sequence[Any]) -> None:
    """Put what `signs` made below a figure."""
    figure.legend(handles=signs, loc="outside lower left", ncols=len(signs), frameon=False, fontsize=8.5)


def name_lines(panel: Any, ends: Sequence[tuple[float, str, Any]]) -> None:
    """Write names right of the panel at the height of their lines' ends, moved apart where they would touch."""
    panel.figure.canvas.draw()
    to_share = panel.transData + panel.transAxes.inverted()
    wanted = sorted((float(to_share.transform((0, y))[1]), name, colour) for y, name, colour in ends)
    heights = [height for height, _, _ in wanted]
    up, down = heights[:], heights[:]
    for i in range(1, len(heights)):
        up[i] = max(up[i], up[i - 1] + GAP)
        down[-1 - i] = min(down[-1 - i], down[-i] - GAP)
    middle = [(a + b) / 2 for a, b in zip(up, down, strict=True)]
    shift = min(0.0, 1.0 - middle[-1]) if middle else 0.0
    for at, (_, name, colour) in zip(middle, wanted, strict=True):
        place = {"transform": panel.transAxes, "va": "center", "clip_on": False}
        panel.text(1.025, at + shift, name, color=colour, fontsize=10, **place)
