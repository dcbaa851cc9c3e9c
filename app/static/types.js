/** Shapes of the server's answers, and of the rooms, for the type checker alone. */

/**
 * @typedef {object} Item
 * @property {string} id
 * @property {"image" | "text"} kind
 * @property {string | null} caption
 * @property {string | null} url
 * @property {Record<string, string | number | boolean | null>} metadata
 */

/** @typedef {Item & { score: number }} Hit */

/**
 * @typedef {object} Collection
 * @property {string} name
 * @property {string} model
 * @property {number} dimensions
 * @property {number} count
 * @property {string} index
 * @property {number} bytes
 */

/**
 * @typedef {object} KeyStatistics
 * @property {string} key
 * @property {number} items
 * @property {number} values
 * @property {number | null} min
 * @property {number | null} max
 * @property {{ value: string, items: number }[]} frequent
 */

/**
 * @typedef {object} Model
 * @property {string} id
 * @property {string} architecture
 * @property {string[]} takes
 * @property {string[]} makes
 * @property {number | null} dimensions
 * @property {number} size
 * @property {string[]} styles
 * @property {Record<string, string>} backends
 * @property {string} fingerprint
 * @property {Record<string, number>} metrics
 * @property {string | null} license
 */

/**
 * Fills an empty room; `signal` is aborted when the reader leaves it. What it gives is called with the address's
 * parameters at once and whenever they change.
 * @typedef {(root: HTMLElement, signal: AbortSignal) => (params: URLSearchParams) => void} Mount
 */

export {};
