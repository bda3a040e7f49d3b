// Shows the memory manager's readings on its node, or on the one node, while it samples: listens to "lowbit.memory" and finds the node.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { MemoryMeterView } from "./memory_meter_view.js";

const EVENT = "lowbit.memory";
const NODE_TYPES = new Set(["LowbitMemoryManager", "LowbitOptimize"]);
// ComfyUI writes a node's lines of progress into the widget of this name, or makes one. The meter says the same as those
// lines, so it takes their place.
const WIDGET = "$$node-text-preview";
// Newer pages take that widget away where a run ends: the meter goes back there, since its last reading is what one looks for.
const ENDS = ["execution_success", "execution_error", "execution_interrupted"];
const WIDTH = 340;
const MARGIN = 6;

/** The node that an execution id such as "12:5" names: each part is a node inside the subgraph of the one before. */
function findNode(executionId) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const id of String(executionId).split(":")) {
    node = graph?.getNodeById(id) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

/** The pack's texts in the user's language, in English where that has none. */
async function loadTexts() {
  const language = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
  const all = await (await api.fetchApi("/i18n")).json();
  return { ...all.en?.lowbitMeter, ...all[language]?.lowbitMeter };
}

/** The node's meter. It is made with the first reading, so that a node that never ran looks like any other. */
function meterOf(node, say, views) {
  const found = node.widgets?.find((widget) => widget.name === WIDGET);
  if (found?.view) return found.view;
  if (found) node.removeWidget(found);
  const view = views.get(node) ?? new MemoryMeterView(say);
  views.set(node, view);
  const widget = node.addDOMWidget(WIDGET, "lowbit_memory_meter", view.element, {
    serialize: false,
    hideOnZoom: false,
    margin: MARGIN,
    getMinHeight: () => view.height + 2 * MARGIN,
    getMaxHeight: () => view.height + 2 * MARGIN,
  });
  widget.serialize = false;
  widget.view = view;
  return view;
}

/** Makes room for the meter; a node that the user made larger stays as it is. */
function fit(node) {
  const needed = node.computeSize();
  const [width, height] = node.size;
  if (width < WIDTH || height < needed[1]) node.setSize([Math.max(width, WIDTH), Math.max(height, needed[1])]);
}

app.registerExtension({
  name: "lowbit.memoryMeter",
  async setup() {
    let texts = {};
    const waiting = new Map();
    const views = new Map();
    // A phase without a text is the class of the node at work.
    const say = (text) => texts[text] ?? LiteGraph.registered_node_types[text]?.title ?? text;

    const draw = () => {
      for (const [node, readings] of waiting) {
        if (!node.graph) continue;
        const view = meterOf(node, say, views);
        const height = view.height;
        view.update(readings);
        if (view.height !== height) fit(node);
        node.setDirtyCanvas(true, true);
      }
      waiting.clear();
    };

    api.addEventListener(EVENT, ({ detail }) => {
      const node = findNode(detail?.node_id ?? "");
      if (!NODE_TYPES.has(node?.comfyClass ?? node?.type)) return;
      meterOf(node, say, views); // at once: the line of progress is on its way
      if (waiting.size === 0) requestAnimationFrame(draw);
      waiting.set(node, [...(waiting.get(node) ?? []), detail]);
    });
    const putBack = () => {
      for (const node of views.keys()) {
        if (!node.graph) views.delete(node);
        else meterOf(node, say, views);
      }
    };
    for (const name of ENDS) api.addEventListener(name, () => requestAnimationFrame(putBack));
    try {
      texts = await loadTexts();
    } catch (error) {
      console.warn("lowbit: the meter's texts could not be read, it is in English", error);
    }
  },
});
