// The playground: controls on one side, what they draw on the other, live.

import { curlLine, generate, models, Refusal, useKey } from "/static/api.js";
import { drawHistory, forgetAll, remember, remembered } from "/static/history.js";
import { Source } from "/static/source.js";
import { drawCompare, drawGrid, drawSweep, drawTiming, make, markSweep, splitCompare } from "/static/view.js";

const SLIDER_PAUSE_MS = 60; // long enough to skip most positions of a drag, short enough to feel live
const TYPING_PAUSE_MS = 450;
const SWEEP_TILES = 9;
const RANDOM_SEEDS = 1_000_000; // short seeds are easier to read out

const at = (id) => document.getElementById(id);
const form = at("controls");
const fields = {
  prompt: at("prompt"), guidance: at("guidance"), seed: at("seed"), n: at("n"), image: at("image"), strength: at("strength"),
  size: at("size"), key: at("key"),
};
const source = new Source((painted) => {
  pictures += 1;
  if (painted) drawAfter(SLIDER_PAUSE_MS);
  else draw();
}, complain);
let model = null;
let offered = [];
let timer = 0;
let running = new AbortController();
let sweepKey = "";
let pictures = 0; // changes of the picture to edit and of its mask
let sent = null; // the picture of the latest request

/** The request the controls describe. */
function request() {
  const body = {
    model: model.id,
    prompt: fields.prompt.value,
    guidance_scale: Number(fields.guidance.value),
    steps: Number(form.elements.steps.value),
    seed: fields.seed.value === "" ? null : Number(fields.seed.value),
    n: Number(fields.n.value),
  };
  if (source.size !== null) return { ...body, size: source.size, strength: Number(fields.strength.value) };
  return model.sizes.length > 1 ? { ...body, size: fields.size.value } : body;
}

/** Draw now; whatever was under way is dropped, here and on the server. */
async function draw() {
  clearTimeout(timer);
  running.abort();
  running = new AbortController();
  const { signal } = running;
  const body = request();
  const version = pictures;
  working(true);
  try {
    const picture = await source.files();
    if (signal.aborted) return;
    sent = picture;
    echo(body, picture);
    const answer = await generate(body, picture, signal);
    show(answer, body, picture);
    await sweep(body, picture, version, answer, signal);
  } catch (error) {
    if (error.name !== "AbortError") complain(error);
  } finally {
    if (!signal.aborted) working(false);
  }
}

function working(busy) {
  at("grid").setAttribute("aria-busy", String(busy));
  at("cancel").hidden = !busy;
}

function cancel() {
  clearTimeout(timer);
  running.abort();
  working(false);
  at("status").textContent = "Cancelled";
}

function drawAfter(pauseMs) {
  clearTimeout(timer);
  timer = setTimeout(draw, pauseMs);
}

function show(answer, body, picture) {
  complain(null);
  if (fields.seed.value === "") fields.seed.value = answer.seed;
  drawGrid(at("grid"), answer, body.prompt, { seed: useSeed, image: source.offered ? (image) => source.load(image) : null });
  at("compare").hidden = picture === null;
  if (picture) drawCompare(at("compare"), source.before, answer, at("split").value);
  drawTiming(at("bar"), at("timing"), answer);
  const count = answer.data.length === 1 ? "1 image" : `${answer.data.length} images`;
  const steps = answer.steps === 1 ? "1 step" : `${answer.steps} steps`;
  const bold = make("strong", {}, `${count} in ${answer.roundTrip.toFixed(0)} ms`);
  at("status").replaceChildren(bold, ` · ${steps} · guidance ${answer.guidance_scale} · ${answer.engine}`);
  remember({ ...body, seed: answer.seed }, at("grid").querySelector("img").src).then(showHistory);
}

/** The first image again at every guidance, less what fails; skipped while only the guidance changes. */
async function sweep(body, picture, version, answer, signal) {
  const { seed } = answer;
  const key = JSON.stringify([body.model, body.prompt, body.steps, body.size, body.strength, seed, version]);
  markSweep(at("sweep"), body.guidance_scale);
  if (key === sweepKey) return;
  sweepKey = "";
  at("sweep").replaceChildren();
  const { min, max } = model.guidance_scale;
  const values = Array.from({ length: SWEEP_TILES }, (_, i) => min + ((max - min) * i) / (SWEEP_TILES - 1));
  const rounded = values.map((value) => Math.round(value * 10) / 10);
  const tiles = rounded.map((value) => generate({ ...body, seed, n: 1, guidance_scale: value }, picture, signal));
  const outcomes = await Promise.allSettled(tiles);
  if (signal.aborted) return;
  const answers = outcomes.flatMap(({ value, reason }, i) => {
    const withheld = reason?.code === "content_policy_violation";
    return withheld ? { ...answer, guidance_scale: rounded[i], data: [{ flagged: true }] } : (value ?? []);
  });
  drawSweep(at("sweep"), answers, Number(fields.guidance.value), body.prompt, (value) => {
    fields.guidance.value = value;
    draw();
  });
  sweepKey = key;
}

/** Show the server's own words at the field they name, and mark it; null clears both. */
function complain(error) {
  const problem = at("problem");
  if (error?.status === 401) at("key-field").hidden = false;
  const named = error?.status === 401 ? "key" : ({ guidance_scale: "guidance", mask: "image" }[error?.param] ?? error?.param);
  const place = fields[named]?.closest(".field") ?? fields.prompt.closest(".field");
  if (error !== null) place.after(problem);
  problem.hidden = error === null;
  problem.textContent = error === null ? "" : wording(error);
  for (const [name, field] of Object.entries(fields)) field.setAttribute("aria-invalid", String(name === named));
}

function wording(error) {
  if (error instanceof Refusal) return error.message;
  return "The server does not answer. Is it still running?";
}

/** Labels, chips and curl line after any change. */
function echo(body, picture) {
  at("guidance-value").textContent = body.guidance_scale.toFixed(1);
  at("strength-value").textContent = Number(fields.strength.value).toFixed(2);
  at("n-value").textContent = body.n;
  at("curl").textContent = curlLine(body, picture);
  for (const chip of at("known").querySelectorAll("button")) {
    chip.setAttribute("aria-pressed", String(chip.textContent === body.prompt));
  }
}

function showHistory() {
  at("history-part").hidden = remembered().length === 0;
  drawHistory(at("history"), restore, showHistory);
}

function restore(entry) {
  const known = offered.find((each) => each.id === entry.model);
  if (known && known !== model) choose(known);
  fields.prompt.value = entry.prompt;
  fields.guidance.value = entry.guidance_scale;
  fields.seed.value = entry.seed;
  fields.n.value = entry.n;
  if (entry.strength !== undefined) fields.strength.value = entry.strength;
  const radio = form.querySelector(`input[name=steps][value="${entry.steps}"]`);
  if (radio) radio.checked = true;
  if (source.size === null && model.sizes.includes(entry.size)) fields.size.value = entry.size;
  draw();
}

function useSeed(seed) {
  fields.seed.value = seed;
  fields.n.value = 1;
  draw();
}

function rollSeed() {
  fields.seed.value = Math.floor(Math.random() * RANDOM_SEEDS);
  draw();
}

/** Fit the controls to a model. */
function choose(chosen) {
  model = chosen;
  at("model").value = model.id;
  const { min, max, default: guidance } = model.guidance_scale;
  Object.assign(fields.guidance, { min, max, value: guidance });
  at("steps").replaceChildren(
    ...model.steps.trained.map((n) => {
      const radio = make("input", { type: "radio", name: "steps", value: n });
      radio.checked = n === model.steps.default;
      return make("label", {}, radio, String(n));
    }),
  );
  at("known").replaceChildren(
    ...model.prompts.map((known) => {
      const pick = () => {
        fields.prompt.value = known;
        draw();
      };
      return make("li", {}, make("button", { type: "button", onclick: pick }, known));
    }),
  );
  if (model.prompts.length && !model.prompts.includes(fields.prompt.value)) fields.prompt.value = model.prompts[0];
  fields.size.replaceChildren(...model.sizes.map((size) => make("option", {}, size)));
  at("size-field").hidden = model.sizes.length < 2;
  source.offer(model);
}

async function copyCurl() {
  const button = at("copy");
  try {
    await navigator.clipboard.writeText(at("curl").textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(at("curl")); // no clipboard without https: leave it selected
    button.textContent = "Press Ctrl+C";
  }
  setTimeout(() => (button.textContent = "Copy"), 1600);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (model === null) begin();
  else draw();
});
form.addEventListener("input", (event) => {
  if (model === null || ["brush", "image", "key"].includes(event.target.id)) return;
  echo(request(), sent);
  drawAfter(event.target === fields.prompt || event.target === fields.seed ? TYPING_PAUSE_MS : SLIDER_PAUSE_MS);
});
fields.key.addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  begin();
});
at("use-key").addEventListener("click", begin);
at("dice").addEventListener("click", rollSeed);
at("copy").addEventListener("click", copyCurl);
at("cancel").addEventListener("click", cancel);
at("split").addEventListener("input", (event) => splitCompare(at("compare"), event.target.value));
at("forget").addEventListener("click", () => {
  forgetAll();
  showHistory();
});
fields.size.addEventListener("change", () => {
  pictures += 1; // another size takes the mask away
  source.resize(fields.size.value);
});
at("model").addEventListener("change", (event) => {
  choose(offered[event.target.selectedIndex]);
  draw();
});
fields.seed.closest(".field").addEventListener("keydown", (event) => {
  const plain = !event.ctrlKey && !event.metaKey && !event.altKey;
  if (event.key.toLowerCase() !== "r" || !plain || model === null) return;
  event.preventDefault(); // some browsers take letters in a number
  rollSeed();
});

/** Ask what there is, with the key of the field where one is wanted, and draw at once. */
async function begin() {
  if (fields.key.value) useKey(fields.key.value);
  try {
    offered = await models();
    at("key-field").hidden = true;
    at("model").replaceChildren(...offered.map((each) => make("option", {}, each.id)));
    document.querySelector(".model-pick").hidden = offered.length < 2;
    choose(offered[0]);
    complain(null);
    showHistory();
    rollSeed();
  } catch (error) {
    complain(error);
  }
}

begin();
