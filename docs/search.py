"""Makes docs/search.png: the first hits of some queries, of a server with the demo collection (`make serve`).

python docs/search.py [http://127.0.0.1:8000]
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import httpx
from PIL import Image, ImageDraw, ImageFont

QUERIES = ("a red star", "a blue heart", "a red star inside a blue ring")
SIDE, GAP, LINE, HITS = 96, 8, 24, 7


def main(server: str) -> None:
    """Ask, and draw a row of hits under each query."""
    height = LINE + SIDE + GAP
    sheet = Image.new("RGB", (HITS * (SIDE + GAP) + GAP, len(QUERIES) * height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    with httpx.Client(base_url=server) as client:
        for row, query in enumerate(QUERIES):
            draw.text((GAP, row * height + GAP), query, "black", ImageFont.load_default(14))
            hits = client.get("/search", params={"q": query, "k": HITS}).raise_for_status().json()["hits"]
            for place, hit in enumerate(hits):
                picture = Image.open(io.BytesIO(client.get(f"{hit['url']}?size={SIDE}").raise_for_status().content))
                sheet.paste(picture.convert("RGB"), (GAP + place * (SIDE + GAP), row * height + LINE + GAP))
    sheet.save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["http://127.0.0.1:8000"])
