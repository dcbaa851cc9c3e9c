/** The room for labels: which of the reader's words fits a picture, by probability and by cosine. */

import { Problem, call, explain, path, request } from "./api.js";
import { counted, field, fill, h, number, settled, toast } from "./dom.js";
import { chooser, keep, kept, receive } from "./pictures.js";
import { go, here } from "./route.js";
import { copier, keywords, python } from "./snippets.js";

/** @typedef {{ index: number, scores: { label: string, score: number, cosine: number }[] }} Classified */

const LABELS = ["a red circle", "a blue square", "a green star"];
const SHOWN = 12; // labels of one picture, the best ones
// What pictures often show. Labels that all fit worse than one of these do not fit.
const COMMON = ["person", "animal", "plant", "food", "building", "vehicle", "landscape", "text", "drawing", "pattern"];

/** @type {import("./types.js").Mount} */
export function mount(root, signal) {
  /** @type {AbortController | null} */
  let asking = null;
  let askedFor = "";
  let ready = false; // whether what is shown could be asked

  const labels = h("textarea", { rows: 6, spellcheck: "false" });
  const templates = h("textarea", { rows: 2, spellcheck: "false", placeholder: "a photo of a {}" });
  const each = h("input", { type: "checkbox", onchange: () => change() });
  const status = h("p.status", { role: "status" });
  const results = h("ul.classified", { "aria-label": "Pictures and their labels" });
  const typed = settled(300, () => change(undefined, true));
  labels.addEventListener("input", typed);
  templates.addEventListener("input", typed);
  const sample = h("button", { type: "button", onclick: () => pick() }, "Take some of the collection");
  root.append(
    h(
      "div.twocolumns",
      {},
      h(
        "form.side",
        { onsubmit: (/** @type {Event} */ event) => event.preventDefault() },
        h(
          "div.tools",
          {},
          chooser("Choose pictures", (files) => add(files), { multiple: true }),
          sample,
        ),
        field("Labels, one a line", labels),
        field("Templates, one a line, with {} for the label", templates),
        h("label.check", {}, each, "Each label by itself, not one among them"),
        h("div.tools", {}, copier(asked)),
      ),
      h("div", {}, status, results),
    ),
  );
  receive(root, (files) => add(files), signal);
  signal.addEventListener("abort", () => asking?.abort());

  /** Goes to where the form is, what was just typed too. @param {string[]} [pictures] @param {boolean} [replace] */
  function change(pictures = here().params.getAll("picture"), replace = false) {
    const params = new URLSearchParams();
    for (const name of pictures) params.append("picture", name);
    for (const label of lines(labels)) params.append("label", label);
    for (const template of lines(templates)) params.append("template", template);
    if (each.checked) params.set("multi", "1");
    go("classify", params, { replace });
  }

  /** @param {Blob[]} files */
  async function add(files) {
    const names = here().params.getAll("picture");
    for (const file of files) {
      try {
        names.push(await keep(file));
      } catch (error) {
        toast(error instanceof Problem ? error.message : `A file cannot be read: ${error}`);
      }
    }
    change(names);
  }

  /** Some pictures of the collection that comes first, to try it with. */
  async function pick() {
    try {
      const { collections } = await call("/collections", { signal });
      const found = collections.find((/** @type {import("./types.js").Collection} */ { count }) => count > 0);
      if (!found) return toast("No collection has pictures yet; add some in the room Search.");
      const { items } = await call(`${path("collections", found.name, "items")}?limit=200`, { signal });
      const urls = items.flatMap((/** @type {import("./types.js").Item} */ { url }) => (url ? [url] : []));
      const chosen = Array.from(
        { length: Math.min(4, urls.length) },
        (_, at) => urls[Math.floor(((at + Math.random()) * urls.length) / 4)],
      );
      add(await Promise.all(chosen.map(async (url) => (await request(url, { signal })).blob())));
    } catch (error) {
      fail(error);
    }
  }

  /** @returns {import("./snippets.js").Asked | null} */
  function asked() {
    if (!ready) return null;
    const { names, multi } = state();
    const options = { templates: lines(templates).length ? lines(templates) : null, multi_label: multi || null };
    const pictures = names.map((_, at) => `Path("picture${at + 1}.jpg")`).join(", ");
    return {
      path: "/zero-shot",
      json: body(),
      python: `client.zero_shot([${pictures}], ${python(lines(labels))}${keywords(options)})`,
    };
  }

  function state() {
    const { params } = here();
    return {
      names: params.getAll("picture").filter((name) => kept(name) !== null),
      multi: params.get("multi") !== null,
    };
  }

  /** @param {string[]} [words] */
  function body(words = lines(labels)) {
    const { names, multi } = state();
    const given = lines(templates);
    return {
      input: names.map((name) => ({ image: kept(name) })),
      labels: words,
      multi_label: multi,
      ...(given.length ? { templates: given } : {}),
    };
  }

  async function run() {
    asking?.abort();
    asking = new AbortController();
    const stop = asking.signal;
    const { names } = state();
    const lost = here().params.getAll("picture").length - names.length;
    const words = lines(labels);
    ready = names.length > 0 && words.length > 0;
    if (!ready) {
      fill(results);
      const gone = lost
        ? `${counted(lost, "picture")} of this address are gone: the page keeps them only until the tab is closed. `
        : "";
      fill(
        status,
        gone,
        names.length ? "Write at least one label." : "Drop, paste or choose pictures to see which label fits.",
      );
      return;
    }
    results.setAttribute("aria-busy", "true");
    try {
      const started = performance.now();
      const ask = (/** @type {string[]} */ labels) => call("/zero-shot", { json: body(labels), signal: stop });
      const [answer, common] = await Promise.all([ask(words), ask(COMMON)]);
      draw(names, answer.data, common.data);
      const took = number(Math.round(performance.now() - started));
      fill(
        status,
        `${counted(names.length, "picture")}, ${counted(words.length, "label")}, by ${answer.model}, in ${took} ms`,
      );
    } catch (error) {
      if (!stop.aborted) fail(error);
    } finally {
      if (!stop.aborted) results.removeAttribute("aria-busy");
    }
  }

  /** @param {string[]} names @param {Classified[]} data @param {Classified[]} common */
  function draw(names, data, common) {
    fill(
      results,
      data.map(({ scores }, at) => {
        const best = Math.max(...scores.map(({ cosine }) => cosine));
        const other = common[at].scores.reduce((a, b) => (a.cosine > b.cosine ? a : b));
        const poor = other.cosine > best && !scores.some(({ label }) => label === other.label);
        const bars = scores.slice(0, SHOWN).map(({ label, score, cosine }) => {
          const bar = h("meter", { min: 0, max: 1, value: score, "aria-label": label });
          bar.value = score;
          return h(
            "li",
            {},
            h("span.label", {}, label),
            bar,
            h("span.score", {}, `${number(score * 100, 1)} %`),
            h("span.cosine", {}, cosine.toFixed(3)),
          );
        });
        const away = h(
          "button",
          {
            type: "button",
            "aria-label": `Take picture ${at + 1} away`,
            onclick: () => change(names.filter((_, index) => index !== at)),
          },
          "×",
        );
        return h(
          "li",
          {},
          h("figure", {}, h("img", { src: kept(names[at]), alt: `Picture ${at + 1}: ${scores[0].label}` }), away),
          h(
            "div",
            {},
            poor
              ? h(
                  "p.warning",
                  {},
                  `None of these fits well: “${other.label}”, which was not among them, is nearer (cosine ${other.cosine.toFixed(3)}).`,
                )
              : null,
            h("ol.bars", { "aria-label": "Labels, best first" }, bars),
            h("p.legend", {}, "probability among these labels, and cosine"),
          ),
        );
      }),
    );
  }

  /** @param {unknown} error */
  function fail(error) {
    if (signal.aborted) return;
    ready = false;
    fill(results);
    explain(status, error);
  }

  return (params) => {
    const words = params.getAll("label");
    if (document.activeElement !== labels) labels.value = (words.length ? words : LABELS).join("\n");
    if (document.activeElement !== templates) templates.value = params.getAll("template").join("\n");
    each.checked = params.get("multi") !== null;
    if (params.toString() !== askedFor || !ready) run();
    askedFor = params.toString();
  };
}

/** The lines of a field that say something, each once. @param {HTMLTextAreaElement} area */
function lines(area) {
  return [...new Set(area.value.split("\n").map((line) => line.trim()))].filter((line) => line);
}
