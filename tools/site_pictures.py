"""Pictures of the site: files of their own, and the study's figures as SVG."""

import base64
import hashlib
import re
from html import unescape
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageChops, ImageFilter, ImageStat

PAPER = 250  # grey values from which a pixel is margin
BLUR = 4  # pixels; what is left is where things are, not how letters were drawn
SAME = 4.5  # mean difference of grey values, of 255, up to which two pictures are the same
CLEAR = 1.5  # how many times farther away the next figure must be
THUMB = (24, 16)  # pixels of a thumbnail; two are about as near as their pictures, or nearer
FAR = 2 * SAME  # difference of thumbnails from which their pictures need no closer look
NATURAL = 100  # dots per inch at which a picture is shown pixel by pixel


def ink(image):
    """A picture on white, without its margins, and blurred."""
    paper = Image.new("RGBA", image.size, "white")
    paper.alpha_composite(image.convert("RGBA"))
    box = paper.convert("L").point(lambda grey: 255 if grey < PAPER else 0).getbbox()
    return paper.convert("RGB").crop(box) if box else paper.convert("RGB")


def thumbnail(image):
    """A picture in few pixels, each the mean of what it stands for."""
    return image.convert("RGB").resize(THUMB, Image.Resampling.BOX)


def mean_difference(one, other):
    """Of two pictures of one size, in grey values."""
    return sum(ImageStat.Stat(ImageChops.difference(one, other)).mean) / 3


def distance(blurred, other):
    """How far a picture is from a blurred one, in grey values; None where their shapes differ."""
    height = other.height * blurred.width / other.width
    if abs(height - blurred.height) > 0.02 * blurred.height:
        return None
    resized = other.resize(blurred.size, Image.Resampling.LANCZOS)
    return mean_difference(blurred, resized.filter(ImageFilter.GaussianBlur(BLUR)))


def headline(svg):
    """The title of a figure of matplotlib, whose texts stand in comments: what is drawn bold."""
    blocks = re.findall(r'<g id="text_\d+">\s*((?:<!--.*?-->.*?)+?)(?=<g id="|\Z)', svg, flags=re.S)
    bold = [block for block in blocks if "-Bold-" in block]
    lines = [line for block in bold for line in re.findall(r"<!--(.*?)-->", block, flags=re.S)]
    words = [line.strip() for line in lines if re.search("[A-Za-z]{3}", line)]  # not: ← −6.3
    return unescape(" ".join(words))


def smaller(svg):
    """The same drawing in fewer bytes: no comments, no metadata, coordinates to a hundredth."""
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    # not below one: the scale of letters is 0.015625
    return re.sub(r"(?<![\d.])[1-9]\d*\.\d{3,}", lambda number: f"{float(number[0]):.2f}", svg)


class Pictures:
    """Puts pictures into a folder of the site, each once."""

    def __init__(self, folder, figures):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        drawn = [path for path in sorted(Path(figures).glob("*.png"))]
        self.drawn = {
            path.with_suffix(".svg"): ink(Image.open(path))
            for path in drawn
            if path.with_suffix(".svg").exists()
        }
        self.thumbnails = {path: thumbnail(drawn) for path, drawn in self.drawn.items()}
        self.placed = {}  # what became of a picture: file, width, height, title

    def drawing_of(self, image):
        """The figure in `figures/` that a picture of a notebook shows, if it clearly is one."""
        width, height = self.size(image)
        shown = ink(image.resize((width, height), Image.Resampling.LANCZOS))
        shown = shown.filter(ImageFilter.GaussianBlur(BLUR))
        near, small = [], thumbnail(shown)
        for path, drawn in self.drawn.items():
            if mean_difference(small, self.thumbnails[path]) > FAR:
                continue
            away = distance(shown, drawn)
            if away is not None:
                near.append((away, path))
        near.sort()
        if not near or near[0][0] > SAME:
            return None
        clear = len(near) == 1 or near[1][0] >= CLEAR * near[0][0]
        return near[0][1] if clear else None

    @staticmethod
    def size(image):
        """Width and height at which a picture is shown: a sharp one has more pixels than that."""
        scale = min(1, NATURAL / image.info.get("dpi", (NATURAL,))[0])
        return round(image.width * scale), round(image.height * scale)

    def store(self, content):
        """Write a PNG, or the figure that it shows, into the folder."""
        image = Image.open(BytesIO(content))
        size = self.size(image)
        drawing = self.drawing_of(image)
        if drawing is None:
            name = hashlib.sha256(content).hexdigest()[:12] + ".png"
            (self.folder / name).write_bytes(content)
            return name, *size, ""
        svg = drawing.read_text(encoding="utf-8")
        (self.folder / drawing.name).write_text(smaller(svg), encoding="utf-8")
        wide, high = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
        return drawing.name, size[0], round(size[0] * high / wide), headline(svg)

    def place(self, image, root):
        """Point an `img` element to a file; gives the picture's title, where it is known."""
        kind, _, text = image.get("src", "").partition(";base64,")
        if kind != "data:image/png":
            return ""
        if text not in self.placed:
            self.placed[text] = self.store(base64.b64decode(text))
        name, width, height, title = self.placed[text]
        image["src"] = f"{root}{self.folder.name}/{name}"
        image["width"], image["height"] = str(width), str(height)
        return title
