// Gives a new node of this pack a width that shows its whole title: ComfyUI's own estimate is short where there are no widgets.
import { app } from "../../../scripts/app.js";

const BESIDE_TITLE = 60;

app.registerExtension({
  name: "lowbit.titleWidth",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("Lowbit")) return;
    const context = document.createElement("canvas").getContext("2d");
    context.font = node.titleFontStyle;
    const width = Math.ceil(context.measureText(node.title).width) + BESIDE_TITLE;
    if (node.size[0] < width) node.setSize([width, node.size[1]]);
  },
});
