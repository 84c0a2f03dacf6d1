// A picture to start from: a file chosen, dropped or pasted, or an image of this page, cut to a size of the model.

import { Refusal } from "/static/api.js";
import { nearestSize, Painter } from "/static/paint.js";

const TINY_PX = 160;

const at = (id) => document.getElementById(id);

export class Source {
  /** changed(painted): after another picture, or with true after a stroke; refused(error): for what is no image. */
  constructor(changed, refused) {
    this.changed = changed;
    this.refused = refused;
    this.painter = new Painter(at("canvas"), at("brush"), () => changed(true));
    this.sizes = [];
    this.size = null; // "WxH" while there is a picture
    this.image = null;
    this.listen();
  }

  /** Fit to a model: what it cannot do is hidden, and the picture is dropped. */
  offer({ tasks, sizes }) {
    const [edits, inpaints] = ["edit", "inpaint"].map((task) => tasks.includes(task));
    this.sizes = sizes;
    this.painter.canPaint = inpaints;
    at("picture").hidden = !edits && !inpaints;
    for (const id of ["tools", "paint-hint"]) at(id).hidden = !inpaints;
    this.drop();
  }

  get offered() {
    return !at("picture").hidden;
  }

  /** source: a file, or the address of an image on this page. */
  async load(source) {
    try {
      this.image = await createImageBitmap(source instanceof Blob ? source : await blobOf(source));
      at("size").value = nearestSize(this.sizes, this.image);
      this.fit(at("size").value);
    } catch {
      this.refused(new Refusal("This file is no image the browser can read. Choose a PNG, JPEG or WebP file.", "image", 0));
      return;
    }
    at("painting").hidden = false;
    this.changed(false);
  }

  /** Another size was chosen: the picture, if there is one, is cut to it, and the mask starts anew. */
  resize(size) {
    if (this.size !== null) this.fit(size);
  }

  fit(size) {
    this.size = size;
    this.painter.load(this.image, size);
    at("canvas").className = Math.max(at("canvas").width, at("canvas").height) <= TINY_PX ? "pixelated" : "";
  }

  drop() {
    this.size = null;
    this.image = null;
    at("image").value = "";
    at("painting").hidden = true;
    at("compare").hidden = true;
  }

  /** {image, mask} as files, or null without a picture. */
  async files() {
    return this.size === null ? null : this.painter.files();
  }

  /** The address of the picture as it is without anything drawn over it. */
  get before() {
    return this.painter.before;
  }

  listen() {
    at("image").addEventListener("change", () => at("image").files.length && this.load(at("image").files[0]));
    at("undo").addEventListener("click", () => this.painter.undo());
    at("clear").addEventListener("click", () => this.painter.clear());
    at("remove").addEventListener("click", () => {
      this.drop();
      this.changed(false);
    });
    addEventListener("dragover", (event) => {
      event.preventDefault();
      at("drop").toggleAttribute("data-over", true);
    });
    for (const type of ["dragleave", "drop"]) addEventListener(type, () => at("drop").removeAttribute("data-over"));
    addEventListener("drop", (event) => {
      event.preventDefault(); // else the browser leaves the page for the file
      this.take(event, event.dataTransfer.files);
    });
    addEventListener("paste", (event) => this.take(event, event.clipboardData.files));
  }

  take(event, files) {
    const file = [...(files ?? [])].find((each) => each.type.startsWith("image/"));
    if (!file || !this.offered) return;
    event.preventDefault();
    this.load(file);
  }
}

/** The page's own images are data: URLs, which its policy does not let it fetch. */
async function blobOf(source) {
  const bytes = Uint8Array.from(atob(source.split(",")[1]), (each) => each.charCodeAt(0));
  return new Blob([bytes]);
}
