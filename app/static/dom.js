/** Elements, and what several rooms do with them. Text only ever becomes text: nothing here parses HTML. */

/** @typedef {Node | string | number | null | undefined | false} Child */

/**
 * An element: `h("button.primary", { onclick: go }, "Go")`. Functions are listeners, true and false switch an
 * attribute on and off, `value` and `checked` are set as properties, and everything else is an attribute.
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag | `${Tag}.${string}`} name
 * @param {Record<string, any>} [attributes]
 * @param {...(Child | Child[])} children
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function h(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = /** @type {HTMLElementTagNameMap[Tag]} */ (document.createElement(tag));
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key.slice(2), value);
    else if (key === "value" || key === "checked") Reflect.set(element, key, value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, String(value));
  }
  fill(element, ...children);
  return element;
}

/**
 * Puts children in the place of those there are.
 * @param {Element} element
 * @param {...(Child | Child[])} children
 */
export function fill(element, ...children) {
  const shown = children.flat().filter((child) => child !== null && child !== undefined && child !== false);
  element.replaceChildren(...shown.map((child) => (child instanceof Node ? child : String(child))));
}

/**
 * Says something at the foot of the page for some seconds, with one thing that can be done about it.
 * @param {string} text
 * @param {{ label: string, act: () => void } | null} [offer]
 * @param {number} [seconds]
 * @returns {() => void} takes it away
 */
export function toast(text, offer = null, seconds = 6) {
  const place = /** @type {HTMLElement} */ (document.getElementById("toasts"));
  const shown = h("div.toast", {}, h("span", {}, text));
  const timer = setTimeout(() => shown.remove(), seconds * 1000);
  const remove = () => {
    clearTimeout(timer);
    shown.remove();
  };
  if (offer) {
    const act = () => {
      remove();
      offer.act();
    };
    shown.append(h("button", { type: "button", onclick: act }, offer.label));
  }
  place.append(shown);
  return remove;
}

/**
 * A dialog that is open until it is closed, with Esc too, and then gone.
 * @param {string} title
 * @param {...(Child | Child[])} children
 * @returns {HTMLDialogElement}
 */
export function dialog(title, ...children) {
  const close = h("button.close", { type: "button", "aria-label": "Close" }, "×");
  const heading = h("h2", {}, title);
  const made = h("dialog", { "aria-label": title }, h("header", {}, heading, close), ...children);
  close.addEventListener("click", () => made.close());
  made.addEventListener("click", (event) => {
    if (event.target === made) made.close(); // the backdrop
  });
  made.addEventListener("close", () => made.remove());
  document.body.append(made);
  made.showModal();
  return made;
}

/**
 * A label above a control.
 * @param {string} text
 * @param {HTMLElement} control
 * @param {Child} [after] what stands beside the text, such as the value of a slider
 */
export function field(text, control, after = null) {
  return h("label.field", {}, h("span", {}, text, after), control);
}

/**
 * Waits until calls stop for a while, then does the last one.
 * @template {any[]} Args
 * @param {number} milliseconds
 * @param {(...args: Args) => void} act
 */
export function settled(milliseconds, act) {
  let timer = 0;
  return (/** @type {Args} */ ...args) => {
    clearTimeout(timer);
    timer = window.setTimeout(() => act(...args), milliseconds);
  };
}

/** Bytes as hexadecimal digits. @param {Uint8Array} bytes */
export function hex(bytes) {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** The bytes of base64. @param {string} text */
export function bytesOf(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

/** A number for reading: 12,345 or 0.982. @param {number} value @param {number} [digits] */
export function number(value, digits = 3) {
  return value.toLocaleString("en", { maximumFractionDigits: Number.isInteger(value) ? 0 : digits });
}

/** "1 picture", "2 pictures". @param {number} count @param {string} noun */
export function counted(count, noun) {
  return `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
}
