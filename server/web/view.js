// Drawing answers. Elements are made, never parsed from text, so a prompt can not become markup.

const TINY_PX = 160;
const LARGE_PX = 256;
const STAGES = ["queue", "condition", "steps", "decode", "encode"];
const ICONS = {
  save: "M12 4v11m0 0 4-4m-4 4-4-4M5 20h14",
  start: "M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4",
  keep: "M12 3v4m0 10v4M3 12h4m10 0h4M12 9a3 3 0 1 0 0 6 3 3 0 0 0 0-6",
};

/** make("li", {class: "card"}, child, …): an element with attributes and children. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** The images of an answer as cards. use.seed(seed) is called when a seed is chosen, use.image(source), which may be
 *  missing, when an image is to be edited. */
export function drawGrid(list, answer, prompt, use) {
  const [width] = answer.size.split("x").map(Number);
  list.dataset.size = width >= LARGE_PX ? "large" : "small";
  list.replaceChildren(...answer.data.map((image) => card(answer, image, prompt, use)));
}

/** Tiles of one image at each guidance; choose(value) when one is picked. */
export function drawSweep(list, answers, chosen, prompt, choose) {
  list.replaceChildren(
    ...answers.map((answer) => {
      const value = answer.guidance_scale;
      const label = `${prompt} with guidance ${value}${answer.data[0].flagged ? ", withheld" : ""}`;
      const tile = make("button", { type: "button", "aria-label": label, onclick: () => choose(value) });
      tile.append(picture(answer, answer.data[0], ""), make("span", {}, value.toFixed(1)));
      tile.dataset.value = value;
      return make("li", {}, tile);
    }),
  );
  markSweep(list, chosen);
}

/** Outline the tile of the guidance in use, if there is one. */
export function markSweep(list, chosen) {
  for (const tile of list.querySelectorAll("button")) {
    tile.setAttribute("aria-pressed", String(Math.abs(Number(tile.dataset.value) - chosen) < 0.05));
  }
}

/** The picture before, over the first image made from it; split: percent of it that is seen. */
export function drawCompare(figure, before, answer, split) {
  const [below, above] = figure.querySelectorAll("img");
  const made = picture(answer, answer.data[0], "After");
  for (const [element, source, alt] of [[below, made.src, "After"], [above, before, "Before"]]) {
    Object.assign(element, { src: source, alt, className: made.className });
  }
  splitCompare(figure, split);
}

export function splitCompare(figure, split) {
  figure.querySelector("img:last-child").style.clipPath = `inset(0 ${100 - split}% 0 0)`;
}

/** A bar of the stages and their milliseconds. */
export function drawTiming(bar, list, answer) {
  const segments = STAGES.map((stage) => {
    const segment = make("i", { class: stage });
    segment.style.flexGrow = answer.timing[stage];
    return segment;
  });
  bar.replaceChildren(...segments);
  const rows = STAGES.map((stage) => entry(stage, answer.timing[stage], stage));
  rows.push(entry("round trip", answer.roundTrip, ""));
  list.replaceChildren(...rows);
}

function card(answer, image, prompt, use) {
  if (image.flagged) {
    const note = make("footer", {}, make("span", {}, "Withheld"));
    return make("li", { class: "card" }, picture(answer, image, "Withheld by the server's safety check"), note);
  }
  const alt = `${prompt}, seed ${image.seed}, guidance ${answer.guidance_scale}, ${answer.steps} steps`;
  const source = address(answer, image);
  const name = `${answer.model}-${image.seed}.${answer.output_format}`;
  const keep = make("button", { type: "button", title: "Use this seed", onclick: () => use.seed(image.seed) });
  keep.setAttribute("aria-label", `Use seed ${image.seed}`);
  keep.append(icon("keep"));
  const save = make("a", { href: source, download: name, title: "Save", "aria-label": `Save image of seed ${image.seed}` });
  save.append(icon("save"));
  const seed = make("span", { title: alt }, String(image.seed));
  const footer = make("footer", {}, seed, keep, save);
  if (use.image) {
    const start = make("button", { type: "button", title: "Edit this image", onclick: () => use.image(source) });
    start.setAttribute("aria-label", `Edit image of seed ${image.seed}`);
    start.append(icon("start"));
    keep.after(start);
  }
  return make("li", { class: "card" }, picture(answer, image, alt), footer);
}

function picture(answer, image, alt) {
  const [width, height] = answer.size.split("x").map(Number);
  const element = make("img", { src: address(answer, image), alt, width, height });
  if (Math.max(width, height) <= TINY_PX) element.className = "pixelated";
  element.style.aspectRatio = `${width} / ${height}`;
  return element;
}

function address(answer, image) {
  if (image.flagged) return "/static/withheld.svg";
  return `data:image/${answer.output_format};base64,${image.b64_json}`;
}

function entry(name, ms, stage) {
  return make("div", {}, make("dt", { class: stage }, name), make("dd", {}, `${ms.toFixed(1)} ms`));
}

function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(space, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}
