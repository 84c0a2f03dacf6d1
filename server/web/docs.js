// The reference, drawn from /openapi.json, so it can not differ from what the server says of itself.

import { description, useKey } from "/static/api.js";
import { make } from "/static/view.js";

const asked = document.getElementById("key-form");
const status = document.getElementById("status");
const contents = document.getElementById("contents");
const operations = document.getElementById("operations");

function operation(api, path, method, described) {
  const id = `${method}-${path}`.replaceAll(/[^a-z0-9]+/gi, "-");
  contents.append(make("a", { href: `#${id}` }, `${method.toUpperCase()} ${path}`));
  const title = make("h2", {}, make("span", { class: "method" }, method.toUpperCase()), path);
  const section = make("section", { class: "operation", id }, title);
  if (described.description) section.append(make("p", {}, described.description));
  if (described.parameters) section.append(make("h3", {}, "Parameters"), parameters(api, described.parameters));
  for (const [type, body] of Object.entries(described.requestBody?.content ?? {})) {
    section.append(make("h3", {}, `Body: ${type}`), fields(api, body.schema), ...examples(body));
  }
  section.append(make("h3", {}, "Answers"), ...Object.entries(described.responses).map((each) => answer(api, ...each)));
  return section;
}

function answer(api, status, response) {
  const details = make("details", {}, make("summary", {}, make("b", {}, status), ` ${response.description}`));
  const json = response.content?.["application/json"];
  if (json?.example) details.append(code(json.example));
  else if (json?.schema) details.append(...tables(api, json.schema));
  const event = response.content?.["text/event-stream"]?.["x-itemSchema"];
  if (event) {
    const data = event.properties.data.contentSchema;
    details.append(make("h4", {}, "Data of an event: text/event-stream"), ...tables(api, data));
  }
  return details;
}

/** Parameters in the form of fields: their names say where they go. */
function parameters(api, described) {
  const named = described.map(({ name, in: place, schema, description, required }) => [
    `${name} (${place})`,
    { ...schema, description: description ?? schema.description, required },
  ]);
  const required = named.filter(([, { required }]) => required).map(([name]) => name);
  return fields(api, { properties: Object.fromEntries(named), required });
}

function examples(body) {
  if (body.example) return [make("h3", {}, "Example"), code(body.example)];
  return Object.values(body.examples ?? {}).flatMap(({ summary, value }) => [make("h3", {}, summary), code(value)]);
}

/** The fields of a body; of one of several bodies, a table each. */
function tables(api, schema) {
  return (schema.anyOf ?? [schema]).map((body) => fields(api, body));
}

function fields(api, schema) {
  const { properties = {}, required = [] } = resolved(api, schema);
  const rows = Object.entries(properties).map(([name, property]) => {
    const mark = required.includes(name) && schema.$ref === undefined ? " (required)" : "";
    return make(
      "tr",
      {},
      make("th", { scope: "row" }, make("code", {}, name), mark),
      make("td", {}, kind(api, property)),
      make("td", {}, property.description ?? ""),
    );
  });
  const caption = schema.$ref ? [make("caption", {}, nameOf(schema))] : [];
  return make("div", { class: "scroll", tabindex: "0" }, make("table", {}, ...caption, make("tbody", {}, ...rows)));
}

/** What a value may be, in a few words. */
function kind(api, property) {
  if (property.$ref) return inside(api, property);
  if (property.anyOf) return property.anyOf.map((each) => kind(api, each)).filter((each) => each !== "null").join(" or ");
  if (property.const !== undefined) return JSON.stringify(property.const);
  if (property.enum) return property.enum.map((each) => JSON.stringify(each)).join(", ");
  if (property.type === "array") return `list of ${kind(api, property.items)}`;
  const { minimum, maximum } = property;
  const range = minimum === undefined ? "" : ` ${minimum} to ${maximum ?? "…"}`;
  return `${property.type ?? "anything"}${range}`;
}

function inside(api, property) {
  return `{ ${Object.keys(resolved(api, property).properties ?? {}).join(", ")} }`;
}

function resolved(api, schema) {
  return schema.$ref ? api.components.schemas[nameOf(schema)] : schema;
}

function nameOf({ $ref }) {
  return $ref.split("/").at(-1);
}

function code(value) {
  return make("pre", {}, make("code", {}, JSON.stringify(value, null, 2)));
}

function show(api) {
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, described] of Object.entries(methods)) {
      operations.append(operation(api, path, method, described));
    }
  }
}

/** Read the description; where it takes an API key that this tab has not, ask for one. */
async function begin() {
  try {
    show(await description());
    status.hidden = asked.hidden = true;
  } catch (error) {
    status.textContent = error.message;
    asked.hidden = error.status !== 401;
    if (!asked.hidden) asked.elements.key.focus();
  }
}

asked.addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(asked.elements.key.value);
  begin();
});

begin();
