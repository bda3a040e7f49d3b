// Looks at the graph that ComfyUI shows: what its nodes are, and what in it a person could not read.
(() => {
  const graphs = () => [app.rootGraph, ...app.rootGraph.subgraphs.values()];
  const nameOf = (graph, node) => (graph === app.rootGraph ? String(node.id) : `${graph.id}:${node.id}`);
  const FRONTEND_ONLY = new Set(["MarkdownNote", "Note", "Reroute", "PrimitiveNode"]);

  const optionsOf = (widget, node) => {
    const options = widget.options?.values;
    return typeof options === "function" ? options(widget, node) : (options ?? null);
  };

  const describe = (graph, node) => ({
    id: nameOf(graph, node),
    type: node.type,
    known: node.type in LiteGraph.registered_node_types || Boolean(node.subgraph),
    error: Boolean(node.has_errors),
    values: JSON.parse(JSON.stringify(node.serialize().widgets_values ?? [])),
    widgets: (node.widgets ?? []).map((widget) => ({
      name: widget.name,
      value: widget.value,
      options: widget.type === "combo" ? optionsOf(widget, node) : null,
    })),
    linked: (node.widgets ?? [])
      .filter((widget) => widget.serialize !== false)
      .map((widget) => node.inputs?.some((slot) => slot.widget?.name === widget.name && slot.link != null) ?? false),
    unlinked: Object.values(node.constructor.nodeData?.inputs ?? {})
      .filter((input) => !input.isOptional && !FRONTEND_ONLY.has(node.type))
      .map((input) => node.inputs?.find((slot) => slot.name === input.name))
      .filter((slot) => slot && !slot.widget && slot.link == null)
      .map((slot) => slot.name),
  });

  /** Boxes of nodes with their titles, in graph units. */
  const boxOf = (node) => {
    const [x, y, width, height] = node.boundingRect;
    return { left: x, top: y, right: x + width, bottom: y + height };
  };
  const overlap = (a, b) =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;

  const overlaps = (graph, box = boxOf) => {
    const boxes = graph.nodes.map(box);
    return graph.nodes.flatMap((a, i) =>
      graph.nodes
        .filter((b, j) => j > i && overlap(boxes[i], boxes[j]))
        .map((b) => `${a.title} ${a.id} lies on ${b.title} ${b.id}`),
    );
  };

  const cutTitles = (graph) => {
    const context = document.createElement("canvas").getContext("2d");
    context.font = `${LiteGraph.NODE_TEXT_SIZE}px ${LiteGraph.NODE_FONT}`;
    return graph.nodes
      .filter((node) => context.measureText(node.getTitle()).width + 1.5 * LiteGraph.NODE_TITLE_HEIGHT > node.size[0])
      .map((node) => `the title of ${node.title} ${node.id} is cut`);
  };

  const cutValues = (graph) => {
    const context = document.createElement("canvas").getContext("2d");
    context.font = `${LiteGraph.NODE_SUBTEXT_SIZE}px ${LiteGraph.NODE_FONT}`;
    const width = (text) => context.measureText(String(text)).width;
    const found = [];
    for (const node of graph.nodes)
      for (const widget of node.widgets ?? []) {
        if (!["combo", "number", "toggle", "text"].includes(widget.type) || widget.hidden) continue;
        if (widget.type === "text" && String(widget.value).length > 60) continue;
        // Margins, arrows and the space between, as LiteGraph draws them.
        const needed = width(widget.label ?? widget.name) + width(widget.value) + 75;
        if (needed > node.size[0]) found.push(`${node.title} ${node.id}: ${widget.name} ${widget.value} is cut`);
      }
    return found;
  };

  const cutText = (graph) =>
    graph.nodes
      .filter((node) => ["MarkdownNote", "Note"].includes(node.type))
      .flatMap((node) => node.widgets.map((widget) => [node, widget.element]))
      .filter(([, element]) => element && element.clientHeight > 0 && element.scrollHeight > element.clientHeight + 4)
      .map(([node]) => `the text of note ${node.id} is longer than the note`);

  /** The points that a link goes through: its ends, and its reroutes between. */
  const pointsOf = (graph, link, from, to) => {
    const between = [];
    for (let next = graph.reroutes.get(link.parentId); next; next = graph.reroutes.get(next.parentId))
      between.unshift(next.pos);
    return [from.getOutputPos(link.origin_slot), ...between, to.getInputPos(link.target_slot)];
  };

  /** Points of the curve between two of them, as LiteGraph draws it. */
  const curve = ([x0, y0], [x1, y1]) => {
    const reach = Math.hypot(x1 - x0, y1 - y0) / 4;
    return Array.from({ length: 99 }, (_, index) => {
      const t = (index + 1) / 100;
      const s = 1 - t;
      const [a, b, c, d] = [s * s * s, 3 * s * s * t, 3 * s * t * t, t * t * t];
      return [a * x0 + b * (x0 + reach) + c * (x1 - reach) + d * x1, (a + b) * y0 + (c + d) * y1];
    });
  };

  const isInside = ([x, y], box) => x > box.left + 2 && x < box.right - 2 && y > box.top + 2 && y < box.bottom - 2;

  /** Links that run behind a node they have nothing to do with; `box` gives a node's box, or null where it has none. */
  const hidden = (graph, box = boxOf) => {
    const found = [];
    const boxes = new Map(graph.nodes.map((node) => [node, box(node)]));
    for (const link of graph.links.values()) {
      const [from, to] = [graph.getNodeById(link.origin_id), graph.getNodeById(link.target_id)];
      if (!from || !to) continue;
      const points = pointsOf(graph, link, from, to);
      const path = points.slice(1).flatMap((point, index) => curve(points[index], point));
      for (const node of graph.nodes)
        if (node !== from && node !== to && path.some((point) => isInside(point, boxes.get(node))))
          found.push(`the link from ${from.title} ${from.id} to ${to.title} ${to.id} runs behind ${node.title} ${node.id}`);
    }
    return found;
  };

  /** Whether the ways p to q and r to s cross. */
  const cross = (p, q, r, s) => {
    const leftOf = (a, b, c) => (b[0] - a[0]) * (c[1] - a[1]) > (b[1] - a[1]) * (c[0] - a[0]);
    return leftOf(p, q, r) !== leftOf(p, q, s) && leftOf(r, s, p) !== leftOf(r, s, q);
  };

  /** Links that cross. Inside subgraphs they may: there every switch is set by one. */
  const crossings = (graph) => {
    if (graph !== app.rootGraph) return [];
    const ways = [...graph.links.values()].map((link) => {
      const [from, to] = [graph.getNodeById(link.origin_id), graph.getNodeById(link.target_id)];
      const points = pointsOf(graph, link, from, to);
      return [link.id, points.slice(1).flatMap((point, index) => [points[index], ...curve(points[index], point), point])];
    });
    return ways.flatMap(([one, a], index) =>
      ways
        .slice(index + 1)
        .filter(([, b]) => a[0][0] !== b[0][0] || a[0][1] !== b[0][1])
        .filter(([, b]) => a.some((p, i) => i && b.some((r, j) => j && cross(a[i - 1], p, b[j - 1], r))))
        .map(([other]) => `links ${one} and ${other} cross`),
    );
  };

  /** A node's box as Nodes 2.0 draws it, which is taller than the canvas does, in graph units. */
  const boxInVue = (node) => {
    const { scale, offset } = app.canvas.ds;
    const frame = app.canvas.canvas.getBoundingClientRect();
    const drawn = document.querySelector(`[data-node-id="${node.id}"]`).getBoundingClientRect();
    const x = (pixels) => (pixels - frame.left) / scale - offset[0];
    const y = (pixels) => (pixels - frame.top) / scale - offset[1];
    return { left: x(drawn.left), top: y(drawn.top), right: x(drawn.right), bottom: y(drawn.bottom) };
  };

  /** Texts of nodes that their own boxes do not show whole in Nodes 2.0. */
  const cutInVue = (graph) =>
    graph.nodes.flatMap((node) =>
      [...document.querySelectorAll(`[data-node-id="${node.id}"] *`)]
        .filter((e) => e.children.length === 0 && e.textContent.trim() && e.clientWidth > 0 && e.scrollWidth > e.clientWidth + 1)
        .map((e) => `${node.title} ${node.id}: ${e.textContent.trim()} is cut`),
    );

  /** What is wrong in the graph that is shown, as Nodes 2.0 draws it. */
  const problemsInVue = () => {
    const graph = app.canvas.graph;
    const missing = graph.nodes.filter((node) => !document.querySelector(`[data-node-id="${node.id}"]`));
    if (missing.length) return missing.map((node) => `${node.title} ${node.id} is not drawn`);
    return [...overlaps(graph, boxInVue), ...hidden(graph, boxInVue), ...cutInVue(graph)];
  };

  /** Shows one of the graphs: the root graph is the first, the insides of its subgraphs follow. */
  const show = (index) => {
    const graph = graphs()[index];
    const host = app.rootGraph.nodes.find((node) => node.subgraph === graph);
    if (host) app.canvas.openSubgraph(graph, host);
    else app.canvas.setGraph(graph);
  };

  window.lowbitTest = {
    nodes: () => graphs().flatMap((graph) => graph.nodes.map((node) => describe(graph, node))),
    problems: () =>
      graphs().flatMap((graph) => [overlaps, cutTitles, cutValues, cutText, hidden, crossings].flatMap((check) => check(graph))),
    problemsInVue,
    count: () => graphs().length,
    show,
    dialogs: () => [...document.querySelectorAll("[role=dialog]")].map((dialog) => dialog.innerText.slice(0, 200)),
  };
})();
