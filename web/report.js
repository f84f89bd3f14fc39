// Every node that reports: its text stays readable on the node after a run, on the canvas and in Nodes 2.0.
import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

/**
 * @typedef {import("@comfyorg/comfyui-frontend-types").ComfyExtension} ComfyExtension
 * @typedef {Parameters<NonNullable<ComfyExtension["nodeCreated"]>>[0]} LGraphNode
 * @typedef {NonNullable<LGraphNode["widgets"]>[number] & {
 *   serialize?: boolean, inputEl?: HTMLTextAreaElement, element?: HTMLElement }} Widget
 * @typedef {LGraphNode & { onExecuted?: (output: { forget_concept_report?: string[] }) => void }} Node
 */

const WIDGET = "report";
// the host's own line of progress, which the report replaces
const PROGRESS = "$$node-text-preview";
const [LEAST, MOST, LINE, FRAME, CHARACTERS] = [40, 260, 17, 16, 56];

/** @param {string} text @returns {number} height in pixels that shows the text, up to a limit; the rest scrolls */
function height(text) {
  const lines = text.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / CHARACTERS)), 0);
  return Math.min(MOST, Math.max(LEAST, FRAME + LINE * lines));
}

/** @param {Node} node */
function removeProgress(node) {
  const at = node.widgets?.findIndex((widget) => widget.name === PROGRESS) ?? -1;
  if (at < 0 || !node.widgets) return;
  const [widget] = node.widgets.splice(at, 1);
  widget.onRemove?.();
}

/** @param {Node} node @param {string} text */
function show(node, text) {
  removeProgress(node);
  let widget = /** @type {Widget | undefined} */ (node.widgets?.find((one) => one.name === WIDGET));
  if (!widget) {
    widget = /** @type {Widget} */ (ComfyWidgets.STRING(node, WIDGET, ["STRING", { multiline: true }], app).widget);
    // not saved with the workflow and not sent: an output, no input
    widget.serialize = false;
    widget.options = Object.assign(widget.options ?? {}, { read_only: true, serialize: false });
    widget.serializeValue = () => undefined;
    const field = widget.inputEl ?? widget.element;
    if (field instanceof HTMLTextAreaElement) field.readOnly = true;
    // the field came with a socket of its own on some pages
    const socket = node.inputs?.findIndex((input) => input.widget?.name === WIDGET) ?? -1;
    if (socket >= 0) node.removeInput(socket);
  }
  const rows = height(text);
  widget.options.getMinHeight = () => rows;
  widget.options.minNodeSize = [node.size[0], rows];
  widget.value = text;
  const [width, least] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], least)]);
  node.setDirtyCanvas(true, true);
}

/** @type {ComfyExtension} */
const extension = {
  name: "forget-concept.report",

  nodeCreated(created) {
    if (!created.comfyClass?.startsWith("ForgetConcept")) return;
    const node = /** @type {Node} */ (created);
    const before = node.onExecuted;
    node.onExecuted = function (/** @type {{ forget_concept_report?: string[] }} */ output) {
      before?.call(this, output);
      const text = output?.forget_concept_report?.join("\n");
      if (text) show(node, text);
    };
  },
};

app.registerExtension(extension);
