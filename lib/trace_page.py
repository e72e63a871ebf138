"""
The page of look.py: the picture, and the text with its sentences shaded by what they gave to the
answer, block by block. One file, which needs no other and runs no script.
"""
from base64 import b64encode
from html import escape

STYLE = """
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: white;
       font: 16px/1.7 system-ui, sans-serif }
img { width: 100% }
h1 { font-size: 1.5rem; margin-bottom: 0 }
summary { cursor: pointer; font-weight: bold; margin: 1rem 0 }
.fact { border-bottom: 2px solid #999 }
.support { border-bottom: 3px solid #D55E00; font-weight: bold }
.question { font-weight: bold }
"""
LEAST_SHADE = 0.002  # of a token's share: less would not be seen


def page(view, png):
    """The View (lib/view.py) and its picture, the bytes of a PNG -> HTML"""
    parts = [
        "<!DOCTYPE html>", '<html lang="en"><head><meta charset="utf-8">',
        f"<title>{escape(view.title)}</title>", f"<style>{STYLE}</style></head><body>",
        f"<h1>{escape(view.title)}</h1>", f"<p>{escape(view.subtitle)}</p>",
        f'<img alt="what the memory did" src="data:image/png;base64,{b64encode(png).decode()}">',
        "<h2>Where the answer comes from</h2>",
        "<p>The darker a token, the more of what the last token read was written when slots looked "
        'at it. <span class="support">Supporting facts</span>, <span class="fact">'
        'other facts</span>. Point at a shaded one to see its share.</p>',
    ]
    for layer, read in view.reads.items():
        is_open = " open" if layer == view.layer else ""
        parts.append(f"<details{is_open}><summary>Block {layer + 1}: the norm of what it read is "
                     f"{read.size:.2f}, {read.identity:.0%} of it was there at the start</summary>")
        parts += ["<p>", shaded_text(view, read.tokens), "</p></details>"]
    if not view.reads:
        parts.append(f"<p>{escape(view.why)}</p>")
    return "\n".join([*parts, "</body></html>", ""])


def shaded_text(view, shares):
    """The text, its tokens as dark as their shares, its story marked."""
    opens = {mark.start: f'<span class="{mark.kind}">' for mark in view.marks}
    ends = {mark.end for mark in view.marks}
    parts, darkest = [], max([*shares, LEAST_SHADE])
    for i, word in enumerate(view.words):
        if i in ends:
            parts.append("</span>")
        share = shares[i] if i < len(shares) else 0
        parts.append(opens.get(i, "") + shaded(escape(word), share, darkest))
    if len(view.words) in ends:
        parts.append("</span>")
    return "".join(parts)


def shaded(word, share, darkest):
    """A token as dark as its share, next to that of the darkest one."""
    if share < LEAST_SHADE:
        return word
    color = "; color: white" if share > 0.6 * darkest else ""
    return (f'<span style="background: rgba(0, 114, 178, {share / darkest:.3f}){color}" '
            f'title="{share:.1%}">{word}</span>')
