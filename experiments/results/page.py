"""How a page looks that stands alone: it needs no network, no script and no other file."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape

STYLE = """
:root{color-scheme:light dark;--ink:#1c1d21;--soft:#5b5e66;--page:#fff;--head:#f3f4f6;--line:#d8dade;--link:#0b5cad}
@media(prefers-color-scheme:dark){:root{--ink:#e7e8ea;--soft:#a3a7b0;--page:#16181b;--head:#212429;--line:#3a3e45;
--link:#8cb9ff}}
body{margin:0 auto;max-width:68rem;padding:1rem;background:var(--page);color:var(--ink);
font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25}h2{font-size:1.15rem;margin-top:2.2rem}
a{color:var(--link)}small,figcaption,.note{color:var(--soft)}.note,figcaption{font-size:.9rem}
.box{overflow-x:auto;border:1px solid var(--line);border-radius:6px}
.wide{width:min(100vw - 3rem,94rem);margin-left:calc(50% - min(50vw - 1.5rem,47rem))}
@media(min-width:90rem){.hint{display:none}}
table{border-collapse:collapse;width:100%;font-size:.875rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{padding:.4rem .5rem;text-align:right;white-space:nowrap;border-top:1px solid var(--line);font-weight:400}
thead th{border-top:0;background:var(--head);vertical-align:bottom;white-space:normal;font-weight:600}
th:first-child{text-align:left;position:sticky;left:0;background:var(--page);max-width:9rem;white-space:normal}
thead th:first-child{background:var(--head)}
.words :is(th,td){text-align:left;vertical-align:top}.words td{white-space:normal}
figure{margin:1.6rem 0;max-width:52rem}img{display:block;box-sizing:border-box;max-width:100%;height:auto;padding:.4rem;
background:#fff;border-radius:6px}
figcaption{margin-top:.4rem}details{margin-top:2.2rem}summary{font-size:1.15rem;font-weight:600;cursor:pointer}
"""


class Html(str):
    """Text that needs no escaping any more."""


def whole(title: str, parts: Iterable[str]) -> str:
    """The page of these parts; ``title`` is escaped already."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\';img-src data:;'
        "style-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def figure(name: str, caption: str, image: bytes) -> str:
    """A picture, PNG, in the page itself."""
    source = base64.b64encode(image).decode()
    return (
        f'<figure><img src="data:image/png;base64,{source}" alt="{name}: {escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def table(header: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "numbers", box: str = "box") -> str:
    """A table whose first column names its rows; text is escaped unless it is ``Html``."""
    cell = lambda value: value if isinstance(value, Html) else escape(value)
    head = "".join(f'<th scope="col">{cell(title)}</th>' for title in header)
    body = "\n".join(
        f'<tr><th scope="row">{cell(first)}</th>{"".join(f"<td>{cell(value)}</td>" for value in rest)}</tr>'
        for first, *rest in rows
    )
    inner = f'<table class="{kind}"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>'
    return f'<div class="{box}" tabindex="0">{inner}</div>'  # it can be scrolled from the keyboard
