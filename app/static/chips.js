/** What is mixed into a query and what bounds it, as chips that can be weighed and taken away. */

import { counted, fill, h } from "./dom.js";
import { kept } from "./pictures.js";
import { written } from "./query.js";

/** @typedef {import("./query.js").Part} Part */

/**
 * @param {HTMLElement} place
 * @param {import("./query.js").Query} query
 * @param {(name: "with" | "filter" | "id", at: number, instead?: string) => void} replace puts something, or nothing, in
 *   the place of one of several parameters of the address; of `id` all are meant
 */
export function drawChips(place, query, replace) {
  const parts = query.parts.map((part, at) => {
    const weight = h("input", {
      type: "number",
      step: 0.1,
      min: -10,
      max: 10,
      value: part.weight,
      "aria-label": "Weight",
      onchange: () => replace("with", at, written({ ...part, weight: Number(weight.value) || 1 })),
    });
    const away = removal(() => replace("with", at));
    return h(part.weight < 0 ? "li.away" : "li", {}, weight, label(part), away);
  });
  const filters = query.filters.map((value, at) => {
    const away = removal(() => replace("filter", at));
    return h("li", {}, value, away);
  });
  const all = removal(() => replace("id", 0));
  const among = query.ids.length > 0 && h("li", {}, `among ${counted(query.ids.length, "item")}`, all);
  fill(place, parts, among, filters);
}

/** @param {Part} part */
function label({ kind, value }) {
  if (kind === "text") return value;
  if (kind === "item") return `like ${value}`;
  const source = kept(value);
  return source ? h("img", { src: source, alt: "your picture", width: 28, height: 28 }) : "a picture that is gone";
}

/** @param {() => void} act */
function removal(act) {
  return h("button", { type: "button", "aria-label": "Take this away", onclick: act }, "×");
}
