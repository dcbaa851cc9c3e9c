/** Adding the reader's pictures to a collection: in batches, told as they go, with the reason for each one left out. */

import { Problem, call, path } from "./api.js";
import { settleDeletes } from "./detail.js";
import { counted, dialog, fill, h, hex, number } from "./dom.js";

const FILES = 16; // of one call
const BYTES = 12_000_000; // of one call's pictures, below what a server takes by default
const AT_ONCE = 2;
const PICTURE = /\.(jpe?g|png|webp|gif|bmp|tiff?|avif|heic)$/i;

/**
 * Adds files to a collection, which is made if need be, in a dialog that shows how far it is.
 * @param {string} collection
 * @param {File[]} files
 * @returns {Promise<number>} how many were added
 */
export async function upload(collection, files) {
  const pictures = files.filter((file) => file.type.startsWith("image/") || PICTURE.test(file.name));
  const bar = h("progress", { max: pictures.length || 1, value: 0, "aria-label": "Pictures added" });
  const status = h("p", { role: "status" });
  const skipped = h("ul.skipped");
  const stop = new AbortController();
  const button = h("button", { type: "button" }, "Stop");
  const shown = dialog(`Adding to ${collection}`, bar, status, skipped, h("footer", {}, button));
  button.addEventListener("click", () => shown.close());
  shown.addEventListener("close", () => stop.abort());
  const started = performance.now();
  let added = 0;
  let left = 0;

  const tell = () => {
    const done = added + left;
    bar.value = done;
    const seconds = (performance.now() - started) / 1000;
    const rest = done ? Math.ceil((seconds / done) * (pictures.length - done)) : null;
    fill(
      status,
      `${number(done)} of ${counted(pictures.length, "picture")}`,
      rest ? `, ${counted(rest, "second")} left` : "",
    );
  };
  const skip = (/** @type {File} */ file, /** @type {string} */ why) => {
    left += 1;
    skipped.append(h("li", {}, h("strong", {}, nameOf(file)), ` ${why}`));
  };
  const work = batches(pictures);
  const send = async () => {
    for (let batch = work.next(); !batch.done; batch = work.next()) {
      const count = await sent(collection, batch.value, skip, stop.signal);
      added += count; // not in one line: `added` would be read before the wait, and another batch's count lost
      tell();
    }
  };

  tell();
  try {
    await settleDeletes();
    if (pictures.length)
      await call(path("collections", collection), { method: "PUT", signal: stop.signal, patience: 5 });
    await Promise.all(Array.from({ length: AT_ONCE }, send));
    fill(status, `${counted(added, "picture")} added`, left ? `, ${number(left)} left out` : "", ".");
    if (!pictures.length) fill(status, "There is no picture among these files.");
  } catch (error) {
    if (stop.signal.aborted) return added;
    stop.abort();
    const detail = error instanceof Problem ? error.message : String(error);
    fill(status, `${counted(added, "picture")} added, then it stopped: ${detail}`);
  }
  fill(button, "Close");
  if (!left && added) shown.close();
  return added;
}

/**
 * Sends a batch; where the server says which picture is wrong, the others go without it.
 * @param {string} collection
 * @param {File[]} batch
 * @param {(file: File, why: string) => void} skip
 * @param {AbortSignal} signal
 * @returns {Promise<number>}
 */
async function sent(collection, batch, skip, signal) {
  /** @type {Map<File, string>} */
  const ids = new Map();
  for (const file of batch) {
    try {
      ids.set(file, await idOf(file));
    } catch {
      skip(file, "cannot be read; was it moved or changed?");
    }
  }
  let files = [...ids.keys()];
  while (files.length) {
    const form = new FormData();
    for (const file of files) {
      form.append("file", file);
      form.append("id", ids.get(file) ?? "");
      form.append("metadata", JSON.stringify({ path: nameOf(file) }));
    }
    try {
      await call(path("collections", collection, "items"), { form, signal, patience: 20 });
      return files.length;
    } catch (error) {
      if (!(error instanceof Problem) || ![413, 415, 422].includes(error.status)) throw error;
      const wrong = error.input ?? (files.length === 1 ? 0 : null);
      if (wrong === null) {
        // It does not say which one: each goes by itself.
        let count = 0;
        for (const file of files) count += await sent(collection, [file], skip, signal);
        return count;
      }
      skip(files[wrong], error.message.replace(/^input \d+: /, ""));
      files = files.filter((_, index) => index !== wrong);
    }
  }
  return 0;
}

/** @param {File[]} files */
function* batches(files) {
  /** @type {File[]} */
  let batch = [];
  let bytes = 0;
  for (const file of files) {
    if (batch.length && (batch.length === FILES || bytes + file.size > BYTES)) {
      yield batch;
      batch = [];
      bytes = 0;
    }
    batch.push(file);
    bytes += file.size;
  }
  if (batch.length) yield batch;
}

/** @param {File} file */
function nameOf(file) {
  return file.webkitRelativePath || file.name;
}

/**
 * An id that reads like the name and belongs to the content, so that two cameras' IMG_0001.jpg are two items and the
 * same file dropped again is still one. Browsers hash on https and this machine alone; elsewhere it is a new item.
 * @param {File} file
 */
async function idOf(file) {
  const slug = nameOf(file)
    .replaceAll("/", ":")
    .replace(/[^A-Za-z0-9._:@+-]+/g, "-")
    .replace(/^[^A-Za-z0-9]+/, "");
  const bytes = crypto.subtle
    ? new Uint8Array(await crypto.subtle.digest("SHA-256", await file.arrayBuffer()))
    : crypto.getRandomValues(new Uint8Array(32));
  return `${slug.slice(0, 100) || "picture"}-${hex(bytes.slice(0, 6))}`;
}
