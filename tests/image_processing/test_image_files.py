"""Image files that the processors open: pipes, and why a file cannot be read."""

import io
import os
import re
import socket
import sys

import numpy as np
import pytest
from PIL import Image

from beit_fast.image_processing import BeitImageProcessor, BeitImageProcessorFast


@pytest.fixture(params=[BeitImageProcessor, BeitImageProcessorFast])
def processor(request):
    return request.param(do_resize=False, do_rescale=False, do_normalize=False, return_tensors="np")


def test_preprocess_names_the_reason_why_a_file_cannot_be_read(tmp_path, processor):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    (tmp_path / "short.png").write_bytes(b"no\n")
    double = io.BytesIO()
    Image.new("F", (4, 4)).save(double, "TIFF")
    (tmp_path / "double.tiff").write_bytes(_with_64_bits(double.getvalue()))
    (tmp_path / "head.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(30))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket.png"))  # a path of at most 107 characters
        reasons = {
            "folder.png": "it is a folder (expected an image file)",
            "empty.png": "Pillow does not recognize its format, since it is empty",
            "short.png": "Pillow does not recognize its format",
            "double.tiff": "it begins like TIFF, but Pillow cannot open it: unknown pixel mode",
            "head.png": "it begins like PNG, but Pillow cannot open it: ",
            "socket.png": "it is neither a file nor a pipe",
        }
        for name, reason in reasons.items():
            path = tmp_path / name
            with pytest.raises(OSError, match=re.escape(f"image {str(path)!r} cannot be read: {reason}")):
                processor(path)


def _with_64_bits(tiff):
    """Change the bits of a sample of a little-endian TIFF from 32 to 64, as float64 has."""
    count_at = int.from_bytes(tiff[4:8], "little")
    count = int.from_bytes(tiff[count_at : count_at + 2], "little")
    for at in range(count_at + 2, count_at + 2 + 12 * count, 12):
        if int.from_bytes(tiff[at : at + 2], "little") == 258:
            return tiff[: at + 8] + (64).to_bytes(2, "little") + tiff[at + 10 :]
    raise AssertionError("BitsPerSample is missing")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no /dev/fd")
def test_preprocess_reads_a_pipe(tmp_path, processor):
    content = io.BytesIO()
    image = Image.effect_noise((30, 20), 50).convert("RGB")
    image.save(content, "PNG")
    reading, writing = os.pipe()
    with open(writing, "wb") as pipe:
        pipe.write(content.getvalue())
    pixels = processor(f"/dev/fd/{reading}").pixel_values
    os.close(reading)
    assert np.array_equal(pixels, processor(image).pixel_values)
