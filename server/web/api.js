// What the page asks of the server, and the same as a curl line.

const GENERATIONS = "/v1/images/generations";

/** The server's refusal: its message, and the field it names. */
export class Refusal extends Error {
  constructor(message, param) {
    super(message);
    this.param = param;
  }
}

/** The models on offer, the default first. */
export async function models() {
  const response = await fetch("/v1/models");
  if (!response.ok) throw await refusalOf(response);
  return (await response.json()).data;
}

/** One request; {signal} aborts it, and the server then stops its steps. Adds the round trip in ms. */
export async function generate(body, signal) {
  const begun = performance.now();
  const response = await fetch(GENERATIONS, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw await refusalOf(response);
  const answer = await response.json();
  return { ...answer, roundTrip: performance.now() - begun };
}

/** The request as a line for a POSIX shell. */
export function curlLine(body) {
  const json = JSON.stringify(body).replaceAll("'", "'\\''");
  return `curl ${location.origin}${GENERATIONS} \\\n  -H 'Content-Type: application/json' \\\n  -d '${json}'`;
}

async function refusalOf(response) {
  try {
    const { error } = await response.json();
    return new Refusal(error.message, error.param);
  } catch {
    return new Refusal(`The server answered with status ${response.status}.`, null);
  }
}
