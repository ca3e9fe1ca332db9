"""Labelled pictures that compare rainy, derained and clean images.

    python test.py --comparison --test_data_path datasets/test/RainSample --output_path results/RainSample

writes a panel for each image to results/RainSample/comparison, and all images to results/RainSample/contact_sheet.jpg.
"""
import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE = 640  # px, the longer side of a panel's images; larger ones are shrunk
THUMBNAIL = 160  # px, the longer side of the images on the contact sheet
COLUMNS = 4  # entries in a row of the contact sheet
MAX_THUMBNAILS = 200  # entries on the contact sheet; of more images, evenly spaced ones are taken
GAP = 6  # px
ERROR_SCALE = 5  # an error of 51 grey levels has the brightest colour
LABEL_OPACITY = 0.6  # of the colours over a segmented image
SMALLEST_NAMED = 0.02  # part of the pixels from which on a class is named there


def shrink(image, side):
    """An (H, W, 3) uint8 image, shrunk until its longer side is ``side`` px or less."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def error_map(derained, clean):
    """The absolute error, averaged over the channels and multiplied by ``ERROR_SCALE``, in colours.

    Args:
        derained, clean: (H, W, 3) uint8.

    Returns:
        (H, W, 3) uint8.
    """
    error = cv2.absdiff(derained, clean).mean(2) * ERROR_SCALE
    colours = cv2.applyColorMap(np.minimum(error, 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    return cv2.cvtColor(colours, cv2.COLOR_BGR2RGB)


def fit(text, font, width):
    """The text, cut in the middle where it is wider than ``width`` px."""
    cut = text
    keep = len(text)
    while font.getlength(cut) > width and keep > 2:
        keep -= 1
        cut = f"{text[: keep // 2]}...{text[len(text) - (keep + 1) // 2 :]}"
    return cut


def tile_row(images, labels, caption=None):
    """Images of one size side by side, each under its label, with a caption below: (H, W, 3) uint8."""
    height, width = images[0].shape[:2]
    font = ImageFont.load_default(max(10, min(18, width // 12)))
    line = font.size + GAP
    column = max(width, 60)  # narrow images leave room for their label
    sheet = Image.new(
        "RGB", (len(images) * (column + GAP) - GAP, line + height + (line if caption else 0)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for k, (image, label) in enumerate(zip(images, labels)):
        left = k * (column + GAP)
        draw.text((left + column // 2, line // 2), fit(label, font, column), "black", font, anchor="mm")
        sheet.paste(Image.fromarray(image), (left + (column - width) // 2, line))
    if caption:
        caption = fit(caption, font, sheet.width)
        draw.text((sheet.width // 2, line + height + line // 2), caption, "black", font, anchor="mm")
    return np.asarray(sheet)


def panel(name, rainy, derained, clean=None, scores=None):
    """An image before and after deraining, and beside them the clean image and the error where they are known.

    Args:
        name: of the image, for the caption.
        rainy, derained, clean: (H, W, 3) uint8 of equal shape; ``clean`` may be None.
        scores: {"rainy": ..., "derained": ...}, each as ``metrics.measure`` returns it, if there is a clean image.

    Returns:
        (H', W', 3) uint8.
    """
    images, labels, caption = [rainy, derained], ["rainy", "derained"], name
    if clean is not None:
        images += [clean, error_map(derained, clean)]
        labels += ["clean", f"error x {ERROR_SCALE}"]
        figures = (f"{key} {score['psnr_y']:.2f} dB / {score['ssim_y']:.4f}" for key, score in scores.items())
        caption = f"{name}: PSNR / SSIM on Y, {', '.join(figures)}"
    return tile_row([shrink(image, TILE) for image in images], labels, caption)


def draw_boxes(image, boxes, colours, texts):
    """An image, shrunk for a panel, with boxes around objects.

    Args:
        image: (H, W, 3) uint8.
        boxes: (N, 4 or more), in the first four columns x1 y1 x2 y2 in px.
        colours: (red, green, blue) of each box.
        texts: what stands at the upper left corner of each box; may be empty.

    Returns:
        (H', W', 3) uint8.
    """
    small = shrink(image, TILE)
    height, width = small.shape[:2]
    scale = np.tile((width / image.shape[1], height / image.shape[0]), 2)
    sheet = Image.fromarray(small)
    # From the last to the first, so that the first, which are the surest, are on top.
    for box, colour, text in reversed(list(zip(boxes, colours, texts))):
        left, top, right, bottom = (box[:4] * scale).round().astype(int).tolist()
        corners = (left, top, max(left, right - 1), max(top, bottom - 1))
        ImageDraw.Draw(sheet).rectangle(corners, outline=colour, width=2)
        draw_tag(sheet, (left, top), text, colour)
    return np.asarray(sheet)


def draw_tag(sheet, corner, text, colour):
    """Draw a text on a ground of ``colour`` over a point (left, bottom) of the picture ``sheet``, and inside it."""
    font = ImageFont.load_default(max(8, min(12, sheet.width // 16)))
    length, line = round(font.getlength(text)) + 4, font.size + 4
    left, top = max(0, min(corner[0], sheet.width - length)), max(0, corner[1] - line)
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((left, top, left + length, top + line), fill=tuple(colour))
    dark = 299 * colour[0] + 587 * colour[1] + 114 * colour[2] < 128e3
    draw.text((left + 2, top + 1), text, "white" if dark else "black", font)


def class_colours(count):
    """(count, 3) uint8: a colour for each class, those of PASCAL VOC, in which class 0 is black."""
    numbers = np.arange(count)[:, None]
    colours = np.zeros((count, 3), int)
    for bit in range(8):
        colours |= (numbers >> (3 * bit + np.arange(3)) & 1) << (7 - bit)
    return colours.astype(np.uint8)


def draw_labels(image, labels, colours, names):
    """An image, shrunk for a panel, under the colours of its labels; what is large enough is named.

    Args:
        image: (H, W, 3) uint8.
        labels: (H, W) integers.
        colours: (K, 3) uint8, as from ``class_colours``.
        names: of the K classes.

    Returns:
        (H', W', 3) uint8.
    """
    small = shrink(image, TILE)
    small_labels = cv2.resize(labels.astype(np.uint8), small.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    mixed = cv2.addWeighted(small, 1 - LABEL_OPACITY, colours[small_labels], LABEL_OPACITY, 0)
    sheet = Image.fromarray(mixed)
    for k in np.unique(small_labels):
        rows, columns = np.nonzero(small_labels == k)
        if len(rows) >= SMALLEST_NAMED * small_labels.size:
            distances = (rows - np.median(rows)) ** 2 + (columns - np.median(columns)) ** 2
            inside = distances.argmin()  # the middle itself may belong to another class
            draw_tag(sheet, (int(columns[inside]), int(rows[inside])), names[k], colours[k].tolist())
    return np.asarray(sheet)


def thumbnail(name, rainy, derained):
    """An entry of the contact sheet: (H, W, 3) uint8."""
    return tile_row([shrink(image, THUMBNAIL) for image in (rainy, derained)], ["rainy", "derained"], name)


def contact_sheet(thumbnails):
    """Arrange thumbnails, (h, w, 3) uint8 of any sizes, in rows of ``COLUMNS``: (H, W, 3) uint8."""
    rows = [thumbnails[start : start + COLUMNS] for start in range(0, len(thumbnails), COLUMNS)]
    column = max(image.shape[1] for image in thumbnails) + 2 * GAP
    heights = [max(image.shape[0] for image in row) + 2 * GAP for row in rows]
    sheet = np.full((sum(heights), column * len(rows[0]), 3), 255, np.uint8)
    top = GAP
    for row, height in zip(rows, heights):
        for k, image in enumerate(row):
            left = k * column + (column - image.shape[1]) // 2
            sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
        top += height
    return sheet
