/** The room for looking: one box, what is mixed into the query, and the grid of what a collection holds nearest to it. */

import { Problem, call, explain, listCollections, path } from "./api.js";
import { drawChips } from "./chips.js";
import { detail, isLeaving } from "./detail.js";
import { counted, field, fill, h, number, settled, toast } from "./dom.js";
import { resultGrid } from "./grid.js";
import { chooser, keep, receive } from "./pictures.js";
import { equals, isAsked, isNarrowed, missing, pythonOf, queryOf, requestOf, written } from "./query.js";
import { go, here } from "./route.js";
import { copier } from "./snippets.js";
import { upload } from "./upload.js";

/** @typedef {import("./types.js").Hit} Hit */
/** @typedef {import("./types.js").Item} Item */
/** @typedef {import("./types.js").Collection} Collection */

const PAGE = 48; // hits of one call
const NEAR = 0.97; // cosine from which two pictures count as one where they are folded
const STANDING_OUT = 0.08; // cosine by which a hit must pass what the collection gives any query
const CLOSE = 0.65; // share that it must have of the cosine to its own caption

/** @type {import("./types.js").Mount} */
export function mount(root, signal) {
  /** @type {Collection[]} */
  let collections = [];
  /** @type {AbortController | null} */
  let asking = null;
  let params = here().params;
  let query = queryOf(params);
  /** @type {string | null} */
  let shownFor = null;
  let suggestedFor = "";
  /** @type {Hit[]} */
  let hits = [];
  /** @type {string | null} where a page that is no search goes on */
  let after = "";
  let more = false;
  /** @type {Map<string, string>} item -> the first of its group of near-duplicates */
  let groups = new Map();
  let groupsOf = "";

  const box = h("input", {
    type: "search",
    id: "box",
    placeholder: "Describe a picture",
    "aria-label": "Search",
    autocomplete: "off",
    spellcheck: "false",
    maxlength: 2000,
  });
  const chips = h("ul.chips", { "aria-label": "Mixed into the query" });
  const picked = h("select", { onchange: () => change({ c: picked.value }) });
  const target = h(
    "select",
    { onchange: () => change({ target: target.value }) },
    h("option", { value: "" }, "Pictures and texts"),
    h("option", { value: "image" }, "Pictures"),
    h("option", { value: "text" }, "Texts"),
  );
  const leastShown = h("span.value");
  const least = h("input", { type: "range", min: 0, max: 1, step: 0.01, value: 0 });
  const filter = h("input", { type: "text", list: "keys", placeholder: "year>=2024 or label:cat" });
  const keys = h("datalist", { id: "keys" });
  const fold = h("input", { type: "checkbox", onchange: () => change({ fold: fold.checked ? "1" : "" }) });
  const away = h("input", { type: "text", placeholder: "and Enter", maxlength: 2000 });
  const toward = h("input", { type: "text", placeholder: "and Enter", maxlength: 2000 });
  const status = h("p.status", { role: "status" });
  const grid = resultGrid(() => box.focus());
  const moreButton = h("button", { type: "button", hidden: true, onclick: () => next() }, "Show more");
  const empty = h("div.empty", { hidden: true });
  const tools = h(
    "div.tools",
    {},
    chooser("Search with a picture", (files) => withPictures(files)),
    chooser("Add pictures", (files) => add(files), { multiple: true }),
    chooser("Add a folder", (files) => add(files), { folder: true }),
    copier(() =>
      isAsked(query) && !missing(query).length ? { ...requestOf(query, PAGE, 0), python: pythonOf(query, PAGE) } : null,
    ),
  );
  const form = h(
    "form.search",
    { role: "search", onsubmit: (/** @type {Event} */ event) => event.preventDefault() },
    box,
    tools,
    chips,
    h(
      "details.options",
      {},
      h("summary", {}, "More to ask"),
      h(
        "div.fields",
        {},
        field("Collection", picked),
        field("Find", target),
        field("Cosine at least ", least, leastShown),
        field("Only where", filter),
        field("Mix in a text", toward),
        field("Lead away from a text", away),
        h("label.check", {}, fold, "Fold near-duplicates"),
      ),
      keys,
    ),
  );
  root.append(form, status, grid.element, empty, h("div.more", {}, moreButton));

  const typed = settled(160, () => box.value !== (here().params.get("q") ?? "") && change({}, true));
  box.addEventListener("input", typed);
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter") {
      change({});
      if (shownFor === null) arrive(here().params).catch(fail); // it failed: the same is asked again
    }
    if (event.key !== "ArrowDown") return;
    event.preventDefault();
    grid.focus(0);
  });
  least.addEventListener("input", () => fill(leastShown, Number(least.value) ? least.value : "any"));
  least.addEventListener("change", () => change({ min: Number(least.value) ? least.value : "" }));
  const entered = (/** @type {HTMLInputElement} */ input, /** @type {(value: string) => void} */ act) =>
    input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !input.value.trim()) return;
      act(input.value.trim());
      input.value = "";
    });
  entered(filter, (value) => append("filter", value));
  entered(toward, (value) => append("with", written({ weight: 0.5, kind: "text", value })));
  entered(away, (value) => append("with", written({ weight: -0.5, kind: "text", value })));
  receive(root, (files) => (files.length > 1 ? add(files) : withPictures(files)), signal);
  const watcher = new IntersectionObserver(([entry]) => entry.isIntersecting && more && next(), {
    rootMargin: "600px",
  });
  watcher.observe(moreButton);
  signal.addEventListener("abort", () => {
    watcher.disconnect();
    asking?.abort();
  });
  /** @type {Promise<void> | null} */
  let listed = null;

  /** What the address says, and what was typed since. */
  function current() {
    const params = new URLSearchParams(here().params);
    if (box.value) params.set("q", box.value);
    else params.delete("q");
    params.delete("item");
    return params;
  }

  /**
   * Goes to where these parameters are changed; an empty value takes one away.
   * @param {Record<string, string>} values
   * @param {boolean} [replace]
   */
  function change(values, replace = false) {
    const changed = current();
    for (const [name, value] of Object.entries(values)) {
      if (value) changed.set(name, value);
      else changed.delete(name);
    }
    go("search", changed, { replace });
  }

  /** @param {string} name @param {string} value */
  function append(name, value) {
    const changed = current();
    changed.append(name, value);
    go("search", changed);
  }

  /** Puts a value in the place of one of several, or none; of `id` all are meant. @type {Parameters<typeof drawChips>[2]} */
  function replace(name, at, instead) {
    const changed = current();
    const values = name === "id" ? [] : changed.getAll(name);
    changed.delete(name);
    if (instead) values[at] = instead;
    else values.splice(at, 1);
    for (const value of values) changed.append(name, value);
    go("search", changed);
    if (!instead) box.focus();
  }

  /** @param {File[]} files */
  async function withPictures(files) {
    if (!files.length) return;
    try {
      append("with", written({ weight: 1, kind: "picture", value: await keep(files[0]) }));
    } catch (error) {
      toast(error instanceof Problem ? error.message : `This file cannot be read: ${error}`);
    }
  }

  /** @param {File[]} files */
  async function add(files) {
    if (!files.length) return;
    await upload(query.collection || "default", files);
    await list();
    groupsOf = "";
    arrive(here().params, true);
  }

  async function list() {
    collections = await listCollections(picked, signal);
  }

  /** Until the collections are known; a server that did not say is asked again the next time. */
  function known() {
    listed ??= list().catch((error) => {
      listed = null;
      throw error;
    });
    return listed;
  }

  /** What can be asked of a collection's metadata; a large one takes its time to tell. @param {string} collection */
  async function suggest(collection) {
    fill(keys);
    try {
      const { metadata } = await call(path("collections", collection, "statistics"), { signal });
      if (collection !== query.collection) return;
      fill(
        keys,
        metadata.flatMap((/** @type {import("./types.js").KeyStatistics} */ { key, frequent, min }) => [
          ...frequent.map(({ value }) => h("option", { value: equals(key, value) })),
          min === null ? null : h("option", { value: `${key}>=${min}` }),
        ]),
      );
    } catch {
      // They are only suggestions.
    }
  }

  /** Asks anew, unless all that changed is which item is open. @param {boolean} [anyway] */
  async function run(anyway) {
    const asked = new URLSearchParams(params);
    asked.delete("item");
    if (!anyway && asked.toString() === shownFor) return;
    shownFor = asked.toString();
    hits = [];
    after = "";
    asking?.abort();
    asking = new AbortController();
    const gone = missing(query);
    if (gone.length) {
      settle(
        "The picture that was searched with is gone: this page keeps it only until the tab is closed. Choose it again.",
      );
      return;
    }
    if (!isAsked(query) && query.least > 0) {
      settle("A least cosine bounds a search: describe a picture, or mix something in.");
      return;
    }
    await page(asking.signal);
  }

  function next() {
    if (asking && more) page(asking.signal);
  }

  /** The next page of hits or, where nothing is asked, of the collection. @param {AbortSignal} stop */
  async function page(stop) {
    more = false;
    grid.element.setAttribute("aria-busy", "true");
    try {
      const found = isAsked(query) ? await searched(stop) : await browsed(stop);
      if (stop.aborted) return;
      if (params.get("fold") && groupsOf !== found.collection) {
        groups = await duplicates(found.collection, stop);
        groupsOf = found.collection;
      }
      const first = hits.length === 0;
      hits.push(...found.hits);
      draw(found.hits, first);
      if (isAsked(query)) fill(status, `${counted(hits.length, "result")} in ${number(found.took, 1)} ms`);
      else tellCount();
      if (first && !hits.length) nothing();
      else if (first && isAsked(query) && !query.filters.length && !query.ids.length && query.least <= 0)
        await judge(stop).catch(() => {}); // it is only a remark
    } catch (error) {
      if (!stop.aborted && !hits.length) fail(error);
      else if (!stop.aborted) {
        more = true; // what is shown stays, and the button asks again
        explain(status, error);
      }
    } finally {
      if (!stop.aborted) grid.element.removeAttribute("aria-busy");
    }
  }

  /** How many items are shown of a collection, or can be. */
  function tellCount() {
    const place = collections.find(({ name }) => name === query.collection);
    const told = isNarrowed(query)
      ? `${more ? "at least " : ""}${counted(hits.length, "item")}`
      : counted(place?.count ?? 0, "item");
    fill(status, place ? `${told} in ${place.name}` : "");
  }

  /** @param {AbortSignal} stop */
  async function searched(stop) {
    const { path: url, json } = requestOf(query, PAGE, hits.length);
    const answer = await call(url, { json, signal: stop });
    more = answer.hits.length === PAGE;
    return {
      hits: /** @type {Hit[]} */ (answer.hits),
      collection: String(answer.collection),
      took: Number(answer.took_ms),
    };
  }

  /** @param {AbortSignal} stop */
  async function browsed(stop) {
    const { collection } = query;
    if (!collection) return { hits: [], collection, took: 0 };
    const search = new URLSearchParams({ limit: String(PAGE), after: after ?? "", target: query.target });
    for (const id of query.ids) search.append("id", id);
    for (const filter of query.filters) search.append("filter", filter);
    const url = `${path("collections", collection, "items")}?${search}`;
    const answer = await call(url, { signal: stop });
    after = answer.next;
    more = after !== null;
    return { hits: /** @type {Hit[]} */ (answer.items), collection, took: 0 };
  }

  /** @param {string} collection @param {AbortSignal} stop */
  async function duplicates(collection, stop) {
    const url = `${path("collections", collection, "duplicates")}?threshold=${NEAR}&limit=1000`;
    const answer = await call(url, { signal: stop });
    return new Map(answer.groups.flatMap((/** @type {Item[]} */ group) => group.map(({ id }) => [id, group[0].id])));
  }

  /**
   * Says so where nothing is close, for every query has a nearest item: where that is hardly nearer than what lies in the
   * middle of the collection, or much farther from the text than from the caption that it has itself.
   * @param {AbortSignal} stop
   */
  async function judge(stop) {
    const [best] = hits;
    const count = collections.find(({ name }) => name === query.collection)?.count ?? 0;
    if (!best || count < 20) return;
    const score = async (/** @type {typeof query} */ asked, /** @type {number} */ offset) => {
      const { path: url, json } = requestOf(asked, 1, offset);
      return /** @type {number | undefined} */ ((await call(url, { json, signal: stop })).hits[0]?.score);
    };
    const usual = await score(query, Math.min(Math.floor(count / 2), 1000));
    if (usual !== undefined && best.score - usual < STANDING_OUT) {
      fill(status, "Nothing here is close: the nearest is hardly nearer than the rest, and shown all the same.");
    } else if (best.caption && best.url && !query.parts.length) {
      const own = await score({ ...query, text: best.caption, ids: [best.id] }, 0);
      if (own === undefined || best.score >= CLOSE * own) return;
      const told = `the nearest has a cosine of ${best.score.toFixed(2)}, and to its own caption ${own.toFixed(2)}`;
      fill(status, `Nothing here is close: ${told}. It is shown all the same.`);
    }
  }

  /** Adds to what is shown, or shows it from the start. @param {Hit[]} fresh @param {boolean} first */
  function draw(fresh, first) {
    if (first) grid.clear();
    const visible = fresh.filter(({ id }) => !isLeaving(query.collection, id));
    grid.add(visible, params, params.get("fold") === null ? null : groups);
    empty.hidden = true;
    moreButton.hidden = !more;
  }

  function nothing() {
    const some = collections.find(({ name }) => name === query.collection)?.count;
    if (!some || !(isAsked(query) || isNarrowed(query))) {
      settle("");
      empty.hidden = false;
      fill(
        empty,
        h("h2", {}, "Nothing is here yet"),
        h("p", {}, "Drop a folder of pictures anywhere on this page, or choose some above. They stay on this server."),
      );
      return;
    }
    const why =
      query.least > 0
        ? "Nothing is that near: let the cosine be lower."
        : "Nothing passes these filters: take one away.";
    settle(why);
  }

  /** Shows no hits, and says why. @param {string} why */
  function settle(why) {
    grid.clear();
    more = false;
    moreButton.hidden = true;
    empty.hidden = true;
    fill(status, why);
  }

  /** @param {unknown} error */
  function fail(error) {
    if (signal.aborted) return;
    shownFor = null;
    settle("");
    explain(status, error);
  }

  /** @param {URLSearchParams} arrived @param {boolean} [anyway] ask again even if nothing changed */
  async function arrive(arrived, anyway) {
    params = arrived;
    query = queryOf(params);
    if (document.activeElement !== box || box.value.trim() !== query.text.trim()) box.value = query.text;
    target.value = query.target === "any" ? "" : query.target;
    least.value = String(Math.max(0, query.least));
    fill(leastShown, query.least > 0 ? String(query.least) : "any");
    fold.checked = params.get("fold") !== null;
    drawChips(chips, query, replace);
    await known();
    if (query.collection && !collections.some(({ name }) => name === query.collection)) await list(); // it may be new
    if (params !== arrived || signal.aborted) return;
    query.collection ||= collections[0]?.name ?? "";
    picked.value = query.collection;
    if (suggestedFor !== query.collection) {
      suggestedFor = query.collection;
      if (picked.value) suggest(picked.value);
    }
    run(anyway);
    const open = params.get("item");
    const { collection } = query;
    const deleted = () => {
      const place = collections.find(({ name }) => name === collection);
      if (place) place.count--;
      if (collection !== query.collection) return;
      hits = hits.filter(({ id }) => id !== open);
      if (!isAsked(query)) tellCount();
    };
    detail(open === null ? null : { id: open, collection, changed: () => draw(hits, true), deleted });
  }

  return (arrived) => arrive(arrived).catch(fail);
}
