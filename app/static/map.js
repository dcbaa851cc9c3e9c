/** The room for the whole: a collection as points in the plane, to move about in, to ask, and to take a part of. */

import { Problem, call, path, show } from "./api.js";
import { counted, field, fill, h, number, settled } from "./dom.js";
import { address, go, here } from "./route.js";

/** @typedef {import("./types.js").Hit} Hit */
/** @typedef {{ ids: string[], values: (string | number | boolean | null)[] | null, points: Float32Array, total: number }} Plane */

const RADIUS = 3; // of a point, in pixels of the page
const REACH = 12; // pixels from the pointer within which a point is pointed at
const HUES = ["#3b5bdb", "#f08c00", "#2b8a3e", "#c2255c", "#0c8599", "#7048e8", "#a61e4d", "#5c940d", "#d9480f", "#1971c2"];
const CLUSTERS = " clusters"; // no key of metadata begins with a space where a reader would choose it
const GROUPS = 8;
const TAKEN = 200; // ids of a lasso that an address holds

/** @type {import("./types.js").Mount} */
export function mount(root, signal) {
  /** @type {import("./types.js").Collection[]} */
  let collections = [];
  let collection = "";
  /** @type {Plane | null} */
  let plane = null;
  let shownFor = "";
  let askedFor = "";
  /** @type {number[][]} the points of each colour */
  let coloured = [];
  /** @type {number[]} the points that are asked for, or taken by the lasso */
  let marked = [];
  /** @type {[number, number] | null} */
  let query = null;
  /** @type {[number, number][] | null} while the lasso is drawn */
  let lasso = null;
  // A place of the plane is at `x * scale + left` on the canvas.
  let view = { scale: 1, left: 0, top: 0 };
  let pointed = -1;

  const canvas = h("canvas.map", { tabindex: 0, role: "img", "aria-label": "Map of the collection" });
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
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
  const box = h("input", { type: "search", id: "box", placeholder: "Show where a query lies", "aria-label": "Query", maxlength: 2000 });
  const begin = h("button", { type: "button", hidden: true, onclick: () => unfold() }, "Make the map by UMAP");
  const bar = h("progress", { max: 1, value: 0, hidden: true, "aria-label": "UMAP" });
  const draw = h("input", { type: "checkbox" });
  const card = h("a.pointed", { hidden: true });
  const taken = h("div.taken", { hidden: true });
  const zoom = (/** @type {number} */ by) => h("button", { type: "button", "aria-label": by > 1 ? "Nearer" : "Farther", onclick: () => zoomAt(canvas.clientWidth / 2, canvas.clientHeight / 2, by) }, by > 1 ? "+" : "−");
  root.append(
    h("form.search", { onsubmit: (/** @type {Event} */ event) => (event.preventDefault(), change({ q: box.value.trim() })) }, box),
    h("div.fields", {}, field("Collection", picked), field("Laid out by", method), field("Coloured by", colour)),
    h("div.tools", {}, zoom(1.5), zoom(1 / 1.5), h("button", { type: "button", onclick: () => change({ at: "" }) }, "All of it"), h("label.check", {}, draw, "Draw around points"), begin),
    status,
    bar,
    h("div.plane", {}, canvas, card),
    legend,
    taken,
  );

  const resized = new ResizeObserver(() => {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = canvas.clientWidth * ratio;
    canvas.height = canvas.clientHeight * ratio;
    takeView();
    paint();
  });
  resized.observe(canvas);
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");
  scheme.addEventListener("change", () => paint(), { signal });
  signal.addEventListener("abort", () => resized.disconnect());
  listen();
  const listed = list();
  const kept = settled(400, keepView);
  const look = settled(60, picture);

  /** @param {Record<string, string>} values */
  function change(values) {
    const params = new URLSearchParams(here().params);
    for (const [name, value] of Object.entries(values)) value ? params.set(name, value) : params.delete(name);
    go("map", params);
  }

  /** Puts into the address where the reader has moved to, as the place in the middle and the scale. */
  function keepView() {
    if (signal.aborted || !plane) return;
    const middle = [(canvas.clientWidth / 2 - view.left) / view.scale, (canvas.clientHeight / 2 - view.top) / view.scale];
    const params = new URLSearchParams(here().params);
    params.set("at", [...middle, view.scale].map((value) => Number(value.toPrecision(5))).join(" "));
    go("map", params, { replace: true });
  }

  /** The view that the address tells, or the whole. */
  function takeView() {
    const [x, y, scale] = (here().params.get("at") ?? "").split(" ").map(Number);
    if (scale > 0 && Number.isFinite(x) && Number.isFinite(y)) {
      view = { scale, left: canvas.clientWidth / 2 - x * scale, top: canvas.clientHeight / 2 - y * scale };
    } else {
      fit();
    }
  }

  async function list() {
    try {
      collections = (await call("/collections", { signal })).collections;
      collections.sort((a, b) => Number(b.name === "default") - Number(a.name === "default"));
      fill(picked, collections.map(({ name, count }) => h("option", { value: name }, `${name} (${number(count)})`)));
    } catch (error) {
      fail(error);
    }
  }

  /** Which keys of the metadata can give the points their colours; a large collection takes its time to tell. */
  async function listKeys() {
    const asked = collection;
    fill(colour, h("option", { value: "" }, "Nothing"), h("option", { value: CLUSTERS }, "Clusters of this map"));
    const { metadata } = await call(path("collections", asked, "statistics"), { signal });
    if (collection !== asked) return;
    colour.append(...metadata.map((/** @type {import("./types.js").KeyStatistics} */ { key }) => h("option", { value: key }, key)));
    colour.value = here().params.get("color") ?? "";
  }

  async function load() {
    const params = here().params;
    const asked = [collection, params.get("by") ?? "", params.get("color") ?? ""].join("\n");
    if (asked === shownFor) return true;
    shownFor = asked;
    const umap = params.get("by") === "umap";
    const key = params.get("color") ?? "";
    const search = new URLSearchParams({ method: umap ? "umap" : "pca", ...(key && key !== CLUSTERS ? { color: key } : {}) });
    fill(status, "Laying it out…");
    begin.hidden = bar.hidden = true;
    try {
      let answer = await call(`${path("collections", collection, "map")}?${search}`, { signal });
      while (answer.state === "running") {
        bar.hidden = false;
        bar.value = answer.share;
        fill(status, `UMAP: ${number(answer.share * 100, 0)} % of its epochs. It goes on if you leave.`);
        await new Promise((resolve) => setTimeout(resolve, 1000));
        if (signal.aborted || shownFor !== asked) return false;
        answer = await call(`${path("collections", collection, "map")}?${search}`, { signal });
      }
      bar.hidden = true;
      if (shownFor !== asked) return false;
      begin.hidden = !umap;
      if (answer.state !== "done") {
        plane = null;
        paint();
        const none = "There is no map by UMAP yet. Making it takes a while and goes on in the background.";
        fill(status, answer.state === "none" ? none : "UMAP failed; the server's log says why.");
        return false;
      }
      adopt(answer, key === CLUSTERS);
      return true;
    } catch (error) {
      if (signal.aborted || shownFor !== asked) return false;
      plane = null;
      paint();
      fail(error);
      return false;
    }
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

  /** @param {{ ids: string[], values: Plane["values"], points: string, total: number }} answer @param {boolean} clustered */
  function adopt(answer, clustered) {
    const bytes = Uint8Array.from(atob(answer.points), (character) => character.charCodeAt(0));
    const points = new Float32Array(bytes.buffer);
    plane = { ids: answer.ids, values: clustered ? clusters(points) : answer.values, points, total: answer.total };
    coloured = [plane.ids.map((_, at) => at)];
    fill(legend);
    if (plane.values) {
      const counts = new Map();
      for (const value of plane.values) counts.set(value, (counts.get(value) ?? 0) + 1);
      const order = [...counts.entries()].sort((a, b) => b[1] - a[1]).map(([value]) => value);
      const place = new Map(order.map((value, at) => [value, Math.min(at, HUES.length - 1)]));
      coloured = HUES.map(() => []);
      plane.values.forEach((value, at) => coloured[place.get(value) ?? 0].push(at));
      const named = order.length > HUES.length ? [...order.slice(0, HUES.length - 1).map(String), "all others"] : order.map(String);
      fill(legend, named.map((name, at) => h("li", {}, swatch(HUES[at]), name)));
    }
    takeView();
    paint();
    const part = plane.ids.length < plane.total ? ` of ${number(plane.total)}` : "";
    fill(status, `${counted(plane.ids.length, "item")}${part}. Drag to move, turn the wheel to come nearer.`);
  }

  /** Shows the whole of it. */
  function fit() {
    if (!plane?.ids.length) return;
    let [low, high] = [[Infinity, Infinity], [-Infinity, -Infinity]];
    plane.points.forEach((value, at) => {
      low[at % 2] = Math.min(low[at % 2], value);
      high[at % 2] = Math.max(high[at % 2], value);
    });
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    const scale = 0.92 * Math.min(width / (high[0] - low[0] || 1), height / (high[1] - low[1] || 1));
    view = { scale, left: width / 2 - (scale * (low[0] + high[0])) / 2, top: height / 2 - (scale * (low[1] + high[1])) / 2 };
  }

  /** @param {number} at @returns {[number, number]} */
  function placeOf(at) {
    const points = /** @type {Plane} */ (plane).points;
    return [points[2 * at] * view.scale + view.left, points[2 * at + 1] * view.scale + view.top];
  }

  function paint() {
    const ratio = window.devicePixelRatio || 1;
    const style = getComputedStyle(canvas);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, canvas.clientWidth, canvas.clientHeight);
    if (!plane) return;
    const size = plane.ids.length > 20_000 ? 2 : RADIUS;
    // One colour after the other: a change of colour costs more than a point.
    coloured.forEach((points, hue) => {
      context.fillStyle = HUES[hue];
      for (const at of points) {
        const [x, y] = placeOf(at);
        if (x > -size && y > -size && x < canvas.clientWidth + size && y < canvas.clientHeight + size) context.fillRect(x - size / 2, y - size / 2, size, size);
      }
    });
    context.strokeStyle = style.color;
    context.lineWidth = 1.5;
    for (const at of pointed >= 0 ? [...marked, pointed] : marked) {
      const [x, y] = placeOf(at);
      context.beginPath();
      context.arc(x, y, RADIUS + 2, 0, 7);
      context.stroke();
    }
    if (query) {
      const [x, y] = [query[0] * view.scale + view.left, query[1] * view.scale + view.top];
      context.lineWidth = 3;
      context.beginPath();
      context.moveTo(x - 9, y);
      context.lineTo(x + 9, y);
      context.moveTo(x, y - 9);
      context.lineTo(x, y + 9);
      context.stroke();
    }
    if (lasso?.length) {
      context.lineWidth = 1.5;
      context.beginPath();
      lasso.forEach(([x, y]) => context.lineTo(x, y));
      context.closePath();
      context.stroke();
    }
  }

  /** @param {number} x @param {number} y @param {number} by */
  function zoomAt(x, y, by) {
    view = { scale: view.scale * by, left: x - (x - view.left) * by, top: y - (y - view.top) * by };
    paint();
    kept();
  }

  function listen() {
    /** @type {[number, number] | null} */
    let held = null;
    let moved = false;
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      held = [event.offsetX, event.offsetY];
      moved = false;
      if (draw.checked) lasso = [held];
    });
    canvas.addEventListener("pointermove", (event) => {
      const [x, y] = [event.offsetX, event.offsetY];
      if (lasso) {
        lasso.push([x, y]);
        paint();
      } else if (held) {
        moved ||= Math.hypot(x - held[0], y - held[1]) > 3;
        view.left += x - held[0];
        view.top += y - held[1];
        held = [x, y];
        paint();
        kept();
      } else {
        point(nearest(x, y));
      }
    });
    canvas.addEventListener("pointerup", (event) => {
      held = null;
      if (lasso) take(lasso);
      else if (!moved && pointed >= 0) go("search", new URLSearchParams({ c: collection, item: plane?.ids[pointed] ?? "" }));
      else if (!moved) point(nearest(event.offsetX, event.offsetY));
      lasso = null;
      paint();
    });
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      zoomAt(event.offsetX, event.offsetY, Math.exp(-event.deltaY / 300));
    });
    canvas.addEventListener("keydown", (event) => {
      const step = 40;
      const move = { ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] }[event.key];
      if (move) {
        view.left += move[0];
        view.top += move[1];
      } else if (event.key === "+" || event.key === "=") zoomAt(canvas.clientWidth / 2, canvas.clientHeight / 2, 1.25);
      else if (event.key === "-") zoomAt(canvas.clientWidth / 2, canvas.clientHeight / 2, 0.8);
      else if (event.key === "0") change({ at: "" });
      else return;
      event.preventDefault();
      paint();
      if (move) kept();
    });
  }

  /** The point under a place of the canvas, -1 if there is none. @param {number} x @param {number} y */
  function nearest(x, y) {
    let best = -1;
    let least = REACH ** 2;
    for (let at = 0; at < (plane?.ids.length ?? 0); at++) {
      const [px, py] = placeOf(at);
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < least) [best, least] = [at, distance];
    }
    return best;
  }

  /** Shows what a point stands for. @param {number} at */
  function point(at) {
    if (at === pointed) return;
    pointed = at;
    paint();
    card.hidden = at < 0;
    if (at < 0 || !plane) return;
    const id = plane.ids[at];
    const [x, y] = placeOf(at);
    card.href = address("search", new URLSearchParams({ c: collection, item: id }));
    card.style.left = `${Math.min(x + 12, canvas.clientWidth - 150)}px`;
    card.style.top = `${Math.min(y + 12, canvas.clientHeight - 150)}px`;
    fill(card, id);
    look(at, id);
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

  /** The points within a line that was drawn. @param {[number, number][]} line */
  function take(line) {
    marked = [];
    for (let at = 0; at < (plane?.ids.length ?? 0); at++) if (inside(placeOf(at), line)) marked.push(at);
    offer();
  }

  function offer() {
    taken.hidden = !marked.length;
    if (!marked.length || !plane) return;
    const ids = marked.map((at) => plane?.ids[at] ?? "");
    const among = new URLSearchParams({ c: collection });
    for (const id of ids.slice(0, TAKEN)) among.append("id", id);
    const many = ids.length > TAKEN ? `, the first ${TAKEN} of which can be looked at` : "";
    fill(taken, h("p", {}, `${counted(ids.length, "item")} in the line${many}.`), h("a.button", { href: address("search", among) }, "Search among them"));
  }

  /** Puts the query among its nearest, for the map has no place of its own for it. @param {string} text */
  async function ask(text) {
    const asked = `${shownFor}\n${text}`;
    if (asked === askedFor) return paint();
    askedFor = asked;
    query = null;
    marked = [];
    taken.hidden = true;
    if (text && plane) {
      const answer = await call(`/search?${new URLSearchParams({ q: text, k: "10", collection })}`, { signal });
      const places = new Map(plane.ids.map((id, at) => [id, at]));
      const hits = /** @type {Hit[]} */ (answer.hits).filter(({ id }) => places.has(id));
      marked = hits.map(({ id }) => places.get(id) ?? 0);
      const sums = marked.slice(0, 5).reduce((sum, at) => [sum[0] + (plane?.points[2 * at] ?? 0), sum[1] + (plane?.points[2 * at + 1] ?? 0)], [0, 0]);
      const among = Math.min(5, marked.length);
      if (among) query = [sums[0] / among, sums[1] / among];
      fill(status, `The cross is in the middle of the five items nearest to “${text}”; the rings are the nearest ten.`);
    }
    paint();
  }

  /** @param {unknown} error */
  function fail(error) {
    if (signal.aborted) return;
    const told = error instanceof Problem ? error : new Problem(0, String(error), "");
    bar.hidden = true;
    fill(status, told.message, told.requestId ? h("small", {}, ` (request ${told.requestId})`) : null);
  }

  /** @param {URLSearchParams} params */
  async function arrive(params) {
    await listed;
    if (signal.aborted) return;
    const wanted = params.get("c") || collections[0]?.name || "";
    if (!wanted) {
      fill(status, "There is no collection yet: add pictures in the room Search.");
      return;
    }
    try {
      if (wanted !== collection) {
        collection = wanted;
        listKeys().catch(fail);
      }
      picked.value = collection;
      method.value = params.get("by") === "umap" ? "umap" : "";
      colour.value = params.get("color") ?? "";
      box.value = params.get("q") ?? "";
      if (!(await load())) return;
      takeView();
      await ask(params.get("q") ?? "");
    } catch (error) {
      fail(error);
    }
  }

  return (params) => {
    arrive(params);
  };
}

/**
 * A group for each point, by k-means on the plane; the first centres lie as far from each other as they can, so the same
 * map has the same groups.
 * @param {Float32Array} points
 * @returns {string[]}
 */
function clusters(points) {
  const count = points.length / 2;
  /** @param {number} at @param {number[]} centre */
  const distance = (at, [x, y]) => (points[2 * at] - x) ** 2 + (points[2 * at + 1] - y) ** 2;
  const centres = count ? [[points[0], points[1]]] : [];
  const least = new Float32Array(count).fill(Infinity);
  while (centres.length < Math.min(GROUPS, count)) {
    let farthest = 0;
    for (let at = 0; at < count; at++) {
      least[at] = Math.min(least[at], distance(at, centres[centres.length - 1]));
      if (least[at] > least[farthest]) farthest = at;
    }
    centres.push([points[2 * farthest], points[2 * farthest + 1]]);
  }
  const group = new Uint8Array(count);
  for (let round = 0; round < 20; round++) {
    const sums = centres.map(() => [0, 0, 0]);
    for (let at = 0; at < count; at++) {
      for (let each = 0; each < centres.length; each++) if (distance(at, centres[each]) < distance(at, centres[group[at]])) group[at] = each;
      const sum = sums[group[at]];
      sum[0] += points[2 * at];
      sum[1] += points[2 * at + 1];
      sum[2] += 1;
    }
    sums.forEach(([x, y, own], each) => own && (centres[each] = [x / own, y / own]));
  }
  return Array.from(group, (each) => `cluster ${each + 1}`);
}

/** @param {string} colour */
function swatch(colour) {
  const shown = h("span.swatch");
  shown.style.background = colour;
  return shown;
}

/** Whether a place is within a closed line, by the even-odd rule. @param {[number, number]} place @param {[number, number][]} line */
function inside([x, y], line) {
  let within = false;
  for (let at = 0, before = line.length - 1; at < line.length; before = at++) {
    const [ax, ay] = line[at];
    const [bx, by] = line[before];
    if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) within = !within;
  }
  return within;
}
