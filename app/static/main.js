/** The frame: which room is shown, the keys that work everywhere, and the question for an API key. */

import { onKeyNeeded } from "./api.js";
import { dialog, field, fill, h } from "./dom.js";
import { here, onArrival } from "./route.js";

/** @type {Record<string, { title: string, load: () => Promise<{ mount: import("./types.js").Mount }> }>} */
const ROOMS = {
  search: { title: "Search", load: () => import("./search.js") },
  classify: { title: "Classify", load: () => import("./classify.js") },
  generate: { title: "Generate", load: () => import("./generate.js") },
  map: { title: "Map", load: () => import("./map.js") },
  models: { title: "Models", load: () => import("./models.js") },
};
const KEYS = [
  ["/", "to the search box or the prompt"],
  ["?", "this help"],
  ["↑ ↓ ← →", "among the results"],
  ["Enter", "open the result, or search at once"],
  ["Esc", "close what is open"],
];

const root = /** @type {HTMLElement} */ (document.getElementById("room"));
const nav = /** @type {HTMLElement} */ (document.getElementById("rooms"));
let current = "";
let leave = new AbortController();
/** @type {(params: URLSearchParams) => void} */
let update = () => {};

fill(
  nav,
  Object.entries(ROOMS).map(([name, { title }]) => h("a", { href: `#${name}` }, title)),
);
document.getElementById("skip")?.addEventListener("click", () => root.focus());
document.getElementById("help")?.addEventListener("click", help);
onKeyNeeded(askKey);
onArrival(async ({ room, params }) => {
  const name = room in ROOMS ? room : "search";
  if (name !== current) {
    current = name;
    leave.abort();
    for (const open of document.querySelectorAll("dialog")) open.close();
    leave = new AbortController();
    const { signal } = leave;
    const { title, load } = ROOMS[name];
    document.title = `${title} · Semblance`;
    for (const link of nav.querySelectorAll("a")) {
      if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    update = () => {};
    /** @type {import("./types.js").Mount} */
    let mount;
    try {
      ({ mount } = await load());
    } catch {
      if (!signal.aborted) unloaded(title);
      return;
    }
    if (signal.aborted) return; // the reader has gone on
    const place = h("div.room");
    fill(root, h("h1.hidden", {}, title), place);
    update = mount(place, signal);
    params = here().params; // it may have changed meanwhile
  }
  update(params);
});

document.addEventListener("keydown", (event) => {
  const target = /** @type {HTMLElement} */ (event.target);
  const writing = target.matches("input:not([type=range], [type=checkbox]), textarea, select");
  if (event.ctrlKey || event.metaKey || event.altKey || writing || document.querySelector("dialog[open]")) return;
  if (event.key === "/") {
    event.preventDefault();
    const box = /** @type {HTMLInputElement | null} */ (document.getElementById("box"));
    box?.focus();
    box?.select();
  }
  if (event.key === "?") help();
});

/** Says that a room's file did not come; browsers do not ask for one twice. @param {string} title */
function unloaded(title) {
  current = "";
  const again = h("button", { type: "button", onclick: () => location.reload() }, "Load the page again");
  const told =
    "This room could not be loaded: the server does not answer. Is it running, and can this machine reach it?";
  fill(root, h("h1.hidden", {}, title), h("p.status", { role: "status" }, told), again);
}

function help() {
  dialog(
    "Keys",
    h(
      "dl.keys",
      {},
      KEYS.flatMap(([key, what]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, what)]),
    ),
  );
}

/** @param {string} message @returns {Promise<string>} */
function askKey(message) {
  return new Promise((resolve, reject) => {
    const input = h("input", {
      type: "password",
      autocomplete: "off",
      required: true,
      pattern: " *[\\x21-\\x7e]+ *", // no header holds another, and the browser would not even ask
      title: "A key has letters, digits and signs of ASCII, and no space",
    });
    const form = h(
      "form",
      {
        onsubmit: (/** @type {Event} */ event) => {
          event.preventDefault();
          resolve(input.value.trim());
          asked.close();
        },
      },
      h("p", {}, message, " It is kept until this page is closed, and written nowhere."),
      field("API key", input),
      h("footer", {}, h("button.primary", { type: "submit" }, "Use it")),
    );
    const asked = dialog("API key", form);
    input.focus();
    asked.addEventListener("close", () => reject(new Error("Without an API key this server answers nothing.")));
  });
}
