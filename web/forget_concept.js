// Forms of the nodes: advanced fields are hidden until they are asked for, a preset fills in its fields, and only presets
// and fields of the chosen method are offered.
import { app } from "../../scripts/app.js";

/**
 * @typedef {import("@comfyorg/comfyui-frontend-types").ComfyExtension} ComfyExtension
 * @typedef {Parameters<NonNullable<ComfyExtension["nodeCreated"]>>[0] & { showAdvanced?: boolean,
 *   toggleAdvanced?: () => void, onConfigure?: (info: unknown) => void }} Node a node of the page
 * @typedef {NonNullable<Node["widgets"]>[number]} Widget
 * @typedef {Record<string, Record<string, string | number | boolean>>} Presets values by field, by preset
 * @typedef {{ forget_concept_presets?: Presets, forget_concept_methods?: Record<string, Presets> }} Extras what the
 *   pack adds to the host's description of an input
 * @typedef {{ input?: { required?: Record<string, [unknown, Extras?]> } }} NodeData the host's description of a node
 */

const NODES_2 = "Comfy.VueNodes.Enabled";
const AS_PRESET = "as preset";

/** @returns {boolean} whether nodes are drawn on the canvas, and not as Nodes 2.0 */
function onCanvas() {
  return !app.extensionManager?.setting?.get(NODES_2);
}

/** @param {Node} node @returns {Widget[]} */
function advanced(node) {
  return (node.widgets ?? []).filter((widget) => /** @type {{ advanced?: boolean }} */ (widget.options ?? {}).advanced);
}

/**
 * Hide a node's advanced fields, or show them. The canvas leaves a gap for fields that are only "advanced", so they are
 * hidden there too; Nodes 2.0 does by itself what the schema says.
 * @param {Node} node @param {boolean} [shown]
 */
function arrange(node, shown = !!node.showAdvanced) {
  const hidden = onCanvas() && !shown;
  for (const widget of advanced(node)) {
    widget.advanced = true;
    if (!!widget.hidden !== hidden) widget.hidden = hidden;
  }
}

/** @param {Node} node */
function fit(node) {
  node.setSize?.([node.size[0], node.computeSize()[1]]);
  node.setDirtyCanvas(true, true);
}

/** @param {Node} node */
function foldable(node) {
  if (!advanced(node).length) return;
  arrange(node);
  node.setSize?.(node.computeSize());
  const toggle = node.toggleAdvanced;
  node.toggleAdvanced = function () {
    arrange(node, !node.showAdvanced); // first: the node fits itself to what it shows
    toggle?.call(this);
    arrange(node);
    fit(node);
  };
  const configured = node.onConfigure;
  node.onConfigure = function (info) {
    configured?.call(this, info);
    arrange(node);
  };
}

/**
 * Call `after` whenever a widget gets another value from the person.
 * @param {Widget} widget @param {(value: any) => void} after
 */
function onChoice(widget, after) {
  const before = widget.callback;
  widget.callback = function (value, ...rest) {
    const answer = before?.call(this, value, ...rest);
    after(value);
    return answer;
  };
}

/** @param {Node} node @param {string} name */
function named(node, name) {
  return node.widgets?.find((widget) => widget.name === name);
}

/**
 * Offer only these values in a combo; one that is not among them becomes the first.
 * @param {Node} node @param {Widget} widget @param {string[]} values
 */
function offer(node, widget, values) {
  widget.options = Object.assign(widget.options ?? {}, { values });
  if (!values.includes(String(widget.value))) widget.value = values[0];
  node.setDirtyCanvas(true, true);
}

/**
 * Forget Concept and Forget in Sequence: presets and fields are those of the chosen method.
 * @param {Node} node @param {Record<string, Presets>} methods
 */
function follow(node, methods) {
  const [method, preset, adjust] = ["method", "preset", "adjust"].map((name) => named(node, name));
  if (!method || !preset) return;
  const known = () => methods[String(method.value)] ?? {};
  const adjusted = () => adjust && adjust.value !== AS_PRESET;
  const fields = () => adjusted() && fill(node, known(), preset.value, "adjust.");
  const offered = () => {
    const names = Object.keys(known());
    if (!names.length) return;
    offer(node, preset, names.includes("tuned") ? ["tuned", ...names.filter((name) => name !== "tuned")] : names);
    if (adjust) offer(node, adjust, [AS_PRESET, String(method.value)]);
  };
  onChoice(method, () => {
    const open = adjusted();
    offered();
    if (open && adjust) adjust.value = method.value;
    fields();
  });
  onChoice(preset, fields);
  if (adjust) onChoice(adjust, fields);
  offered();
  const configured = node.onConfigure;
  node.onConfigure = function (info) {
    configured?.call(this, info);
    offered();
  };
}

/** A preset's values for the fields of a node; `prefix` stands before their names. */
function fill(/** @type {Node} */ node, /** @type {Presets} */ presets, /** @type {any} */ preset, prefix = "") {
  for (const [field, value] of Object.entries(presets[preset] ?? {})) {
    const widget = named(node, prefix + field);
    if (widget) widget.value = value;
  }
  node.setDirtyCanvas(true, true);
}

/** @type {Set<WeakRef<Node>>} */
const folded = new Set();

/** @type {ComfyExtension} */
const extension = {
  name: "forget-concept.settings",

  setup() {
    // nodes that are on the canvas when the person changes to Nodes 2.0, or back
    app.ui?.settings?.addEventListener?.(`${NODES_2}.change`, () =>
      setTimeout(() => {
        for (const one of folded) {
          const node = one.deref();
          if (node) arrange(node);
          else folded.delete(one);
        }
      }),
    );
  },

  nodeCreated(created) {
    if (!created.comfyClass?.startsWith("ForgetConcept")) return;
    const node = /** @type {Node} */ (created);
    foldable(node);
    folded.add(new WeakRef(node));
    const known = /** @type {{ nodeData?: NodeData }} */ (node.constructor).nodeData?.input?.required ?? {};
    const presets = known.preset?.[1]?.forget_concept_presets;
    const chooser = named(node, "preset");
    if (presets && chooser) onChoice(chooser, (value) => fill(node, presets, value));
    const methods = known.method?.[1]?.forget_concept_methods;
    if (methods) follow(node, methods);
  },
};

app.registerExtension(extension);
