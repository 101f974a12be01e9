"""Pictures as people have them: what is the same picture gives the same pixels, and nothing turns white or black."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_pipelines import make_subject

from coneslab.diffusion import encode_images
from coneslab.errors import ArgumentError, ConeslabWarning, FileFormatError, MissingFileError
from coneslab.finetuning import concept_latents
from coneslab.methods import ablation_data, decompose, scaled_latents
from coneslab.pictures import as_pictures, open_picture, read_picture
from coneslab.show import plots
from coneslab.world import subject_from_folder

RGB = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
GREY = np.asarray(Image.fromarray(RGB).convert("L"))
ALPHA = np.random.default_rng(1).integers(0, 256, (9, 7, 1), dtype=np.uint8)


def on_white(pixels: np.ndarray) -> np.ndarray:
    """What transparent pixels look like on a white page."""
    share = ALPHA / 255
    return np.rint(pixels * share + 255 * (1 - share))


def grey(mode: str, values: np.ndarray = GREY) -> Image.Image:
    """GREY in a mode that PIL converts to RGB by clipping, or not at all."""
    return Image.frombytes(mode, values.shape[::-1], values.tobytes())


THREE = np.repeat(GREY[..., None], 3, axis=2)
SAME: dict[str, tuple[Any, np.ndarray]] = {
    "uint8": (RGB, RGB),
    "uint16": (RGB.astype(np.uint16) * 257, RGB),
    "uint16 of the other order": ((RGB.astype(np.uint16) * 257).astype(">u2"), RGB),
    "int64": (RGB.astype(np.int64), RGB),
    "floats from 0 to 1": (RGB / 255, RGB),
    "float16": ((RGB / 255).astype(np.float16), RGB),
    "floats from 0 to 255": (RGB.astype(np.float32), RGB),
    "bool": (GREY > 127, 255 * (THREE > 127)),
    "channels first": (RGB.transpose(2, 0, 1), RGB),
    "stacked": (RGB[None], RGB),
    "stacked, channels first": (RGB.transpose(2, 0, 1)[None] / 255, RGB),
    "RGBA array": (np.concatenate([RGB, ALPHA], 2), on_white(RGB)),
    "one channel": (GREY[..., None], THREE),
    "no channel": (GREY, THREE),
    "tensor": (torch.tensor(RGB).permute(2, 0, 1) / 255, RGB),
    "bfloat16 tensor": (torch.full((3, 4, 4), 0.5, dtype=torch.bfloat16), np.full((4, 4, 3), 128)),
    "tensor, channels last": (torch.tensor(RGB), RGB),
    "tensor with a gradient": ((torch.tensor(RGB) / 255).requires_grad_(), RGB),
    "RGB": (Image.fromarray(RGB), RGB),
    "L": (Image.fromarray(GREY), THREE),
    "1": (Image.fromarray(GREY).convert("1"), 255 * (np.asarray(Image.fromarray(GREY).convert("1"))[..., None])),
    "LA": (Image.fromarray(np.concatenate([GREY[..., None], ALPHA], 2)), on_white(THREE)),
    "RGBA": (Image.fromarray(np.concatenate([RGB, ALPHA], 2)), on_white(RGB)),
    "P": (Image.fromarray(GREY).convert("P"), THREE),
    "CMYK": (Image.fromarray(RGB).convert("CMYK"), RGB),
    "I": (grey("I", GREY.astype(np.int32)), THREE),
    "I of 16 bits": (grey("I", GREY.astype(np.int32) * 257), THREE),
    "I;16": (grey("I;16", GREY.astype("<u2") * 257), THREE),
    "F from 0 to 1": (grey("F", (GREY / 255).astype(np.float32)), THREE),
    "F from 0 to 255": (grey("F", GREY.astype(np.float32)), THREE),
    "list": ([RGB], RGB),
    "generator": ((one for one in [RGB]), RGB),
}


@pytest.mark.parametrize("kind", SAME)
def test_the_same_picture_gives_the_same_pixels_however_it_comes(kind):
    given, expected = SAME[kind]
    (made,) = as_pictures(given)
    assert made.mode == "RGB"
    assert np.abs(np.asarray(made).astype(int) - expected).max() <= 1


def test_a_palette_with_a_transparent_colour_lies_on_white(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "a.png", transparency=1)
    assert [read_picture(tmp_path / "a.png").getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (None, "pictures is None: give a list"),
        ([], "got no pictures: give at least one"),
        ((one for one in ()), "got no pictures"),
        (3, "pictures is 3"),
        (b"x", "give a list"),
        ({"a": RGB}, "give a list"),
        ([None], "got a NoneType among the pictures"),
        ([[RGB]], "got a list among the pictures"),
        (RGB[..., :2], r"shape \(9, 7, 2\): give"),
        (RGB[:0], "give .*channels"),
        (np.zeros((7, 9, 8)), r"shape \(7, 9, 8\)"),
        (np.array("x"), "give .*channels"),
        (RGB.astype(complex), "complex128: give numbers from 0 to 255"),
        (RGB / 0.5 - 255, "numbers from -255 to .*: give uint8"),
        (RGB.astype(float) * 10, "numbers from .*: give uint8"),
        (np.full((4, 4, 3), np.nan), "NaN"),
        (np.full((4, 4, 3), np.inf), "NaN or infinity"),
        (RGB.astype(np.uint16), "uint16 with no value above 249: if they are 8 bits deep"),
        (torch.zeros(3, 4, 4, device="meta"), "cannot be read"),
        (Image.new("RGB", (0, 3)), "0 by 3 pixels"),
    ],
)
def test_what_is_no_picture_or_could_be_two_is_refused(given, reason):
    with pytest.raises(ArgumentError, match=reason):
        as_pictures(given)


# --- files ----------------------------------------------------------------------------------------------


def test_a_files_picture_is_upright_and_16_bits_are_not_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(RGB).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(read_picture(tmp_path / "turned.png")), np.rot90(RGB, -1))
    with Image.open(tmp_path / "turned.png") as opened:  # as a user may pass it on
        assert np.array_equal(np.asarray(as_pictures(opened)[0]), np.rot90(RGB, -1))
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(as_pictures(str(tmp_path / "deep.png"))[0]), THREE)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "header"])
def test_a_damaged_file_is_named_in_one_sentence(tmp_path, damage):
    Image.fromarray(RGB).resize((64, 64)).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    data = {"cut": data[: len(data) // 2], "empty": b"", "text": b"hello", "header": data[:20] + b"\xff" * 40}[damage]
    (tmp_path / "broken.png").write_bytes(data)
    with pytest.raises(FileFormatError, match="broken.png cannot be read as a picture [^<]*: remove or replace it"):
        read_picture(tmp_path / "broken.png")


def test_a_file_that_is_not_there_is_told_and_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(MissingFileError, match="there is no file .*nowhere.png"):
        as_pictures("~/nowhere.png")
    (tmp_path / "mine").mkdir()
    Image.fromarray(RGB).save(tmp_path / "mine" / "a.png")
    for path in ("~/mine", "~/mine/a.png"):
        assert np.array_equal(np.asarray(as_pictures(path)[0]), RGB)


def test_a_picture_that_is_opened_keeps_its_transparency(tmp_path):
    Image.new("RGBA", (2, 1), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 0, 0, 0)
    assert read_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_a_folder_stands_for_its_pictures_and_what_is_left_out_is_named(tmp_path):
    for name in ("b.png", "a.JPG", "c.bmp"):
        Image.fromarray(RGB).save(tmp_path / name)
    for name in ("._a.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.png"):  # of systems, not of the user
        (tmp_path / name).write_bytes(b"no picture")
    (tmp_path / "__MACOSX").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(as_pictures(tmp_path)) == 3
        assert len(subject_from_folder(tmp_path, "cat").images) == 3
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "more").mkdir()
    for read in (as_pictures, lambda folder: subject_from_folder(folder, "cat").images):
        with pytest.warns(ConeslabWarning, match=r"IMG_1.HEIC, more: left out of") as told:
            assert len(read(tmp_path)) == 3
        assert told[0].filename == __file__
    for file in [*tmp_path.glob("*.png"), *tmp_path.glob("*.JPG"), *tmp_path.glob("*.bmp")]:
        file.unlink()
    with pytest.raises(ArgumentError, match="holds no picture that can be read, only IMG_1.HEIC, more"):
        as_pictures(tmp_path)


# --- wherever pictures are meant ------------------------------------------------------------------------

PIXELS = np.stack([np.asarray(picture) for picture in make_subject(16).images])
WAYS: dict[str, Any] = {
    "PIL": [Image.fromarray(one) for one in PIXELS],
    "floats": PIXELS / 255,
    "uint16": PIXELS.astype(np.uint16) * 257,
    "tensor": torch.tensor(PIXELS).permute(0, 3, 1, 2) / 255,
    "generator": lambda: (one for one in PIXELS),
    "files": None,
}


@pytest.fixture(params=WAYS)
def given(request, tmp_path) -> Any:
    """The same three pictures, in many ways."""
    if request.param == "files":
        for number, one in enumerate(PIXELS):
            Image.fromarray(one).save(tmp_path / f"{number}.png")
        return sorted(tmp_path.iterdir())
    way = WAYS[request.param]
    return way() if callable(way) else way


def test_all_that_takes_pictures_takes_them_in_any_way(v_pipe, judge, given):
    given = list(given) if not hasattr(given, "shape") else given  # used more than once below
    expected = encode_images(v_pipe, PIXELS)
    assert torch.equal(encode_images(v_pipe, given), expected)
    assert torch.equal(judge.image_features(given), judge.image_features(PIXELS))
    about = SimpleNamespace(**{**vars(make_subject(16)), "images": given})
    assert torch.equal(concept_latents(v_pipe, about, prior_batch_size=0)[0].latents, expected)
    assert torch.equal(concept_latents(v_pipe, make_subject(16), prior=given)[1].latents, expected)
    ours, theirs = (
        scaled_latents(v_pipe, one, batch_size=8, versions=3, small=("a",), large=("on",))
        for one in (about, make_subject(16))
    )
    assert all(torch.equal(ours[caption].latents, theirs[caption].latents) for caption in theirs)
    assert torch.equal(ablation_data(v_pipe, "a cat", "a dog", images=given).latents[0], expected)
    assert "grid of 3 pictures" in plots.picture_grid(given).get_label()


@pytest.mark.slow
def test_a_generator_of_pictures_is_read_once(v_pipe, judge):
    few = {"steps": 1, "batch_size": 2, "validation_pictures": 1, "sampler_steps": 1, "dictionary": 3, "explain": 2}
    found = decompose(v_pipe, (one for one in PIXELS), judge, template="a {}", token="<c>", progress=False, **few)
    assert found.settings["pictures"] == len(PIXELS)


def test_alone_a_path_is_one_picture(v_pipe, tmp_path: Path):
    Image.fromarray(PIXELS[0]).save(tmp_path / "a.png")
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        assert torch.equal(encode_images(v_pipe, path), encode_images(v_pipe, PIXELS[:1]))
