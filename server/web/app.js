// The playground: controls on one side, what they draw on the other, live.

import { curlLine, generate, models, Refusal } from "/static/api.js";
import { drawGrid, drawSweep, drawTiming, make, markSweep } from "/static/view.js";

const SLIDER_PAUSE_MS = 60; // long enough to skip most positions of a drag, short enough to feel live
const TYPING_PAUSE_MS = 450;
const SWEEP_TILES = 9;
const RANDOM_SEEDS = 1_000_000; // short seeds are easier to read out

const at = (id) => document.getElementById(id);
const form = at("controls");
const fields = { prompt: at("prompt"), guidance: at("guidance"), seed: at("seed"), n: at("n") };
let model = null;
let offered = [];
let timer = 0;
let running = new AbortController();
let sweepKey = "";

/** The request the controls describe. */
function request() {
  return {
    model: model.id,
    prompt: fields.prompt.value,
    guidance_scale: Number(fields.guidance.value),
    steps: Number(form.elements.steps.value),
    seed: fields.seed.value === "" ? null : Number(fields.seed.value),
    n: Number(fields.n.value),
  };
}

/** Draw now; whatever was under way is dropped, here and on the server. */
async function draw() {
  clearTimeout(timer);
  running.abort();
  running = new AbortController();
  const { signal } = running;
  const body = request();
  echo(body);
  at("grid").setAttribute("aria-busy", "true");
  try {
    const answer = await generate(body, signal);
    show(answer, body);
    await sweep(body, answer.seed, signal);
  } catch (error) {
    if (error.name !== "AbortError") complain(error);
  } finally {
    if (!signal.aborted) at("grid").setAttribute("aria-busy", "false");
  }
}

function drawAfter(pauseMs) {
  clearTimeout(timer);
  timer = setTimeout(draw, pauseMs);
}

function show(answer, body) {
  complain(null);
  if (fields.seed.value === "") fields.seed.value = answer.seed;
  drawGrid(at("grid"), answer, body.prompt, useSeed);
  drawTiming(at("bar"), at("timing"), answer);
  const count = answer.data.length === 1 ? "1 image" : `${answer.data.length} images`;
  const steps = answer.steps === 1 ? "1 step" : `${answer.steps} steps`;
  const bold = make("strong", {}, `${count} in ${answer.roundTrip.toFixed(0)} ms`);
  at("status").replaceChildren(bold, ` · ${steps} · guidance ${answer.guidance_scale} · ${answer.engine}`);
}

/** The first image again at every guidance; skipped while only the guidance changes. */
async function sweep(body, seed, signal) {
  const key = JSON.stringify([body.model, body.prompt, body.steps, seed]);
  markSweep(at("sweep"), body.guidance_scale);
  if (key === sweepKey) return;
  const { min, max } = model.guidance_scale;
  const values = Array.from({ length: SWEEP_TILES }, (_, i) => min + ((max - min) * i) / (SWEEP_TILES - 1));
  const tiles = values.map((value) => {
    const rounded = Math.round(value * 10) / 10;
    return generate({ ...body, seed, n: 1, guidance_scale: rounded }, signal);
  });
  const answers = await Promise.all(tiles);
  drawSweep(at("sweep"), answers, Number(fields.guidance.value), body.prompt, (value) => {
    fields.guidance.value = value;
    draw();
  });
  sweepKey = key;
}

/** Show the server's own words, and mark the field it names; null clears both. */
function complain(error) {
  const problem = at("problem");
  problem.hidden = error === null;
  problem.textContent = error === null ? "" : wording(error);
  const named = { guidance_scale: "guidance" }[error?.param] ?? error?.param;
  for (const [name, field] of Object.entries(fields)) field.setAttribute("aria-invalid", String(name === named));
}

function wording(error) {
  if (error instanceof Refusal) return error.message;
  return "The server does not answer. Is it still running?";
}

/** Labels, chips and curl line after any change. */
function echo(body) {
  at("guidance-value").textContent = body.guidance_scale.toFixed(1);
  at("n-value").textContent = body.n;
  at("curl").textContent = curlLine(body);
  for (const chip of at("known").querySelectorAll("button")) {
    chip.setAttribute("aria-pressed", String(chip.textContent === body.prompt));
  }
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
  if (!model.prompts.includes(fields.prompt.value)) fields.prompt.value = model.prompts[0];
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
  draw();
});
form.addEventListener("input", (event) => {
  echo(request());
  drawAfter(event.target === fields.prompt || event.target === fields.seed ? TYPING_PAUSE_MS : SLIDER_PAUSE_MS);
});
at("dice").addEventListener("click", rollSeed);
at("copy").addEventListener("click", copyCurl);
at("model").addEventListener("change", (event) => {
  choose(offered[event.target.selectedIndex]);
  draw();
});
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input[type=text], input[type=number], select");
  if (event.key.toLowerCase() === "r" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) rollSeed();
});

try {
  offered = await models();
  at("model").replaceChildren(...offered.map((each) => make("option", {}, each.id)));
  document.querySelector(".model-pick").hidden = offered.length < 2;
  choose(offered[0]);
  rollSeed();
} catch (error) {
  complain(error);
}
