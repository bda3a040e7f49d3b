// Shows on a node of this pack the text that it made, which ComfyUI itself shows only on its own preview nodes.
import { app } from "../../../scripts/app.js";
import { addStyle } from "./style.js";

const NODE_TYPES = new Set(["LowbitAttentionReport", "LowbitOptimize", "LowbitSaveQuantizedModel"]);
const WIDGET = "lowbit_report_text";
const LEAST_HEIGHT = 40;
// A few lines are shown whole, with one to spare for words that wrap early; a long report scrolls.
const MOST_HEIGHT = 170;
const LINE_HEIGHT = 16;
const CHARACTER_WIDTH = 6.5;
const PADDING = 40;

/** The height that the node's text needs, as it wraps in the node's width. */
function neededHeight(node, text) {
  const perLine = Math.max(1, (node.size[0] - PADDING) / CHARACTER_WIDTH);
  const lines = text.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / perLine)), 0);
  return Math.min(MOST_HEIGHT, Math.max(LEAST_HEIGHT, (lines + 1) * LINE_HEIGHT + 10));
}

/** The element that shows the node's text. It is made with the first text, so that a node that never ran stays small. */
function elementOf(node) {
  const found = node.widgets?.find((widget) => widget.name === WIDGET);
  if (found) return found.element;
  addStyle();
  const element = document.createElement("pre");
  element.className = "lowbit-report";
  const widget = node.addDOMWidget(WIDGET, "lowbit_report_text", element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => neededHeight(node, element.textContent),
  });
  widget.serialize = false;
  return element;
}

/** Shows the text, and makes room for it; a node that the user made larger stays as it is. */
function show(node, text) {
  elementOf(node).textContent = text;
  const needed = node.computeSize()[1];
  if (node.size[1] < needed) node.setSize([node.size[0], needed]);
}

app.registerExtension({
  name: "lowbit.reportText",
  nodeCreated(node) {
    if (!NODE_TYPES.has(node.comfyClass)) return;
    const before = node.onExecuted;
    node.onExecuted = function (output) {
      before?.apply(this, arguments);
      const text = output?.text;
      if (text) show(this, [text].flat().join("\n"));
    };
  },
});
