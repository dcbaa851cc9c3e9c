/** Calls of the server, with problems in words. The key, where one is needed, is in memory and nowhere else. */

import { fill, h, number } from "./dom.js";

let key = "";
/** @type {(message: string) => Promise<string>} */
let askKey = () => Promise.reject(new Error("this server wants an API key"));
/** @type {Promise<string> | null} */
let asking = null;

/** What the server said was wrong (RFC 9457), or that it could not be reached. */
export class Problem extends Error {
  /** @param {number} status @param {string} detail @param {string} requestId @param {number | null} input */
  constructor(status, detail, requestId, input = null) {
    super(detail);
    this.status = status;
    this.requestId = requestId;
    this.input = input;
  }
}

/** Who asks the reader for a key. @param {(message: string) => Promise<string>} ask */
export function onKeyNeeded(ask) {
  askKey = ask;
}

/** Whether a key has been given. */
export function hasKey() {
  return key !== "";
}

/**
 * @typedef {object} Options
 * @property {string} [method]
 * @property {unknown} [json]
 * @property {FormData} [form]
 * @property {AbortSignal} [signal]
 * @property {number} [patience] times that a busy server is asked again, after what it said to wait
 * @property {boolean} [keepalive] finish even if the page is left
 */

/**
 * An answer with a 2xx. Asks for a key, once for all that wait for it, where the server wants one.
 * @param {string} path
 * @param {Options} [options]
 * @returns {Promise<Response>}
 */
export async function request(path, options = {}) {
  const { json, form, signal, keepalive } = options;
  let { patience = 0 } = options;
  for (;;) {
    /** @type {Record<string, string>} */
    const headers = {};
    if (key) headers.Authorization = `Bearer ${key}`;
    if (json !== undefined) headers["Content-Type"] = "application/json";
    const body = json === undefined ? form : JSON.stringify(json);
    const method = options.method ?? (body === undefined ? "GET" : "POST");
    const used = key;
    /** @type {Response} */
    let answer;
    try {
      answer = await fetch(path, { method, headers, body, signal, keepalive });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new Problem(0, "The server does not answer. Is it running, and can this machine reach it?", "");
    }
    if (answer.ok) return answer;
    const problem = await problemOf(answer);
    if (answer.status === 401) {
      if (key === used) {
        asking ??= askKey(used ? "This key is not one of the server's." : "This server wants an API key.");
        key = await asking.finally(() => (asking = null));
      }
    } else if ((answer.status === 429 || answer.status === 503) && patience > 0) {
      patience -= 1;
      await wait(Number(answer.headers.get("Retry-After") ?? 1), signal);
    } else {
      throw problem;
    }
  }
}

/**
 * An answer's JSON.
 * @param {string} path
 * @param {Options} [options]
 * @returns {Promise<any>}
 */
export async function call(path, options) {
  const answer = await request(path, options);
  return answer.status === 204 ? null : answer.json();
}

/**
 * The server-sent events of an answer, as they arrive. A problem among them is thrown.
 * @param {string} path
 * @param {Options} options
 * @returns {AsyncGenerator<{ type: string } & Record<string, any>>}
 */
export async function* events(path, options) {
  const answer = await request(path, options);
  const reader = /** @type {ReadableStream<Uint8Array>} */ (answer.body).getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (options.signal?.aborted) throw error;
      throw new Problem(0, "The server's answer broke off: it was stopped, or the connection was lost.", "");
    });
    if (done) return;
    rest += decoder.decode(value, { stream: true });
    const parts = rest.split("\n\n");
    rest = parts.pop() ?? "";
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (!data) continue;
      const event = JSON.parse(data.slice(6));
      if (event.error) throw new Problem(event.error.status, event.error.message, event.error.request_id);
      yield event;
    }
  }
}

/**
 * Shows a picture of the server in an element: by its address, or, since an element sends no key, by what a call gave.
 * @param {HTMLImageElement} image
 * @param {string} url
 */
export async function show(image, url) {
  if (!key) {
    image.src = url;
    return;
  }
  try {
    const source = URL.createObjectURL(await (await request(url)).blob());
    image.addEventListener("load", () => URL.revokeObjectURL(source), { once: true });
    image.src = source;
  } catch {
    image.removeAttribute("src"); // its alternative text remains
  }
}

/**
 * Puts what went wrong into an element, with the request by which the server's log has it.
 * @param {HTMLElement} place
 * @param {unknown} error
 */
export function explain(place, error) {
  const request = error instanceof Problem ? error.requestId : "";
  const told = error instanceof Error ? error.message : String(error);
  fill(place, told, request && h("small", {}, ` (request ${request})`));
}

/**
 * The collections there are, in an element that lets the reader choose. `default`, which a server that was told nothing
 * else searches, comes first.
 * @param {HTMLSelectElement} choice
 * @param {AbortSignal} signal
 * @returns {Promise<import("./types.js").Collection[]>}
 */
export async function listCollections(choice, signal) {
  /** @type {import("./types.js").Collection[]} */
  const collections = (await call(path("collections"), { signal })).collections;
  collections.sort((a, b) => Number(b.name === "default") - Number(a.name === "default"));
  fill(
    choice,
    collections.map(({ name, count }) => h("option", { value: name }, `${name} (${number(count)})`)),
  );
  return collections;
}

/** A path of the API, with every part written safely. @param {...string} parts */
export function path(...parts) {
  return `/${parts.map(encodeURIComponent).join("/")}`;
}

/** @param {Response} answer */
async function problemOf(answer) {
  const requestId = answer.headers.get("X-Request-ID") ?? "";
  try {
    const { detail, title, input } = await answer.json();
    return new Problem(answer.status, detail || title, requestId, input ?? null);
  } catch {
    return new Problem(answer.status, `The server answered ${answer.status} ${answer.statusText}.`, requestId);
  }
}

/** @param {number} seconds @param {AbortSignal | undefined} signal */
function wait(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, Math.min(seconds, 30) * 1000);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}
