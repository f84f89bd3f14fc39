// Settings nodes: choosing a preset fills in the fields, and advanced fields are hidden behind "Show Advanced".
import { app } from "../../scripts/app.js";

/**
 * @typedef {import("@comfyorg/comfyui-frontend-types").ComfyExtension} ComfyExtension
 * @typedef {Record<string, Record<string, string | number | boolean>>} Presets values by field, by preset
 * @typedef {{ input?: { required?: { preset?: [unknown, { forget_concept_presets?: Presets }] } } }} NodeData the
 *   host's description of a node
 * @typedef {{ advanced?: boolean }} Marked options of a widget that may be advanced
 */

/** @type {ComfyExtension} */
const extension = {
  name: "forget-concept.settings",

  nodeCreated(node) {
    const kind = /** @type {{ nodeData?: NodeData }} */ (node.constructor);
    const presets = kind.nodeData?.input?.required?.preset?.[1]?.forget_concept_presets;
    const chooser = node.widgets?.find((widget) => widget.name === "preset");
    if (!presets || !chooser) return;
    // the page applies the option only to its newer nodes; on the canvas, widgets that are only "advanced" leave gaps
    for (const widget of node.widgets ?? []) {
      if (!(/** @type {Marked} */ (widget.options ?? {}).advanced)) continue;
      widget.advanced = true;
      Object.defineProperty(widget, "hidden", { get: () => !node.showAdvanced, set() {}, configurable: true });
    }
    node.setSize?.(node.computeSize());
    const before = chooser.callback;
    chooser.callback = function (value, ...rest) {
      const answer = before?.call(this, value, ...rest);
      for (const widget of node.widgets ?? []) {
        const values = presets[value];
        if (widget !== chooser && values && widget.name in values) widget.value = values[widget.name];
      }
      node.setDirtyCanvas(true, true);
      return answer;
    };
  },
};

app.registerExtension(extension);
