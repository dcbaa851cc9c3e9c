/** The reader's own pictures: chosen, pasted or dropped. An address names one, and this tab keeps it until it closes. */

import { Problem } from "./api.js";
import { h, hex, number, toast } from "./dom.js";

const SIDE = 1024; // pixels; models look at fewer, and a phone's photograph would take its time to travel
const SMALL = 500_000; // bytes of a file that is sent as it is
/** @type {Map<string, string>} */
const memory = new Map();

/**
 * Keeps a picture, made smaller if it is large.
 * @param {Blob} file
 * @returns {Promise<string>} the name under which `kept` has it
 */
export async function keep(file) {
  const written = await reduced(file);
  const name = hex(crypto.getRandomValues(new Uint8Array(4)));
  memory.set(name, written);
  try {
    sessionStorage.setItem(`picture:${name}`, written);
  } catch {
    // No room: it lasts until the page is loaded again.
  }
  return name;
}

/** A kept picture as a data: URI; null if this tab never had it. @param {string} name */
export function kept(name) {
  try {
    return memory.get(name) ?? sessionStorage.getItem(`picture:${name}`);
  } catch {
    return null; // a browser that lets no site store anything refuses the look, too
  }
}

/**
 * A button that lets the reader choose picture files.
 * @param {string} label
 * @param {(files: File[]) => void} take
 * @param {{ multiple?: boolean, folder?: boolean }} [options]
 */
export function chooser(label, take, { multiple = false, folder = false } = {}) {
  const input = h("input", {
    type: "file",
    accept: folder ? false : "image/*",
    multiple,
    hidden: true,
    "aria-label": label,
  });
  input.webkitdirectory = folder;
  input.addEventListener("change", () => {
    take(Array.from(input.files ?? []));
    input.value = ""; // so that the same file can be chosen again
  });
  return h("span", {}, h("button", { type: "button", onclick: () => input.click() }, label), input);
}

/**
 * Takes pictures that are dropped on an element, and those pasted while it is shown.
 * @param {HTMLElement} element
 * @param {(files: File[]) => void} take
 * @param {AbortSignal} signal ends it
 */
export function receive(element, take, signal) {
  const over = (/** @type {DragEvent} */ event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    element.classList.toggle("over", event.type === "dragover");
  };
  element.addEventListener("dragover", over, { signal });
  element.addEventListener("dragleave", over, { signal });
  element.addEventListener(
    "drop",
    async (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      element.classList.remove("over");
      const { found, unread } = await dropped(event.dataTransfer);
      if (unread.length) toast(`${number(unread.length)} of what was dropped cannot be read: ${unread[0]}`);
      take(found);
    },
    { signal },
  );
  document.addEventListener(
    "paste",
    (event) => {
      const files = Array.from(event.clipboardData?.files ?? []).filter((file) => file.type.startsWith("image/"));
      if (files.length) take(files);
    },
    { signal },
  );
}

/**
 * Every file of what was dropped, those in folders too, and the paths of what the browser may not read.
 * @param {DataTransfer} transfer
 * @returns {Promise<{ found: File[], unread: string[] }>}
 */
async function dropped(transfer) {
  const entries = Array.from(transfer.items, (item) => item.webkitGetAsEntry());
  if (!entries.some((entry) => entry?.isDirectory)) return { found: Array.from(transfer.files), unread: [] };
  /** @type {File[]} */
  const found = [];
  /** @type {string[]} */
  const unread = [];
  const walk = async (/** @type {FileSystemEntry | null} */ entry) => {
    if (entry?.isFile) {
      const file = await new Promise((resolve, reject) =>
        /** @type {FileSystemFileEntry} */ (entry).file(resolve, reject),
      );
      Object.defineProperty(file, "webkitRelativePath", { value: entry.fullPath.slice(1) });
      found.push(file);
    } else if (entry) {
      const reader = /** @type {FileSystemDirectoryEntry} */ (entry).createReader();
      for (;;) {
        const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
        if (!some.length) break; // a reader gives a hundred at a time
        for (const each of some) await safely(each);
      }
    }
  };
  const safely = (/** @type {FileSystemEntry | null} */ entry) =>
    walk(entry).catch(() => unread.push(entry?.fullPath.slice(1) ?? ""));
  for (const entry of entries) await safely(entry);
  return { found, unread };
}

/** @param {Blob} file @returns {Promise<string>} */
async function reduced(file) {
  /** @type {ImageBitmap} */
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    // Not for this browser, but perhaps for the server, which says what is wrong if it is not.
    if (file.size > 15_000_000)
      throw new Problem(0, "This file is too large, and no picture that a browser can read.", "");
    return dataUrl(file);
  }
  const scale = Math.min(1, SIDE / Math.max(bitmap.width, bitmap.height));
  if (scale === 1 && file.size < SMALL) return dataUrl(file);
  const canvas = h("canvas", { width: Math.round(bitmap.width * scale), height: Math.round(bitmap.height * scale) });
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.fillStyle = "white"; // where it is transparent, as the models are shown it
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.92);
}

/** @param {Blob} file @returns {Promise<string>} */
function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(String(reader.result)));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
}
