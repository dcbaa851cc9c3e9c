/** The grid of what was found: a card for each item, near-duplicates folded into the first, arrows from card to card. */

import { show } from "./api.js";
import { fill, h } from "./dom.js";
import { address } from "./route.js";

/** @typedef {import("./types.js").Hit} Hit */

/**
 * An empty grid.
 * @param {() => void} leave called when an arrow leads out of it at the top
 */
export function resultGrid(leave) {
  const element = h("ul.grid", { "aria-label": "Results" });
  /** @type {Map<string, HTMLElement>} group -> where its first card counts those that are folded into it */
  const leaders = new Map();
  element.addEventListener("keydown", (event) => {
    const at = links().indexOf(/** @type {HTMLAnchorElement} */ (document.activeElement));
    const columns = getComputedStyle(element).gridTemplateColumns.split(" ").length;
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    if (at < 0 || step === undefined) return;
    event.preventDefault();
    if (at + step < 0) leave();
    else focus(at + step);
  });

  function links() {
    return Array.from(element.querySelectorAll("a"));
  }

  /** Goes to a card, if there is one. @param {number} at */
  function focus(at) {
    links()[at]?.focus();
  }

  function clear() {
    fill(element);
    leaders.clear();
  }

  /**
   * Adds cards.
   * @param {Hit[]} hits
   * @param {URLSearchParams} params of the address, to which a card adds its item
   * @param {Map<string, string> | null} groups the group of items that have near-duplicates; null: none are folded
   */
  function add(hits, params, groups) {
    for (const hit of hits) {
      const group = groups?.get(hit.id);
      const leader = group === undefined ? undefined : leaders.get(group);
      if (leader) {
        leader.textContent = `+${Number(leader.textContent) + 1}`;
        continue;
      }
      const folded = h("span.folded");
      if (group !== undefined) leaders.set(group, folded);
      element.append(card(hit, params, folded));
    }
  }

  return { element, add, clear, focus };
}

/** @param {Hit} hit @param {URLSearchParams} params @param {HTMLElement} folded */
function card(hit, params, folded) {
  const target = new URLSearchParams(params);
  target.set("item", hit.id);
  const score = hit.score === undefined ? null : h("span.score", {}, hit.score.toFixed(3));
  /** @type {HTMLElement} */
  let face = h("p.text", {}, hit.caption ?? hit.id);
  let caption = "text";
  if (hit.url) {
    const alt = hit.caption ?? `Picture ${hit.id}`;
    const image = h("img", { alt, loading: "lazy", decoding: "async", width: 256, height: 256 });
    show(image, `${hit.url}?size=256`);
    face = image;
    caption = hit.caption ?? String(hit.metadata.path ?? hit.id);
  }
  const line = h("span.line", {}, h("span.caption", {}, caption), score);
  return h("li", {}, h("a", { href: address("search", target) }, face, line, folded));
}
