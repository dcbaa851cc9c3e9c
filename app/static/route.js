/** What is shown is what the address says: `#search?q=a+red+star`. It stands after a #, so it is in no server's log. */

/** @typedef {{ room: string, params: URLSearchParams }} Place */

/** @type {(place: Place) => void} */
let arrived = () => {};

/** Where the address is. @returns {Place} */
export function here() {
  const written = location.hash.slice(1);
  const at = written.indexOf("?");
  const room = at < 0 ? written : written.slice(0, at);
  return { room: room || "search", params: new URLSearchParams(at < 0 ? "" : written.slice(at + 1)) };
}

/**
 * The address of a place.
 * @param {string} room
 * @param {URLSearchParams} params
 */
export function address(room, params) {
  const query = params.toString();
  return `#${room}${query ? `?${query}` : ""}`;
}

/**
 * Goes there.
 * @param {string} room
 * @param {URLSearchParams} params
 * @param {{ replace?: boolean }} [options] replace: the step back leaves this one out, as between two keys typed
 */
export function go(room, params, { replace = false } = {}) {
  const target = address(room, params);
  if (target === location.hash) return;
  if (replace) history.replaceState(null, "", target);
  else history.pushState(null, "", target);
  arrived(here());
}

/** Calls this for every place the reader comes to, now too. @param {(place: Place) => void} listener */
export function onArrival(listener) {
  arrived = listener;
  window.addEventListener("popstate", () => listener(here())); // back, forward, and an address typed by hand
  listener(here());
}
