/** What the page just asked, as something to paste: for curl, and for our Python client. */

import { hasKey } from "./api.js";
import { dialog, h, toast } from "./dom.js";

/**
 * @typedef {object} Asked
 * @property {string} path with its query
 * @property {Record<string, any>} [json]
 * @property {string} python a call of the client, such as `client.search("a red star")`
 */

/**
 * A button that shows the last request in other words.
 * @param {() => Asked | null} asked
 */
export function copier(asked) {
  return h("button.quiet", { type: "button", onclick: () => open(asked()) }, "Copy as code");
}

/** A value as Python writes it. @param {any} value @returns {string} */
export function python(value) {
  if (value === null || value === undefined) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value)
    .map(([name, each]) => `${python(name)}: ${python(each)}`)
    .join(", ")}}`;
}

/** Named arguments, without those that are not given. @param {Record<string, any>} values */
export function keywords(values) {
  const given = Object.entries(values).filter(([, value]) => value !== undefined && value !== null && value !== "");
  return given.map(([name, value]) => `, ${name}=${python(value)}`).join("");
}

/** @param {Asked | null} asked */
function open(asked) {
  if (!asked) {
    toast("Ask something first; then it can be copied.");
    return;
  }
  const origin = location.origin;
  const bearer = hasKey() ? ` \\\n  -H "Authorization: Bearer $SEMBLANCE_API_KEY"` : "";
  const posted = asked.json
    ? ` \\\n  -H 'Content-Type: application/json' \\\n  -d ${quoted(JSON.stringify(shortened(asked.json)))}`
    : "";
  const curl = `curl ${quoted(origin + asked.path)}${bearer}${posted}`;
  const key = hasKey() ? `, api_key=os.environ["SEMBLANCE_API_KEY"]` : "";
  const script = [
    hasKey() ? "import os\n" : "",
    asked.python.includes("Path(") ? "from pathlib import Path\n\n" : "",
    "from app.client import Client\n\n",
    `with Client("${origin}"${key}) as client:\n    print(${asked.python})`,
  ].join("");
  const block = (/** @type {string} */ name, /** @type {string} */ text) =>
    h(
      "section",
      {},
      h("h3", {}, name),
      h("pre", { tabindex: 0 }, text),
      h("button", { type: "button", onclick: () => copy(text) }, `Copy ${name}`),
    );
  dialog("The same from a terminal or a program", block("curl", curl), block("Python", script));
}

/** Pictures are too long to read: what stands for them says so. @param {any} value @returns {any} */
function shortened(value) {
  if (typeof value === "string" && value.startsWith("data:")) return "<base64 of a picture>";
  if (Array.isArray(value)) return value.map(shortened);
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([name, each]) => [name, shortened(each)]));
  }
  return value;
}

/** @param {string} text */
function quoted(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

/** @param {string} text */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    toast("Copied.");
  } catch {
    toast("This browser does not let the page copy; select the text by hand.");
  }
}
