"""From any picture file to RGB. Everything read here is untrusted input."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


class PictureError(ValueError):
    """A picture that cannot be used; the message is one line that names the file and the reason."""


def read_picture(path: Path, at_least: int | None = None) -> Image.Image:
    """The whole picture, upright, as 8-bit RGB.

    Any mode that Pillow reads: transparency is laid on white, 16-bit and float greys are brought to 8 bits, animations
    give their first frame, EXIF rotation is applied. ``at_least``: a JPEG with both sides longer than this many pixels
    may come scaled down, though not below it. Raises ``PictureError`` for everything that is no usable picture.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise PictureError(f"{path}: no such file")
        if not path.is_file():
            raise PictureError(f"{path}: not a file")
        path.open("rb").close()
    except OSError as error:  # too long a name, a file or a folder of others
        raise PictureError(f"{path}: may not be read ({error.strerror or error})") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on size and metadata; what matters raises
            with Image.open(path) as image:
                if at_least is not None:
                    image.draft("RGB", (at_least, at_least))  # a JPEG of 100 megapixels need not be decoded in full
                image.load()
                return _rgb(_upright(image))
    except UnidentifiedImageError:
        raise PictureError(f"{path}: not a picture, or of a format that Pillow does not read") from None
    except Image.DecompressionBombError:
        raise PictureError(f"{path}: more than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} megapixels; scale it down") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError) as error:  # what Pillow's decoders raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise PictureError(f"{path}: cannot be read as a picture ({' '.join(reason.split())})") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken metadata is no reason to refuse the pixels, and Pillow raises half a dozen types here
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _to_8_bits(image).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit greys keep their scale; 32-bit integers and floats have none of their own and are stretched to their range."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = (0.0, 65535.0) if image.mode.startswith("I;16") else (values.min(), values.max())
    if image.mode == "I" and low >= 0 and 255 < high <= 65535:  # how some formats deliver 16-bit greys
        low, high = 0.0, 65535.0
    return Image.fromarray(np.round((values - low) / max(high - low, 1e-12) * 255).clip(0, 255).astype(np.uint8))
