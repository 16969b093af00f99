"""A plot of resident memory over runs."""

from PIL import Image, ImageDraw, ImageFont

SIZE, LEFT, RIGHT, TOP, BOTTOM = (960, 420), 70, 20, 40, 50
INK, GRID, SHADE, LINE, MARK = "#222222", "#dddddd", "#f1f1f6", "#2563a8", "#d0442b"


def plot(path, values, warm_up, marked):
    """Write a PNG: values [MB] over run number, the warm-up shaded, marked runs as dots. The axis begins at zero."""
    image = Image.new("RGB", SIZE, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    width, height = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM
    step = 250 if max(values) > 1000 else 100
    top = step * (int(max(values) * 1.05) // step + 1)

    def at(number, value):
        return LEFT + width * number / max(1, len(values) - 1), TOP + height * (1 - value / top)

    draw.rectangle([*at(0, top), *at(warm_up, 0)], fill=SHADE)
    for value in range(0, top + 1, step):
        draw.line([*at(0, value), *at(len(values) - 1, value)], fill=GRID)
        draw.text((LEFT - 8, at(0, value)[1]), f"{value}", INK, font, anchor="rm")
    for number in range(0, len(values) + 1, max(1, len(values) // 8)):
        draw.text((at(number, 0)[0], TOP + height + 8), f"{number}", INK, font, anchor="mt")
    draw.line([at(*pair) for pair in enumerate(values)], fill=LINE, width=2)
    for number in marked:
        x, y = at(number, values[number])
        draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=MARK)
    draw.text((LEFT, 12), "Resident memory of the ComfyUI process after each run, MB", INK, font)
    draw.text((SIZE[0] - RIGHT, 12), "red: interrupted   grey: warm-up", INK, font, anchor="ra")
    draw.text((LEFT + width / 2, SIZE[1] - 10), "run", INK, font, anchor="ms")
    image.save(path, optimize=True)
