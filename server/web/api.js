// What the page asks of the server, and the same as a curl line.

const GENERATIONS = "/v1/images/generations";
const EDITS = "/v1/images/edits";
const KEY = "halfstep.key"; // of this tab alone: it goes when the tab does

/** The server's refusal: its message, the field it names, the status and the code. */
export class Refusal extends Error {
  constructor(message, param, status, code = null) {
    super(message);
    this.param = param;
    this.status = status;
    this.code = code;
  }
}

/** Send this API key with every request from now on. */
export function useKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/** The models on offer, the default first. */
export async function models() {
  const response = await fetch("/v1/models", { headers: authorization() });
  if (!response.ok) throw await refusalOf(response);
  return (await response.json()).data;
}

/** What the server says of its API. */
export async function description() {
  const response = await fetch("/openapi.json", { headers: authorization() });
  if (!response.ok) throw await refusalOf(response);
  return response.json();
}

/** One request; {signal} aborts it, and the server then stops its steps. Adds the round trip in ms.
 *  picture: {image, mask} as PNG blobs to start from, mask null for none; null draws from nothing. */
export async function generate(body, picture, signal) {
  const begun = performance.now();
  const sent = picture
    ? { body: formOf(body, picture), headers: authorization() }
    : { body: JSON.stringify(body), headers: { "content-type": "application/json", ...authorization() } };
  const response = await fetch(picture ? EDITS : GENERATIONS, { method: "POST", signal, ...sent });
  if (!response.ok) throw await refusalOf(response);
  const answer = await response.json();
  return { ...answer, roundTrip: performance.now() - begun };
}

/** The request as a line for a POSIX shell; the key stays out of it. */
export function curlLine(body, picture) {
  const parts = [`curl ${location.origin}${picture ? EDITS : GENERATIONS}`];
  if (sessionStorage.getItem(KEY)) parts.push('-H "Authorization: Bearer $HALFSTEP_API_KEY"');
  if (picture) {
    parts.push("-F image=@image.png");
    if (picture.mask) parts.push("-F mask=@mask.png");
    parts.push(...texts(body).map(([name, value]) => `--form-string ${quoted(`${name}=${value}`)}`));
  } else {
    parts.push("-H 'Content-Type: application/json'", `-d ${quoted(JSON.stringify(body))}`);
  }
  return parts.join(" \\\n  ");
}

function formOf(body, { image, mask }) {
  const form = new FormData();
  form.append("image", image, "image.png");
  if (mask) form.append("mask", mask, "mask.png");
  for (const [name, value] of texts(body)) form.append(name, value);
  return form;
}

function texts(body) {
  return Object.entries(body).filter(([, value]) => value !== null);
}

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function authorization() {
  const key = sessionStorage.getItem(KEY);
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function refusalOf(response) {
  try {
    const { error } = await response.json();
    return new Refusal(error.message, error.param, response.status, error.code);
  } catch {
    return new Refusal(`The server answered with status ${response.status}.`, null, response.status);
  }
}
