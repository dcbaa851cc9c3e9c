/** The room for the whole: a collection as points in the plane, to move about in, to ask, and to take a part of. */

import { call, explain, listCollections, path, show } from "./api.js";
import { HUES, cloud, clusters } from "./cloud.js";
import { bytesOf, counted, field, fill, h, number, settled } from "./dom.js";
import { isAsked, pythonOf, queryOf, requestOf } from "./query.js";
import { address, go, here } from "./route.js";
import { copier } from "./snippets.js";

/** @typedef {import("./types.js").Hit} Hit */
/** @typedef {string | number | boolean | null} Value */
/** @typedef {{ ids: string[], values: Value[] | null, points: string, total: number }} Answer */

const CLUSTERS = " clusters"; // no key of metadata begins with a space where a reader would choose it
const GROUPS = 8;
const TAKEN = 200; // ids of a lasso that an address holds
const NEAREST = 10; // hits of a query that have a ring
const CROSSED = 5; // hits of which the cross is in the middle

/** @type {import("./types.js").Mount} */
export function mount(root, signal) {
  let collection = "";
  /** @type {string[]} */
  let ids = [];
  let points = new Float32Array();
  let shownFor = "";
  let askedFor = "";
  let keysOf = "";
  let pointed = -1;

  const canvas = h("canvas.map", { tabindex: 0, role: "img", "aria-label": "Map of the collection" });
  const status = h("p.status", { role: "status" });
  const legend = h("ul.legend", { "aria-label": "Colours" });
  const picked = h("select", { onchange: () => change({ c: picked.value, color: "", at: "" }) });
  const method = h(
    "select",
    { onchange: () => change({ by: method.value, at: "" }) },
    h("option", { value: "" }, "Principal components"),
    h("option", { value: "umap" }, "UMAP"),
  );
  const colour = h("select", { onchange: () => change({ color: colour.value }) });
  const box = h("input", {
    type: "search",
    id: "box",
    placeholder: "Show where a query lies",
    "aria-label": "Query",
    maxlength: 2000,
  });
  const begin = h("button", { type: "button", hidden: true, onclick: () => unfold() }, "Make the map by UMAP");
  const bar = h("progress", { max: 1, value: 0, hidden: true, "aria-label": "UMAP" });
  const draw = h("input", { type: "checkbox" });
  const card = h("a.pointed", { hidden: true });
  const taken = h("div.taken", { hidden: true });
  const button = (/** @type {string} */ label, /** @type {string} */ face, /** @type {() => void} */ onclick) =>
    h("button", { type: "button", "aria-label": label, onclick }, face);
  root.append(
    h("form.search", { onsubmit: submit }, box),
    h("div.fields", {}, field("Collection", picked), field("Laid out by", method), field("Coloured by", colour)),
    h(
      "div.tools",
      {},
      button("Nearer", "+", () => shown.zoom(1.5)),
      button("Farther", "−", () => shown.zoom(1 / 1.5)),
      button("All of it", "All of it", () => change({ at: "" })),
      h("label.check", {}, draw, "Draw around points"),
      begin,
      copier(asked),
    ),
    status,
    bar,
    h("div.plane", {}, canvas, card),
    legend,
    taken,
  );
  const look = settled(60, picture);
  const shown = cloud(
    canvas,
    {
      pointed: point,
      opened: (at) => go("search", new URLSearchParams({ c: collection, item: ids[at] })),
      taken: offer,
      moved: settled(400, keepView),
      whole: () => change({ at: "" }),
      draws: () => draw.checked,
    },
    signal,
  );
  /** @type {ReturnType<typeof listCollections> | null} */
  let listed = null;

  /** @param {Event} event */
  function submit(event) {
    event.preventDefault();
    change({ q: box.value.trim() });
    if (!shownFor) arrive(here().params); // it failed: the same is asked again
  }

  /** @param {Record<string, string>} values */
  function change(values) {
    const params = new URLSearchParams(here().params);
    for (const [name, value] of Object.entries(values)) value ? params.set(name, value) : params.delete(name);
    go("map", params);
  }

  /** The query that is shown, for a terminal or a program. */
  function asked() {
    const query = queryOf(new URLSearchParams({ c: collection, q: here().params.get("q") ?? "" }));
    return isAsked(query) ? { ...requestOf(query, NEAREST, 0), python: pythonOf(query, NEAREST) } : null;
  }

  /** Puts into the address which part is seen. */
  function keepView() {
    if (signal.aborted || !ids.length) return;
    const params = new URLSearchParams(here().params);
    const part = shown.seen().map((value) => Number(value.toPrecision(5)));
    params.set("at", part.join(" "));
    go("map", params, { replace: true });
  }

  /** Which keys of the metadata can give the points their colours; a large collection takes its time to tell. */
  async function listKeys() {
    const asked = collection;
    fill(colour, h("option", { value: "" }, "Nothing"), h("option", { value: CLUSTERS }, "Clusters of this map"));
    const { metadata } = await call(path("collections", asked, "statistics"), { signal });
    if (collection !== asked) return;
    colour.append(
      ...metadata.map((/** @type {import("./types.js").KeyStatistics} */ { key }) => h("option", { value: key }, key)),
    );
    colour.value = here().params.get("color") ?? "";
  }

  /** Shows the map that the address asks for, if there is one. -> whether it is shown */
  async function load() {
    const { params } = here();
    const [by, key] = [params.get("by") === "umap" ? "umap" : "pca", params.get("color") ?? ""];
    const asked = [collection, by, key].join("\n");
    if (asked === shownFor) return ids.length > 0;
    shownFor = asked;
    const search = new URLSearchParams({ method: by });
    if (key && key !== CLUSTERS) search.set("color", key);
    const url = `${path("collections", collection, "map")}?${search}`;
    fill(status, "Laying it out…");
    begin.hidden = bar.hidden = true;
    adopt({ ids: [], values: null, points: "", total: 0 }, false);
    let answer = await call(url, { signal });
    while (answer.state === "running") {
      bar.hidden = false;
      bar.value = answer.share;
      fill(status, `UMAP: ${number(answer.share * 100, 0)} % of its epochs. It goes on if you leave.`);
      await new Promise((resolve) => setTimeout(resolve, 1000));
      if (signal.aborted || shownFor !== asked) return false;
      answer = await call(url, { signal });
    }
    if (shownFor !== asked) return false;
    bar.hidden = true;
    begin.hidden = by !== "umap";
    if (answer.state !== "done") {
      const none = "There is no map by UMAP yet. Making it takes a while and goes on in the background.";
      fill(status, answer.state === "none" ? none : "UMAP failed; the server's log says why.");
      return false;
    }
    adopt(answer, key === CLUSTERS);
    const part = ids.length < answer.total ? ` of ${number(answer.total)}` : "";
    fill(status, `${counted(ids.length, "item")}${part}. Drag to move, turn the wheel to come nearer.`);
    return true;
  }

  async function unfold() {
    try {
      await call(path("collections", collection, "map"), { method: "POST", signal });
      shownFor = "";
      arrive(here().params);
    } catch (error) {
      fail(error);
    }
  }

  /** Shows an answer's points, in the colours of its values or of their clusters. @param {Answer} answer @param {boolean} clustered */
  function adopt(answer, clustered) {
    [ids, points] = [answer.ids, new Float32Array(bytesOf(answer.points).buffer)];
    const grouped = clustered ? clusters(points, GROUPS).map((group) => `cluster ${group + 1}`) : answer.values;
    fill(legend);
    if (grouped) {
      const { names, lists } = byValue(grouped);
      fill(
        legend,
        names.map((name, at) => h("li", {}, swatch(HUES[at]), name)),
      );
      shown.set(points, lists);
    } else {
      shown.set(points, [ids.map((_, at) => at)]);
    }
  }

  /** Shows what a point stands for. @param {number} at @param {[number, number]} place */
  function point(at, [x, y]) {
    pointed = at;
    card.hidden = at < 0;
    if (at < 0) return;
    card.href = address("search", new URLSearchParams({ c: collection, item: ids[at] }));
    card.style.left = `${Math.min(x + 12, canvas.clientWidth - 150)}px`;
    card.style.top = `${Math.min(y + 12, canvas.clientHeight - 150)}px`;
    fill(card, ids[at]);
    look(at, ids[at]);
  }

  /** The picture of a point, once the pointer rests on it. @param {number} at @param {string} id */
  async function picture(at, id) {
    if (pointed !== at) return;
    try {
      const item = await call(path("collections", collection, "items", id), { signal });
      if (pointed !== at) return;
      const image = h("img", { alt: item.caption ?? id, width: 128, height: 128 });
      if (item.url) await show(image, `${item.url}?size=256`);
      fill(card, item.url ? image : null, h("span", {}, item.caption ?? id));
    } catch {
      if (pointed === at) fill(card, `${id} is gone`);
    }
  }

  /** What can be done with the points within a line. @param {number[]} some */
  function offer(some) {
    taken.hidden = !some.length;
    const among = new URLSearchParams({ c: collection });
    for (const at of some.slice(0, TAKEN)) among.append("id", ids[at]);
    const many = some.length > TAKEN ? `, the first ${TAKEN} of which can be looked at` : "";
    fill(
      taken,
      h("p", {}, `${counted(some.length, "item")} in the line${many}.`),
      h("a.button", { href: address("search", among) }, "Search among them"),
    );
  }

  /** Puts the query among its nearest, for the map has no place of its own for it. @param {string} text */
  async function ask(text) {
    const asked = `${shownFor}\n${text}`;
    if (asked === askedFor) return;
    askedFor = asked;
    taken.hidden = true;
    shown.mark([], null);
    if (!text) return;
    const answer = await call(requestOf(queryOf(new URLSearchParams({ c: collection, q: text })), NEAREST, 0).path, {
      signal,
    });
    const numbers = new Map(ids.map((id, at) => [id, at]));
    const rings = /** @type {Hit[]} */ (answer.hits).flatMap(({ id }) => numbers.get(id) ?? []);
    const first = rings.slice(0, CROSSED);
    const mean = (/** @type {number} */ axis) =>
      first.reduce((sum, at) => sum + points[2 * at + axis], 0) / first.length;
    shown.mark(rings, first.length ? [mean(0), mean(1)] : null);
    fill(status, `The cross is in the middle of the five items nearest to “${text}”; the rings are the nearest ten.`);
  }

  /** @param {unknown} error */
  function fail(error) {
    if (signal.aborted) return;
    bar.hidden = true;
    listed = null; // whatever is done next asks for all of it again
    shownFor = askedFor = "";
    explain(status, error);
  }

  /** @param {URLSearchParams} params */
  async function arrive(params) {
    try {
      listed ??= listCollections(picked, signal);
      const wanted = params.get("c") || (await listed)[0]?.name || "";
      if (signal.aborted) return;
      if (!wanted) {
        fill(status, "There is no collection yet: add pictures in the room Search.");
        return;
      }
      await listed;
      collection = wanted;
      if (keysOf !== collection) {
        keysOf = collection;
        listKeys().catch((error) => {
          keysOf = "";
          if (!signal.aborted) explain(status, error);
        });
      }
      picked.value = collection;
      method.value = params.get("by") === "umap" ? "umap" : "";
      colour.value = params.get("color") ?? "";
      box.value = params.get("q") ?? "";
      const [x, y, scale] = (params.get("at") ?? "").split(" ").map(Number);
      if (!(await load())) return;
      shown.look(scale > 0 && Number.isFinite(x + y) ? [x, y, scale] : null);
      await ask(params.get("q") ?? "");
    } catch (error) {
      fail(error);
    }
  }

  return arrive;
}

/**
 * The numbers of the points by their values, the most frequent first; what there are too few colours for is one.
 * @param {Value[]} values
 * @returns {{ names: string[], lists: number[][] }}
 */
function byValue(values) {
  /** @type {Map<Value, number[]>} */
  const found = new Map();
  values.forEach((value, at) => {
    const list = found.get(value);
    if (list) list.push(at);
    else found.set(value, [at]);
  });
  const sorted = [...found].sort(([, a], [, b]) => b.length - a.length);
  const own = sorted.length > HUES.length ? HUES.length - 1 : sorted.length;
  const names = sorted.slice(0, own).map(([value]) => String(value ?? "none"));
  const lists = sorted.slice(0, own).map(([, list]) => list);
  if (own < sorted.length) {
    names.push("all others");
    lists.push(sorted.slice(own).flatMap(([, list]) => list));
  }
  return { names, lists };
}

/** @param {string} colour */
function swatch(colour) {
  const shown = h("span.swatch");
  shown.style.background = colour;
  return shown;
}
