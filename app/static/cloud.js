/** Points on a canvas: painted, moved about in, pointed at, and taken by a line that is drawn around them. */

const RADIUS = 3; // of a point, in pixels of the page
const REACH = 12; // pixels from the pointer within which a point is pointed at
const STEP = 40; // pixels that an arrow key moves by

/** Colours that can be told from each other on white and on black. */
export const HUES = [
  "#3b5bdb",
  "#f08c00",
  "#2b8a3e",
  "#c2255c",
  "#0c8599",
  "#7048e8",
  "#a61e4d",
  "#5c940d",
  "#d9480f",
  "#1971c2",
];

/** @typedef {[number, number]} Place */
/** @typedef {[number, number, number] | null} Part the place in the middle, and the scale; null: all of it */

/**
 * What the cloud tells. A point is its number.
 * @typedef {object} Listener
 * @property {(at: number, place: Place) => void} pointed the pointer has come to a point; -1: to none
 * @property {(at: number) => void} opened a point was clicked
 * @property {(points: number[]) => void} taken these lie within the line
 * @property {() => void} moved the reader sees another part
 * @property {() => void} whole the reader wants to see all of it
 * @property {() => boolean} draws whether the pointer draws a line, and does not move the points
 */

/**
 * Makes a canvas show points, until `signal` is aborted.
 * @param {HTMLCanvasElement} canvas
 * @param {Listener} on
 * @param {AbortSignal} signal
 */
export function cloud(canvas, on, signal) {
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  let points = new Float32Array(); // x and y of each in turn
  /** @type {number[][]} the points of each colour */
  let coloured = [];
  /** @type {number[]} */
  let marked = [];
  /** @type {Place | null} */
  let cross = null;
  /** @type {Place[] | null} while it is drawn */
  let line = null;
  let pointed = -1;
  // A place of the plane is at `x * scale + left` on the canvas.
  let view = { scale: 1, left: 0, top: 0 };
  /** @type {Part} what was asked for last */
  let looked = null;

  const resized = new ResizeObserver(() => {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = canvas.clientWidth * ratio;
    canvas.height = canvas.clientHeight * ratio;
    look(looked);
  });
  resized.observe(canvas);
  signal.addEventListener("abort", () => resized.disconnect());
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint, { signal });
  listen();

  /**
   * Shows these points, with a list of them for each colour.
   * @param {Float32Array<ArrayBuffer>} given
   * @param {number[][]} lists
   */
  function set(given, lists) {
    [points, coloured, marked, cross, pointed] = [given, lists, [], null, -1];
    look(looked);
  }

  /** Puts rings around points, and a cross somewhere. @param {number[]} rings @param {Place | null} place */
  function mark(rings, place) {
    [marked, cross] = [rings, place];
    paint();
  }

  /** Shows a part. @param {Part} part */
  function look(part) {
    looked = part;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (part) {
      const [x, y, scale] = part;
      view = { scale, left: width / 2 - x * scale, top: height / 2 - y * scale };
    } else if (points.length) {
      const [low, high] = [
        [Infinity, Infinity],
        [-Infinity, -Infinity],
      ];
      points.forEach((value, at) => {
        low[at % 2] = Math.min(low[at % 2], value);
        high[at % 2] = Math.max(high[at % 2], value);
      });
      const scale = 0.92 * Math.min(width / (high[0] - low[0] || 1), height / (high[1] - low[1] || 1));
      const [x, y] = [(low[0] + high[0]) / 2, (low[1] + high[1]) / 2];
      view = { scale, left: width / 2 - scale * x, top: height / 2 - scale * y };
    }
    paint();
  }

  /** The part that is shown. @returns {[number, number, number]} */
  function seen() {
    const { scale, left, top } = view;
    return [(canvas.clientWidth / 2 - left) / scale, (canvas.clientHeight / 2 - top) / scale, scale];
  }

  /** Comes nearer, or goes farther, around a place of the canvas. @param {number} by @param {Place} [around] */
  function zoom(by, [x, y] = [canvas.clientWidth / 2, canvas.clientHeight / 2]) {
    view = { scale: view.scale * by, left: x - (x - view.left) * by, top: y - (y - view.top) * by };
    shifted();
  }

  function shifted() {
    looked = seen();
    paint();
    on.moved();
  }

  /** Where a point is on the canvas. @param {number} at @returns {Place} */
  function placeOf(at) {
    return [points[2 * at] * view.scale + view.left, points[2 * at + 1] * view.scale + view.top];
  }

  function paint() {
    const [ratio, width, height] = [window.devicePixelRatio || 1, canvas.clientWidth, canvas.clientHeight];
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const size = points.length > 40_000 ? 2 : RADIUS;
    // One colour after the other: a change of colour costs more than a point.
    coloured.forEach((some, hue) => {
      context.fillStyle = HUES[hue];
      for (const at of some) {
        const [x, y] = placeOf(at);
        if (x > -size && y > -size && x < width + size && y < height + size) {
          context.fillRect(x - size / 2, y - size / 2, size, size);
        }
      }
    });
    context.strokeStyle = getComputedStyle(canvas).color;
    context.lineWidth = 1.5;
    for (const at of pointed < 0 ? marked : [...marked, pointed]) {
      context.beginPath();
      context.arc(...placeOf(at), RADIUS + 2, 0, 7);
      context.stroke();
    }
    if (line) stroke(...line, line[0]);
    context.lineWidth = 3;
    if (cross) {
      const [x, y] = [cross[0] * view.scale + view.left, cross[1] * view.scale + view.top];
      stroke([x - 9, y], [x + 9, y]);
      stroke([x, y - 9], [x, y + 9]);
    }
  }

  /** @param {...Place} places */
  function stroke(...places) {
    context.beginPath();
    for (const place of places) context.lineTo(...place);
    context.stroke();
  }

  /** The point under a place of the canvas, -1 if there is none. @param {Place} place */
  function nearest([x, y]) {
    let [best, least] = [-1, REACH ** 2];
    for (let at = 0; at < points.length / 2; at++) {
      const [px, py] = placeOf(at);
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < least) [best, least] = [at, distance];
    }
    return best;
  }

  /** @param {Place} place */
  function point(place) {
    const at = nearest(place);
    if (at === pointed) return;
    pointed = at;
    paint();
    on.pointed(at, at < 0 ? place : placeOf(at));
  }

  function listen() {
    /** @type {Place | null} */
    let held = null;
    let moved = false;
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      held = [event.offsetX, event.offsetY];
      moved = false;
      if (on.draws()) line = [held];
    });
    canvas.addEventListener("pointermove", (event) => {
      const [x, y] = [event.offsetX, event.offsetY];
      if (line) {
        line.push([x, y]);
        paint();
      } else if (held) {
        moved ||= Math.hypot(x - held[0], y - held[1]) > 3;
        view.left += x - held[0];
        view.top += y - held[1];
        held = [x, y];
        shifted();
      } else {
        point([x, y]);
      }
    });
    canvas.addEventListener("pointerup", (event) => {
      held = null;
      if (line) {
        const drawn = line;
        line = null;
        marked = Array.from({ length: points.length / 2 }, (_, at) => at).filter((at) => inside(placeOf(at), drawn));
        paint();
        on.taken(marked);
      } else if (!moved) {
        // A finger points by touching: the first touch shows what is there, the next one opens it.
        if (pointed >= 0 && pointed === nearest([event.offsetX, event.offsetY])) on.opened(pointed);
        else point([event.offsetX, event.offsetY]);
      }
    });
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      zoom(Math.exp(-event.deltaY / 300), [event.offsetX, event.offsetY]);
    });
    canvas.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
      if (move) {
        view.left += STEP * move[0];
        view.top += STEP * move[1];
        shifted();
      } else if (event.key === "+" || event.key === "=") zoom(1.25);
      else if (event.key === "-") zoom(0.8);
      else if (event.key === "0") on.whole();
      else return;
      event.preventDefault();
    });
  }

  return { set, mark, look, seen, zoom };
}

/** Whether a place is within a closed line, by the even-odd rule. @param {Place} place @param {Place[]} line */
function inside([x, y], line) {
  let within = false;
  for (let at = 0, before = line.length - 1; at < line.length; before = at++) {
    const [ax, ay] = line[at];
    const [bx, by] = line[before];
    if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) within = !within;
  }
  return within;
}

/**
 * The points in so many groups, by k-means; the first centres lie as far from each other as they can, so the same map has
 * the same groups.
 * @param {Float32Array} points
 * @param {number} groups
 * @returns {number[]} the group of each
 */
export function clusters(points, groups) {
  const count = points.length / 2;
  /** @param {number} at @param {number[]} centre */
  const distance = (at, [x, y]) => (points[2 * at] - x) ** 2 + (points[2 * at + 1] - y) ** 2;
  const centres = count ? [[points[0], points[1]]] : [];
  const least = new Float32Array(count).fill(Infinity);
  while (centres.length < Math.min(groups, count)) {
    let farthest = 0;
    for (let at = 0; at < count; at++) {
      least[at] = Math.min(least[at], distance(at, centres[centres.length - 1]));
      if (least[at] > least[farthest]) farthest = at;
    }
    centres.push([points[2 * farthest], points[2 * farthest + 1]]);
  }
  const group = new Array(count).fill(0);
  for (let round = 0; round < 20; round++) {
    const sums = centres.map(() => [0, 0, 0]);
    for (let at = 0; at < count; at++) {
      for (let each = 0; each < centres.length; each++) {
        if (distance(at, centres[each]) < distance(at, centres[group[at]])) group[at] = each;
      }
      const sum = sums[group[at]];
      sum[0] += points[2 * at];
      sum[1] += points[2 * at + 1];
      sum[2] += 1;
    }
    sums.forEach(([x, y, own], each) => own && (centres[each] = [x / own, y / own]));
  }
  return group;
}
