/** One item, large: its picture, what is known of it, what lies near it, and what can be done with it. */

import { call, explain, path, request, show } from "./api.js";
import { dialog, fill, h, toast } from "./dom.js";
import { keep } from "./pictures.js";
import { equals, written } from "./query.js";
import { address, go, here } from "./route.js";

/** @typedef {import("./types.js").Hit} Hit */

/**
 * @typedef {object} Shown
 * @property {string} id
 * @property {string} collection
 * @property {() => void} changed called when `isLeaving` has changed
 * @property {() => void} deleted called when the server has deleted it
 */

const UNDO = 8; // seconds in which a delete can be taken back; the server hears of it afterwards

/** @type {{ id: string, dialog: HTMLDialogElement, stop: AbortController } | null} */
let open = null;
/** @type {Map<string, () => Promise<void>>} the paths of items that can still be taken back */
const pending = new Map();
/** @type {Map<string, Promise<void>>} the paths of items whose delete the server has not answered */
const asked = new Map();
window.addEventListener("pagehide", () => pending.forEach((commit) => commit()));

/** Whether an item is not to be shown, for it is about to be deleted. @param {string} collection @param {string} id */
export function isLeaving(collection, id) {
  const place = path("collections", collection, "items", id);
  return pending.has(place) || asked.has(place);
}

/** Until every delete is answered: an item that is added again must not be deleted by the one before. */
export async function settleDeletes() {
  for (const commit of pending.values()) commit();
  await Promise.all(asked.values());
}

/** Shows an item, or none. @param {Shown | null} item */
export function detail(item) {
  if (item?.id === open?.id) return;
  if (open) {
    const { dialog: old, stop } = open;
    open = null;
    stop.abort();
    old.close();
  }
  if (item) begin(item);
}

/** @param {Shown} item */
function begin(item) {
  const stop = new AbortController();
  const body = h("div.detail", {}, h("p", { role: "status" }, "Looking…"));
  const shown = dialog(item.id, body);
  open = { id: item.id, dialog: shown, stop };
  shown.addEventListener("close", () => {
    stop.abort();
    if (open?.dialog !== shown) return; // the address had already moved on
    open = null;
    const params = new URLSearchParams(here().params);
    params.delete("item");
    go(here().room, params);
  });
  draw(item, shown, body, stop.signal).catch((error) => {
    if (stop.signal.aborted) return;
    const told = h("p", { role: "alert" });
    fill(body, told);
    explain(told, error);
  });
}

/** @param {Shown} shown @param {HTMLDialogElement} frame @param {HTMLElement} body @param {AbortSignal} signal */
async function draw(shown, frame, body, signal) {
  const { collection } = shown;
  const place = path("collections", collection, "items", shown.id);
  const item = /** @type {import("./types.js").Item} */ (await call(place, { signal }));
  const image = h("img", { alt: item.caption ?? `Picture ${item.id}` });
  if (item.url) show(image, item.url);
  const like = written({ weight: 1, kind: "item", value: item.id });
  const facts = Object.entries(item.metadata).map(([key, value]) => {
    const only = new URLSearchParams({ c: collection, with: like, filter: equals(key, value) });
    return [
      h("dt", {}, key),
      h("dd", {}, h("a", { href: address("search", only), title: "Only these, nearest first" }, String(value))),
    ];
  });
  const similar = new URLSearchParams({ c: collection, with: like });
  const near = h("ul.near", { "aria-label": "Nearest to it" });
  const use = (/** @type {string} */ room) => async () => {
    const file = await (await request(item.url ?? "", { signal })).blob();
    go(room, new URLSearchParams({ picture: await keep(file) }));
  };
  fill(
    body,
    item.url ? h("figure", {}, image) : h("blockquote", {}, item.caption ?? ""),
    h(
      "div.side",
      {},
      item.url && item.caption ? h("p.caption", {}, item.caption) : null,
      h(
        "div.tools",
        {},
        h("a.button", { href: address("search", similar) }, "Find similar"),
        item.url ? h("button", { type: "button", onclick: use("classify") }, "Classify") : null,
        item.url ? h("button", { type: "button", onclick: use("generate") }, "Draw more like it") : null,
        h("button.danger", { type: "button", onclick: () => remove(shown, place, frame) }, "Delete"),
      ),
      h("dl", {}, ...facts.flat()),
      h("h3", {}, "Nearest to it"),
      near,
    ),
  );
  /** @type {any} */
  let answer;
  try {
    answer = await call("/search", { json: { query: [{ item: item.id }], collection, k: 9 }, signal });
  } catch (error) {
    if (signal.aborted) return;
    const told = h("li.told");
    fill(near, told);
    explain(told, error);
    return;
  }
  const others = /** @type {Hit[]} */ (answer.hits)
    .filter(({ id }) => id !== item.id && !isLeaving(collection, id))
    .slice(0, 8);
  fill(
    near,
    others.map((hit) => {
      const params = new URLSearchParams(here().params);
      params.set("item", hit.id);
      const small = h("img", { alt: hit.caption ?? hit.id, width: 96, height: 96, loading: "lazy" });
      if (hit.url) show(small, `${hit.url}?size=256`);
      const face = hit.url ? small : h("span.text", {}, hit.caption ?? hit.id);
      return h("li", {}, h("a", { href: address("search", params) }, face, h("span.score", {}, hit.score.toFixed(3))));
    }),
  );
}

/** Hides it at once, and deletes it when it is too late to take that back. @param {Shown} shown @param {string} place @param {HTMLDialogElement} frame */
function remove(shown, place, frame) {
  const send = async () => {
    clearTimeout(timer);
    told();
    pending.delete(place);
    try {
      await call(place, { method: "DELETE", keepalive: true, patience: 5 });
      asked.delete(place);
      shown.deleted();
    } catch (error) {
      asked.delete(place);
      shown.changed();
      toast(`${shown.id} was not deleted: ${error instanceof Error ? error.message : error}`);
    }
  };
  const commit = () => {
    const sent = send();
    asked.set(place, sent);
    return sent;
  };
  const timer = window.setTimeout(commit, UNDO * 1000);
  pending.set(place, commit);
  const undo = () => {
    clearTimeout(timer);
    pending.delete(place);
    shown.changed();
  };
  const told = toast(`${shown.id} will be deleted.`, { label: "Undo", act: undo }, UNDO);
  frame.close();
  shown.changed();
}
