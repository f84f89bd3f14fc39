// Evaluate Forgetting: shows its pictures before and after on top of each other, with a slider between them.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

/**
 * @typedef {import("@comfyorg/comfyui-frontend-types").ComfyExtension} ComfyExtension
 * @typedef {Parameters<NonNullable<ComfyExtension["nodeCreated"]>>[0]} LGraphNode
 * @typedef {import("@comfyorg/comfyui-frontend-types").DOMWidgetOptions<object> & { serialize?: boolean }} DOMWidgetOptions
 * @typedef {{ filename: string, subfolder: string, type: string }} Place location of a picture on the host
 * @typedef {{ prompt: string, concept: string, asked: "yes" | "no", before: Place, after: Place }} Pair
 * @typedef {{ element: HTMLElement, show: (pairs: Pair[]) => void }} Slider
 * @typedef {LGraphNode & {
 *   onExecuted?: (output: { forget_concept_pairs?: Pair[] }) => void,
 *   addDOMWidget: (name: string, type: string, element: HTMLElement, options: DOMWidgetOptions) => { serialize?: boolean },
 * }} Node a node with the page's extensions to LiteGraph
 */

const NODE = "ForgetConceptEvaluate";
const WIDGET = "before_after";
const HEIGHT = 300;

const WORDS = {
  en: {
    before: "before",
    after: "after",
    slider: "Share of the picture shown as before",
    previous: "Previous picture",
    next: "Next picture",
    share: (/** @type {number} */ value) => `${value} % before`,
    asked: (/** @type {string} */ concept) => `prompt for ${concept}`,
    other: "prompt for something else",
  },
  zh: {
    before: "之前",
    after: "之后",
    slider: "显示遗忘之前图像的比例",
    previous: "上一张",
    next: "下一张",
    share: (/** @type {number} */ value) => `之前 ${value} %`,
    asked: (/** @type {string} */ concept) => `要求 ${concept}`,
    other: "要求别的内容",
  },
};

const STYLE = `
.forget-concept-pairs { display: flex; flex-direction: column; gap: 4px; width: 100%; height: 100%;
  min-height: 260px; font-size: 12px;
  color: var(--input-text, #ddd); }
.forget-concept-pairs .frame { position: relative; flex: 1; min-height: 0; margin: 0 auto; aspect-ratio: 1;
  max-width: 100%; overflow: hidden; border-radius: 4px; --at: 50%; }
.forget-concept-pairs img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; }
.forget-concept-pairs img.before { clip-path: inset(0 calc(100% - var(--at)) 0 0); }
.forget-concept-pairs .line { position: absolute; inset: 0 auto 0 var(--at); width: 2px; margin-left: -1px;
  background: #fff; box-shadow: 0 0 3px #000; pointer-events: none; }
.forget-concept-pairs .tag { position: absolute; top: 4px; padding: 0 4px; border-radius: 3px; color: #fff;
  background: #000a; pointer-events: none; }
.forget-concept-pairs input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0;
  cursor: ew-resize; }
.forget-concept-pairs .frame:has(input:focus-visible) { outline: 2px solid #4a9eff; outline-offset: 1px; }
.forget-concept-pairs .row { display: flex; align-items: center; gap: 6px; }
.forget-concept-pairs .caption { flex: 1; text-align: center; overflow-wrap: anywhere; }
.forget-concept-pairs .about { opacity: 0.7; }
.forget-concept-pairs button { min-width: 28px; height: 24px; border: 0; border-radius: 4px; cursor: pointer;
  background: var(--comfy-input-bg, #333); color: inherit; }
.forget-concept-pairs button:focus-visible { outline: 2px solid #4a9eff; }
`;

/**
 * An element with its class and attributes.
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag @param {string} kind @param {Record<string, string>} [attributes]
 * @returns {HTMLElementTagNameMap[K]}
 */
function made(tag, kind, attributes = {}) {
  const element = document.createElement(tag);
  element.className = kind;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/** @param {Place} place */
function address({ filename, subfolder, type }) {
  return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
}

/** @returns {typeof WORDS.en} texts in the page's language, by default English */
function words() {
  const language = String(app.extensionManager?.setting?.get("Comfy.Locale") ?? "en");
  return language.startsWith("zh") ? WORDS.zh : WORDS.en;
}

/** @returns {Slider} */
function slider() {
  const say = words();
  const element = made("div", "forget-concept-pairs", { role: "group" });
  const frame = made("div", "frame");
  const after = made("img", "after", { draggable: "false" });
  const before = made("img", "before", { draggable: "false" });
  const left = made("span", "tag", { style: "left: 4px" });
  const right = made("span", "tag", { style: "right: 4px" });
  const range = made("input", "", { type: "range", min: "0", max: "100", value: "50", "aria-label": say.slider });
  frame.append(after, before, made("div", "line"), left, right, range);
  const previous = made("button", "previous", { type: "button", "aria-label": say.previous });
  const next = made("button", "next", { type: "button", "aria-label": say.next });
  const caption = made("div", "caption", { "aria-live": "polite" });
  const prompt = made("div", "prompt");
  const about = made("div", "about");
  caption.append(prompt, about);
  const row = made("div", "row");
  row.append(previous, caption, next);
  element.append(frame, row);
  [left.textContent, right.textContent] = [say.before, say.after];
  [previous.textContent, next.textContent] = ["\u2039", "\u203a"];

  /** @type {Pair[]} */
  let shown = [];
  let at = 0;

  function moved() {
    frame.style.setProperty("--at", `${range.value}%`);
    range.setAttribute("aria-valuetext", say.share(Number(range.value)));
  }

  /** @param {number} to */
  function turn(to) {
    at = (to + shown.length) % shown.length;
    const pair = shown[at];
    before.src = address(pair.before);
    after.src = address(pair.after);
    before.alt = `${say.before}: ${pair.prompt}`;
    after.alt = `${say.after}: ${pair.prompt}`;
    prompt.textContent = pair.prompt;
    about.textContent = `${at + 1} / ${shown.length}, ${pair.asked === "yes" ? say.asked(pair.concept) : say.other}`;
  }

  range.addEventListener("input", moved);
  previous.addEventListener("click", () => turn(at - 1));
  next.addEventListener("click", () => turn(at + 1));
  // keep key presses from the canvas, which has its own shortcuts
  element.addEventListener("keydown", (event) => event.stopPropagation());
  moved();
  return {
    element,
    show(pairs) {
      shown = pairs;
      turn(0);
    },
  };
}

/** @type {WeakMap<Node, Slider>} */
const sliders = new WeakMap();

/** @param {Node} node @param {Pair[]} pairs */
function show(node, pairs) {
  let own = sliders.get(node);
  if (!own) {
    own = slider();
    sliders.set(node, own);
    const widget = node.addDOMWidget(WIDGET, WIDGET, own.element, { serialize: false, getMinHeight: () => HEIGHT });
    // not saved with the workflow, which therefore works without this file
    widget.serialize = false;
    const [width, height] = node.computeSize();
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  }
  own.show(pairs);
  node.setDirtyCanvas(true, true);
}

/** @type {ComfyExtension} */
const extension = {
  name: "forget-concept.before-after",

  init() {
    const style = document.createElement("style");
    style.textContent = STYLE;
    document.head.append(style);
  },

  nodeCreated(created) {
    if (created.comfyClass !== NODE) return;
    const node = /** @type {Node} */ (created);
    const before = node.onExecuted;
    node.onExecuted = function (/** @type {{ forget_concept_pairs?: Pair[] }} */ output) {
      before?.call(this, output);
      if (output?.forget_concept_pairs?.length) show(node, output.forget_concept_pairs);
    };
  },
};

app.registerExtension(extension);
