"""A copy of a picture with what was recognised written under it."""

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from mbv2.errors import UserError

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

# Text stays readable when the picture is tiny (a wider canvas) or large (a font that grows with it).
_LEAST_SIDE = 160
_LEAST_WIDTH = 240
_MOST_SIDE = 4096  # a copy to look at; JPEG itself ends at 65535
_LEAST_FONT, _MOST_FONT = 14, 72
_BAND, _INK, _PALE = (24, 26, 30), (255, 255, 255), (170, 176, 186)


def annotate(image: Image.Image, predictions: Sequence[tuple[str, float]]) -> Image.Image:
    """Draw names and probabilities in a band under a copy of `image`; no pixel of it is hidden.

    A picture under 160 pixels is enlarged by a whole factor, and a narrow one stands in the middle of a canvas of
    at least 240 pixels; one over 4096 pixels is shrunk. A name too long for the width is shortened with an ellipsis.

    Args:
        image: any mode; not changed.
        predictions: (name, probability 0..1), best first; one line each.

    Returns:
        An RGB picture.
    """
    picture = image.convert("RGB")
    if max(picture.size) > _MOST_SIDE:
        shrink = _MOST_SIDE / max(picture.size)
        picture = picture.resize([max(1, round(side * shrink)) for side in picture.size])
    factor = -(-_LEAST_SIDE // max(picture.size))
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    width = max(picture.width, _LEAST_WIDTH)
    font = _font(min(max(round(width / 22), _LEAST_FONT), _MOST_FONT))
    margin = round(font.size * 0.5)
    line = round(font.size * 1.4)
    canvas = Image.new("RGB", (width, picture.height + margin * 2 + line * len(predictions)), _BAND)
    canvas.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    for number, (name, probability) in enumerate(predictions):
        y = picture.height + margin + line * number
        percent = f"{probability:.1%}"
        room = width - 3 * margin - font.getlength(percent)
        colour = _INK if number == 0 else _PALE
        draw.text((margin, y), _fit(name, font, room), fill=colour, font=font)
        draw.text((width - margin - font.getlength(percent), y), percent, fill=colour, font=font)
    return canvas


def save_fresh(image: Image.Image, folder: Path, name: str) -> Path:
    """Write `image` into `folder` under a name no file there has: `name`, else `name-1`, `name-2`, …

    PNG stays PNG, every other suffix becomes JPEG. A path in `name` becomes part of the file's name.

    Raises:
        UserError: the file system refuses.
    """
    flat = Path(name.replace("/", "_").replace("\\", "_").replace(":", "_"))
    is_png = flat.suffix.lower() == ".png"
    encoded = io.BytesIO()
    image.save(encoded, "PNG" if is_png else "JPEG", **({} if is_png else {"quality": 92}))
    suffix = ".png" if is_png else ".jpg"
    number = 0
    while True:
        path = folder / (flat.stem + (f"-{number}" if number else "") + suffix)
        try:
            # "x" claims the name: nothing that is there is overwritten, by whatever order of events.
            with path.open("xb") as file:
                file.write(encoded.getvalue())
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UserError(f"--output {path}: cannot be written ({error.strerror})") from error
        else:
            return path


@cache
def _font(size: int) -> "FreeTypeFont":
    # matplotlib brings DejaVu Sans, which knows far more alphabets than PIL's own font.
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def _fit(text: str, font: "FreeTypeFont", room: float) -> str:
    text = " ".join(text.split())
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text.rstrip() + "…"
