/** The room for drawing: pictures of a text, filling in as the server draws them, from a seed that draws them again. */

import { call, events, explain } from "./api.js";
import { bytesOf, counted, field, fill, h, number, toast } from "./dom.js";
import { chooser, keep, kept, receive } from "./pictures.js";
import { written } from "./query.js";
import { go, here } from "./route.js";
import { copier, keywords, python } from "./snippets.js";

/** @typedef {{ b64_json: string, seed: number, score: number | null }} Drawn */

const PARTIAL = 12; // states of each picture on its way
const DEFAULTS = { n: "4", temperature: "1", top_k: "0", top_p: "1", guidance_scale: "2", change: "0.5" };

/** What was drawn since the page was loaded, by what was asked, so that the step back shows it. @type {Map<string, Drawn[]>} */
const drawn = new Map();

/** @type {import("./types.js").Mount} */
export function mount(root, signal) {
  /** @type {AbortController | null} */
  let drawing = null;
  let drawingFor = "";
  let spent = ""; // the seed that was drawn last

  const prompt = h("input", {
    type: "text",
    id: "box",
    placeholder: "What to draw",
    "aria-label": "Prompt",
    maxlength: 2000,
    autocomplete: "off",
  });
  const range = (/** @type {number} */ min, /** @type {number} */ max, /** @type {number} */ step) => {
    const output = h("span.value");
    const input = h("input", { type: "range", min, max, step });
    input.addEventListener("input", () => fill(output, input.value));
    return { input, output };
  };
  const sliders = {
    n: range(1, 16, 1),
    temperature: range(0, 2, 0.05),
    guidance_scale: range(0, 8, 0.25),
    top_p: range(0.05, 1, 0.05),
    change: range(0.05, 1, 0.05),
  };
  const topK = h("input", { type: "number", min: 0, step: 1 });
  const seed = h("input", { type: "number", min: 0, step: 1, placeholder: "any" });
  const lock = h("input", { type: "checkbox" });
  const rerank = h("input", { type: "checkbox", checked: true });
  const style = h("select", {}, h("option", { value: "" }, "Any"));
  const styles = field("Style", style);
  styles.hidden = true;
  const start = h("div.chips");
  const draw = h("button.primary", { type: "submit" }, "Draw");
  const cancel = h("button", { type: "button", hidden: true, onclick: () => drawing?.abort() }, "Cancel");
  const status = h("p.status", { role: "status" });
  const bar = h("progress", { max: 1, value: 0, hidden: true, "aria-label": "Drawn" });
  const grid = h("ul.grid.drawings", { "aria-label": "Drawings" });
  const changing = field("Of the picture, draw anew ", sliders.change.input, sliders.change.output);
  const options = h(
    "details.options",
    {},
    h("summary", {}, "How to draw"),
    h(
      "div.fields",
      {},
      field("Pictures ", sliders.n.input, sliders.n.output),
      field("Guidance ", sliders.guidance_scale.input, sliders.guidance_scale.output),
      field("Temperature ", sliders.temperature.input, sliders.temperature.output),
      field("Top p ", sliders.top_p.input, sliders.top_p.output),
      field("Top k, 0 for all", topK),
      field("Seed", seed),
      h("label.check", {}, lock, "Keep this seed"),
      h("label.check", {}, rerank, "Best first, by CLIP"),
      styles,
      changing,
    ),
  );
  // What is wrong in there has to be seen: a browser does not send the form, and can point at nothing that is hidden.
  options.addEventListener("invalid", () => (options.open = true), true);
  root.append(
    h(
      "form.search",
      { onsubmit: submit },
      h("div.line", {}, prompt, draw, cancel),
      start,
      options,
      h(
        "div.tools",
        {},
        chooser("Start from a picture", (files) => from(files)),
        copier(asked),
      ),
    ),
    status,
    bar,
    grid,
  );
  receive(root, (files) => from(files), signal);
  signal.addEventListener("abort", () => drawing?.abort());
  offerStyles();

  async function offerStyles() {
    try {
      const { data } = await call("/models", { signal });
      const model = data.find((/** @type {import("./types.js").Model} */ { makes }) => makes.includes("image"));
      if (!model) {
        draw.disabled = true;
        fill(
          status,
          "No model that draws is loaded: train one with semblance-train dalle, and put it among the checkpoints.",
        );
        return;
      }
      style.append(...model.styles.map((/** @type {string} */ name) => h("option", { value: name }, name)));
      styles.hidden = !model.styles.length;
      style.value = here().params.get("style") ?? "";
    } catch (error) {
      fail(error);
    }
  }

  /** @param {Blob[]} files */
  async function from(files) {
    if (!files.length) return;
    try {
      const picture = await keep(files[0]);
      const params = form(); // with what was written and set, and is in no address yet
      params.set("picture", picture);
      go("generate", params);
    } catch (error) {
      fail(error);
    }
  }

  /** The form as parameters of the address; those that are as they were are not in it. */
  function form() {
    const params = new URLSearchParams();
    const values = {
      q: prompt.value.trim(),
      top_k: topK.value,
      seed: seed.value,
      style: style.value,
      picture: here().params.get("picture") ?? "",
    };
    const slid = Object.fromEntries(Object.entries(sliders).map(([name, { input }]) => [name, input.value]));
    for (const [name, value] of Object.entries({ ...values, ...slid })) {
      if (value !== "" && Reflect.get(DEFAULTS, name) !== value) params.set(name, value);
    }
    if (!rerank.checked) params.set("rerank", "0");
    if (lock.checked) params.set("lock", "1");
    return params;
  }

  /** What an address asks of the server. @param {URLSearchParams} params */
  function body(params) {
    const value = (/** @type {keyof typeof DEFAULTS} */ name) => Number(params.get(name) ?? DEFAULTS[name]);
    const image = kept(params.get("picture") ?? "");
    return {
      ...(params.get("q") ? { prompt: params.get("q") } : {}),
      n: value("n"),
      seed: Number(params.get("seed")),
      temperature: value("temperature"),
      top_k: value("top_k"),
      top_p: value("top_p"),
      guidance_scale: value("guidance_scale"),
      rerank: params.get("rerank") !== "0",
      ...(params.get("style") ? { style: params.get("style") } : {}),
      ...(image ? { image, change: value("change") } : {}),
    };
  }

  /** @returns {import("./snippets.js").Asked | null} */
  function asked() {
    const { params } = here();
    if (!params.get("q") && !params.get("picture")) return null;
    const { prompt: text = "", image, ...others } = /** @type {Record<string, any>} */ (body(params));
    const first = image ? `, image=Path("picture.jpg")` : "";
    return {
      path: pathOf(text),
      json: body(params),
      python: `client.generate(${python(text)}${first}${keywords(others)})`,
    };
  }

  /** @param {Event} event */
  function submit(event) {
    event.preventDefault();
    // A seed that was typed, or came with the address, is drawn once; the next one is new unless it is kept.
    if (seed.value === "" || (!lock.checked && seed.value === spent)) {
      seed.value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
    }
    spent = seed.value;
    const params = form();
    if (!params.get("q") && !params.get("picture")) {
      fill(status, "Write what to draw, or start from a picture.");
      prompt.focus();
      return;
    }
    drawn.delete(params.toString());
    drawing?.abort();
    drawingFor = params.toString();
    go("generate", params);
    run(params);
  }

  /** @param {URLSearchParams} params */
  async function run(params) {
    const stop = new AbortController();
    drawing = stop;
    const asked = body(params);
    const started = performance.now();
    const frames = Array.from({ length: asked.n }, () => h("img", { alt: "", width: 256, height: 256 }));
    /** @type {Drawn[]} */
    const whole = [];
    fill(
      grid,
      frames.map((frame) => h("li", {}, h("div.drawing", {}, frame))),
    );
    grid.setAttribute("aria-busy", "true");
    fill(status, "Waiting for the server…");
    bar.hidden = cancel.hidden = false;
    bar.value = 0;
    try {
      for await (const event of events(pathOf(asked.prompt ?? ""), {
        json: { ...asked, stream: true, partial_images: PARTIAL },
        signal: stop.signal,
        patience: 5,
      })) {
        const source = `data:image/png;base64,${event.b64_json}`;
        if (event.type.endsWith("partial_image")) {
          frames[event.index].src = source;
          bar.value = event.step / event.steps;
          const seconds = (performance.now() - started) / 1000;
          const rest = (seconds / event.step) * (event.steps - event.step);
          fill(status, `${number(event.step)} of ${counted(event.steps, "token")}, about ${number(rest, 1)} s left`);
        } else {
          whole.push({ b64_json: event.b64_json, seed: event.seed, score: event.score });
        }
      }
      drawn.set(params.toString(), whole);
      present(params);
      fill(status, `${counted(whole.length, "picture")} in ${number((performance.now() - started) / 1000, 1)} s`);
    } catch (error) {
      if (stop.signal.aborted) {
        if (drawing === stop) fill(status, "Cancelled; the server has stopped drawing.");
      } else {
        fail(error);
      }
    } finally {
      if (drawing === stop) {
        drawingFor = "";
        bar.hidden = cancel.hidden = true;
        grid.removeAttribute("aria-busy");
      }
    }
  }

  /** Shows what was drawn for an address. @param {URLSearchParams} params */
  function present(params) {
    const known = drawn.get(params.toString());
    if (!known) return false;
    const text = params.get("q") ?? "";
    fill(
      grid,
      known.map(({ b64_json, seed: own, score }, at) => {
        const source = `data:image/png;base64,${b64_json}`;
        const blob = new Blob([bytesOf(b64_json)], { type: "image/png" }); // the page may not fetch a data: URI
        const name = `${text.replace(/[^A-Za-z0-9]+/g, "-").slice(0, 60) || "drawing"}-${own}.png`;
        const similar = async () =>
          go("search", new URLSearchParams({ with: written({ weight: 1, kind: "picture", value: await keep(blob) }) }));
        const again = async () => {
          const next = new URLSearchParams(params);
          next.set("picture", await keep(blob));
          go("generate", next);
          toast("It starts from this picture now; draw again for more like it.");
          prompt.focus();
        };
        return h(
          "li",
          {},
          h(
            "div.drawing",
            {},
            h("img", { src: source, alt: `${text || "drawing"}, number ${at + 1}`, width: 256, height: 256 }),
          ),
          h(
            "span.line",
            {},
            h("span.caption", {}, `seed ${own}`),
            score === null ? null : h("span.score", {}, score.toFixed(3)),
          ),
          h(
            "div.tools",
            {},
            h("a.button", { href: source, download: name }, "Download"),
            h("button", { type: "button", onclick: again }, "More like this"),
            h("button", { type: "button", onclick: similar }, "Find similar"),
          ),
        );
      }),
    );
    return true;
  }

  /** @param {unknown} error */
  function fail(error) {
    if (signal.aborted) return;
    fill(grid);
    explain(status, error);
  }

  return (params) => {
    prompt.value = params.get("q") ?? "";
    for (const [name, { input, output }] of Object.entries(sliders)) {
      input.value = params.get(name) ?? Reflect.get(DEFAULTS, name);
      fill(output, input.value);
    }
    topK.value = params.get("top_k") ?? DEFAULTS.top_k;
    seed.value = params.get("seed") ?? "";
    lock.checked = params.get("lock") !== null;
    rerank.checked = params.get("rerank") !== "0";
    style.value = params.get("style") ?? "";
    const name = params.get("picture");
    const source = kept(name ?? "");
    changing.hidden = source === null;
    const without = () => {
      const changed = form();
      changed.delete("picture");
      go("generate", changed);
    };
    fill(
      start,
      name &&
        h(
          "span.chip",
          {},
          source ? h("img", { src: source, alt: "", width: 40, height: 40 }) : null,
          source ? "Starts from this picture" : "The picture to start from is gone; choose it again",
          h("button", { type: "button", "aria-label": "Take the picture away", onclick: without }, "×"),
        ),
    );
    if (drawingFor === params.toString()) return; // it is on its way
    drawing?.abort();
    if (!present(params)) {
      fill(grid);
      if (!draw.disabled)
        fill(
          status,
          params.get("q")
            ? "Draw to see it: the seed is in the address, and gives the same pictures."
            : "Say what to draw, such as “a red star to the left of a blue circle”.",
        );
    } else {
      fill(status, counted(drawn.get(params.toString())?.length ?? 0, "picture"));
    }
  };
}

/** With no text there is a picture, which is varied. @param {string} prompt */
function pathOf(prompt) {
  return prompt ? "/generate" : "/v1/images/variations";
}
