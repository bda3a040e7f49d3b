// Shows on a node of this pack the text that it made, which ComfyUI itself shows only on its own preview nodes.
import { app } from "../../../scripts/app.js";
import { addStyle } from "./style.js";

const NODE_TYPES = new Set(["LowbitAttentionReport", "LowbitSaveQuantizedModel"]);
const WIDGET = "lowbit_report_text";
const LEAST_HEIGHT = 40;

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
    getMinHeight: () => LEAST_HEIGHT,
  });
  widget.serialize = false;
  const needed = node.computeSize()[1];
  if (node.size[1] < needed) node.setSize([node.size[0], needed]);
  return element;
}

app.registerExtension({
  name: "lowbit.reportText",
  nodeCreated(node) {
    if (!NODE_TYPES.has(node.comfyClass)) return;
    const before = node.onExecuted;
    node.onExecuted = function (output) {
      before?.apply(this, arguments);
      const text = output?.text;
      if (text) elementOf(this).textContent = [text].flat().join("\n");
    };
  },
});
