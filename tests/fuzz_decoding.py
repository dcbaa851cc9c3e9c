"""What decodes what clients send, against bytes of any kind: `make fuzz-decoding` for half an hour with atheris, which
goes where the code branches; the suite (tests/app/test_fuzz_decoding.py) for some thousand mutations of good files.

    python tests/fuzz_decoding.py -max_total_time=1800 [folder of earlier findings]
"""

from __future__ import annotations

import io
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP")
BODIES = (
    b'{"input": ["a", {"text": "b"}, {"image": "aGk="}], "dimensions": 8}',
    b'{"query": [{"text": "a", "weight": -0.5}], "filter": [{"key": "year", "in": [1, "x"], "gte": 1.5}], "k": 3}',
    b'{"items": [{"id": "a", "text": "b", "metadata": {"n": 1, "s": "\\u00e4"}, "embedding": "AACAPw=="}]}',
    b'{"prompt": "a", "n": 2, "seed": 7, "temperature": 0.5, "top_p": 0.9, "stream": true}',
)


def samples() -> list[bytes]:
    """Good inputs, as `one` takes them: every format, large and odd, and bodies."""
    rng = np.random.default_rng(0)
    found = []
    for format in FORMATS:
        for mode in ("RGB", "L", "P", "RGBA"):
            picture = Image.fromarray(rng.integers(0, 255, (21, 34, 3), dtype=np.uint8)).convert(mode)
            out = io.BytesIO()
            try:
                picture.save(out, format)
            except OSError:  # not every format has every mode
                continue
            found.append(b"\0" + out.getvalue())
    return found + [bytes([1 + place]) + body for place, body in enumerate(BODIES)]


def one(data: bytes) -> None:
    """A picture or a body by the first byte; anything but the errors that are answered is a finding."""
    from fastapi.exceptions import RequestValidationError

    from app import images, inputs
    from app.routes.collections import ItemsRequest
    from app.routes.embed import EmbedRequest
    from app.routes.generate import GenerateRequest
    from app.routes.search import SearchRequest
    from models.errors import InputError

    bodies = (EmbedRequest, SearchRequest, ItemsRequest, GenerateRequest)
    kind, content = data[:1], data[1:]
    try:
        if kind in (b"", b"\0"):
            limits = images.Limits(max_pixels=1_000_000)
            picture = images.decode(content, limits, 16)
            assert picture.mode == "RGB"
            images.reencode(picture, 32)
            images.decode_mask(content, limits)
        else:
            inputs._from_json(bodies[(kind[0] - 1) % len(bodies)], content)
    except (InputError, RequestValidationError):
        return


def main() -> None:
    """Under atheris, from the samples on."""
    import atheris

    with atheris.instrument_imports(include=["app", "PIL"]):
        import PIL.ImageFile  # noqa: F401

        import app.images
        import app.inputs  # noqa: F401

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for place, sample in enumerate(samples()):
            (Path(folder) / str(place)).write_bytes(sample)
        atheris.Setup([*sys.argv, folder], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
