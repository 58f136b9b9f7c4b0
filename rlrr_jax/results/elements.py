"""Parts of a page in HTML: tables that sort, and pictures in the page itself."""

import base64
import html
import io
import re
from collections.abc import Iterable
from typing import Any

from PIL import Image

SIDE = 64  # pixels of a picture


class Raw(str):
    """Text that is HTML already."""


def table(head: Iterable, lines: Iterable[Iterable], kind: str = "") -> str:
    """A table; cells are text or `Raw`."""
    top = "".join(f"<th>{html.escape(str(x))}</th>" for x in head)
    body = "".join(f"<tr>{''.join(map(cell, line))}</tr>\n" for line in lines)
    return f'<table class="{kind}"><thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody></table>'


def cell(value: Any) -> str:
    """A cell; one that begins with a number is sorted by it."""
    if isinstance(value, Raw):
        return value if value.startswith("<td") else f"<td>{value}</td>"
    text = str(value)
    # "79.05 ± 0.87 %", "18,240", "49 s", "22.5°"
    if match := re.match(r"-?[\d,]*\.?\d+(e[+-]?\d+)?", text):
        number = float(match[0].replace(",", ""))
        return f'<td class="n" data-v="{number!r}">{html.escape(text)}</td>'
    return f"<td>{html.escape(text)}</td>"


def bar(share: float) -> Raw:
    """A bar as long as a share."""
    return Raw(f'<span class="bar" style="width:{8 * share:.2f}rem"></span>')


def shaded(number: int, share: float) -> Raw:
    """A cell with a number, the darker the larger its share."""
    style = f' style="background:rgba(0,114,178,{0.85 * share:.2f})"' if number else ""
    return Raw(f'<td class="n" data-v="{number}"{style}>{number or ""}</td>')


def picture(data: bytes, what: str, kind: str = "") -> str:
    """A PNG with its description."""
    text = base64.b64encode(data).decode()
    what = html.escape(what, quote=True)
    return f'<img class="{kind}" alt="{what}" title="{what}" src="data:image/png;base64,{text}">'


def png(image: Any) -> bytes:
    """An image uint8 [h, w, 3] as PNG, of at most `SIDE` pixels."""
    out, image = io.BytesIO(), Image.fromarray(image)
    if image.width > SIDE:
        image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def lines(text: str) -> str:
    """Lines of text."""
    return "<br>".join(html.escape(text).splitlines())
