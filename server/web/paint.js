// A picture to start from, and the mask painted over it. Both have the model's own pixels, so nothing is scaled twice.

const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const UNDO_STEPS = 30;

const painted = (alpha) => alpha > 0; // of the mask: the soft edge of a stroke is painted, too

export class Painter {
  /** canvas: shows picture and mask; brush: an input with the width in percent; changed(): after every stroke. */
  constructor(canvas, brush, changed) {
    this.canvas = canvas;
    this.brush = brush;
    this.changed = changed;
    this.picture = document.createElement("canvas");
    this.mask = document.createElement("canvas");
    this.undone = [];
    this.at = null; // where the last dab of a stroke was, or the keyboard's cursor
    this.canPaint = true;
    this.listen();
  }

  /** Cut the middle of an image to a size, "WxH", and start an empty mask. */
  load(image, size) {
    const [width, height] = size.split("x").map(Number);
    for (const each of [this.canvas, this.picture, this.mask]) Object.assign(each, { width, height });
    const scale = Math.max(width / image.width, height / image.height);
    const [w, h] = [image.width * scale, image.height * scale];
    const context = this.picture.getContext("2d");
    context.fillStyle = "#fff"; // what the server puts behind transparency
    context.fillRect(0, 0, width, height);
    context.imageSmoothingQuality = "high";
    context.drawImage(image, (width - w) / 2, (height - h) / 2, w, h);
    this.undone = [];
    this.at = [width / 2, height / 2];
    this.show();
  }

  get masked() {
    return this.pixels().data.some((value, i) => i % 4 === 3 && painted(value));
  }

  get before() {
    return this.picture.toDataURL();
  }

  /** {image, mask} as PNG files; the mask is transparent where it was painted, and null where nowhere. */
  async files() {
    const image = await png(this.picture);
    if (!this.masked) return { image, mask: null };
    const holes = document.createElement("canvas");
    Object.assign(holes, { width: this.mask.width, height: this.mask.height });
    const context = holes.getContext("2d");
    const pixels = this.pixels();
    for (let i = 0; i < pixels.data.length; i += 4) {
      pixels.data.set([0, 0, 0, painted(pixels.data[i + 3]) ? 0 : 255], i);
    }
    context.putImageData(pixels, 0, 0);
    return { image, mask: await png(holes) };
  }

  undo() {
    const last = this.undone.pop();
    if (!last) return;
    this.mask.getContext("2d").putImageData(last, 0, 0);
    this.show();
    this.changed();
  }

  clear() {
    if (!this.masked) return;
    this.remember();
    this.mask.getContext("2d").clearRect(0, 0, this.mask.width, this.mask.height);
    this.show();
    this.changed();
  }

  pixels() {
    return this.mask.getContext("2d", { willReadFrequently: true }).getImageData(0, 0, this.mask.width, this.mask.height);
  }

  remember() {
    this.undone.push(this.pixels());
    if (this.undone.length > UNDO_STEPS) this.undone.shift();
  }

  get width() {
    return Math.max(1, (this.mask.width * Number(this.brush.value)) / 100);
  }

  line(from, to) {
    const context = this.mask.getContext("2d");
    Object.assign(context, { lineCap: "round", lineWidth: this.width });
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(...to);
    context.stroke();
    context.beginPath(); // a line of no length is not drawn
    context.arc(...to, this.width / 2, 0, 2 * Math.PI);
    context.fill();
    this.show();
  }

  show() {
    const context = this.canvas.getContext("2d");
    const { width, height } = this.canvas;
    context.drawImage(this.picture, 0, 0);
    const tint = document.createElement("canvas");
    Object.assign(tint, { width, height });
    const over = tint.getContext("2d");
    over.drawImage(this.mask, 0, 0);
    over.globalCompositeOperation = "source-in";
    over.fillStyle = "#e11d9c";
    over.fillRect(0, 0, width, height);
    context.globalAlpha = 0.6;
    context.drawImage(tint, 0, 0);
    context.globalAlpha = 1;
    if (document.activeElement === this.canvas && this.at && this.canvas.matches(":focus-visible")) {
      context.strokeStyle = "#e11d9c";
      context.lineWidth = Math.max(1, width / 128);
      context.beginPath();
      context.arc(...this.at, this.width / 2, 0, 2 * Math.PI);
      context.stroke();
    }
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) / box.width) * this.canvas.width,
      ((event.clientY - box.top) / box.height) * this.canvas.height,
    ];
  }

  listen() {
    let painting = false;
    this.canvas.addEventListener("pointerdown", (event) => {
      if (!this.canPaint || event.button !== 0) return;
      painting = true;
      this.canvas.setPointerCapture(event.pointerId);
      this.remember();
      this.at = this.point(event);
      this.line(this.at, this.at);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (!painting) return;
      const to = this.point(event);
      this.line(this.at, to);
      this.at = to;
    });
    const end = () => {
      if (painting) this.changed();
      painting = false;
    };
    this.canvas.addEventListener("pointerup", end);
    this.canvas.addEventListener("pointercancel", end);
    this.canvas.addEventListener("keydown", (event) => this.press(event));
    for (const type of ["focus", "blur"]) this.canvas.addEventListener(type, () => this.show());
  }

  press(event) {
    if (!this.canPaint || event.altKey) return;
    if (event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey)) this.undo();
    else if (event.key === " " || event.key === "Enter") {
      this.remember();
      this.line(this.at, this.at);
      this.changed();
    } else if (KEYS[event.key]) {
      const [dx, dy] = KEYS[event.key];
      const pace = Math.max(1, this.width / 2);
      const { width, height } = this.canvas;
      this.at = [clamp(this.at[0] + dx * pace, width), clamp(this.at[1] + dy * pace, height)];
      this.show();
    } else return;
    event.preventDefault();
  }
}

/** The model's size whose shape is nearest to the image's; of several, the one of nearest area, as the server has it. */
export function nearestSize(sizes, image) {
  const apart = (a, b) => Math.max(a / b, b / a);
  const distance = (size) => {
    const [width, height] = size.split("x").map(Number);
    return [apart(width * image.height, height * image.width), apart(width * height, image.width * image.height)];
  };
  const nearer = ([shape, area], [bestShape, bestArea]) => shape < bestShape || (shape === bestShape && area < bestArea);
  return sizes.reduce((best, size) => (nearer(distance(size), distance(best)) ? size : best));
}

function clamp(value, limit) {
  return Math.min(Math.max(value, 0), limit);
}

function png(canvas) {
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}
