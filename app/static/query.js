/** What is searched for, as the address holds it, as the server takes it, and as a program would write it. */

import { path } from "./api.js";
import { kept } from "./pictures.js";
import { keywords, python } from "./snippets.js";

/** @typedef {{ weight: number, kind: "text" | "item" | "picture", value: string }} Part */

/**
 * @typedef {object} Query
 * @property {string} collection empty for the default one
 * @property {string} text
 * @property {Part[]} parts what is mixed in beside the text
 * @property {string[]} filters as the API writes them: key:value, key>=number
 * @property {string[]} ids of the items to search among; none for all
 * @property {number} least cosine of a hit
 * @property {"any" | "image" | "text"} target
 */

/** @param {URLSearchParams} params @returns {Query} */
export function queryOf(params) {
  const target = params.get("target");
  return {
    collection: params.get("c") ?? "",
    text: params.get("q") ?? "",
    parts: params.getAll("with").flatMap(partOf),
    filters: params.getAll("filter"),
    ids: params.getAll("id"),
    least: Number(params.get("min") ?? -1) || 0,
    target: target === "image" || target === "text" ? target : "any",
  };
}

/** A part as the address has it: `-0.5*text:blue`. @param {Part} part */
export function written({ weight, kind, value }) {
  return `${weight}*${kind}:${value}`;
}

/** @param {string} text @returns {Part[]} */
function partOf(text) {
  const found = /^(-?[\d.]+)\*(text|item|picture):(.+)$/s.exec(text);
  if (!found) return [];
  return [{ weight: Number(found[1]) || 1, kind: /** @type {Part["kind"]} */ (found[2]), value: found[3] }];
}

/** Whether there is something to search for. @param {Query} query */
export function isAsked(query) {
  return query.text.trim() !== "" || query.parts.length > 0;
}

/** Whether not all of a collection is listed, where nothing is searched for. @param {Query} query */
export function isNarrowed(query) {
  return query.ids.length > 0 || query.filters.length > 0 || query.target !== "any";
}

/** The filter for a value of the metadata. @param {string} key @param {unknown} value */
export function equals(key, value) {
  // As a text it would be of another key, or no filter.
  if (/[:<>]|^{/.test(key)) return JSON.stringify({ key, in: [value] });
  return `${key}:${value}`;
}

/** The pictures this tab does not have (any more). @param {Query} query */
export function missing(query) {
  return query.parts.filter(({ kind, value }) => kind === "picture" && kept(value) === null);
}

/**
 * The request for some of the hits.
 * @param {Query} query
 * @param {number} k
 * @param {number} offset
 * @returns {{ path: string, json?: Record<string, any> }}
 */
export function requestOf(query, k, offset) {
  const options = {
    k,
    offset: offset || undefined,
    collection: query.collection || undefined,
    target: query.target === "any" ? undefined : query.target,
    min_score: query.least > -1 ? query.least : undefined,
  };
  if (!query.parts.length && !query.ids.length) {
    const search = new URLSearchParams({ q: query.text.trim() });
    for (const [name, value] of Object.entries(options)) if (value !== undefined) search.append(name, String(value));
    for (const filter of query.filters) search.append("filter", filter);
    return { path: `${path("search")}?${search}` };
  }
  const parts = query.parts.map(({ kind, value, weight }) => {
    if (kind === "picture") return { image: kept(value), weight };
    return kind === "item" ? { item: value, weight } : { text: value, weight };
  });
  const text = query.text.trim() ? [{ text: query.text.trim(), weight: 1 }] : [];
  return {
    path: path("search"),
    json: {
      query: [...text, ...parts],
      filter: query.filters,
      ...(query.ids.length ? { ids: query.ids } : {}),
      ...options,
    },
  };
}

/** The same as a call of the Python client. @param {Query} query @param {number} k */
export function pythonOf(query, k) {
  const options = {
    k,
    collection: query.collection,
    filters: query.filters.length ? query.filters : null,
    ids: query.ids.length ? query.ids : null,
    target: query.target === "any" ? null : query.target,
    min_score: query.least > -1 ? query.least : null,
  };
  const parts = query.parts.map(({ kind, value, weight }) => {
    if (kind === "picture") return `(Path("picture.jpg"), ${weight})`;
    return `(${kind === "item" ? `{"item": ${python(value)}}` : python(value)}, ${weight})`;
  });
  const mixed = parts.length ? `, mixed=[${parts.join(", ")}]` : "";
  const text = query.text.trim() ? python(query.text.trim()) : "None";
  return `client.search(${text}${mixed}${keywords(options)})`;
}
