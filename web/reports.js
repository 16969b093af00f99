// Reports and warnings of this pack's nodes, as text in the node: whole, with its line breaks, to scroll and to copy.
// Also why a node is red before anything runs: the page itself says only that an input was rejected.
// The text is part of what a node gives out ("text"), so that the host sends it again when it takes a node from its cache.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const FOLDER = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2));
const NAME = "report";
const LINE = 15; // height of a line in px
const SMALLEST = 3 * LINE + 12; // the field when its node is made as small as it gets
const TALLEST = 20 * LINE; // to which a node grows by itself
const WIDTH = 240; // of a node that gets a field, at least
const SECONDS_RED = 20; // that a message stays in the corner of the page; in the node it stays until the next run
// Nodes whose every run ends in a report have its field from the start, and room for it.
const ROOM = {
  TurboDoctor: [640, 560],
  TurboLoraReport: [640, 420],
  TurboConvert: [420, 260],
  TurboMerge: [420, 330],
  TurboSave: [420, 180],
  TurboCompare: [900, 1000],
};
const STYLE = `
.turbowan-report { position: relative; display: flex; min-height: ${SMALLEST}px; width: 100%; height: 100%; }
.turbowan-report textarea { flex: 1; width: 100%; min-height: ${SMALLEST}px; box-sizing: border-box; resize: none;
  margin: 0; padding: 6px 8px; border: none; border-radius: 6px; outline-offset: -1px; overflow: auto; tab-size: 2;
  font: 11px/${LINE}px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  color: var(--input-text, #ddd); background: var(--comfy-input-bg, #222); user-select: text; }
.turbowan-report button { visibility: hidden; position: absolute; top: 4px; right: 16px; padding: 1px 8px; border: none; border-radius: 4px;
  font: 11px/16px sans-serif; color: var(--input-text, #ddd); background: var(--comfy-menu-bg, #444); opacity: 0.85;
  cursor: pointer; }
.turbowan-report:is(:hover, :focus-within) textarea:not(:placeholder-shown) + button { visibility: visible; }`;

function field(node) {
  const found = node.widgets?.find((widget) => widget.name === NAME);
  if (found) return found;
  const text = document.createElement("textarea");
  text.readOnly = true;
  text.spellcheck = false;
  text.placeholder = "The report appears here when the node has run.";
  text.setAttribute("aria-label", NAME);
  text.dataset.captureWheel = "true"; // the page's own mark: the wheel scrolls it while it has the focus
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "copy";
  button.addEventListener("click", () => copy(text, button));
  const box = document.createElement("div");
  box.className = "turbowan-report";
  box.append(text, button);
  const widget = node.addDOMWidget(NAME, NAME, box, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => SMALLEST,
    getValue: () => text.value,
    setValue: (value) => (text.value = value ?? ""),
  });
  widget.serialize = false;
  return widget;
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text.value);
  } catch {
    text.select(); // a page without https has no clipboard of this kind
    document.execCommand("copy");
  }
  button.textContent = "copied";
  setTimeout(() => (button.textContent = "copy"), 1500);
}

function joined(parts) {
  return Array.isArray(parts) ? parts.join("\n\n") : parts;
}

function write(node, output) {
  const parts = output?.text;
  if (!parts?.length) {
    const left = node.widgets?.find((widget) => widget.name === NAME);
    if (left && output) left.value = ""; // this run said nothing
    return;
  }
  const text = joined(parts);
  const missing = !node.widgets?.some((widget) => widget.name === NAME);
  field(node).value = text;
  if (!missing) return;
  const width = Math.max(node.size[0], WIDTH);
  const columns = (width - 36) / 6.7;
  const lines = text.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / columns)), 0);
  const room = Math.min(TALLEST, Math.max(SMALLEST, lines * LINE + 12)) - SMALLEST;
  node.setSize([width, Math.max(node.size[1], node.computeSize()[1] + room)]);
  node.setDirtyCanvas?.(true, true);
}

// A node by the page's name for it: its number, in a subgraph after the subgraph's id and a colon.
function nodeAt(locator) {
  const [id, graph] = String(locator).split(":").reverse();
  const root = app.rootGraph ?? app.graph;
  return (graph ? root.subgraphs?.get(graph) : root)?.getNodeById(id);
}

// A node by its number in a prompt: behind those of the subgraphs around it.
function nodeOnWay(numbers) {
  let graph = app.rootGraph ?? app.graph;
  let node;
  for (const id of String(numbers).split(":")) {
    node = graph?.getNodeById(id) ?? graph?.getNodeById(Number(id));
    graph = node?.subgraph;
  }
  return node;
}

const inside = new WeakMap(); // of a node that stands for a graph: what the nodes in it say, by their numbers

// What is said inside a node that stands for a graph is seen on that node.
function writeOutside(numbers, text) {
  const way = String(numbers).split(":");
  const outer = way.length > 1 && nodeOnWay(way[0]);
  if (!outer) return;
  const said = inside.get(outer) ?? new Map();
  inside.set(outer, said.set(String(numbers), text));
  const texts = [...said.values()].filter(Boolean);
  if (texts.length || outer.widgets?.some((widget) => widget.name === NAME)) write(outer, { text: texts });
}

const red = new Map(); // nodes that say why they are red: their number, and their size before, null where the field was there

function clearRed() {
  for (const [node, { size, numbers }] of red) {
    writeOutside(numbers, "");
    const widget = node.widgets?.find((found) => found.name === NAME);
    if (!widget) continue;
    widget.value = "";
    if (!size) continue;
    node.removeWidget(widget);
    node.setSize(size);
  }
  red.clear();
}

function tellRed(refused) {
  for (const [numbers, { errors }] of Object.entries(refused ?? {})) {
    const node = nodeOnWay(numbers);
    if (!isOurs(node?.constructor?.nodeData)) continue;
    const ours = errors.filter((error) => error.type === "custom_validation_failed");
    const said = ours.map(({ details, extra_info }) => details.replace(`${extra_info?.input_name} - `, ""));
    if (!said.length) continue;
    const size = node.widgets?.some((widget) => widget.name === NAME) ? null : [...node.size];
    red.set(node, { size, numbers });
    write(node, { text: said });
    writeOutside(numbers, joined(said));
    const detail = said.join("\n");
    app.extensionManager?.toast?.add({ severity: "error", summary: node.title, detail, life: SECONDS_RED * 1000 });
  }
}

const queuePrompt = api.queuePrompt;
api.queuePrompt = async function (...given) {
  clearRed();
  try {
    const answer = await queuePrompt.apply(this, given);
    tellRed(answer?.node_errors); // of outputs that do not run while others do
    return answer;
  } catch (error) {
    tellRed(error?.response?.node_errors);
    throw error;
  }
};

function isOurs(definition) {
  return Boolean(definition?.python_module?.endsWith(`.${FOLDER}`)); // a folder's name may have dots
}

api.addEventListener("executed", ({ detail }) => {
  const numbers = detail.display_node ?? detail.node;
  if (isOurs(nodeOnWay(numbers)?.constructor?.nodeData)) writeOutside(numbers, joined(detail.output?.text ?? ""));
});

app.registerExtension({
  name: "TurboWan.Reports",
  init() {
    document.head.append(Object.assign(document.createElement("style"), { textContent: STYLE }));
  },
  beforeRegisterNodeDef(type, definition) {
    if (!isOurs(definition)) return;
    const room = ROOM[definition.name];
    const { onNodeCreated, onExecuted } = type.prototype;
    type.prototype.onNodeCreated = function (...given) {
      onNodeCreated?.apply(this, given);
      if (!room) return;
      field(this);
      this.setSize(room.map((length, axis) => Math.max(length, this.size[axis])));
    };
    type.prototype.onExecuted = function (output) {
      onExecuted?.call(this, output);
      write(this, output);
    };
  },
  // when a tab comes to the front again, or a run that was on the way when the page was loaded again
  onNodeOutputsUpdated(outputs) {
    for (const [locator, output] of Object.entries(outputs)) {
      const node = nodeAt(locator);
      if (isOurs(node?.constructor?.nodeData)) write(node, output);
    }
  },
});
