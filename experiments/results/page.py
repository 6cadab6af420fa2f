"""How a page looks that stands alone: it needs no network and no other file, and is whole without its script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root{color-scheme:light dark;--ink:#1c1d21;--soft:#5b5e66;--page:#fff;--head:#f3f4f6;--line:#d8dade;--link:#0b5cad;
--fade:linear-gradient(90deg,#000 calc(100% - 1.5rem),transparent)}
@media(prefers-color-scheme:dark){:root{--ink:#e7e8ea;--soft:#a3a7b0;--page:#16181b;--head:#212429;--line:#3a3e45;
--link:#8cb9ff}}
body{margin:0 auto;max-width:68rem;padding:1rem;background:var(--page);color:var(--ink);
font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25}h2{font-size:1.15rem;margin-top:2.2rem}
a{color:var(--link)}small,figcaption,.note{color:var(--soft)}.note,figcaption{font-size:.9rem}
.found{padding-left:1.2rem}.found li{margin:.35rem 0}
pre{overflow-x:auto;padding:.7rem;background:var(--head);border-radius:6px;font-size:.85rem;white-space:pre-wrap}
.box{overflow-x:auto;border:1px solid var(--line);border-radius:6px}
.wide{width:min(100vw - 3rem,94rem);margin-left:calc(50% - min(50vw - 1.5rem,47rem))}
.wide small{display:block}.wide th:first-child{min-width:6rem}
@media(min-width:68rem){.hint{display:none}}
@media screen and (max-width:68rem){.wide{mask-image:var(--fade)}.wide :is(th,td):last-child{padding-right:1.5rem}}
@media screen and (max-width:36rem){.drawn{mask-image:var(--fade)}}
table{border-collapse:collapse;width:100%;font-size:.875rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{padding:.4rem .5rem;text-align:right;white-space:nowrap;border-top:1px solid var(--line);font-weight:400}
thead th{border-top:0;background:var(--head);vertical-align:bottom;white-space:normal;font-weight:600}
th:first-child{text-align:left;position:sticky;left:0;background:var(--page);max-width:9rem;white-space:normal}
thead th:first-child{background:var(--head)}
th button{all:unset;cursor:pointer}th button:focus-visible{outline:2px solid var(--link)}
th[aria-sort=descending] button::after{content:" ↓"}th[aria-sort=ascending] button::after{content:" ↑"}
.words :is(th,td){text-align:left;vertical-align:top}.words td{white-space:normal}
#show{position:sticky;top:0;z-index:1;background:var(--page);padding:.4rem 0;max-height:4.5rem;overflow-y:auto}
#show label{margin-right:1rem;white-space:nowrap}
figure{margin:1.6rem 0;max-width:52rem}.drawn{overflow-x:auto;background:#fff;border-radius:6px}
.drawn>*{display:block;box-sizing:border-box;width:100%;min-width:34rem;height:auto;padding:.4rem}
figcaption{margin-top:.4rem}details{margin-top:2.2rem}summary{font-size:1.15rem;font-weight:600;cursor:pointer}
@media print{@page{margin:12mm}html{font-size:9pt}body{padding:0}.box{overflow:visible;border:0}.drawn>*{min-width:0}
.wide{width:auto;margin:0}table{font-size:6.5pt}th,td{padding:.2rem .15rem;white-space:normal}#show,.hint{display:none}
th:first-child{position:static}figure,tr,li{break-inside:avoid}h2{break-after:avoid}
figure{display:inline-block;width:48%;margin:.6rem .5%;vertical-align:top}}
"""

# Columns are sorted by a click on their title, methods are shown or hidden everywhere.
SCRIPT = r"""
const unit={KiB:1024,MiB:1048576,GiB:1073741824};
const value=(row,i)=>{const text=row.cells[i].textContent.trim(),
found=i&&text.replace('\u2212','-').match(/^[<+]? ?(-?[\d.]+)\s*([KMG]iB)?/);
return found?found[1]*(unit[found[2]]||1):i?null:text};
for(const table of document.querySelectorAll('table.sorts'))[...table.tHead.rows[0].cells].forEach((cell,i)=>{
const button=document.createElement('button');button.append(...cell.childNodes);cell.append(button);
button.onclick=()=>{const down=cell.ariaSort!=='descending',body=table.tBodies[0];
for(const other of table.tHead.rows[0].cells)other.ariaSort=null;cell.ariaSort=down?'descending':'ascending';
body.append(...[...body.rows].sort((one,two)=>{const a=value(one,i),b=value(two,i);
return a===null?1:b===null?-1:(a<b?-1:a>b?1:0)*(down?-1:1)}))}});
const show=document.getElementById('show');if(show){show.hidden=false;for(const box of show.querySelectorAll('input'))
box.onchange=()=>{for(const one of document.getElementsByClassName(box.value))one.style.display=box.checked?'':'none'}}
"""


class Html(str):
    """Text that needs no escaping any more."""


def whole(title: str, parts: Iterable[str]) -> str:
    """The page of these parts; ``title`` is escaped already."""
    known = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\';img-src data:;'
        f"style-src 'unsafe-inline';script-src 'sha256-{known}'\">"
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<script>{SCRIPT}</script></body></html>\n"
    )


def figure(name: str, caption: str, image: bytes | str) -> str:
    """A picture, PNG or an element svg, in the page itself; wider than a narrow screen, where it can be scrolled."""
    if isinstance(image, bytes):
        source = base64.b64encode(image).decode()
        image = f'<img src="data:image/png;base64,{source}" alt="{name}: {escape(caption)}">'
    return f'<figure><div class="drawn" tabindex="0">{image}</div><figcaption>{escape(caption)}</figcaption></figure>'


def toggles(names: Sequence[str]) -> str:
    """A box for each of several methods, for what is of its class; without the script there is none."""
    boxes = (f'<label><input type="checkbox" checked value="m{i}"> {escape(x)}</label>' for i, x in enumerate(names))
    return f'<p id="show" hidden>{" ".join(boxes)}</p>' if len(names) > 1 else ""


def table(header: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "sorts", box: str = "box") -> str:
    """A table whose first column names its rows; text is escaped unless it is ``Html``. Of kind ``sorts`` rows are of
    methods, and can be sorted."""
    cell = lambda value: value if isinstance(value, Html) else escape(value)
    head = "".join(f'<th scope="col">{cell(title)}</th>' for title in header)
    own = lambda i: f' class="m{i}"' if "sorts" in kind.split() else ""
    body = "\n".join(
        f'<tr{own(i)}><th scope="row">{cell(first)}</th>{"".join(f"<td>{cell(value)}</td>" for value in rest)}</tr>'
        for i, (first, *rest) in enumerate(rows)
    )
    inner = f'<table class="{kind}"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>'
    return f'<div class="{box}" tabindex="0">{inner}</div>'  # it can be scrolled from the keyboard
