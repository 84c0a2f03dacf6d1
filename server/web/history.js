// What was drawn before, kept by the browser: parameters and a small picture, never an uploaded file.

import { make } from "/static/view.js";

const NAME = "halfstep.history";
const ENTRIES = 24;
const THUMB_PX = 96;

/** The entries, newest first; empty where the browser keeps nothing. */
export function remembered() {
  try {
    return JSON.parse(localStorage.getItem(NAME)) ?? [];
  } catch {
    return [];
  }
}

/** Put a request first, with the first image of its answer. A slider on its way replaces the entry it just made. */
export async function remember(body, source) {
  const entry = { ...body, thumb: await thumbnail(source) };
  const [newest, ...older] = remembered();
  const replaced = newest && pinned(newest) === pinned(entry) ? older : remembered();
  keep([entry, ...replaced.filter((each) => key(each) !== key(entry))].slice(0, ENTRIES));
}

export function forget(entry) {
  keep(remembered().filter((each) => key(each) !== key(entry)));
}

export function forgetAll() {
  keep([]);
}

/** Fill the list; restore(entry) is called when one is chosen, and redraw() after one was deleted. */
export function drawHistory(list, restore, redraw) {
  list.replaceChildren(
    ...remembered().map((entry) => {
      const { prompt, guidance_scale: guidance, steps, seed } = entry;
      const from = entry.strength === undefined ? "" : ", from an image";
      const label = `${prompt}, guidance ${guidance}, ${steps} steps, seed ${seed}${from}`;
      const again = make("button", { type: "button", class: "again", "aria-label": `Restore ${label}`, title: label });
      again.addEventListener("click", () => restore(entry));
      again.append(make("img", { src: entry.thumb, alt: "", width: 64, height: 64 }), make("span", {}, prompt));
      const remove = make("button", { type: "button", class: "remove", "aria-label": `Delete ${label}` }, "×");
      remove.addEventListener("click", () => {
        forget(entry);
        redraw();
      });
      return make("li", {}, again, remove);
    }),
  );
}

function key({ thumb, ...rest }) {
  return JSON.stringify(rest);
}

function pinned({ thumb, guidance_scale, strength, n, ...rest }) {
  return JSON.stringify(rest);
}

function keep(entries) {
  try {
    localStorage.setItem(NAME, JSON.stringify(entries));
  } catch {
    // private windows and full disks keep nothing; the page works without
  }
}

async function thumbnail(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  const canvas = make("canvas", { width: THUMB_PX, height: THUMB_PX });
  const side = Math.min(image.width, image.height);
  const [x, y] = [(image.width - side) / 2, (image.height - side) / 2];
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = side > THUMB_PX;
  context.drawImage(image, x, y, side, side, 0, 0, THUMB_PX, THUMB_PX);
  return canvas.toDataURL("image/webp", 0.7);
}
