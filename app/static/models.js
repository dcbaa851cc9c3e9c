/** The room for models: what is loaded, what each can do, and the figures of its card. */

import { call, explain, path } from "./api.js";
import { fill, h, number } from "./dom.js";
import { copier } from "./snippets.js";

/** @typedef {import("./types.js").Model} Model */

/** @type {import("./types.js").Mount} */
export function mount(root, signal) {
  const status = h("p.status", { role: "status" }, "Looking…");
  const list = h("div.cards");
  const copy = copier(() => ({ path: path("models"), python: "client.models()" }));
  root.append(h("div.tools", {}, copy), status, list);
  load();

  async function load() {
    try {
      const { data } = await call("/models", { signal });
      fill(status, data.length ? "" : "No model is loaded: put one into the folder of checkpoints.");
      fill(list, data.map(card));
    } catch (error) {
      if (!signal.aborted) explain(status, error);
    }
  }

  return () => {};
}

/** @param {Model} model */
function card(model) {
  const takes = model.takes.map((kind) => (kind === "image" ? "pictures" : "texts")).join(" and ");
  const makes = model.makes.includes("image") ? "pictures" : `embeddings of ${model.dimensions} numbers`;
  const facts = {
    Architecture: model.architecture,
    Takes: takes,
    Makes: makes,
    "Pictures of": `${model.size} × ${model.size} pixels`,
    Styles: model.styles.join(", "),
    "Computed by": Object.entries(model.backends)
      .map(([tower, backend]) => `${backend} (${tower})`)
      .join(", "),
    Fingerprint: model.fingerprint,
    "Data licence": model.license ?? "",
  };
  const metrics = Object.entries(model.metrics);
  return h(
    "article.card",
    { id: `model-${model.id}` },
    h("h2", {}, model.id),
    h(
      "dl",
      {},
      ...Object.entries(facts).flatMap(([name, value]) => (value ? [h("dt", {}, name), h("dd", {}, value)] : [])),
    ),
    metrics.length ? figures(metrics) : h("p", {}, "Its card has no figures."),
    curves(model),
  );
}

/** @param {[string, number][]} metrics */
function figures(metrics) {
  return h(
    "table",
    {},
    h("caption", {}, "Measured, as its card says"),
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Figure"), h("th", { scope: "col" }, "Value"))),
    h(
      "tbody",
      {},
      metrics.map(([name, value]) =>
        h("tr", {}, h("th", { scope: "row" }, name.replaceAll("_", " ")), h("td", {}, number(value))),
      ),
    ),
  );
}

/** How its training went, once it is opened. @param {Model} model */
function curves(model) {
  const place = h("div", { role: "status" });
  const open = h("details", {}, h("summary", {}, "Training"), place);
  open.addEventListener(
    "toggle",
    async () => {
      if (!open.open || place.childElementCount) return;
      try {
        const { series } = await call(path("models", model.id, "history"));
        const shown = Object.entries(/** @type {Record<string, [number, number][]>} */ (series)).map(([name, points]) =>
          curve(name, points),
        );
        fill(
          place,
          shown.length ? h("div.curves", {}, shown) : h("p", {}, "Its checkpoint holds no record of the training."),
        );
      } catch (error) {
        explain(place, error);
      }
    },
    false,
  );
  return open;
}

/** One figure over the steps, as a line. @param {string} name @param {[number, number][]} points */
function curve(name, points) {
  const [width, height] = [320, 96];
  const values = points.map(([, value]) => value);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const last = points[points.length - 1];
  const x = (/** @type {number} */ step) => ((step - points[0][0]) / (last[0] - points[0][0] || 1)) * width;
  const y = (/** @type {number} */ value) => height - 4 - ((value - low) / (high - low || 1)) * (height - 8);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("role", "img");
  svg.setAttribute(
    "aria-label",
    `${name}: from ${number(values[0])} to ${number(last[1])} after ${number(last[0])} steps`,
  );
  const line = document.createElementNS(svg.namespaceURI, "polyline");
  line.setAttribute("points", points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" "));
  svg.append(line);
  return h("figure", {}, h("figcaption", {}, `${name.replaceAll("_", " ")}: ${number(last[1])}`), svg);
}
